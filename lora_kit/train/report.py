"""The report before training: what a run will see, what it will cost, and whether it makes sense.

Cheap (the rows are tokenised, nothing is trained), and it comes before any work that could be lost.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from lora_kit.architectures import Architecture
from lora_kit.data import Dataset
from lora_kit.data_files import Dropped, LoadedRows
from lora_kit.errors import BadInputError
from lora_kit.hardware import GIB, Hardware
from lora_kit.prompts import IGNORE, encode, show_mask, to_example
from lora_kit.train.settings import planned_bytes
from lora_kit.train.spec import TrainSpec

BINS = 8
# What share of a large matrix product's speed a training step reaches, and what a layer costs each
# time rows go through it, forward and backward, however few (launching its kernels; replayed graphs
# cost least). Measured by benchmarks/training.py: the GPU's on an H200, the CPU's on two cores.
EFFICIENCY = {"cpu": 0.5, "cuda": 0.15}
LAYER_SECONDS = {"native": 0.0007, "trl": 0.013, "unsloth": 0.0135}


@dataclass(frozen=True)
class DataReport:
    """What will be trained on.

    found rows; `kept` of them will be trained on, `held_out` are kept for measuring. dropped: rows
    left out and why. lengths: tokens of each kept row, cut to max_length. truncated: how many were
    cut. trained_tokens: those with a label. example: the text of the first row, its trained tokens
    in ⟦brackets⟧. encoded: the rows as the engines take them.
    """

    name: str
    found: int
    dropped: tuple[Dropped, ...]
    lengths: tuple[int, ...]
    truncated: int
    trained_tokens: int
    example: str
    max_length: int
    encoded: tuple[dict, ...]
    held_out: int = 0

    @property
    def kept(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def trained_share(self) -> float:
        return self.trained_tokens / self.tokens

    def histogram(self, bins: int = BINS) -> list[tuple[int, int, int]]:
        """(from, to, rows) of equal ranges of tokens, both ends counted."""
        low, high = min(self.lengths), max(self.lengths)
        width = max(1, math.ceil((high - low + 1) / bins))
        edges = range(low, high + 1, width)
        return [
            (a, min(a + width - 1, high), sum(a <= n < a + width for n in self.lengths))
            for a in edges
        ]


@dataclass(frozen=True)
class Estimate:
    """Minutes and bytes of a run, before it. free: memory that can be had, in bytes."""

    minutes: float
    memory: int
    free: int
    steps: int


def data_report(
    rows: Dataset | LoadedRows, tokenizer, spec: TrainSpec, held_out: int = 0
) -> DataReport:
    """Tokenise the rows as training will and count.

    held_out: how many more were taken off for measuring; only reported.

    Raises:
        BadInputError: no row would have a label; says which cause and what to change.
    """
    loaded = rows if isinstance(rows, LoadedRows) else LoadedRows(rows, ())
    dropped, kept, truncated = list(loaded.dropped), [], 0
    for number, row in enumerate(loaded.kept, 1):
        example = to_example(row, spec.style, tokenizer)
        whole = encode(tokenizer, example, 10**9)
        cut = encode(tokenizer, example, spec.max_length)
        # The first label is predicted from the token before it: one at position 0 is never used.
        if all(label == IGNORE for label in cut["labels"][1:]):
            dropped.append(Dropped(number, f"the prompt alone fills max_length={spec.max_length}"))
            continue
        truncated += len(whole["input_ids"]) > spec.max_length
        kept.append(cut)
    if not kept:
        shortest = min(
            len(tokenizer(to_example(r, spec.style, tokenizer).prompt)["input_ids"])
            for r in loaded.kept
        )
        raise BadInputError(
            f"Every label of {loaded.kept.name} would be masked: within max_length="
            f"{spec.max_length} no row reaches its answer (the shortest prompt has {shortest} "
            f"tokens). Nothing would be learnt. Set max_length to at least {shortest + 16}."
        )
    return DataReport(
        name=loaded.kept.name,
        found=loaded.found + held_out,
        dropped=tuple(dropped),
        lengths=tuple(len(e["input_ids"]) for e in kept),
        truncated=truncated,
        trained_tokens=sum(label != IGNORE for e in kept for label in e["labels"]),
        example=show_mask(tokenizer, kept[0]),
        max_length=spec.max_length,
        encoded=tuple(kept),
        held_out=held_out,
    )


def estimate(
    report: DataReport,
    spec: TrainSpec,
    shape: Architecture,
    hardware: Hardware,
    speed: float,
    engine: str = "native",
) -> Estimate:
    """Minutes and memory of the run, from arithmetic and one measured matrix product.

    A token costs 2 FLOP for each weight forward, 2 backward (a frozen weight needs no gradient of
    its own) and with checkpointing 2 more:  seconds = FLOP · tokens / (speed · efficiency), on a
    GPU plus LAYER_SECONDS for each layer and part of a step. Expect it within a factor of two.

    Args:
        spec: with `checkpointing` and rows at once as `settings.settle` leaves them.
        speed: FLOP/s of a large product (`matmul_speed`).
        engine: "native", "trl" or "unsloth".
    """
    per_step = min(spec.batch_size * spec.accumulation, report.kept)
    epoch = math.ceil(report.kept / (spec.batch_size * spec.accumulation))
    steps = spec.steps or math.ceil(epoch * spec.epochs)
    step_tokens = per_step * report.tokens / report.kept
    flop = (6 if spec.checkpointing is True else 4) * shape.num_parameters * step_tokens
    seconds = flop / (speed * EFFICIENCY[hardware.device])
    if hardware.device == "cuda":
        seconds += LAYER_SECONDS[engine] * shape.num_layers * spec.accumulation
    checkpointing = spec.checkpointing is True
    rows, longest = min(spec.batch_size, per_step), max(report.lengths)
    memory = planned_bytes(spec, shape, hardware, engine, rows, longest, checkpointing)
    free = hardware.gpu_memory_free if hardware.device == "cuda" else hardware.memory_free
    return Estimate(seconds * steps / 60, memory, free, steps)


def matmul_speed(hardware: Hardware) -> float:
    """FLOP/s of a product of two 1024² (GPU: 4096²) matrices in the dtype of training."""
    import torch

    n = 1024 if hardware.device == "cpu" else 4096
    a = torch.ones(n, n, dtype=getattr(torch, hardware.dtype), device=hardware.device)
    times = []
    for _ in range(4):  # the first warms up
        started = time.perf_counter()
        float((a @ a)[0, 0])  # reading a value waits for the GPU
        times.append(time.perf_counter() - started)
    return 2 * n**3 / min(times[1:])


def format_report(report: DataReport, estimated: Estimate | None = None) -> str:
    """The report as text."""
    lengths = report.lengths
    lines = [
        f"{report.name}: {report.found:,} rows, {report.kept:,} to train on, "
        f"{report.held_out:,} held out"
    ]
    grouped = LoadedRows(Dataset("", "", (), "", ""), report.dropped).reasons()
    lines += [f"  dropped {n:,}: {why} (first: row {first})" for why, n, first in grouped]
    lines += [
        f"tokens: {report.tokens:,}, {report.trained_share:.0%} of them trained on; "
        f"a row has {min(lengths)} to {max(lengths)}, median {statistics.median(lengths):.0f}",
        f"cut at max_length={report.max_length}: {report.truncated:,} rows"
        + (" (their ends, and with them the sign to stop, are lost)" if report.truncated else ""),
    ]
    bins = report.histogram()
    most = max(count for *_, count in bins)
    for low, high, count in bins:
        bar = "#" * math.ceil(40 * count / most)
        lines.append(f"  {low:>5}-{high:<5} {count:>6,} {bar}")
    lines += ["the first row, trained tokens in ⟦brackets⟧:", *_indented(report.example)]
    if estimated:
        fits = "" if estimated.memory <= estimated.free else "  MORE THAN IS FREE"
        lines.append(
            f"about {estimated.minutes:.1f} minutes for {estimated.steps:,} steps; about "
            f"{estimated.memory / GIB:.1f} GiB, {estimated.free / GIB:.1f} GiB are free{fits}"
        )
    return "\n".join(lines)


def _indented(text: str, most: int = 1200) -> Sequence[str]:
    joined = text.replace("⟧⟦", "")  # one bracket around neighbouring trained tokens
    short = joined if len(joined) <= most else f"{joined[:most]} …"
    return [f"  {line}" for line in short.splitlines()]
