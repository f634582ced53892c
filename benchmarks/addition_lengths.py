"""Sums of more digits than were trained: Alwadhi's experiment, on one small model.

    python benchmarks/addition_lengths.py                    # a CPU: trained on 1-2, tested on 1-5
    python benchmarks/addition_lengths.py --device cuda      # a GPU: trained on 1-7, tested on 1-12

Writes data/results/addition_lengths/<trained>_of_<tested>_seed<seed>.json with exact answers, digit
accuracy and edit distance by length, base and tuned. A run that was cut off carries on at its
newest checkpoint. On a GPU it is held to a T4's rules (fp16, 15 GiB). Offline, `--model` names a
folder with the default model (safetensors, or the GGUF file).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

NAME = "smollm2-135m-instruct"
# Learning rate and rows a step are not printed in the paper; its epoch is one of an unknown number.
SIZES = {
    "cpu": dict(trained=2, tested=5, steps=150, rows=32, train=2000, test=100),
    "cuda": dict(trained=7, tested=12, steps=300, rows=128, train=5500, test=200),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=tuple(SIZES), default="cpu")
    parser.add_argument("--model", help="folder of the default model; else fetched")
    for name, what in (
        ("trained", "most digits in training"),
        ("tested", "most digits in the test"),
        ("steps", "optimiser steps"),
        ("rows", "sums a step"),
        ("train", "training sums of each length"),
        ("test", "test sums of each length"),
    ):
        parser.add_argument(f"--{name}", type=int, help=what)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("data/results"))
    args = parser.parse_args()
    size = {
        k: v if getattr(args, k) is None else getattr(args, k)
        for k, v in SIZES[args.device].items()
    }
    if args.device == "cuda":
        os.environ["LORA_KIT_T4_RULES"] = "1"
    from lora_kit.hardware import hold_to_t4_rules
    from lora_kit.studies.addition_lengths import STUDY, measure_lengths
    from lora_kit.studies.records import write_record

    hold_to_t4_rules()
    changed = "".join(f" --{k} {v}" for k, v in size.items() if v != SIZES[args.device][k])
    command = f"python benchmarks/addition_lengths.py --device {args.device}{changed}"
    with tempfile.TemporaryDirectory() as scratch:
        record = measure_lengths(
            prepare(args.model, Path(scratch)),
            size["trained"],
            size["tested"],
            size["train"],
            size["test"],
            args.seed,
            command + (f" --seed {args.seed}" if args.seed else ""),
            steps=size["steps"],
            rows_a_step=size["rows"],
            called=NAME,
            learning_rate=1e-3,
            **({"quantization": "none"} if args.device == "cpu" else {}),
        )
    name = f"{size['trained']}_of_{size['tested']}_seed{args.seed}.json"
    for base, tuned in zip(*record.tables.values(), strict=True):
        print(
            f"{tuned['digits']:2} digits: {base['exact']:.2f} -> {tuned['exact']:.2f} exact, "
            f"{tuned['digit_accuracy']:.2f} of digits, {tuned['edit_distance']:.1f} edits"
        )
    print(f"{record.seconds:.0f} s; {write_record(record, args.out / STUDY / name)}")


def prepare(model: str | None, scratch: Path) -> str:
    """The folder of the default model, under the model's own name."""
    from lora_kit.models import _convert_gguf, fetch_model

    ggufs = sorted(Path(model).glob("*.gguf")) if model else []
    if not ggufs:
        return str(fetch_model(model or NAME).path)
    _convert_gguf(ggufs[0], scratch / NAME)
    return str(scratch / NAME)


if __name__ == "__main__":
    main()
