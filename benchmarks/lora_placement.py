"""Rank and placement of LoRA on addition: the records that notebook 02 reads.

    python benchmarks/lora_placement.py
    python benchmarks/lora_placement.py --device cuda --digits 3 --test-rows 500 --steps 150 \\
        --batch-size 64 --lr 5e-4 --ranks 2,8,32,128 --seeds 0,1,2,3,4 --out records

Every cell (placement x rank) gets the same rows, the same steps and the same learning rate; alpha
is twice the rank, so the scale is 2 everywhere. One record a cell, seeds inside. `--shard 2/6` runs
every sixth cell, so that six processes share the work. A cell whose record is there is left alone.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

PLACEMENTS = ("attention", "mlp", "all")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a name or a folder")
    parser.add_argument("--placements", default=",".join(PLACEMENTS))
    parser.add_argument("--ranks", default="2,8,32")
    parser.add_argument("--seeds", default="0,1,2,3")
    parser.add_argument("--digits", type=int, default=1)
    parser.add_argument("--rows", type=int, default=4000, help="training rows (at most)")
    parser.add_argument("--test-rows", type=int, default=40)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th cell from i on")
    parser.add_argument("--out", type=Path, default=Path("data/results/lora_placement"))
    return parser.parse_args()


def main() -> None:
    options = arguments()
    from lora_kit.lora_study import Budget, encode_rows, score
    from lora_kit.models import load_model
    from lora_kit.skills import train_and_test

    loaded = load_model(options.model, dtype="float32")
    loaded.model.to(options.device)
    train_rows, test_rows = train_and_test(
        "addition", options.digits, options.rows, options.test_rows, seed=0
    )
    train = encode_rows(loaded.tokenizer, train_rows, options.device)
    test = encode_rows(loaded.tokenizer, test_rows, options.device)
    base = score(loaded.model, test)
    print(f"base: loss {base['loss']:.3f}, accuracy {base['accuracy']:.3f}", flush=True)
    budget = Budget(options.steps, options.batch_size, options.lr)
    seeds = [int(s) for s in options.seeds.split(",")]
    cells = [(p, int(r)) for p in options.placements.split(",") for r in options.ranks.split(",")]
    first, every = (int(n) for n in options.shard.split("/"))
    for placement, rank in cells[first::every]:
        path = options.out / f"{placement}_r{rank:03d}.json"
        if not path.exists():
            cell(path, placement, rank, seeds, budget, (loaded, train, test, train_rows, base))


def cell(path: Path, placement: str, rank: int, seeds: list[int], budget, material) -> None:
    from lora_kit.lora import LoraSpec
    from lora_kit.lora_study import mean_and_interval, placement_cell
    from lora_kit.studies.records import new_record, write_record

    loaded, train, test, train_rows, base = material
    start = time.perf_counter()
    spec = LoraSpec(rank, 2 * rank, placement)
    rows = []
    for seed in seeds:
        found = placement_cell(loaded.model, train, test, spec, budget, seed)
        rows.append({"seed": seed, **found})
        print(f"{placement} r{rank} seed {seed}: {found}", flush=True)
    trainable = rows[0]["trainable"]
    record = new_record(
        "lora_placement",
        shlex.join(["python", "benchmarks/lora_placement.py", *sys.argv[1:]]),
        parameters={
            "placement": placement,
            "rank": rank,
            "alpha": spec.alpha,
            "seeds": seeds,
            "trainable": trainable,
            "digits": int(train_rows[0]["digits"]),
            "test_rows": len(test.ids),
            **budget.to_dict(),
        },
        metrics={
            "loss": mean_and_interval([r["loss"] for r in rows]),
            "accuracy": mean_and_interval([r["accuracy"] for r in rows]),
            "base_loss": base["loss"],
            "base_accuracy": base["accuracy"],
        },
        tables={"seeds": rows},
        seconds=time.perf_counter() - start,
        model=loaded.record(),
        data={
            "name": train_rows.name,
            "rows": len(train_rows),
            "fingerprint": train_rows.fingerprint,
        },
    )
    write_record(record, path)


if __name__ == "__main__":
    main()
