"""Training steps as CUDA graphs: the kernels of a batch shape are recorded once, then replayed.

A step of a small model is thousands of short kernels, forward and backward, and Python needs
longer to launch them than the GPU to run them: at 800 tokens a step it waits most of the time. A
CUDA graph is the list of those kernels with their addresses; replaying it is a single launch.
Nothing about the arithmetic changes.

Addresses are fixed, so shapes must be: batches are widened with padding, which no row sees and
which has no label, to a few shapes; a shape is recorded the second time it is met, and run eagerly
before that. Inputs are copied into the recorded tensors, gradients are added to where they always
lie.
(PyTorch documentation, "CUDA semantics", section "CUDA Graphs".)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import pad

from lora_kit.engine_memory import LENGTH_STEP
from lora_kit.prompts import IGNORE
from lora_kit.train.packing import Batch
from lora_kit.train.spec import TrainSpec

LABEL_STEP = 256  # with LENGTH_STEP, about 15 shapes for Alpaca's rows

# Runs a batch forward and backward: (batch on the device, labels of the whole step) → loss.
Work = Callable[[Batch, torch.Tensor], torch.Tensor]


def graphs_pay(spec: TrainSpec, device: torch.device) -> bool:
    """Whether `compile` asks for graphs ("graph", or "auto" on a GPU) and they can be had.

    Not with checkpointing and dropout together: what is computed again would need the random state
    of the first time, which a graph does not keep.
    """
    wanted = spec.compile in ("auto", "graph") and device.type == "cuda"
    return wanted and not (spec.checkpointing is True and spec.dropout)


class Steps:
    """Runs batches as they come.

    work: runs a batch forward and backward, adding to the gradients of `parameters`.
    """

    keeps_gradients = False  # whether the gradients' tensors must outlive a step

    def __init__(self, work: Work, parameters: Sequence[torch.nn.Parameter]):
        self.work, self.parameters = work, list(parameters)
        self.device = self.parameters[0].device

    def run(self, batch: Batch, labels: int) -> torch.Tensor:
        """The summed loss of a batch over `labels`; its gradient is added to the parameters'."""
        return self.work(batch.to(self.device), torch.tensor(float(labels), device=self.device))

    def give_up(self) -> bool:
        """After memory ran out: let go of what can be. True: the same size may fit now."""
        for parameter in self.parameters:
            parameter.grad = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return False


@dataclass
class _Recorded:
    graph: torch.cuda.CUDAGraph
    batch: Batch
    labels: torch.Tensor
    loss: torch.Tensor


class GraphedSteps(Steps):
    """Runs batches through CUDA graphs, one for each shape.

    `work` must never wait for the GPU. pad_id fills sequences up. What cannot be recorded is said
    once, and the run goes on without graphs.
    """

    keeps_gradients = True

    def __init__(self, work: Work, parameters, pad_id: int, say: Callable[[str], None] = print):
        super().__init__(work, parameters)
        self.pad_id, self.say, self.broken = pad_id, say, False
        self.met: Counter = Counter()
        self.recorded: dict[tuple, _Recorded] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()  # one for all: the matrix library's workspace is shared

    def run(self, batch: Batch, labels: int) -> torch.Tensor:
        """As `Steps.run`; read the loss before the next call, which writes to the same place."""
        batch = widen(batch, self.pad_id)
        key = (*batch.input_ids.shape, len(batch.picked), batch.packed)
        self.met[key] += 1
        found = self.recorded.get(key)
        if found is None and self.met[key] > 1 and not self.broken:
            found = self._record(key, batch)
        if found is None:
            return super().run(batch, labels)
        for name in ("input_ids", "positions", "segments", "picked", "targets"):
            fresh = getattr(batch, name).pin_memory()
            getattr(found.batch, name).copy_(fresh, non_blocking=True)
        found.labels.fill_(labels)
        found.graph.replay()
        return found.loss

    def give_up(self) -> bool:
        """Graphs hold memory of their own: without them the same size may fit."""
        had = bool(self.recorded)
        self.recorded.clear()
        self.broken = True
        super().give_up()
        return had

    def _record(self, key: tuple, batch: Batch) -> _Recorded | None:
        for parameter in self.parameters:  # a graph adds to tensors that are there already
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        still, labels = batch.to(self.device), torch.ones((), device=self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                loss = self.work(still, labels)
        except RuntimeError as error:  # out of memory among them
            self.broken = True
            torch.cuda.synchronize()
            reason = str(error).strip().splitlines()[0]
            self.say(f"No CUDA graph could be recorded, the run goes on without: {reason}")
            return None
        self.recorded[key] = _Recorded(graph, still, labels, loss)
        return self.recorded[key]


def widen(batch: Batch, pad_id: int) -> Batch:
    """The same batch, padded to one of a few shapes; its loss and gradients stay what they were."""
    length, labels = batch.input_ids.shape[1], len(batch.picked)
    more = -length % LENGTH_STEP
    extra = -labels % LABEL_STEP
    count, whole = batch.input_ids.shape[0], length + more
    # Places are counted in the flattened (N · S), and S has grown.
    picked = batch.picked // length * whole + batch.picked % length
    return replace(
        batch,
        input_ids=pad(batch.input_ids, (0, more), value=pad_id),
        positions=torch.cat(
            [batch.positions, torch.arange(length, whole).expand(count, more)], dim=1
        ),
        segments=pad(batch.segments, (0, more), value=-1),
        picked=pad(picked, (0, extra)),
        targets=pad(batch.targets, (0, extra), value=IGNORE),
    )
