"""Cells of the from-scratch half of the addition study: one small transformer, one seed.

A cell trains (`coupled_addition.train_coupled`), is asked held-out sums of every length in
`lengths`, the hardest sums there are (a carry through every place), and says where it ends. It runs
on a CPU in minutes; a cell that is cut off carries on from its checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_kit.errors import BadInputError
from lora_kit.studies.records import Record, new_record

STUDY = "10_arithmetic"
FOLDER = "10_arithmetic/coupled"  # of the records, under data/results
DEFAULTS: dict[str, Any] = {
    "scheme": "coupled",  # coupled, abacus or absolute
    "reading": "relative",  # learnt or relative
    "sharpen": True,
    "most_trained": 10,  # digits
    "most_tested": 60,  # digits: the last length asked
    "width": 64,
    "layers": 1,
    "heads": 4,
    "steps": 1500,
    "batch": 128,
    "learning_rate": 3e-3,
    "test_rows": 500,  # of each length
    "hard_rows": 100,  # of each length, with a carry through every place
}
LENGTHS = (*range(1, 11), 12, 14, 17, 20, 25, 30, 40, 50, 60, 70, 80, 90, 100)


def check_setting(values: Mapping[str, Any]) -> None:
    """Raises BadInputError where a value is out of range."""
    spec_of(values, 0)
    if min(values["test_rows"], values["hard_rows"]) < 1:
        raise BadInputError("test_rows and hard_rows must be at least 1.")


def spec_of(values: Mapping[str, Any], seed: int):
    """The CoupledSpec of a setting."""
    from lora_kit.coupled_addition import CoupledSpec

    mine = {k: v for k, v in values.items() if k not in ("test_rows", "hard_rows")}
    return CoupledSpec(**mine, seed=seed)


def run_cell(parameters: dict[str, Any], seed: int, folder: Path) -> Record:
    """Run one setting with one seed; see `arithmetic_cells.run_cell`.

    Metrics: exact accuracy at the longest trained length, at 14 and 50 digits, and `edge_95`, the
    most digits up to which every length asked is at 95 % or more. Tables: `lengths`, `hard`,
    `places` (as of `arithmetic_scores`), `losses`.
    """
    from lora_kit.coupled_addition import train_coupled
    from lora_kit.hardware import PeakMemory

    values = {**DEFAULTS, **parameters}
    check_setting(values)
    spec = spec_of(values, seed)
    started = time.perf_counter()
    with PeakMemory() as memory:
        model, facts = train_coupled(spec, Path(folder) / "checkpoints")
        tables = score_model(model, values["test_rows"], values["hard_rows"])
    return new_record(
        STUDY,
        "lora-kit sweep coupled --grid benchmarks/grids/coupled.yaml",
        parameters=dict(values),
        metrics=summary(tables["lengths"], spec.most_trained)
        | {"training_seconds": facts["seconds"], "last_loss": facts["losses"][-1][1]}
        | {"parameters": float(sum(p.numel() for p in model.parameters()))},
        tables=tables | {"losses": [{"step": s, "loss": loss} for s, loss in facts["losses"]]},
        seed=seed,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=memory.peak,
    )


def score_model(model, test_rows: int, hard_rows: int) -> dict[str, list[dict]]:
    """`lengths`, `hard` and `places` of a model, over the lengths that fit it."""
    import torch

    from lora_kit.coupled_addition import carry_digits, held_out_digits, right_answers
    from lora_kit.evaluate.statistics import proportion

    spec = model.spec
    tables: dict[str, list[dict]] = {"lengths": [], "hard": [], "places": []}
    wanted = sorted({k for k in (*LENGTHS, spec.most_trained) if k <= spec.most_tested})
    for k in wanted:
        generator = torch.Generator().manual_seed(k)
        for name, digits in (
            ("lengths", held_out_digits(k, test_rows)),
            ("hard", carry_digits(hard_rows, k, generator)),
        ):
            right = right_answers(model, digits)
            exact = proportion(int(right.all(1).sum()), len(digits))
            tables[name].append(
                {"digits": k, "n": len(digits), "exact": exact.value}
                | {"low": exact.low, "high": exact.high}
                | {"digit_accuracy": right[:, :-1].float().mean().item()}
            )
            if name == "lengths" and k in (spec.most_trained, 20, 30, 50):
                shares = right[:, :-1].float().mean(0).tolist()
                tables["places"] += [
                    {"digits": k, "place": i, "n": len(digits), "right": share}
                    for i, share in enumerate(shares)
                ]
    return tables


def summary(lengths: list[dict], most_trained: int) -> dict[str, Any]:
    """The metrics of a model's table of lengths."""
    from lora_kit.studies.arithmetic_scores import edge

    found: dict[str, Any] = {"edge_95": float(edge(lengths, 0.95))}
    for row in lengths:
        if row["digits"] in (most_trained, 14, 50):
            name = "trained" if row["digits"] == most_trained else str(row["digits"])
            found[f"exact_{name}"] = {
                "value": row["exact"], "low": row["low"], "high": row["high"], "n": row["n"]
            }  # fmt: skip
    return found
