"""The specialists study's records read again: frames, tables, and the paper's beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from lora_kit import store
from lora_kit.errors import BadInputError
from lora_kit.evaluate.statistics import Estimate, paired_difference
from lora_kit.studies.forgetting import seed_interval
from lora_kit.studies.records import Record, read_record
from lora_kit.studies.specialists import GENERALIST, STUDY, TASKS_AT_HAND
from lora_kit.studies.specialists_generations import unpack

NO_RECORD, NOT_COMPARABLE = "not run", "–"
SWEEP = "lora-kit sweep specialists --grid benchmarks/grids/specialists.yaml --seeds 3 --jobs 8"
SMALL = "OMP_NUM_THREADS=1 python benchmarks/specialists.py --small"
TINY = "OMP_NUM_THREADS=1 python benchmarks/specialists.py --tiny"
FIELDS = ("part", "model", "task", "rank", "placement", "scaling", "scale", "learning_rate")
FIELDS += ("rows", "steps", "tests", "seed")


@dataclass(frozen=True)
class Study:
    """All records there are. grid: those of the sweep; small: held-out loss of the default model on
    a CPU; tiny: the addition model's cells, a row each; skipped: settings the planner refused;
    unstopped: the base's summaries without the stop at an empty line."""

    grid: list[Record] = field(repr=False)
    small: list[Record] = field(repr=False)
    tiny: pd.DataFrame = field(repr=False)
    skipped: dict[str, str]
    unstopped: Record | None = None

    def __str__(self) -> str:
        return (
            f"{len(self.grid)} cells of the grid, {len(self.small)} small cells on a CPU, "
            f"{len(self.tiny)} cells of the addition model"
        )


def read_study(folder: Path | None = None) -> Study:
    """Read `data/results/07_specialists/`, or the same layout elsewhere; empty where it is.

    Records of the notebook itself, and a sweep's own files, are passed over.

    Args:
        folder: the folder above `07_specialists`.

    Raises:
        CorruptFileError: a record that is none.
    """
    folder = (folder or store.repository() / "data" / "results") / STUDY
    grid, small, tiny, skipped, unstopped = [], [], [], {}, None
    for path in sorted(folder.glob("*.json")):
        told = store.read_json(path)
        if not isinstance(told, dict) or not isinstance(told.get("parameters"), dict):
            continue
        part = told["parameters"].get("part")
        if part is None:
            continue
        record = read_record(path)
        if reason := record.parameters.get("skipped"):
            skipped[f"{record.parameters['task']} {record.parameters['part']}"] = reason
        elif part == "tiny":
            tiny += record.tables["cells"]
        elif part == "unstopped":
            unstopped = record
        elif "size" in record.parameters:
            small.append(record)
        else:
            grid.append(record)
    return Study(grid, small, pd.DataFrame(tiny), skipped, unstopped)


def frame_of(records: Sequence[Record]) -> pd.DataFrame:
    """A row a run: what was asked (`FIELDS`, the learning rate as `rate`), each metric's value, and
    the ends of its interval over items (`… low`, `… high`) where it has one. Empty, with these
    columns, where there are no records."""
    rows = []
    for record in records:
        row = {name: record.parameters.get(name) for name in FIELDS}
        row |= {k: getattr(v, "value", v) for k, v in record.metrics.items()}
        spans = {k: v for k, v in record.metrics.items() if hasattr(v, "low")}
        row |= {f"{k} {end}": getattr(v, end) for k, v in spans.items() for end in ("low", "high")}
        row["peak_memory"] = record.peak_memory_bytes
        rows.append(row)
    frame = pd.DataFrame(rows, columns=None if rows else list(FIELDS))
    return frame.rename(columns={"learning_rate": "rate"})


def main_cells(frame: pd.DataFrame, rate: float = 1e-3) -> pd.DataFrame:
    """The runs that trained an adapter on one task at one learning rate."""
    if frame.empty:
        return frame
    some = frame[(frame["part"] == "tune") & (frame["task"] != GENERALIST)]
    return some[np.isclose(some["rate"].astype(float), rate)]


def over_seeds(values: Sequence[float]) -> str:
    """Mean and Student's 95 % interval over seeds, as text."""
    mean, low, high = seed_interval(values)
    if len(values) < 2:
        return f"{mean:.4f} (1 seed)"
    return f"{mean:.4f} [{low:.4f}, {high:.4f}]"


def over_items(runs: pd.DataFrame, metric: str) -> str:
    """Mean over seeds of a test's score, with the 95 % interval over items of one seed (the means
    of the seeds' ends; Wilson's for shares, so that a score of 0 has a width). Over seeds where the
    records have no intervals."""
    some = runs.dropna(subset=[metric])
    if f"{metric} low" not in some or some[f"{metric} low"].isna().any():
        return over_seeds(some[metric].tolist())
    mean, low, high = (float(some[f"{metric}{end}"].mean()) for end in ("", " low", " high"))
    seeds = "" if len(some) > 2 else f" ({len(some)} seed{'s' * (len(some) > 1)})"
    return f"{mean:.4f} [{low:.4f}, {high:.4f}]{seeds}"


# ------------------------------------------------------------------ the paper's tables beside ours

# Of a table: its number, its columns with the metric of ours that is nearest, and our task.
PAPER_TABLES = {
    "code": (1, {"pass@1": "humaneval pass@1", "pass@10": "humaneval pass@10"}, "code"),
    "summaries": (
        2,
        {
            "ROUGE-1": "dialogue rouge1",
            "ROUGE-2": "dialogue rouge2",
            "ROUGE-L": "dialogue rougeL",
        },
        "dialogue",
    ),
    "HellaSwag": (
        3,
        {"Accuracy": "hellaswag acc", "Acc - Norm": "hellaswag acc_norm"},
        "dialogue",
    ),
    "mathematics": (
        4,
        {"Flexible Extract": "gsm8k flexible", "Strict Match": "gsm8k strict"},
        "gsm8k",
    ),
}
NAMED = {"mlp": "mlp", "attn": "attention", "all": "all", "code": "all", "math": "all"}


def paper_setting(row: str) -> tuple[str, int] | None:
    """(placement, rank) of a row of the paper's tables; None for a base model."""
    parts = row.lower().split("-")
    if not parts[-1].startswith("r") or not parts[-1][1:].isdigit():
        return None
    return NAMED[parts[-2]], int(parts[-1][1:])


def beside_paper(name: str, frame: pd.DataFrame) -> list[dict]:
    """One of the paper's four tables, each printed number with ours under it.

    Ours: the default model at the same rank and placement with α = 16, on the task that stands in
    for the paper's, with the interval over items; bases are those of 1B and 135 million parameters.
    3B and Mistral have no counterpart here ("–").

    Raises:
        UnknownNameError: none of the four.
    """
    from lora_kit.errors import unknown_name
    from lora_kit.studies.papers import read_table, wide

    if name not in PAPER_TABLES:
        raise unknown_name("table of saha2024", name, PAPER_TABLES)
    number, columns, task = PAPER_TABLES[name]
    printed = wide(read_table("saha2024", f"table_{number:02}"), what="printed")
    cells = main_cells(frame)
    rows = []
    for heading in printed.index:
        setting, line = paper_setting(heading), {"row": heading}
        some = cells.iloc[:0]
        if heading == "Llama-3.2-1B-Instruct" and not frame.empty:
            some = frame[frame["part"] == "base"]
        elif setting and "3b" not in heading.lower() and not cells.empty:
            some = cells[(cells["task"] == task) & (cells["scaling"] == "fixed")]
            some = some[(some["placement"] == setting[0]) & (some["rank"] == setting[1])]
        comparable = heading == "Llama-3.2-1B-Instruct" or (setting and "3B" not in heading)
        for column, metric in columns.items():
            line[column] = printed.loc[heading, column]
            ours = NO_RECORD if comparable else NOT_COMPARABLE
            if metric in some and some[metric].notna().any():
                ours = over_items(some, metric)
            line[f"ours, {column}"] = ours
        rows.append(line)
    return rows


# ------------------------------------------------------------------ interference


def item_scores(record: Record, test: str, metric: str) -> list[float] | None:
    """Every item's score of one test in one record; None where it was not asked."""
    for row in record.tables.get("items", []):
        if (row["test"], row["metric"]) == (test, metric):
            return unpack(row["scores"])
    return None


WAYS = ("base", "specialist", "routed", "generalist r16", "generalist r48")
INTERFERENCE = {
    "gsm8k": "flexible",
    "words": "flexible",
    "humaneval": "pass@1",
    "dialogue": "rougeL",
    "hellaswag": "acc_norm",
}


@dataclass(frozen=True)
class Ways:
    """One test, asked of the ways to have three skills. Each a mean over seeds of every item's
    score; `gains`: the way minus the task's own specialist, paired item by item."""

    test: str
    metric: str
    means: dict[str, float]
    gains: dict[str, Estimate]

    def row(self) -> dict:
        """One line of a table; "–" where the router was not asked, since no answer is written."""
        from lora_kit.studies.specialists_serving import OWNER

        line: dict = {"test": self.test, "metric": self.metric}
        for name in WAYS:
            unasked = name == "routed" and self.test not in OWNER
            text = NOT_COMPARABLE if unasked else NO_RECORD
            if name in self.means:
                text = f"{self.means[name]:.3f}"
            if gain := self.gains.get(name):
                text += f" ({gain.low:+.3f} to {gain.high:+.3f})"
            line[name] = text
        return line


def interference(study: Study) -> list[Ways]:
    """Base, specialists, routed specialists and generalists on every test that has records; the
    differences are against the specialist that was made for the test."""
    from lora_kit.studies.specialists_serving import OWNER

    mains = {t: _specialists(study, t) for t in TASKS_AT_HAND}
    found = []
    for test, metric in INTERFERENCE.items():
        ways: dict[str, np.ndarray] = {}
        bases = [r for r in study.grid if r.parameters["part"] == "base"]
        _put(ways, "base", bases, test, metric)
        owner = OWNER.get(test, "dialogue")
        _put(ways, "specialist", list(mains[owner].values()), test, metric)
        for rank in (16, 48):
            some = [
                r
                for r in study.grid
                if r.parameters["task"] == GENERALIST
                and r.parameters["part"] == "tune"
                and r.parameters["rank"] == rank
            ]
            _put(ways, f"generalist r{rank}", some, test, metric)
        routed = _routed(study, mains, bases, test, metric)
        if routed is not None:
            ways["routed"] = routed
        if not ways:
            continue
        gains = {}
        if "specialist" in ways:
            gains = {
                name: paired_difference(ways["specialist"].tolist(), scores.tolist())
                for name, scores in ways.items()
                if name != "specialist" and len(scores) == len(ways["specialist"])
            }
        means = {name: float(scores.mean()) for name, scores in ways.items()}
        found.append(Ways(test, metric, means, gains))
    return found


def _specialists(study: Study, task: str) -> dict[int, Record]:
    """The rank-16 adapters on all layers that were asked every test, by seed."""
    return {
        r.seed: r
        for r in study.grid
        if r.parameters["part"] == "tune"
        and r.parameters["task"] == task
        and r.parameters["rank"] == 16
        and r.parameters["placement"] == "all"
        and r.parameters["tests"] == "all"
    }


def _put(ways: dict, name: str, records: Sequence[Record], test: str, metric: str) -> None:
    scores = [s for r in records if (s := item_scores(r, test, metric)) is not None]
    if scores:
        if len({len(s) for s in scores}) > 1:
            raise BadInputError(f"The records of {name} on {test} have items of different numbers.")
        ways[name] = np.mean(scores, axis=0)


def _routed(study: Study, mains, bases, test: str, metric: str) -> np.ndarray | None:
    """Each item's score by the specialist its router sent it to, mean over seeds."""
    letters = {task[0]: task for task in TASKS_AT_HAND}
    base = item_scores(bases[0], test, metric) if bases else None
    found = []
    for record in study.grid:
        if record.parameters["part"] != "route":
            continue
        routes = next((r for r in record.tables["routes"] if r["test"] == test), None)
        own = {
            k: item_scores(mains[t][record.seed], test, metric)
            for k, t in letters.items()
            if record.seed in mains[t]
        }
        if routes is None or base is None or len(own) < 3 or None in own.values():
            continue
        own["-"] = base
        found.append([own[k][i] for i, k in enumerate(routes["routes"])])
    return np.mean(found, axis=0) if found else None


# ------------------------------------------------------------------ claims

# Claims of the ledger that this study speaks to, and what of it does.
LINKED = {
    "saha2024-026": "the scale falls with the rank: sections 2 and 4",
    "saha2024-035": "code, higher rank: table 1",
    "saha2024-049": "mathematics, higher rank: table 4 and the paper's steps",
    "saha2024-037": "both placements against one: the paper's steps, the map",
    "saha2024-054": "rank 128 against 32: the paper's steps",
    "saha2024-056": "higher rank on our models: sections 1 and 4",
    "saha2024-057": "placement on our models: sections 1 and 4",
    "saha2024-004": "adapters for tasks: section 5",
    "saha2024-003": "memory: section 5",
}


def linked_claims() -> list[dict]:
    """The ledger's entries this study speaks to: id, claim, verdict, where to look.

    Raises:
        BadInputError: an entry that the ledger lost.
    """
    from lora_kit.studies.claims import read_claims

    ledger = {claim.id: claim for claim in read_claims()}
    if lost := sorted(set(LINKED) - set(ledger)):
        raise BadInputError(f"The ledger has no {', '.join(lost)}: mend specialists_report.LINKED.")
    return [
        {
            "claim": key,
            "in our words": ledger[key].claim,
            "verdict": ledger[key].verdict,
            "see": see,
        }
        for key, see in LINKED.items()
    ]
