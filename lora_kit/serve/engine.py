"""Continuous batching over many adapters: requests join and leave at every token.

One thread runs the model. Between two tokens it lets rows go whose answer has ended, was cancelled
or is late, and lets waiting requests in, one adapter's after another's, so that a crowd at one
adapter does not keep the others out. A request whose adapter is still being read waits; the others
go on. What fails, fails alone: a pass that raises is made again for half of its rows until the
guilty ones are found, and a row with NaN or infinity in its logits ends by itself.
(Yu et al. 2022, "Orca", section 3.1: iteration-level scheduling.)
"""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from lora_kit.errors import BadInputError, BusyError, LoraKitError
from lora_kit.serve import handle as handle_module
from lora_kit.serve.decoder import Decoder, draw
from lora_kit.serve.handle import Finished, Handle, Request, check_request
from lora_kit.serve.pool import AdapterPool
from lora_kit.serve.text import TextStream, end_tokens

__all__ = ["Engine", "Finished", "Handle", "Request"]

PREFILL_TOKENS = 512  # prompts read between two tokens of the others, unless one alone is longer
PATIENCE_SECONDS = 5.0  # after so long a request that finds no room holds up those behind it
POLL_SECONDS = 0.005  # how often the engine looks whether an adapter has been read


@dataclass(eq=False)
class _Row:
    """A request being written. key: its adapter's on the device; ids: the answer so far."""

    handle: Handle
    key: str | None
    text: TextStream
    generator: torch.Generator | None
    began: float
    ids: list[int] = field(default_factory=list)
    said: str = ""
    first: float | None = None


class Engine:
    """Answers requests on one model, each row with its own adapter.

    Args:
        model, tokenizer: the bare base and its tokenizer.
        pool: its adapters.
        max_rows: sequences written side by side.
        max_waiting: requests that may wait beside them; one more is refused.
        max_tokens_total: tokens of all rows together, prompts and answers; also the longest request
            there can be, where the model's own limit is not lower.
        graphs: as of `Decoder`.

    Raises:
        BadInputError: a limit below 1, a pool of another model, or a model `Decoder` does not do.
    """

    def __init__(
        self,
        model,
        tokenizer,
        pool: AdapterPool,
        max_rows: int = 32,
        max_waiting: int = 256,
        max_tokens_total: int = 32_768,
        graphs: bool | None = None,
    ):
        if min(max_rows, max_waiting, max_tokens_total) < 1:
            raise BadInputError("max_rows, max_waiting and max_tokens_total must be at least 1.")
        if pool.mixed.model is not model:
            raise BadInputError("The pool holds adapters of another model.")
        self.model, self.tokenizer, self.pool = model, tokenizer, pool
        self.max_rows, self.max_waiting = max_rows, max_waiting
        self.max_tokens_total = max_tokens_total
        own = getattr(model.config, "max_position_embeddings", None) or max_tokens_total
        self.longest = min(max_tokens_total, own)
        self.decoder = Decoder(model, pool.mixed, max_rows, graphs)
        self._ends = end_tokens(model, tokenizer)
        self._vocabulary = model.get_input_embeddings().weight.shape[0]
        self._rows: list[_Row] = []
        self._queues: dict[str | None, deque[Handle]] = {}
        self._waiting = 0
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        counted = ("submitted", "refused", "steps", "prompt_tokens", "tokens", "failed_passes")
        self._counts = dict.fromkeys(
            (
                *counted,
                *(f"ended_{r}" for r in ("stop", "length", "cancelled", "deadline", "error")),
            ),
            0,
        )

    # ------------------------------------------------------------------ from outside
    def start(self) -> None:
        """Begin to answer; does nothing while running."""
        if self._thread is None:
            self._stopping = False
            self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End everything under way as cancelled, and stop."""
        thread = self._thread
        if thread is not None:
            with self._wake:
                self._stopping = True
                self._wake.notify_all()
            thread.join()
            self._thread = None

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def submit(self, request: Request) -> Handle:
        """Hand in a request; it is checked here and answered later.

        Raises:
            BadInputError: no prompt, one that is too long, or a value out of range;
            UnknownNameError: no such adapter; BusyError: as many wait as may wait.
        """
        ids = check_request(
            request, self.tokenizer, self._vocabulary, self.longest, self.pool.names()
        )
        handle = Handle(request, ids)
        with self._wake:
            if self._stopping:
                raise BusyError("The engine is stopping and takes no more requests.")
            # Those a free row is there for do not wait.
            if self._waiting - max(0, self.max_rows - len(self._rows)) >= self.max_waiting:
                self._counts["refused"] += 1
                raise BusyError(
                    f"{len(self._rows)} requests are being answered and {self._waiting} wait, as "
                    "many as may: try again in a moment."
                )
            self._queues.setdefault(request.adapter, deque()).append(handle)
            self._waiting += 1
            self._counts["submitted"] += 1
            self._wake.notify_all()
        return handle

    def stats(self) -> dict[str, int]:
        """Counts since the start, and what is going on: rows, waiting requests, the pool's."""
        return {
            "running": len(self._rows),
            "waiting": self._waiting,
            "cache_bytes": self.decoder.cache.bytes,
            **self._counts,
            **self.pool.stats(),
        }

    # ------------------------------------------------------------------ the engine's thread
    def _run(self) -> None:
        while True:
            with self._wake:
                if not self._rows and not self._stopping:
                    self._wake.wait_for(
                        lambda: self._stopping or self._waiting, None if not self._waiting else 0
                    )
                if self._stopping:
                    break
            try:
                self._sweep()
                joined = self._admit()
                if self._rows:
                    self._step()
                elif not joined:
                    time.sleep(POLL_SECONDS)  # all that wait, wait for their adapter
            except Exception as e:  # a fault of the engine's own: nobody may wait for ever
                told = f"The engine failed: {_told(e)}."
                rows = list(self._rows)
                for row in rows:
                    with suppress(Exception):  # it has been told
                        self._end(row, "error", told, spoiled=True)
                for handle in [] if rows else self._take_waiting(lambda _: True):
                    self._end_waiting(handle, "error", told)
        for row in list(self._rows):
            self._end(row, "cancelled")
        for handle in self._take_waiting(lambda _: True):
            self._end_waiting(handle, "cancelled")

    def _sweep(self) -> None:
        """Let go of what was cancelled or is late."""
        for row in [r for r in self._rows if r.handle.cancelled or r.handle.late]:
            self._end(row, "cancelled" if row.handle.cancelled else "deadline")
        for handle in self._take_waiting(lambda h: h.cancelled or h.late):
            self._end_waiting(handle, "cancelled" if handle.cancelled else "deadline")

    def _admit(self) -> int:
        """Let waiting requests in; returns how many."""
        joining: list[tuple[Handle, str | None]] = []
        with self._wake:
            adapters = list(self._queues)
        tokens, longest = 0, max(map(_whole_length, (r.handle for r in self._rows)), default=0)
        skipped: set = set()
        while len(skipped) < len(adapters):
            for adapter in adapters:
                if adapter in skipped:
                    continue
                with self._wake:
                    queue = self._queues.get(adapter)
                    head = queue[0] if queue else None
                rows = len(self._rows) + len(joining) + 1
                if (
                    head is None
                    or rows > self.max_rows
                    or (joining and tokens + len(head.prompt_ids) > PREFILL_TOKENS)
                ):
                    skipped.add(adapter)
                    continue
                if rows > 1 and rows * max(longest, _whole_length(head)) > self.max_tokens_total:
                    # Short ones may pass a long one that finds no room, but not for ever.
                    late = head.age > PATIENCE_SECONDS
                    skipped |= set(adapters) if late else {adapter}
                    continue
                key = self._acquire(adapter)
                if key is False:
                    skipped.add(adapter)
                    continue
                with self._wake:
                    self._queues[adapter].popleft()
                    self._waiting -= 1
                joining.append((head, key))
                tokens += len(head.prompt_ids)
                longest = max(longest, _whole_length(head))
        with self._wake:
            # Who was served goes to the end of the line, and empty queues leave it.
            served = {h.request.adapter for h, _ in joining}
            order = sorted(self._queues, key=lambda a: a in served)
            self._queues = {a: self._queues[a] for a in order if self._queues[a]}
        if joining:
            self._prefill(joining)
        return len(joining)

    def _acquire(self, adapter: str | None) -> str | bool | None:
        """The adapter's key on the device (None for the base); False while it must wait. Where it
        cannot be had at all, all who wait for it are told."""
        if adapter is None:
            return None
        try:
            return self.pool.acquire(adapter) or False
        except BusyError:
            return False
        except Exception as e:  # not the kit's own alone: memory may be short, too
            told = str(e) if isinstance(e, LoraKitError) else _told(e)
            for handle in self._take_waiting(lambda h: h.request.adapter == adapter):
                self._end_waiting(handle, "error", told)
            return False

    def _prefill(self, joining: list[tuple[Handle, str | None]]) -> None:
        began = handle_module.clock()
        try:
            new = [self._row(handle, key, began) for handle, key in joining]
            logits = self.decoder.prefill(
                [h.prompt_ids for h, _ in joining], [k for _, k in joining]
            )
        except Exception as e:
            self._counts["failed_passes"] += 1
            if len(joining) == 1:
                handle, key = joining[0]
                if key is not None:
                    self.pool.release(key)
                self._end_waiting(handle, "error", f"The prompt failed: {_told(e)}.")
                return
            half = len(joining) // 2
            try:
                self._prefill(joining[:half])
            finally:
                self._prefill(joining[half:])
            return
        self._rows += new
        self._counts["prompt_tokens"] += sum(len(h.prompt_ids) for h, _ in joining)
        self._advance(new, logits)

    def _row(self, handle: Handle, key: str | None, began: float) -> _Row:
        generator = None
        if handle.request.temperature > 0:
            generator = torch.Generator()
            seed = handle.request.seed
            generator.seed() if seed is None else generator.manual_seed(seed % 2**63)
        return _Row(handle, key, TextStream(self.tokenizer, handle.request.stop), generator, began)

    def _step(self) -> None:
        """One token for every row."""
        self._counts["steps"] += 1
        rows = list(self._rows)
        for some, logits in self._passes(rows):
            self._advance(some, logits)

    def _passes(self, rows: list[_Row]) -> list[tuple[list[_Row], torch.Tensor]]:
        """The logits of these rows, in one pass or, where that raises, in smaller ones."""
        same = zip(rows, self._rows, strict=False)
        whole = len(rows) == len(self._rows) and all(a is b for a, b in same)
        numbers = None if whole else [self._rows.index(r) for r in rows]
        try:
            logits = self.decoder.step([r.ids[-1] for r in rows], [r.key for r in rows], numbers)
            return [(rows, logits)]
        except Exception as e:
            self._counts["failed_passes"] += 1
            if len(rows) == 1:
                self._end(rows[0], "error", f"The row failed: {_told(e)}.", spoiled=True)
                return []
        half = len(rows) // 2
        return self._passes(rows[:half]) + self._passes(rows[half:])

    def _advance(self, rows: list[_Row], logits: torch.Tensor) -> None:
        """Choose each row's next token, say it, and end the rows that have ended."""
        best, tokens = logits.max(dim=-1)
        sound = torch.isfinite(best).tolist()
        tokens = tokens.tolist()
        for i, row in enumerate(rows):
            if not sound[i]:
                self._end(row, "error", "The row's logits hold NaN or infinity.", spoiled=True)
                continue
            try:
                if row.generator is not None:
                    heat = row.handle.request.temperature
                    tokens[i] = draw(logits[i], heat, row.generator)
                self._take(row, tokens[i])
            except Exception as e:  # its own text or numbers: no other row's business
                self._end(row, "error", f"The row failed: {_told(e)}.")

    def _take(self, row: _Row, token: int) -> None:
        """Add a token to a row's answer; end the row where it ends."""
        if row.first is None:
            row.first = handle_module.clock()
        if token in self._ends and not row.handle.request.ignore_eos:
            self._end(row, "stop")
            return
        row.ids.append(token)
        self._counts["tokens"] += 1
        piece = row.text.push(token)
        row.said += piece
        row.handle.say(piece)
        if row.text.stopped:
            self._end(row, "stop")
        elif len(row.ids) >= row.handle.request.max_tokens:
            self._end(row, "length")

    # ------------------------------------------------------------------ endings
    def _end(self, row: _Row, reason: str, error: str | None = None, spoiled: bool = False) -> None:
        number = self._rows.index(row)
        self._rows[number] = self._rows[-1]
        self._rows.pop()
        try:
            self.decoder.cache.drop(number, spoiled)
        finally:  # a device that fails keeps nobody waiting
            if row.key is not None:
                self.pool.release(row.key)
            rest = row.text.finish()
            row.said += rest
            row.handle.say(rest)
            self._tell(row.handle, reason, error, row)

    def _end_waiting(self, handle: Handle, reason: str, error: str | None = None) -> None:
        self._tell(handle, reason, error, None)

    def _tell(self, handle: Handle, reason: str, error: str | None, row: _Row | None) -> None:
        self._counts[f"ended_{reason}"] += 1
        start, now = handle.submitted, handle_module.clock()
        handle.end(
            Finished(
                text="" if row is None else row.said,
                tokens=[] if row is None else row.ids,
                reason=reason,
                first_token_s=None if row is None or row.first is None else row.first - start,
                total_s=now - start,
                waited_s=None if row is None else row.began - start,
                error=error,
            )
        )

    def _take_waiting(self, which) -> list[Handle]:
        """Take the waiting requests of a kind out of their queues."""
        taken = []
        with self._wake:
            for queue in self._queues.values():
                found = [h for h in queue if which(h)]
                taken += found
                for handle in found:
                    queue.remove(handle)
            self._waiting -= len(taken)
        return taken


def _whole_length(handle: Handle) -> int:
    return len(handle.prompt_ids) + handle.request.max_tokens


def _told(error: Exception) -> str:
    """An exception in a few words of one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
