"""What LoRA Land's 31 tasks let one expect of a data set that was never tuned on.

From the set's complexity heuristics: the nearest of the 31 tasks, the score of untuned and of tuned
models (averages over the paper's ten models of 2 to 8 billion parameters, in the task's own metric,
0…1), the lift, and how far off such forecasts were on tasks that were left out. The models are
those of `land_models`; each quantity takes the one with the smallest error on left-out tasks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from lora_kit.errors import BadInputError
from lora_kit.studies import land_models
from lora_kit.studies.complexity import HEURISTICS, Complexity, measure_complexity, token_counter
from lora_kit.studies.lora_land import printed_heuristics, quality_measures

COVERAGE = 0.9
WORDS = {
    "mean": "the average of 31 tasks",
    "log ridge": "ridge over the heuristics",
    "base score": "a line over the base score",
    "log ridge + base": "ridge over heuristics and base score",
    "measured": "you measured it",
    "difference": "tuned − base",
}
BASE, TUNED, LIFT = land_models.BASE, "Average Fine-Tuned Score", "Average Base Model Lift"


@dataclass(frozen=True)
class Forecast:
    """One predicted quantity. low and high: 90 %, from the errors on left-out tasks.

    kind: what predicted it, a key of `WORDS`. error: its root mean squared error on left-out tasks;
    mean_error: that of saying the other tasks' average.
    """

    name: str
    value: float
    low: float
    high: float
    kind: str
    error: float
    mean_error: float

    @property
    def over_mean(self) -> float:
        """error over mean_error: 1 or more says that nothing was learnt from the heuristics."""
        return self.error / self.mean_error


@dataclass(frozen=True)
class Neighbour:
    """One of the 31 tasks: distance in σ units over the 14 heuristics, and its measured scores."""

    task: str
    distance: float
    base: float
    tuned: float
    lift: float


@dataclass(frozen=True)
class LiftForecast:
    """Everything `predict_lift` says. outside: heuristics beyond the range of the 31 tasks, with
    the set's value and that range."""

    complexity: Complexity
    base: Forecast
    tuned: Forecast
    lift: Forecast
    nearest: tuple[Neighbour, ...]
    outside: tuple[tuple[str, float, float, float], ...]
    base_score: float | None


def predict_lift(
    rows: Iterable[Mapping], base_score: float | None = None, model: str | None = None
) -> LiftForecast:
    """Forecast base score, tuned score and lift of a data set.

    Args:
        rows: of any shape `prompts.to_example` knows.
        base_score: the untuned model's score on the task, if it was measured: the best single
            predictor of the tuned one.
        model: whose tokenizer counts lengths; the default model's where it is cached, else words.

    Raises:
        BadInputError: no rows, or a base score outside 0…1; and what loading a tokenizer raises.
    """
    if base_score is not None and not 0 <= base_score <= 1:
        raise BadInputError(f"The base score must lie between 0 and 1, not {base_score}.")
    count, counter = token_counter(model)
    complexity = measure_complexity(rows, count, counter)
    known = base_score is not None
    base = _forecast(BASE, complexity, None) if not known else _measured(base_score)
    tuned = _forecast(TUNED, complexity, base_score)
    return LiftForecast(
        complexity=complexity,
        base=base,
        tuned=tuned,
        lift=_lift(base, tuned),
        nearest=nearest_tasks(complexity),
        outside=_outside(complexity),
        base_score=base_score,
    )


def nearest_tasks(complexity: Complexity, most: int = 3) -> tuple[Neighbour, ...]:
    """The tasks whose heuristics are most alike: Euclidean distance over z-scores (lengths and the
    number of examples as ln(1 + x)), nearest first."""
    table = land_models.logged(printed_heuristics())
    given = land_models.logged(_as_frame(complexity))
    spread = table.std(ddof=0)
    apart = np.sqrt((((table - given.iloc[0]) / spread) ** 2).sum(axis=1)).sort_values()
    y = quality_measures()
    return tuple(
        Neighbour(task, float(d), *(float(y.at[task, m]) for m in (BASE, TUNED, LIFT)))
        for task, d in apart.head(most).items()
    )


def errors_left_out(measure: str, kind: str) -> np.ndarray:
    """predicted − measured on each of the 31 tasks, left out in turn."""
    return land_models.left_out_predictions(kind, measure) - quality_measures()[measure].to_numpy()


def reach(errors: np.ndarray, coverage: float = COVERAGE) -> float:
    """The half width of an interval with the given coverage: the ⌈c·(n + 1)⌉-th smallest absolute
    error on left-out tasks (the jackknife; Barber et al. 2021, section 1)."""
    ordered = np.sort(np.abs(errors))
    return float(ordered[min(len(ordered), math.ceil(coverage * (len(ordered) + 1))) - 1])


def format_forecast(found: LiftForecast) -> str:
    """The forecast as text: heuristics, neighbours, numbers, and what they are worth."""
    c = found.complexity
    table = printed_heuristics()
    lines = [
        f"{c['examples']:,.0f} rows, {c.measured:,} of them read; lengths in {_unit(c.counter)}",
        "",
        f"{'heuristic':<26}{'yours':>10}{'31 tasks: lowest, median, highest':>38}",
    ]
    for name, heading in HEURISTICS.items():
        column = table[name]
        spread = "  ".join(f"{x:>10,.4g}" for x in (column.min(), column.median(), column.max()))
        lines.append(f"{heading:<26}{c[name]:>10,.4g}    {spread}")
    lines += ["", f"{'nearest tasks':<26}{'distance':>10}{'base':>8}{'tuned':>8}{'lift':>8}"]
    for n in found.nearest:
        lines.append(f"{n.task:<26}{n.distance:>10.1f}{n.base:>8.3f}{n.tuned:>8.3f}{n.lift:>+8.3f}")
    lines += ["", f"{'forecast':<26}{'value':>10}{'90 % interval':>20}   predicted by"]
    for f in (found.base, found.tuned, found.lift):
        interval = f"{f.low:.2f} to {f.high:.2f}"
        lines.append(f"{f.name:<26}{f.value:>10.2f}{interval:>20}   {WORDS[f.kind]}")
    return "\n".join([*lines, "", *trust(found)])


def trust(found: LiftForecast) -> list[str]:
    """How far to trust a forecast, from its errors on left-out tasks; one sentence a line."""
    lines = []
    for f in (found.base, found.tuned, found.lift):
        if f.kind == "measured":
            continue
        verdict = (
            f"{1 - f.over_mean:.0%} less than"
            if f.over_mean < 0.95
            else "no better than"
            if f.over_mean < 1.05
            else f"{f.over_mean - 1:.0%} more than"
        )
        lines.append(
            f"{f.name}: off by {f.error:.2f} on tasks left out, {verdict} saying the average of "
            f"the others ({f.mean_error:.2f})."
        )
    if found.lift.over_mean >= 0.95:
        lines.append(
            "The heuristics do not foretell the lift: trust the interval and the neighbours, and "
            "measure on a few hundred rows of your own."
        )
    if found.base_score is None:
        lines.append(
            "A measured base score (--base-score) is the best single guide to the tuned score."
        )
    for name, value, low, high in found.outside:
        lines.append(
            f"{HEURISTICS[name]} ({value:,.4g}) lies outside the 31 tasks ({low:,.4g} to "
            f"{high:,.4g}): nothing is known there."
        )
    lines.append(
        "All of it is about ten models of 2 to 8 billion parameters, tuned as LoRA Land tuned them."
    )
    return lines


def _unit(counter: str) -> str:
    return "words and signs" if counter == "words" else f"{counter}'s tokens"


def _as_frame(complexity: Complexity):
    import pandas as pd

    return pd.DataFrame([dict(complexity.values)])[list(HEURISTICS)]


def _forecast(measure: str, complexity: Complexity, base_score: float | None) -> Forecast:
    """The forecast of one measure by the kind of model that erred least on left-out tasks."""
    told = base_score is not None
    kinds = ("mean", "base score", "log ridge + base") if told else ("mean", "log ridge")
    errors = {kind: errors_left_out(measure, kind) for kind in kinds}
    rmse = {kind: float(np.sqrt(np.mean(e**2))) for kind, e in errors.items()}
    kind = min(rmse, key=rmse.get)
    x = land_models.logged(_as_frame(complexity)).assign(base_score=base_score)
    x = x[land_models.features_of(kind).columns]
    fitted = land_models.make_model(kind).fit(
        land_models.features_of(kind).to_numpy(), quality_measures()[measure]
    )
    value = float(np.clip(fitted.predict(x.to_numpy(dtype=float))[0], 0, 1))
    half = reach(errors[kind])
    name = {BASE: "base score", TUNED: "tuned score"}[measure]
    return Forecast(
        name,
        value,
        max(0.0, value - half),
        min(1.0, value + half),
        kind,
        rmse[kind],
        rmse["mean"],
    )


def _measured(score: float) -> Forecast:
    return Forecast("base score", score, score, score, "measured", 0.0, 1.0)


def _lift(base: Forecast, tuned: Forecast) -> Forecast:
    """tuned − base, or the average lift of the 31 tasks where that erred less on left-out tasks."""
    apart = errors_left_out(TUNED, tuned.kind)
    if base.kind != "measured":
        apart = apart - errors_left_out(BASE, base.kind)
    plain = errors_left_out(LIFT, "mean")
    error, mean_error = (float(np.sqrt(np.mean(e**2))) for e in (apart, plain))
    if error < mean_error:
        kind, value, half = "difference", tuned.value - base.value, reach(apart)
    else:
        kind, value, half = "mean", float(quality_measures()[LIFT].mean()), reach(plain)
        error = mean_error
    low, high = max(-1.0, value - half), min(1.0, value + half)
    return Forecast("lift", value, low, high, kind, error, mean_error)


def _outside(complexity: Complexity) -> tuple[tuple[str, float, float, float], ...]:
    table = printed_heuristics()
    return tuple(
        (name, complexity[name], float(table[name].min()), float(table[name].max()))
        for name in HEURISTICS
        if not table[name].min() <= complexity[name] <= table[name].max()
    )
