"""Generated rows: exact digits, distinct, disjoint, the same from the same seed."""

import re
from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kit.errors import BadInputError, UnknownNameError
from lora_kit.skills import DIGITS, SKILLS, WORDS, draw_skill, train_and_test

ks = st.integers(1, 40)
seeds = st.integers(0, 2**32)


def check(name, row):
    """Recompute a row from its prompt alone."""
    k, prompt, answer = row["digits"], row["prompt"], row["completion"]
    if name in ("addition", "subtraction"):
        a, sign, b = re.fullmatch(r"(\d+)([+-])(\d+)=", prompt).groups()
        for operand in (a, b):
            assert len(operand) == k
            assert k == 1 or operand[0] != "0"
        assert sign == {"addition": "+", "subtraction": "-"}[name]
        assert answer == str(int(a) + int(sign + b))
        assert int(answer) >= 0
    elif name == "case":
        (text,) = re.fullmatch(r"upper ([a-z ]+)=", prompt).groups()
        assert len(text.split(" ")) == k
        assert set(text.split(" ")) <= set(WORDS)
        assert answer == text.upper()
    elif name == "dates":
        year, month, day = re.fullmatch(r"date (\d+)-(\d\d)-(\d\d)=", prompt).groups()
        assert len(year) == k
        written = datetime.strptime(f"2001-{month}-{day}", "%Y-%m-%d")  # no leap year
        assert answer == f"{written.day} {written:%B} {year}"
    else:
        word = {"reversal": "reverse", "sorting": "sort", "spelling": "spell"}.get(name, name)
        (text,) = re.fullmatch(rf"{word} (\d+)=", prompt).groups()
        assert len(text) == k
        wanted = {
            "reversal": "".join(text[-1 - i] for i in range(k)),
            "sorting": "".join(d * text.count(d) for d in "0123456789"),
            "largest": str(max(int(d) for d in text)),
            "spelling": " ".join(DIGITS[int(d)] for d in text),
        }
        assert answer == wanted[name]


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from(sorted(SKILLS)), k=ks, seed=seeds, n=st.integers(1, 10))
def test_rows_are_right_exact_and_distinct(name, k, seed, n):
    rows = draw_skill(name, k, n, seed).rows
    assert len(rows) == len({r["prompt"] for r in rows}) == n
    for row in rows:
        assert set(row) == {"prompt", "completion", "digits"}
        assert row["digits"] == k
        check(name, row)


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(sorted(SKILLS)),
    lengths=st.lists(ks, min_size=1, max_size=3, unique=True),
    train=st.integers(1, 30),
    test=st.integers(1, 9),
    seed=seeds,
)
def test_train_and_test_are_disjoint(name, lengths, train, test, seed):
    some, others = train_and_test(name, lengths, train, test, seed)
    assert not {r["prompt"] for r in some} & {r["prompt"] for r in others}
    for k in lengths:
        space = SKILLS[name].space(k)
        assert sum(r["digits"] == k for r in others) == test
        assert sum(r["digits"] == k for r in some) == min(train, space - test)
    again = train_and_test(name, lengths, train, test, seed)
    assert (again[0].rows, again[1].rows) == (some.rows, others.rows)


def test_thirty_digits():
    train, test = train_and_test("addition", 30, 200, 50, seed=0)
    for row in (*train, *test):
        check("addition", row)
    assert len({r["prompt"] for r in (*train, *test)}) == 250


@pytest.mark.parametrize(
    ("name", "k", "size"),
    [("addition", 1, 100), ("reversal", 1, 10), ("subtraction", 2, 4095), ("dates", 1, 3650)],
)
def test_a_whole_space_is_drawn_once_each(name, k, size):
    assert SKILLS[name].space(k) == size
    rows = draw_skill(name, k, size, 3).rows
    assert len({r["prompt"] for r in rows}) == size
    for row in rows:
        check(name, row)
    if name == "addition":
        wanted = {f"{a}+{b}={a + b}" for a in range(10) for b in range(10)}
        assert {r["prompt"] + r["completion"] for r in rows} == wanted


def test_the_space_of_two_digits_has_its_corners():
    rows = {r["prompt"]: r["completion"] for r in draw_skill("addition", 2, 8100, 0)}
    assert (rows["10+10="], rows["99+99="], rows["10+99="]) == ("20", "198", "109")


def test_seeds_differ_and_the_digits_are_spread():
    one, two = (draw_skill("addition", 12, 100, seed) for seed in (0, 1))
    assert one.rows != two.rows
    assert one.fingerprint != two.fingerprint
    firsts = {r["prompt"][0] for r in one}
    assert firsts == set("123456789")


def test_train_and_test_do_not_stand_sorted_by_length():
    train, test = train_and_test("addition", [1, 2, 3], 60, 30, 0)
    for rows in (train, test):
        lengths = [r["digits"] for r in rows]
        assert lengths != sorted(lengths)
        assert set(lengths[:20]) == {1, 2, 3}
    assert (train.split_name, test.split_name, train.revision) == ("train", "test", "seed 0")


def test_excluded_prompts_do_not_come_back():
    first = draw_skill("addition", 1, 60, 0)
    rest = draw_skill("addition", 1, 40, 0, exclude={r["prompt"] for r in first})
    assert len({r["prompt"] for r in (*first, *rest)}) == 100


@pytest.mark.parametrize("k", [0, -1, 2.0, "2", True, None])
def test_k_is_a_whole_number_from_1(k):
    with pytest.raises(BadInputError, match="k must be a whole number from 1"):
        draw_skill("addition", [k], 1, 0)


@pytest.mark.parametrize("digits", [0, True, [], [2, 2], "2"])
def test_bad_lists_of_lengths(digits):
    with pytest.raises(BadInputError, match="number"):
        train_and_test("addition", digits, 1, 1, 0)


@pytest.mark.parametrize("n", [0, -5])
def test_n_is_at_least_1(n):
    with pytest.raises(BadInputError, match=f"n must be at least 1, not {n}"):
        draw_skill("addition", 2, n, 0)


def test_too_few_distinct_rows():
    with pytest.raises(BadInputError, match=r"Only 100 of the 100 1-digit rows.*101 were asked"):
        draw_skill("addition", 1, 101, 0)
    with pytest.raises(BadInputError, match="Only 99 of the 100 "):
        draw_skill("addition", 1, 100, 0, exclude=["1+1=", "no such prompt"])
    with pytest.raises(BadInputError, match="10 test rows take all 1-digit rows of reversal"):
        train_and_test("reversal", 1, 5, 10, 0)


def test_an_unknown_skill_offers_the_nearest():
    with pytest.raises(UnknownNameError, match=r"skill 'additon'\. Did you mean 'addition'"):
        draw_skill("additon", 2, 1, 0)
