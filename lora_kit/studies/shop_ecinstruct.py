"""The paper's protocol on ECInstruct: one adapter for all tasks, scored in and out of domain.

What Oswal et al. 2025 did: QLoRA on the training rows with diverse instructions, then each task's
test rows with the task's own metric. The rows come from the hub or LORA_KIT_DATA (`shop_tasks`).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_kit.data import Dataset
from lora_kit.errors import BadInputError
from lora_kit.evaluate.shop_tasks import SHOP_TASKS, as_instruction, score, select, shop_task
from lora_kit.train.spec import TrainSpec


def training_set(
    data: Dataset, tasks: Sequence[str], instructions: str = "Diverse", rows: int = 0, seed: int = 0
) -> Dataset:
    """The training rows of some tasks as instruction, input, output, shuffled.

    Args:
        data: what `load_ecinstruct` gives.
        tasks: keys or names.
        rows: at most so many of each task, drawn by the seed; 0 for all.

    Raises:
        UnknownNameError: no such task; BadInputError: a task without such rows.
    """
    rng = random.Random(f"ecinstruct/{seed}")
    made = []
    for task in tasks:
        mine = select(data, task, "train", instructions=instructions)
        made += rng.sample(mine, min(rows, len(mine))) if rows else list(mine)
    rng.shuffle(made)
    name = "ecinstruct-" + "-".join(shop_task(t).key.lower() for t in tasks)
    chosen = tuple(as_instruction(row) for row in made)
    return Dataset(name, "train", chosen, data.source, data.revision)


def answer(model, tokenizer, task: str, rows: Sequence[Mapping], style: str, batch_size=16):
    """Greedy answers to a task's rows, in the prompt style that training used."""
    import torch

    from lora_kit.generation import generate
    from lora_kit.prompts import to_example

    prompts = [to_example(as_instruction(row), style, tokenizer).prompt for row in rows]
    dtype = model.get_input_embeddings().weight.dtype
    with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        return generate(model, tokenizer, prompts, shop_task(task).max_new_tokens, batch_size)


def tune_and_score(
    model: str,
    data: Dataset,
    tasks: Sequence[str] = tuple(SHOP_TASKS),
    spec: TrainSpec | None = None,
    train_rows: int = 0,
    test_rows: int = 0,
    scorer: str = "roberta-large",
    labels: Sequence[Sequence[str]] | None = None,
    output: Path | None = None,
    seed: int = 0,
    say=print,
) -> list[dict]:
    """Tune one adapter on all the tasks' training rows and score it on each task's test rows.

    Training carries on after a crash (`finetune`); a finished adapter is reused.

    Args:
        model: a registry name or a folder.
        spec: recipe "oswal" by default.
        train_rows, test_rows: of each task, 0 for all.
        scorer: of F_BERT.
        labels: of the ranking rows; without them QPR is left out, and said so.
        output: the adapter's folder.

    Returns:
        A line for each task and domain: metric, score, interval, n, unread.

    Raises:
        what `training_set`, `finetune` and `score` raise.
    """
    from lora_kit.lora import load_lora
    from lora_kit.models import load_model
    from lora_kit.train.finetune import finetune
    from lora_kit.train.recipes import recipe

    spec = spec or recipe("oswal", seed=seed)
    rows = training_set(data, tasks, rows=train_rows, seed=seed)
    result = finetune(model, rows, spec, output, engine="native")
    say(f"{len(rows):,} rows, {result.seconds / 60:.1f} minutes, {result.trainable:,} trained")
    loaded = load_model(model, spec.dtype, spec.quantization)
    load_lora(loaded.model, result.adapter)
    lines = []
    for task in tasks:
        for domain in ("IND", "OOD"):
            try:
                asked = select(data, task, domain=domain)
            except BadInputError:
                continue  # four tasks have no rows out of domain
            key = shop_task(task).key
            if key == "QPR" and labels is None:
                say("QPR is left out: its options' labels were not given")
                continue
            asked = asked[: test_rows or None]
            said = answer(loaded.model, loaded.tokenizer, task, asked, spec.style)
            more = {"labels": labels[: len(asked)]} if key == "QPR" else {}
            found = score(task, asked, said, scorer=scorer, seed=seed, **more)
            lines.append({"task": key, "domain": domain, **found.row()})
            say(f"{key} {domain}: {found.score}, {found.unread} unread")
    if not lines:
        raise BadInputError(f"No test rows of {', '.join(tasks)} are at hand.")
    return lines
