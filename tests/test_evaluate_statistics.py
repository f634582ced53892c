"""Statistics of scores, against scipy, lm-eval and values worked by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.metrics import mean_stderr
from scipy import stats

from lora_kit.errors import BadInputError
from lora_kit.evaluate.statistics import (
    bootstrap,
    estimate,
    holm,
    items_needed,
    mcnemar,
    paired_difference,
    proportion,
    ratio,
    standard_error,
    unpaired_difference,
    wilson,
)

Z = stats.norm.ppf(0.975)


def binary(n, p, seed):
    return (np.random.default_rng(seed).random(n) < p).astype(int).tolist()


def test_wilson_at_no_success_is_the_value_worked_by_hand():
    low, high = wilson(0, 10)
    assert low == 0.0
    assert high == pytest.approx(Z**2 / (10 + Z**2))  # 0.2775


@given(st.integers(1, 400), st.data())
@settings(max_examples=60, deadline=None)
def test_wilson_agrees_with_scipy_and_holds_its_share(n, data):
    k = data.draw(st.integers(0, n))
    low, high = wilson(k, n)
    ours = stats.binomtest(k, n).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((ours.low, ours.high), abs=1e-12)
    assert 0 <= low <= k / n <= high <= 1
    assert low < high


def test_proportion_of_37_in_50():
    found = proportion(37, 50)
    assert found.value == 0.74
    assert found.stderr == pytest.approx(math.sqrt(0.74 * 0.26 / 49))
    assert (found.low, found.high) == pytest.approx((0.6045, 0.8413), abs=5e-5)
    assert found.to_metric() == {
        "value": 0.74,
        "stderr": found.stderr,
        "low": found.low,
        "high": found.high,
        "n": 50,
    }


def test_standard_error_is_scipys_and_lm_evals():
    scores = binary(73, 0.3, seed=1)
    assert standard_error(scores) == pytest.approx(stats.sem(scores))
    assert standard_error(scores) == pytest.approx(mean_stderr(scores))
    assert estimate(scores).stderr == pytest.approx(mean_stderr(scores))
    assert standard_error([1.0]) is None


def test_estimate_takes_wilson_for_right_and_wrong_and_the_bootstrap_for_the_rest():
    scores = binary(40, 0.5, seed=2)
    found = estimate(scores)
    assert (found.low, found.high) == wilson(sum(scores), 40)
    lengths = np.random.default_rng(3).normal(5, 2, 400).tolist()
    found = estimate(lengths)
    half = Z * stats.sem(lengths)
    assert found.low == pytest.approx(found.value - half, abs=0.1 * half)
    assert found.high == pytest.approx(found.value + half, abs=0.1 * half)


def test_bootstrap_repeats_itself_and_knows_no_spread_where_there_is_none():
    scores = np.random.default_rng(4).exponential(1, 60).tolist()
    assert bootstrap(scores, seed=5) == bootstrap(scores, seed=5)
    assert bootstrap(scores, seed=5) != bootstrap(scores, seed=6)
    assert bootstrap([0.5, 0.5, 0.5]) == (0.5, 0.5)


def test_bootstrap_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(7)
    hits = 0
    for run in range(150):
        low, high = bootstrap(rng.exponential(1, 50), seed=run)
        hits += low <= 1 <= high
    assert 130 <= hits <= 149  # 95 % of 150 is 142.5, a little less for 50 skewed values


def test_mcnemar_by_hand():
    base = [1] * 5 + [1] * 1 + [0] * 6 + [0] * 3
    tuned = [1] * 5 + [0] * 1 + [1] * 6 + [0] * 3
    found = mcnemar(base, tuned)
    assert (found.both, found.only_base, found.only_tuned, found.neither) == (5, 1, 6, 3)
    assert found.p == pytest.approx(2 * (1 + 7) / 2**7)  # 0.125


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_mcnemar_is_the_binomial_test_of_the_disagreements(pairs):
    base, tuned = zip(*pairs, strict=True)
    found = mcnemar(base, tuned)
    b, c = found.only_base, found.only_tuned
    assert found.both + b + c + found.neither == len(pairs)
    expected = 1.0 if b + c == 0 else stats.binomtest(b, b + c).pvalue
    assert found.p == pytest.approx(expected)
    assert mcnemar(tuned, base).p == pytest.approx(found.p)


def test_pairing_narrows_the_interval_where_the_two_agree_on_most_items():
    base = binary(200, 0.5, seed=8)
    tuned = list(base)
    for i in [i for i, right in enumerate(base) if not right][:12]:
        tuned[i] = 1
    paired = paired_difference(base, tuned)
    unpaired, p = unpaired_difference(base, tuned)
    assert [paired.value, unpaired.value] == pytest.approx([0.06, 0.06])
    assert paired.high - paired.low < 0.5 * (unpaired.high - unpaired.low)
    assert paired.low > 0 > unpaired.low
    assert mcnemar(base, tuned).p < 0.001 < 0.1 < p


def test_paired_difference_without_any_disagreement_still_has_a_width():
    base = binary(30, 0.5, seed=9)
    found = paired_difference(base, base)
    assert (found.value, found.low, found.high) == (0, -wilson(0, 30)[1], wilson(0, 30)[1])
    found = paired_difference([0] * 30, [1] * 30)
    assert (found.value, found.low, found.high) == (1, 1 - 2 * wilson(0, 30)[1], 1)
    found = paired_difference([0.25] * 9, [0.5] * 9)
    assert (found.value, found.low, found.high) == (0.25, 0.25, 0.25)


def test_unpaired_difference_is_newcombes_published_example():
    tuned, base = [1] * 56 + [0] * 14, [1] * 48 + [0] * 32
    found, p = unpaired_difference(base, tuned)
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)  # Newcombe 1998
    assert found.stderr == pytest.approx(math.hypot(stats.sem(tuned), stats.sem(base)))
    assert found.n == 150
    assert 0.005 < p < 0.02
    _, p = unpaired_difference([1, 0, 0, 0], [1, 1, 1, 0])
    assert p == pytest.approx(34 / 70)  # Fisher's tea-tasting table


def test_items_needed_by_hand():
    # 0.5 against 0.6 at 80 %: (1.96·√(2·0.55·0.45) + 0.8416·√(0.25 + 0.24))²/0.01 = 387.3
    assert items_needed(0.1, base=0.5) == 388
    assert items_needed(-0.1, base=0.6) == 388
    # ψ = 0.2, d = 0.1: (1.96·√0.2 + 0.8416·√0.19)²/0.01 = 154.6
    assert items_needed(0.1, disagreement=0.2) == 155
    assert items_needed(0.02, base=0.4) > 20 * items_needed(0.1, base=0.4)
    assert items_needed(0.1, power=0.9) > items_needed(0.1, power=0.8)


def test_items_needed_gives_the_power_it_promises():
    rng = np.random.default_rng(10)
    n = items_needed(0.1, base=0.5)
    a, b = rng.binomial(n, 0.5, 4000) / n, rng.binomial(n, 0.6, 4000) / n
    mean = (a + b) / 2
    z = (b - a) / np.sqrt(2 * mean * (1 - mean) / n)
    assert (abs(z) > Z).mean() == pytest.approx(0.8, abs=0.02)
    n = items_needed(0.1, disagreement=0.2)
    counts = rng.multinomial(n, [0.15, 0.05, 0.8], 4000)
    z = (counts[:, 0] - counts[:, 1]) / np.sqrt(counts[:, 0] + counts[:, 1])
    # Whole disagreements come in steps, and Connor's formula errs on the safe side by a little.
    assert (abs(z) > Z).mean() == pytest.approx(0.815, abs=0.025)


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        ([], "empty"),
        ([1, float("nan"), 0], "position 1"),
        ([1, float("inf")], "finite"),
        ([[1, 0], [0, 1]], "2 dimensions"),
        (["right", "wrong"], "numbers"),
        ([None], "finite"),
    ],
)
def test_scores_that_are_none_are_refused(scores, says):
    for function in (estimate, standard_error, bootstrap):
        with pytest.raises(BadInputError, match=says):
            function(scores)
    with pytest.raises(BadInputError, match=says):
        paired_difference(scores, scores)


def test_pairs_must_be_pairs_and_right_or_wrong():
    with pytest.raises(BadInputError, match="base has 3, tuned 2"):
        paired_difference([1, 0, 1], [1, 0])
    with pytest.raises(BadInputError, match="base has 3, tuned 2"):
        mcnemar([1, 0, 1], [1, 0])
    with pytest.raises(BadInputError, match="tuned has others"):
        mcnemar([1, 0], [0.5, 1])
    with pytest.raises(BadInputError, match="0 and 1"):
        unpaired_difference([1, 0], [2, 1])


@pytest.mark.parametrize(
    "call",
    [
        lambda: wilson(3, 2),
        lambda: wilson(-1, 2),
        lambda: wilson(0, 0),
        lambda: wilson(1.5, 2),
        lambda: wilson(1, 2, confidence=95),
        lambda: bootstrap([1, 0], confidence=0),
        lambda: items_needed(0),
        lambda: items_needed(float("nan")),
        lambda: items_needed(0.6, base=0.5),
        lambda: items_needed(0.1, disagreement=0.05),
        lambda: items_needed(0.1, disagreement=1.1),
        lambda: items_needed(0.1, power=1),
    ],
)
def test_values_out_of_range_are_refused(call):
    with pytest.raises(BadInputError):
        call()


def test_holm_is_the_step_down_procedure_written_out():
    rng = np.random.default_rng(0)
    for m in (1, 2, 7):
        ps = rng.random(m) ** 2
        order, running, expected = np.argsort(ps), 0.0, [0.0] * m
        for i, at in enumerate(order):
            running = max(running, min(1.0, (m - i) * ps[at]))
            expected[at] = running
        assert holm(list(ps)) == pytest.approx(expected)
    for odd in ([], [0.5, 1.5], [float("nan")]):
        with pytest.raises(BadInputError):
            holm(odd)


def test_a_ratio_is_of_the_sums_and_its_interval_covers():
    found = ratio([1.0, 4.0], [2.0, 2.0])
    assert (found.value, found.n) == (1.25, 2)
    rng, inside = np.random.default_rng(1), 0
    for seed in range(40):
        w = rng.integers(5, 50, 60)
        x = 0.7 * w + rng.normal(0, 3, 60)
        one = ratio(x, w, seed=seed)
        assert one.low < one.value < one.high
        inside += one.low <= 0.7 <= one.high
    assert inside >= 33
    assert ratio([3.0], [2.0]).stderr is None
    with pytest.raises(BadInputError, match="positive"):
        ratio([1.0, 1.0], [1.0, 0.0])


@pytest.mark.parametrize("shares", [(0.1, 0.8, 0.1), (0.3, 0.2, 0.5), (0.005, 0.985, 0.01)])
def test_bootstrap_from_counts_is_scipys(shares):
    """Many scores of few values: another way to the same interval, as far as 9,999 draws tell."""
    from scipy import stats

    values = np.random.default_rng(4).choice([-1.0, 0.0, 1.0], p=shares, size=2000)
    counted = bootstrap(values)
    found = stats.bootstrap((values,), np.mean, n_resamples=9999, method="BCa", batch=500, rng=1)
    error = values.std() / np.sqrt(len(values))
    assert counted == pytest.approx(tuple(found.confidence_interval), abs=0.1 * error)
    assert counted[0] < values.mean() < counted[1]
    means = np.mean(np.random.default_rng(5).choice([-1.0, 0.0, 1.0], size=(3, 2000)), axis=0)
    found = stats.bootstrap((means,), np.mean, n_resamples=9999, method="BCa", batch=500, rng=1)
    error = means.std() / np.sqrt(len(means))
    assert bootstrap(means) == pytest.approx(tuple(found.confidence_interval), abs=0.1 * error)
    # A skewed one leans to the longer tail, which a symmetric interval would not.
    rare = np.r_[np.zeros(1990), np.ones(10)]
    low, high = bootstrap(rare)
    assert high - rare.mean() > 1.2 * (rare.mean() - low)
