"""Sums of more digits than were trained: Alwadhi 2024, section 5.3, at our scale.

The paper tunes on sums of 1 to 7 digits, tests on 1 to 12, and reads the answers three ways: all
digits right, the share of digits right, and the edit distance. Its curves were printed as pictures;
the records made here are what stands beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lora_kit.arithmetic import digit_accuracy, edit_distance
from lora_kit.data import Dataset
from lora_kit.errors import BadInputError

STUDY = "addition_lengths"


def addition_rows(
    most_trained: int, most_tested: int, train: int, test: int, seed: int
) -> tuple[Dataset, Dataset]:
    """Training sums of 1…most_trained digits, equally many of each, and disjoint test sums of
    1…most_tested digits.

    One digit has 100 sums: a fifth of them at most are tested, and the others are repeated.

    Raises:
        BadInputError: a number below 1, or fewer tested than trained lengths.
    """
    from lora_kit.skills import SKILLS, draw_skill

    if min(most_trained, train, test) < 1 or most_tested < most_trained:
        raise BadInputError("Digits and rows must be at least 1, and no length trained untested.")
    asked, learnt = [], []
    for k in range(1, most_tested + 1):
        space = SKILLS["addition"].space(k)
        held = draw_skill("addition", k, min(test, space // 5), seed)
        asked += held.rows
        if k <= most_trained:
            prompts = [row["prompt"] for row in held]
            rows = draw_skill("addition", k, min(train, space - len(held)), seed, exclude=prompts)
            learnt += [rows[i % len(rows)] for i in range(train)]
    made = (("train", learnt), ("test", asked))
    return tuple(
        Dataset("addition", split, tuple(rows), "generated", f"seed {seed}") for split, rows in made
    )


def score_lengths(answers: Sequence[str], rows: Sequence[dict]) -> list[dict]:
    """One row for each number of digits: exact answers with Wilson's interval, mean digit accuracy
    and mean edit distance. An answer is its first run of digits."""
    import re

    from lora_kit.evaluate.statistics import proportion

    read = [(re.findall(r"\d+", a) or [""])[0] for a in answers]
    found = []
    for k in sorted({row["digits"] for row in rows}):
        pairs = [(a, r["completion"]) for a, r in zip(read, rows, strict=True) if r["digits"] == k]
        exact = proportion(sum(a == b for a, b in pairs), len(pairs))
        found.append(
            {
                "digits": k,
                "n": len(pairs),
                "exact": exact.value,
                "low": exact.low,
                "high": exact.high,
                "digit_accuracy": sum(digit_accuracy(*pair) for pair in pairs) / len(pairs),
                "edit_distance": sum(edit_distance(*pair) for pair in pairs) / len(pairs),
            }
        )
    return found


def measure_lengths(
    model: str,
    most_trained: int,
    most_tested: int,
    train: int,
    test: int,
    seed: int,
    command: str,
    rows_a_step: int,
    output: Path | None = None,
    called: str | None = None,
    **changes,
):
    """Tune with the recipe `alwadhi`, ask the base and the tuned model, and return the record.

    Args:
        model: a registry name or a folder.
        most_trained, most_tested: digits; train, test: sums of each length.
        command: what a reader types.
        rows_a_step: sums an optimiser step.
        output: where the adapter goes; the cache by default.
        called: the model's name in the record, where `model` is a folder.
        changes: of the recipe (`steps`, `quantization`, `learning_rate`, …).
    """
    import torch

    from lora_kit.generation import generate
    from lora_kit.lora import disable_lora, load_lora
    from lora_kit.models import load_model
    from lora_kit.studies.records import new_record
    from lora_kit.train import finetune, recipe

    rows, asked = addition_rows(most_trained, most_tested, train, test, seed)
    spec = replace(recipe("alwadhi"), seed=seed, batch_size=rows_a_step, **changes)
    made = finetune(model, rows, spec, output=output, engine="native")
    loaded = load_model(model)
    loaded.name = called or loaded.name
    load_lora(loaded.model, made.adapter, "addition")
    dtype = getattr(torch, loaded.dtype)
    prompts, most = [row["prompt"] for row in asked], most_tested + 3
    with torch.autocast(loaded.model.device.type, dtype, enabled=dtype != torch.float32):
        tuned = generate(loaded.model, loaded.tokenizer, prompts, most, batch_size=64)
        with disable_lora(loaded.model):
            base = generate(loaded.model, loaded.tokenizer, prompts, most, batch_size=64)
    scores = {"base": score_lengths(base, asked.rows), "tuned": score_lengths(tuned, asked.rows)}
    seen = [row for row in scores["tuned"] if row["digits"] <= most_trained]
    beyond = [row for row in scores["tuned"] if row["digits"] > most_trained]
    return new_record(
        STUDY,
        command,
        parameters={
            "most_trained": most_trained,
            "most_tested": most_tested,
            "train_rows_a_length": train,
            **made.spec.to_dict(),
        },
        metrics={
            "exact_within": sum(r["exact"] for r in seen) / len(seen),
            **({"exact_beyond": sum(r["exact"] for r in beyond) / len(beyond)} if beyond else {}),
            "first_loss": made.losses[0][1],
            "last_loss": sum(loss for _, loss in made.losses[-10:]) / len(made.losses[-10:]),
        },
        tables=scores,
        seed=seed,
        seconds=made.seconds,
        peak_memory_bytes=made.peak_memory,
        model=loaded.record(),
        data=made.data,
    )
