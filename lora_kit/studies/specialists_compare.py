"""The specialists study's answers: paired differences between settings, each with its interval.

Two kinds of interval, never mixed. A held-out loss is compared over seeds (blocks: every setting
met the same seeds). A test's score is compared item by item, each item's score the mean over the
seeds that both settings have: the interval says what other questions would have given, and the
differences of the single seeds stand beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lora_kit.errors import BadInputError
from lora_kit.evaluate.statistics import Estimate, over_runs, paired_difference
from lora_kit.studies.records import Record
from lora_kit.studies.specialists import ANCHOR, RANKS, SCALINGS, TASKS_AT_HAND
from lora_kit.studies.specialists_analysis import per_doubling, spread_rules
from lora_kit.studies.specialists_report import (
    PAPER_TABLES,
    Study,
    frame_of,
    item_scores,
    main_cells,
    over_items,
    over_seeds,
)

BASE = {"part": "base"}
MEASURE = {  # of each task: its test and the metric that is shown for it
    "gsm8k": ("gsm8k", "strict"),
    "code": ("humaneval", "pass@10"),
    "dialogue": ("dialogue", "rougeL"),
}


def adapter(
    task: str, rank: int, placement: str = "all", scaling: str = "fixed", rate: float = 1e-3
) -> dict:
    """The parameters that pick one setting's records; at the anchor rank the rules are one."""
    rule = {} if rank == ANCHOR else {"scaling": scaling}
    asked = {"part": "tune", "task": task, "rank": rank, "placement": placement}
    return {**asked, "learning_rate": rate, **rule}


def of_setting(study: Study, setting: Mapping) -> list[Record]:
    """The records of a setting: those with these parameters."""
    return [
        r for r in study.grid if all(r.parameters.get(k) == v for k, v in dict(setting).items())
    ]


@dataclass(frozen=True)
class Step:
    """A test's score at one setting minus that at another. seeds: the difference of each seed."""

    difference: Estimate
    seeds: tuple[float, ...]

    @property
    def up(self) -> bool:
        return self.difference.low > 0

    def __str__(self) -> str:
        return self.difference.signed()

    @property
    def of_seeds(self) -> str:
        return ", ".join(f"{x:+.4f}" for x in self.seeds)


def score_step(
    study: Study, test: str, metric: str, of: Mapping, against: Mapping, least: int = 2
) -> Step | None:
    """`of` minus `against` on one test; None where fewer than `least` seeds have both.

    Raises:
        BadInputError: the two answered different items.
    """
    found = []
    for setting in (of, against):
        scores = {r.seed: item_scores(r, test, metric) for r in of_setting(study, setting)}
        found.append({seed: s for seed, s in scores.items() if s is not None})
    seeds = sorted(set(found[0]) & set(found[1]))
    if len(seeds) < least:
        return None
    if len({len(scores[seed]) for scores in found for seed in seeds}) > 1:
        raise BadInputError(f"{of} and {against} answered different items of {test}.")
    means = [np.mean([scores[seed] for seed in seeds], axis=0) for scores in found]
    each = [float(np.mean(found[0][s]) - np.mean(found[1][s])) for s in seeds]
    return Step(paired_difference(means[1].tolist(), means[0].tolist()), tuple(each))


# ------------------------------------------------------------------ rank, under three rules


def rule_slopes(study: Study) -> list[dict]:
    """Held-out loss for each doubling of the rank: every task under every rule, all layers, one
    learning rate. Ranks without every seed are left out, and rules of which one rank is left."""
    cells = main_cells(frame_of(study.grid))
    if cells.empty:
        return []
    rows = []
    for task in TASKS_AT_HAND:
        some = cells[(cells["task"] == task) & (cells["placement"] == "all")]
        some = spread_rules(some[some["rank"].isin(RANKS)], ANCHOR)
        for rule in SCALINGS:
            runs = with_all_seeds(some[some["scaling"] == rule], ["rank"])
            if runs["rank"].nunique() < 2:
                continue
            ranks = sorted(int(r) for r in runs["rank"].unique())
            slope = per_doubling(runs, "loss")
            at = {r: over_seeds(runs[runs["rank"] == r]["loss"].tolist()) for r in ranks}
            rows.append(
                {
                    "task": task,
                    "rule": rule,
                    "ranks": f"{ranks[0]} to {ranks[-1]}",
                    "loss, lowest": at[ranks[0]],
                    "loss, highest": at[ranks[-1]],
                    "a doubling": slope.signed(),
                }
            )
    return rows


def with_all_seeds(frame: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """The runs of settings that have as many seeds as any; two at least."""
    seeds = frame.groupby(by, observed=True)["seed"].transform("nunique")
    return frame[seeds == max(2, seeds.max())] if len(frame) else frame


def by_step(study: Study, task: str, placement: str = "all") -> pd.DataFrame:
    """The runs of one task whose setting has every seed, at every rate, with `alpha` = s·r and
    `step` = rate · s · r, by which Adam's first step goes (section 2 of the notebook)."""
    frame = frame_of(study.grid)
    if frame.empty:
        return frame.assign(alpha=[], step=[])
    some = frame[(frame["part"] == "tune") & (frame["task"] == task)]
    some = some[(some["placement"] == placement) & some["rank"].isin(RANKS)]
    some = with_all_seeds(some, ["scaling", "rank", "rate"])
    alpha = some["scale"] * some["rank"]
    return some.assign(alpha=alpha, step=some["rate"] * alpha)


# ------------------------------------------------------------------ the paper's steps beside ours

ALL_32_128 = (("all", 128), ("all", 32))
PAPER_STEPS = (
    ("mathematics", "gsm8k", "Math-R128", "Math-R32", *ALL_32_128),
    ("summaries", "dialogue", "LoRA-ALL-R128", "LoRA-ALL-R32", *ALL_32_128),
    ("HellaSwag", "dialogue", "LoRA-All-R128", "LoRA-All-R32", *ALL_32_128),
    ("summaries", "dialogue", "LoRA-ALL-R128", "LoRA-Attn-R128", ("all", 128), ("attention", 128)),
    ("summaries", "dialogue", "LoRA-ALL-R128", "LoRA-MLP-R128", ("all", 128), ("mlp", 128)),
    ("HellaSwag", "dialogue", "LoRA-All-R128", "LoRA-Attn-R128", ("all", 128), ("attention", 128)),
    ("HellaSwag", "dialogue", "LoRA-All-R128", "LoRA-MLP-R128", ("all", 128), ("mlp", 128)),
)


def paper_steps(study: Study) -> list[tuple[dict, Step]]:
    """What the paper's tables say of rank and placement, and the same step here: a table's line
    and the step, for every step that both have."""
    from lora_kit.studies.papers import read_table, wide

    rows = []
    for table, task, high, low, of, against in PAPER_STEPS:
        number, columns, _ = PAPER_TABLES[table]
        printed = wide(read_table("saha2024", f"table_{number:02}"), what="value")
        for column, metric in columns.items():
            test, _, kind = metric.partition(" ")
            one, two = (adapter(task, rank, place) for place, rank in (of, against))
            step = score_step(study, test, kind, one, two)
            if step is None:
                continue
            theirs = float(printed.loc[f"Llama-1B-{high}", column]) - float(
                printed.loc[f"Llama-1B-{low}", column]
            )
            line = {
                "step": f"{against[0]} r{against[1]} to {of[0]} r{of[1]}",
                "score": f"{table}, {column}",
                "paper": f"{theirs:+.4f}",
                "ours [95 % over items]": str(step),
                "each seed": step.of_seeds,
            }
            rows.append((line, step))
    return rows


# ------------------------------------------------------------------ floor, retention


def gains_over_base(study: Study) -> list[dict]:
    """Every task's rank-16 specialist against the untuned base, on its own tests and HellaSwag."""
    own = {
        "gsm8k": (("gsm8k", "strict"), ("gsm8k", "flexible"), ("words", "flexible")),
        "code": (("humaneval", "pass@1"), ("humaneval", "pass@10")),
        "dialogue": (("dialogue", "rougeL"),),
    }
    frame, rows = frame_of(study.grid), []
    for task in TASKS_AT_HAND:
        for test, metric in (*own[task], ("hellaswag", "acc_norm")):
            step = score_step(study, test, metric, adapter(task, ANCHOR), BASE)
            if step is None:
                continue
            one = frame[(frame["part"] == "tune") & (frame["task"] == task)]
            one = one[(one["rank"] == ANCHOR) & (one["placement"] == "all")]
            base = frame[frame["part"] == "base"]
            rows.append(
                {
                    "adapter": task,
                    "test": f"{test} {metric}",
                    "base": over_items(base, f"{test} {metric}"),
                    "specialist": over_items(one, f"{test} {metric}"),
                    "difference, paired": str(step),
                    "each seed": step.of_seeds,
                }
            )
    return rows


WHOLE_RATE = 5e-5  # of full fine-tuning; an adapter's is twenty times as high


def whole_models(study: Study) -> list[dict]:
    """Every weight trained, against the rank-16 adapter of the same rows and steps: held-out loss
    (paired by seed), own test and HellaSwag (paired by item), and the peaks of memory."""
    frame, rows = frame_of(study.grid), []
    for task in TASKS_AT_HAND:
        whole = {"part": "full", "task": task, "learning_rate": WHOLE_RATE}
        if not of_setting(study, whole):
            continue
        one = frame[(frame["task"] == task) & (frame["rank"] == ANCHOR)]
        one = one[(one["placement"] == "all") & np.isclose(one["rate"].astype(float), 1e-3)]
        one = pd.concat([one[one["part"] == "tune"], frame[frame["part"] == "full"]])
        one = one[one["task"] == task].drop_duplicates(["part", "seed"])
        told = {
            "task": task,
            "loss, whole": over_seeds(one[one["part"] == "full"]["loss"].tolist()),
        }
        told["minus the adapter's"] = loss_step(one, "part", "full", "tune")
        test, metric = MEASURE[task]
        for name, kind in ((test, metric), ("hellaswag", "acc_norm")):
            step = score_step(study, name, kind, whole, adapter(task, ANCHOR))
            told["own test" if name == test else "HellaSwag"] = "not run" if step is None else step
        peaks = one.groupby("part")["peak_memory"].median() / 1e9
        told["GB at the peak"] = f"{peaks['full']:.1f} and {peaks['tune']:.1f}"
        rows.append({k: str(v) for k, v in told.items()})
    return rows


def loss_step(frame: pd.DataFrame, column: str, of, against) -> str:
    """The difference of two settings' held-out losses, levels of `column`, as text: Student's 95 %
    interval over the seeds that both have, paired. `-` where fewer than two have."""
    wide = frame.pivot_table(index="seed", columns=column, values="loss")
    if not {of, against} <= set(wide.columns):
        return "-"
    apart = (wide[of] - wide[against]).dropna().tolist()
    return over_runs(apart).signed() if len(apart) > 1 else "-"


# ------------------------------------------------------------------ bytes, seconds, routes


def serving_rows(study: Study) -> list[dict]:
    """The ways to hold three specialists: megabytes, and seconds of the same prompts, each run."""
    records = of_setting(study, {"part": "serve"})
    if not records:
        return []

    def seconds(name: str) -> str:
        values = sorted(r.metrics[f"seconds {name}"] for r in records)
        return f"{np.median(values):.2f} ({values[0]:.2f} to {values[-1]:.2f})"

    told = records[0].metrics
    base, three = told["bytes base"] / 1e6, told["bytes three adapters"] / 1e6
    models = told["bytes three models"] / 1e6
    ways = (
        ("three models", models, "three models"),
        ("base + three adapters", base + three, "three adapters"),
        ("base + three adapters, routed", base + three, "routed"),
        (
            "base + one adapter for all",
            base + told["bytes one adapter"] / 1e6,
            "one adapter for all",
        ),
    )
    return [
        {"way": way, "MB held": f"{size:.0f}", "seconds, 24 prompts": seconds(key)}
        for way, size, key in ways
    ]


def route_rows(study: Study) -> list[dict]:
    """Of each test, the share of prompts that the router sent to the test's own specialist, to
    another, and to the base: mean over seeds, lowest and highest."""
    from lora_kit.studies.specialists_serving import NOBODY, OWNER

    shares: dict[str, list[tuple[float, float, float]]] = {}
    for record in of_setting(study, {"part": "route"}):
        for row in record.tables["routes"]:
            letters, own = row["routes"], OWNER[row["test"]][0]
            right, none = letters.count(own) / len(letters), letters.count(NOBODY) / len(letters)
            other = abs(round(1 - right - none, 6))
            shares.setdefault(row["test"], []).append((right, other, none))
    rows = []
    for test, found in shares.items():
        told = {"test": test}
        for name, values in zip(
            ("its own", "another's", "the base"), zip(*found, strict=True), strict=True
        ):
            told[name] = f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
        rows.append(told)
    return rows
