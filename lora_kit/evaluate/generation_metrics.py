"""Scores of generated texts against reference texts, each item's kept, each mean with its interval.

- `rouge`: shared words, pairs of words and longest common subsequence (Lin 2004), by the package
  rouge-score.
- `exact_matches`: the same text, or the same number within a tolerance.
- `embedding_similarity`: the cosine of two whole texts' embeddings.
- `matching_similarity`: every token matched greedily with its most similar one, as BERTScore does
  (Zhang et al. 2020, "BERTScore: Evaluating Text Generation with BERT", section 3).

The last two read both texts with all-MiniLM-L6-v2, 22.7M parameters from a PyPI wheel. So
`matching_similarity` is *like* BERTScore and is not it: published BERTScores come from
roberta-large, are often rescaled, and cannot be set beside these numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from lora_kit.errors import BadInputError
from lora_kit.evaluate.statistics import Estimate, estimate

ROUGE_KINDS = ("rouge1", "rouge2", "rougeL")
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+")


@dataclass(frozen=True)
class TextScore:
    """One metric of many answers.

    values: one for each answer, in order. mean: theirs, with a 95 % interval over items.
    truncated: answers or references longer than the encoder reads, whose end did not count.
    """

    metric: str
    values: tuple[float, ...] = field(repr=False)
    mean: Estimate
    truncated: int = 0

    def row(self) -> dict:
        """A line of a table."""
        return {
            "metric": self.metric,
            "value": round(self.mean.value, 4),
            "low": round(self.mean.low, 4),
            "high": round(self.mean.high, 4),
            "n": self.mean.n,
        }


def rouge(
    answers: Sequence[str],
    references: Sequence[str | Sequence[str]],
    kinds: Sequence[str] = ROUGE_KINDS,
    stem: bool = True,
    seed: int = 0,
) -> dict[str, TextScore]:
    """ROUGE's F measure, 2PR/(P + R).

    ROUGE-n: P and R are the shares of the answer's and the reference's n-grams that are shared;
    ROUGE-L: of the words in their longest common subsequence (Lin 2004, sections 2 and 3). Words
    are runs of a-z and 0-9 in lower case.

    Args:
        answers: generated texts; an empty one scores 0.
        references: a text for each answer, or several, of which the best counts.
        kinds: some of rouge1, rouge2, ... , rougeL, rougeLsum (lines as sentences).
        stem: compare the stems of English words (Porter).
        seed: of the bootstrap.

    Raises:
        BadInputError: lists that do not fit, an empty reference, an unknown kind.
    """
    from rouge_score.rouge_scorer import RougeScorer

    known = re.compile(r"rouge([1-9]|L|Lsum)")
    wrong = [kind for kind in kinds if not known.fullmatch(kind)]
    if wrong or not kinds:
        raise BadInputError(f"ROUGE kinds are rouge1, rouge2, ..., rougeL, rougeLsum; not {wrong}.")
    pairs = _pairs(answers, references)
    scorer = RougeScorer(list(kinds), use_stemmer=stem)
    # score_multi takes the best reference of each kind by itself, as Lin's jackknife does not.
    found = [scorer.score_multi(texts, answer) for answer, texts in pairs]
    return {
        kind: _score(kind, [float(one[kind].fmeasure) for one in found], seed) for kind in kinds
    }


def exact_matches(
    answers: Sequence[str],
    references: Sequence[str | Sequence[str]],
    tolerance: float = 0.0,
    relative: float = 0.0,
    seed: int = 0,
) -> TextScore:
    """1 where an answer is its reference, or a number close to it, else 0.

    Surrounding white space does not count. Where both texts are numbers (commas between thousands,
    a sign, a decimal part, a leading $, a closing % or full stop) they are compared as numbers:
    |a − r| ≤ max(tolerance, relative · |r|). "50%" is not 50, nor "$5" 5.

    Args:
        answers, references, seed: as for `rouge`.
        tolerance, relative: 0: the numbers must be equal, so that "1,000" is "1000.0".

    Raises:
        BadInputError: lists that do not fit, an empty reference, a tolerance below 0 or not finite.
    """
    for name, value in (("tolerance", tolerance), ("relative", relative)):
        if not (math.isfinite(value) and value >= 0):
            raise BadInputError(f"{name} must be a number from 0, not {value}.")
    values = [
        float(any(_matches(answer, text, tolerance, relative) for text in texts))
        for answer, texts in _pairs(answers, references)
    ]
    return _score("exact_match", values, seed)


def embedding_similarity(
    answers: Sequence[str],
    references: Sequence[str | Sequence[str]],
    encoder=None,
    batch_size: int = 32,
    seed: int = 0,
) -> TextScore:
    """cos(e(answer), e(reference)), e the mean of a text's token embeddings.

    Args:
        answers, references, seed: as for `rouge`.
        encoder: a LoadedModel; `load_encoder()` by default.
        batch_size: texts at once.

    Raises:
        BadInputError: lists that do not fit, an empty reference; and what `load_encoder` raises.
    """
    pairs = _pairs(answers, references)
    embedded, truncated = _embed(pairs, encoder, batch_size)

    def similarity(answer: str, reference: str) -> float:
        a, r = (embedded[text][1] for text in (answer, reference))
        return float(a @ r / (a.norm() * r.norm()))

    return _score("embedding_similarity", _best(pairs, similarity), seed, truncated)


def matching_similarity(
    answers: Sequence[str],
    references: Sequence[str | Sequence[str]],
    encoder=None,
    batch_size: int = 32,
    seed: int = 0,
) -> dict[str, TextScore]:
    """BERTScore's precision, recall and F1 with a small encoder; see the module's text.

    With a_i and r_j the unit embeddings of the answer's and the reference's tokens, in context and
    without the special first and last: P = mean_i max_j a_i·r_j, R = mean_j max_i a_i·r_j,
    F1 = 2PR/(P + R); no idf weights, no rescaling.

    Args:
        as for `embedding_similarity`; of several references the one with the best F1 counts.

    Returns:
        "precision", "recall" and "f1".
    """
    import torch

    pairs = _pairs(answers, references)
    embedded, truncated = _embed(pairs, encoder, batch_size)

    def scores(answer: str, reference: str) -> tuple[float, float, float]:
        a, r = (embedded[text][0] for text in (answer, reference))
        if not len(a) or not len(r):
            return 0.0, 0.0, 0.0
        unit = torch.nn.functional.normalize
        cosines = unit(a, dim=-1) @ unit(r, dim=-1).T
        p, q = float(cosines.amax(1).mean()), float(cosines.amax(0).mean())
        return p, q, 2 * p * q / (p + q) if p + q else 0.0

    best = [
        max((scores(answer, text) for text in texts), key=lambda found: found[2])
        if answer.strip()
        else (0.0, 0.0, 0.0)
        for answer, texts in pairs
    ]
    return {
        kind: _score(f"matching_{kind}", [one[i] for one in best], seed, truncated)
        for i, kind in enumerate(("precision", "recall", "f1"))
    }


def _best(pairs, similarity) -> list[float]:
    """The best reference's similarity; an empty answer says nothing and scores 0."""
    return [
        max(similarity(answer, text) for text in texts) if answer.strip() else 0.0
        for answer, texts in pairs
    ]


def _embed(pairs, encoder, batch_size: int):
    """{text: (token embeddings without the special ones, mean of all tokens)}, each text once."""
    import torch

    from lora_kit.models import load_encoder

    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise BadInputError(f"batch_size must be a whole number from 1, not {batch_size!r}.")
    loaded = encoder or load_encoder()
    model, tokenizer = loaded.model, loaded.tokenizer
    most = model.config.max_position_embeddings
    texts = sorted({t for answer, refs in pairs for t in (answer, *refs)}, key=len)
    found, cut = {}, 0
    for start in range(0, len(texts), batch_size):
        some = texts[start : start + batch_size]
        cut += sum(len(ids) > most for ids in tokenizer(some, verbose=False)["input_ids"])
        inputs = tokenizer(
            some,
            padding=True,
            truncation=True,
            max_length=most,
            return_tensors="pt",
            return_special_tokens_mask=True,
        )
        special = inputs.pop("special_tokens_mask").bool()
        with torch.inference_mode():
            states = model(**inputs.to(model.device)).last_hidden_state.float().cpu()
        read = inputs["attention_mask"].bool().cpu()
        for text, state, seen, mark in zip(some, states, read, special, strict=True):
            found[text] = state[seen & ~mark], state[seen].mean(0)
    return found, cut


def _matches(answer: str, reference: str, tolerance: float, relative: float) -> bool:
    a, r = _number(answer), _number(reference)
    if a is None or r is None or a[1:] != r[1:]:
        return answer.strip() == reference.strip()
    return abs(a[0] - r[0]) <= max(tolerance, relative * abs(r[0]))


def _number(text: str) -> tuple[float, bool, bool] | None:
    """(value, has a $, has a %) of a text that is a number and nothing else."""
    text = text.strip().removesuffix(".")
    money, share = text.startswith("$"), text.endswith("%")
    text = text.removeprefix("$").removesuffix("%").strip()
    if not _NUMBER.fullmatch(text):
        return None
    return float(text.replace(",", "")), money, share


def _score(metric: str, values: list[float], seed: int, truncated: int = 0) -> TextScore:
    return TextScore(metric, tuple(values), estimate(values, seed=seed), truncated)


def _pairs(answers, references) -> list[tuple[str, tuple[str, ...]]]:
    """Each answer with its references, checked."""
    if isinstance(answers, str) or isinstance(references, str):
        raise BadInputError("Answers and references must be lists of texts, not one text.")
    if len(answers) != len(references):
        raise BadInputError(f"{len(answers)} answers for {len(references)} references.")
    if not len(answers):
        raise BadInputError("There are no answers to score.")
    pairs = []
    for i, (answer, given) in enumerate(zip(answers, references, strict=True)):
        texts = (given,) if isinstance(given, str) else tuple(given or ())
        if not isinstance(answer, str) or not all(isinstance(t, str) for t in texts):
            raise BadInputError(f"Answer {i} or its reference is not text.")
        if not texts or not all(t.strip() for t in texts):
            raise BadInputError(f"Answer {i} has an empty reference; leave that item out.")
        pairs.append((answer, texts))
    return pairs
