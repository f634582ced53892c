"""Checks of Zhao et al. 2024, section 5.5: correlations and regressions over 31 tasks.

The paper does not name its coefficient. Ranks (Spearman's ρ) give the numbers its text prints, as
far as rounding tells, and Pearson's r does not: ranks are used here, and r is shown beside them
where it says something else. `studies.land_models` has the full tables with intervals. Least
squares are left out one task at a time by the hat matrix, without fitting 31 times.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from lora_kit.studies import lora_land
from lora_kit.studies.checks.outcome import (
    CONTRADICTED,
    HOLDS,
    OVERSTATED,
    ROUNDING,
    Outcome,
    all_of,
    cell,
    check,
    column,
    equals,
    holds_if,
    some_of,
    text,
)
from lora_kit.studies.land_models import design, fitted_rmse, zscore

PAPER = "zhao2024"
BASE_SCORES = ("Best Base Model Score", "Average Base Model Score")
TUNED_SCORES = ("Best Fine-tuned Score", "Average Fine-Tuned Score")
WITHOUT, WITH = (
    f"With average base model score as a feature (RMSE), {which} column"
    for which in ("first", "second")
)


@cache
def measures():
    return lora_land.quality_measures()


@cache
def heuristics():
    return lora_land.printed_heuristics()


def rho(heuristic: str, measure: str) -> float:
    """Spearman's rank correlation over 31 tasks."""
    return float(heuristics()[heuristic].rank().corr(measures()[measure].rank()))


def pearson(heuristic: str, measure: str) -> float:
    return float(heuristics()[heuristic].corr(measures()[measure]))


def rho_range(heuristic: str, measure: str, draws: int = 200) -> tuple[float, float]:
    """Lowest and highest ρ when every input is moved within its own rounding, ±0.0005."""
    draw = np.random.default_rng(0)
    moved = draw.uniform(-0.0005, 0.0005, size=(draws, 2, 31))
    pair = np.stack([heuristics()[heuristic].to_numpy(), measures()[measure].to_numpy()])
    ranks = np.argsort(np.argsort(pair + moved, axis=-1), axis=-1) - 15.0
    found = (ranks[:, 0] * ranks[:, 1]).sum(-1) / (ranks[:, 0] ** 2).sum(-1)
    return float(found.min()), float(found.max())


def p_of(correlation: float, n: int = 31) -> float:
    """Two-sided p of a correlation against 0: Student's t with n − 2 degrees."""
    from scipy.special import stdtr

    t = abs(correlation) * math.sqrt((n - 2) / (1 - correlation**2))
    return float(2 * stdtr(n - 2, -t))


# ------------------------------------------------------------------ table 5


@check
def table_5_is_table_13_rounded() -> Outcome:
    names = {"Compressibility µ": "Compr. µ", "Compressibility σ": "Compr. σ"}
    cases = {}
    for task in ("arc_combined", "bc5cdr", "boolq"):
        for row, value in column(PAPER, "table_05", task).items():
            full = cell(PAPER, "table_13", task, names.get(row, row)).value
            half = cell(PAPER, "table_05", row, task).half
            cases[f"{task} {row} ({value}, is {full})"] = abs(value - full) <= half + 1e-9
    return all_of(cases, "cells")


# ------------------------------------------------------------------ correlations (figure 8)


def _both(heuristic: str, printed: str) -> dict[str, bool]:
    number = text(PAPER, "5.5.2", printed)
    cases = {}
    for measure in BASE_SCORES:
        low, high = rho_range(heuristic, measure)
        near = low - number.half <= number.value <= high + number.half
        cases[f"{measure} ({low:.3f} to {high:.3f})"] = near
    return cases


@check
def compressibility_and_base_scores() -> Outcome:
    cases = _both("compressibility_mean", "correlation of compressibility with base scores")
    outcome = all_of(cases, "scores")
    verdict = ROUNDING if outcome.verdict == HOLDS else outcome.verdict
    pair = ", ".join(f"{pearson('compressibility_mean', m):.2f}" for m in BASE_SCORES)
    found = f"ranks: {', '.join(cases)}; Pearson's r {pair}"
    return Outcome(verdict, found, "rounding of the inputs")


@check
def spread_of_compressibility_and_base_scores() -> Outcome:
    what = "correlation of the spread of compressibility with base scores"
    outcome = some_of(_both("compressibility_std", what), "scores")
    return Outcome(outcome.verdict, outcome.found, "rounding of the inputs")


@check
def correlations_are_significant() -> Outcome:
    pairs = sorted((p_of(rho(h, m)), m) for h in heuristics() for m in measures())
    kept = []
    for i, (p, measure) in enumerate(pairs):
        if p * (len(pairs) - i) >= 0.05:
            break
        kept.append(measure)
    alone = sum(p < 0.05 for p, _ in pairs)
    tuned = [m for m in kept if "Base Model Score" not in m and m != "GPT-4 Score"]
    found = f"{alone} of {len(pairs)} ranks below p = 0.05, {len(kept)} after Holm's correction; "
    found += f"of those {len(tuned)} with a tuned score or a lift, the rest with base scores"
    return Outcome(HOLDS if tuned else OVERSTATED if kept else CONTRADICTED, found, "p < 0.05")


@check
def long_outputs_gain_over_gpt4() -> Outcome:
    cases = {}
    for h in ("output_mean", "output_p95", "output_std"):
        value = rho(h, "Max GPT-4 Lift")
        linear = pearson(h, "Max GPT-4 Lift")
        ranks, line = f"rho {value:+.2f}, p = {p_of(value):.2f}", f"r {linear:+.2f}"
        cases[f"{h} ({ranks}; {line}, p = {p_of(linear):.2f})"] = value > 0 and p_of(value) < 0.05
    positive = all(
        rho(h, "Max GPT-4 Lift") > 0 for h in ("output_mean", "output_p95", "output_std")
    )
    outcome = all_of(cases, "positive at p < 0.05")
    if outcome.verdict == CONTRADICTED and positive:
        return Outcome(OVERSTATED, outcome.found, "p < 0.05, uncorrected")
    return outcome


def _negative(heuristics: tuple[str, ...]) -> Outcome:
    """Rank correlations with base and tuned scores, negative beyond chance."""
    found = {}
    for h in heuristics:
        for m in (*BASE_SCORES, *TUNED_SCORES):
            r = rho(h, m)
            found[f"{h}, {m} (rho {r:+.2f}, p = {p_of(r):.2f})"] = r < 0 and p_of(r) < 0.05
    outcome = some_of(found, "rank correlations negative at p < 0.05")
    return Outcome(outcome.verdict, outcome.found, "p < 0.05, uncorrected")


@check
def long_texts_have_low_scores() -> Outcome:
    return _negative(("input_mean", "input_std", "output_mean", "output_std"))


@check
def varied_similarity_has_low_scores() -> Outcome:
    return _negative(("similarity_std",))


@check
def examples_do_not_correlate() -> Outcome:
    found = {m: rho("examples", m) for m in measures()}
    return all_of(
        {f"{m} (rho {v:+.2f}, p = {p_of(v):.3f})": p_of(v) >= 0.05 for m, v in found.items()},
        "measures at p >= 0.05, by ranks",
    )


@check
def averages_predict_the_best() -> Outcome:
    pairs = (BASE_SCORES[::-1], TUNED_SCORES[::-1])
    found = {a.split(" ")[1]: float(measures()[a].corr(measures()[b])) for a, b in pairs}
    words = ", ".join(f"{name} r = {v:.2f}" for name, v in found.items())
    return holds_if(min(found.values()) > 0.7, words, "r > 0.7")


@check
def easier_tasks_gain_more() -> Outcome:
    lift, easy = measures()["Average Base Model Lift"], measures()["Average Base Model Score"]
    value = float(lift.rank().corr(easy.rank()))
    found = f"rho = {value:+.2f} between base score and lift, p = {p_of(value):.2f}"
    if p_of(value) >= 0.05:
        return Outcome(OVERSTATED, found, "p < 0.05")
    return holds_if(value > 0, found, "p < 0.05")


# ------------------------------------------------------------------ regressions (table 6)


def left_out(measure: str, with_base: bool) -> float:
    """Root mean squared error of tasks left out of the regression, over that of the mean."""
    y = measures()[measure].to_numpy()
    x = np.column_stack([np.ones(len(y)), zscore(design(with_base))])
    hat = x @ np.linalg.pinv(x)
    errors = (y - hat @ y) / (1 - np.diag(hat))
    mean = (y - y.mean()) / (1 - 1 / len(y))
    return float(np.sqrt(np.mean(errors**2) / np.mean(mean**2)))


@check
def highest_rmse() -> Outcome:
    return equals(
        text(PAPER, "5.5.3", "RMSE, highest"), max(column(PAPER, "table_06", WITHOUT).values())
    )


@check
def lowest_rmse() -> Outcome:
    return equals(
        text(PAPER, "5.5.3", "RMSE, lowest"), min(column(PAPER, "table_06", WITHOUT).values())
    )


def _gains() -> list[float]:
    one, two = column(PAPER, "table_06", WITHOUT), column(PAPER, "table_06", WITH)
    return sorted(one[m] - two[m] for m in one if m != "Average Base Model Score")


@check
def smallest_gain_of_base_score() -> Outcome:
    return equals(text(PAPER, "5.5.3", "gain of the base score as a feature, lowest"), _gains()[0])


@check
def largest_gain_of_base_score() -> Outcome:
    return equals(
        text(PAPER, "5.5.3", "gain of the base score as a feature, highest"), _gains()[-1]
    )


def rmse_range(measure: str, with_base: bool, draws: int = 100) -> tuple[float, float]:
    """Lowest and highest error of the fit when inputs are moved within their own rounding: scores,
    ratios and the σ of lengths by 0.0005, mean lengths by 0.005."""
    draw = np.random.default_rng(0)
    x, y = design(with_base), measures()[measure].to_numpy()
    half = np.array([0.005 if c.endswith("put_mean") else 0.0005 for c in x.columns])
    found = []
    for _ in range(draws):
        moved = x.to_numpy() + half * draw.uniform(-1, 1, size=x.shape)
        moved = np.column_stack([np.ones(len(y)), (moved - moved.mean(0)) / moved.std(0)])
        target = y + 0.0005 * draw.uniform(-1, 1, size=len(y))
        residual = target - moved @ np.linalg.lstsq(moved, target, rcond=None)[0]
        found.append(float(np.sqrt(np.mean(residual**2))))
    return min(found), max(found)


def _table_6(name: str, with_base: bool) -> Outcome:
    cases, near = {}, True
    for measure, printed in column(PAPER, "table_06", name).items():
        if with_base and measure == "Average Base Model Score":
            continue  # predicted from itself
        made = fitted_rmse(measures()[measure], design(with_base))
        low, high = rmse_range(measure, with_base)
        near &= abs(made - printed) <= 0.0005
        inside = low - 0.0005 <= printed <= high + 0.0005
        cases[f"{measure} ({printed}, is {low:.4f} to {high:.4f})"] = inside
    outcome = all_of(cases, "errors")
    verdict = ROUNDING if outcome.verdict == HOLDS and not near else outcome.verdict
    return Outcome(verdict, outcome.found, "rounding of the inputs")


@check
def table_6_without_base_follows() -> Outcome:
    return _table_6(WITHOUT, False)


@check
def table_6_with_base_follows() -> Outcome:
    return _table_6(WITH, True)


@check
def errors_are_low() -> Outcome:
    ratios = {m: left_out(m, False) for m in measures()}
    worse = sum(v > 1 for v in ratios.values())
    words = f"{min(ratios.values()):.1f} to {max(ratios.values()):.1f} times the mean's error"
    found = f"on tasks left out {words}; worse than the mean for {worse} of {len(ratios)}"
    return Outcome(OVERSTATED if worse > len(ratios) / 2 else HOLDS, found)


@check
def base_score_improves_prediction() -> Outcome:
    cases = {}
    for m in measures():
        if m != "Average Base Model Score":
            one, two = left_out(m, False), left_out(m, True)
            cases[f"{m} ({one:.2f} to {two:.2f})"] = two < one
    return some_of(cases, "measures whose tasks left out are predicted better")
