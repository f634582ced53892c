"""The forgetting study's records read again: tables, and intervals over seeds and items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from lora_kit.errors import CorruptFileError
from lora_kit.evaluate.statistics import Estimate, paired_difference
from lora_kit.studies.forgetting import (
    CENTRE,
    STUDY,
    Cell,
    from_bits,
    seed_interval,
    settings,
)
from lora_kit.studies.forgetting_tasks import COMPUTER_SCIENCE, METRICS, Paired, pair_records
from lora_kit.studies.records import Record, read_records

NO_RECORD = "no record yet"


@dataclass(frozen=True)
class Study:
    """All records there are: `taught` by seed, `cells` by cell, `tasks` by (task, model)."""

    taught: dict[int, Record] = field(repr=False)
    cells: dict[Cell, Record] = field(repr=False)
    tasks: dict[tuple[str, str], Record] = field(repr=False)

    def __str__(self) -> str:
        return (
            f"{len(self.taught)} taught bases, {len(self.cells)} cells of the map, "
            f"{len(self.tasks)} benchmark records"
        )


def read_study(folder: Path | None = None) -> Study:
    """Read `data/results/06_forgetting/`, or the same layout elsewhere; empty where it is.

    Args:
        folder: the folder above `06_forgetting`.

    Raises:
        CorruptFileError: a record of no known part.
    """
    study = Study({}, {}, {})
    for record in read_records(STUDY, folder):
        p = record.parameters
        part = p.get("part")
        if part == "teach":
            study.taught[record.seed] = record
        elif part == "map":
            names = ("rank", "learning_rate", "rows", "replay", "seed")
            study.cells[Cell(tuple(p["skills"]), *(p[name] for name in names))] = record
        elif part == "standard":
            study.tasks[p["task"], p["which"]] = record
        elif "MODEL" not in p:  # a run of the notebook itself leaves its record here too
            raise CorruptFileError(f"A record of {STUDY} has the part {part!r}, which is none.")
    return study


@dataclass(frozen=True)
class Setting:
    """One setting of the map over its seeds. rates: forgetting rate of each seed; loss: Alpaca's
    held-out loss of each; before, after: accuracies of each."""

    cell: Cell
    rates: tuple[float, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    loss: tuple[float, ...]

    @property
    def rate(self) -> tuple[float, float, float]:
        """(mean, low, high): Student's 95 % interval over seeds."""
        return seed_interval(self.rates)

    @property
    def mean_loss(self) -> float:
        return float(np.mean(self.loss))

    def row(self) -> dict:
        """One line of a table."""
        mean, low, high = self.rate
        return {
            "rank": self.cell.rank,
            "rate": f"{self.cell.learning_rate:.0e}",
            "rows": self.cell.rows,
            "replay": f"{self.cell.replay:.0%}",
            "seeds": len(self.rates),
            "before": f"{np.mean(self.before):.3f}",
            "after": f"{np.mean(self.after):.3f}",
            "forgetting rate": f"{mean:.2f}",
            "95 % over seeds": f"{low:.2f} to {high:.2f}",
            "Alpaca loss": f"{self.mean_loss:.3f}",
        }


def read_settings(
    study: Study, skill: str, judge: str = "strict", centre: Cell = CENTRE
) -> list[Setting]:
    """Every setting of the map that has a record, in the order of `forgetting.settings`."""
    found = []
    for setting in settings(centre):
        records = [
            record
            for cell, record in study.cells.items()
            if cell.setting == setting.setting and f"{skill}_{judge}_forgetting" in record.metrics
        ]
        if records:
            key = f"{skill}_{judge}"
            found.append(
                Setting(
                    setting,
                    tuple(r.metrics[f"{key}_forgetting"].value for r in records),
                    tuple(r.metrics[f"{key}_before"].value for r in records),
                    tuple(r.metrics[f"{key}_after"].value for r in records),
                    tuple(r.metrics["alpaca_loss_after"] for r in records),
                )
            )
    return found


def three_states(
    study: Study, skill: str, judge: str = "strict", centre: Cell = CENTRE
) -> dict[int, tuple[float, float, float]]:
    """{seed: accuracy as taught, through NF4, after QLoRA by the centre}, of the seeds that
    have both records."""
    key, found = f"{skill}_{judge}", {}
    for cell, record in study.cells.items():
        base = study.taught.get(cell.seed)
        if cell.setting == centre.setting and base and f"{key}_after" in record.metrics:
            before = (base.metrics[f"{key}_{which}"].value for which in ("taught", "nf4"))
            found[cell.seed] = (*before, record.metrics[f"{key}_after"].value)
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Shift:
    """A setting's accuracy less three others, paired by seed, each as (mean, low, high) of
    Student's 95 % interval: less the base as taught, less that base through NF4, less the centre
    of the map after its training. loss: of Alpaca's held-out rows, less the centre's."""

    cell: Cell
    seeds: tuple[int, ...]
    from_taught: tuple[float, float, float]
    from_nf4: tuple[float, float, float]
    from_centre: tuple[float, float, float]
    loss: tuple[float, float, float]

    def row(self) -> dict:
        """One line of a table, in points; the loss in nats per token."""
        shifts = {
            "less as taught": self.from_taught,
            "less NF4": self.from_nf4,
            "less the centre": self.from_centre,
        }
        return {
            "setting": difference_from(self.cell),
            **{name: _points(shift) for name, shift in shifts.items()},
            "Alpaca loss, less the centre's": "{:+.3f} [{:+.3f}, {:+.3f}]".format(*self.loss),
        }


def difference_from(cell: Cell, centre: Cell = CENTRE) -> str:
    """What a setting has that the centre has not: "rank 64", "5% replay", or "centre"."""
    told = {
        "rank": f"rank {cell.rank}",
        "learning_rate": f"rate {cell.learning_rate:.0e}",
        "rows": f"{cell.rows:,} rows",
        "replay": f"{cell.replay:.0%} replay",
    }
    some = [text for name, text in told.items() if getattr(cell, name) != getattr(centre, name)]
    return ", ".join(some) or "centre"


def read_shifts(
    study: Study, skill: str, judge: str = "strict", centre: Cell = CENTRE
) -> list[Shift]:
    """Every setting against the taught base, its 4-bit copy and the centre, over the seeds that
    have all four, in the order of `forgetting.settings`; empty without the centre's records."""
    key, found = f"{skill}_{judge}", []
    states = three_states(study, skill, judge, centre)
    for setting in settings(centre):
        pairs = []
        for seed, state in states.items():
            record = study.cells.get(replace(setting, seed=seed))
            middle = study.cells[replace(centre, seed=seed)]
            if record is not None:
                after = record.metrics[f"{key}_after"].value
                losses = [r.metrics["alpaca_loss_after"] for r in (record, middle)]
                pairs.append([*(after - other for other in state), losses[0] - losses[1]])
        if pairs:
            intervals = (seed_interval(column) for column in zip(*pairs, strict=True))
            seeds = tuple(s for s in states if replace(setting, seed=s) in study.cells)
            found.append(Shift(setting, seeds, *intervals))
    return found


def _points(shift: tuple[float, float, float]) -> str:
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * x for x in shift))


def along(found: Sequence[Setting], name: str, centre: Cell = CENTRE) -> list[Setting]:
    """The settings that differ from the centre in one field at most, in the order of its values."""
    fields = ("rank", "learning_rate", "rows", "replay")
    others = [f for f in fields if f != name]
    on = [s for s in found if all(getattr(s.cell, o) == getattr(centre, o) for o in others)]
    return sorted(on, key=lambda s: getattr(s.cell, name))


@dataclass(frozen=True)
class Benchmark:
    """One metric of a benchmark. tuned: a value a seed. difference: mean over seeds of each item's
    score, minus the base's, paired. p: McNemar's of each seed."""

    task: str
    metric: str
    base: Estimate
    nf4: float | None
    tuned: tuple[float, ...]
    difference: Estimate
    p: tuple[float, ...]

    def row(self) -> dict:
        """One line of a table."""
        return {
            "task": self.task.removeprefix("mmlu_").replace("_", " "),
            "metric": self.metric.removeprefix("exact_match,"),
            "n": self.base.n,
            "base": f"{self.base.value:.4f}",
            "NF4": NO_RECORD if self.nf4 is None else f"{self.nf4:.4f}",
            "tuned, by seed": ", ".join(f"{v:.4f}" for v in self.tuned),
            "difference": f"{self.difference.value:+.4f}",
            "95 %": f"{self.difference.low:+.4f} to {self.difference.high:+.4f}",
            "McNemar p by seed": ", ".join(f"{p:.1g}" for p in self.p),
        }


def read_benchmarks(study: Study, against: str = "base") -> list[Benchmark]:
    """Every benchmark with a base and a tuned record, before and after, paired item by item.

    Args:
        against: "base", the model as it was, or "nf4", its weights through NF4.
    """
    found = []
    for task, metrics in METRICS.items():
        base = study.tasks.get((task, against))
        tuned = [
            record
            for (name, which), record in sorted(study.tasks.items())
            if name == task and which.startswith("seed")
        ]
        if base is None or not tuned:
            continue
        pairs = [pair_records(base, record) for record in tuned]
        nf4 = study.tasks.get((task, "nf4"))
        through = {(p.task, p.metric): p for p in pair_records(base, nf4)} if nf4 else {}
        names = [task, *(COMPUTER_SCIENCE if task == "mmlu" else ())]
        for metric in metrics:
            for name in names:
                some = [p for pair in pairs for p in pair if (p.task, p.metric) == (name, metric)]
                if some:
                    other = through.get((name, metric))
                    found.append(_benchmark(name, metric, base, tuned, some, other))
    return found


def _benchmark(name, metric, base, tuned, pairs: list[Paired], through) -> Benchmark:
    first = _scores(base, name, metric)
    mean = np.mean([_scores(record, name, metric) for record in tuned], axis=0)
    return Benchmark(
        task=name,
        metric=metric.removesuffix(",none"),
        base=pairs[0].change.before,
        nf4=None if through is None else through.change.after.value,
        tuned=tuple(p.change.after.value for p in pairs),
        difference=paired_difference(first, mean),
        p=tuple(p.change.test.p for p in pairs),
    )


def _scores(record: Record, name: str, metric: str) -> list[float]:
    rows = [r for r in record.tables["items"] if r["metric"] == metric]
    if name in COMPUTER_SCIENCE:
        rows = [r for r in rows if r["task"] == name]
    return [score for row in rows for score in from_bits(row["scores"])]
