"""Recipes of the papers this kit reproduces: each value with its source, each gap with a choice.

A paper rarely prints every hyperparameter. What it prints stands in `printed` with the place; what
it leaves out had to be chosen, and `chosen` says what and why. Together they name every field that
is not the kit's default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lora_kit.train.spec import TrainSpec


@dataclass(frozen=True)
class Recipe:
    """A TrainSpec and where its values come from.

    printed, chosen: field of the spec → its source, or the reason of the choice. For a generated
    skill also its rows: `digits`, and `train` and `test` rows for each number of digits (see
    `recipes.skill_rows`).
    """

    spec: TrainSpec
    source: str
    skill: str | None = None
    digits: tuple[int, ...] = ()
    train: int = 0
    test: int = 0
    printed: Mapping[str, str] = field(default_factory=dict)
    chosen: Mapping[str, str] = field(default_factory=dict)


_ZHAO = "LoRA Land (Zhao et al. 2024)"
_ALWADHI = "From Generalist to Specialist (Alwadhi)"
_SAHA = "Task-Specific LoRA Adapters (Saha et al. 2024)"
_MAI = "Slimming Down LLMs (Mai)"
_OSWAL = "Small language models for e-commerce (Oswal et al. 2025)"
_T4_CHOICES = {
    "learning_rate": "not printed: 2e-4, QLoRA's for models of this size (Dettmers et al. 2023)",
    "batch_size": "not printed: 8 rows a step, what Unsloth's notebooks reach with 2 × 4",
    "epochs": "not printed: 1",
    "schedule": "not printed: cosine",
    "warmup": "not printed: 0.03, as LoRA Land",
    "max_length": "not printed: 512, which cuts 2 of 5,000 Alpaca rows (SmolLM2's tokens)",
    "checkpointing": "not printed: on only where the memory planner finds it needed",
}

PAPER_RECIPES: dict[str, Recipe] = {
    "lora-land": Recipe(
        TrainSpec(
            rank=8,
            alpha=16,
            learning_rate=2e-3,
            steps=2500,
            batch_size=1,
            accumulation=16,
            warmup=0.03,
            max_length=512,
            style="bare",
            quantization="nf4",
            optimizer="paged-adamw",
            checkpointing=True,
        ),
        _ZHAO,
        printed={
            "rank": "section 3.4: LoRA rank 8",
            "learning_rate": "section 3.4: 0.002",
            "batch_size": "section 3.4: batch size 1",
            "accumulation": "section 3.4: 16 accumulation steps",
            "steps": "section 3.4: 40,000 training steps of batch 1, 16 to an optimiser step",
            "schedule": "section 3.4: cosine",
            "warmup": "section 3.4: 0.03 (1,200 of 40,000)",
            "optimizer": "section 3.4: paged Adam",
            "quantization": "section 3.4: 4-bit, bitsandbytes",
            "checkpointing": "section 3.4: gradient checkpointing",
        },
        chosen={
            "alpha": "not printed: 16, twice the rank as Ludwig's default does",
            "targets": "not printed: all linear layers, as QLoRA; Ludwig's default is q and v only",
            "max_length": "the 95th percentile of a task's inputs; 512 until it is measured",
            "style": "prompts are the task's own texts: taken as they are",
        },
    ),
    "alwadhi": Recipe(
        TrainSpec(
            rank=32,
            alpha=32,
            dropout=0.1,
            learning_rate=2e-4,
            steps=0,
            epochs=1,
            batch_size=8,
            warmup=0.03,
            max_length=512,
            style="bare",
            quantization="nf4",
        ),
        _ALWADHI,
        printed={
            "rank": "table 1: 32",
            "dropout": "table 1: 0.1",
            "quantization": "table 1: 4-bit NF4",
            "epochs": "table 1: 1",
        },
        chosen={
            "alpha": "not printed: equal to the rank, a scale of 1",
            "targets": "not printed: all linear layers, as QLoRA",
            "style": "not printed: the sum's own text",
            **{k: v for k, v in _T4_CHOICES.items() if k != "epochs"},
        },
    ),
    "saha": Recipe(
        TrainSpec(
            rank=16,
            alpha=16,
            targets="all",
            learning_rate=2e-4,
            steps=0,
            batch_size=8,
            warmup=0.03,
            max_length=512,
            style="alpaca",
            quantization="none",
        ),
        _SAHA,
        printed={
            "alpha": "section 4.2.1: lora_alpha 16 throughout",
            "rank": "section 4.2.1: 16, 32, 64 and 128 were tried; 16 stands here",
            "targets": "section 4.2.2: attention, mlp, and both; both (all) were best",
        },
        chosen={
            "quantization": "not printed: LoRA, so the base is not quantised",
            "style": "not printed: Alpaca's template",
            **_T4_CHOICES,
        },
    ),
    "oswal": Recipe(
        TrainSpec(
            rank=16,
            alpha=16,
            dropout=0.1,
            targets="all,lm_head",
            learning_rate=1e-4,
            steps=0,
            epochs=1,
            batch_size=64,
            warmup=0.05,
            max_length=1024,
            style="alpaca",
            quantization="nf4",
        ),
        _OSWAL,
        printed={
            "rank": "table 1: the one rank that gives its trainable parameters",
            "targets": "table 1: q, k, v, o, gate, up, down and lm_head give its numbers",
            "quantization": "section 3.2: QLoRA",
        },
        chosen={
            "alpha": "16, as the authors' published adapters; in the paper not printed",
            "dropout": "0.1, as the authors' published adapters; not printed",
            "learning_rate": "1e-4, as the authors' published settings; not printed",
            "batch_size": "64, as the authors' published settings; not printed",
            "schedule": "cosine, as the authors' published settings; not printed",
            "warmup": "0.05, as the authors' published settings; not printed",
            "epochs": "not printed: 1",
            "max_length": "not printed: 1024, room for product reviews",
            "style": "ECInstruct's rows are instruction, input, output: Alpaca's template",
        },
    ),
    "mai": Recipe(
        TrainSpec(
            rank=16,
            alpha=16,
            learning_rate=2e-4,
            steps=0,
            batch_size=8,
            warmup=0.03,
            max_length=512,
            style="alpaca",
            quantization="nf4",
            optimizer="adamw-8bit",
        ),
        _MAI,
        printed={
            "quantization": "table 1: QLoRA, on a Colab T4 with Unsloth; 2,000 rows of Alpaca",
        },
        chosen={
            "rank": "not printed: 16, as in the Unsloth notebook for this model",
            "alpha": "not printed: 16, as in the Unsloth notebook for this model",
            "targets": "not printed: all linear layers, as QLoRA",
            "optimizer": "not printed: 8-bit AdamW, which the paper cites",
            "style": "Alpaca rows in Alpaca's template",
            **_T4_CHOICES,
        },
    ),
}


def format_recipe(made: Recipe) -> str:
    """The recipe's values, each with its source."""
    lines = [made.source]
    for name, value in made.spec.to_dict().items():
        why = made.printed.get(name) or made.chosen.get(name)
        if why:
            lines.append(f"  {name} = {value}: {why}")
    return "\n".join(lines)
