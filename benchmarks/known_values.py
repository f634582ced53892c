"""HellaSwag of the default model, held to the value lm-eval's own model is known to give.

    python benchmarks/known_values.py --parts 0-3        # a fifth of the rows, on a CPU
    python benchmarks/known_values.py                    # all 10,042 rows
    python benchmarks/known_values.py --device cuda --batch-parts    # a GPU: all rows in one call

Known, all 10,042 rows, 0-shot, fp16 on a GPU, lm-eval 0.4.13's HFLM: acc 0.3363, acc_norm 0.4084.
The rows come in an order of their own (the first 3,243 are of one source), so the first so many are
no sample of the rest: part k of 20 is every 20th row from row k on. Each part has its record in
data/results/known_values, with every item's 0 or 1, and is not run again; the table at the end is
of all parts there are. LORA_KIT_DATA names the rows; offline, `--model` a folder with the model.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lora_kit.studies.known_values import PARTS, STUDY

NAME = "smollm2-135m-instruct"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--model", help="folder of the default model; else fetched")
    parser.add_argument("--parts", default=f"0-{PARTS - 1}", help="numbers and ranges: 0-3,7")
    parser.add_argument("--batch-parts", action="store_true", help="all parts asked in one call")
    parser.add_argument("--out", type=Path, default=Path("data/results") / STUDY)
    args = parser.parse_args()
    asked = [part for part in numbers(args.parts) if not path_of(args, part).exists()]
    if asked:
        run(args, asked)
    report(args)


def numbers(text: str) -> list[int]:
    found = set()
    for word in text.split(","):
        low, _, high = word.partition("-")
        found |= set(range(int(low), int(high or low) + 1))
    if not found <= set(range(PARTS)):
        raise SystemExit(f"--parts: from 0 to {PARTS - 1}, not {text}")
    return sorted(found)


def path_of(args, part: int) -> Path:
    return args.out / f"hellaswag_part{part:02d}_of_{PARTS}.json"


def run(args, parts: list[int]) -> None:
    from lora_kit.data import load_rows
    from lora_kit.evaluate.local_tasks import has_local_rows, local_rows, local_task
    from lora_kit.models import load_model, unpacked

    name = "hellaswag"
    rows = (
        local_rows(local_task(name), "validation")  # held to the published fingerprint
        if has_local_rows(name)
        else load_rows(name, "validation")
    )
    dtype = "float32" if args.device == "cpu" else "float16"
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(unpacked(args.model, Path(scratch) / NAME)) if args.model else NAME
        loaded = load_model(folder, dtype, device=args.device)
    if args.batch_parts:
        score(args, loaded, rows, parts)
    else:
        for part in parts:
            score(args, loaded, rows, [part])


def score(args, loaded, rows, parts: list[int]) -> None:
    """Ask the rows of these parts at once; write a record for each."""
    from dataclasses import replace

    from lora_kit import store
    from lora_kit.evaluate import evaluate
    from lora_kit.evaluate.statistics import estimate
    from lora_kit.studies.forgetting import to_bits
    from lora_kit.studies.records import new_record, write_record

    owner = [part for part in parts for _ in rows.rows[part::PARTS]]
    chosen = replace(rows, rows=tuple(r for part in parts for r in rows.rows[part::PARTS]))
    # Answers are kept while they come: the same command carries on within a part, too.
    run = store.sha256_json([loaded.record(), parts])[:12]
    kept = store.home() / "evaluations" / f"known_{run}.jsonl"
    found = evaluate(loaded.model, loaded.tokenizer, chosen, keep_answers=kept)
    (task,) = found.tasks.values()
    for part in parts:
        mine = [i for i, p in enumerate(owner) if p == part]
        metrics, bits = {}, []
        for metric in ("acc,none", "acc_norm,none"):
            scores = [task.scores(metric)[i] for i in mine]
            metrics[metric] = estimate(scores).to_metric()
            bits.append({"metric": metric, "scores": to_bits(scores)})
        record = new_record(
            STUDY,
            shlex.join(["python", "benchmarks/known_values.py", *sys.argv[1:]]),
            parameters={
                "task": rows.name,
                "rows": f"{part}::{PARTS}",
                "version": task.version,
                "shots": task.num_fewshot,
                "template": task.template,
                "harness": found.harness,
                "model_kind": found.model_kind,
                "dtype": loaded.dtype,
                "truncated": found.truncated,
            },
            metrics=metrics,
            tables={"items": bits},
            seconds=found.seconds / len(parts),
            model=loaded.record(),
            data=rows.record(),
        )
        write_record(record, path_of(args, part))
        print(f"part {part}: {len(mine)} rows, {record.seconds:.0f} s", flush=True)
    kept.unlink(missing_ok=True)


def report(args) -> None:
    """All parts together, beside what is known."""
    from lora_kit.studies.known_values import pooled
    from lora_kit.studies.records import read_record

    files = sorted(args.out.glob("hellaswag_part*.json"))
    if not files:
        raise SystemExit(f"{args.out} has no part yet.")
    print(f"{len(files)} of {PARTS} parts")
    print(f"{'metric':<10}{'value':>8}   {'95 % interval':<16}{'n':>7}{'known':>9}  inside")
    for row in pooled([read_record(file) for file in files]):
        interval = f"{row['low']:.4f} – {row['high']:.4f}"
        print(
            f"{row['metric']:<10}{row['value']:>8.4f}   {interval:<16}{row['n']:>7,}"
            f"{row['known']:>9.4f}  {'yes' if row['inside'] else 'NO'}"
        )


if __name__ == "__main__":
    from lora_kit.errors import LoraKitError

    try:
        main()
    except LoraKitError as e:
        sys.exit(f"known_values.py: {e}")
