"""The shop study's records as tables: quality with intervals, cost beside it, what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_kit.errors import BadInputError
from lora_kit.evaluate.statistics import Estimate, over_runs
from lora_kit.shop_products import TASKS
from lora_kit.studies.records import Record, read_records
from lora_kit.studies.shop_cells import ASKED, DEFAULTS, METHODS, STUDY

NO_RECORD = "no record yet"
ON_CPU = "LORA_KIT_DATA=folder python benchmarks/small_shops.py --part {part}"
ON_GPU = "lora-kit sweep shop --grid benchmarks/grids/shop.yaml (its heading has the whole line)"
PART_OF = {"zero-shot": "model", "one-shot": "model", "tuned": "tuned"}
# What makes two runs the same setting, beside the seed.
SETTING = ("task", "method", "data", "train_rows", "test_rows", "model", "recipe", "steps")
SETTING += ("batch_size", "learning_rate", "quantization")


@dataclass(frozen=True)
class Setting:
    """Runs that differ in the seed alone."""

    records: tuple[Record, ...]

    @property
    def parameters(self) -> dict:
        return {k: v for k, v in self.records[0].parameters.items() if k in DEFAULTS}

    @property
    def method(self) -> str:
        return self.parameters["method"]

    @property
    def seeds(self) -> list[int]:
        return sorted(r.seed for r in self.records)

    @property
    def hardware(self) -> str:
        return self.records[0].hardware["name"]

    def has(self, metric: str) -> bool:
        return all(metric in r.metrics for r in self.records)

    def values(self, metric: str) -> list[float]:
        found = [r.metrics[metric] for r in self.records]
        return [v if isinstance(v, float) else v.value for v in found]

    def estimate(self, metric: str) -> Estimate:
        """Mean and Student's interval over seeds; of one seed, that run's own over items."""
        if len(self.records) > 1:
            return over_runs(self.values(metric))
        m = self.records[0].metrics[metric]
        if isinstance(m, float):
            return Estimate(m, None, m, m, 1)
        return Estimate(m.value, m.stderr, m.low, m.high, m.n)


def read_study(folder: Path | None = None) -> list[Record]:
    """The study's records, those of the CPU and those of the GPU grid; [] where there are none."""
    return [r for name in (STUDY, f"{STUDY}/gpu") for r in read_records(name, folder)]


def settings(records: Iterable[Record], **wanted) -> list[Setting]:
    """The settings among records, in the order of METHODS; `wanted` keeps some ("method"="tfidf").

    Raises:
        BadInputError: two runs of one setting and seed.
    """
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        p = record.parameters
        if all(p.get(k) == v for k, v in wanted.items()):
            groups.setdefault(tuple(str(p.get(k)) for k in SETTING), []).append(record)
    for group in groups.values():
        seeds = [r.seed for r in group]
        if len(seeds) > len(set(seeds)):
            raise BadInputError(f"Two records of one setting have the seed {max(seeds)}.")
    made = [Setting(tuple(sorted(g, key=lambda r: r.seed))) for g in groups.values()]
    return sorted(made, key=lambda s: (METHODS.index(s.method), s.parameters["train_rows"]))


def standing(records: Iterable[Record], task: str, method: str) -> list[Setting]:
    """A method's settings that have answered a task, of those with one label the one that was asked
    most: a trial gives way to the whole."""
    found: dict[str, Setting] = {}
    for s in settings(records, method=method):
        if s.has(f"{task}_inside") and s.parameters["train_rows"] == 0:
            other = found.setdefault(label(s), s)
            found[label(s)] = max(other, s, key=lambda x: _items(x, task))
    return list(found.values())


def quality(records: Sequence[Record], task: str) -> list[dict]:
    """One line a setting that has answered a task: score inside and outside, seeds, questions;
    one that says NO_RECORD for a method that has not."""
    lines = []
    for method in METHODS:
        found = standing(records, task, method)
        for s in found:
            line = {"method": label(s)}
            for part in ASKED:
                e = s.estimate(f"{task}_{part}")
                line[part] = f"{e.value:.3f} [{max(0, e.low):.3f}, {min(1, e.high):.3f}]"
            asked = f"{_items(s, task):,}"
            lines.append(line | {"seeds": str(len(s.records)), "questions": asked})
        if not found and not (task == "extract" and method in ("fuzzy", "embedding")):
            lines.append({"method": method, "inside": NO_RECORD} | dict.fromkeys(
                ("outside", "seeds", "questions"), ""))  # fmt: skip
    return lines


def _items(setting: Setting, task: str) -> int:
    return setting.records[0].metrics[f"{task}_inside"].n


def missing(records: Sequence[Record]) -> list[str]:
    """Which task and method has no record, and the command that makes it."""
    made = []
    for task in TASKS:
        for line in quality(records, task):
            if line["inside"] == NO_RECORD:
                part = PART_OF.get(line["method"])
                there = part and task == "match_random"
                command = ON_CPU.format(part=part or "classical") if there or not part else ON_GPU
                made.append(f"{task}, {line['method']}: {command}")
    return made


def label(setting: Setting) -> str:
    """A method in words: a tuned model's with its steps, and its rate where it is not the study's;
    "all tasks": one adapter for all."""
    p = setting.parameters
    if setting.method == "tuned":
        steps = f"{p['steps']} steps" if p["steps"] else "an epoch"
        name = "LoRA" if p["quantization"] == "none" else "QLoRA"
        recipe = ", oswal" if p["recipe"] == "oswal" else ""
        if not recipe and p["learning_rate"] != DEFAULTS["learning_rate"]:
            recipe = f", rate {p['learning_rate']:g}"
        return f"{name}, {steps}{recipe}" + (", all tasks" if p["task"] == "all" else "")
    return setting.method


def costs(records: Sequence[Record], task: str) -> list[dict]:
    """What each method costs: making it, 1,000 answers, memory, energy (a CPU's; a GPU's was not
    measured); "" where not measured."""
    lines = []
    for s in settings(records):
        if not s.has("seconds_per_1000") or s.parameters["train_rows"]:
            continue
        if s.parameters["task"] not in (task, "all"):
            continue
        made = s.values("training_cpu_seconds") if s.has("training_cpu_seconds") else []
        held = s.values("method_bytes")[0] if s.has("method_bytes") else 0.0
        peak = max(r.peak_memory_bytes or 0 for r in s.records)
        seconds, busy = (min(s.values(f"{x}seconds_per_1000")) for x in ("", "cpu_"))
        energy = f"{min(s.values('watt_hours_per_1000')):.2g}"
        lines.append(
            {
                "method": label(s),
                "made in (CPU min)": f"{sum(made) / len(made) / 60:.2f}" if made else "0",
                "1,000 answers (CPU s)": f"{busy:.3g}",
                "passed (s)": f"{seconds:.3g}",
                "held (MB)": f"{held / 1e6:.1f}",
                "process peak (MB)": f"{peak / 1e6:,.0f}",
                "Wh for 1,000, assumed": "" if s.records[0].hardware.get("gpu") else energy,
                "on": s.hardware,
            }
        )
    return lines


def curve(records: Sequence[Record], task: str, method: str, **wanted) -> dict[str, list[tuple]]:
    """{part: [(rows learnt from, estimate), …]} of a method by number of training rows; 0 (all)
    stands under the number it was. `wanted` keeps settings with these values ("steps"=200)."""
    found: dict[str, list[tuple]] = {part: [] for part in ASKED}
    for s in settings(records, method=method, **wanted):
        if not s.has(f"{task}_inside"):
            continue
        counts = [_learnt(r.parameters, task) for r in s.records]
        for part in ASKED:
            e = s.estimate(f"{task}_{part}")
            found[part].append((round(sum(counts) / len(counts)), e))
    return {part: sorted(line, key=lambda x: x[0]) for part, line in found.items()}


def _learnt(parameters: Mapping, task: str) -> int:
    return int(parameters["rows"][task]["train"])


def paired(
    records: Sequence[Record],
    task: str,
    part: str,
    base: str,
    other: str,
    seed: int = 0,
    train_rows: int = 0,
    **wanted,
) -> Estimate | None:
    """F1 of one method less another's on the questions both have answered (the first so many of one
    seed's), both made from as many training rows (0: all); None where a record is missing. `wanted`
    keeps some of the other's runs ("steps"=300).

    Raises:
        BadInputError: the two were asked other questions, or several of the other's runs are
            wanted.
    """
    import numpy as np

    from lora_kit.evaluate.shop_metrics import binary_counts, difference_from_counts, f1_of

    said = {}
    for method in (base, other):
        for record in records:
            p = record.parameters
            if (p["method"], record.seed, p["train_rows"]) != (method, seed, train_rows):
                continue
            if method == other and any(p.get(k) != v for k, v in wanted.items()):
                continue
            for item in record.tables.get("items", []):
                if (item["task"], item["part"]) != (task, part):
                    continue
                if method == other and method in said:
                    raise BadInputError(f"Several runs of {other} have the seed {seed}: name one.")
                said[method] = item
    if len(said) < 2:
        return None
    n = min(len(item["truth"]) for item in said.values())
    truths = {item["truth"][:n] for item in said.values()}
    if len(truths) > 1:
        raise BadInputError(f"{base} and {other} were asked other questions of {task}.")
    names = np.array(["no", "yes"])
    bits = [truths.pop(), *(said[m]["said"][:n] for m in (base, other))]
    truth, first, second = (names[[int(b) for b in text]].tolist() for text in bits)
    return difference_from_counts(binary_counts(truth, first), binary_counts(truth, second), f1_of)


def gains(
    records: Sequence[Record], task: str, base: str, other: str, **wanted
) -> list[dict[str, str]]:
    """What a method gains over another by number of training rows, paired by division: a line for
    each number that both learnt from, with the mean over divisions and Student's interval, and in
    how many divisions the paired interval over questions lies above 0 and below. `wanted` as in
    `paired`."""
    lines = []
    counts = {s.parameters["train_rows"] for s in settings(records, method=other, **wanted)}
    for count in sorted(counts, key=lambda n: n or float("inf")):
        line = {"pairs": f"{count:,}" if count else "all"}
        for part in ASKED:
            tried = [
                paired(records, task, part, base, other, seed, count, **wanted)
                for seed in sorted({r.seed or 0 for r in records})
            ]
            found = [e for e in tried if e is not None]
            if len(found) < 2:
                break
            e = over_runs([e.value for e in found])
            line[part] = e.signed(3)
            above, below = sum(e.low > 0 for e in found), sum(e.high < 0 for e in found)
            line[f"{part}: above, below 0"] = f"{above}, {below} of {len(found)}"
        else:
            lines.append(line)
    return lines
