"""Product pairs: checked, divided without leaks, made into questions; a table of one's own."""

import json
from collections import Counter

import pytest

from lora_kit.errors import BadInputError, NotAvailableError, UnknownNameError
from lora_kit.evaluate.shop_metrics import read_json
from lora_kit.shop_products import (
    CANDIDATES,
    PARTS,
    TASKS,
    check_pair,
    check_price,
    divide,
    generated_pairs,
    load_pairs,
    maker_in_title,
    maker_key,
    names_any,
    questions,
    read_pairs,
    words,
)

PAIRS = generated_pairs()


def pair(left="a 1.0", right="a v1", label=1, maker="acme software", price=9.99):
    listing = {"title": left, "manufacturer": maker, "price": price}
    return {
        "left": listing,
        "right": {**listing, "title": right, "manufacturer": ""},
        "label": label,
    }


def test_no_part_shares_a_product_and_outside_shares_no_manufacturer():
    for seed in range(5):
        shop = divide(PAIRS, seed)
        lefts = [{p["left"]["title"] for p in shop.part(name)} for name in PARTS]
        for i, some in enumerate(lefts):
            assert not any(some & other for other in lefts[i + 1 :])
        for name in ("train", "validation", "inside"):
            assert not any(names_any(p, shop.held_out) for p in shop.part(name))
        assert {maker_key(p["left"]["manufacturer"]) for p in shop.outside} == set(shop.held_out)
        inside = {maker_key(p["left"]["manufacturer"]) for p in shop.inside}
        assert inside <= {maker_key(p["left"]["manufacturer"]) for p in shop.train}
        assert 0.15 < len(shop.outside) / len(PAIRS) < 0.3
    assert divide(PAIRS, 1) == divide(PAIRS, 1)
    assert divide(PAIRS, 1).held_out != divide(PAIRS, 2).held_out


def test_titles_that_name_a_held_out_manufacturer_are_left_out():
    houses = [pair(f"x {i}", f"y {i}", i // 10 % 2, f"house{i % 10}") for i in range(200)]
    named = [pair(f"tool for house{k}", "z", k % 2, "other") for k in range(10)]
    named += [pair(f"another {i}", f"one {i}", i % 2, "other") for i in range(60)]
    shops = [divide(houses + named, seed) for seed in range(4)]
    shops = [shop for shop in shops if "other" not in shop.held_out]
    assert shops
    for shop in shops:
        assert shop.dropped == {"names a held-out manufacturer": len(shop.held_out)}
    assert not names_any(pair("a house", "b"), ["house1"])
    assert names_any(pair("a house1", "b"), ["house1"])


def test_twice_and_contradicting_pairs():
    more = [PAIRS[0], {**PAIRS[1], "label": 1 - PAIRS[1]["label"]}]
    shop = divide(PAIRS + more, 0)
    assert (shop.dropped["stands twice"], shop.dropped["both labels"]) == (1, 2)
    with pytest.raises(BadInputError, match="too few to divide"):
        divide(PAIRS[:6], 0)
    with pytest.raises(UnknownNameError, match="part"):
        shop.part("dev")


def test_questions_of_each_task():
    shop = divide(PAIRS, 0)
    match = questions("match", shop.inside)
    assert len(match) == len(shop.inside)
    assert all((q["completion"] == " yes") == bool(q["truth"]) for q in match)
    drawn = questions("match_random", shop.inside)
    assert Counter(q["truth"] for q in drawn) == {0: len(drawn) // 2, 1: len(drawn) // 2}
    same = {(p["left"]["title"], p["right"]["title"]) for p in shop.inside if p["label"]}
    for q in drawn:
        ends = q["pair"]["left"]["title"], q["pair"]["right"]["title"]
        assert (ends in same) == bool(q["truth"])
    for q in questions("rank", shop.inside):
        assert [p["label"] for p in q["pairs"]].index(1) == q["truth"]
        assert len(q["pairs"]) == CANDIDATES
        assert len({p["left"]["title"] for p in q["pairs"]}) == 1
        letter = q["completion"].strip()
        assert f"{letter}: {q['pairs'][q['truth']]['right']['title']}" in q["prompt"]
    for q in questions("extract", shop.inside):
        assert read_json(q["completion"]) == q["truth"]
        named = q["truth"]["manufacturer"]
        assert named is None or named in q["listing"]
        assert (q["truth"]["price"] is None) == ("USD" not in q["listing"])
    assert questions("match", shop.inside, most=7, seed=3) == match_of(shop, 3)[:7]
    with pytest.raises(UnknownNameError, match=r"matches.*Did you mean 'match'"):
        questions("matches", shop.inside)
    with pytest.raises(BadInputError, match="make no question of the task rank"):
        questions("rank", shop.inside[:1])
    assert set(TASKS) == {"match", "match_random", "extract", "rank"}


def match_of(shop, seed):
    return questions("match", shop.inside, seed)


def test_the_manufacturer_as_the_title_spells_it():
    assert maker_in_title("Adobe Premiere CS3", "adobe systems inc.") == "adobe"
    assert maker_in_title("final draft 7", "final draft software") == "final draft"
    assert maker_in_title("photoshop", "adobe") is None
    assert maker_in_title("upgrade", "") is None
    assert maker_key("The Learning Company") == "learning"
    assert maker_key("microsoft licenses") == maker_key("Microsoft Software") == "microsoft"
    assert words("H&R Block 2.0") == ["h", "r", "block", "2", "0"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"left": {"title": " "}}, "row 5: the left title is empty"),
        ({"left": {"title": "a", "price": "cheap"}}, "row 5, left price 'cheap' is no number"),
        ({"left": {"title": "a", "price": "19,99"}}, "'19,99' is no number; write 19.99"),
        ({"label": 2}, "row 5: the label must be one of 0, 1, no, yes, not 2"),
        ({"label": None}, "not None"),
        ({"right": "b"}, "row 5 has no right product"),
    ],
)
def test_faulty_pairs_are_named(changes, says):
    with pytest.raises(BadInputError, match=says):
        check_pair({**pair(), **changes}, "row 5")


def test_prices():
    assert check_price("", "x") is None
    assert check_price(" 1200.50 ", "x") == 1200.5
    for bad in ("nan", "inf", "-1", True, "12 USD"):
        with pytest.raises(BadInputError, match="is no number"):
            check_price(bad, "x")


def test_a_table_of_ones_own(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(
        "left_title,right_title,label,left_price\nblue mug,mug (blue),yes,4.50\nmug,plate,no,\n"
    )
    first, second = read_pairs(path)
    assert first == {
        "left": {"title": "blue mug", "manufacturer": "", "price": 4.5},
        "right": {"title": "mug (blue)", "manufacturer": "", "price": None},
        "label": 1,
    }
    assert second["label"] == 0
    path.write_text("left_title,right,label\na,b,yes\n")
    with pytest.raises(BadInputError, match=r"mine.csv row 1 lacks right_title; the columns are"):
        read_pairs(path)
    path.write_text("left_title,right_title,label\na,b,yes\na,,no\n")
    with pytest.raises(BadInputError, match=r"mine.csv row 2: the right title is empty"):
        read_pairs(path)
    path.write_text("left_title,right_title,label\na,b,same\n")
    with pytest.raises(BadInputError, match="row 1: the label must be one of"):
        read_pairs(path)
    rows = tmp_path / "mine.jsonl"
    rows.write_text(json.dumps(pair()) + "\n")
    assert load_pairs(str(rows))[0]["left"]["manufacturer"] == "acme software"
    with pytest.raises(NotAvailableError, match="amazon_google"):
        load_pairs()


@pytest.mark.data
def test_amazon_google_divides_without_leaks():
    pairs = load_pairs()
    assert len(pairs) == 11_460
    shop = divide(pairs, 0)
    titles = [{p["left"]["title"] for p in shop.part(n)} for n in PARTS]
    assert not titles[0] & (titles[1] | titles[2] | titles[3])
    assert not any(names_any(p, shop.held_out) for p in shop.train)
    assert sum(len(shop.part(n)) for n in PARTS) + sum(shop.dropped.values()) == len(pairs)
