"""Which part of "a higher rank is better" remains: rates tuned alike, and scores beside losses.

The budget of tuning is `specialists.RATES`, three rates for every rule and rank, on all layers. The
best rate is the one of the lowest mean loss on the rows it is reported on, for all settings alike.
Where it is the highest of the three, the optimum may lie beyond: such settings are marked.
"""

from __future__ import annotations

import pandas as pd

from lora_kit.evaluate.statistics import Estimate
from lora_kit.studies.specialists import ANCHOR, RANKS, RATES, SCALINGS, TASKS_AT_HAND
from lora_kit.studies.specialists_analysis import (
    contrasts,
    per_doubling,
    rank_map,
    spread_rules,
    tuned,
    two_way,
    whole_design,
)
from lora_kit.studies.specialists_compare import (
    MEASURE,
    adapter,
    by_step,
    loss_step,
    score_step,
    with_all_seeds,
)
from lora_kit.studies.specialists_report import Study, frame_of, main_cells

FREE = "the best of all"
LOW, HIGH = RANKS[0], RANKS[-1]


def under_rule(study: Study, task: str, rule: str) -> pd.DataFrame:
    """A task's runs on all layers under one rule, rank 16 among them, at rates that all ranks
    have. `FREE`: under every rule, the rule told in `rate`, so that both are tuned together."""
    runs = spread_rules(by_step(study, task), ANCHOR)
    if runs.empty:
        return runs
    if rule == FREE:
        return runs.assign(rate=runs["scaling"] + runs["rate"].map(" {:g}".format))
    return runs[runs["scaling"] == rule]


def tuned_slopes(study: Study) -> list[dict]:
    """Held-out loss for each doubling of the rank from 8 to 128, of every task and rule, each rank
    at its best of `RATES` (`specialists_compare.rule_slopes` has them at one rate); and with rule
    and rate both free."""
    rows = []
    for task in TASKS_AT_HAND:
        for rule in (*SCALINGS, FREE):
            runs = under_rule(study, task, rule)
            if runs.empty or runs["rate"].nunique() < 2 or set(runs["rank"]) != set(RANKS):
                continue
            best = tuned(runs, by=("rank",))
            told = {"task": task, "rule": rule, "a doubling": per_doubling(best, "loss").signed()}
            told["rank 128 - rank 8"] = ends(best).signed()
            told |= {f"best, {r}": best_of(best, r) for r in (LOW, HIGH)}
            rows.append(told)
    return rows


def ends(runs: pd.DataFrame) -> Estimate:
    """Loss of the highest rank minus that of the lowest, one error variance for all ranks."""
    named = runs.assign(cell=runs["rank"].astype(str))
    (found,) = contrasts(named, "loss", "cell", [(str(HIGH), str(LOW))])
    return found.difference


def best_of(best: pd.DataFrame, rank: int) -> str:
    """The rule and rate at which a rank was best; ↑ where that is the highest rate of all."""
    one = best[best["rank"] == rank].iloc[0]
    rate = str(one["rate"]).rpartition(" ")[2]
    edge = " ↑" if float(rate) == max(RATES) else ""
    return f"{one['scaling']} {float(rate):g}{edge}" if " " in str(one["rate"]) else f"{rate}{edge}"


def equal_steps(study: Study) -> list[dict]:
    """Rank 128 minus rank 8 in held-out loss at α = 16, where Adam's step is the same at every
    rank: one column a rate."""
    rows = []
    for task in TASKS_AT_HAND:
        runs = under_rule(study, task, "fixed")
        if not runs.empty:
            at = {rate: runs[runs["rate"] == rate] for rate in RATES}
            rows.append(
                {"task": task}
                | {f"at {r:g}": ends(some).signed() for r, some in at.items() if len(some)}
            )
    return rows


# ------------------------------------------------------------------ losses and scores, side by side

LOWER = {"gsm8k": LOW, "code": ANCHOR, "dialogue": LOW}  # HumanEval was asked at 16 and 128 alone


def loss_and_scores(study: Study) -> list[dict]:
    """From a low rank to 128 under each rule, rate 0.001, on all layers and on attention alone:
    what the held-out loss does (paired by seed) and what the task's score does (paired by item).
    Where a task's test was not asked of a placement, it has no line."""
    cells, rows = main_cells(frame_of(study.grid)), []
    if cells.empty:
        return rows
    for task, low in LOWER.items():
        test, metric = MEASURE[task]
        for place in ("all", "attention"):
            for rule in SCALINGS:
                some = spread_rules(cells[cells["task"] == task], ANCHOR)
                some = some[(some["scaling"] == rule) & (some["placement"] == place)]
                told = {"task": task, "placement": place, "rule": rule, "ranks": f"{low} to {HIGH}"}
                told["loss"] = loss_step(some, "rank", HIGH, low)
                pair = [adapter(task, r, place, rule) for r in (HIGH, low)]
                step = score_step(study, test, metric, *pair)
                if step is not None:
                    rows.append(told | {"score": f"{test} {metric}", "change": str(step)})
    return rows


# ------------------------------------------------------------------ rank and placement, three rules


def rule_cells(study: Study, task: str, rule: str) -> pd.DataFrame:
    """The runs of rank × placement under one rule at rate 0.001, those with every seed."""
    cells = main_cells(frame_of(study.grid))
    if cells.empty:
        return cells
    some = spread_rules(cells[(cells["task"] == task) & cells["rank"].isin(RANKS)], ANCHOR)
    return with_all_seeds(some[some["scaling"] == rule], ["placement", "rank"])


def two_ways(study: Study) -> list[dict]:
    """The two-way analysis of every task under every rule: of rank and of placement how far apart
    their means lie in nats, and partial η² with its 95 % interval."""
    rows = []
    for task in TASKS_AT_HAND:
        for rule in SCALINGS:
            some = whole_design(rule_cells(study, task, rule))
            if some.empty:
                continue
            told = {"task": task, "rule": rule, "ranks": some["rank"].nunique()}
            for effect in two_way(some, "loss")[0]:
                if effect.name in some:
                    means = some.groupby(effect.name)["loss"].mean()
                    told[f"{effect.name}, nats apart"] = f"{means.max() - means.min():.4f}"
                told[f"{effect.name}, η² [95 %]"] = (
                    f"{effect.share:.2f} [{effect.low:.2f}, {effect.high:.2f}]"
                )
            rows.append(told)
    return rows


def map_of(study: Study, task: str, rule: str):
    """`rank_map` of `rule_cells`: mean losses, and the cells that differ from rank 16."""
    return rank_map(rule_cells(study, task, rule))
