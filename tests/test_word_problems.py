"""Word problems: right by construction, distinct, disjoint, judged as lm-eval judges GSM8K."""

import re

import pytest

from lora_kit.errors import BadInputError
from lora_kit.word_problems import (
    ONE_STEP,
    STORIES,
    draw_word_problems,
    judge_numbers,
    last_number,
    marked_number,
    word_problems,
)


def test_every_step_of_every_solution_is_true():
    rows = draw_word_problems(1000, seed=0)
    sums = 0
    for row in rows:
        for a, sign, b, c in re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", row["completion"]):
            x, y = int(a), int(b)
            assert {"+": x + y, "-": x - y, "*": x * y, "/": x / y}[sign] == int(c), row
            sums += 1
        assert marked_number(row["completion"]) == last_number(row["completion"])
    assert sums >= 2000  # two steps or more each


def test_one_step_problems_have_one_step():
    for row in draw_word_problems(100, seed=0, stories=ONE_STEP):
        ((a, sign, b, c),) = re.findall(r"(\d+) ([-+]) (\d+) = (\d+)", row["completion"])
        assert int(c) == int(a) + int(sign + b) == int(marked_number(row["completion"]))
        assert row["prompt"].count(a) >= 1
        assert b in row["prompt"]


def test_the_last_step_gives_the_answer():
    for row in draw_word_problems(200, seed=3):
        *_, result = re.findall(r"= (\d+)", row["completion"])
        assert result == marked_number(row["completion"])


def test_answers_are_never_negative_and_prompts_hold_every_number_needed():
    for row in draw_word_problems(500, seed=1):
        assert int(marked_number(row["completion"])) >= 0
        assert row["prompt"].startswith("Question: ")
        assert row["prompt"].endswith("\nAnswer:")


def test_kinds_are_even_rows_distinct_and_seeded():
    rows = draw_word_problems(100, seed=0)
    assert len({r["prompt"] for r in rows}) == 100
    assert {r["kind"] for r in rows} == set(STORIES)
    assert all(sum(r["kind"] == k for r in rows) == 20 for k in STORIES)
    assert rows.rows == draw_word_problems(100, seed=0).rows
    assert rows.rows != draw_word_problems(100, seed=1).rows


def test_training_rows_hold_no_test_prompt():
    train, test = word_problems(2000, 500, seed=0)
    assert (len(train), len(test)) == (2000, 500)
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in test}


@pytest.mark.parametrize("n", [0, -1, 10**9])
def test_impossible_numbers_are_refused(n, monkeypatch):
    if n == 10**9:  # a space of one story, which runs out
        only = {"one": lambda rng: ("q", "s", 1)}
        monkeypatch.setattr("lora_kit.word_problems.STORIES", only)
        n = 2
    with pytest.raises(BadInputError):
        draw_word_problems(n, seed=0)


ANSWERS = [
    " She buys 3 * 6 = 18.\n#### 23",
    " The answer is 23.",
    "#### 1,023",
    "#### 23.",
    " $23",
    "no number",
    " 23 and then 24",
    "#### 23\nQuestion: 5",
]


def test_both_judges_are_lm_evals():
    """The same texts through lm-eval's packaged filters of GSM8K, and its exact match."""
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters import build_filter_ensemble

    from lora_kit.evaluate.tasks import packaged_definition

    config = packaged_definition("gsm8k")
    ignore = next(m for m in config["metric_list"] if m["metric"] == "exact_match")
    expected = ["#### 23"] * len(ANSWERS)
    ours = judge_numbers(ANSWERS, expected)
    for ensemble, found in zip(config["filter_list"], ours, strict=True):
        steps = [
            (f["function"], {k: v for k, v in f.items() if k != "function"})
            for f in ensemble["filter"]
        ]
        made = build_filter_ensemble(ensemble["name"], steps)
        texts = [[a] for a in ANSWERS]
        for f in made.filters:
            texts = list(f().apply(texts, [{}] * len(texts)))
        theirs = [
            bool(
                exact_match_hf_evaluate(
                    predictions=[text],
                    references=["#### 23"],
                    regexes_to_ignore=ignore["regexes_to_ignore"],
                    ignore_case=True,
                    ignore_punctuation=False,
                )["exact_match"]
            )
            for text in texts
        ]
        assert theirs == found, ensemble["name"]
