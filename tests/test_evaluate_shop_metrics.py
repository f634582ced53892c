"""The shop metrics: by hand, and against scikit-learn and torchmetrics."""

import itertools

import numpy as np
import pytest
import torch

from lora_kit.errors import BadInputError
from lora_kit.evaluate import shop_metrics as m
from lora_kit.evaluate.shop_metrics import UNREAD


def test_answers_are_read():
    assert [m.read_yes_no(a) for a in (" Yes.", "no", "NO, they differ", '"yes"')] == [
        *("yes", "no", "no", "yes")
    ]
    assert [m.read_yes_no(a) for a in ("", "yesterday", "maybe yes", "nothing")] == [UNREAD] * 4
    said = ("B", " (c) similar", "A: bought", "b.")
    assert [m.read_letter(a, "ABC") for a in said] == list("BCAB")
    assert [m.read_letter(a, "ABC") for a in ("D", "Both", "", "7", "Buy it")] == [UNREAD] * 5
    assert m.read_ranking("B, A,C", "ABC") == ("B", "A", "C")
    assert m.read_ranking("C > A > C > Z", "ABC") == ("C", "A")
    assert m.read_ranking("I cannot say", "ABC") == UNREAD


def test_json_is_taken_out_of_an_answer_or_missed_by_row():
    assert m.read_json('Sure: {"a": 1} as you see') == {"a": 1}
    assert m.read_json('[{"attribute": "x"}] and more') == [{"attribute": "x"}]
    for bad in ("no idea", '{"a": 1', "{'a': 1}", ""):
        with pytest.raises(BadInputError, match="row 7 is no JSON where JSON is due"):
            m.read_json(bad, "row 7")
    assert m.read_attributes('{"price": 3}') == {"price": 3}
    pairs = '[{"attribute": "Gauge", "value": "Light", "source": "title"}]'
    assert m.read_attributes(pairs) == {"gauge": "Light"}
    assert m.read_attributes("[1, 2]") == UNREAD
    assert m.read_attributes('[{"attribute": "Gauge"}]') == UNREAD
    assert m.read_attributes("12") == UNREAD


def test_f1_by_hand_and_an_unread_answer_never_pays():
    truth = ["yes", "yes", "yes", "no", "no"]
    given = ["yes", "yes", "no", "yes", "no"]
    assert m.f1(truth, given).value == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    # Where yes is due it is a miss, where no is due a false yes: 1 hit, 2 misses, 2 false.
    left_open = ["yes", UNREAD, "no", "yes", UNREAD]
    assert m.f1(truth, left_open).value == pytest.approx(2 / (2 + 2 + 2))
    assert m.f1(["no", "no"], ["no", "no"]).value == 0


def test_f1_and_macro_f1_are_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    labels = ["A", "B", "C", "D"]
    truth, given = (rng.choice(labels, 200, p=(0.6, 0.2, 0.15, 0.05)).tolist() for _ in "ab")
    wanted = metrics.f1_score(truth, given, average="macro", labels=labels)
    assert m.macro_f1(truth, given, labels).value == pytest.approx(wanted)
    some = [UNREAD if i % 7 == 0 else x for i, x in enumerate(given)]
    wanted = metrics.f1_score(truth, some, average="macro", labels=labels)
    assert m.macro_f1(truth, some, labels).value == pytest.approx(wanted)
    binary = [["yes" if x == "A" else "no" for x in side] for side in (truth, given)]
    assert m.f1(*binary).value == pytest.approx(metrics.f1_score(*binary, pos_label="yes"))


def test_macro_f1_by_hand():
    # A: 1 of 2 found, no false; B: found, 1 false; C: never due nor given.
    found = m.macro_f1(["A", "A", "B"], ["A", "B", "B"], ["A", "B", "C"])
    assert found.value == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    with pytest.raises(BadInputError, match=r"vocabulary A, B: X \(the first in row 2\)"):
        m.macro_f1(["A", "X"], ["A", "A"], ["A", "B"])


def test_f1_star_by_hand():
    """Six attributes of two products: NN, NV, VN, VC, VC, VW."""
    truth = [
        {"brand": None, "colour": None, "size": "10"},
        {"brand": "Acme", "price": 3.5, "size": "L"},
    ]
    given = [{"colour": "red"}, {"brand": " acme", "price": "3.50", "size": "XL", "weight": "9"}]
    counts = m.attribute_counts(truth, given)
    assert counts.tolist() == [[1, 1, 1, 0, 0], [0, 0, 0, 2, 1]]
    precision, recall = (1 + 2) / (1 + 1 + 2 + 1), (1 + 2) / 6
    wanted = 2 * precision * recall / (precision + recall)
    assert m.f1_star(truth, given).value == pytest.approx(wanted)
    # Null throughout: precision 1, recall the share of nulls.
    assert m.f1_star(truth, [{}, {}]).value == pytest.approx(2 * (2 / 6) / (1 + 2 / 6))
    assert m.f1_star(truth, truth).value == 1
    # What cannot be read misses everything, nulls too.
    missed = m.attribute_counts(truth, [UNREAD, UNREAD])
    assert missed.tolist() == [[0, 2, 1, 0, 0], [0, 0, 3, 0, 0]]
    assert m.f1_star(truth, [UNREAD, UNREAD]).value == 0


@pytest.mark.parametrize(
    ("due", "said", "wanted"),
    [
        (None, None, "NN"), (None, "none", "NN"), (None, "", "NN"), (None, "blue", "NV"),
        ("blue", None, "VN"), ("Blue", "blue ", "VC"), (10, "10.0", "VC"), ("blue", "red", "VW"),
        ("10", 10, "VC"), (0, None, "VN"), (True, "true", "VC"),
    ],
)  # fmt: skip
def test_outcomes_of_one_attribute(due, said, wanted):
    assert m.outcome(due, said) == wanted


def test_a_script_that_never_counts_answers_doubles_the_recall():
    entry = {"attribute": "gauge", "value": "light", "source": "title"}
    other = {**entry, "value": "heavy"}
    truth, given = [[entry], [entry], [entry], [entry]], [[entry], [entry, other], [other], []]
    right = m.entry_score(truth, given)
    assert right["recall"] == pytest.approx(2 / 4)
    assert right["precision"] == pytest.approx(2 / 4, abs=1e-5)
    slip = m.entry_score(truth, given, count_predictions=False)
    assert slip["f1"] == pytest.approx(2 * right["recall"], abs=1e-4)
    assert m.entry_score(truth, truth, count_predictions=False)["f1"] > 1.9  # no F1 at all


def test_ndcg_is_torchmetrics():
    """torchmetrics takes gains as they are and sorts by scores; ours takes labels and an order."""
    from torchmetrics.functional.retrieval import retrieval_hit_rate, retrieval_normalized_dcg

    labels = ["S", "I", "E", "C"]
    gain = torch.tensor([2 ** m.GAINS[x] - 1 for x in labels])
    for order in itertools.permutations(range(4)):
        scores = torch.tensor([4.0 - order.index(i) for i in range(4)])
        assert m.ndcg(order, labels) == pytest.approx(float(retrieval_normalized_dcg(scores, gain)))
        target = torch.tensor([x == "E" for x in labels])
        hit = float(retrieval_hit_rate(scores, target, top_k=1))
        assert m.hit_rate([order], [2]).value == hit
    assert m.mean_ndcg([(2, 0, 3, 1), ()], [labels, labels]).value == 0.5
    assert m.hit_rate([[], [1]], [0, 1]).value == 0.5


def test_intervals_cover_and_pairs_cancel():
    rng = np.random.default_rng(1)
    truth = ["yes" if x else "no" for x in rng.random(300) < 0.3]
    good = [t if x < 0.8 else "no" for t, x in zip(truth, rng.random(300), strict=True)]
    found = m.f1(truth, good)
    assert found.low < found.value < found.high
    assert 0.02 < found.high - found.low < 0.2
    counts = m.binary_counts(truth, good)
    same = m.difference_from_counts(counts, counts, m.f1_of)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    always = m.binary_counts(truth, ["yes"] * 300)
    worse = m.difference_from_counts(counts, always, m.f1_of)
    assert worse.high < 0
    assert worse.value == pytest.approx(m.f1(truth, ["yes"] * 300).value - found.value)
    with pytest.raises(BadInputError, match="same items: 300 and 299"):
        m.difference_from_counts(counts, counts[1:], m.f1_of)
    with pytest.raises(BadInputError, match="no answers"):
        m.f1([], [])
    with pytest.raises(BadInputError, match="1 answers for 2 questions"):
        m.f1(["yes", "no"], ["yes"])
