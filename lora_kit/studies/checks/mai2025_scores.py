"""Checks of Mai 2025, table 2: GSM8K, HellaSwag and MMLU's computer science before and after.

The ± of table 2 are one standard error, √(p(1 − p)/(n − 1)), with n = 1,319 for GSM8K, about 10,042
for HellaSwag and 100 for MMLU CS: every one of them comes out (`plus_minus_is_one_error`).
"""

from __future__ import annotations

import math

from lora_kit.studies.checks.outcome import (
    CONTRADICTED,
    HOLDS,
    NOT_CHECKABLE,
    OVERSTATED,
    Cell,
    Outcome,
    all_of,
    apart,
    binomial_error,
    cell,
    check,
    equals,
    holds_if,
    level,
    text,
)

PAPER = "mai2025"
BASE, TUNED, TINY = "Base Llama 3.2 1B", "Fine-tuned Llama 3.2 1B (2k)", "TinyLlama 1.1B (50k)"
MODELS = (BASE, TUNED, TINY)
ITEMS = {
    "GSM8K / Flexible Accuracy": 1319,
    "GSM8K / Strict Accuracy": 1319,
    "HellaSwag / Accuracy": 10_042,
    "HellaSwag / Normalized Accuracy": 10_042,
    "MMLU CS / Accuracy": 100,
}
FLEXIBLE, NORMALISED, SCIENCE = (list(ITEMS)[i] for i in (0, 3, 4))


def score(row: str, model: str) -> Cell:
    return cell(PAPER, "table_02", row, model)


def change(row: str, one: str = BASE, two: str = TUNED) -> tuple[float, float]:
    """two − one in points, and the standard error from the printed ±."""
    a, b = score(row, one), score(row, two)
    return b.value - a.value, math.hypot(a.plus_minus, b.plus_minus)


def spread(f, *cells: Cell) -> tuple[float, float]:
    """The lowest and highest of f when each input lies within its own rounding."""
    corners = [[]]
    for c in cells:
        corners = [[*before, v] for before in corners for v in (c.value - c.half, c.value + c.half)]
    values = [f(*corner) for corner in corners]
    return min(values), max(values)


# ------------------------------------------------------------------ table 2: errors


@check
def plus_minus_is_one_error() -> Outcome:
    cases = {}
    for row, n in ITEMS.items():
        for model in MODELS:
            c = score(row, model)
            low, high = spread(lambda p, n=n: 100 * binomial_error(p / 100, n), c)
            fits = low - 0.005 <= c.plus_minus <= high + 0.005
            cases[f"{row}, {model}"] = fits
    outcome = all_of(cases, "printed ± are one binomial standard error")
    return Outcome(outcome.verdict, outcome.found, "rounding of the ± and of its score")


@check
def intervals_are_95_percent() -> Outcome:
    cases = {}
    for row, n in ITEMS.items():
        for model in MODELS:
            c = score(row, model)
            half = 196 * binomial_error(c.value / 100, n)
            cases[row, model] = abs(half - c.plus_minus) <= 0.005
    found = f"{sum(cases.values())} of {len(cases)} ± are 1.96 standard errors; all are one"
    return Outcome(HOLDS if all(cases.values()) else CONTRADICTED, found)


@check
def mmlu_cs_is_one_subject() -> Outcome:
    lows, highs = [], []
    for model in MODELS:
        c = score(SCIENCE, model)
        p = c.value / 100
        lows.append(p * (1 - p) / (c.plus_minus / 100 + 5e-5) ** 2 + 1)
        highs.append(p * (1 - p) / (c.plus_minus / 100 - 5e-5) ** 2 + 1)
    low, high = max(lows), min(highs)
    return holds_if(
        low <= 100 <= high, f"the ± give n between {low:.1f} and {high:.1f}", "rounding"
    )


@check
def hellaswag_errors_fit_10000() -> Outcome:
    rows = [(score(r, m), n) for r, n in ITEMS.items() if n > 9000 for m in MODELS]
    cases = {
        c.printed: abs(100 * binomial_error(c.value / 100, 10_000) - c.plus_minus) <= 0.005
        for c, _ in rows
    }
    return all_of(cases, "± fit n = 10,000")


@check
def strict_never_exceeds_flexible() -> Outcome:
    cases = {
        m: score("GSM8K / Strict Accuracy", m).value <= score(FLEXIBLE, m).value for m in MODELS
    }
    return all_of(cases, "models")


# ------------------------------------------------------------------ table 2: changes


def _forgetting(base: float, tuned: float) -> float:
    return 100 * (1 - tuned / base)


@check
def forgetting_rate() -> Outcome:
    base, tuned = score(FLEXIBLE, BASE), score(FLEXIBLE, TUNED)
    low, high = spread(_forgetting, base, tuned)
    value = _forgetting(base.value, tuned.value)
    outcome = equals(score("GSM8K / Forgetting Rate (FR)", TUNED), value, low, high, "%")
    counts = _forgetting(round(base.value * 13.19), round(tuned.value * 13.19))
    return Outcome(
        outcome.verdict, f"{outcome.found}; from the counts {counts:.3f}%", outcome.tolerance
    )


@check
def forgetting_is_89_percent() -> Outcome:
    value = _forgetting(score(FLEXIBLE, BASE).value, score(FLEXIBLE, TUNED).value)
    return equals(text(PAPER, "3", "relative decrease"), value, unit="%")


@check
def forgetting_exceeds_half() -> Outcome:
    value = _forgetting(score(FLEXIBLE, BASE).value, score(FLEXIBLE, TUNED).value)
    line = text(PAPER, "3", "threshold of catastrophic forgetting").value
    return holds_if(value > line, f"{value:.1f} % against {line:g} %")


@check
def forgetting_is_significant() -> Outcome:
    difference, error = change(FLEXIBLE)
    return apart(-difference, error, " points")


@check
def erases_completely() -> Outcome:
    c = score(FLEXIBLE, TUNED)
    z = c.value / c.plus_minus
    verdict = OVERSTATED if z > 1.96 else HOLDS
    return Outcome(verdict, f"{c.printed} is left: {z:.1f} errors from nothing")


@check
def augmentation_value() -> Outcome:
    base, tuned = score(NORMALISED, BASE), score(NORMALISED, TUNED)
    printed = score("HellaSwag / Ability Augmentation (ΔA)", TUNED)
    low, high = spread(lambda a, b: b - a, base, tuned)
    return equals(printed, tuned.value - base.value, low, high, "%")


@check
def augmentation_is_a_gain() -> Outcome:
    return apart(*change(NORMALISED), " points")


@check
def commonsense_is_preserved() -> Outcome:
    return level(*change(NORMALISED), " points")


@check
def bold_is_the_best() -> Outcome:
    best = max(MODELS, key=lambda m: score(NORMALISED, m).value)
    return holds_if(best == TUNED, f"highest: {best}, {score(NORMALISED, best).printed}")


@check
def knowledge_loss_value() -> Outcome:
    base, tuned = score(SCIENCE, BASE), score(SCIENCE, TUNED)
    printed = score("MMLU CS / Knowledge Loss (ΔK)", TUNED)
    return equals(printed, base.value - tuned.value, unit="%")


@check
def knowledge_loss_error() -> Outcome:
    base, tuned = score(SCIENCE, BASE), score(SCIENCE, TUNED)
    low, high = (
        math.hypot(base.plus_minus - 0.005, tuned.plus_minus - 0.005),
        math.hypot(base.plus_minus + 0.005, tuned.plus_minus + 0.005),
    )
    value = math.hypot(base.plus_minus, tuned.plus_minus)
    error = score("MMLU CS / Knowledge Loss (ΔK)", TUNED).plus_minus
    outcome = equals(f"{error:.2f}", value, low, high)
    exact = 100 * math.hypot(*(binomial_error(c.value / 100, 100) for c in (base, tuned)))
    return Outcome(
        outcome.verdict, f"{outcome.found}; from 47 and 34 of 100 {exact:.3f}", outcome.tolerance
    )


@check
def knowledge_loss_is_significant() -> Outcome:
    difference, error = change(SCIENCE)
    return apart(-difference, error, " points")


@check
def relative_knowledge_loss() -> Outcome:
    base, tuned = (score(SCIENCE, m).value for m in (BASE, TUNED))
    return equals(
        text(PAPER, "3", "relative loss of knowledge"), _forgetting(base, tuned), unit="%"
    )


@check
def gap_to_tinyllama() -> Outcome:
    difference, _ = change(SCIENCE, TINY, TUNED)
    return equals(text(PAPER, "3", "gap on MMLU CS"), difference, unit=" points")


@check
def tuned_llama_beats_tinyllama() -> Outcome:
    return apart(*change(SCIENCE, TINY, TUNED), " points")


@check
def base_is_pretrained_only() -> Outcome:
    """Its scores beside those Saha et al. print for the instruction-tuned model."""
    theirs = {
        "HellaSwag / Accuracy": ("table_03", "Accuracy"),
        "HellaSwag / Normalized Accuracy": ("table_03", "Acc - Norm"),
        "GSM8K / Flexible Accuracy": ("table_04", "Flexible Extract"),
        "GSM8K / Strict Accuracy": ("table_04", "Strict Match"),
    }
    gaps = {}
    for row, (table, name) in theirs.items():
        ours, other = score(row, BASE), cell("saha2024", table, "Llama-3.2-1B-Instruct", name)
        # Both errors from the same number of items: Saha et al. took fewer, so theirs is larger.
        gaps[row] = abs(ours.value - 100 * other.value) / math.hypot(*[ours.plus_minus] * 2)
    near = sum(z < 1.96 for z in gaps.values())
    found = f"{near} of {len(gaps)} scores level with Llama-3.2-1B-Instruct's in saha2024"
    return Outcome(NOT_CHECKABLE, found, "1.96 standard errors, unpaired")


@check
def tuning_improves_performance() -> Outcome:
    cases = {}
    for row in ITEMS:
        difference, error = change(row)
        cases[f"{row} ({difference:+.2f})"] = difference > 1.96 * error
    return all_of(cases, "scores rise by more than 1.96 standard errors")


@check
def gains_cost_other_abilities() -> Outcome:
    gained = {row: change(row) for row in ITEMS if change(row)[0] > 0}
    real = [row for row, (d, e) in gained.items() if d > 1.96 * e]
    verdict = HOLDS if real else OVERSTATED
    return Outcome(
        verdict, f"{len(gained)} scores rise, {len(real)} beyond their error: no gain paid"
    )
