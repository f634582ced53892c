"""Statistics of scores: how sure a number is, and whether two numbers differ.

A benchmark is a sample of the questions one could have asked, so every score is an estimate. All
functions take plain per-item scores (0/1, or any finite number) and refuse what is none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora_kit.errors import BadInputError

CONFIDENCE = 0.95
RESAMPLES = 9_999
MANY, FEW = 1000, 16  # scores, and their values, from which on the bootstrap draws counts


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error and confidence interval, over `n` items.

    stderr is None where one item says nothing about spread.
    """

    value: float
    stderr: float | None
    low: float
    high: float
    n: int

    def to_metric(self) -> dict[str, float | int | None]:
        """The form `lora_kit.notebook.record` takes."""
        return {
            "value": self.value,
            "stderr": self.stderr,
            "low": self.low,
            "high": self.high,
            "n": self.n,
        }

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] (n = {self.n:,})"

    def signed(self, digits: int = 4) -> str:
        """A difference with its interval, each number with its sign."""
        return "{:+.{d}f} [{:+.{d}f}, {:+.{d}f}]".format(self.value, self.low, self.high, d=digits)


@dataclass(frozen=True)
class McNemar:
    """Paired right/wrong counts and the exact two-sided p value.

    only_base and only_tuned count the items on which the two disagree: the only ones that say
    anything about which is better.
    """

    both: int
    only_base: int
    only_tuned: int
    neither: int
    p: float


def standard_error(scores: Sequence[float]) -> float | None:
    """s/√n with the sample standard deviation s (n − 1 below), as lm-eval prints it.

    None for a single score. For 0/1 scores of mean p this is √(p(1 − p)/(n − 1)).
    """
    values = _checked(scores, "scores")
    return None if len(values) < 2 else float(values.std(ddof=1) / math.sqrt(len(values)))


def wilson(successes: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's interval for a proportion (1927): it stays within 0 and 1 and has a width at 0 of n.

    centre = (p + z²/2n)/(1 + z²/n), half width = z/(1 + z²/n) · √(p(1 − p)/n + z²/4n²).

    Raises:
        BadInputError: counts that are no counts, or a confidence outside 0…1.
    """
    from statsmodels.stats.proportion import proportion_confint

    _check_counts(successes, n)
    low, high = proportion_confint(successes, n, alpha=1 - _confidence(confidence), method="wilson")
    # Rounding leaves 5e-17 where the formula gives 0, and would put p outside its own interval.
    return (0.0 if successes == 0 else float(low)), (1.0 if successes == n else float(high))


def proportion(successes: int, n: int, confidence: float = CONFIDENCE) -> Estimate:
    """A share of right answers with its standard error and Wilson interval."""
    low, high = wilson(successes, n, confidence)
    p = successes / n
    stderr = math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None
    return Estimate(p, stderr, low, high, n)


def bootstrap(
    scores: Sequence[float], confidence: float = CONFIDENCE, seed: int = 0
) -> tuple[float, float]:
    """Bias-corrected and accelerated bootstrap interval of the mean (Efron 1987).

    Items are drawn again with replacement, 9,999 times; the seed makes the interval reproducible.
    Of many scores with few values (a whole test set's answers, or their means over some seeds) it
    is counts that are drawn (`resampling`): the same interval for a thousandth of the work.
    Where all scores are equal no resample differs, and the interval is that one value: with 0/1
    scores use `wilson`, which does not claim such certainty.
    """
    from scipy import stats

    values = _checked(scores, "scores")
    _confidence(confidence)
    if len(values) < 2 or np.ptp(values) == 0:
        return float(values.mean()), float(values.mean())
    if len(values) >= MANY and len(distinct := np.unique(values)) <= FEW:
        from lora_kit.evaluate.resampling import counted_interval

        return counted_interval(values, distinct, confidence, RESAMPLES, seed)
    found = stats.bootstrap(
        (values,),
        np.mean,
        confidence_level=confidence,
        n_resamples=RESAMPLES,
        batch=max(1, 2_000_000 // len(values)),  # 16 MB of resampled scores at a time
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def estimate(scores: Sequence[float], confidence: float = CONFIDENCE, seed: int = 0) -> Estimate:
    """Mean, standard error and interval of per-item scores.

    Wilson's interval where every score is 0 or 1, the bootstrap's otherwise.

    Raises:
        BadInputError: no scores, or one that is not a finite number.
    """
    values = _checked(scores, "scores")
    if _is_binary(values):
        return proportion(int(values.sum()), len(values), confidence)
    low, high = bootstrap(values, confidence, seed)
    return Estimate(float(values.mean()), standard_error(values), low, high, len(values))


def over_runs(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """The mean of a few independent runs (one value a seed) with Student's t interval:
    mean ± t(n − 1)·s/√n, s with n − 1 below. Of a single run the interval is its value.

    For runs, whose values are about normal however few they are; items are `estimate`'s.

    Raises:
        BadInputError: no values, or one that is not a finite number.
    """
    from scipy.stats import t

    found, error = _checked(values, "values"), standard_error(values)
    mean, n = float(found.mean()), len(found)
    half = 0.0 if error is None else float(t.ppf((1 + _confidence(confidence)) / 2, n - 1)) * error
    return Estimate(mean, error, mean - half, mean + half, n)


def mcnemar(base: Sequence[float], tuned: Sequence[float]) -> McNemar:
    """McNemar's exact test of two systems on the same items (1947).

    Under "no difference" each item on which they disagree is a fair coin, so
    p = 2·P(Binomial(b + c, ½) ≤ min(b, c)), at most 1; p = 1 where they never disagree.

    Raises:
        BadInputError: scores other than 0 and 1, or lists of different lengths.
    """
    from statsmodels.stats.contingency_tables import mcnemar as test

    a, b = _pair(base, tuned)
    for name, values in (("base", a), ("tuned", b)):
        if not _is_binary(values):
            raise BadInputError(f"McNemar's test needs scores of 0 and 1; {name} has others.")
    both = int(((a == 1) & (b == 1)).sum())
    only_base = int(((a == 1) & (b == 0)).sum())
    only_tuned = int(((a == 0) & (b == 1)).sum())
    neither = len(a) - both - only_base - only_tuned
    p = float(test([[both, only_base], [only_tuned, neither]], exact=True).pvalue)
    return McNemar(both, only_base, only_tuned, neither, min(1.0, p))


def paired_difference(
    base: Sequence[float],
    tuned: Sequence[float],
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Estimate:
    """tuned − base over the same items: each resample keeps an item's two scores together.

    Where every item's difference is the same, resampling has nothing to show. With 0/1 scores the
    interval then comes from Wilson's bound u on a share of which none was seen in n: if none of n
    items disagree the difference lies within ±u, and if all go one way, within 2u of that.

    Raises:
        BadInputError: lists of different lengths, empty, or with a score that is not finite.
    """
    a, b = _pair(base, tuned)
    gain = b - a
    value = float(gain.mean())
    low, high = bootstrap(gain, confidence, seed)
    if low == high and _is_binary(a) and _is_binary(b):
        unseen = wilson(0, len(gain), confidence)[1] * (2 if value else 1)
        low, high = max(-1.0, value - unseen), min(1.0, value + unseen)
    return Estimate(value, standard_error(gain), low, high, len(gain))


def unpaired_difference(
    base: Sequence[float], tuned: Sequence[float], confidence: float = CONFIDENCE
) -> tuple[Estimate, float]:
    """tuned − base as if the two had answered different questions, and Fisher's exact p value.

    Newcombe's interval (1998, method 10) for 0/1 scores. With the same items for both this throws
    away what pairing knows; it is here to be compared with `paired_difference` and `mcnemar`, and
    for published scores, whose items nobody has.

    Returns:
        the difference (n counts both lists), and p.

    Raises:
        BadInputError: scores other than 0 and 1.
    """
    from scipy.stats import fisher_exact
    from statsmodels.stats.proportion import confint_proportions_2indep

    a, b = _checked(base, "base"), _checked(tuned, "tuned")
    if not (_is_binary(a) and _is_binary(b)):
        raise BadInputError("unpaired_difference needs scores of 0 and 1.")
    right_a, right_b = int(a.sum()), int(b.sum())
    low, high = confint_proportions_2indep(
        right_b,
        len(b),
        right_a,
        len(a),
        method="newcomb",
        alpha=1 - _confidence(confidence),
    )
    errors = standard_error(a), standard_error(b)
    stderr = None if None in errors else math.hypot(*errors)
    table = [[right_b, len(b) - right_b], [right_a, len(a) - right_a]]
    value = float(b.mean() - a.mean())
    return Estimate(value, stderr, float(low), float(high), len(a) + len(b)), float(
        fisher_exact(table).pvalue
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for being several (Holm 1979): in ascending order the i-th of m is
    multiplied by m − i + 1 and never falls below the one before.

    Rejecting where the result is at most α keeps the chance of any false alarm at α, whatever the
    tests have to do with one another.

    Raises:
        BadInputError: no p values, or one outside 0…1.
    """
    from statsmodels.stats.multitest import multipletests

    values = _checked(p_values, "p_values")
    if values.min() < 0 or values.max() > 1:
        raise BadInputError("A p value lies between 0 and 1.")
    return [float(p) for p in multipletests(values, method="holm")[1]]


def ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Estimate:
    """Σx/Σw over items, with the bootstrap's interval: items are drawn again with both their parts.

    For what is measured in all and not by item, such as bits per byte of several texts. A single
    item has no interval: it says nothing about spread.

    Raises:
        BadInputError: lists of different lengths, not finite, or a denominator of 0 or less.
    """
    from scipy import stats

    x, w = _pair(numerators, denominators)
    if w.min() <= 0:
        raise BadInputError("Denominators of a ratio must be positive.")
    value = float(x.sum() / w.sum())
    if len(x) < 2 or np.ptp(x / w) == 0:
        return Estimate(value, None, value, value, len(x))
    found = stats.bootstrap(
        (x, w),
        lambda x, w, axis: x.sum(axis=axis) / w.sum(axis=axis),
        paired=True,
        confidence_level=_confidence(confidence),
        n_resamples=RESAMPLES,
        batch=max(1, 1_000_000 // len(x)),
        method="BCa",
        rng=np.random.default_rng(seed),
    )
    interval = found.confidence_interval
    return Estimate(
        value, float(found.standard_error), float(interval.low), float(interval.high), len(x)
    )


def items_needed(
    difference: float,
    base: float = 0.5,
    disagreement: float | None = None,
    power: float = 0.8,
    confidence: float = CONFIDENCE,
) -> int:
    """Items for a two-sided test to find a true difference d with the given power.

    Unpaired, items for each of the two systems, with p₂ = p₁ + d and p̄ their mean
    (Fleiss, Levin and Paik 2003, section 4.2, without continuity correction):
    n = (z_{α/2}·√(2·p̄(1 − p̄)) + z_β·√(p₁(1 − p₁) + p₂(1 − p₂)))² / d².

    Paired, with ψ the share of items on which the two systems disagree (Connor 1987):
    n = (z_{α/2}·√ψ + z_β·√(ψ − d²))² / d².

    Args:
        difference: d, a difference of two accuracies, between −1 and 1 and not 0.
        base: p₁, the first system's accuracy; unpaired only.
        disagreement: ψ; given, the items are paired.
        power: 1 − β.
        confidence: 1 − α.

    Raises:
        BadInputError: d = 0, p₁ or p₁ + d outside 0…1, or ψ < |d|, which cannot be.
    """
    from scipy.stats import norm

    d = float(difference)
    if not math.isfinite(d) or d == 0 or abs(d) > 1:
        raise BadInputError(f"difference must lie between -1 and 1 and not be 0, not {d}.")
    if not 0 < power < 1:
        raise BadInputError(f"power must lie between 0 and 1, not {power}.")
    z_alpha = norm.ppf(1 - (1 - _confidence(confidence)) / 2)
    z_beta = norm.ppf(power)
    if disagreement is not None:
        if not abs(d) <= disagreement <= 1:
            raise BadInputError(
                f"Two systems that differ by {abs(d):g} disagree on at least that share of items "
                f"and at most on all; disagreement cannot be {disagreement:g}."
            )
        spread = z_alpha * math.sqrt(disagreement) + z_beta * math.sqrt(disagreement - d * d)
        return math.ceil((spread / d) ** 2)
    if not (0 <= base <= 1 and 0 <= base + d <= 1):
        raise BadInputError(
            f"Accuracies lie between 0 and 1: a base of {base:g} and a difference of {d:g} do not."
        )
    other = base + d
    mean = (base + other) / 2
    spread = z_alpha * math.sqrt(2 * mean * (1 - mean)) + z_beta * math.sqrt(
        base * (1 - base) + other * (1 - other)
    )
    return math.ceil((spread / d) ** 2)


def _checked(scores: Sequence[float], name: str) -> np.ndarray:
    try:
        values = np.asarray(scores, dtype=float)
    except (TypeError, ValueError) as e:
        raise BadInputError(f"{name} must be a flat list of numbers ({e}).") from e
    if values.ndim != 1:
        raise BadInputError(
            f"{name} must be a flat list of numbers, not of {values.ndim} dimensions."
        )
    if len(values) == 0:
        raise BadInputError(f"{name} is empty: there is nothing to estimate from.")
    wrong = np.flatnonzero(~np.isfinite(values))
    if len(wrong):
        raise BadInputError(
            f"{name} has {len(wrong)} value(s) that are not finite numbers, the first at position "
            f"{wrong[0]} ({values[wrong[0]]})."
        )
    return values


def _pair(base: Sequence[float], tuned: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    a, b = _checked(base, "base"), _checked(tuned, "tuned")
    if len(a) != len(b):
        raise BadInputError(
            f"Paired scores come from the same items: base has {len(a)}, tuned {len(b)}."
        )
    return a, b


def _is_binary(values: np.ndarray) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def _check_counts(successes: int, n: int) -> None:
    if n < 1 or not 0 <= successes <= n or int(successes) != successes or int(n) != n:
        raise BadInputError(f"{successes} of {n} is no count of right answers among n ≥ 1 items.")


def _confidence(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise BadInputError(f"confidence must lie between 0 and 1, not {confidence}.")
    return confidence
