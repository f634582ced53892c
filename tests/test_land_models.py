"""Correlations, Table 6's regressions, and the error on tasks left out, against other libraries."""

import numpy as np
import pytest

from lora_kit.errors import UnknownNameError
from lora_kit.studies.land_models import (
    BASE,
    MODELS,
    correlations,
    design,
    features_of,
    fitted_rmse,
    leave_one_task_out,
    left_out_predictions,
    logged,
    make_model,
    table_6,
    zscore,
)
from lora_kit.studies.lora_land import printed_heuristics, quality_measures


@pytest.fixture(scope="module")
def pearson():
    return correlations()


def test_correlations_are_numpys_and_their_corrections_are_in_order(pearson):
    assert len(pearson) == 14 * 7
    x, y = printed_heuristics(), quality_measures()
    for row in pearson.itertuples():
        assert row.r == pytest.approx(np.corrcoef(x[row.heuristic], y[row.measure])[0, 1])
        assert row.low < row.r < row.high
        assert row.p <= row.q <= 1
        assert row.q <= row.p_holm + 1e-12
        # The interval leaves 0 out where p < 0.05, up to the two approximations' difference.
        if abs(row.p - 0.05) > 0.01:
            assert (row.low > 0 or row.high < 0) == (row.p < 0.05)


def test_fishers_interval_at_a_published_value(pearson):
    row = pearson[(pearson["heuristic"] == "similarity_std")].sort_values("r").iloc[0]
    z, half = np.arctanh(row["r"]), 1.959964 / np.sqrt(28)
    assert (row["low"], row["high"]) == pytest.approx((np.tanh(z - half), np.tanh(z + half)))


def test_what_survives_the_correction(pearson):
    assert (pearson["p"] < 0.05).sum() == 22
    assert (pearson["p_holm"] < 0.05).sum() == 0
    found = pearson[pearson["q"] < 0.05]
    assert len(found) == 8
    assert set(found["measure"]) == {"Best Fine-tuned Score", "Average Fine-Tuned Score"}
    assert (found["r"] < 0).all()


def test_what_the_text_says_of_figure_8(pearson):
    r = pearson.set_index(["heuristic", "measure"])["r"]
    best, mean = "Best Base Model Score", BASE
    # 0.36 lies between the two values, and −0.37 beyond both.
    assert r["compressibility_mean", best] == pytest.approx(0.33, abs=0.005)
    assert r["compressibility_mean", mean] == pytest.approx(0.40, abs=0.005)
    assert r["compressibility_std", best] == pytest.approx(-0.35, abs=0.005)
    assert r["compressibility_std", mean] == pytest.approx(-0.24, abs=0.005)
    # "Longer outputs correlate positively with the maximum lift over GPT-4": the sign is negative.
    assert r["output_mean", "Max GPT-4 Lift"] < -0.35
    assert r["output_std", "Max GPT-4 Lift"] < -0.35


def test_spearman_is_pearson_of_ranks():
    found = correlations("spearman").set_index(["heuristic", "measure"])
    x, y = printed_heuristics()["examples"].rank(), quality_measures()["GPT-4 Score"].rank()
    row = found.loc[("examples", "GPT-4 Score")]
    assert row["r"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    with pytest.raises(UnknownNameError, match="correlation 'kendall'"):
        correlations("kendall")


def test_table_6_is_the_error_on_the_fitted_tasks():
    found = table_6()
    assert len(found) == 7
    assert np.abs(found["fitted"] - found["printed"]).max() < 0.0011
    with_base = np.abs(found["fitted with base"] - found["printed with base"])
    assert with_base.max() < 0.0011
    assert found.loc[BASE, "fitted with base"] == pytest.approx(0, abs=1e-12)  # printed "N/A"
    assert (found["fitted"] < found["noise"]).all()
    assert (found["noise"] < found["sigma"]).all()


def test_fit_against_statsmodels():
    import statsmodels.api as sm

    y, x = quality_measures()["GPT-4 Score"], zscore(design(True))
    fit = sm.OLS(y, sm.add_constant(x)).fit()
    assert fitted_rmse(y, design(True)) == pytest.approx(np.sqrt(np.mean(fit.resid**2)))
    plain = sm.OLS(y, sm.add_constant(zscore(design(False)))).fit()
    assert table_6().loc["GPT-4 Score", "p"] == pytest.approx(plain.f_pvalue)


def test_left_out_means_not_seen():
    y = quality_measures()["Average Base Model Lift"].to_numpy()
    predicted = left_out_predictions("mean", "Average Base Model Lift")
    others = (y.sum() - y) / (len(y) - 1)
    assert predicted == pytest.approx(others)
    # By hand for one task: scaled and fitted on the other thirty.
    x = features_of("linear + base").to_numpy()
    keep = np.arange(31) != 7
    model = make_model("linear + base").fit(x[keep], y[keep])
    made = left_out_predictions("linear + base", "Average Base Model Lift")
    assert made[7] == pytest.approx(model.predict(x[[7]])[0])
    assert model.predict(x[keep])[3] != pytest.approx(made[3])


def test_one_fit_for_all_measures_is_a_fit_for_each():
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import LeaveOneOut, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from lora_kit.studies.land_models import PENALTIES

    x, y = features_of("ridge + base").to_numpy(), quality_measures()["GPT-4 Score"]
    alone = make_pipeline(StandardScaler(), RidgeCV(PENALTIES))
    made = cross_val_predict(alone, x, y, cv=LeaveOneOut())
    assert left_out_predictions("ridge + base", "GPT-4 Score") == pytest.approx(made)


def test_leave_one_task_out():
    found = leave_one_task_out(["Average Base Model Lift", BASE]).set_index(["measure", "model"])
    lift = found.loc["Average Base Model Lift"]
    assert list(lift.index) == list(MODELS)
    assert lift.loc["mean", "over_mean"] == 1
    assert lift.loc["linear", "over_mean"] > 4  # the paper's model, on tasks it has not seen
    assert lift.loc["log ridge", "over_mean"] > 1
    assert (lift["low"] <= lift["over_mean"]).all()
    assert (lift["over_mean"] <= lift["high"]).all()
    base = found.loc[BASE]
    assert not [kind for kind in base.index if "base" in kind]
    assert base.loc["log ridge", "high"] < 1  # what an untuned model reaches can be foretold


def test_logged_leaves_ratios_alone():
    x = printed_heuristics()
    made = logged(x)
    assert made["examples"].max() == pytest.approx(np.log(560001))
    assert made["compressibility_mean"].equals(x["compressibility_mean"])
    with pytest.raises(UnknownNameError, match="Did you mean 'log ridge"):
        features_of("log rige")
    with pytest.raises(UnknownNameError, match="measure"):
        left_out_predictions("mean", "Lift")
