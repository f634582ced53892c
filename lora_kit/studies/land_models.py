"""What the heuristics say about LoRA Land's scores: correlations, regressions, and an honest test.

Zhao et al. 2024, section 5.5: 14 heuristics of 31 tasks against 7 measures of quality. Figure 8
correlates them; Table 6 regresses them (z-scored, linear), and prints the error on the very tasks
the regression was fitted to. Here the same numbers come with intervals, with a correction for how
many were looked at, and with the error on tasks that were left out.

31 tasks and 15 free parameters: the residuals keep 16 degrees of freedom, so that even 14 columns
of noise would shrink the root mean squared error of the fitted tasks to √(16/30) ≈ 0.73 of σ.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from lora_kit.errors import unknown_name
from lora_kit.studies.lora_land import PAPER, printed_heuristics, quality_measures
from lora_kit.studies.papers import read_table

if TYPE_CHECKING:
    import pandas as pd

BASE = "Average Base Model Score"
MODELS = (
    *("mean", "base score", "linear", "linear + base", "ridge", "ridge + base"),
    *("log ridge", "log ridge + base"),
)
PENALTIES = np.logspace(-2, 4, 25)


def correlations(method: str = "pearson") -> pd.DataFrame:
    """Figure 8: every heuristic against every measure, over 31 tasks.

    The interval is Fisher's: tanh(artanh r ± 1.96·c/√(n − 3)), c = 1 for Pearson's r and
    √(1 + r²/2) for Spearman's (Bonett and Wright 2000). p is two-sided against r = 0 (Student's t
    with n − 2 degrees). Corrected for all pairs together: `p_holm` (Holm 1979) holds the chance of
    even one false finding at 5 %; `q` (Benjamini and Hochberg 1995) the share of false ones.

    Args:
        method: "pearson", or "spearman" (ranks: one task of 800 tokens weighs no more than others).

    Returns:
        A frame: heuristic, measure, r, low, high, p, p_holm, q.

    Raises:
        UnknownNameError: no such method.
    """
    import pandas as pd
    from scipy import stats
    from statsmodels.stats.multitest import multipletests

    if method not in ("pearson", "spearman"):
        raise unknown_name("correlation", method, ("pearson", "spearman"))
    heuristics, measures = printed_heuristics(), quality_measures()
    rows = []
    for name in heuristics:
        for measure in measures:
            x, y = heuristics[name], measures[measure]
            r, p = getattr(stats, "pearsonr" if method == "pearson" else "spearmanr")(x, y)
            widen = 1.0 if method == "pearson" else np.sqrt(1 + r * r / 2)
            half = stats.norm.ppf(0.975) * widen / np.sqrt(len(x) - 3)
            low, high = np.tanh(np.arctanh(r) + np.array([-half, half]))
            rows.append((name, measure, float(r), float(low), float(high), float(p)))
    out = pd.DataFrame(rows, columns=["heuristic", "measure", "r", "low", "high", "p"])
    out["p_holm"] = multipletests(out["p"], method="holm")[1]
    out["q"] = multipletests(out["p"], method="fdr_bh")[1]
    return out


def logged(heuristics: pd.DataFrame) -> pd.DataFrame:
    """Lengths and the number of examples as ln(1 + x): they span three powers of ten, and one task
    of a thousand tokens would otherwise decide every slope. The ratios stay as they are."""
    ratios = ("similarity", "compressibility")
    return heuristics.apply(lambda x: x if x.name.startswith(ratios) else np.log1p(x))


def design(with_base: bool, log: bool = False) -> pd.DataFrame:
    """The 14 heuristics, and the average base score if wanted, not yet scaled; 31 rows."""
    x = logged(printed_heuristics()) if log else printed_heuristics()
    return x.assign(base_score=quality_measures()[BASE]) if with_base else x


def zscore(x: pd.DataFrame) -> pd.DataFrame:
    """(x − µ)/σ column by column, σ with n below."""
    return (x - x.mean()) / x.std(ddof=0)


def fitted_rmse(y, x: pd.DataFrame) -> float:
    """Root mean squared error of an ordinary least squares fit on the rows it was fitted to:
    √(Σ residual² / n)."""
    columns = np.column_stack([np.ones(len(x)), zscore(x)])
    residual = y - columns @ np.linalg.lstsq(columns, np.asarray(y), rcond=None)[0]
    return float(np.sqrt(np.mean(np.square(residual))))


def table_6() -> pd.DataFrame:
    """Table 6 as printed beside the fitted error of the same regression.

    Returns:
        A frame by measure: sigma (predicting the mean has this error), printed and fitted error
        without and with the base score, and `noise`: what 14 columns of noise would be expected to
        reach, σ·√((n − 15)/(n − 1)); `p` is the F test of the 14 heuristics together.
    """
    import pandas as pd
    from scipy import stats

    table = read_table(PAPER, "table_06")
    columns = table["column"].unique()
    rows = {}
    for measure, y in quality_measures().items():
        printed = table[table["row"] == measure].set_index("column")["value"]
        n, p = design(False).shape
        fitted, sigma = fitted_rmse(y, design(False)), float(y.std(ddof=0))
        f = ((sigma**2 - fitted**2) / p) / (fitted**2 / (n - p - 1))
        rows[measure] = {
            "sigma": sigma,
            "noise": sigma * np.sqrt((n - p - 1) / (n - 1)),
            "printed": printed[columns[0]],
            "fitted": fitted,
            "printed with base": printed[columns[1]],
            "fitted with base": fitted_rmse(y, design(True)),
            "p": float(stats.f.sf(f, p, n - p - 1)),
        }
    return pd.DataFrame(rows).T


def make_model(kind: str):
    """A scikit-learn regressor for one kind of `MODELS`.

    Ridge adds λ·Σβ² to the squared error; λ is chosen among 25 from 0.01 to 10,000 by leave-one-out
    on the training tasks alone.
    """
    from sklearn.dummy import DummyRegressor
    from sklearn.linear_model import LinearRegression, RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if kind == "mean":
        return DummyRegressor()
    last = RidgeCV(PENALTIES, alpha_per_target=True) if "ridge" in kind else LinearRegression()
    return make_pipeline(StandardScaler(), last)


def features_of(kind: str) -> pd.DataFrame:
    """The columns a kind of model sees.

    Raises:
        UnknownNameError: no such kind.
    """
    if kind not in MODELS:
        raise unknown_name("model", kind, MODELS)
    if kind == "base score":
        return design(True)[["base_score"]]
    return design(kind.endswith("+ base"), kind.startswith("log"))


def left_out_predictions(kind: str, measure: str) -> np.ndarray:
    """Each task's measure as predicted by a model fitted to the other 30 (scaling too).

    Args:
        kind: one of `MODELS`. measure: a column of `quality_measures`.
    """
    y = quality_measures()
    if measure not in y:
        raise unknown_name("measure", measure, list(y))
    return _left_out(kind)[:, list(y).index(measure)].copy()


@cache
def _left_out(kind: str) -> np.ndarray:
    """31 tasks × 7 measures: one fit serves all measures, each with a penalty of its own."""
    from sklearn.model_selection import LeaveOneOut, cross_val_predict

    x, y = features_of(kind).to_numpy(), quality_measures().to_numpy()
    return cross_val_predict(make_model(kind), x, y, cv=LeaveOneOut())


def leave_one_task_out(measures: list[str] | None = None, seed: int = 0) -> pd.DataFrame:
    """The error on tasks that were left out, for every kind of model and measure.

    The average base score is not predicted by models that are told it.

    Returns:
        A frame: measure, model, rmse, over_mean (rmse over that of predicting the mean of the other
        30 tasks; below 1 is better), low and high (95 % bootstrap over tasks of that ratio).
    """
    import pandas as pd

    y = quality_measures()
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(y), size=(4000, len(y)))
    rows = []
    for measure in measures or list(y):
        plain = np.square(left_out_predictions("mean", measure) - y[measure]).to_numpy()
        for kind in MODELS:
            if measure == BASE and "base" in kind:
                continue
            squared = np.square(left_out_predictions(kind, measure) - y[measure]).to_numpy()
            ratios = np.sqrt(squared[draws].mean(axis=1) / plain[draws].mean(axis=1))
            low, high = np.percentile(ratios, [2.5, 97.5])
            ratio = float(np.sqrt(squared.mean() / plain.mean()))
            rmse = float(np.sqrt(squared.mean()))
            rows.append((measure, kind, rmse, ratio, float(low), float(high)))
    return pd.DataFrame(rows, columns=["measure", "model", "rmse", "over_mean", "low", "high"])
