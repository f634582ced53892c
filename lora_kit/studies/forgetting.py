"""What fine-tuning forgets: the quantities of mai2025, as printed and as they should be, and the
cells of the study that maps forgetting against rank, learning rate, rows and replay.

Nothing here is heavy: models are trained and asked in `forgetting_cells`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from lora_kit.errors import BadInputError
from lora_kit.evaluate.statistics import (
    RESAMPLES,
    Estimate,
    McNemar,
    mcnemar,
    over_runs,
    paired_difference,
    unpaired_difference,
    wilson,
)

STUDY = "06_forgetting"
SKILLS = ("addition", "word_problems")
JUDGES = ("strict", "flexible")


# ------------------------------------------------------------------ mai2025's quantities, printed


def forgetting_rate(before: float, after: float) -> float:
    """FR = 1 − A_after / A_before, a share of what was known (mai2025, section 2.4).

    Raises:
        BadInputError: nothing was known before.
    """
    if not before > 0:
        raise BadInputError(
            "A forgetting rate needs a score above 0 before: nothing known can be forgotten."
        )
    return 1 - after / before


def ability_augmentation(base: float, tuned: float) -> float:
    """ΔA = A_tuned − A_base (mai2025, section 2.4), printed there without an error."""
    return tuned - base


def knowledge_loss(
    base: float, tuned: float, plus_minus_base: float, plus_minus_tuned: float
) -> tuple[float, float]:
    """ΔK = A_base − A_tuned and what is printed behind its ±, √(CI_base² + CI_tuned²).

    The root combines two *standard errors* of independent samples into the standard error of their
    difference. Intervals do not combine into an interval of the same level unless they are normal
    and independent; both models answered the same questions, so they are not independent.
    """
    return base - tuned, math.hypot(plus_minus_base, plus_minus_tuned)


# ------------------------------------------------------------------ and as they should be


@dataclass(frozen=True)
class Change:
    """before and after on the same items: accuracies, their paired difference (after − before),
    the forgetting rate with its interval (None where nothing was known), McNemar's exact test."""

    before: Estimate
    after: Estimate
    difference: Estimate
    rate: Estimate | None
    test: McNemar


def change(before: Sequence[float], after: Sequence[float], seed: int = 0) -> Change:
    """Compare 0/1 scores of the same items, in one order.

    The rate's interval is the paired bootstrap's (percentiles): items are drawn again, an item's
    two scores together, and 1 − A_after/A_before is formed anew. Where nothing is left after, no
    resample differs from 1: the lower end then comes from Wilson's bound on what 0 of n allows.

    Raises:
        BadInputError: scores that are not 0 and 1, or not as many before as after.
    """
    from lora_kit.evaluate.statistics import estimate

    test = mcnemar(before, after)
    first, second = estimate(before), estimate(after)
    rate = None
    if first.value > 0:
        rate = _rate_interval(test, first, second, seed)
    return Change(first, second, paired_difference(before, after, seed=seed), rate, test)


def _rate_interval(test: McNemar, first: Estimate, second: Estimate, seed: int) -> Estimate:
    value, n = forgetting_rate(first.value, second.value), first.n
    # Drawing n items again and again is drawing how many of them fall into each of four kinds.
    kinds = np.array([test.both, test.only_base, test.only_tuned, test.neither]) / n
    both, lost, won, _ = np.random.default_rng(seed).multinomial(n, kinds, RESAMPLES).T
    known = both + lost
    rates = 1 - (both + won)[known > 0] / known[known > 0]
    low, high = np.percentile(rates, [2.5, 97.5])
    if second.value == 0:
        low = 1 - wilson(0, n)[1] / first.value
    return Estimate(value, float(rates.std(ddof=1)), float(min(low, value)), float(high), n)


@dataclass(frozen=True)
class Published:
    """What two printed accuracies on n items allow to say, without the items.

    difference, p: as if the two had answered different questions (Newcombe's interval; Fisher's
    exact p). p_least, p_most: McNemar's exact p over every table of pairs that has these two
    margins. disagreement: the largest share of items on which the two may disagree for p < 0.05;
    None if no table gives it.
    """

    base_right: int
    tuned_right: int
    n: int
    difference: Estimate
    p: float
    p_least: float
    p_most: float
    disagreement: float | None


def published_change(base: float, tuned: float, n: int) -> Published:
    """Read two accuracies of the same n items (shares, as printed) for all they allow.

    Raises:
        BadInputError: shares outside 0…1, or n < 1.
    """
    shares, p = p_by_disagreement(base, tuned, n)
    small = shares[p < 0.05]
    a, t = round(base * n), round(tuned * n)
    ones = [[1.0] * k + [0.0] * (n - k) for k in (a, t)]
    difference, fisher = unpaired_difference(*ones)
    return Published(
        a,
        t,
        n,
        difference,
        fisher,
        float(p.min()),
        float(p.max()),
        float(small.max()) if len(small) else None,
    )


def p_by_disagreement(base: float, tuned: float, n: int) -> tuple[np.ndarray, np.ndarray]:
    """McNemar's exact p for every table of pairs that two accuracies of n items allow.

    With a and t right answers, b items that only the base gets right and c that only the tuned
    model does, b − c = a − t: the margins fix the difference, and b + c is the one unknown.

    Returns:
        (b + c)/n in rising order, and p of each.

    Raises:
        BadInputError: shares outside 0…1, or n < 1.
    """
    if n < 1 or not (0 <= base <= 1 and 0 <= tuned <= 1):
        raise BadInputError(f"Shares from 0 to 1 of n ≥ 1 items, not {base}, {tuned} of {n}.")
    from scipy.stats import binom

    a, t = round(base * n), round(tuned * n)
    only_tuned = np.arange(max(0, t - a), min(t, n - a) + 1)
    only_base = only_tuned + (a - t)
    disagree = only_base + only_tuned
    p = np.minimum(1, 2 * binom.cdf(np.minimum(only_base, only_tuned), disagree, 0.5))
    return disagree / n, p


def printed_error(value: float, plus_minus: float, n: int) -> float:
    """A printed ± over the standard error √(p(1 − p)/(n − 1)): about 1 for a standard error, about
    1.96 for half a 95 % interval. value and plus_minus as shares."""
    return plus_minus / math.sqrt(value * (1 - value) / (n - 1))


# ------------------------------------------------------------------ the study's cells


@dataclass(frozen=True)
class Cell:
    """One fine-tuning on Alpaca of a base that was taught `skills`.

    rows: of Alpaca. replay: the share of each skill's training rows mixed in (0.05: every
    twentieth). The rest of the recipe is `train.papers`' "mai"; alpha equals the rank.
    """

    skills: tuple[str, ...] = SKILLS
    rank: int = 16
    learning_rate: float = 2e-4
    rows: int = 2000
    replay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if unknown := set(self.skills) - set(SKILLS):
            raise BadInputError(f"No skill {', '.join(sorted(unknown))}: {', '.join(SKILLS)}.")
        if not 0 <= self.replay <= 1:
            raise BadInputError(f"replay is a share from 0 to 1, not {self.replay}.")
        if self.rank < 1 or self.rows < 1 or not self.learning_rate > 0:
            raise BadInputError(f"rank, rows and learning_rate must be above 0 in {self}.")

    @property
    def setting(self) -> str:
        """The cell without its seed, as a file name's part: r016_lr2e-04_n2000_replay00."""
        lr = f"{self.learning_rate:.0e}"
        return f"r{self.rank:03d}_lr{lr}_n{self.rows}_replay{round(100 * self.replay):02d}"

    @property
    def name(self) -> str:
        return f"{self.setting}_seed{self.seed}"

    def to_dict(self) -> dict:
        return {**asdict(self), "skills": list(self.skills)}


CENTRE = Cell()
# In order of importance: what the study is about first, what takes longest last.
AXES: tuple[tuple[str, tuple], ...] = (
    ("replay", (0.05, 0.01, 0.2)),
    ("learning_rate", (5e-5, 1e-3)),
    ("rows", (500,)),
    ("rank", (4, 64)),
    ("rows", (4800,)),
)


def settings(centre: Cell = CENTRE, axes=AXES) -> Iterator[Cell]:
    """The centre, then one variable at a time, most important first."""
    yield centre
    for name, values in axes:
        for value in values:
            yield replace(centre, **{name: value})


def cells(seeds: Iterable[int], centre: Cell = CENTRE, axes=AXES) -> list[Cell]:
    """Every setting with all its seeds before the next: a run cut off leaves settings complete."""
    seeds = tuple(seeds)
    return [replace(setting, seed=seed) for setting in settings(centre, axes) for seed in seeds]


# ------------------------------------------------------------------ scores as short texts


def to_bits(scores: Iterable[float]) -> str:
    """0/1 scores as a text of one character an item: what a record keeps, so that every test can
    be made again.

    Raises:
        BadInputError: a score that is neither.
    """
    text = "".join("1" if s == 1 else "0" if s == 0 else "?" for s in scores)
    if "?" in text:
        raise BadInputError(f"Only scores of 0 and 1 can be kept so; item {text.index('?')} is no.")
    return text


def from_bits(text: str) -> list[float]:
    """The scores that `to_bits` wrote.

    Raises:
        BadInputError: another character.
    """
    if set(text) - {"0", "1"}:
        raise BadInputError("Kept scores are a text of 0 and 1.")
    return [float(c) for c in text]


def seed_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) over seeds: Student's 95 % interval; the mean thrice for a single seed."""
    e = over_runs(values)
    return e.value, e.low, e.high
