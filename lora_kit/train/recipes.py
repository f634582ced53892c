"""Named recipes: hyperparameters with their source, each gap in a source filled openly."""

from __future__ import annotations

import random
from dataclasses import replace

from lora_kit.data import Dataset
from lora_kit.errors import BadInputError, unknown_name
from lora_kit.train.finetune import TrainResult, finetune
from lora_kit.train.papers import PAPER_RECIPES, Recipe, format_recipe
from lora_kit.train.small import SMALL_RECIPES
from lora_kit.train.spec import TrainSpec

RECIPES: dict[str, Recipe] = {
    "addition": Recipe(
        TrainSpec(steps=80, learning_rate=1e-3),
        "Ours: what lifts 1- and 2-digit sums within two minutes of two CPU cores.",
        skill="addition",
        digits=(1, 2),
        train=2000,
        test=80,
    ),
    "reversal": Recipe(
        TrainSpec(steps=30, batch_size=16, learning_rate=1e-3),
        "Ours: a second skill, small enough to train beside the first.",
        skill="reversal",
        digits=(3, 4),
        train=800,
        test=50,
    ),
    "alpaca": Recipe(
        TrainSpec(
            rank=16,
            alpha=16,
            learning_rate=2e-4,
            steps=0,
            batch_size=8,
            accumulation=1,
            max_length=512,
            style="alpaca",
            quantization="nf4",
        ),
        "Rank 16 on all linear layers and 4-bit NF4 as in QLoRA (Dettmers et al. 2023, section 4); "
        "rate 2e-4 is QLoRA's for 7B (its Table 9); batch and length are ours, for a T4.",
    ),
    **SMALL_RECIPES,
    **PAPER_RECIPES,
}


def recipe(name: str, **changes) -> TrainSpec:
    """The TrainSpec of a named recipe with some values changed (`steps=20`).

    Raises:
        UnknownNameError: no such recipe; BadInputError: a changed value is out of range.
    """
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    return replace(RECIPES[name].spec, **changes)


def changed_recipe(name: str, changes: dict[str, str]) -> TrainSpec:
    """The TrainSpec of a recipe with values given as words, as a command line has them.

    Raises:
        UnknownNameError: no such recipe or hyperparameter; BadInputError: a word that is no value.
    """
    spec, values = recipe(name), {}
    for key, word in changes.items():
        known = spec.to_dict()
        if key not in known:
            raise unknown_name("hyperparameter", key, known)
        kind = type(known[key])
        try:
            if kind is bool or word.lower() in ("true", "false"):
                values[key] = {"true": True, "false": False}[word.lower()]
            else:
                values[key] = kind(word)
        except (ValueError, KeyError):
            raise BadInputError(f"{key} takes a {kind.__name__}, not {word!r}.") from None
    return replace(spec, **values)


def describe_recipes() -> str:
    """Every recipe with its values and where they come from."""
    return "\n".join(f"{name}: {format_recipe(made)}" for name, made in RECIPES.items())


def skill_rows(name: str, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Training and test rows of a generated skill's recipe: disjoint, every length equally often.

    A length with few distinct rows (one-digit sums: 100) gives a fifth of them to the test at most,
    and its training rows are repeated until they are as many as those of the other lengths.

    Raises:
        UnknownNameError: no such recipe, or one that has no skill.
    """
    from lora_kit.skills import SKILLS, train_and_test

    skills = [k for k, r in RECIPES.items() if r.skill]
    if name not in skills:
        raise unknown_name("skill recipe", name, skills)
    made = RECIPES[name]
    train: list[dict] = []
    test: list[dict] = []
    for k in made.digits:
        held = min(made.test, SKILLS[made.skill].space(k) // 5)
        rows, asked = train_and_test(made.skill, k, made.train, held, seed)
        train += [rows[i % len(rows)] for i in range(made.train)]
        test += asked.rows
    for side in (train, test):
        random.Random(seed).shuffle(side)
    return (
        Dataset(made.skill, "train", tuple(train), "generated", f"seed {seed}"),
        Dataset(made.skill, "test", tuple(test), "generated", f"seed {seed}"),
    )


def skill_adapter(
    name: str, model: str, steps: int | None = None, seed: int = 0, engine: str = "auto"
) -> TrainResult:
    """The adapter of a generated skill, trained at the first call and reused afterwards.

    Args:
        name: a recipe with a skill ("addition", "reversal", "sorting-small", …).
        model: a registry name or a local folder.
        steps: optimiser steps; the recipe's by default.
        seed: of the rows, the adapter's start and the order of training.

    Returns:
        TrainResult with `train` and `test`, the disjoint rows.
    """
    train, test = skill_rows(name, seed)
    spec = recipe(name, seed=seed, **({} if steps is None else {"steps": steps}))
    result = finetune(model, train, spec, engine=engine)
    return replace(result, train=train, test=test)
