"""A miniature LoRA Land: small tasks × seeds, the default model before and after tuning.

    python benchmarks/lora_land_mini.py --device cuda --jobs 8      # a GPU held to T4 rules
    python benchmarks/lora_land_mini.py --score-only                # records from kept answers
    python benchmarks/lora_land_mini.py --tasks topic --seeds 1     # one task, on a CPU

Each task and seed draws its own rows; the model answers the test rows, is tuned with LoRA Land's
recipe (`recipe("lora-land")`: rank 8, rate 2e-3, cosine, warm-up 0.03, 16 rows a step, 4-bit NF4
where there is a GPU) for `--steps` steps instead of 2,500, and answers again. Answers are kept in
`--answers` as they come; a task and seed whose answers are there is not run again, so a run that
was cut off carries on with the same command. Scores, intervals and complexity heuristics become
records in `--records`, here or on another machine (`--score-only`).

`--jobs` processes work side by side; each takes the next task and seed that nobody has taken.
`--budget` starts nothing after so many seconds, and stops everything 25 s later. Offline, `--model`
names a folder with the default model (safetensors, or the GGUF file) and LORA_KIT_DATA the data
sets; a task whose set is not there is left out, and said so.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

NAME, STUDY = "smollm2-135m-instruct", "09_lora_land"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", help="folder of the default model; else fetched")
    parser.add_argument("--tasks", default="all", help="names joined by commas")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=80, help="optimiser steps of 16 rows")
    parser.add_argument("--test-rows", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--budget", type=float, default=1e9, help="start nothing after seconds")
    parser.add_argument("--quantization", choices=("none", "nf4"), help="nf4 on a GPU by default")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--answers", type=Path, default=Path("runs/lora_land_mini"))
    parser.add_argument("--records", type=Path, default=Path("data/results") / STUDY)
    parser.add_argument("--score-only", action="store_true", help="no model: score what is kept")
    parser.add_argument("--answers-only", action="store_true", help="leave scoring to later")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    from lora_kit.studies.mini_land import MINI_TASKS

    args.names = list(MINI_TASKS) if args.tasks == "all" else args.tasks.split(",")
    if unknown := set(args.names) - set(MINI_TASKS):
        parser.error(f"no such task: {', '.join(sorted(unknown))}")
    args.quantization = args.quantization or ("nf4" if args.device == "cuda" else "none")
    return args


def main() -> None:
    args = arguments()
    if args.device == "cuda":
        os.environ["LORA_KIT_T4_RULES"] = "1"
    if args.worker:
        work(args)
        return
    started = time.perf_counter()
    from lora_kit.studies.mini_land import MINI_TASKS, missing_data

    for name in list(args.names):
        if missing := missing_data(MINI_TASKS[name]):
            print(f"left out: {name} ({missing} is not in LORA_KIT_DATA)", flush=True)
            args.names.remove(name)
    failed = 0
    if not args.score_only:
        check_packages(args)
        failed = answer_all(args, started)
    if not args.answers_only:
        score_all(args)
    print(f"{time.perf_counter() - started:.0f} s in all")
    if failed:
        raise SystemExit(f"{failed} process(es) ended with an error; the same command carries on")


# ------------------------------------------------------------------ the parent


def check_packages(args) -> None:
    """Stop before any work where a package of the run is missing."""
    import importlib.util

    wanted = ["torch", "transformers", "pydantic", "filelock", "platformdirs", "safetensors"]
    wanted += ["bitsandbytes"] if args.quantization == "nf4" else []
    if missing := [name for name in wanted if importlib.util.find_spec(name) is None]:
        raise SystemExit(f"not installed: {', '.join(missing)} (see requirements.txt)")


def units(args) -> list[tuple[str, int]]:
    """Every task with seed 0 first: what a budget cuts off is the second seed. Long ones first."""
    from lora_kit.studies.mini_land import MINI_TASKS

    names = sorted(args.names, key=lambda n: -MINI_TASKS[n].max_new_tokens)
    return [(name, seed) for seed in range(args.seeds) for name in names]


def kept(args, name: str, seed: int) -> Path:
    return args.answers / f"{name}_s{seed}.json"


def answer_all(args, started: float) -> int:
    waiting = [unit for unit in units(args) if not kept(args, *unit).exists()]
    done = len(units(args)) - len(waiting)
    print(f"{done} of {done + len(waiting)} are there already", flush=True)
    if not waiting:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        model = prepare(args, scratch)
        environment = dict(os.environ)
        if args.jobs > 1:
            environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        environment["LORA_LAND_STARTED"] = str(time.time() - (time.perf_counter() - started))
        command = [sys.executable, __file__, *repeat(args), "--model", model]
        processes = []
        for i in range(min(args.jobs, len(waiting))):
            log = open(scratch / f"{i}.log", "w")
            words = [*command, "--worker", folder]
            processes.append((subprocess.Popen(words, stdout=log, stderr=log, env=environment), i))
        return watch(args, processes, scratch, started)


def watch(args, processes, scratch: Path, started: float) -> int:
    """Pass on what the workers say; stop them 25 s after the budget; count those that failed."""
    said = dict.fromkeys(range(len(processes)), 0)
    failed = 0
    while True:
        alive = [p for p, _ in processes if p.poll() is None]
        passed = time.perf_counter() - started
        for _, i in processes:
            lines = [x for x in (scratch / f"{i}.log").read_text().splitlines() if x[:2] == "> "]
            for line in lines[said[i] :]:
                print(f"{passed:5.0f} s  {line[2:]}", flush=True)
            said[i] = len(lines)
        if not alive:
            break
        if passed > args.budget + 25:
            for process in alive:
                process.kill()
            print(f"stopped {len(alive)} process(es) after {passed:.0f} s", flush=True)
        time.sleep(0.3)
    for process, i in processes:
        if process.returncode not in (0, -9):
            failed += 1
            tail = (scratch / f"{i}.log").read_text().splitlines()[-25:]
            print("\n".join([f"process {i} ended with {process.returncode}:", *tail]))
    return failed


def prepare(args, scratch: Path) -> str:
    """The folder of the default model, under the model's own name."""
    from lora_kit.models import unpacked

    named = scratch / NAME
    found = unpacked(args.model or NAME, named)
    if args.model is None:  # the cache's folder has the version in its name
        named.symlink_to(found)
        return str(named)
    return str(found)


def repeat(args) -> list[str]:
    words = ["--device", args.device, "--tasks", ",".join(args.names), "--jobs", str(args.jobs)]
    words += ["--seeds", str(args.seeds), "--steps", str(args.steps)]
    words += ["--test-rows", str(args.test_rows), "--quantization", args.quantization]
    words += ["--eager"] if args.eager else []
    return [*words, "--budget", str(args.budget), "--answers", str(args.answers)]


# ------------------------------------------------------------------ a worker: answers


def work(args) -> None:
    from lora_kit.hardware import hold_to_t4_rules

    hold_to_t4_rules()
    started = float(os.environ["LORA_LAND_STARTED"])
    failed = 0
    for name, seed in units(args):
        if kept(args, name, seed).exists() or not claim(args.worker / f"{name}_s{seed}"):
            continue
        if time.time() - started > args.budget:
            print(f"> {name} {seed}: not started, the budget is spent", flush=True)
            continue
        try:
            try:
                one_unit(args, name, seed)
            except Exception as e:  # graphs are a matter of speed, not of results
                if args.eager or args.device == "cpu":
                    raise
                print(f"> {name} {seed}: again, without CUDA graphs ({e})"[:300], flush=True)
                args.eager = True
                one_unit(args, name, seed)
        except Exception:  # one task that fails must not take the others with it
            import traceback

            failed += 1
            traceback.print_exc()
            last = traceback.format_exc().strip().splitlines()[-1]
            print(f"> {name} {seed}: FAILED {last[:300]}", flush=True)
    raise SystemExit(1 if failed else 0)


def claim(path: Path) -> bool:
    """Whether this process is the first to ask for the task and seed."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def one_unit(args, name: str, seed: int) -> None:
    """Answer, tune, answer again; keep the answers and the facts of the run."""
    from lora_kit import store
    from lora_kit.fingerprint import fingerprint_model
    from lora_kit.hardware import detect
    from lora_kit.models import ModelFiles
    from lora_kit.studies.mini_land import MINI_TASKS, mini_rows
    from lora_kit.studies.records import versions
    from lora_kit.train import engines, recipe
    from lora_kit.train.finetune import encode_rows

    began = time.perf_counter()
    clear_memory()
    # The recipe's 16 rows of batch 1 are one batch of 16 here, and its optimiser is not paged: the
    # same gradients and steps, at more memory than a large model could spare.
    spec = recipe(
        "lora-land",
        seed=seed,
        steps=args.steps,
        batch_size=16,
        accumulation=1,
        checkpointing=False,
        optimizer="adamw",
        quantization=args.quantization,
        compile=False if args.eager else "auto",
    )
    train, test = mini_rows(name, 16 * args.steps, args.test_rows, seed)
    path = Path(args.model)
    files = ModelFiles(path.name, path, "folder", store.sha256_file(path / "config.json")[:12])
    model, tokenizer = engines.load_for_training(files, spec, "native")
    base = fingerprint_model(model).digest
    loaded = time.perf_counter()
    before = answer(args, model, tokenizer, test, name)
    answered = time.perf_counter()
    rows = encode_rows(train, tokenizer, spec)
    done = engines.train_native(model, tokenizer, rows, spec, args.steps)
    trained = time.perf_counter()
    after = answer(args, model, tokenizer, test, name)
    ended = time.perf_counter()
    store.write_json(
        kept(args, name, seed),
        {
            "task": name,
            "seed": seed,
            "spec": spec.to_dict(),
            "train_rows": len(train),
            "train_fingerprint": train.fingerprint,
            "test_rows": len(test),
            "test_fingerprint": test.fingerprint,
            "base_answers": before,
            "tuned_answers": after,
            "losses": [[step, round(loss, 5)] for step, loss in done.losses],
            "training_seconds": done.seconds,
            "tokens": done.tokens,
            "skipped": done.skipped,
            "peak_memory_bytes": done.peak_memory,
            "seconds": ended - began,
            "model": {"name": path.name, "source": "folder", "revision": files.revision}
            | {"fingerprint": base, "quantization": spec.quantization},
            "hardware": detect().to_dict(),
            "versions": versions(),
            "command": shlex.join(["python", "benchmarks/lora_land_mini.py", *repeat_short(args)]),
        },
    )
    parts = (loaded - began, answered - loaded, trained - answered, ended - trained)
    marks = "load {:.0f}, base {:.0f}, train {:.0f}, tuned {:.0f}".format(*parts)
    losses = f"loss {done.losses[0][1]:.2f} to {done.losses[-1][1]:.2f}"
    if MINI_TASKS[name].metric != "rouge":  # ROUGE's package may be missing here
        from lora_kit.studies.mini_land import score_answers

        wanted = [row["completion"] for row in test]
        scores = [score_answers(MINI_TASKS[name], a, wanted) for a in (before, after)]
        losses += ", score {:.2f} to {:.2f}".format(*(sum(s) / len(s) for s in scores))
    print(f"> {name} {seed}: {losses}; {ended - began:.0f} s ({marks})", flush=True)


def clear_memory() -> None:
    """Let go of the model before this one: a T4's 15 GiB are for one at a time."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def answer(args, model, tokenizer, test, name: str) -> list[str]:
    import torch

    from lora_kit.generation import generate
    from lora_kit.studies.mini_land import MINI_TASKS

    model.eval()
    dtype = model.get_input_embeddings().weight.dtype
    size = 200 if args.device == "cuda" else 16
    device = next(model.parameters()).device.type
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        prompts = [row["prompt"] for row in test]
        return generate(model, tokenizer, prompts, MINI_TASKS[name].max_new_tokens, size)


def repeat_short(args) -> list[str]:
    words = ["--device", args.device, "--seeds", str(args.seeds), "--steps", str(args.steps)]
    return [*words, "--test-rows", str(args.test_rows), "--jobs", str(args.jobs)]


# ------------------------------------------------------------------ scores and records


def score_all(args) -> None:
    try:
        import rouge_score  # noqa: F401
        import statsmodels  # noqa: F401
    except ImportError as e:
        print(f"{e}: answers are kept in {args.answers}; score them with --score-only")
        return
    from lora_kit import store
    from lora_kit.studies.mini_records import score_unit
    from lora_kit.studies.records import write_record

    for path in sorted(args.answers.glob("*_s*.json")):
        facts = store.read_json(path)
        if facts["task"] not in args.names:
            continue
        target = args.records / path.name
        if target.exists() and target.stat().st_mtime > path.stat().st_mtime:
            continue
        record = score_unit(facts, args.model)
        write_record(record, target)
        base, tuned = record.metrics["base"], record.metrics["tuned"]
        lift = record.metrics["lift"]
        print(
            f"{facts['task']:<20} seed {facts['seed']}  base {base.value:.3f}  "
            f"tuned {tuned.value:.3f}  lift {lift.value:+.3f} [{lift.low:+.3f}, {lift.high:+.3f}]"
        )


if __name__ == "__main__":
    main()
