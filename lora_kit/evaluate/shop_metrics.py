"""Scores of the shop tasks: F1, macro-F1, F1* of extracted attributes, hit rate, NDCG, each with an
interval over items.

Every score here follows from counts that add up over items (right and wrong answers, pairs of true
and given label). So one resample of the items is one draw of weights, and a score's interval or the
difference of two methods on the same items comes from the same draws (`from_counts`,
`difference_from_counts`). An answer that cannot be read is UNREAD, and wrong.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lora_kit.errors import BadInputError
from lora_kit.evaluate.statistics import Estimate

DRAWS = 2000
OUTCOMES = ("NN", "NV", "VN", "VC", "VW")
GAINS = {"E": 1.0, "S": 0.1, "C": 0.01, "I": 0.0}  # exact, substitute, complement, irrelevant
UNREAD = "?"  # stands for an answer that cannot be read; no label is spelt so


# ------------------------------------------------------------------ reading answers


def read_yes_no(answer: str) -> str:
    """ "yes" or "no" if one of them is the answer's first word, else UNREAD."""
    found = re.match(r"\W*(yes|no)\b", answer.strip(), re.IGNORECASE)
    return found[1].lower() if found else UNREAD


def read_letter(answer: str, letters: str) -> str:
    """The option's letter if the answer begins with one of `letters` ("B", "B: positive", "(b)"),
    else UNREAD. A word that merely begins with the letter is none."""
    found = re.match(r"\W*([A-Za-z])(?![A-Za-z0-9])", answer.strip())
    letter = found[1].upper() if found else UNREAD
    return letter if letter in letters else UNREAD


def read_ranking(answer: str, letters: str) -> tuple[str, ...] | str:
    """The letters of a list such as "B,A,C" in its order, each once; UNREAD where there is none."""
    parts = [p.strip().upper() for p in re.split(r"[,>\s]+", answer.strip())]
    named = tuple(dict.fromkeys(p for p in parts if p in list(letters)))
    return named or UNREAD


def read_json(answer: str, where: str = "The answer"):
    """The first JSON value of an answer; text behind it is left aside.

    Raises:
        BadInputError: there is no JSON; `where` names the row.
    """
    start = min((i for i in (answer.find("{"), answer.find("[")) if i >= 0), default=-1)
    try:
        if start < 0:
            raise ValueError("no { or [ in it")
        return json.JSONDecoder().raw_decode(answer[start:])[0]
    except ValueError as e:
        said = answer.strip()[:60]
        raise BadInputError(f"{where} is no JSON where JSON is due ({e}): {said!r}.") from None


# ------------------------------------------------------------------ intervals of counted scores


def from_counts(
    counts: np.ndarray, score: Callable[[np.ndarray], np.ndarray], seed: int = 0
) -> Estimate:
    """A score of summed counts with its 95 % interval over items (percentile bootstrap).

    Args:
        counts: (items, kinds); the score of all is score(counts.sum(0)).
        score: from (…, kinds) sums to (…) scores.
        seed: of the draws.

    Raises:
        BadInputError: no items.
    """
    counts = _counts(counts)
    value = float(score(counts.sum(0)))
    drawn = score(_resampled(len(counts), seed) @ counts)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Estimate(value, float(drawn.std(ddof=1)), float(low), float(high), len(counts))


def difference_from_counts(
    base: np.ndarray, other: np.ndarray, score: Callable, seed: int = 0
) -> Estimate:
    """other − base on the same items: both are scored on each draw of items."""
    base, other = _counts(base), _counts(other)
    if len(base) != len(other):
        raise BadInputError(f"Paired scores need the same items: {len(base)} and {len(other)}.")
    weights = _resampled(len(base), seed)
    drawn = score(weights @ other) - score(weights @ base)
    value = float(score(other.sum(0)) - score(base.sum(0)))
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Estimate(value, float(drawn.std(ddof=1)), float(low), float(high), len(base))


def _counts(counts) -> np.ndarray:
    counts = np.asarray(counts, dtype=float)
    if counts.ndim != 2 or not len(counts):
        raise BadInputError("There are no answers to score.")
    return counts


def _resampled(n: int, seed: int) -> np.ndarray:
    """(DRAWS, n) weights: how often each item is drawn when n are drawn with replacement."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=DRAWS).astype(float)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.zeros_like(above, dtype=float), where=below > 0)


# ------------------------------------------------------------------ F1 of yes


def binary_counts(truth: Sequence[str], given: Sequence[str], positive="yes") -> np.ndarray:
    """(items, 3): true positive, false positive, false negative.

    An answer that cannot be read counts as the wrong one: missed where yes is due, a false yes
    where no is. So leaving a question open never pays.
    """
    rows = []
    for due, said in _pairs(truth, given):
        yes = due == positive
        says = (not yes) if said == UNREAD else said == positive
        rows.append((yes and says, says and not yes, yes and not says))
    return np.array(rows, dtype=float)


def f1_of(sums: np.ndarray) -> np.ndarray:
    """F1 = 2 TP / (2 TP + FP + FN); 0 where nothing is positive."""
    tp, fp, fn = np.moveaxis(np.asarray(sums, dtype=float), -1, 0)
    return _ratio(2 * tp, 2 * tp + fp + fn)


def f1(truth: Sequence[str], given: Sequence[str], positive="yes", seed: int = 0) -> Estimate:
    """F1 of `positive`, as scikit-learn's f1_score, with an interval."""
    return from_counts(binary_counts(truth, given, positive), f1_of, seed)


# ------------------------------------------------------------------ macro-F1, accuracy


def label_counts(truth: Sequence[str], given: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """(items, 3 · labels): TP, FP, FN of each label. An unread answer misses its label."""
    unknown = sorted({str(t) for t in truth} - set(labels))
    if unknown:
        raise BadInputError(
            f"Labels outside the vocabulary {', '.join(labels)}: {', '.join(unknown)} "
            f"(the first in row {next(i for i, t in enumerate(truth, 1) if t in unknown)})."
        )
    place = {label: i for i, label in enumerate(labels)}
    made = np.zeros((len(truth), len(labels), 3))
    for i, (due, said) in enumerate(_pairs(truth, given)):
        if due == said:
            made[i, place[due], 0] = 1
            continue
        made[i, place[due], 2] = 1
        if said in place:
            made[i, place[said], 1] = 1
    return made.reshape(len(truth), -1)


def macro_f1_of(sums: np.ndarray) -> np.ndarray:
    """The mean of the labels' F1 (Oswal et al. 2025, equation 3)."""
    sums = np.asarray(sums, dtype=float)
    return f1_of(sums.reshape(*sums.shape[:-1], -1, 3)).mean(-1)


def macro_f1(truth, given, labels: Sequence[str], seed: int = 0) -> Estimate:
    """Macro-F1 over `labels`, as scikit-learn's f1_score(average="macro"), with an interval."""
    return from_counts(label_counts(truth, given, labels), macro_f1_of, seed)


# ------------------------------------------------------------------ F1* of extracted attributes


def attribute_counts(truth: Sequence[Mapping], given: Sequence[Mapping | str]) -> np.ndarray:
    """(items, 5): how many attributes of an item came out NN, NV, VN, VC, VW.

    Each attribute that is due has a value or null, and so has the answer:

        NN  null is due and null is given          NV  null is due, a value is given
        VN  a value is due, null is given          VC  the value that is due is given
        VW  a value is due, another one is given

    The paper's names for these are NV, IV, NL, CV and WV, of which it expands two to "null value".
    An attribute that the answer leaves out is null; one that nobody asked for is left aside. An
    unread answer misses all: NV where null is due, VN where a value is.
    """
    rows = []
    for due, said in _pairs(truth, given):
        row = dict.fromkeys(OUTCOMES, 0)
        for name, value in due.items():
            if said == UNREAD:
                row["NV" if value is None else "VN"] += 1
            else:
                row[outcome(value, said.get(name))] += 1
        rows.append([row[k] for k in OUTCOMES])
    return np.array(rows, dtype=float)


def outcome(due, said) -> str:
    """One of OUTCOMES for one attribute; texts are compared without case and outer space, numbers
    as numbers. None, "none", "null" and "" are null."""
    due, said = _value(due), _value(said)
    if due is None:
        return "NN" if said is None else "NV"
    if said is None:
        return "VN"
    return "VC" if said == due else "VW"


def _value(value):
    if isinstance(value, bool) or value is None:
        return None if value is None else str(value).lower()
    text = str(value).strip().lower()
    if text in ("", "none", "null", "n/a"):
        return None
    try:
        return float(text)
    except ValueError:
        return text


def f1_star_of(sums: np.ndarray) -> np.ndarray:
    """F1* = 2PR/(P + R) with P = (NN + VC)/(NN + NV + VC + VW) and R = (NN + VC)/N, N all that is
    due (Oswal et al. 2025, equation 1, with the names of `attribute_counts`).

    P leaves out what was given as null and is none (VN); R does not. So an answer that is null
    throughout has P = 1, and its F1* is 2s/(1 + s) for a share s of attributes that are null.
    """
    nn, nv, vn, vc, vw = np.moveaxis(np.asarray(sums, dtype=float), -1, 0)
    right = nn + vc
    p, r = _ratio(right, nn + nv + vc + vw), _ratio(right, nn + nv + vn + vc + vw)
    return _ratio(2 * p * r, p + r)


def f1_star(truth, given, seed: int = 0) -> Estimate:
    """F1* over items, each with its attributes, with an interval over items."""
    return from_counts(attribute_counts(truth, given), f1_star_of, seed)


def read_attributes(answer: str) -> Mapping | str:
    """An answer's attributes: {name: value} from an object, or from ECInstruct's list of
    {"attribute", "value", "source"}; UNREAD where it is no JSON of either shape."""
    try:
        found = read_json(answer)
    except BadInputError:
        return UNREAD
    if isinstance(found, Mapping):
        return found
    pairs = {}
    for entry in found if isinstance(found, list) else []:
        if not isinstance(entry, Mapping) or not {"attribute", "value"} <= entry.keys():
            return UNREAD
        pairs.setdefault(str(entry["attribute"]).lower(), entry["value"])
    return pairs or UNREAD


def entry_score(
    truth: Sequence[Sequence[Mapping]],
    given: Sequence[Sequence[Mapping]],
    count_predictions: bool = True,
) -> dict[str, float]:
    """Precision, recall and F1 of whole entries (attribute, value, source), as ECInstruct's authors
    score extraction: hits over entries given, hits over entries due.

    count_predictions=False repeats a slip in one version of their published script, which never
    filled its count of entries given: precision is hits / 1e-6 there, and F1 comes out as twice the
    recall, also above 1.
    """
    hits = due = said = 0
    for wanted, entries in _pairs(truth, given):
        keys = ("attribute", "value", "source")
        named = [tuple(str(e.get(k)) for k in keys) for e in entries]
        due += len(wanted)
        said += len(named)
        hits += sum(tuple(str(w.get(k)) for k in keys) in named for w in wanted)
    tiny = 1e-6
    precision, recall = hits / ((said if count_predictions else 0) + tiny), hits / max(due, 1)
    f = 2 * precision * recall / (precision + recall + tiny)
    return {"precision": precision, "recall": recall, "f1": f}


# ------------------------------------------------------------------ rankings


def hit_rate(orders: Sequence[Sequence[int]], right: Sequence[int], seed: int = 0) -> Estimate:
    """HR@1: the share of rankings whose first place is the right one; an empty one is a miss."""
    from lora_kit.evaluate.statistics import estimate

    hits = [float(bool(order) and order[0] == due) for order, due in _pairs(orders, right)]
    return estimate(hits, seed=seed) if hits else from_counts(np.empty((0, 1)), f1_of)


def ndcg(order: Sequence[int], labels: Sequence[str], gains: Mapping | None = None) -> float:
    """Normalised discounted cumulative gain of one ranking, Σ (2^g − 1)/log₂(k + 1) over places k
    from 1, divided by that of the best order (Burges et al. 2005, section 6).

    Args:
        order: the options, best first, numbered from 0; an option named twice counts once, one
            that does not exist not at all, one left out gains nothing.
        labels: each option's label, a key of `gains` (GAINS by default).

    Returns:
        Between 0 and 1; 0 where no option has a gain.
    """
    gains = GAINS if gains is None else gains
    gain = [2 ** gains[label] - 1 for label in labels]
    known = [i for i in dict.fromkeys(order) if 0 <= i < len(gain)]
    best = _discounted(sorted(gain, reverse=True))
    return _discounted([gain[i] for i in known]) / best if best else 0.0


def _discounted(gain: Sequence[float]) -> float:
    return sum(g / math.log2(place + 2) for place, g in enumerate(gain))


def mean_ndcg(
    orders: Sequence[Sequence[int]], labels: Sequence[Sequence[str]], seed: int = 0
) -> Estimate:
    """The mean of `ndcg` over questions, with its interval."""
    from lora_kit.evaluate.statistics import estimate

    return estimate([ndcg(order, names) for order, names in _pairs(orders, labels)], seed=seed)


def _pairs(truth: Sequence, given: Sequence) -> list[tuple]:
    if len(truth) != len(given):
        raise BadInputError(f"{len(given)} answers for {len(truth)} questions.")
    return list(zip(truth, given, strict=True))
