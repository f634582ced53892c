"""Statistics of the specialists study: two factors, paired contrasts, and the effective step.

Seeds are blocks: every setting met the same seeds, with the same rows in the same order for each,
so that a seed's effect is taken out before settings are compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lora_kit.errors import BadInputError
from lora_kit.evaluate.statistics import Estimate, holm


@dataclass(frozen=True)
class Effect:
    """One line of a two-way analysis. share: partial η² = SS/(SS + SS of what is left), with its
    95 % interval by the noncentral F (Steiger 2004)."""

    name: str
    df: float
    f: float
    p: float
    share: float
    low: float
    high: float

    def row(self) -> dict:
        """One line of a table."""
        return {
            "effect": self.name,
            "df": f"{self.df:g}",
            "F": f"{self.f:.2f}",
            "p": f"{self.p:.2g}",
            "partial η²": f"{self.share:.2f}",
            "95 %": f"{self.low:.2f} to {self.high:.2f}",
        }


def two_way(frame: pd.DataFrame, value: str, one: str = "rank", two: str = "placement"):
    """Two factors, their interaction, and seeds as blocks: value ~ one · two + seed, type II sums
    of squares.

    Args:
        frame: a row a run, with the columns `value`, `one`, `two` and `seed`.

    Returns:
        (effects, residual standard deviation of one run).

    Raises:
        BadInputError: fewer than two levels of a factor, an empty cell, or fewer than two seeds.
    """
    from statsmodels.stats.anova import anova_lm

    _check_design(frame, value, (one, two))
    fit = _fit(frame, f"{value} ~ C({one}) * C({two}) + C(seed)", value)
    table = anova_lm(fit, typ=2)
    left_df, left = float(table.loc["Residual", "df"]), float(table.loc["Residual", "sum_sq"])
    names = {f"C({one})": one, f"C({two})": two, f"C({one}):C({two})": f"{one} × {two}"}
    effects = []
    for key, name in names.items():
        line = table.loc[key]
        share = float(line["sum_sq"] / (line["sum_sq"] + left))
        low, high = _share_interval(float(line["F"]), float(line["df"]), left_df)
        effects.append(
            Effect(
                name, float(line["df"]), float(line["F"]), float(line["PR(>F)"]), share, low, high
            )
        )
    return effects, math.sqrt(left / left_df)


def _fit(frame: pd.DataFrame, formula: str, value: str):
    import statsmodels.formula.api as smf

    renamed = frame.rename(columns={value: "outcome"})
    return smf.ols(formula.replace(value, "outcome", 1), renamed).fit()


def _share_interval(f: float, df: float, left: float) -> tuple[float, float]:
    """95 % interval of partial η² from that of the noncentrality λ: η² = λ/(λ + df + left + 1)."""
    from scipy.optimize import brentq
    from scipy.stats import f as central
    from scipy.stats import ncf

    def at(level: float) -> float:
        if central.cdf(f, df, left) <= level:
            return 0.0
        top = 10.0
        while ncf.cdf(f, df, left, top) > level and top < 1e7:
            top *= 2
        found = brentq(lambda x: ncf.cdf(f, df, left, x) - level, 1e-9, top)
        return found / (found + df + left + 1)

    return at(0.975), at(0.025)


def _check_design(frame: pd.DataFrame, value: str, factors: Sequence[str]) -> None:
    some = frame.dropna(subset=[value])
    for factor in factors:
        if some[factor].nunique() < 2:
            raise BadInputError(f"A two-way analysis needs two levels of {factor} at least.")
    if some["seed"].nunique() < 2:
        raise BadInputError("A two-way analysis needs two seeds at least: nothing else is noise.")
    counts = some.groupby([*factors, "seed"], observed=True).size().unstack(fill_value=0)
    wanted = math.prod(some[f].nunique() for f in factors)
    if len(counts) < wanted or (counts == 0).any(axis=None):
        raise BadInputError(
            f"Not every pair of {' and '.join(factors)} has every seed: take those that have."
        )


def whole_design(frame: pd.DataFrame, one: str = "rank", two: str = "placement") -> pd.DataFrame:
    """Of runs with holes, those that `two_way` can take: the levels of `two` and of `one` whose
    pairs all have every seed, the choice that keeps the most settings; empty where none has two
    levels of each."""
    from itertools import combinations

    if frame.empty:
        return frame
    every = set(frame["seed"])
    found = frame.groupby([two, one], observed=True)["seed"].agg(set)
    full = {key for key, seeds in found.items() if seeds == every}
    levels = sorted({place for place, _ in full})
    best: tuple[int, tuple, list] = (0, (), [])
    for size in range(2, len(levels) + 1):
        for places in combinations(levels, size):
            ranks = sorted(set.intersection(*({r for q, r in full if q == p} for p in places)))
            if len(ranks) > 1 and size * len(ranks) > best[0]:
                best = (size * len(ranks), places, ranks)
    return frame[frame[two].isin(best[1]) & frame[one].isin(best[2])]


@dataclass(frozen=True)
class Contrast:
    """A setting against another: difference of means with its interval, p as it is and by Holm."""

    of: str
    against: str
    difference: Estimate
    p: float
    p_holm: float

    @property
    def significant(self) -> bool:
        return self.p_holm < 0.05

    def row(self) -> dict:
        """One line of a table."""
        d = self.difference
        return {
            "setting": self.of,
            "against": self.against,
            "difference": f"{d.value:+.4f}",
            "95 %": f"{d.low:+.4f} to {d.high:+.4f}",
            "p (Holm)": f"{self.p_holm:.2g}",
        }


def contrasts(
    frame: pd.DataFrame, value: str, setting: str, pairs: Sequence[tuple[str, str]]
) -> list[Contrast]:
    """Differences of settings, each setting a level of the column `setting`, seeds as blocks.

    One error variance for all settings (value ~ setting + seed): with three seeds a pair's own has
    two degrees of freedom and says little.

    Raises:
        BadInputError: a pair with a setting that has no runs; fewer than two seeds.
    """
    from scipy.stats import t

    some = frame.dropna(subset=[value])
    if some["seed"].nunique() < 2:
        raise BadInputError("Contrasts need two seeds at least.")
    unknown = {name for pair in pairs for name in pair} - set(some[setting])
    if unknown:
        raise BadInputError(f"There are no runs of {', '.join(sorted(map(str, unknown)))}.")
    wide = some.pivot_table(index=setting, columns="seed", values=value).dropna()
    centred = wide - wide.mean(axis=0)
    left = centred.sub(centred.mean(axis=1), axis=0)
    df = (len(wide) - 1) * (wide.shape[1] - 1)
    if df < 1 or len(wide) < some[setting].nunique():
        raise BadInputError("Contrasts need every setting with every seed, two of each at least.")
    error = math.sqrt(float((left**2).to_numpy().sum()) / df * 2 / wide.shape[1])
    found = []
    for of, against in pairs:
        gain = float(wide.loc[of].mean() - wide.loc[against].mean())
        reach = float(t.ppf(0.975, df)) * error
        p = float(2 * t.sf(abs(gain) / error, df)) if error else float(gain == 0)
        made = Estimate(gain, error, gain - reach, gain + reach, wide.shape[1])
        found.append((of, against, made, p))
    adjusted = holm([p for *_, p in found]) if found else []
    return [Contrast(*some, p) for some, p in zip(found, adjusted, strict=True)]


def rank_map(
    frame: pd.DataFrame, value: str = "loss", against: int = 16
) -> tuple[pd.DataFrame, set[tuple[str, int]]]:
    """Means over seeds, placements × ranks, and the cells that differ from the rank `against` at
    the same placement (p < 0.05 by Holm over the whole map; `contrasts`). Cells that lack a seed
    or that rank beside them are shown and not tested; none are marked where nothing is left."""
    some = frame.dropna(subset=[value])
    means = some.pivot_table(index="placement", columns="rank", values=value)
    seeds = some.groupby(["placement", "rank"])["seed"].transform("nunique")
    some = some[seeds == seeds.max()]
    there = set(zip(some["placement"], some["rank"], strict=True))
    named = some.assign(
        cell=[f"{p} {r}" for p, r in zip(some["placement"], some["rank"], strict=True)]
    )
    keys = sorted((p, r) for p, r in there if r != against and (p, against) in there)
    pairs = [(f"{p} {r}", f"{p} {against}") for p, r in keys]
    try:
        found = contrasts(named, value, "cell", pairs)
    except BadInputError:
        return means, set()
    return means, {key for key, c in zip(keys, found, strict=True) if c.significant}


def per_doubling(frame: pd.DataFrame, value: str) -> Estimate:
    """Change of `value` for each doubling of the rank: value ~ log2(rank) + seed, least squares,
    Student's 95 % interval.

    Raises:
        BadInputError: fewer than two ranks.
    """
    if frame["rank"].nunique() < 2:
        raise BadInputError("A slope over ranks needs two ranks at least.")
    made = frame.assign(doublings=np.log2(frame["rank"].astype(float)))
    blocks = " + C(seed)" if frame["seed"].nunique() > 1 else ""
    fit = _fit(made, f"{value} ~ doublings{blocks}", value)
    low, high = fit.conf_int().loc["doublings"]
    slope, error = fit.params["doublings"], fit.bse["doublings"]
    return Estimate(float(slope), float(error), float(low), float(high), int(fit.nobs))


def tuned(frame: pd.DataFrame, value: str = "loss", by: Sequence[str] = ("scaling", "rank")):
    """Of each setting in `by` the runs at its best learning rate: the one with the lowest mean over
    seeds. Rates are compared where every setting has them all, so that all are tuned alike.

    Raises:
        BadInputError: no rate that every setting has.
    """
    rates = frame.groupby(list(by), observed=True)["rate"].agg(set)
    common = sorted(set.intersection(*rates)) if len(rates) else []
    if not common:
        raise BadInputError("No learning rate was run for every setting: nothing is tuned alike.")
    some = frame[frame["rate"].isin(common)]
    means = some.groupby([*by, "rate"], observed=True)[value].mean().reset_index()
    best = means.loc[means.groupby(list(by), observed=True)[value].idxmin(), [*by, "rate"]]
    return some.merge(best, on=[*by, "rate"])


@dataclass(frozen=True)
class Collapse:
    """How far one number, rate · scale · rank^γ, stands for rank, rule and rate together.

    gamma: with its 95 % interval (bootstrap over settings). explained: R² of a cubic in the log of
    that number; by_rate: of the rate alone; all: of every setting's own mean, the most there is.
    """

    gamma: Estimate
    explained: float
    by_rate: float
    at_zero: float
    all: float


GAMMAS = np.round(np.arange(-0.5, 1.51, 0.05), 2)


def collapse(frame: pd.DataFrame, value: str = "loss", seed: int = 0, draws: int = 400) -> Collapse:
    """Fit log(value) as a cubic in x = log(rate · scale · rank^γ), γ by least squares on a grid.

    γ = 0: all that matters is rate · scale. γ = 1: an adapter's step is that of r directions that
    agree, as they do under Adam on a single example (each of the r columns of B moves by the rate,
    whatever its gradient's size). γ = ½: they do not agree.

    Raises:
        BadInputError: fewer than eight settings.
    """
    keys = ["rank", "scaling", "rate"]
    means = frame.groupby(keys, observed=True).agg(v=(value, "mean"), s=("scale", "first"))
    means = means.reset_index()
    if len(means) < 8:
        raise BadInputError(f"{len(means)} settings are too few to fit an effective step: 8.")
    y = np.log(means["v"].to_numpy(float))
    step = np.log(means["rate"].to_numpy(float) * means["s"].to_numpy(float))
    rank = np.log(means["rank"].to_numpy(float))

    def residual(of: np.ndarray, x: np.ndarray) -> float:
        x = (x - x.mean()) / (x.std() or 1.0)
        cubic = np.vander(x, 4)  # lstsq, not polyfit: a resample may have few different x
        return float(((of - cubic @ np.linalg.lstsq(cubic, of, rcond=None)[0]) ** 2).sum())

    def best(rows: np.ndarray) -> float:
        errors = [residual(y[rows], step[rows] + g * rank[rows]) for g in GAMMAS]
        return float(GAMMAS[int(np.argmin(errors))])

    everything = np.arange(len(y))
    gamma, rng = best(everything), np.random.default_rng(seed)
    drawn = [best(rng.choice(everything, len(y))) for _ in range(draws)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    total = float(((y - y.mean()) ** 2).sum())

    def share(x: np.ndarray) -> float:
        return 1 - residual(y, x) / total

    single = np.log(frame[value].to_numpy(float))
    of_means = np.log(frame.groupby(keys, observed=True)[value].transform("mean").to_numpy(float))
    whole = 1 - float(((single - of_means) ** 2).sum() / ((single - single.mean()) ** 2).sum())
    return Collapse(
        Estimate(
            gamma, float(np.std(drawn)), float(min(low, gamma)), float(max(high, gamma)), len(y)
        ),
        share(step + gamma * rank),
        share(np.log(means["rate"].to_numpy(float))),
        share(step),
        whole,
    )


def spread_rules(frame: pd.DataFrame, anchor: int) -> pd.DataFrame:
    """The runs at the anchor rank, where the three rules are one, counted under each rule."""
    from lora_kit.studies.specialists import SCALINGS

    at = frame[frame["rank"] == anchor]
    rest = frame[frame["rank"] != anchor]
    return pd.concat([rest, *(at.assign(scaling=rule) for rule in SCALINGS)], ignore_index=True)
