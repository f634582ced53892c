"""What a shop can do without a language model that writes: fuzzy matching, TF-IDF with logistic
regression, a small embedding model; and rules for extraction.

Each is a function of a pair's two listings that says how alike they are. For yes or no it is cut at
the threshold with the best F1 on the validation pairs; for a ranking the candidates are sorted by
it. Whatever has to be learnt is learnt on the training pairs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lora_kit.errors import BadInputError
from lora_kit.shop_products import maker_in_title, words

Score = Callable[[Sequence[Mapping]], np.ndarray]
RATIOS = ("ratio", "token_sort_ratio", "token_set_ratio", "WRatio")


@dataclass(frozen=True)
class Scorer:
    """A way to score pairs. bytes: what it holds (weights, vocabularies), 0 where nothing is
    learnt. chosen: what validation decided, in words."""

    score: Score
    bytes: int
    chosen: str = ""


def best_threshold(scores: Sequence[float], truth: Sequence[int]) -> float:
    """The cut with the best F1 of truth == 1 among score ≥ cut; the lowest of equals.

    Raises:
        BadInputError: no pair, or no match among them.
    """
    scores, truth = np.asarray(scores, dtype=float), np.asarray(truth, dtype=int)
    if not len(truth) or not truth.any():
        raise BadInputError("A threshold needs validation pairs with a match among them.")
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], np.cumsum(truth[order])
    taken = np.arange(1, len(ranked) + 1)
    f1 = 2 * hits / (taken + truth.sum())
    last_of_equals = np.append(ranked[1:] != ranked[:-1], True)
    best = np.flatnonzero(last_of_equals & (f1 >= f1[last_of_equals].max() - 1e-12))[-1]
    return float(ranked[best])


def best_f1(scores, truth) -> float:
    """The F1 at `best_threshold`."""
    said = np.asarray(scores) >= best_threshold(scores, truth)
    truth = np.asarray(truth, dtype=bool)
    return float(2 * (said & truth).sum() / (said.sum() + truth.sum()))


def fuzzy(train: Sequence[Mapping], validation: Sequence[Mapping]) -> Scorer:
    """rapidfuzz: edit distance between the titles, the kind that does best on validation."""
    from rapidfuzz import fuzz

    def scoring(name: str) -> Score:
        ratio = getattr(fuzz, name)
        return lambda pairs: np.array(
            [ratio(p["left"]["title"], p["right"]["title"]) for p in pairs], dtype=float
        )

    truth = [p["label"] for p in validation]
    best = max(RATIOS, key=lambda name: best_f1(scoring(name)(validation), truth))
    return Scorer(scoring(best), 0, f"fuzz.{best}")


def tfidf(train: Sequence[Mapping], validation: Sequence[Mapping]) -> Scorer:
    """scikit-learn: cosines of TF-IDF vectors (words; runs of 2 to 4 letters), shared numbers and
    the prices' ratio, weighed by a logistic regression that counts both labels alike."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len({p["label"] for p in train}) < 2:
        raise BadInputError(f"{len(train)} training pairs of one label teach nothing; take more.")
    titles = [p[side]["title"] for p in train for side in ("left", "right")]
    kinds = (
        TfidfVectorizer(token_pattern=r"[a-z0-9]+"),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4)),
    )
    vectorizers = [kind.fit(titles) for kind in kinds]

    def features(pairs: Sequence[Mapping]) -> np.ndarray:
        columns = []
        for vectorizer in vectorizers:
            left, right = (
                vectorizer.transform([p[side]["title"] for p in pairs])
                for side in ("left", "right")
            )
            columns.append(np.asarray(left.multiply(right).sum(1)).ravel())
        columns += list(np.array([_numbers_and_price(p) for p in pairs]).T)
        return np.stack(columns, axis=1)

    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced"))
    model.fit(features(train), [p["label"] for p in train])
    size = sum(sum(len(w) + 12 for w in v.vocabulary_) for v in vectorizers)
    return Scorer(lambda pairs: model.predict_proba(features(pairs))[:, 1], size)


def _numbers_and_price(pair: Mapping) -> tuple[float, float, float]:
    """Share of numbers in common (1 where neither has any), |log price ratio|, both priced?"""
    a, b = (
        {w for w in words(pair[side]["title"]) if any(c.isdigit() for c in w)}
        for side in ("left", "right")
    )
    shared = len(a & b) / len(a | b) if a | b else 1.0
    prices = [pair[side]["price"] for side in ("left", "right")]
    known = all(prices)
    ratio = abs(math.log(prices[0] / prices[1])) if known else 0.0
    return shared, min(ratio, 5.0), float(known)


def embedding(train: Sequence[Mapping], validation: Sequence[Mapping], encoder=None) -> Scorer:
    """all-MiniLM-L6-v2: the cosine of the titles' mean token embeddings; nothing is learnt."""
    import torch

    from lora_kit.models import load_encoder

    loaded = encoder or load_encoder()
    model, tokenizer = loaded.model, loaded.tokenizer

    def embed(texts: list[str]) -> torch.Tensor:
        found = torch.empty(len(texts), model.config.hidden_size)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), 64):
            rows = order[start : start + 64]
            some = [texts[i] for i in rows]
            inputs = tokenizer(some, padding=True, truncation=True, return_tensors="pt")
            with torch.inference_mode():
                states = model(**inputs).last_hidden_state
            mask = inputs["attention_mask"][..., None]
            found[rows] = (states * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(found, dim=-1)

    def score(pairs: Sequence[Mapping]) -> np.ndarray:
        texts = sorted({p[side]["title"] for p in pairs for side in ("left", "right")})
        place = {text: i for i, text in enumerate(texts)}
        vectors = embed(texts)
        left, right = (vectors[[place[p[s]["title"]] for p in pairs]] for s in ("left", "right"))
        return (left * right).sum(-1).numpy().astype(float)

    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return Scorer(score, size)


def rules(train: Sequence[Mapping]) -> Callable[[str], dict]:
    """Extraction by rule: the longest manufacturer of the training pairs that the listing names,
    and a number before "USD". What it has never seen it cannot name."""
    names = {
        name
        for pair in train
        if (name := maker_in_title(pair["left"]["title"], pair["left"]["manufacturer"]))
    }
    known = sorted(names, key=len, reverse=True)

    def extract(listing: str) -> dict:
        title = f" {' '.join(words(listing))} "
        maker = next((name for name in known if f" {name} " in title), None)
        price = re.search(r"([\d,]*\d(?:\.\d+)?) USD", listing)
        cost = float(price[1].replace(",", "")) if price else None
        return {"manufacturer": maker, "price": cost}

    return extract


BASELINES: dict[str, Callable[..., Scorer]] = {
    "fuzzy": fuzzy,
    "tfidf": tfidf,
    "embedding": embedding,
}
