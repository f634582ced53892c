"""The forgetting study's jobs: each makes one record, or a model that other jobs ask.

    teach     a taught base, asked as taught and with its weights through NF4
    cell      that base after QLoRA on Alpaca, asked again
    tune      the untaught model after the paper's recipe, merged and saved
    quantise  the untaught model's weights through NF4, saved
    evaluate  one of those models on one benchmark

`benchmarks/forgetting.py` says which jobs there are, in which order, and keeps processes at them.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_kit import store
from lora_kit.studies.forgetting import SKILLS, STUDY, Cell, to_bits
from lora_kit.studies.forgetting_cells import (
    HELD_OUT,
    TEACHING,
    Material,
    alpaca_loss,
    mixed_rows,
    quantised,
    run_cell,
    save_plain,
    score_all,
    skill_material,
    teach,
    tune,
    tuning_spec,
    with_alpaca,
)
from lora_kit.studies.records import new_record, write_record

NAME = "smollm2-135m-instruct"
TASKS = {"gsm8k": None, "mmlu": 5, "hellaswag": None}  # shots; None: the task's own. Longest first
BATCH = {"gsm8k": 256, "mmlu": 64, "hellaswag": 64}  # where the fast model does not choose
STANDARD_ROWS = 2000
ALPACA = 5000  # rows at most


@dataclass(frozen=True)
class Scale:
    """How much of everything: `alpaca` is a share of each cell's rows, `limit` items a task."""

    train: int = 4000
    test: int = 500
    teach_steps: int = 300
    teach_batch: int = 64
    rounds: int = 3
    alpaca: float = 1.0
    held_out: int = HELD_OUT
    limit: int | None = None

    def of(self, cell: Cell) -> Cell:
        """The cell with its share of rows."""
        return replace(cell, rows=max(4, round(cell.rows * self.alpaca)))


QUICK = Scale(64, 8, teach_steps=2, teach_batch=4, rounds=1, alpaca=0.01, held_out=4, limit=2)


@dataclass(frozen=True)
class Setting:
    """Where a job finds and leaves things: the untaught model's folder, the records' and the made
    models' folders; on what and how much."""

    model: str
    out: Path
    work: Path
    device: str
    scale: Scale

    def command(self, part: str, **values) -> str:
        """What makes the record of one job again."""
        words = ["python", "benchmarks/forgetting.py", "--device", self.device, "--part", part]
        words += [word for key, value in values.items() for word in (f"--{key}", str(value))]
        return shlex.join(words + (["--quick"] if self.scale == QUICK else []))


def run_job(job: Mapping[str, Any], setting: Setting) -> str:
    """Do a job: {"name", "kind", "needs", …}; one line says what came out."""
    return _KINDS[job["kind"]](job, setting)


def _alpaca_rows():
    from lora_kit.data import load_rows

    return load_rows("alpaca", "train", limit=ALPACA)


def _material(seed: int, scale: Scale) -> Material:
    made = skill_material(SKILLS, scale.train, scale.test, seed)
    return with_alpaca(made, _alpaca_rows(), scale.held_out)


def _teach(job: Mapping[str, Any], setting: Setting) -> str:
    """Teach, then ask: as taught, and with the weights through NF4."""
    from lora_kit.evaluate.statistics import estimate
    from lora_kit.models import load_model

    started, seed, scale = time.perf_counter(), job["seed"], setting.scale
    folder, material = setting.work / job["name"], _material(seed, scale)
    spec = replace(TEACHING, seed=seed, steps=scale.teach_steps, batch_size=scale.teach_batch)
    told = teach(setting.model, folder, material, spec, rounds=scale.rounds)
    plain = load_model(str(folder))
    found = {"taught": score_all(plain.model, plain.tokenizer, material)}
    model, tokenizer = quantised(folder)
    found["nf4"] = score_all(model, tokenizer, material)
    losses = tuning_spec(Cell())
    loss = alpaca_loss(model, tokenizer, material.held_out, losses)
    metrics: dict = {"alpaca_loss_nf4": loss}
    metrics["alpaca_loss_taught"] = alpaca_loss(
        plain.model, plain.tokenizer, material.held_out, losses
    )
    items = []
    for which, skills in found.items():
        for skill, (*judged, _) in skills.items():
            for judge, scores in zip(("strict", "flexible"), judged, strict=True):
                metrics[f"{skill}_{judge}_{which}"] = estimate(scores).to_metric()
                items.append(
                    {"skill": skill, "judge": judge, "model": which, "scores": to_bits(scores)}
                )
    record = new_record(
        STUDY,
        setting.command("teach", seeds=seed),
        parameters={"part": "teach", "recipe": spec.to_dict(), "rows": scale.train},
        metrics=metrics,
        tables={"rounds": told["rounds"], "items": items},
        seed=seed,
        seconds=time.perf_counter() - started,
        model={**plain.record(), "name": NAME},
    )
    store.write_json(folder / "before.json", {"scores": found["nf4"], "loss": loss})
    write_record(record, setting.out / f"{job['name']}.json")
    return ", ".join(
        f"{skill} {metrics[f'{skill}_strict_taught']['value']:.3f}"
        f" (nf4 {metrics[f'{skill}_strict_nf4']['value']:.3f})"
        for skill in found["nf4"]
    )


def _cell(job: Mapping[str, Any], setting: Setting) -> str:
    cell = Cell(**{**job["cell"], "skills": tuple(job["cell"]["skills"])})
    folder = setting.work / job["needs"]
    before = store.read_json(folder / "before.json")
    record = run_cell(
        folder,
        setting.scale.of(cell),
        _material(cell.seed, setting.scale),
        before["scores"],
        setting.command("map", seeds=cell.seed),
        before["loss"],
        say=lambda text: print(text, flush=True),
    )
    write_record(record, setting.out / f"{job['name']}.json")
    words = [f"loss {record.metrics['alpaca_loss_after']:.3f}"]
    for skill in cell.skills:
        a, b = (record.metrics[f"{skill}_strict_{when}"].value for when in ("before", "after"))
        words.append(f"{skill} {a:.3f} -> {b:.3f}")
    return ", ".join(words)


def _tune(job: Mapping[str, Any], setting: Setting) -> str:
    """The untaught model after the paper's recipe, merged and saved for the evaluations."""
    cell = setting.scale.of(Cell(skills=(), rows=STANDARD_ROWS, seed=job["seed"]))
    material = with_alpaca(Material({}, {}), _alpaca_rows(), setting.scale.held_out)
    rows, spec = mixed_rows(material, cell), tuning_spec(cell)
    done = tune(setting.model, rows, spec)
    facts = {"steps": done.steps, "seconds": done.seconds, "tokens": done.tokens}
    facts["alpaca_loss"] = alpaca_loss(done.model, done.tokenizer, material.held_out, spec)
    with store.new_folder(setting.work / job["name"]) as folder:
        save_plain(done.model, done.tokenizer, folder)
        facts |= {"recipe": spec.to_dict(), "data": rows.record(), "peak": done.peak_memory}
        store.write_json(folder / "facts.json", facts)
    return f"{done.steps} steps in {done.seconds:.0f} s, Alpaca loss {facts['alpaca_loss']:.3f}"


def _quantise(job: Mapping[str, Any], setting: Setting) -> str:
    model, tokenizer = quantised(setting.model)
    with store.new_folder(setting.work / job["name"]) as folder:
        save_plain(model, tokenizer, folder)
        store.write_json(folder / "facts.json", {})
    return "weights through NF4"


def _evaluate(job: Mapping[str, Any], setting: Setting) -> str:
    from lora_kit.evaluate import evaluate
    from lora_kit.models import load_model
    from lora_kit.studies.forgetting_tasks import task_record

    task, which = job["task"], job["which"]
    folder = setting.work / job["needs"] if job["needs"] else Path(setting.model)
    loaded = load_model(str(folder))
    _compile_templates_once()
    shots = {} if TASKS[task] is None else {"num_fewshot": TASKS[task]}
    batch = BATCH[task] if setting.device == "cuda" else 4
    found = evaluate(
        loaded.model,
        loaded.tokenizer,
        task,
        limit=setting.scale.limit,
        batch_size=batch,
        **shots,
    )
    record = task_record(
        found,
        task,
        which,
        setting.command("standard", tasks=task),
        store.read_json(folder / "facts.json") if job["needs"] else {},
        {**loaded.record(), "name": NAME if which == "base" else f"{NAME}, {which}"},
    )
    write_record(record, setting.out / f"{job['name']}.json")
    values = {k: v.value for k, v in record.metrics.items() if hasattr(v, "value")}
    return ", ".join(f"{k} {v:.4f}" for k, v in list(values.items())[:4])


def _compile_templates_once() -> None:
    """lm-eval compiles a task's Jinja template again for every row and shot: a minute for MMLU."""
    from functools import lru_cache

    from lm_eval.utils import env

    if not hasattr(env.from_string, "cache_info"):
        env.from_string = lru_cache(maxsize=None)(env.from_string)


_KINDS: dict[str, Callable[[Mapping[str, Any], Setting], str]] = {
    "teach": _teach,
    "cell": _cell,
    "tune": _tune,
    "quantise": _quantise,
    "evaluate": _evaluate,
}
