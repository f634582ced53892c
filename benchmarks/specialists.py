"""The specialists study beside its sweep: what it will take, a small run on a CPU, and re-scoring.

    python benchmarks/specialists.py --plan                    # memory and minutes of every cell
    python benchmarks/specialists.py --plan --paper            # of saha2024's own grid, for a T4
    python benchmarks/specialists.py --write-grid              # benchmarks/grids/specialists*.yaml
    python benchmarks/specialists.py --small                   # a CPU: ranks and scaling rules
    python benchmarks/specialists.py --tiny                    # a CPU: the whole question, 0.25M
    python benchmarks/specialists.py --unstopped 200           # a CPU: the base's summaries
    python benchmarks/specialists.py --rescore runs/…/generations

The grid itself runs as a sweep:

    lora-kit sweep specialists --grid benchmarks/grids/specialists.yaml --seeds 3 --jobs 8

`--small` asks the study's question at the smallest scale that shows it: one-step word problems,
ranks 8, 16, 32 and 128 under the three scaling rules, twelve steps of eight rows, held-out loss,
three seeds. One record a cell in data/results/07_specialists; what has its record is left alone, so
that a run that was cut off carries on, with all seeds of a setting before the next. `--tiny` asks
it of the shipped addition model, where every rank has every rule at every learning rate.
`--unstopped` asks the untuned base for summaries again without the stop that the grid's have, an
empty line, with which the base likes to begin.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

STUDY = "07_specialists"
SMALL = {"task": "sums", "placement": "all", "tests": "loss", "learning_rate": 3e-4}
SMALL |= {"rows": 96, "steps": 12, "batch_size": 8, "max_length": 128, "heldout": 48}
SMALL_RANKS = (128, 8, 32)  # beside 16, where the rules meet


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", action="store_true", help="print memory and minutes, run nothing")
    parser.add_argument("--paper", action="store_true", help="with --plan: the paper's own grid")
    parser.add_argument("--gpu", default="t4", help="with --plan: the card to plan for")
    parser.add_argument("--write-grid", action="store_true", help="write the sweep's grid files")
    parser.add_argument("--small", action="store_true", help="the small run, on this machine")
    parser.add_argument("--tiny", action="store_true", help="the grid of the addition model")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", default="3e-4", help="with --small: learning rates")
    parser.add_argument("--budget", type=float, help="seconds: start no cell that would not end")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a name, or a folder")
    parser.add_argument("--unstopped", type=int, help="so many summaries of the untuned base")
    parser.add_argument("--rescore", type=Path, help="a folder of stored generations")
    parser.add_argument("--into", type=Path, help="with --rescore: records that lack the scores")
    parser.add_argument("--out", type=Path, default=Path("data/results") / STUDY)
    return parser.parse_args()


def main() -> None:
    from lora_kit.errors import LoraKitError

    args = arguments()
    ways = {"plan": plan, "write_grid": write_grid, "small": small, "tiny": tiny}
    ways |= {"unstopped": unstopped, "rescore": rescore}
    chosen = [way for name, way in ways.items() if getattr(args, name)]
    if not chosen:
        raise SystemExit(
            "Say what to do: --plan, --write-grid, --small, --tiny, --unstopped N or "
            "--rescore FOLDER."
        )
    try:
        for way in chosen:
            way(args)
    except LoraKitError as e:
        raise SystemExit(str(e)) from None


def plan(args) -> None:
    from dataclasses import replace

    from lora_kit.studies.specialists import grid_cells, paper_cells
    from lora_kit.studies.specialists_cells import shape_of
    from lora_kit.studies.specialists_plan import plan_cell, why_not

    cells = grid_cells(shape_of(args.model), [0])
    if args.paper:
        models = ("llama-3.2-1b-instruct", "qwen2.5-1.5b-instruct", "llama-3.2-3b-instruct")
        cells = [cell for model in models for cell in paper_cells(model)]
    training = tests = 0.0
    print(f"{'model':24} {'cell':42} {'GiB':>6} {'rows':>5} {'train':>7} {'tests':>7}  minutes")
    for cell in (replace(c, gpu=args.gpu) for c in cells):
        shape = shape_of(cell.model)
        if reason := why_not(cell, shape):
            print(f"{cell.model:24} {cell.setting:42} skipped: {reason}")
            continue
        made = plan_cell(cell, shape)
        row = made.row()
        training, tests = training + made.training_minutes, tests + made.test_minutes
        print(
            f"{cell.model:24} {cell.setting:42} {row['GiB as run']:>6} {row['rows at once']:>5} "
            f"{row['minutes training']:>7} {row['minutes tests']:>7}"
        )
    print(f"{training:.0f} minutes of training, {tests:.0f} of tests, for one seed")


def write_grid(args) -> None:
    from lora_kit.architectures import architecture
    from lora_kit.studies.specialists_plan import grid_text

    folder = Path(__file__).resolve().parent / "grids"
    folder.mkdir(exist_ok=True)
    for name, text in grid_text(architecture("smollm2-135m")).items():
        (folder / name).write_text(text, encoding="utf-8")
        print(folder / name)


def small_settings(rates: list[float]) -> list[dict]:
    found = []
    for rate in rates:
        found.append({**SMALL, "rank": 16, "scaling": "fixed", "learning_rate": rate})
        for rank in SMALL_RANKS:
            for scaling in ("fixed", "constant", "stabilised"):
                found.append({**SMALL, "rank": rank, "scaling": scaling, "learning_rate": rate})
    return found


def small(args) -> None:
    import torch

    from lora_kit.studies.records import write_record
    from lora_kit.studies.specialists import cell_from
    from lora_kit.studies.specialists_cells import run_cell

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    started, longest = time.perf_counter(), 0.0
    missing = 0
    for setting in small_settings([float(r) for r in args.rates.split(",")]):
        for seed in range(args.seeds):
            setting = {**setting, "model": args.model}
            path = args.out / f"small_{cell_from(setting, seed).name}.json"
            if path.exists():
                continue
            spent = time.perf_counter() - started
            if args.budget and spent + longest > args.budget:
                missing += 1
                continue
            began = time.perf_counter()
            command = "OMP_NUM_THREADS=1 python benchmarks/specialists.py --small"
            record = run_cell(setting, seed, Path("runs/specialists"), print, command)
            record.parameters["size"] = "small scale, held-out loss, a CPU"
            write_record(record, path)
            longest = max(longest, time.perf_counter() - began)
            print(f"{path.name}: {time.perf_counter() - began:.0f} s", flush=True)
    print(f"{time.perf_counter() - started:.0f} s; {missing} cells are still without a record")


def tiny(args) -> None:
    import torch

    from lora_kit.studies.specialists_tiny import run_tiny

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    missing = run_tiny(args.out / "tiny_grid.json", range(args.seeds), budget=args.budget)
    print(f"{missing} cells are still missing")


def unstopped(args) -> None:
    import torch

    from lora_kit.studies.records import write_record
    from lora_kit.studies.specialists_measures import run_unstopped

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    command = f"python benchmarks/specialists.py --unstopped {args.unstopped}"
    record = run_unstopped(args.model, args.unstopped, command)
    write_record(record, args.out / "unstopped_dialogue.json")
    print({name: getattr(value, "value", value) for name, value in record.metrics.items()})


def record_of(folder: Path, path: Path) -> Path:
    """The record of the cell whose answers lie in <cell>/generations/<test>.jsonl."""
    return folder / f"{path.parent.parent.name}.json"


def lacking(folder: Path | None, path: Path) -> bool:
    """Without a folder of records every file counts; else those their record could not judge."""
    if folder is None:
        return True
    from lora_kit.studies.records import read_record

    record = record_of(folder, path)
    return record.exists() and path.stem in read_record(record).parameters.get("unjudged", {})


def into(folder: Path | None, path: Path, judged) -> None:
    from lora_kit.studies.specialists_generations import add_to_record
    from lora_kit.studies.specialists_tasks import TESTS

    if folder is not None and not judged.note:
        add_to_record(record_of(folder, path), judged, TESTS[judged.test].version)


def rescore(args) -> None:
    from lora_kit.errors import LoraKitError
    from lora_kit.studies.specialists_generations import score_generations

    files = sorted(f for f in args.rescore.rglob("*.jsonl") if lacking(args.into, f))
    if not files:
        raise SystemExit(f"{args.rescore} holds no stored generations that are to be scored.")
    refused = 0
    for path in files:
        try:
            judged = score_generations(path)
            into(args.into, path, judged)
        except LoraKitError as e:
            refused += 1
            print(f"{path}: refused: {e}")
            continue
        for metric, mean in judged.means.items():
            print(f"{path}: {metric} {mean}")
        if judged.note:
            print(f"{path}: {judged.note}")
    if refused:
        raise SystemExit(f"{refused} of {len(files)} files were refused.")


if __name__ == "__main__":
    main()
