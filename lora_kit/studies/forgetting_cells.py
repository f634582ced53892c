"""The forgetting study's runs: teach a skill, fine-tune on Alpaca, ask again.

    teach      base + skill rows → LoRA, merged: a model that has something to forget
    quantised  that model with its weights through NF4, and nothing else: what QLoRA starts from
    tune       QLoRA on Alpaca rows, with or without replayed skill rows, merged over NF4's weights
    score      held-out items of each skill, strict and flexible, one 0 or 1 an item

before and after differ in the adapter alone: both stand on the weights that NF4 left.
"""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lora_kit import store
from lora_kit.data import Dataset
from lora_kit.errors import BadInputError
from lora_kit.studies.forgetting import STUDY, Cell, change, to_bits
from lora_kit.studies.records import Record, new_record
from lora_kit.train.recipes import recipe
from lora_kit.train.spec import TrainSpec

ADDITION_DIGITS = 2
MAX_ANSWER = {"addition": 24, "word_problems": 120}  # tokens: room for an answer in other words
HELD_OUT = 200  # Alpaca rows that no cell trains on
TEACHING = TrainSpec(rank=32, alpha=64, learning_rate=1e-3, steps=300, batch_size=64)


@dataclass(frozen=True)
class Material:
    """The rows of a study: each skill's training and test rows, Alpaca's, and Alpaca's held out.

    The study's new rows are Alpaca's, in the template `style`; any other rows can stand there.
    """

    train: Mapping[str, Dataset]
    test: Mapping[str, Dataset]
    alpaca: Dataset | None = None
    held_out: Dataset | None = None
    style: str = "alpaca"


def skill_material(skills: Sequence[str], train: int, test: int, seed: int) -> Material:
    """Training and test rows of each skill, disjoint: "addition" of two-digit numbers, and
    "word_problems"."""
    from lora_kit.skills import train_and_test
    from lora_kit.word_problems import word_problems

    made = {}
    for skill in skills:
        if skill == "addition":
            made[skill] = train_and_test(skill, ADDITION_DIGITS, train, test, seed)
        else:
            made[skill] = word_problems(train, test, seed)
    return Material({k: v[0] for k, v in made.items()}, {k: v[1] for k, v in made.items()})


def with_alpaca(material: Material, rows: Dataset, held_out: int = HELD_OUT) -> Material:
    """Add Alpaca: `held_out` rows for the loss (the same for every seed), the rest for training."""
    rest, held = rows.split(held_out, seed=0)
    return replace(material, alpaca=rest, held_out=held)


def as_prompts(rows: Dataset, style: str = "alpaca") -> Dataset:
    """Rows as prompt and completion in a template, so that rows of several styles can be mixed."""
    from lora_kit.prompts import to_example

    made = (to_example(row, style) for row in rows)
    pairs = tuple({"prompt": e.prompt, "completion": e.completion} for e in made)
    return Dataset(rows.name, rows.split_name, pairs, rows.source, rows.revision)


def mixed_rows(material: Material, cell: Cell) -> Dataset:
    """What a cell trains on: its Alpaca rows, in Alpaca's template, and the replayed skill rows,
    bare, as they were taught; chosen by the seed. The trainer shuffles.

    Raises:
        BadInputError: more Alpaca rows wanted than there are.
    """
    if material.alpaca is None or cell.rows > len(material.alpaca):
        have = 0 if material.alpaca is None else len(material.alpaca)
        raise BadInputError(f"{cell.rows:,} Alpaca rows were asked for and {have:,} are at hand.")
    rng = random.Random(f"mixed/{cell.seed}")
    alpaca = as_prompts(material.alpaca, material.style)
    rows = rng.sample(alpaca.rows, cell.rows)
    for skill in cell.skills:
        taught = as_prompts(material.train[skill], "bare").rows
        rows += rng.sample(taught, round(cell.replay * len(taught)))
    name = f"{alpaca.name} with replay" if cell.replay else alpaca.name
    return Dataset(name, alpaca.split_name, tuple(rows), alpaca.source, alpaca.revision)


# ------------------------------------------------------------------ training


@dataclass(frozen=True)
class Trained:
    """A plain model (the adapter merged over the base it was trained on) and its run."""

    model: object = field(repr=False)
    tokenizer: object = field(repr=False)
    losses: tuple[float, ...]
    seconds: float
    tokens: int
    steps: int
    peak_memory: int


def tuning_spec(cell: Cell, **changes) -> TrainSpec:
    """The paper's recipe with the cell's values. Checkpointing is off: it saves memory that the
    default model does not need, and changes no gradient."""
    spec = recipe(
        "mai",
        rank=cell.rank,
        alpha=cell.rank,
        learning_rate=cell.learning_rate,
        seed=cell.seed,
        style="bare",
        checkpointing=False,
    )
    return replace(spec, **changes)


def tune(base: str | Path, rows: Dataset, spec: TrainSpec, say=print) -> Trained:
    """Fine-tune with the kit's own engine and merge: dense weights, dequantised where they were
    4-bit, so that what is scored has the very weights that were trained over.

    Args:
        base: a registry name or a folder.
        rows: prompt/completion rows, in their templates already.
        spec: hyperparameters; `steps` 0 means its epochs.
        say: prints the progress.
    """
    from lora_kit.lora import bake_lora
    from lora_kit.models import fetch_model
    from lora_kit.train import engines
    from lora_kit.train.finetune import encode_rows

    model, tokenizer = engines.load_for_training(fetch_model(str(base)), spec, "native")
    encoded = encode_rows(rows, tokenizer, spec)
    per_step = spec.batch_size * spec.accumulation
    steps = spec.steps or math.ceil(math.ceil(len(encoded) / per_step) * spec.epochs)
    done = engines.train_native(model, tokenizer, encoded, spec, steps)
    say(f"{steps} steps, {done.tokens:,} tokens in {done.seconds:.1f} s")
    bake_lora(model, dense=True)
    _plain(model)
    return Trained(
        model=model,
        tokenizer=tokenizer,
        losses=tuple(loss for _, loss in done.losses),
        seconds=done.seconds,
        tokens=done.tokens or 0,
        steps=steps,
        peak_memory=done.peak_memory,
    )


def quantised(base: str | Path, quantization: str = "nf4"):
    """(model, tokenizer): a base whose weights went through the quantisation and came back."""
    from lora_kit.lora import LoraSpec, add_lora, bake_lora
    from lora_kit.models import load_model

    loaded = load_model(str(base), quantization=quantization)
    if quantization != "none":
        add_lora(loaded.model, LoraSpec(1, 1, "all"), seed=0)  # B = 0: nothing but the dense form
        bake_lora(loaded.model, dense=True)
        _plain(loaded.model)
    return loaded.model.eval(), loaded.tokenizer


def _plain(model) -> None:
    """Have transformers forget that the weights once came in 4 bits: they are dense now."""
    if getattr(model, "hf_quantizer", None) is not None:
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        model.is_loaded_in_4bit = False


def teach(
    base: str | Path,
    output: Path,
    material: Material,
    spec: TrainSpec = TEACHING,
    rounds: int = 3,
    target: float = 0.9,
    checks: int = 200,
    say: Callable[[str], None] = print,
) -> dict:
    """Teach skills to a base until it answers well, and save the merged model as a folder.

    A round is a whole run of `spec`; another follows while some skill's strict accuracy on the
    first `checks` *training* rows is below `target` (the test rows take no part in the choice).

    Returns:
        {"rounds": [{"steps", "seconds", "tokens", "loss", <skill>: accuracy}, …]}
    """
    taught = tuple(r for rows in material.train.values() for r in as_prompts(rows, "bare"))
    mixed = Dataset("+".join(material.train), "train", taught, "generated", f"seed {spec.seed}")
    told: list[dict] = []
    start: str | Path = base
    with store.new_folder(Path(output)) as folder, tempfile.TemporaryDirectory() as scratch:
        for number in range(1, rounds + 1):
            done = tune(start, mixed, replace(spec, seed=spec.seed + 100 * (number - 1)), say)
            reached = {
                skill: sum(score_skill(done.model, done.tokenizer, skill, rows.take(checks))[0])
                / min(checks, len(rows))
                for skill, rows in material.train.items()
            }
            last = sum(done.losses[-10:]) / len(done.losses[-10:])
            facts = {"steps": done.steps, "seconds": done.seconds, "tokens": done.tokens}
            told.append(facts | {"loss": last} | reached)
            say(f"round {number}: " + ", ".join(f"{k} {v:.2f}" for k, v in reached.items()))
            final = number == rounds or min(reached.values()) >= target
            start = folder if final else Path(scratch) / str(number)
            save_plain(done.model, done.tokenizer, start)
            if final:
                break
    return {"rounds": told}


def merged_base(base: str | Path, adapter: Path, folder: Path) -> Path:
    """A base with an adapter of this kit merged into it, saved as a folder.

    Raises:
        what `load_lora` raises where the adapter is another base's.
    """
    from lora_kit.lora import bake_lora, load_lora
    from lora_kit.models import load_model

    loaded = load_model(str(base))
    load_lora(loaded.model, adapter)
    bake_lora(loaded.model.eval())
    save_plain(loaded.model, loaded.tokenizer, folder)
    return folder


def save_plain(model, tokenizer, folder: Path) -> None:
    """Save a merged model as a folder that `load_model` takes."""
    from lora_kit.models import quiet_libraries

    with quiet_libraries():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


# ------------------------------------------------------------------ asking


def score_skill(
    model, tokenizer, skill: str, rows: Dataset, batch_size: int | None = None
) -> tuple[list[bool], list[bool], list[str]]:
    """(strict, flexible, the answers) of greedy answers to held-out rows.

    strict: the answer as it was taught: for "addition" the whole text, for "word_problems" the
    number behind `####`. flexible: the last number of the answer, whatever stands around it.
    """
    from lora_kit.generation import exact_match, generate
    from lora_kit.word_problems import judge_numbers, last_number

    if batch_size is None:
        batch_size = 512 if model.device.type == "cuda" else 32
    prompts = [row["prompt"] for row in rows]
    expected = [row["completion"] for row in rows]
    answers = generate(model, tokenizer, prompts, MAX_ANSWER[skill], batch_size)
    if skill == "word_problems":
        return (*judge_numbers(answers, expected), answers)
    flexible = [last_number(a) == e.strip() for a, e in zip(answers, expected, strict=True)]
    return exact_match(answers, expected), flexible, answers


def score_all(model, tokenizer, material: Material) -> dict[str, tuple]:
    """`score_skill` of every skill, by name."""
    return {
        skill: score_skill(model, tokenizer, skill, rows) for skill, rows in material.test.items()
    }


def alpaca_loss(model, tokenizer, rows: Dataset, spec: TrainSpec, style: str = "alpaca") -> float:
    """The held-out loss on Alpaca, in nats a token: what the fine-tuning was for."""
    from lora_kit.train.finetune import encode_rows
    from lora_kit.train.heldout import heldout_loss

    return heldout_loss(model, tokenizer, encode_rows(as_prompts(rows, style), tokenizer, spec))


def run_cell(
    base: Path,
    cell: Cell,
    material: Material,
    before: Mapping[str, tuple],
    command: str,
    loss_before: float | None = None,
    spec: TrainSpec | None = None,
    say: Callable[[str], None] = print,
) -> Record:
    """Fine-tune the taught base as the cell says; ask before and after on the same held-out items.

    Args:
        base: the taught model's folder.
        before: `score_all` of the base, quantised as the tuning quantises it.
        command: what makes this record again.
        loss_before: Alpaca's held-out loss before; None leaves the losses out.
        spec: the cell's `tuning_spec` by default.

    Returns:
        A record: per skill and judge the accuracy before and after, paired difference, forgetting
        rate; every item's 0 or 1 in its tables.
    """
    started = time.perf_counter()
    spec = spec or tuning_spec(cell)
    rows = mixed_rows(material, cell)
    done = tune(base, rows, spec, say)
    after = score_all(done.model, done.tokenizer, material)
    metrics: dict = {}
    items, shown = [], []
    for skill in cell.skills:
        for i, judge in enumerate(("strict", "flexible")):
            first, second = before[skill][i], after[skill][i]
            found, key = change(first, second), f"{skill}_{judge}"
            metrics[f"{key}_before"] = found.before.to_metric()
            metrics[f"{key}_after"] = found.after.to_metric()
            metrics[f"{key}_difference"] = found.difference.to_metric()
            metrics[f"{key}_p"] = found.test.p
            if found.rate is not None:
                metrics[f"{key}_forgetting"] = found.rate.to_metric()
            items.append(
                {"skill": skill, "judge": judge}
                | {"before": to_bits(first), "after": to_bits(second)}
            )
        for k in range(min(5, len(material.test[skill]))):
            row = material.test[skill][k]
            said = {"before": before[skill][2][k], "after": after[skill][2][k]}
            shown.append({"skill": skill, "prompt": row["prompt"], **said})
    if loss_before is not None:
        metrics["alpaca_loss_before"] = loss_before
        metrics["alpaca_loss_after"] = alpaca_loss(
            done.model, done.tokenizer, material.held_out, spec, material.style
        )
    metrics |= {"training_seconds": done.seconds, "tokens": float(done.tokens)}
    metrics["training_loss"] = sum(done.losses[-20:]) / len(done.losses[-20:])
    return new_record(
        STUDY,
        command,
        parameters={"part": "map", **cell.to_dict(), "steps": done.steps, "recipe": spec.to_dict()},
        metrics=metrics,
        tables={"items": items, "answers": shown},
        seed=cell.seed,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=done.peak_memory,
        data=rows.record(),
    )
