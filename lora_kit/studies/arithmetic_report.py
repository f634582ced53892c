"""The addition study's records read again: curves with bands, tables, what has no record yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_kit import store
from lora_kit.arithmetic import KINDS
from lora_kit.evaluate.statistics import Estimate, holm, over_runs, paired_difference, proportion
from lora_kit.studies import arithmetic_cells, coupled_cells, leakage_cells
from lora_kit.studies.arithmetic_scores import artefact_rows
from lora_kit.studies.records import Record, read_records

LORA, CPU = "10_arithmetic/lora", "10_arithmetic/cpu"  # under data/results
COUPLED, MMLU = coupled_cells.FOLDER, "10_arithmetic/mmlu"
NO_RECORD = "not run"
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

        Of several seeds the band is Student's 95 % interval over them; where exact answers of all
        seeds agree (all right, all wrong), which leaves Student's no width, Wilson's over all their
        sums; of one seed, the record's own (Wilson's, over its sums), where the metric has one.
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
            if metric == "exact" and len(values) > 1 and len(set(values)) == 1:
                asked = sum(row["n"] for row in rows)
                pooled = proportion(round(over.value * asked), asked)
                low, high = pooled.low, pooled.high
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
        return "" if row is None else f"{row['mean']:.3f} ({row['low']:.3f} to {row['high']:.3f})"

    def each(self, digits: int, metric: str = "exact") -> dict[int, float]:
        """A metric at a length, by seed."""
        return {
            record.seed or 0: row[metric]
            for record in self.records
            for row in record.tables["lengths"]
            if row["digits"] == digits
        }

    def places(self) -> list[dict]:
        """The table `places`, mean over seeds: digits, place, right."""
        at: dict[tuple[int, int], list[float]] = {}
        for record in self.records:
            for row in record.tables["places"]:
                at.setdefault((row["digits"], row["place"]), []).append(row["right"])
        return [
            {"digits": k, "place": p, "right": sum(v) / len(v)} for (k, p), v in sorted(at.items())
        ]

    def chains(self, lengths: Sequence[int]) -> list[dict]:
        """Sums of some lengths by their longest chain of carries, over all seeds: chain, n, right
        (a share)."""
        asked: dict[int, list[int]] = {}
        for record in self.records:
            for row in record.tables["carries"]:
                if row["digits"] in lengths:
                    found = asked.setdefault(row["chain"], [0, 0])
                    found[0] += row["right"]
                    found[1] += row["n"]
        return [{"chain": c, "n": n, "right": r / n} for c, (r, n) in sorted(asked.items())]

    def artefact(self) -> list[dict]:
        """`arithmetic_scores.artefact_rows`, mean over seeds."""
        runs = [artefact_rows(r.tables["lengths"], r.tables["places"]) for r in self.records]
        return [
            {
                k: v if k == "digits" else sum(row[k] for row in rows) / len(rows)
                for k, v in rows[0].items()
            }
            for rows in zip(*runs, strict=True)
        ]

    def slope(self, metric: str, first: int, last: int) -> Estimate:
        """What a metric loses with each digit more from `first` to `last` digits, over seeds."""
        a, b = self.each(first, metric), self.each(last, metric)
        return over_runs([(a[seed] - b[seed]) / (last - first) for seed in a])


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
    """`table` of the LoRA grid: the last trained length and beyond it."""
    return table("arithmetic", LORA, arithmetic_cells.DEFAULTS, (7, 8, 10, 14), root)


def coupled_table(root: Path | None = None) -> list[dict]:
    """`table` of the from-scratch grid."""
    return table("coupled", COUPLED, coupled_cells.DEFAULTS, (5, 10, 14, 20, 30, 50, 60), root)


# ------------------------------------------------------------------ settings against each other


def paired(one: Setting, other: Setting, lengths: Sequence[int]) -> Estimate | None:
    """other − one: exact accuracy over all sums of some lengths, same seeds, same sums.

    Of several seeds Student's interval over their differences; of one the bootstrap's over its
    sums. None where no seed has both. n: seeds.
    """
    mine, theirs = ({r.seed or 0: _bits(r, lengths) for r in s.records} for s in (one, other))
    both = sorted(mine.keys() & theirs.keys())
    if not both:
        return None
    if len(both) == 1:
        found = paired_difference(mine[both[0]], theirs[both[0]])
        return Estimate(found.value, found.stderr, found.low, found.high, 1)
    return over_runs([_mean(theirs[s]) - _mean(mine[s]) for s in both])


def _bits(record: Record, lengths: Sequence[int]) -> list[int]:
    wanted = [row["scores"] for row in record.tables["items"] if row["digits"] in lengths]
    return [int(bit) for scores in wanted for bit in scores]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def against(
    base: Setting, settings: Sequence[Setting], groups: Mapping[str, Sequence[int]]
) -> list[dict]:
    """A row for each setting: seeds shared with `base`, and the paired difference to it for each
    group of lengths, or that it was not run. A star marks an interval without 0, a second one what
    stays below 0.05 after Holm's correction over the settings of its column."""
    found = [{name: paired(base, s, some) for name, some in groups.items()} for s in settings]
    kept = {name: _kept([row[name] for row in found]) for name in groups}
    rows = []
    for n, (setting, row) in enumerate(zip(settings, found, strict=True)):
        cells = {k: difference(e) + "*" * kept[k][n] if e else "" for k, e in row.items()}
        first = next(iter(row))
        if row[first] is None:
            cells[first] = NO_RECORD
        seeds = row[first].n if row[first] else 0
        rows.append({"setting": setting.label, "seeds": seeds, **cells})
    return rows


def _kept(column: Sequence[Estimate | None]) -> list[bool]:
    """Which differences over several seeds stay below 0.05 by Student's test and Holm's
    correction."""
    from scipy.stats import t

    ps = {
        n: 2 * float(t.sf(abs(e.value) / e.stderr, e.n - 1))
        for n, e in enumerate(column)
        if e and e.n > 1 and e.stderr
    }
    corrected = dict(zip(ps, holm(list(ps.values())) if ps else [], strict=True))
    return [corrected.get(n, 1.0) < 0.05 for n in range(len(column))]


def difference(e: Estimate) -> str:
    """A difference as text, with a star where its interval excludes 0."""
    star = " *" if e.low > 0 or e.high < 0 else ""
    return f"{e.value:+.3f} ({e.low:+.3f} to {e.high:+.3f}){star}"


def aim_rows(settings: Sequence[Setting], digits: int = 14, aim: float = 0.95) -> list[dict]:
    """How near each setting comes to an aim at one length: mean, interval, lowest and highest seed,
    and how many seeds reach it."""
    rows = []
    for setting in settings:
        values = sorted(setting.each(digits).values())
        row = {"method": setting.label, "seeds": len(values)}
        row |= {_head(digits): setting.at(digits) or NO_RECORD, "lowest": "", "highest": ""}
        row |= {f"seeds at {aim:.0%} or more": ""}
        if values:
            row |= {"lowest": f"{values[0]:.3f}", "highest": f"{values[-1]:.3f}"}
            row |= {f"seeds at {aim:.0%} or more": str(sum(v >= aim for v in values))}
        rows.append(row)
    return rows


# ------------------------------------------------------------------ leakage


def leakage_rows(root: Path | None = None) -> list[dict]:
    """A row for each leakage setting and group of questions: accuracy before and after, and what
    it changed by with Student's interval over seeds; then the settings of the grid that were not
    run. Empty where nothing was.

    Every seed draws its own half to leak; the other subject's questions are the same in all, so
    that its interval covers draws and training, not the choice of questions: McNemar's p does.
    """
    rows, run = [], []
    records = [r for r in read_records(MMLU, root) if r.parameters.get("part") == "leakage"]
    groups: dict[str, list[Record]] = {}
    for r in records:
        key = {k: v for k, v in r.parameters.items() if k in leakage_cells.DEFAULTS}
        groups.setdefault(store.sha256_json(key), []).append(r)
    for some in groups.values():
        p = some[0].parameters
        run.append((p["subject"], p["epochs"]))
        for name in ("leaked", "leaked_turned", "unseen", "other_subject"):
            if f"{name}_after" not in some[0].metrics:
                continue
            before, after, change = (
                over_runs([r.metrics[f"{name}_{what}"].value for r in some])
                for what in ("before", "after", "difference")
            )
            rows.append(
                {"leaked": p["subject"], "epochs": p["epochs"], "asked": name.replace("_", " ")}
                | {"n": some[0].metrics[f"{name}_after"].n, "seeds": len(some)}
                | {"before": f"{before.value:.3f}", "after": f"{after.value:.3f}"}
                | {"change": difference(change)}
                | {"least p": f"{min(r.metrics[f'{name}_p'] for r in some):.2g}"}
            )
    for setting in planned("leakage") if rows else ():
        if (setting["subject"], setting["epochs"]) not in run:
            missing = dict.fromkeys(rows[0], "")
            missing |= {"leaked": setting["subject"], "epochs": setting["epochs"]}
            rows.append(missing | {"asked": NO_RECORD, "seeds": 0})
    return rows
