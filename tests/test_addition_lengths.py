"""Sums by length: three readings of an answer, disjoint rows, the whole road on a tiny model."""

import pytest

from lora_kit.errors import BadInputError
from lora_kit.studies.addition_lengths import (
    addition_rows,
    digit_accuracy,
    edit_distance,
    measure_lengths,
    score_lengths,
)


@pytest.mark.parametrize(
    ("answer", "expected", "share", "edits"),
    [
        ("579", "579", 1, 0),
        ("570", "579", 2 / 3, 1),
        ("79", "579", 2 / 3, 1),  # the last digits are right
        ("1579", "579", 3 / 4, 1),
        ("", "579", 0, 3),
        ("9", "9", 1, 0),
        ("12345", "54321", 1 / 5, 4),
    ],
)
def test_readings_of_an_answer(answer, expected, share, edits):
    assert digit_accuracy(answer, expected) == pytest.approx(share)
    assert edit_distance(answer, expected) == edits
    assert edit_distance(expected, answer) == edits


def test_edit_distance_is_levenshteins():
    nltk = pytest.importorskip("nltk")
    for a, b in (("kitten", "sitting"), ("1234", "1324"), ("", ""), ("99", "100")):
        assert edit_distance(a, b) == nltk.edit_distance(a, b)


def test_rows_are_disjoint_and_even():
    train, test = addition_rows(2, 4, train=120, test=30, seed=0)
    counts = {k: sum(r["digits"] == k for r in train) for k in (1, 2, 3)}
    assert counts == {1: 120, 2: 120, 3: 0}
    assert {k: sum(r["digits"] == k for r in test) for k in (1, 2, 3, 4)} == {
        1: 20,  # a fifth of the 100 there are
        2: 30,
        3: 30,
        4: 30,
    }
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in test}
    for bad in ((0, 2, 1, 1), (3, 2, 1, 1), (1, 1, 0, 1)):
        with pytest.raises(BadInputError, match="at least 1"):
            addition_rows(*bad, seed=0)


def test_scores_by_length():
    rows = [
        {"digits": 1, "completion": "7"},
        {"digits": 1, "completion": "12"},
        {"digits": 2, "completion": "46"},
    ]
    one, two = score_lengths(["7", "is 13.", "none"], rows)
    assert (one["digits"], one["n"], one["exact"]) == (1, 2, 0.5)
    assert one["digit_accuracy"] == pytest.approx(0.75)
    assert one["edit_distance"] == pytest.approx(0.5)
    assert one["low"] < 0.5 < one["high"]
    assert (two["exact"], two["edit_distance"]) == (0, 2)


def test_the_whole_road(tiny_folder, tmp_path):
    record = measure_lengths(
        str(tiny_folder),
        *(1, 2, 8, 2, 0, "command"),
        rows_a_step=4,
        output=tmp_path / "adapter",
        steps=2,
        rank=2,
        alpha=2,
        quantization="none",
    )
    assert record.study == "addition_lengths"
    assert record.parameters["most_trained"] == 1
    assert record.parameters["batch_size"] == 4
    for table in (record.tables["base"], record.tables["tuned"]):
        assert [row["digits"] for row in table] == [1, 2]
        assert [row["n"] for row in table] == [2, 2]
    assert 0 <= record.metrics["exact_beyond"] <= 1
    assert record.versions["lora-kit"]
