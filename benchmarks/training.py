"""Fine-tuning engines against one another, in one run: speed, memory, held-out loss.

    python benchmarks/training.py --device cuda --json training.json    # a GPU held to T4 rules
    python benchmarks/training.py --device cuda --part speed --quick    # a few minutes
    python benchmarks/training.py --device cpu                          # native against trl

On a GPU (fp16, 15 GiB, no FlashAttention, whatever the GPU is) three parts:

    speed    useful tokens a second (padding not counted) and peak GiB of QLoRA, rank 16 on all
             linear layers, 8 Alpaca rows a step, for SmolLM2-135M and for the architecture of
             Llama-3.2-1B with random weights; median of three stretches of steps after a warm-up
    memory   the planner's prediction beside torch's measured peak, rows of 384 tokens
    loss     held-out loss of SmolLM2-135M after the same rows, three seeds

Runs of the last two parts go side by side on the GPU (of memory, four at a time), each in its own
process: nothing is timed.

Every engine has a process of its own (Unsloth patches the libraries it finds). Offline, `--model`
names a folder with the default model (safetensors, or the GGUF file) and LORA_KIT_DATA the rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training_runs import LARGE, SMALL, WAYS, child

# Steps of one of the three timed stretches: enough for a second or more each.
STRETCH = {
    "unsloth, usual": 2,
    "unsloth, ours": 4,
    "trl": 4,
    "native, no graphs": 10,
    "native, 32 rows a step": 40,
    "native, compiled": 20,
}
# (checkpointing, batch) of the memory part, by model; all tokens have a label.
MEMORY = {SMALL: ((False, 6), (True, 12)), LARGE: ((False, 3), (True, 8))}
# Of the memory part. A piece of Unsloth's loss takes at most half of what the GPU has free, up to
# 2 GiB: four runs of at most 15 GiB leave it that, as a GPU of one's own does.
AT_ONCE = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--part", default="speed,memory,loss", help="some of speed,memory,loss")
    parser.add_argument("--model", help="folder of the default model; else fetched")
    parser.add_argument("--json", type=Path, help="also write everything measured here")
    parser.add_argument("--quick", action="store_true", help="shorter stretches, fewer rows")
    parser.add_argument("--rows", type=int, default=240, help="rows of the loss part")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the loss part")
    parser.add_argument("--only", help="only the engine with this name: native, trl, unsloth")
    parser.add_argument("--way", action="append", help="only this way; may be repeated")
    parser.add_argument("--budget", type=float, default=570, help="start nothing after seconds")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        child(json.loads(args.job), Path(args.out))
        return
    args.part = set(args.part.split(","))
    if unknown := args.part - {"speed", "memory", "loss"}:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    report(measure(args))


# ------------------------------------------------------------------ the parent: order and budget


def measure(args) -> list[dict]:
    started = time.perf_counter()
    # Checked here once and left alone in the children.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if args.device == "cuda":
        os.environ["LORA_KIT_T4_RULES"] = "1"
    from lora_kit.data import load_rows

    load_rows("alpaca", "train", limit=1)  # says now, not in each child, that they are missing
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        models = prepare(args, scratch)
        jobs = list(plan(args, models))
        results = [{"part": "machine", "seconds": 0, **machine(args)}]
        waves = [[j] for j in jobs if j["part"] in ("timed", "speed")]
        memory = [j for j in jobs if j["part"] == "memory"]
        waves += [memory[i : i + AT_ONCE] for i in range(0, len(memory), AT_ONCE)]
        waves += [w] if (w := [j for j in jobs if j["part"] == "loss"]) else []
        for wave in waves:
            passed = time.perf_counter() - started
            names = ", ".join(sorted({f"{j['part']} {j['name']}" for j in wave}))
            if passed > args.budget:
                results.append({"part": "skipped", "name": names})
                continue
            print(f"{passed:5.0f} s  {names}", flush=True)
            limit = args.budget + 25 - passed if args.device == "cuda" else None
            results += run_side_by_side(wave, scratch, limit)
            results[0]["seconds"] = time.perf_counter() - started
            if args.json:  # after every process: what breaks off later loses nothing
                args.json.write_text(json.dumps(results, indent=1) + "\n")
    return results


def plan(args, models: dict[str, str]):
    """The jobs in the order of what matters most."""
    if args.device == "cpu":
        for turn in range(3):
            for engine in ("native", "trl"):
                runs = [
                    {"way": engine, "model": SMALL, "path": models[SMALL], "stretch": 1}
                    | {"stretches": 1 if args.quick else 2, "seed": 0, "cpu": True}
                ]
                yield {"part": "speed", "name": engine, "runs": runs, "turn": turn}
        return
    chosen = [w for w in args.way or WAYS if args.only in (None, WAYS[w][0])]
    sizes = (SMALL, LARGE)
    for engine in ("native", "trl", "unsloth"):  # the quickest first: nothing waits in vain
        ways = [w for w in chosen if WAYS[w][0] == engine and "compiled" not in w]
        runs = []
        if "speed" in args.part and ways:
            stretch = 4 if args.quick else 60
            runs += [
                {"way": w, "model": m, "path": models[m], "stretches": 3, "seed": 0}
                | {"stretch": min(STRETCH.get(w, stretch), stretch)}
                for m in sizes
                for w in ways
            ]
        if runs:
            yield {"part": "timed", "name": engine, "runs": runs}
    if "speed" in args.part and "native, compiled" in chosen and not args.quick:
        run = {"way": "native, compiled", "model": LARGE, "path": models[LARGE]}
        run |= {"stretch": STRETCH["native, compiled"], "stretches": 3, "seed": 0}
        yield {"part": "speed", "name": "native, compiled", "runs": [run]}
    if "memory" in args.part:  # a process each: torch's counters are a process's own
        for engine, model in itertools.product(("unsloth", "trl", "native"), sizes):
            for checkpointing, batch in MEMORY[model] if args.only in (None, engine) else ():
                run = {"memory": engine, "model": model, "path": models[model]}
                run |= {"batch": batch, "checkpointing": checkpointing}
                yield {"part": "memory", "name": engine, "runs": [run]}
    if "loss" in args.part:
        for way in ("unsloth, usual", "unsloth, ours", "trl", "native"):
            for seed in range(args.seeds if way in chosen else 0):
                runs = [{"way": way, "model": SMALL, "path": models[SMALL], "seed": seed}]
                runs[0]["rows"] = 64 if args.quick else args.rows
                yield {"part": "loss", "name": way, "runs": runs}


def run_side_by_side(wave: list[dict], scratch: Path, limit: float | None) -> list[dict]:
    running = []
    for i, job in enumerate(wave):
        out, log = scratch / f"{i}.jsonl", scratch / f"{i}.log"
        out.unlink(missing_ok=True)
        command = [sys.executable, __file__, "--job", json.dumps(job), "--out", str(out)]
        environment = dict(os.environ)
        if job["part"] in ("memory", "loss"):
            environment["OMP_NUM_THREADS"] = "1"
        with open(log, "w") as f:
            process = subprocess.Popen(command, stdout=f, stderr=f, env=environment)
        running.append((job, process, out, log))
    results, until = [], time.monotonic() + (limit or 1e9)
    for job, process, out, log in running:
        try:
            code = process.wait(max(1.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = "out of time"
        if out.exists():
            lines = out.read_text().splitlines()
            results += [json.loads(line) | {"turn": job.get("turn", 0)} for line in lines]
        if code != 0:
            tail = log.read_text()[-1500:]
            print(f"{job['name']} ended with {code}:\n{tail}", file=sys.stderr)
            results.append({"part": "failed", "name": job["name"], "code": code, "log": tail})
    return results


def prepare(args, scratch: Path) -> dict[str, str]:
    """The folders of the two models; the large one is made here, with random weights."""
    import torch

    from lora_kit.models import _convert_gguf, fetch_model

    folder = Path(args.model) if args.model else None
    ggufs = sorted(folder.glob("*.gguf")) if folder else []
    if ggufs:
        small = scratch / SMALL
        _convert_gguf(ggufs[0], small)
    else:
        small = fetch_model(args.model or "smollm2-135m-instruct").path
    models = {SMALL: str(small)}
    if args.device == "cpu" or args.part == {"loss"}:
        return models
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from lora_kit.architectures import architecture

    a = architecture(LARGE)
    tokenizer = AutoTokenizer.from_pretrained(small)
    config = LlamaConfig(
        hidden_size=a.hidden_size,
        intermediate_size=a.intermediate_size,
        num_hidden_layers=a.num_layers,
        num_attention_heads=a.num_heads,
        num_key_value_heads=a.num_kv_heads,
        vocab_size=a.vocab_size,
        max_position_embeddings=a.max_position,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(scratch / LARGE)
    tokenizer.save_pretrained(scratch / LARGE)
    del model
    torch.cuda.empty_cache()
    return models | {LARGE: str(scratch / LARGE)}


def machine(args) -> dict:
    import importlib.metadata as meta

    from lora_kit.hardware import detect
    from lora_kit.train.report import matmul_speed

    versions = {}
    for package in ("torch", "transformers", "peft", "trl", "bitsandbytes", "unsloth"):
        try:
            versions[package] = meta.version(package)
        except meta.PackageNotFoundError:
            versions[package] = None
    command = " ".join(["python", *sys.argv])
    facts = {"hardware": detect().name, "versions": versions, "command": command}
    return facts | {"matmul_flops": matmul_speed(detect())}


# ------------------------------------------------------------------ tables


def report(results: list[dict]) -> None:
    facts = results[0]
    print(f"\n{facts['hardware']}; {facts['seconds']:.0f} s")
    print(", ".join(f"{k} {v}" for k, v in facts["versions"].items() if v))
    speed = [r for r in results if r["part"] == "speed"]
    for model in (SMALL, LARGE):
        rows = {}
        for r in speed:
            if r["model"] == model:
                kept = rows.setdefault(r["way"], {**r, "tokens_per_second": []})
                kept["tokens_per_second"] += r["tokens_per_second"]
        if not rows:
            continue
        medians = {w: statistics.median(r["tokens_per_second"]) for w, r in rows.items()}
        base = next((w for w in ("unsloth, usual", "trl") if w in rows), next(iter(rows)))
        print(f"\n{model:<26}{'tokens/s':>10}{'(range)':>18}{'ratio':>8}{'peak GiB':>10}")
        for way, r in rows.items():
            rates = r["tokens_per_second"]
            spread = f"{min(rates):,.0f}-{max(rates):,.0f}"
            ratio = medians[way] / medians[base]
            print(f"{way:<26}{medians[way]:>10,.0f}{spread:>18}{ratio:>8.2f}{r['peak_gib']:>10.2f}")
    memory = [r for r in results if r["part"] == "memory"]
    if memory:
        print(f"\n{'memory, 384 tokens a row':<40}{'planned':>9}{'peak':>9}{'error':>9}")
        for r in memory:
            how = "checkpointing" if r["checkpointing"] else "no checkpointing"
            name = f"{r['model']} {r['engine']}, {r['batch']} rows, {how}"
            error = r["planned_gib"] / r["peak_gib"] - 1
            print(f"{name:<52}{r['planned_gib']:>9.2f}{r['peak_gib']:>9.2f}{error:>+9.1%}")
    loss = [r for r in results if r["part"] == "loss"]
    if loss:
        print(f"\n{'held-out loss by seed':<26}{'mean':>8}   rows {loss[0]['steps'] * 8}")
        for way in dict.fromkeys(r["way"] for r in loss):
            values = [r["heldout_loss"] for r in loss if r["way"] == way]
            each = "  ".join(f"{v:.4f}" for v in values)
            print(f"{way:<26}{statistics.fmean(values):>8.4f}   {each}")
    for r in results:
        if r["part"] in ("failed", "skipped"):
            last = r.get("log", "").strip().splitlines()[-1:]
            print(f"{r['part']}: {r['name']} {r.get('code', '')} {' '.join(last)}")


if __name__ == "__main__":
    main()
