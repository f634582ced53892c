"""The addition study: scores of answers, and cells from rows to a record on a tiny model."""

import random

import pytest
import torch

from lora_kit import store
from lora_kit.arithmetic import in_form, operands
from lora_kit.errors import BadInputError, UnknownNameError
from lora_kit.lora import read_adapter
from lora_kit.skills import draw_skill
from lora_kit.studies import arithmetic_cells, arithmetic_scores
from lora_kit.studies.arithmetic_cells import (
    DEFAULTS,
    check_answers,
    check_setting,
    improve,
    round_rows,
    run_cell,
    sums,
)
from lora_kit.studies.records import read_record, write_record

ROWS = in_form(draw_skill("addition", (2, 3), 50, 0).rows, "plain")
SMALL = dict(
    most_trained=2,
    most_tested=3,
    train_rows=20,
    test_rows=6,
    steps=2,
    rows_a_step=4,
    rank=4,
    quantization="none",
)


def spoiled(share):
    """Right answers, of which a share has one digit replaced by another."""
    rng, found = random.Random(0), []
    for row in ROWS:
        text = list(row["sum"])
        if rng.random() < share:
            i = rng.randrange(len(text))
            text[i] = str((int(text[i]) + rng.randint(1, 9)) % 10)
        found.append("".join(text))
    return found


def test_scores_by_length_place_and_carries_agree():
    answers = spoiled(0.4)
    lengths = arithmetic_scores.by_length(answers, ROWS)
    pairs = [operands(row) for row in draw_skill("addition", (2, 3), 50, 0)]
    chains = arithmetic_scores.by_carries(answers, ROWS, pairs)
    items = {row["digits"]: row["scores"] for row in arithmetic_scores.bits(answers, ROWS)}
    places = arithmetic_scores.by_place(answers, ROWS)
    for row in lengths:
        k, right = row["digits"], round(row["exact"] * row["n"])
        assert row["low"] < row["exact"] < row["high"]
        assert row["n"] == 50
        assert right + sum(row[kind] for kind in ("unreadable", "length", "carry", "other")) == 50
        assert sum(c["right"] for c in chains if c["digits"] == k) == right
        assert sum(c["n"] for c in chains if c["digits"] == k) == 50
        assert items[k].count("1") == right
        # One digit is wrong in each wrong answer, so the places' errors add up to them.
        wrong = sum(p["n"] * (1 - p["right"]) for p in places if p["digits"] == k)
        assert wrong == pytest.approx(50 - right)


def test_product_of_places_is_exact_for_independent_digits():
    rng = random.Random(1)
    rows = [{"digits": 2, "sum": "345"} for _ in range(4000)]
    answers = [
        "".join(d if rng.random() < p else "0" for d, p in zip("345", (0.9, 0.7, 0.8), strict=True))
        for _ in rows
    ]
    places = arithmetic_scores.by_place(answers, rows)
    exact = arithmetic_scores.by_length(answers, rows)[0]["exact"]
    assert arithmetic_scores.if_independent(places, 2) == pytest.approx(exact, abs=0.02)
    assert arithmetic_scores.if_independent(places, 9) is None
    all_or_none = ["345" if rng.random() < 0.5 else "000" for _ in rows]
    dependent = arithmetic_scores.by_place(all_or_none, rows)
    assert arithmetic_scores.if_independent(dependent, 2) == pytest.approx(0.125, abs=0.02)


def test_edge_and_largest_step():
    rows = [
        {"digits": k, "exact": e, "digit_accuracy": d, "edit_distance": m}
        for k, e, d, m in [(1, 1, 1, 0), (2, 0.9, 0.95, 0.2), (3, 0.1, 0.8, 1), (4, 0.6, 0.7, 2)]
    ]
    assert arithmetic_scores.edge(rows) == 2, "a length beyond a gap does not count"
    assert arithmetic_scores.largest_step(rows, "exact") == (2, pytest.approx(0.8))
    assert arithmetic_scores.largest_step(rows, "digit_accuracy") == (2, pytest.approx(0.15))
    # Per digit: 0, 0.2/3, 1/4, 2/5.
    assert arithmetic_scores.largest_step(rows, "edit_distance")[0] == 2
    assert arithmetic_scores.largest_step(rows[:1], "exact") == (0, 0.0)


def test_settings_are_checked_before_anything_runs():
    check_setting(DEFAULTS)
    with pytest.raises(UnknownNameError, match="scratchpad"):
        check_setting(DEFAULTS | {"method": "scratch"})
    with pytest.raises(BadInputError, match="shots"):
        check_setting(DEFAULTS | {"shots": 4})
    with pytest.raises(BadInputError, match="25 digits"):
        check_setting(DEFAULTS | {"method": "hinted", "most_tested": 26})


def test_a_record_names_the_grid_it_is_from():
    from lora_kit.studies.arithmetic_cells import GRIDS, command
    from lora_kit.studies.sweep_grid import read_grid, settings_of

    for grid in GRIDS:
        for setting in settings_of(read_grid(store.repository() / grid)):
            values = DEFAULTS | setting
            check_setting(values)
            assert command(values) == f"lora-kit sweep arithmetic --grid {grid}"
    assert "GRID" in command(DEFAULTS | {"steps": 3})


def test_methods_share_their_held_out_sums():
    values = DEFAULTS | SMALL
    train, test = sums(values, 3)
    assert {r["prompt"] for r in train} & {r["prompt"] for r in test} == set()
    other = sums(values | {"method": "reversed", "train_rows": 9}, 3)[1]
    assert other == test


def test_the_filter_of_own_answers_sees_no_truth():
    keep = check_answers
    assert keep(["46", "46", "146"], ["46", "47", "146"], 2, "plain") == [True, False, True]
    assert keep(["246"], ["246"], 2, "plain") == [False], "a carry is 1 at most"
    assert keep(["046", "4"], ["046", "4"], 2, "plain") == [False, False]
    assert keep(["46 apples", ""], ["46 apples", ""], 2, "plain") == [False, False]
    assert keep(["64"], ["64"], 2, "reversed") == [True]
    assert keep(["7+8+0=15;5+6+1=12;1"], ["8+7+0=15;6+5+1=12;1"], 2, "scratchpad") == [True]


def test_round_rows_are_half_true():
    true = [{"prompt": "1+1=", "completion": "2"}]
    longer = {3: [{"prompt": "old", "completion": "3"}], 4: [{"prompt": "new", "completion": "4"}]}
    drawn = [row["prompt"] for row in round_rows(true, longer, 40, 0)]
    assert {p: drawn.count(p) for p in ("1+1=", "new", "old")} == {"1+1=": 20, "new": 10, "old": 10}


@pytest.mark.parametrize("method", ["base", "hinted"])
def test_a_cell_leaves_a_record_and_carries_on(method, tiny_folder, tmp_path, monkeypatch):
    values = SMALL | {"model": str(tiny_folder), "method": method, "form": "plain"}
    record = run_cell(values | ({"shots": 1} if method == "base" else {}), 0, tmp_path / "cell")
    write_record(record, tmp_path / "r.json")
    assert read_record(tmp_path / "r.json").tables["lengths"] == record.tables["lengths"]
    assert [row["digits"] for row in record.tables["lengths"]] == [1, 2, 3]
    assert record.metrics["exact_beyond"].n == 6
    assert record.metrics["exact_within"].n == 12
    assert len(record.tables["answers"]) == 3
    assert record.seed == 0
    # What is there is not done again.
    monkeypatch.setattr(arithmetic_cells, "answer", None)
    again = run_cell(values | ({"shots": 1} if method == "base" else {}), 0, tmp_path / "cell")
    assert again.tables == record.tables


def test_self_improvement_learns_from_answers_that_agree(tiny_folder, tmp_path, monkeypatch):
    """A model that adds well but for one sum in five: what disagrees with itself is dropped."""
    values = DEFAULTS | SMALL | {"model": str(tiny_folder), "method": "self_improvement"}
    values |= {"form": "plain", "rounds": 2, "round_rows": 80, "round_steps": 1}
    asked = []

    def answer(model, tokenizer, rows, form, batch_size=0):
        asked.append(rows[0]["digits"])
        said = []
        for row in rows:
            a, b = operands(row)
            slip = int(a) % 5 == 0  # depends on what stands first
            said.append(str(int(a) + int(b) + (10 if slip else 0)))
        return said

    monkeypatch.setattr(arithmetic_cells, "answer", answer)
    rows = in_form(sums(values, 0)[0], "plain")
    loaded, _ = arithmetic_cells.tuned(values, 0, tmp_path, rows)
    told = improve(values, 0, tmp_path, loaded, rows, say=lambda _: None)
    assert [row["digits"] for row in told] == [3, 4]
    assert asked == [3, 3, 4, 4]
    for row in told:
        # Slips on one side only are caught; those on both sides agree and are kept: 4 % of all.
        assert 40 < row["kept"] < 70
        assert row["true_among_kept"] >= row["kept"] - 10
    kept = store.read_json(tmp_path / "round-01" / "round.json")["kept"]
    assert sum(bool(text) for text in kept) == told[0]["kept"]
    one, two = (read_adapter(tmp_path / f"round-0{j}").tensors for j in (1, 2))
    assert any(not torch.equal(one[k]["lora_B"], two[k]["lora_B"]) for k in one), "a round trains"
    # A second call takes the finished rounds from the folder.
    fresh, _ = arithmetic_cells.tuned(values, 0, tmp_path, rows)
    assert improve(values, 0, tmp_path, fresh, rows, say=lambda _: None) == told
    assert asked == [3, 3, 4, 4]
