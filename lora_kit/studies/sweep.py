"""Sweeps: a grid of parameters and some seeds, one result record a run.

    done = sweep("03", {"RANK": [4, 8, 16]}, seeds=3, output=Path("runs/rank"))
    done.summary        # mean, 95 % interval and n, a row a setting and metric

The folder is the state: `<setting>_seed<n>.json` a finished run's record, `failed/` what went
wrong, `cells/` what a run keeps while it works and is taken up from. So the same call after a
crash, or with more seeds, or a longer grid, does what is left. `summary.csv` and a figure are made
anew each time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_kit import store
from lora_kit.errors import BadInputError, unknown_name
from lora_kit.studies import sweep_cells
from lora_kit.studies.jobs import Clock, Engine, Job, Outcome, run_jobs
from lora_kit.studies.pool import local_pool
from lora_kit.studies.records import Metric, Record
from lora_kit.studies.sweep_cells import Failure
from lora_kit.studies.sweep_grid import Cell, Grid, cells_of, seeds_of
from lora_kit.studies.sweep_targets import Target, check_seeds, find_target

if TYPE_CHECKING:
    import pandas as pd

ENGINES = ("local", "ray")
RUN = "lora_kit.studies.sweep_cells:run_one"
SUMMARY = "summary.csv"


@dataclass(frozen=True)
class SweepResult:
    """What a sweep left behind.

    records: of the finished runs, in the grid's order. failures: runs that failed. left: names of
    runs that were not started or were cut off, for want of time. summary: see
    `sweep_summary.summarise`. figure: None where there was nothing to draw.
    """

    output: Path
    records: tuple[Record, ...]
    failures: tuple[Failure, ...]
    left: tuple[str, ...]
    summary: pd.DataFrame
    figure: Path | None


def sweep(
    target: str,
    grid: Grid,
    seeds: int | Iterable[int] = 3,
    output: Path | None = None,
    fixed: Mapping[str, Any] | None = None,
    work: Path | None = None,
    engine: str = "local",
    address: str | None = None,
    jobs: int | None = None,
    budget: float | None = None,
    metrics: Sequence[str] | None = None,
    say: Callable[[str], None] = print,
) -> SweepResult:
    """Run every setting of a grid with every seed; what is finished already is not run again.

    Args:
        target: see `sweep_targets.find_target`.
        grid: names to lists of values (every combination), or a list of settings. All seeds of a
            setting come before the next setting.
        seeds: how many, from 0, or which.
        output: the records' folder; `runs/sweeps/<target>` by default.
        fixed: parameters that are the same in every setting.
        work: where runs keep what they work with; `<output>/cells` by default.
        engine: "local": processes of this machine (`pool.local_pool`); "ray": a Ray cluster
            (`sweep_ray.ray_pool`), at `address` or one started here.
        jobs: runs side by side: on each GPU, or on the CPU; with Ray, in all.
        budget: seconds. No run is started that would not end in time by what runs took so far, nor
            a setting all of whose seeds would not; what still runs shortly after is cut off, and
            taken up by the next call.
        metrics: those of the figure; by default the first four that differ.
        say: prints a line.

    Raises:
        UnknownNameError, BadInputError, NotAvailableError: target, grid, parameter or value, before
            anything runs; a record of another run under the name of one of these.
        BusyError: another sweep is at work in the folder.
    """
    if engine not in ENGINES:
        raise unknown_name("engine", engine, ENGINES)
    if address and engine != "ray":
        raise BadInputError("An address is of a Ray cluster: add --engine ray.")
    if budget is not None and not budget > 0:
        raise BadInputError(f"A budget is a number of seconds above 0, not {budget}.")
    found, numbers = find_target(target), seeds_of(seeds)
    check_seeds(found, numbers)
    cells = cells_of(found, grid, numbers, fixed)
    if output is None:
        output = store.repository() / "runs" / "sweeps" / found.name
    output = Path(output).expanduser().resolve()
    work = Path(work).expanduser().resolve() if work else output / "cells"
    store.check_disk(output, 50_000_000, f"A sweep of {found.name}", "choose another with -o")
    with store.lock(output, wait=False):
        finished = {c.name: sweep_cells.find(output, c, found, say) for c in cells}
        finished = {name: record for name, record in finished.items() if record is not None}
        left = len(cells) - len(finished)
        settings = len({cell.group for cell in cells})
        say(
            f"{found.name}: {settings} setting(s), {len(numbers)} seed(s): {len(cells)} runs, "
            f"{len(finished)} of them finished already"
        )
        failures: list[Failure] = []
        if left:
            clock = _clock(budget, cells, finished)
            place = _engine(engine, work, jobs, address, left)
            with _Figures(output):
                failures = _run(found, cells, finished, output, work, place, clock, say)
        ordered = [finished[c.name] for c in cells if c.name in finished]
        table, figure = _summary(found, cells, ordered, output, metrics)
        over = finished.keys() | {f.name for f in failures}
        missing = tuple(c.name for c in cells if c.name not in over)
    return SweepResult(output, tuple(ordered), tuple(failures), missing, table, figure)


def _run(
    target: Target,
    cells: Sequence[Cell],
    finished: dict[str, Record],
    output: Path,
    work: Path,
    place: Engine,
    clock: Clock,
    say,
) -> list[Failure]:
    """Run what is not in `finished`, put its records there, return what failed."""
    waiting = {cell.name: cell for cell in cells if cell.name not in finished}
    begun = {cell.group for cell in cells if cell.name in finished}
    failures: list[Failure] = []
    attempts: dict[str, int] = {}
    total, there = len(cells), len(finished)

    def on_end(job: Job, outcome: Outcome, again: bool) -> None:
        cell = waiting[job.name]
        attempts[cell.name] = attempts.get(cell.name, 0) + 1
        if outcome.error is None:
            record = sweep_cells.keep(output, cell, outcome.value)
            finished[cell.name] = record
            say(_progress(cell, record, outcome, len(finished), total, there, clock))
        else:
            failure = sweep_cells.note_failure(output, cell, outcome, attempts[cell.name])
            what = "tried again" if again else "failed"
            say(f"{cell.name} {what}: {outcome.error}")
            if not again:
                failures.append(failure)

    jobs_ = [
        Job(
            name=cell.name,
            function=RUN,
            arguments={
                "function": target.function,
                "parameters": dict(cell.parameters),
                "seed": cell.seed,
                "folder": str(work / cell.name),
                "fixed": dict(target.fixed or {}),
            },
            group=cell.group,
            log=work / "logs" / f"{cell.name}.log",
        )
        for cell in waiting.values()
    ]
    run_jobs(jobs_, place, clock, begun=begun, on_end=on_end, say=say)
    return failures


def _progress(cell, record, outcome, done: int, total: int, there: int, clock: Clock) -> str:
    said = ", ".join(
        f"{name} {m.value if isinstance(m, Metric) else m:.4g}"
        for name, m in list(record.metrics.items())[:3]
    )
    line = f"{done} of {total}  {cell.name}: {outcome.seconds:.0f} s; {said}"
    if done < total:
        rest = clock.passed / (done - there) * (total - done)
        line += (
            f"; about {rest / 60:.0f} min to go" if rest > 120 else f"; about {rest:.0f} s to go"
        )
    return line


def _clock(budget: float | None, cells: Sequence[Cell], finished: Mapping[str, Record]) -> Clock:
    """A clock that knows what runs took on this machine before."""
    clock = Clock(budget)
    if budget is None or not finished:
        return clock
    from lora_kit.hardware import detect

    here = detect().name
    for cell in cells:
        record = finished.get(cell.name)
        if record is not None and record.hardware.get("name") == here:
            clock.note(Job(cell.name, RUN, group=cell.group), record.seconds)
    return clock


def _engine(engine: str, work: Path, jobs: int | None, address: str | None, most: int) -> Engine:
    if engine == "ray":
        from lora_kit.studies.sweep_ray import ray_pool

        return ray_pool(jobs, address)
    return local_pool(work / "logs", jobs, most=most)


def _summary(target: Target, cells, records, output: Path, metrics):
    from lora_kit.studies.sweep_summary import draw_summary, summarise

    table = summarise(records, list(dict.fromkeys(n for cell in cells for n in cell.setting)))
    store.write_text(output / SUMMARY, table.to_csv(index=False, float_format="%.10g"))
    if table.empty:
        return table, None
    from lora_kit import figures

    figure = draw_summary(table, metrics, f"Sweep of {target.name.replace('_', ' ')}")
    if figure is None:
        return table, None
    with _Figures(output):
        return table, figures.save(figure, f"sweep_{target.name}")


class _Figures:
    """Figures go to the sweep's own folder inside the block, as those of a notebook's run do."""

    def __init__(self, output: Path):
        self.folder = str(output / "figures")

    def __enter__(self) -> None:
        self.old = os.environ.get("LORA_KIT_FIGURES")
        os.environ["LORA_KIT_FIGURES"] = self.folder

    def __exit__(self, *_) -> None:
        if self.old is None:
            del os.environ["LORA_KIT_FIGURES"]
        else:
            os.environ["LORA_KIT_FIGURES"] = self.old
