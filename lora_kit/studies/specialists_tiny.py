"""The study's question in a model small enough for the whole grid on a CPU.

The shipped addition model (`tinylm`, width 72: 0.25 million float32 weights) reads `12+34=` and
writes the sum, units first. An adapter teaches it a cipher: every digit of the sum three higher,
modulo 10. A cell takes seconds, so every rank can have every scaling rule at every learning rate,
and "tuned alike" can be meant: the best of the same rates for each.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import torch

from lora_kit.lora_study import IGNORED, Batch, Budget, placement_cell
from lora_kit.studies.specialists import SCALINGS, STUDY, alpha_of, scale_of

RANKS = (2, 8, 16, 64)
RATES = (1e-2, 3e-3, 1e-3, 3e-2)  # the middle first: what a cut-off run should have
STEPS, BATCH, TRAIN, TEST = 100, 32, 6000, 500
PLACEMENT, SHIFT = "all", 3


def cipher_batch(pairs: Sequence[tuple[int, int]]) -> Batch:
    """Rows `12+34=973.`: 046, each digit three higher, units first; labels behind the `=`."""
    from lora_kit.tinylm import encode_text

    def written(number: int) -> str:
        return "".join(str((int(d) + SHIFT) % 10) for d in f"{number:03d}"[::-1])

    ids = torch.tensor([encode_text(f"{a:02d}+{b:02d}={written(a + b)}.") for a, b in pairs])
    labels = ids.clone()
    labels[:, :6] = IGNORED
    return Batch(ids, torch.ones_like(ids), labels)


@cache
def cipher_rows(train: int = TRAIN, test: int = TEST) -> tuple[Batch, Batch]:
    """Training and test rows: disjoint pairs of numbers below 100."""
    pairs = [(a, b) for a in range(100) for b in range(100)]
    random.Random("cipher").shuffle(pairs)
    return cipher_batch(pairs[test : test + train]), cipher_batch(pairs[:test])


def tiny_cell(rank: int, scaling: str, rate: float, seed: int, steps: int = STEPS) -> dict:
    """One adapter on the addition model: {"rank", "scaling", "rate", "seed", "scale", "loss" (nats
    an answer token, held out), "accuracy", "trainable", "seconds"}."""
    from lora_kit.lora import LoraSpec
    from lora_kit.tinylm import load_addition_model

    train, test = cipher_rows()
    found = placement_cell(
        load_addition_model(),
        train,
        test,
        LoraSpec(rank, alpha_of(rank, scaling), PLACEMENT),
        Budget(steps, BATCH, rate),
        seed,
    )
    told = {"rank": rank, "scaling": scaling, "rate": rate, "seed": seed}
    told |= {"scale": scale_of(rank, scaling), "loss": round(found["loss"], 5)}
    told |= {"accuracy": round(found["accuracy"], 4), "trainable": found["trainable"]}
    return told | {"seconds": round(found["seconds"], 2)}


def first_step(rank: int, scaling: str, optimizer: str, seed: int, rows: int = 64) -> float:
    """By how much the first step of a fresh adapter lowers the loss of its own batch, in nats.

    B is zero and A random, so only B moves, by η·s·G Aᵀ under SGD and by η·sign(G Aᵀ) under Adam
    (G: the loss's gradient at the layer's weight), and W by s·B A. To first order the loss falls by

        SGD     η·s²·‖G Aᵀ‖²     ∝ s²·r
        AdamW   η·s·Σ|G Aᵀ|       ∝ s·r

    Args:
        optimizer: "SGD" (η = 1e-4) or "AdamW" (η = 1e-5): small, so that first order is enough.

    Raises:
        UnknownNameError: another optimiser.
    """
    from lora_kit.errors import unknown_name
    from lora_kit.lora import LoraSpec, add_lora
    from lora_kit.lora_study import answer_loss
    from lora_kit.tinylm import load_addition_model

    rates = {"SGD": 1e-4, "AdamW": 1e-5}
    if optimizer not in rates:
        raise unknown_name("optimiser", optimizer, rates)
    batch = cipher_rows()[0].take(torch.arange(rows))
    model = load_addition_model()
    add_lora(model, LoraSpec(rank, alpha_of(rank, scaling), PLACEMENT), seed=seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    options = {} if optimizer == "SGD" else {"weight_decay": 0.0}
    before = answer_loss(model, batch)
    before.backward()
    getattr(torch.optim, optimizer)(trained, lr=rates[optimizer], **options).step()
    with torch.no_grad():
        return float(before.detach() - answer_loss(model, batch))


def tiny_settings(
    ranks: Iterable[int] = RANKS, rates: Iterable[float] = RATES
) -> list[tuple[int, str, float]]:
    """Every (rank, rule, rate), rates outermost, each function of the three once: at the anchor
    rank the three rules are one, and only "fixed" stands for them."""
    from lora_kit.studies.specialists import ANCHOR

    return [
        (rank, scaling, rate)
        for rate in rates
        for rank in ranks
        for scaling in SCALINGS
        if rank != ANCHOR or scaling == "fixed"
    ]


def run_tiny(
    path: Path,
    seeds: Sequence[int] = (0, 1, 2),
    settings: Sequence[tuple[int, str, float]] | None = None,
    steps: int = STEPS,
    budget: float | None = None,
    command: str = "OMP_NUM_THREADS=1 python benchmarks/specialists.py --tiny",
    say=print,
) -> int:
    """Run what the record at `path` does not hold yet, and write it after every setting.

    Args:
        budget: seconds; no setting is started after them.

    Returns:
        The number of cells that are still missing.
    """
    from lora_kit.studies.records import read_record, write_record

    settings = list(tiny_settings() if settings is None else settings)
    cells = read_record(path).tables["cells"] if path.exists() else []
    there = {(c["rank"], c["scaling"], c["rate"], c["seed"]) for c in cells}
    started, missing = time.perf_counter(), 0
    for number, setting in enumerate(settings, 1):
        left = [seed for seed in seeds if (*setting, seed) not in there]
        if budget and time.perf_counter() - started > budget:
            missing += len(left)
            continue
        if not left:
            continue
        cells += [tiny_cell(*setting, seed, steps) for seed in left]
        write_record(_record(cells, steps, command), path)
        losses = ", ".join(f"{c['loss']:.4f}" for c in cells[-len(left) :])
        say(f"{number} of {len(settings)}: rank {setting[0]}, {setting[1]}, {setting[2]}: {losses}")
    return missing


def _record(cells: list[dict], steps: int, command: str):
    from lora_kit.studies.records import new_record

    return new_record(
        STUDY,
        command,
        parameters={
            "part": "tiny",
            "size": "small scale, a model of 0.25 million weights, a CPU",
            "placement": PLACEMENT,
            "steps": steps,
            "batch_size": BATCH,
            "rows": TRAIN,
            "test_rows": TEST,
        },
        metrics={"cells": float(len(cells))},
        tables={"cells": cells},
        seconds=sum(c["seconds"] for c in cells),
        model={"name": "addition-tiny/72", "source": "folder", "revision": None},
        data={
            "name": "sums of two numbers, each digit three higher",
            "rows": TRAIN,
            "source": "generated",
        },
    )
