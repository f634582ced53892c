"""Runs compared fairly: each engine in a process of its own.

Unsloth patches the libraries it finds for as long as the process lives, and what one run leaves in
memory would count against the next one's peak.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from lora_kit.data import Dataset
from lora_kit.train.finetune import TrainResult, finetune
from lora_kit.train.spec import TrainSpec, choose_engine


@dataclass(frozen=True)
class Timed:
    """A run and when each of its steps ended, in seconds from an arbitrary start."""

    result: TrainResult
    ends: tuple[float, ...]

    @property
    def steady(self) -> float:
        """Useful tokens a second at the median of the second half of the steps: the run's start
        (libraries waking up, graphs being recorded) is left out."""
        steps = [b - a for a, b in itertools.pairwise(self.ends)]
        if not steps:
            return self.result.tokens_per_second
        return self.result.tokens / len(self.ends) / statistics.median(steps[len(steps) // 2 :])


def finetune_apart(model: str, rows: Dataset, runs: Sequence[tuple[str, TrainSpec]]) -> list[Timed]:
    """`finetune` for each (engine, spec), runs of one engine that follow each other in one process.

    Args:
        model, rows: as for `finetune`; nothing is taken from the cache.

    Raises:
        what `finetune` raises.
    """
    results: list[Timed] = []
    context = multiprocessing.get_context("spawn")
    for engine, group in itertools.groupby(runs, key=lambda run: run[0]):
        specs = [spec for _, spec in group]
        with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
            results += pool.submit(_all, model, rows, specs, engine).result()
    return results


def _all(model, rows, specs, engine) -> list[Timed]:
    choose_engine(engine)
    import gc

    from lora_kit.hardware import hold_to_t4_rules

    hold_to_t4_rules()
    results = []
    for spec in specs:
        ends: list[float] = []
        # Ten lines of progress from every short run would bury the table they are for.
        with contextlib.redirect_stdout(io.StringIO()):
            done = finetune(
                model,
                rows,
                spec,
                engine=engine,
                reuse=False,
                on_step=lambda *_, ends=ends: ends.append(time.perf_counter()),
            )
        results.append(Timed(done, tuple(ends)))
        gc.collect()
    return results
