"""A training recipe as the target of a sweep: fine-tune, and measure on rows held out.

The parameters are `TrainSpec`'s, with the recipe's values as defaults, and five of the sweep's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_kit.errors import BadInputError, NotAvailableError
from lora_kit.studies.records import Record, new_record

EITHER = ("checkpointing", "compile")  # True, False, or a word
OWN = {
    "model": "smollm2-135m-instruct",
    "data": "",  # a file, a data set's name or a hub id; "" where the recipe makes its own rows
    "held_out": 100,  # rows kept for measuring
    "limit": 0,  # rows used; 0: all
    "engine": "auto",
}


def defaults(name: str) -> dict[str, Any]:
    """The parameters of a recipe: all of TrainSpec's but the seed, and this module's own."""
    from lora_kit.train.recipes import recipe

    values = recipe(name).to_dict()
    del values["seed"]
    return {**OWN, **values}


def check(name: str, values: dict[str, Any]) -> None:
    """Look at a whole setting before anything runs.

    Raises:
        BadInputError: a hyperparameter out of range, or no rows to train on.
        NotAvailableError: a file of rows that is not there.
    """
    from lora_kit.train.recipes import RECIPES
    from lora_kit.train.spec import TrainSpec

    TrainSpec(**{k: v for k, v in values.items() if k not in OWN})
    data = values["data"]
    if not data and not RECIPES[name].skill:
        raise BadInputError(
            f"The recipe {name} has no rows of its own: name some, as in -p data mine.jsonl."
        )
    if data and RECIPES[name].skill:
        raise BadInputError(f"The recipe {name} makes its own rows: leave data out.")
    if Path(data).suffix and not Path(data).expanduser().is_file():
        raise NotAvailableError(f"There is no file {data}.")
    if values["held_out"] < 1 or values["limit"] < 0:
        raise BadInputError("held_out must be at least 1, and limit 0 (all) or more.")


def run_cell(parameters: dict[str, Any], seed: int, folder: Path, recipe: str) -> Record:
    """Fine-tune with a recipe; metrics: the loss on held-out rows before and after, and the share
    of exact answers where the recipe teaches a generated skill."""
    from lora_kit.data_files import load_training_rows
    from lora_kit.train.finetune import finetune
    from lora_kit.train.from_data import losses_of
    from lora_kit.train.recipes import skill_rows
    from lora_kit.train.spec import TrainSpec

    own = {name: parameters[name] for name in OWN}
    spec = TrainSpec(**{k: v for k, v in parameters.items() if k not in OWN}, seed=seed)
    if own["data"]:
        rows = load_training_rows(own["data"], limit=own["limit"] or None).kept
        train, test = rows.split(own["held_out"], seed)
    else:
        train, test = skill_rows(recipe, seed)
    done = finetune(own["model"], train, spec, folder / "adapter", engine=own["engine"])
    before, after = losses_of(own["model"], done, test)
    last = [loss for _, loss in done.losses[-10:]]
    metrics: dict[str, Any] = {
        "heldout_loss_of_base": before,
        "heldout_loss": after,
        "training_loss": sum(last) / len(last),
    }
    if not own["data"]:
        metrics["exact"] = _exact(own["model"], done, test)
    return new_record(
        f"sweep_{recipe}",
        f"lora-kit sweep {recipe}",
        parameters=parameters,
        metrics=metrics,
        tables={"loss": [{"step": step, "loss": round(x, 5)} for step, x in done.losses]},
        seed=seed,
        seconds=done.seconds,
        peak_memory_bytes=done.peak_memory,
        model=done.base,
        data=done.data,
    )


def _exact(model: str, done, test) -> dict[str, Any]:
    import torch

    from lora_kit.evaluate.statistics import estimate
    from lora_kit.generation import exact_match, generate
    from lora_kit.lora import load_lora
    from lora_kit.models import load_model
    from lora_kit.prompts import to_example

    loaded = load_model(model, done.spec.dtype, done.spec.quantization)
    load_lora(loaded.model, done.adapter)
    examples = [to_example(row, done.spec.style, loaded.tokenizer) for row in test]
    dtype = getattr(torch, loaded.dtype)
    with torch.autocast(loaded.model.device.type, dtype, enabled=dtype != torch.float32):
        answers = generate(loaded.model, loaded.tokenizer, [e.prompt for e in examples])
    right = exact_match(answers, [e.completion for e in examples])
    return estimate([float(x) for x in right]).to_metric()
