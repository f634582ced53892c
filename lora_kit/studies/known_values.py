"""A benchmark's score held to the value it is known to have: parts of the rows, pooled.

The known value is the score of all rows; k parts of them are a sample without replacement, whose
interval is Wilson's, drawn in by the share of rows that is not known yet: half width × √(1 − n/N)
(Cochran 1977, section 2.6). With all rows there it has no width left, and the comparison is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lora_kit.errors import BadInputError
from lora_kit.evaluate.statistics import wilson
from lora_kit.studies.forgetting import from_bits
from lora_kit.studies.records import Record

STUDY = "known_values"
PARTS, ROWS = 20, 10_042
# SmolLM2-135M-Instruct, 0-shot, all rows: lm-eval 0.4.13's HFLM, fp16, one H100.
HELLASWAG = {"acc,none": 0.3363, "acc_norm,none": 0.4084}
DECIDED_ELSEWISE = 10  # of all rows: near-ties that fp16 and fp32 may round to different endings


def pooled(records: Sequence[Record]) -> list[dict]:
    """One row a metric over all parts: value, low, high, n, the known value, and whether it is
    inside. With all rows there, inside means that at most ten items differ.

    Raises:
        BadInputError: no records, a part twice, or parts asked in different ways.
    """
    if not records:
        raise BadInputError(
            "There is no part to pool; python benchmarks/known_values.py makes them."
        )
    parts = [record.parameters["rows"] for record in records]
    if twice := sorted({part for part in parts if parts.count(part) > 1}):
        raise BadInputError(f"Part {', '.join(twice)} is there twice.")
    for key in ("task", "version", "shots", "template", "harness", "dtype"):
        if len(found := {str(record.parameters[key]) for record in records}) > 1:
            raise BadInputError(f"Parts with another {key} cannot be pooled: {sorted(found)}.")
    rows = []
    for metric, known in HELLASWAG.items():
        scores = [
            score
            for record in records
            for kept in record.tables["items"]
            if kept["metric"] == metric
            for score in from_bits(kept["scores"])
        ]
        n, right = len(scores), round(sum(scores))
        value, left = right / n, math.sqrt(max(0.0, 1 - n / ROWS))
        low, high = (value + (end - value) * left for end in wilson(right, n))
        room = DECIDED_ELSEWISE / ROWS if n == ROWS else 0.0
        inside = low - room <= known <= high + room
        rows.append(
            {"metric": metric.removesuffix(",none"), "value": value, "low": low, "high": high}
            | {"n": n, "known": known, "inside": inside}
        )
    return rows
