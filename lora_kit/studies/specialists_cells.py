"""Cells of the specialists study as a sweep runs them: `run_cell(parameters, seed, folder)`.

    base    the model as it is, on every test at hand
    tune    a LoRA adapter on one task (or on all), by the kit's own engine; held-out loss with the
            adapter beside its base, tests with the adapter merged
    full    the same with every weight trained, in float32
    route   which specialist the kit's router picks for every item of every test
    serve   bytes and seconds of the ways to hold three specialists

Before anything is loaded the planner says whether the cell fits the card it is meant for, and each
task's and test's data is looked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_kit.architectures import Architecture, architecture
from lora_kit.data import Dataset
from lora_kit.errors import UnknownNameError
from lora_kit.studies.records import Record, new_record
from lora_kit.studies.specialists import DEFAULTS, STUDY, Cell, cell_from
from lora_kit.studies.specialists_plan import why_not
from lora_kit.studies.specialists_tasks import (
    TESTS,
    known_task,
    require_data,
    task_rows,
    tests_of,
)
from lora_kit.train.spec import TrainSpec

__all__ = ["DEFAULTS", "check_setting", "run_cell"]
COMMAND = "lora-kit sweep specialists --grid benchmarks/grids/specialists.yaml --seeds 3"
WARMUP = 0.1
_LOSSES: dict[tuple, float] = {}  # of bases, in this process


def check_setting(parameters: Mapping) -> None:
    """Refuse a setting that is none, before a sweep starts; raises what `cell_from` does."""
    cell = cell_from(parameters, 0)
    if cell.part in ("tune", "full") and cell.task != "all":
        known_task(cell.task)


def run_cell(
    parameters: Mapping,
    seed: int,
    folder: Path,
    say: Callable[[str], None] = print,
    command: str = COMMAND,
) -> Record:
    """Run one cell and return its record.

    A cell that the planner finds too large is not run: its record has no metrics, and the reason
    as `skipped` among its parameters.

    Args:
        parameters: over `DEFAULTS`.
        seed: of the adapter's start, the training rows and their order, and what is sampled.
        folder: where the generations go, in the paper's formats.

    Raises:
        UnknownNameError, BadInputError: a parameter or value that no cell has.
        NotAvailableError: the task's or its own tests' data is not at hand; named.
    """
    cell, started = cell_from(parameters, seed), time.perf_counter()
    asked = {"parameters": cell.to_dict() | {"alpha": cell.alpha, "scale": cell.scale}}
    if reason := why_not(cell, shape_of(cell.model)):
        say(f"{cell.name}: skipped, {reason}")
        asked["parameters"]["skipped"] = reason
        return new_record(STUDY, command, **asked, metrics={}, seed=seed, seconds=0.0)
    if cell.part in ("tune", "full") and cell.task != "all":
        require_data(cell.task, known_task(cell.task).needs)
        if cell.tests != "loss":
            for test in known_task(cell.task).tests:
                require_data(f"{cell.task}, tested on {test},", TESTS[test].needs)
    runs = {"base": run_base, "tune": run_tune, "full": run_tune}
    if cell.part in runs:
        found = runs[cell.part](cell, Path(folder), say)
    else:
        from lora_kit.studies import specialists_serving

        found = getattr(specialists_serving, f"run_{cell.part}")(cell, say)
    asked["parameters"] |= found.parameters
    return new_record(
        STUDY,
        command,
        **asked,
        metrics=found.metrics,
        tables=found.tables,
        seed=seed,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=found.peak_memory,
        model=found.model,
        data=found.data,
    )


@dataclass
class Found:
    """What a cell measured; `peak_memory` in bytes."""

    metrics: dict = field(default_factory=dict)
    tables: dict = field(default_factory=dict)
    parameters: dict = field(default_factory=dict)
    model: dict | None = None
    data: dict | None = None
    peak_memory: int | None = None


def shape_of(model: str) -> Architecture:
    """The architecture of a model, by its name, or read from its folder."""
    try:
        return architecture(Path(model).name)
    except UnknownNameError:
        from lora_kit.models import fetch_model
        from lora_kit.store import read_json

        files = fetch_model(model)
        return Architecture.from_config(read_json(files.path / "config.json"), files.name)


# ------------------------------------------------------------------ base, tune, full


def run_base(cell: Cell, folder: Path, say) -> Found:
    from lora_kit.models import load_model

    loaded = load_model(cell.model)
    found = Found(model=loaded.record())
    score(loaded.model, loaded.tokenizer, cell, tests_of("all", "all"), folder, found, say)
    return found


def spec_of(cell: Cell) -> TrainSpec:
    """The cell's hyperparameters as the engine takes them. Rank-stabilised scaling is an alpha of
    4·√r over the engine's division by r: the same numbers."""
    return TrainSpec(
        rank=cell.rank,
        alpha=cell.alpha,
        targets=cell.placement,
        learning_rate=cell.learning_rate,
        steps=cell.steps,
        batch_size=cell.batch_size,
        warmup=WARMUP,
        max_length=cell.max_length,
        style="bare",
        dtype="float32" if cell.part == "full" else "auto",
        seed=cell.seed,
    )


def run_tune(cell: Cell, folder: Path, say) -> Found:
    from lora_kit.lora import bake_lora
    from lora_kit.models import fetch_model, load_model
    from lora_kit.train import engines, native
    from lora_kit.train.finetune import encode_rows

    rows, held = task_rows(cell.task, cell.rows, cell.heldout, cell.seed)
    spec = spec_of(cell)
    if cell.part == "full":
        loaded = load_model(cell.model, dtype=spec.dtype)
        model, tokenizer, facts = loaded.model, loaded.tokenizer, loaded.record()
        model.requires_grad_(True)
    else:
        files = fetch_model(cell.model)
        model, tokenizer = native.load(files.path, spec)
        facts = {"name": files.name, "source": files.source, "revision": files.revision}
    encoded, asked = encode_rows(rows, tokenizer, spec), encode_rows(held, tokenizer, spec)
    spec = _settled(spec, cell, max(len(row["input_ids"]) for row in encoded))
    steps = cell.steps or -(-len(encoded) // (spec.batch_size * spec.accumulation))
    found = Found(model=facts, data=rows.record())
    key = (cell.model, str(facts["revision"]), held.fingerprint, cell.max_length, spec.dtype)
    if key not in _LOSSES:  # the same for every cell of a task
        _LOSSES[key] = _loss(model, tokenizer, asked)
    found.metrics["loss_before"] = _LOSSES[key]
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    done = engines.train_native(model, tokenizer, encoded, spec, steps)
    last = [loss for _, loss in done.losses[-max(1, steps // 10) :]]
    found.metrics |= {
        "loss": _loss(model, tokenizer, asked),
        "training_loss": sum(last) / len(last),
        "trainable": float(trainable),
        "tokens": float(done.tokens),
        "training_seconds": done.seconds,
    }
    found.peak_memory = done.peak_memory
    found.parameters = {"steps_done": steps, "skipped_steps": done.skipped}
    found.parameters |= {"heldout_data": held.record()}
    if cell.part == "tune":
        from lora_kit.studies.specialists_measures import update_norms

        found.metrics |= update_norms(model)
    say(f"{cell.name}: loss {found.metrics['loss_before']:.4f} → {found.metrics['loss']:.4f}")
    if names := tests_of(cell.task, cell.tests):
        if cell.part == "tune":
            bake_lora(model, dense=True)
        model.requires_grad_(False)
        score(model.eval(), tokenizer, cell, names, folder, found, say)
    return found


def _settled(spec: TrainSpec, cell: Cell, longest: int) -> TrainSpec:
    """Rows at once and checkpointing by the memory planner; a step's rows stay as they were."""
    from lora_kit.hardware import detect
    from lora_kit.train.settings import settle

    settled, _ = settle(spec, shape_of(cell.model), detect(), "native", longest)
    return settled


def _loss(model, tokenizer, encoded) -> float:
    """Held-out loss in nats a token, in the arithmetic of training: the adapter beside its base."""
    import torch

    from lora_kit.train.heldout import heldout_loss

    weight = model.get_input_embeddings().weight
    training = model.training
    model.eval()
    with torch.autocast(weight.device.type, weight.dtype, enabled=weight.dtype != torch.float32):
        value = heldout_loss(model, tokenizer, encoded)
    model.train(training)
    return value


# ------------------------------------------------------------------ tests


def score(
    model, tokenizer, cell: Cell, names: Sequence[str], folder: Path, found: Found, say
) -> None:
    """Ask the tests, keep the generations, and put scores into `found`: a metric for each test and
    judge, and every item's score, packed, in its table `items`."""
    from lora_kit.studies.specialists_generations import item_row, judge, write_generations

    items = found.tables.setdefault("items", [])
    for name in names:
        test, began = TESTS[name], time.perf_counter()
        if test.judge == "choice":
            judged = _choose(model, tokenizer, cell)
        else:
            rows = test.items()[: cell.limit or None]
            answers = answer_items(model, tokenizer, test, rows, cell)
            about = {"cell": cell.name, "model": cell.model, "seed": cell.seed}
            write_generations(Path(folder) / "generations", test, rows, answers, **about)
            judged = judge(test, rows, answers)
        for metric, mean in judged.means.items():
            found.metrics[f"{name} {metric}"] = mean.to_metric()
            items.append(item_row(judged, metric, test.version))
        if judged.note:
            found.parameters.setdefault("unjudged", {})[name] = judged.note
        seconds = time.perf_counter() - began
        told = ", ".join(f"{k} {v.value:.4f}" for k, v in judged.means.items())
        say(f"{cell.name}: {name} {told or judged.note} ({seconds:.0f} s)")


def answer_items(model, tokenizer, test, rows, cell: Cell) -> list[list[str]]:
    """For each row its answers: one greedy, or as many drawn as the cell says."""
    from lora_kit.studies.specialists_measures import write_answers

    each = answers_each(test.judge, cell)
    prompts = [row["prompt"] for row in rows for _ in range(each)]
    texts = write_answers(
        model, tokenizer, prompts, STOPS[test.judge], test.tokens, each > 1, cell.seed
    )
    return [texts[i : i + each] for i in range(0, len(texts), each)]


def answers_each(judge: str, cell: Cell) -> int:
    return {"code": cell.programs, "number": cell.completions}.get(judge, 1)


def _stops() -> dict[str, tuple[str, ...]]:
    from lora_kit.evaluate.humaneval import STOPS as CODE

    return {"code": CODE, "number": ("\nQuestion:",), "summary": ("\n\n",)}


STOPS = _stops()


def _choose(model, tokenizer, cell: Cell):
    """HellaSwag by the kit's own fast evaluation: retention of what the base could do."""
    from lora_kit.evaluate import evaluate
    from lora_kit.studies.specialists_generations import Judged

    done = evaluate(model, tokenizer, "hellaswag", limit=4 * cell.limit or None, batch_size=32)
    (task,) = done.tasks.values()
    metrics = ("acc,none", "acc_norm,none")
    values = {m.removesuffix(",none"): list(task.scores(m)) for m in metrics}
    means = {m.removesuffix(",none"): task.metrics[m] for m in metrics}
    return Judged("hellaswag", values, means, str(task.data.get("fingerprint")))


def heldout_prompts(task: str, rows: int, seed: int) -> tuple[list[str], list[str]]:
    """Prompts of a task that a router may read: of training rows, and of the held-out ones."""
    made: tuple[Dataset, Dataset] = task_rows(task, rows, rows, seed)
    learnt, held = ([row["prompt"] for row in side] for side in made)
    seen = set(learnt)
    return list(dict.fromkeys(learnt)), [p for p in dict.fromkeys(held) if p not in seen]
