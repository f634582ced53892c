"""What is asked of an engine, what it hands back, and how it ends."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

REASONS = ("stop", "length", "cancelled", "deadline", "error")


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    prompt or prompt_ids: a text, or its tokens. adapter: its name in the pool, None for the base.
    max_tokens: at most so many. stop: texts that end the answer and are left out of it. deadline_s:
    seconds from being submitted. temperature: 0 takes the likeliest token; above, tokens are drawn
    by `seed` (None: a new one each time).
    """

    prompt: str | None = None
    prompt_ids: list[int] | None = field(default=None, repr=False)
    adapter: str | None = None
    max_tokens: int = 64
    stop: tuple[str, ...] = ()
    deadline_s: float | None = None
    temperature: float = 0.0
    seed: int | None = None


@dataclass(frozen=True)
class Finished:
    """How a request ended. reason: of REASONS; error says why, for "error". Seconds are counted
    from being submitted: waited_s until its row began, first_token_s until its first token (None:
    there was none), total_s until its end."""

    text: str
    tokens: list[int]
    reason: str
    first_token_s: float | None
    total_s: float
    waited_s: float | None = None
    error: str | None = None


class Handle:
    """A request under way. Iterating gives pieces of text as they come, and ends with the request.

    Any thread may read, wait or cancel.
    """

    def __init__(self, request: Request, prompt_ids: list[int]):
        self.request, self.prompt_ids = request, prompt_ids
        self.submitted = time.perf_counter()
        self._changed = threading.Condition()
        self._pieces: deque[str] = deque()
        self._finished: Finished | None = None
        self._cancelled = False

    def __iter__(self) -> Iterator[str]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pieces or self._finished)
                if not self._pieces:
                    return
                piece = self._pieces.popleft()
            yield piece

    def cancel(self) -> None:
        """Ask the engine to stop; what has been written stays."""
        self._cancelled = True

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    @property
    def done(self) -> bool:
        return self._finished is not None

    def result(self, timeout: float | None = None) -> Finished:
        """Wait for the end.

        Raises:
            TimeoutError: it did not come within `timeout` seconds; the request goes on.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._finished, timeout):
                raise TimeoutError(f"The request has not ended within {timeout:g} s.")
            return self._finished

    @property
    def late(self) -> bool:
        limit = self.request.deadline_s
        return limit is not None and time.perf_counter() - self.submitted > limit

    # ---- the engine's side
    def say(self, piece: str) -> None:
        if piece:
            with self._changed:
                self._pieces.append(piece)
                self._changed.notify_all()

    def end(self, finished: Finished) -> None:
        with self._changed:
            if self._finished is None:
                self._finished = finished
                self._changed.notify_all()
