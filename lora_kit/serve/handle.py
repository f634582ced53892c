"""What is asked of an engine, what it hands back, and how it ends."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from lora_kit.errors import BadInputError, unknown_name

# What an answer's times are taken by. A benchmark on a machine that others use, too, may put
# time.process_time here; deadlines go by the wall all the same.
clock = time.perf_counter

REASONS = ("stop", "length", "cancelled", "deadline", "error")


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    prompt or prompt_ids: a text, or its tokens. adapter: its name in the pool, None for the base.
    max_tokens: at most so many. stop: texts that end the answer and are left out of it. deadline_s:
    seconds from being submitted. temperature: 0 takes the likeliest token; above, tokens are drawn
    by `seed` (None: a new one each time). ignore_eos: for measuring; the token that ends answers
    ends none, so that max_tokens are written.
    """

    prompt: str | None = None
    prompt_ids: list[int] | None = field(default=None, repr=False)
    adapter: str | None = None
    max_tokens: int = 64
    stop: tuple[str, ...] = ()
    deadline_s: float | None = None
    temperature: float = 0.0
    seed: int | None = None
    ignore_eos: bool = False


def check_request(
    request: Request, tokenizer, vocabulary: int, longest: int, adapters: Collection[str]
) -> list[int]:
    """The tokens of a request's prompt, where everything in it is in range.

    Args:
        vocabulary: tokens the model knows. longest: tokens of prompt and answer together.
        adapters: the names there are.

    Raises:
        BadInputError: no prompt, one that is too long, or a value out of range;
        UnknownNameError: no such adapter.
    """
    from lora_kit.prompts import prompt_ids

    if (request.prompt is None) == (request.prompt_ids is None):
        raise BadInputError("A request needs a prompt or prompt_ids, one of them.")
    ids = request.prompt_ids
    if ids is None:
        ids = prompt_ids(tokenizer, request.prompt)
    ids = [int(i) for i in ids]
    if not ids:
        raise BadInputError("The prompt is empty.")
    if min(ids) < 0 or max(ids) >= vocabulary:
        raise BadInputError(
            f"A token of the prompt is not among the {vocabulary:,} of the vocabulary."
        )
    if request.max_tokens < 1:
        raise BadInputError(f"max_tokens must be at least 1, not {request.max_tokens}.")
    if len(ids) + request.max_tokens > longest:
        raise BadInputError(
            f"The prompt has {len(ids):,} tokens and max_tokens is {request.max_tokens:,}; "
            f"together they may be {longest:,}."
        )
    if not 0 <= request.temperature < float("inf"):
        raise BadInputError(f"temperature must be 0 or more, not {request.temperature}.")
    if request.deadline_s is not None and not request.deadline_s > 0:
        raise BadInputError(f"deadline_s must be above 0, not {request.deadline_s}.")
    if request.adapter is not None and request.adapter not in adapters:
        raise unknown_name("adapter", request.adapter, adapters)
    return ids


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
        self.submitted, self._since = clock(), time.perf_counter()
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
    def age(self) -> float:
        """Seconds since it was submitted."""
        return time.perf_counter() - self._since

    @property
    def late(self) -> bool:
        limit = self.request.deadline_s
        return limit is not None and self.age > limit

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
