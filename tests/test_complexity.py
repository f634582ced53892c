"""Complexity heuristics: worked by hand, against gzip and rouge_score, and on real rows."""

import gzip
import math
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_kit.errors import BadInputError
from lora_kit.studies.complexity import (
    HEURISTICS,
    compressibility,
    count_words,
    join,
    measure_complexity,
    similarity,
    token_counter,
)
from lora_kit.studies.lora_land import printed_heuristics

ROWS = [
    {"prompt": "one two three", "completion": "two"},
    {"prompt": "one two three four five", "completion": "six seven eight"},
]


def test_lengths_by_hand():
    c = measure_complexity(ROWS)
    # Inputs have 3 and 5 words, outputs 1 and 3, examples 4 and 8.
    assert (c["input_mean"], c["input_std"]) == (4, 1)
    assert (c["output_mean"], c["output_std"]) == (2, 1)
    assert (c["example_mean"], c["example_std"]) == (6, 2)
    assert c["input_p95"] == pytest.approx(3 + 0.95 * 2)
    assert c["output_p95"] == pytest.approx(1 + 0.95 * 2)
    assert c["example_p95"] == pytest.approx(4 + 0.95 * 4)
    assert c["examples"] == 2
    assert c.measured == 2
    assert list(c.values) == list(HEURISTICS)


def test_similarity_by_hand():
    # One word in common: P = 1/1, R = 1/3, F1 = 2·(1/3)/(4/3) = 1/2.
    assert similarity("one two three", "two") == pytest.approx(0.5)
    # "a c d" in order: the subsequence a c of a b c has 2 words; P = R = 2/3.
    assert similarity("a b c", "a c d") == pytest.approx(2 / 3)
    assert similarity("c b a", "a b c") == pytest.approx(1 / 3)
    assert similarity("one", "two") == 0
    c = measure_complexity(ROWS)
    assert (c["similarity_mean"], c["similarity_std"]) == pytest.approx((0.25, 0.25))


def test_compressibility_by_hand():
    text = "ab" * 500
    # gzip is deflate with a header of 10 and a trailer of 8 bytes.
    deflated = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    size = len(deflated.compress(text.encode()) + deflated.flush())
    assert compressibility(text) == (size + 18) / 1000
    assert compressibility("a") > 18
    assert compressibility("é" * 100) == len(gzip.compress(("é" * 100).encode())) / 200
    with pytest.raises(BadInputError, match="empty"):
        compressibility("")


@given(st.text(min_size=1, max_size=80), st.integers(2, 6))
def test_repetition_compresses_better(text, times):
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates are no text
        return
    assert compressibility(text * times) <= compressibility(text)


def test_an_example_is_one_text():
    assert join("a", "b") == "a b"
    assert join("a ", "b") == "a b"
    assert join("a", "\nb") == "a\nb"
    assert join("", "b") == "b"
    words = []
    measure_complexity(ROWS, count=lambda text: words.append(text) or 1)
    assert "one two three two" in words


def test_all_shapes_of_rows():
    alpaca = {"instruction": "Add.", "input": "1 2", "output": "3"}
    chat = {
        "messages": [
            {"role": "user", "content": "Add 1 2"},
            {"role": "assistant", "content": "3"},
        ]
    }
    c = measure_complexity([alpaca, chat])
    assert c["output_mean"] == 1
    assert c["input_mean"] == 3.5  # "Add . 1 2", "Add 1 2"
    with pytest.raises(BadInputError, match="neither prompt/completion"):
        measure_complexity([{"text": "x"}])
    with pytest.raises(BadInputError, match="end with the assistant"):
        measure_complexity([{"messages": [{"role": "assistant", "content": "3"}]}])
    with pytest.raises(BadInputError, match="no rows"):
        measure_complexity([])


def test_a_sample_of_many_rows_is_seeded_and_counts_all():
    rows = [{"prompt": "w " * (1 + i % 50), "completion": "x"} for i in range(400)]
    c = measure_complexity(rows, limit=40, seed=1)
    assert (c["examples"], c.measured) == (400, 40)
    assert c.values == measure_complexity(rows, limit=40, seed=1).values
    assert c.values != measure_complexity(rows, limit=40, seed=2).values
    whole = measure_complexity(rows)
    assert math.isclose(c["input_mean"], whole["input_mean"], rel_tol=0.25)


def test_counters(tiny_folder):
    count, name = token_counter(str(tiny_folder))
    assert name == str(tiny_folder)
    assert count("12 34") == 5  # its digits are single tokens, and it writes no mark before a text
    assert token_counter()[1] == "words"  # the default model is not in the test's cache
    assert count_words("Don't, 3.5!") == 8


@pytest.mark.data
def test_gsm8k_is_near_what_the_paper_printed():
    """The paper's prompt is not known and its tokenizer is another, so lengths are near only in
    words; the ratios and their spread do not depend on either by much."""
    from lora_kit.data import load_rows

    rows = [
        {"prompt": f"Question: {r['question']}\nAnswer:", "completion": r["answer"]}
        for r in load_rows("gsm8k", "train")
    ]
    c, printed = measure_complexity(rows, limit=1000), printed_heuristics().loc["gsm8k"]
    assert c["examples"] == printed["examples"] == 7473
    for name, within in (
        ("compressibility_mean", 0.03),
        ("compressibility_std", 0.02),
        ("similarity_mean", 0.03),
        ("similarity_std", 0.02),
    ):
        assert c[name] == pytest.approx(printed[name], abs=within), name
    for name in ("input_mean", "output_mean", "example_mean", "output_p95", "output_std"):
        assert c[name] == pytest.approx(printed[name], rel=0.2), name
