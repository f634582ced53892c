"""Forward passes as CUDA graphs: the kernels of a pass are recorded once, then replayed.

A decoding step of a small model is more than a thousand kernels of a few microseconds, and so is
the reading of a prompt; Python needs longer to launch them than the GPU to run them. A CUDA graph
is the list of those kernels with their addresses; replaying it is a single launch. Nothing about
the arithmetic changes.

Addresses and shapes are fixed, so a pass is widened to one of a few shapes, and everything that
differs from pass to pass is a number in one small tensor. Of a decoding step:

    tokens (rows,)    lengths (rows,)    for each page of adapters, the slot of each row or -1

Which adapter a row uses is therefore data as well: one graph serves every mix of the adapters of a
page. A row that only fills the shape up reads token 0 at place 0 of a row of the cache that nobody
has, without an adapter; prompts read together are filled up to one of a few numbers by the last of
them. A shape is recorded the second time it is met.
(PyTorch documentation, "CUDA semantics", section "CUDA Graphs".)
"""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lora_kit.hardware import detect
from lora_kit.serve.cache import doubled
from lora_kit.serve.products import At, batch_of_pages, join, own_slot_kernels
from lora_kit.serve.slots import Page

FIRST_REACH = 64  # a decoding step looks back 64, 128, 256, ... tokens
PROMPT_STEP, LONG_PROMPT = 64, 512  # prompts are 64, 128, ..., 512, 1024, 2048, ... tokens wide
GRAPHS_KEPT = 128
IDLE_SHARE = 4  # a quarter of the device's memory
PATIENCE = 4  # times that memory may be short, and meetings of a shape before it is tried again

_recording = threading.Lock()  # the garbage collector is the whole process's

Work = Callable[[], None]


def padded(tokens: int) -> int:
    """The width a prompt of so many tokens is read at."""
    if tokens > LONG_PROMPT:
        return doubled(LONG_PROMPT, tokens)
    return -(-tokens // PROMPT_STEP) * PROMPT_STEP


def side_by_side(prompts: int) -> int:
    """As so many rows that many prompts are read: 1, 2, 3, 4, 6, 8, 12, 16, ..."""
    rows = doubled(1, prompts)
    return rows * 3 // 4 if rows > 2 and prompts <= rows * 3 // 4 else rows


@dataclass
class _Recorded:
    """numbers: what a pass is told; replay: runs it, its logits go where those of all graphs go;
    pages: its adapters'."""

    numbers: torch.Tensor
    replay: Work
    pages: list[weakref.ref]


class CudaRecorder:
    """Records work as a CUDA graph. All graphs share one pool of memory and one stream.

    side: a second stream, for what may run beside the rest.
    """

    def __init__(self, device: torch.device):
        self.stream, self.side = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self.alive: weakref.WeakSet = weakref.WeakSet()

    def __call__(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        # A pool is given back with the last graph that uses it.
        pool = next((other.pool() for other in self.alive), None) or torch.cuda.graph_pool_handle()
        with _recording:
            # A graph that the garbage collector takes down meanwhile would spoil this one.
            collecting, stream = gc.isenabled(), torch.cuda.current_stream()
            gc.disable()
            try:
                # thread_local: adapters are read and copied by another thread meanwhile.
                with torch.cuda.graph(
                    graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"
                ):
                    work()
            finally:
                torch.cuda.set_stream(stream)  # torch leaves it where a recording fails
                if collecting:
                    gc.enable()
        self.alive.add(graph)
        return graph.replay


class StepGraphs:
    """Runs a decoder's passes through recorded graphs.

    Args:
        decoder: a `Decoder`; its cache's buffers stay while it is idle, up to a quarter of the
            device's memory, for the graphs write there: without them all would be recorded anew.
        rows: as many as are expected side by side; more are allowed.
        record: work → what runs it again; a CUDA graph by default.
    """

    def __init__(self, decoder, rows: int = 1, record: Callable[[Work], Work] | None = None):
        self.decoder, self.rows, self.broken = decoder, doubled(1, rows), False
        self.failures = 0
        if record is None:
            own_slot_kernels()  # found out now, not while something is recorded
        self.record = record or CudaRecorder(decoder.device)
        self.side = getattr(self.record, "side", None)
        self.recorded: OrderedDict[tuple, _Recorded] = OrderedDict()
        self.met: Counter = Counter()
        self._logits: torch.Tensor | None = None  # of a pass, one place for all graphs
        self._version: tuple | None = None
        decoder.cache.idle_bytes = _memory(decoder.device) // IDLE_SHARE

    def step(self, tokens: Sequence[int], keys: Sequence[str | None]) -> torch.Tensor | None:
        """One more token of every row.

        Returns:
            (rows, vocabulary) float32 logits, the caller's own; None where the pass is to be run as
            it is: its shape is new, or graphs cannot be had.
        """
        lengths, places = self.decoder.cache.lengths, self.decoder.mixed.places(keys)
        rows, reach = doubled(1, len(tokens)), doubled(FIRST_REACH, max(lengths) + 1)
        told = [tokens, lengths], rows

        def work(numbers: torch.Tensor, pages: list[Page]) -> torch.Tensor:
            decoder = self.decoder
            ids, at = numbers[0], numbers[1]
            mask = decoder.cache.decode_at(at, reach)
            batch = batch_of_pages(pages, numbers[2:], side=self.side) if pages else None
            with decoder.mixed.using(batch):
                try:
                    hidden = decoder.forward(ids[:, None], at[:, None], mask)
                finally:
                    if batch is not None:
                        join(batch)
                return decoder.head(hidden[:, 0]).float()

        return self._run(("step", rows, reach), work, told, places, (rows, reach))

    def prefill(
        self, ids: torch.Tensor, lengths: Sequence[int], first: int, keys: Sequence[str | None]
    ) -> torch.Tensor | None:
        """Prompts ids (rows, tokens), `padded`, of the cache's rows from `first` on.

        Returns:
            As `step`, of each prompt's last token.
        """
        count, tokens = ids.shape
        rows = side_by_side(count)
        # What fills the shape up is the last prompt again: it writes what that one writes, there.
        chosen = [min(row, count - 1) for row in range(rows)]
        ids, places = ids[chosen], self.decoder.mixed.places([keys[row] for row in chosen])
        last, at = [lengths[row] - 1 for row in chosen], [first + row for row in chosen]
        told = [*ids.t().tolist(), last, at], rows

        def work(numbers: torch.Tensor, pages: list[Page]) -> torch.Tensor:
            decoder, slots = self.decoder, numbers[tokens + 2 :]
            decoder.cache.prefill(numbers[tokens + 1], tokens)
            batch = batch_of_pages(pages, slots, tokens) if pages else None
            with decoder.mixed.using(batch):
                return decoder.read(numbers[:tokens].t().contiguous(), numbers[tokens])

        room = first + count, tokens
        logits = self._run(("prefill", rows, tokens), work, told, places, room)
        return None if logits is None else logits[:count]

    def _run(self, shape: tuple, work, told: tuple, places: list[At], room: tuple[int, int]):
        """Replay the graph of a shape, or record it first; see `step` for what comes back.

        work: (numbers, pages) → logits; told: lines of numbers and how wide to make them;
        room: rows and tokens that the cache must hold.
        """
        pages = list({id(place[0]): place[0] for place in places if place is not None}.values())
        pages.sort(key=id)
        key = (*shape, *map(id, pages))
        if self.broken or not self.decoder.cache.complete:
            return None
        self.met[key] += 1
        if self.met[key] < 2:
            return None
        try:
            self.decoder.cache.reserve(*room)
            self._forget_stale()
            self._make_room(told[1])
            numbers, found = _numbers(*told, places, pages), self.recorded.get(key)
            if found is None:
                found = self._make(numbers.to(self.decoder.device), work, pages)
                self.recorded[key] = found
                if len(self.recorded) > GRAPHS_KEPT:
                    self._forget(next(iter(self.recorded)))
            else:
                self.recorded.move_to_end(key)
                found.numbers.copy_(numbers, non_blocking=True)
            found.replay()
            logits = self._logits[: len(places)].clone()
        except Exception as error:  # no row has moved: the pass can be run as it is
            self._give_up(key, error)
            return None
        self.failures = 0
        return logits

    def _give_up(self, key: tuple, error: Exception) -> None:
        """After a failure: for a while where memory was short, else for good."""
        self.recorded.clear()
        self.failures += 1
        self.met[key] = -PATIENCE
        if isinstance(error, torch.OutOfMemoryError) and self.failures < PATIENCE:
            return
        self.broken = True
        self.decoder.cache.idle_bytes = 0  # nothing writes there any longer
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(
            f"CUDA graphs cannot be had, the model goes on without: {reason}", stacklevel=2
        )

    def _make_room(self, rows: int) -> None:
        if self._logits is None or len(self._logits) < rows:
            shape = max(rows, self.rows), self.decoder.head.out_features
            self._logits = torch.zeros(shape, device=self.decoder.device)
            self.recorded.clear()  # they wrote to the place before

    def _make(self, numbers: torch.Tensor, work, pages: list[Page]) -> _Recorded:
        def recorded() -> None:
            logits = work(numbers, pages)
            self._logits[: len(logits)].copy_(logits)

        return _Recorded(numbers, self.record(recorded), [weakref.ref(page) for page in pages])

    def _forget(self, key: tuple) -> None:
        del self.recorded[key]
        self.met.pop(key, None)

    def _forget_stale(self) -> None:
        """Graphs of buffers, weights or pages that are no more."""
        version = self.decoder.cache.version, self.decoder.mixed.version
        if version != self._version:
            self.recorded.clear()
            self._version = version
        for key in [k for k, r in self.recorded.items() if any(p() is None for p in r.pages)]:
            self._forget(key)


def _memory(device: torch.device) -> int:
    found = detect()
    return found.gpu_memory if device.type == "cuda" else found.memory


def _numbers(lines: list, rows: int, places: list[At], pages: list[Page]) -> torch.Tensor:
    """(lines + pages, rows): lines of numbers, filled up with 0, and the rows' slots of each page,
    filled up with -1."""
    told = torch.zeros((len(lines) + len(pages), rows), dtype=torch.long)
    count = len(places)
    told[: len(lines), :count] = torch.tensor([list(line) for line in lines])
    told[len(lines) :] = -1
    for i, page in enumerate(pages, start=len(lines)):
        slots = [-1 if place is None or place[0] is not page else place[1] for place in places]
        told[i, :count] = torch.tensor(slots)
    return told.pin_memory() if torch.cuda.is_available() else told
