"""Answers to sums, scored: by length, by place, by carries, and by kind of error.

All tables are lists of plain rows, as `studies.records` keeps them. `answers` are digits already
read off a form (`arithmetic.Form.read`); `rows` have "digits" (k) and "sum", and carries are
counted in the operands.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise

from lora_kit.arithmetic import (
    KINDS,
    carries,
    digit_accuracy,
    edit_distance,
    error_kind,
)

LONG_CHAIN = 4  # chains of so many carries and more are counted together


def by_length(answers: Sequence[str], rows: Sequence[Mapping]) -> list[dict]:
    """One row for each number of digits k: exact answers with Wilson's interval, mean digit
    accuracy and edit distance, and how many answers are wrong in which way."""
    from lora_kit.evaluate.statistics import proportion

    found = []
    for k, pairs in sorted(_grouped(answers, rows).items()):
        kinds = Counter(error_kind(*pair) for pair in pairs)
        exact = proportion(kinds["right"], len(pairs))
        found.append(
            {"digits": k, "n": len(pairs), "exact": exact.value}
            | {"low": exact.low, "high": exact.high}
            | {"digit_accuracy": sum(digit_accuracy(*p) for p in pairs) / len(pairs)}
            | {"edit_distance": sum(edit_distance(*p) for p in pairs) / len(pairs)}
            | {kind: kinds[kind] for kind in KINDS[1:]}
        )
    return found


def by_place(answers: Sequence[str], rows: Sequence[Mapping]) -> list[dict]:
    """For each k and each place of the sum (0: units), the share of answers with the right digit
    there, counted from the right; `n` sums are long enough to have the place."""
    found = []
    for k, pairs in sorted(_grouped(answers, rows).items()):
        right, asked = defaultdict(int), defaultdict(int)
        for answer, expected in pairs:
            for place, digit in enumerate(reversed(expected)):
                asked[place] += 1
                right[place] += answer[-1 - place : len(answer) - place] == digit
        found += [
            {"digits": k, "place": p, "n": asked[p], "right": right[p] / asked[p]}
            for p in sorted(asked)
        ]
    return found


def by_carries(
    answers: Sequence[str], rows: Sequence[Mapping], operands: Sequence[tuple[str, str]]
) -> list[dict]:
    """For each k and longest chain of carries (LONG_CHAIN and more together): exact answers."""
    right, asked = defaultdict(int), defaultdict(int)
    for answer, row, pair in zip(answers, rows, operands, strict=True):
        key = row["digits"], min(carries(*pair)[1], LONG_CHAIN)
        asked[key] += 1
        right[key] += answer == row["sum"]
    return [
        {"digits": k, "chain": chain, "n": n, "right": right[k, chain]}
        for (k, chain), n in sorted(asked.items())
    ]


def bits(answers: Sequence[str], rows: Sequence[Mapping]) -> list[dict]:
    """Each item's 1 or 0, in order, by length: what paired tests between runs need."""
    return [
        {"digits": k, "scores": "".join(str(int(a == e)) for a, e in pairs)}
        for k, pairs in sorted(_grouped(answers, rows).items())
    ]


def _grouped(answers, rows) -> dict[int, list[tuple[str, str]]]:
    grouped = defaultdict(list)
    for answer, row in zip(answers, rows, strict=True):
        grouped[row["digits"]].append((answer, row["sum"]))
    return grouped


# ------------------------------------------------------------------ the metric, looked at


def if_independent(places: Sequence[Mapping], digits: int) -> float | None:
    """∏ᵢ pᵢ over the places of k-digit sums: how often all digits would be right if they were
    right or wrong independently of one another. A place that few sums have (the last carry) counts
    with the share of sums that have it. None where there are no rows."""
    mine = [row for row in places if row["digits"] == digits]
    if not mine:
        return None
    most, product = max(row["n"] for row in mine), 1.0
    for row in mine:
        share = row["n"] / most
        product *= 1 - share + share * row["right"]
    return product


def artefact_rows(lengths: Sequence[Mapping], places: Sequence[Mapping]) -> list[dict]:
    """The emergence argument (Schaeffer et al. 2023) as numbers, one row for each k.

    If every digit is right with probability p, a sum of n digits is right with pⁿ: a curve that
    falls off a cliff in n or p without anything but the metric doing so. Columns: exact; digit
    accuracy p; pⁿ with n the mean length of the sums (n = k + share with a last carry, put as
    k + ½); ∏ of the places' own accuracies.
    """
    return [
        {
            "digits": row["digits"],
            "exact": row["exact"],
            "digit_accuracy": row["digit_accuracy"],
            "power": row["digit_accuracy"] ** (row["digits"] + 0.5),
            "product": if_independent(places, row["digits"]),
            "edit_distance": row["edit_distance"],
        }
        for row in lengths
    ]


def largest_step(lengths: Sequence[Mapping], metric: str) -> tuple[int, float]:
    """(k, fall): the largest fall of a metric from one length k to the next, and where it is.

    Edit distance is taken over the k + 1 digits an answer may have, so that it too lies in 0…1.
    """

    def value(row: Mapping) -> float:
        if metric == "edit_distance":
            return 1 - min(1.0, row[metric] / (row["digits"] + 1))
        return row[metric]

    falls = [(value(a) - value(b), a["digits"]) for a, b in pairwise(lengths)]
    if not falls:
        return 0, 0.0
    fall, k = max(falls)
    return k, fall


def edge(lengths: Sequence[Mapping], level: float = 0.5) -> int:
    """The most digits up to which every length is answered with at least this exact accuracy."""
    reached = 0
    for row in sorted(lengths, key=lambda row: row["digits"]):
        if row["exact"] < level:
            break
        reached = row["digits"]
    return reached
