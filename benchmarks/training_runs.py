"""What a process of benchmarks/training.py does: run after run of one engine, each measured.

Nothing heavy is imported above: Unsloth has to come first, and only in its own process.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import time
from pathlib import Path

GIB = 2**30
SMALL, LARGE = "smollm2-135m", "llama-3.2-1b"
# name: engine, then what differs from SPEC. "usual" is what Unsloth's own notebooks set.
WAYS = {
    "unsloth, usual": ("unsloth", {"batch_size": 2, "accumulation": 4, "checkpointing": True}),
    "unsloth, ours": ("unsloth", {}),
    "trl": ("trl", {}),
    "native": ("native", {}),
    "native, no graphs": ("native", {"compile": False}),
    "native, fp16 base": ("native", {"quantization": "none"}),
    "native, 32 rows a step": ("native", {"batch_size": 32}),
    "native, compiled": ("native", {"compile": True}),
}
SPEC = {
    "rank": 16,
    "alpha": 16,
    "learning_rate": 2e-4,
    "batch_size": 8,
    "accumulation": 1,
    "checkpointing": False,
    "max_length": 512,
    "style": "alpaca",
    "quantization": "nf4",
    "steps": 0,
}
WARM_UP = 2
SEQ = 384


def child(job: dict, out: Path) -> None:
    engine = job["runs"][0].get("memory") or WAYS[job["runs"][0]["way"]][0]
    from lora_kit.train import choose_engine

    got, why = choose_engine(engine)  # imports Unsloth before anything else does
    if got != engine:
        raise SystemExit(why)
    from lora_kit.hardware import hold_to_t4_rules

    hold_to_t4_rules()
    import gc
    import traceback

    import torch

    for run in job["runs"]:
        try:
            loss = job["part"] == "loss"
            measured = memory_run(run) if "memory" in run else training_run(run, loss)
        except Exception:  # one setting that fails must not take the others with it
            name = f"{run.get('way', 'memory')} on {run['model']}"
            measured = {"part": "failed", "name": name, "log": traceback.format_exc()[-3000:]}
            print(measured["log"], file=sys.stderr)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        with open(out, "a") as f:
            f.write(json.dumps(measured) + "\n")


def load(engine: str, path: str, spec):
    from lora_kit.models import ModelFiles
    from lora_kit.train import engines

    files = ModelFiles(Path(path).name, Path(path), "folder", "")
    return engines.load_for_training(files, spec, engine)


def run_engine(engine: str, model, tokenizer, rows, spec, steps: int, on_step=None):
    from lora_kit.train import engines

    if engine == "native":
        return engines.train_native(model, tokenizer, rows, spec, steps, on_step=on_step)
    return engines.train(model, tokenizer, rows, spec, steps, on_step)


def alpaca(tokenizer, spec, start: int, count: int) -> list[dict]:
    from lora_kit.data import load_rows
    from lora_kit.train.finetune import encode_rows

    rows = load_rows("alpaca", "train", limit=start + count)
    from dataclasses import replace

    return encode_rows(replace(rows, rows=rows.rows[start:]), tokenizer, spec)


def training_run(run: dict, with_loss: bool) -> dict:
    from lora_kit.train import TrainSpec

    engine, changes = WAYS[run["way"]]
    changes = {**changes, "seed": run["seed"]}
    if run.get("cpu"):
        changes["quantization"] = "none"
    spec = TrainSpec(**{**SPEC, **changes})
    model, tokenizer = load(engine, run["path"], spec)
    per_step = spec.batch_size * spec.accumulation
    warm_up = 1 if run.get("cpu") else WARM_UP
    if with_loss:
        rows = alpaca(tokenizer, spec, 0, run["rows"])
        steps = -(-len(rows) // per_step)
    else:
        steps = warm_up + run["stretches"] * run["stretch"]
        rows = alpaca(tokenizer, spec, 0, steps * per_step)[: steps * per_step]
    times = []
    done = run_engine(
        engine, model, tokenizer, rows, spec, steps, lambda *_: times.append(time.perf_counter())
    )
    tokens = sum(len(r["input_ids"]) for r in rows) / steps
    measured = {
        "part": "loss" if with_loss else "speed",
        **{k: run[k] for k in ("way", "model", "seed")},
        "steps": steps,
        "rows_a_step": per_step,
        "tokens_a_step": tokens,
        "peak_gib": done.peak_memory / GIB,
        "first_loss": done.losses[0][1],
        "last_loss": statistics.fmean(loss for _, loss in done.losses[-5:]),
        "skipped": done.skipped,
    }
    if with_loss:
        measured["losses"] = [round(loss, 5) for _, loss in done.losses]
        measured["heldout_loss"] = heldout(model, tokenizer, alpaca(tokenizer, spec, 2000, 100))
    else:
        k = run["stretch"]
        marks = times[warm_up - 1 :: k]
        measured["tokens_per_second"] = [tokens * k / (b - a) for a, b in itertools.pairwise(marks)]
    return measured


def heldout(model, tokenizer, rows) -> float:
    import torch

    from lora_kit.train import heldout_loss

    os.environ["UNSLOTH_RETURN_LOGITS"] = "1"  # Unsloth leaves them out otherwise
    model.eval()
    device = next(model.parameters()).device.type
    with torch.autocast(device, torch.float16, enabled=device == "cuda"):
        return heldout_loss(model, tokenizer, rows)


def memory_run(run: dict) -> dict:
    import torch

    from lora_kit.architectures import architecture
    from lora_kit.memory import plan_memory
    from lora_kit.train import TrainSpec

    engine = run["memory"]
    changes = {"batch_size": run["batch"], "checkpointing": run["checkpointing"]}
    spec = TrainSpec(**{**SPEC, **changes})
    model, tokenizer = load(engine, run["path"], spec)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 40_000, (3 * run["batch"], SEQ), generator=generator).tolist()
    rows = [{"input_ids": row, "labels": row} for row in ids]
    done = run_engine(engine, model, tokenizer, rows, spec, 3)
    predicted = plan_memory(
        architecture(run["model"]),
        rank=spec.rank,
        targets="all",
        batch=run["batch"],
        seq=SEQ,
        dtype="float16",
        quantization="nf4-double",
        optimizer="adamw" if engine == "native" else "adamw-8bit",
        checkpointing=run["checkpointing"],
        gpu="h200" if torch.cuda.get_device_capability() >= (9, 0) else "t4",
        engine=engine,
        flash=False,
    )
    return {
        "part": "memory",
        "engine": engine,
        **{k: run[k] for k in ("model", "batch", "checkpointing")},
        "loaded_gib": done.memory_before / GIB,
        "peak_gib": done.peak_memory / GIB,
        "planned_gib": predicted.torch_bytes / GIB,
        "planned": {name: size / GIB for name, size in predicted.rows},
    }
