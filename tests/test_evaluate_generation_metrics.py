"""Scores of generated texts, against formulas by hand and torchmetrics."""

import types

import numpy as np
import pytest
import torch

from lora_kit.errors import BadInputError
from lora_kit.evaluate.generation_metrics import (
    embedding_similarity,
    exact_matches,
    matching_similarity,
    rouge,
)

ANSWERS = ["the cat sat on the mat", "dogs ran far", "a user below", "", "is is is is", "cat"]
REFERENCES = [
    "the cat lay on a mat",
    "two dogs were running far away",
    "below a user",
    "nothing",
    "is",
    "cat",
]


def common(a, b):
    """Length of the longest common subsequence."""
    best = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            best[i + 1, j + 1] = best[i, j] + 1 if x == y else max(best[i, j + 1], best[i + 1, j])
    return best[-1, -1]


def f_measure(hits, answer, reference):
    p, r = hits / max(answer, 1), hits / max(reference, 1)
    return 2 * p * r / (p + r) if p + r else 0.0


def by_hand(kind, answer, reference):
    a, r = answer.split(), reference.split()
    if kind == "rougeL":
        return f_measure(common(a, r), len(a), len(r))
    n = int(kind[-1])
    grams = [[tuple(w[i : i + n]) for i in range(len(w) - n + 1)] for w in (a, r)]
    hits = sum(min(grams[0].count(g), grams[1].count(g)) for g in set(grams[0]))
    return f_measure(hits, len(grams[0]), len(grams[1]))


@pytest.mark.parametrize("kind", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_that_worked_by_hand(kind):
    found = rouge(ANSWERS, REFERENCES, stem=False)[kind]
    expected = [by_hand(kind, *pair) for pair in zip(ANSWERS, REFERENCES, strict=True)]
    assert found.values == pytest.approx(expected)
    assert found.mean.value == pytest.approx(np.mean(expected))
    assert found.mean.low < found.mean.value < found.mean.high
    assert found.row()["n"] == 6


def test_stems_and_several_references():
    assert rouge(["running"], ["runs"])["rouge1"].values == (1.0,)
    assert rouge(["running"], ["runs"], stem=False)["rouge1"].values == (0.0,)
    assert rouge(["a b"], [["x", "a b", "a"]])["rouge2"].values == (1.0,)


@pytest.mark.parametrize(
    ("answer", "reference", "options", "right"),
    [
        (" yes\n", "yes", {}, True),
        ("Yes", "yes", {}, False),
        ("1,000", "1000.0", {}, True),
        ("12.", "12", {}, True),
        ("-3", "3", {}, False),
        ("3.15", "3.14", {}, False),
        ("3.15", "3.14", {"tolerance": 0.02}, True),
        ("105", "100", {"relative": 0.05}, True),
        ("106", "100", {"relative": 0.05}, False),
        ("50%", "50", {"tolerance": 1.0}, False),
        ("50%", "49.5 %", {"tolerance": 1.0}, True),
        ("$5", "$5.00", {}, True),
        ("12 eggs", "12", {"tolerance": 5.0}, False),
        ("1,00", "100", {}, False),
        ("nan", "nan", {}, True),
        ("", "3", {}, False),
    ],
)
def test_exact_matches(answer, reference, options, right):
    assert exact_matches([answer], [reference], **options).values == (float(right),)


def test_exact_matches_have_wilsons_interval():
    from lora_kit.evaluate.statistics import wilson

    found = exact_matches(["1", "2", "3"], ["1", ["5", "2"], "4"])
    assert found.values == (1.0, 1.0, 0.0)
    assert (found.mean.low, found.mean.high) == wilson(2, 3)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny random BERT with words of these texts, saved so that others can load it too."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    words = sorted({w for text in ANSWERS + REFERENCES for w in text.split()})
    file = folder / "vocab.txt"
    file.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    tokenizer = BertTokenizerFast(str(file), model_max_length=32)
    torch.manual_seed(0)
    size = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    size |= dict(vocab_size=len(tokenizer), max_position_embeddings=32)
    config = BertConfig(initializer_range=0.5, **size)
    model = BertModel(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return types.SimpleNamespace(model=model, tokenizer=tokenizer, path=folder)


def states(encoder, text):
    with torch.no_grad():
        return encoder.model(**encoder.tokenizer(text, return_tensors="pt")).last_hidden_state[0]


def cosines(encoder, answer, reference):
    a, r = (states(encoder, text)[1:-1] for text in (answer, reference))
    return (a / a.norm(dim=-1, keepdim=True)) @ (r / r.norm(dim=-1, keepdim=True)).T


def test_matching_is_the_papers_formula_and_torchmetrics(encoder):
    bert_score = pytest.importorskip("torchmetrics.functional.text.bert").bert_score
    answers, references = ANSWERS[:3] + ANSWERS[4:], REFERENCES[:3] + REFERENCES[4:]
    ours = matching_similarity(answers, references, encoder, batch_size=2)
    plain = []
    for i, pair in enumerate(zip(answers, references, strict=True)):
        found = cosines(encoder, *pair)
        p, r = found.amax(1).mean(), found.amax(0).mean()
        expected = {"precision": p, "recall": r, "f1": 2 * p * r / (p + r)}
        for kind, value in expected.items():
            assert ours[kind].values[i] == pytest.approx(float(value), abs=1e-5)
        # Below 0 torchmetrics takes the 0 it has put in the place of the special tokens.
        if found.amax(1).min() > 0 and found.amax(0).min() > 0:
            plain.append(i)
    assert len(plain) == 4
    assert len(set(ours["f1"].values)) == len(answers)
    for i in plain:  # one at a time: of several, torchmetrics 1.9.0 may mix up the order
        theirs = bert_score(
            [answers[i]],
            [references[i]],
            model_name_or_path=str(encoder.path),
            num_layers=2,
            max_length=32,
        )
        for kind in ("precision", "recall", "f1"):
            assert ours[kind].values[i] == pytest.approx(float(theirs[kind]), abs=1e-5)


def test_embeddings_are_means_over_tokens(encoder):
    found = embedding_similarity(ANSWERS, REFERENCES, encoder, batch_size=4)
    for answer, reference, value in zip(ANSWERS, REFERENCES, found.values, strict=True):
        a, r = states(encoder, answer).mean(0), states(encoder, reference).mean(0)
        expected = float(torch.cosine_similarity(a, r, dim=0)) if answer else 0.0
        assert value == pytest.approx(expected, abs=1e-5)
    assert found.values[-1] == pytest.approx(1.0)


def test_the_best_of_several_references_counts_and_long_texts_are_counted(encoder):
    several = [[r, a or r] for a, r in zip(ANSWERS, REFERENCES, strict=True)]
    best = matching_similarity(ANSWERS, several, encoder)["f1"]
    assert [round(v, 5) for v in best.values] == [1, 1, 1, 0, 1, 1]
    long = matching_similarity(["cat " * 40], ["cat"], encoder)["f1"]
    assert long.truncated == 1
    assert embedding_similarity(["cat"], ["cat"], encoder).truncated == 0


@pytest.mark.model
def test_the_real_encoder_knows_what_is_alike():
    answers = ["A man is playing a guitar.", "The stock market fell sharply."]
    same = ["Someone plays the guitar.", "Shares dropped a lot today."]
    for score in (
        lambda a, r: embedding_similarity(a, r).values,
        lambda a, r: matching_similarity(a, r)["f1"].values,
    ):
        near, far = score(answers, same), score(answers, same[::-1])
        assert min(near) > max(far) + 0.2


@pytest.mark.parametrize(
    ("answers", "references", "says"),
    [
        ("cat", ["cat"], "lists of texts"),
        (["cat"], "cat", "lists of texts"),
        (["a", "b"], ["a"], "2 answers for 1"),
        ([], [], "no answers"),
        ([3], ["a"], "not text"),
        (["a"], [" "], "empty reference"),
        (["a"], [[]], "empty reference"),
    ],
)
def test_bad_input_is_refused(answers, references, says, encoder):
    for score in (
        rouge,
        exact_matches,
        lambda a, r: embedding_similarity(a, r, encoder),
        lambda a, r: matching_similarity(a, r, encoder),
    ):
        with pytest.raises(BadInputError, match=says):
            score(answers, references)
    for wrong in ((), ("rouge0",), ("bleu",)):
        with pytest.raises(BadInputError, match="ROUGE kinds"):
            rouge(["a"], ["a"], kinds=wrong)
    for value in (-1.0, float("nan")):
        with pytest.raises(BadInputError, match="tolerance"):
            exact_matches(["a"], ["a"], tolerance=value)
