"""Many adapters on one base, against peft in the same run: switch, mixed batch, decoding, load.

    python benchmarks/adapters.py                                    # CPU, fp32
    python benchmarks/adapters.py --device cuda                      # a GPU held to T4 rules: fp16
    OMP_NUM_THREADS=1 python benchmarks/adapters.py --clock cpu      # on a CPU that others use too

Parts, chosen with --part; each writes its record when it ends, and one whose record is there is
left alone (--again makes it anew):

    switch    another adapter for the next batch, against peft's set_adapter and load_adapter
    mixed     32 rows with 1 to 16 distinct adapters, against peft's adapter_names
    decode    a decoding step with an adapter, over the bare base
    products  the two ways to multiply a mixed batch (lora_kit.serve.products)
    lorax     Tables 7-9 of Zhao et al. (2024): 1 to 50 users, the base alone and 25 adapters
    replicas  their Table 10: 50 users on one replica, 100 on two, each replica its own process

Random weights in the shapes of SmolLM2-135M (--layers: fewer of its 30 blocks): speed does not
depend on the values. Ways that are compared run in turns, round by round; the ratio is the median
of the rounds' ratios, with the lowest and highest beside it. --clock cpu counts the process's own
seconds, which neighbours on the machine do not lengthen; use it with one thread.
"""

from __future__ import annotations

import argparse
import gc
import os
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from adapters_load import lorax, one_replica, replicas
from adapters_steps import ROWS, decode, mixed, products
from adapters_timing import base, in_turns, middle, ratio, write_adapters

STUDY = "05_adapter_swapping"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--part", default=",".join(PARTS))
    parser.add_argument("--layers", type=int, default=30, help="blocks of the model, 1 to 30")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters on all layers")
    parser.add_argument("--scale", type=float, help="of the paper's tokens: 0.25 on a CPU, else 1")
    parser.add_argument("--requests", type=int, help="of a cell; by default its users, 16 at least")
    parser.add_argument("--loads", type=int, default=5, help="times a cell of Tables 8, 9 is run")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds; no part begins later")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--records", type=Path, default=Path("data/results") / STUDY)
    parser.add_argument("--replica", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.parts = args.part.split(",")
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    args.scale = args.scale or (0.25 if args.device == "cpu" else 1.0)
    return args


def main() -> None:
    args = arguments()
    warnings.filterwarnings("ignore")
    from lora_kit.hardware import hold_to_t4_rules
    from lora_kit.models import quiet_libraries

    if args.device == "cuda":
        os.environ["LORA_KIT_T4_RULES"] = "1"
    hold_to_t4_rules()
    if args.replica is not None:
        one_replica(args)
        return
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, quiet_libraries():
        for part in args.parts:
            path = args.records / f"serving_{part}_{args.device}.json"
            if path.exists() and not args.again:
                print(f"{part}: {path} is there")
            elif time.perf_counter() - started > args.budget:
                print(f"{part}: the budget is spent")
            else:
                keep(args, part, path, Path(folder))
                gc.collect()


def keep(args, part: str, path: Path, folder: Path) -> None:
    from lora_kit.studies.records import new_record, write_record

    started = time.perf_counter()
    metrics, tables = PARTS[part](args, folder)
    import torch

    asked = {"device": args.device, "layers": args.layers, "clock": args.clock, "rank": args.rank}
    asked |= {"rounds": args.rounds, "threads": torch.get_num_threads(), "part": part}
    asked |= {"scale": args.scale, "rows": ROWS, "loads": args.loads}
    record = new_record(
        STUDY,
        shlex.join(["python", "benchmarks/adapters.py", *asked_for(sys.argv[1:]), "--part", part]),
        parameters=asked,
        metrics=metrics,
        tables=tables,
        seed=0,
        seconds=time.perf_counter() - started,
    )
    write_record(record, path)
    for name, rows in tables.items():
        print(f"\n{part}, {name}\n\n{as_table(rows)}", flush=True)
    print("\n" + "\n".join(f"{k} = {v:.4g}" for k, v in metrics.items()), flush=True)


def asked_for(words: list[str]) -> list[str]:
    """What was asked, but for the part, the place of the records and whether there were some."""
    apart = ("--part", "--records")
    before = ["", *words]
    return [
        word
        for word, last in zip(words, before, strict=False)
        if word not in (*apart, "--again") and last not in apart
    ]


def as_table(rows: list[dict]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join(lines + ["| " + " | ".join(map(str, r.values())) + " |" for r in rows])


# ------------------------------------------------------------------ switch


def switch(args, folder: Path):
    """Ours: the difference between a batch that uses another adapter than the last one and a batch
    that uses the same, and the switch by itself; bringing an adapter onto the device, from memory
    and from its file."""
    import torch
    from peft import PeftModel

    from lora_kit.lora import read_adapter
    from lora_kit.serve.mixed import MixedLora

    found = write_adapters(args, folder, 3, args.rank)
    mixed = MixedLora(base(args))
    for name in ("a0", "a1"):
        mixed.put(name, mixed.factors(read_adapter(found[name])))
    wrapped = PeftModel.from_pretrained(base(args), found["a0"], adapter_name="a0").eval()
    wrapped.load_adapter(found["a1"], adapter_name="a1")
    ids = torch.zeros((1, 1), dtype=torch.long, device=args.device)
    turn = [0]

    def other() -> str:
        turn[0] += 1
        return f"a{turn[0] % 2}"

    def name_rows(name: str):
        with mixed.rows([name]):
            pass

    def ours(name: str):
        with mixed.rows([name]), torch.inference_mode():
            mixed.model(ids, logits_to_keep=1)

    files = read_adapter(found["a2"])

    def from_memory():
        mixed.put("new", mixed.factors(files))
        mixed.drop("new")

    def from_file():
        mixed.put("new", mixed.factors(read_adapter(found["a2"])))
        mixed.drop("new")

    def peft_load():
        wrapped.load_adapter(found["a2"], adapter_name="a2")
        wrapped.delete_adapter("a2")

    few = in_turns(
        args,
        {
            "ours: name another adapter": lambda: name_rows(other()),
            "peft: set_adapter": lambda: wrapped.set_adapter(other()),
            "ours: from memory onto the device": from_memory,
            "ours: from its file onto the device": from_file,
            "peft: load_adapter, delete_adapter": peft_load,
        },
    )
    many = in_turns(args, {"same": lambda: ours("a0"), "other": lambda: ours(other())}, repeats=5)
    ours_ms = statistics.median(few["ours: name another adapter"])
    peft_load_ms = statistics.median(few["peft: load_adapter, delete_adapter"])
    rows = [{"what": name, "ms": middle(times)} for name, times in few.items()]
    rows += [
        {"what": f"ours: a token, {name} adapter as before", "ms": middle(t)}
        for name, t in many.items()
    ]
    return {
        "switch_ms": ours_ms,
        "peft_set_adapter_ms": statistics.median(few["peft: set_adapter"]),
        "peft_load_ms": peft_load_ms,
        "load_from_file_ms": statistics.median(few["ours: from its file onto the device"]),
        "peft_load_over_switch": peft_load_ms / ours_ms,
        "token_other_over_same": ratio(many["other"], many["same"])[0],
    }, {"one adapter to another": rows}


PARTS = {
    "switch": switch,
    "mixed": mixed,
    "decode": decode,
    "products": products,
    "lorax": lorax,
    "replicas": replicas,
}

if __name__ == "__main__":
    main()
