"""Alpaca fine-tuned by every engine, three seeds each: curves and held-out loss, as records.

    python benchmarks/engines_alpaca.py --jobs 9

QLoRA with the recipe "alpaca" on 2,000 rows; 200 others are held out, the same for all. Seeds
change the adapter's start and the order of the rows. Each run has a process of its own, several run
side by side (nothing is timed), and one clean process scores all adapters afterwards. Records
appear in data/results/03_qlora_finetuning; runs that are finished are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

STUDY = "03_qlora_finetuning"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--engines", default="native,trl,unsloth")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--test-rows", type=int, default=200)
    parser.add_argument("--steps", type=int, default=0, help="0: one epoch")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--out", type=Path, help="folder of the records")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        engine, _, rest = args.job.partition(":")
        score(args) if engine == "score" else train(args, engine, int(rest))
        return
    out = args.out or Path(__file__).resolve().parent.parent / "data" / "results" / STUDY
    out.mkdir(parents=True, exist_ok=True)
    runs = [(e, s) for s in range(args.seeds) for e in args.engines.split(",")]
    wanted = [r for r in runs if not (out / name_of(args, *r)).exists()]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda run: child(args, f"{run[0]}:{run[1]}", scratch), wanted))
        child(args, "score:", scratch)
        write(args, scratch, out)


def name_of(args, engine: str, seed: int) -> str:
    return f"alpaca{args.rows}_{engine}_seed{seed}.json"


def child(args, job: str, scratch: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SCRATCH": str(scratch)}
    command = [sys.executable, __file__, *sys.argv[1:], "--job", job]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(f"{job} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
    else:
        print(f"{job} done: {done.stdout.strip().splitlines()[-1]}", flush=True)


def rows_of(args):
    from lora_kit.data import load_rows

    return load_rows("alpaca", "train", limit=args.rows + args.test_rows).split(args.test_rows, 0)


def spec_of(args, seed: int):
    from lora_kit.hardware import detect
    from lora_kit.train import recipe

    four = "nf4" if detect().device == "cuda" else "none"
    return recipe("alpaca", seed=seed, steps=args.steps, quantization=four)


def train(args, engine: str, seed: int) -> None:
    from lora_kit.train import choose_engine, finetune

    got, why = choose_engine(engine)
    if got != engine:
        raise SystemExit(why)
    from lora_kit.hardware import hold_to_t4_rules
    from lora_kit.studies.records import new_record

    hold_to_t4_rules()
    done = finetune(args.model, rows_of(args)[0], spec_of(args, seed), engine=engine, reuse=False)
    scratch = Path(os.environ["SCRATCH"])
    facts = new_record(
        STUDY,
        f"python benchmarks/engines_alpaca.py --rows {args.rows} --seeds {args.seeds}",
        parameters={**done.spec.to_dict(), "engine": engine, "settled": done.settings},
        metrics={"tokens": done.tokens, "trained_tokens": done.trained_tokens},
        tables={
            "loss": [{"step": s, "loss": round(x, 5)} for s, x in done.losses],
            "adapter": [{"folder": str(done.adapter)}],
        },
        seed=seed,
        seconds=done.seconds,
        peak_memory_bytes=done.peak_memory,
        model=done.base,
        data=done.data,
    )
    path = scratch / name_of(args, engine, seed)
    path.write_text(json.dumps(facts.model_dump(by_alias=True)))
    print(f"{engine} seed {seed}: last loss {done.losses[-1][1]:.3f}, {done.seconds:.0f} s")


def score(args) -> None:
    """Held-out loss of the base and of every adapter, in one process that no engine has patched."""
    import torch

    from lora_kit.hardware import hold_to_t4_rules
    from lora_kit.lora import load_lora, remove_lora
    from lora_kit.models import load_model
    from lora_kit.train import heldout_loss
    from lora_kit.train.finetune import encode_rows

    hold_to_t4_rules()
    spec = spec_of(args, 0)
    loaded = load_model(args.model, spec.dtype, spec.quantization)
    test = encode_rows(rows_of(args)[1], loaded.tokenizer, spec)
    kind, dtype = loaded.model.device.type, getattr(torch, loaded.dtype)
    found = {}
    with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
        found["base"] = heldout_loss(loaded.model, loaded.tokenizer, test)
        for path in sorted(Path(os.environ["SCRATCH"]).glob("alpaca*.json")):
            facts = json.loads(path.read_text())
            load_lora(loaded.model, facts["tables"]["adapter"][0]["folder"])
            found[path.name] = heldout_loss(loaded.model, loaded.tokenizer, test)
            remove_lora(loaded.model)
    (Path(os.environ["SCRATCH"]) / "scores").write_text(json.dumps(found))
    print(found)


def write(args, scratch: Path, out: Path) -> None:
    from lora_kit.studies.records import Record, write_record

    scores = json.loads((scratch / "scores").read_text())
    for path in sorted(scratch.glob("alpaca*.json")):
        facts = json.loads(path.read_text())
        del facts["tables"]["adapter"]
        facts["metrics"] |= {
            "heldout_loss_of_base": scores["base"],
            "heldout_loss": scores[path.name],
        }
        write_record(Record.model_validate(facts), out / path.name)
        print(f"{path.stem:<28} held-out loss {scores['base']:.4f} -> {scores[path.name]:.4f}")


if __name__ == "__main__":
    main()
