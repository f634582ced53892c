"""The shop study on a CPU: baselines, and a small language model on a few hundred questions.

    LORA_KIT_DATA=folder python benchmarks/small_shops.py
    LORA_KIT_DATA=folder python benchmarks/small_shops.py --part tuned --seeds 1

One JSON a run goes into `data/results/08_small_shops`, and what has its record is not run again.
Parts: *classical* (majority, fuzzy, TF-IDF, embeddings on every task, all test rows), *curve*
(TF-IDF with logistic regression by number of labelled pairs), *model* (zero-shot and one-shot),
*tuned* (LoRA, 12 steps of 8 rows), *longer* (40 steps). The language model answers few rows here,
so its intervals are wide; the sizes for a GPU are in `benchmarks/grids/shop.yaml`.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

FEW = {"test_rows": 60, "validation_rows": 40, "timed_rows": 8}
PARTS = {
    "classical": [
        {"task": "all", "method": method} for method in ("majority", "fuzzy", "tfidf", "embedding")
    ],
    "curve": [
        {"task": "match", "method": "tfidf", "train_rows": n, "timed_rows": 0}
        for n in (50, 100, 200, 500, 1000, 2000)
    ],
    "model": [
        {"task": "match_random", "method": method, **FEW} for method in ("zero-shot", "one-shot")
    ],
    "tuned": [{"task": "match_random", "method": "tuned", "steps": 12, "batch_size": 8, **FEW}],
    "longer": [{"task": "match_random", "method": "tuned", "steps": 40, "batch_size": 8, **FEW}],
}


def name_of(setting: dict, seed: int) -> str:
    """The record's file name: task, method, what else differs, seed."""
    extra = "".join(
        f"_{setting[key]}{word}"
        for key, word in (("train_rows", "rows"), ("steps", "steps"))
        if key in setting
    )
    return f"{setting['task']}_{setting['method']}{extra}_seed{seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--seeds", default="0,1,2", help="which, joined by commas")
    parser.add_argument("--data", default="amazon_google", help="or a file of pairs")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: as it decides")
    parser.add_argument("--records", type=Path, help="data/results/08_small_shops by default")
    parser.add_argument("--most", type=int, default=0, help="stop after so many runs; 0: none")
    args = parser.parse_args()
    if unknown := set(args.part.split(",")) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    from lora_kit import store
    from lora_kit.studies.records import write_record
    from lora_kit.studies.shop_cells import STUDY, run_cell

    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    folder = args.records or store.repository() / "data" / "results" / STUDY
    done = 0
    for part in args.part.split(","):
        for setting in PARTS[part]:
            for seed in map(int, args.seeds.split(",")):
                path = folder / f"{name_of(setting, seed)}.json"
                if path.exists():
                    continue
                started = time.perf_counter()
                record = run_cell({**setting, "data": args.data}, seed, folder)
                record.command = f"python benchmarks/small_shops.py --part {part} --seeds {seed}"
                write_record(record, path)
                print(f"{path.name}: {time.perf_counter() - started:.0f} s", flush=True)
                done += 1
                if args.most and done == args.most:
                    return


if __name__ == "__main__":
    main()
