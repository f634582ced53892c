"""The addition study's records read again: curves with bands, tables, what has no record yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_kit import store
from lora_kit.arithmetic import KINDS
from lora_kit.evaluate.statistics import over_runs
from lora_kit.studies import arithmetic_cells, coupled_cells, leakage_cells
from lora_kit.studies.records import Record, read_records

LORA, CPU = "10_arithmetic/lora", "10_arithmetic/cpu"  # under data/results
COUPLED, MMLU = coupled_cells.FOLDER, "10_arithmetic/mmlu"
NO_RECORD = "no record yet"
HEADS = ("scheme", "reading", "method")  # what a setting is called by


@dataclass(frozen=True)
class Setting:
    """One setting of a study over its seeds. values: all parameters; changed: those that differ
    from the defaults."""

    values: Mapping[str, Any]
    changed: Mapping[str, Any]
    records: tuple[Record, ...] = field(default=(), repr=False)

    @property
    def label(self) -> str:
        """The method, and what differs, in words."""
        heads = [str(self.values[k]) for k in HEADS if k in self.values]
        words = [f"{k.replace('_', ' ')} {v}" for k, v in self.changed.items() if k not in HEADS]
        return ", ".join([" ".join(heads).replace("_", " "), *words])

    def curve(self, metric: str = "exact", table: str = "lengths") -> list[dict]:
        """A row for each length: mean, low, high, seeds, n.

        Of several seeds the band is Student's 95 % interval over them; of one, the record's own
        (Wilson's, over its sums), where the metric has one.
        """
        at: dict[int, list[dict]] = {}
        for record in self.records:
            for row in record.tables.get(table, []):
                at.setdefault(row["digits"], []).append(row)
        found = []
        for digits, rows in sorted(at.items()):
            values = [row[metric] for row in rows]
            over = over_runs(values)
            one = rows[0] if metric == "exact" else {}
            alone = (one.get("low", over.value), one.get("high", over.value))
            low, high = (over.low, over.high) if len(values) > 1 else alone
            if metric == "exact" or metric == "digit_accuracy":
                low, high = max(low, 0.0), min(high, 1.0)
            found.append(
                {"digits": digits, "mean": over.value, "low": low, "high": high}
                | {"seeds": len(values), "n": sum(row["n"] for row in rows)}
            )
        return found

    def kinds(self, beyond: bool) -> dict[str, int]:
        """How many answers within or beyond the trained lengths are wrong in which way."""
        counts = dict.fromkeys(KINDS[1:], 0)
        for record in self.records:
            most = record.parameters["most_trained"]
            for row in record.tables["lengths"]:
                if (row["digits"] > most) == beyond:
                    for kind in counts:
                        counts[kind] += row[kind]
        return counts

    def at(self, digits: int) -> str:
        """Exact accuracy at a length, as text."""
        row = next((r for r in self.curve() if r["digits"] == digits), None)
        return "" if row is None else f"{row['mean']:.3f} ({row['low']:.2f} to {row['high']:.2f})"


def read_settings(
    folder: str, defaults: Mapping[str, Any], root: Path | None = None
) -> list[Setting]:
    """Every setting that has records in `data/results/<folder>`, by what differs from the
    defaults."""
    groups: dict[str, tuple[dict, list[Record]]] = {}
    for record in read_records(folder, root):
        changed = {
            k: record.parameters[k]
            for k, v in defaults.items()
            if k in record.parameters and record.parameters[k] != v
        }
        groups.setdefault(store.sha256_json(changed), (changed, []))[1].append(record)
    return [
        Setting({**defaults, **c}, c, tuple(sorted(r, key=lambda x: x.seed or 0)))
        for c, r in groups.values()
    ]


def planned(grid: str) -> list[dict]:
    """The settings of one of the kit's grids, `benchmarks/grids/<grid>.yaml`, in its order."""
    from lora_kit.studies.sweep_grid import read_grid, settings_of

    return settings_of(read_grid(store.repository() / "benchmarks" / "grids" / f"{grid}.yaml"))


def match(
    wanted: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any], found: Sequence[Setting]
) -> list[Setting]:
    """Each planned setting with its records, as far as it has any."""
    known = {store.sha256_json(dict(s.changed)): s for s in found}
    made = []
    for setting in wanted:
        changed = {k: setting[k] for k in defaults if k in setting and setting[k] != defaults[k]}
        empty = Setting({**defaults, **changed}, changed)
        made.append(known.get(store.sha256_json(changed), empty))
    return made


def table(grid: str, folder: str, defaults, lengths: Sequence[int], root=None) -> list[dict]:
    """A row for each setting of a grid: exact accuracy at some lengths and the edge, or that there
    is no record."""
    rows = []
    for setting in match(planned(grid), defaults, read_settings(folder, defaults, root)):
        cells = {_head(k): setting.at(k) for k in lengths}
        if not setting.records:
            cells[_head(lengths[0])] = NO_RECORD
        rows.append({"setting": setting.label, "seeds": len(setting.records), **cells})
    return rows


def _head(digits: int) -> str:
    return f"{digits} digits"


def arithmetic_table(root: Path | None = None) -> list[dict]:
    """`table` of the LoRA grid: within, at the edge and beyond."""
    return table("arithmetic", LORA, arithmetic_cells.DEFAULTS, (7, 8, 9, 12, 14), root)


def coupled_table(root: Path | None = None) -> list[dict]:
    """`table` of the from-scratch grid."""
    return table("coupled", COUPLED, coupled_cells.DEFAULTS, (5, 10, 14, 20, 30, 50, 60), root)


def leakage_rows(root: Path | None = None) -> list[dict]:
    """A row for each leakage setting and group of questions: accuracy before and after over seeds,
    and McNemar's p of each seed."""
    rows = []
    records = [r for r in read_records(MMLU, root) if r.parameters.get("part") == "leakage"]
    groups: dict[str, list[Record]] = {}
    for r in records:
        key = {k: v for k, v in r.parameters.items() if k in leakage_cells.DEFAULTS}
        groups.setdefault(store.sha256_json(key), []).append(r)
    for some in groups.values():
        p = some[0].parameters
        for name in ("leaked", "leaked_turned", "unseen", "other_subject"):
            if f"{name}_after" not in some[0].metrics:
                continue
            before, after = (
                over_runs([r.metrics[f"{name}_{when}"].value for r in some])
                for when in ("before", "after")
            )
            rows.append(
                {"leaked": p["subject"], "epochs": p["epochs"], "asked": name.replace("_", " ")}
                | {"n": some[0].metrics[f"{name}_after"].n, "seeds": len(some)}
                | {"before": f"{before.value:.3f}", "after": f"{after.value:.3f}"}
                | {"p": ", ".join(f"{r.metrics[f'{name}_p']:.2g}" for r in some)}
            )
    return rows
