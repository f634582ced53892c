"""Decoding steps as CUDA graphs: the kernels of a step are recorded once, then replayed.

A step of a small model for a few rows is more than a thousand kernels of a few microseconds, and
Python needs longer to launch them than the GPU to run them. A CUDA graph is the list of those
kernels with their addresses; replaying it is a single launch. Nothing about the arithmetic changes.

Addresses and shapes are fixed, so a step is widened to one of a few shapes, in rows and in how far
back it looks, and everything that differs from step to step is a number in one small tensor:

    tokens (rows,)    lengths (rows,)    for each page of adapters, the slot of each row or -1

Which adapter a row uses is therefore data as well: one graph serves every mix of the adapters of a
page. A row that only fills the shape up reads token 0 at place 0 of a row of the cache that nobody
has, without an adapter. A shape is recorded the second time it is met.
(PyTorch documentation, "CUDA semantics", section "CUDA Graphs".)
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lora_kit.serve.products import batch_of_pages

FIRST_REACH = 64  # shapes look back 64, 128, 256, ... tokens
GRAPHS_KEPT = 64

Work = Callable[[], torch.Tensor]


@dataclass
class _Recorded:
    """numbers: what a step is told, (2 + pages, rows); replay: runs it, returns (rows,
    vocabulary) logits that hold until the next replay of any graph; pages: its adapters'."""

    numbers: torch.Tensor
    replay: Work
    pages: list[weakref.ref]


class CudaRecorder:
    """Records work as a CUDA graph. All graphs share one pool of memory and one stream.

    side: a second stream, for what may run beside the rest.
    """

    def __init__(self):
        self.stream, self.side = torch.cuda.Stream(), torch.cuda.Stream()
        self.alive: weakref.WeakSet = weakref.WeakSet()

    def __call__(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        # A pool is given back with the last graph that uses it.
        pool = next((other.pool() for other in self.alive), None) or torch.cuda.graph_pool_handle()
        # A graph that the garbage collector takes down meanwhile would spoil this one.
        collecting = gc.isenabled()
        gc.disable()
        try:
            # thread_local: adapters are read and copied by another thread meanwhile.
            with torch.cuda.graph(
                graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                out = work()
        finally:
            if collecting:
                gc.enable()
        self.alive.add(graph)

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        return replay


class DecodeGraphs:
    """Runs a decoder's steps over all its rows through recorded graphs.

    Args:
        decoder: a `Decoder`; its cache's buffers stay while it is idle, for the graphs write there.
        record: work → what runs it again; a CUDA graph by default.
    """

    def __init__(self, decoder, record: Callable[[Work], Work] | None = None):
        self.decoder, self.broken = decoder, False
        self.record = record or CudaRecorder()
        self.side = getattr(self.record, "side", None)
        self.recorded: OrderedDict[tuple, _Recorded] = OrderedDict()
        self.met: Counter = Counter()
        self._version = -1
        decoder.cache.kept_when_idle = True

    def step(self, tokens: Sequence[int], keys: Sequence[str | None]) -> torch.Tensor | None:
        """One more token of every row.

        Returns:
            (rows, vocabulary) float32 logits, the caller's own; None where the step is to be run as
            it is: its shape is new, or graphs cannot be had.
        """
        if self.broken:
            return None
        cache, places = self.decoder.cache, self.decoder.mixed.places(keys)
        pages = list({id(place[0]): place[0] for place in places if place is not None}.values())
        pages.sort(key=id)
        rows, reach = _doubled(1, len(tokens)), _doubled(FIRST_REACH, max(cache.lengths) + 1)
        key = (rows, reach, *map(id, pages))
        self._forget_stale()
        self.met[key] += 1
        told = _numbers(rows, tokens, cache.lengths, places, pages)
        found = self.recorded.get(key)
        if found is not None:
            self.recorded.move_to_end(key)
            found.numbers.copy_(told, non_blocking=True)
        elif self.met[key] > 1:
            cache.reserve(rows, reach)
            self._forget_stale()
            found = self._make(told.to(self.decoder.device), reach, pages)
        if found is None:
            return None
        self.recorded[key] = found
        while len(self.recorded) > GRAPHS_KEPT:
            self.recorded.popitem(last=False)
        return found.replay()[: len(tokens)].clone()

    def _make(self, numbers: torch.Tensor, reach: int, pages: list) -> _Recorded | None:
        try:
            replay = self.record(lambda: self._work(numbers, reach, pages))
        except RuntimeError as error:  # out of memory among them
            self.broken = True
            self.recorded.clear()
            reason = str(error).strip().splitlines()[0]
            warnings.warn(
                f"No CUDA graph could be recorded, decoding goes on without: {reason}", stacklevel=2
            )
            return None
        return _Recorded(numbers, replay, [weakref.ref(page) for page in pages])

    def _work(self, numbers: torch.Tensor, reach: int, pages: list) -> torch.Tensor:
        decoder = self.decoder
        mask = decoder.cache.decode_at(numbers[1], reach)
        batch = batch_of_pages(pages, numbers[2:], self.side) if pages else None
        with decoder.mixed.using(batch):
            hidden = decoder.forward(numbers[0][:, None], numbers[1][:, None], mask)
            return decoder.head(hidden[:, 0]).float()

    def _forget_stale(self) -> None:
        """Graphs of buffers or pages that are no more."""
        version = self.decoder.cache.version
        if version != self._version:
            self.recorded.clear()
            self._version = version
        for key in [k for k, r in self.recorded.items() if any(p() is None for p in r.pages)]:
            del self.recorded[key]


def _numbers(rows, tokens, lengths, places, pages) -> torch.Tensor:
    told = torch.full((2 + len(pages), rows), -1)
    told[:2] = 0
    count = len(tokens)
    told[0, :count] = torch.tensor(tokens)
    told[1, :count] = torch.tensor(lengths)
    for i, page in enumerate(pages, start=2):
        slots = [-1 if place is None or place[0] is not page else place[1] for place in places]
        told[i, :count] = torch.tensor(slots)
    return told.pin_memory() if torch.cuda.is_available() else told


def _doubled(size: int, wanted: int) -> int:
    while size < wanted:
        size *= 2
    return size
