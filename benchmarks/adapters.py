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
import contextlib
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

import adapters_load

STUDY = "05_adapter_swapping"
PARTS = ("switch", "mixed", "decode", "products", "lorax", "replicas")
ROWS, DISTINCT = 32, (1, 2, 4, 8, 16)


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
        adapters_load.one_replica(args, write_adapters, base)
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
    if part in ("lorax", "replicas"):
        metrics, tables = getattr(adapters_load, part)(args, folder, write_adapters, base)
    else:
        metrics, tables = globals()[part](args, folder)
    import torch

    asked = {"device": args.device, "layers": args.layers, "clock": args.clock, "rank": args.rank}
    asked |= {"rounds": args.rounds, "threads": torch.get_num_threads(), "part": part}
    asked |= {"scale": args.scale, "rows": ROWS}
    record = new_record(
        STUDY,
        shlex.join(
            ["python", "benchmarks/adapters.py", *without_part(sys.argv[1:]), "--part", part]
        ),
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


def without_part(words: list[str]) -> list[str]:
    kept = [w for i, w in enumerate(words) if w != "--part" and words[i - 1 : i] != ["--part"]]
    return [w for w in kept if w != "--again"]


def as_table(rows: list[dict]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join(lines + ["| " + " | ".join(map(str, r.values())) + " |" for r in rows])


# ------------------------------------------------------------------ models, adapters, clocks


def base(args):
    import torch
    from lora import base_model

    return base_model(
        args.layers, args.device, torch.float16 if args.device == "cuda" else torch.float32
    )


def write_adapters(args, folder: Path, count: int, rank: int, targets=None) -> dict[str, Path]:
    """{name: folder} of adapters with random B, in peft's format."""
    import torch

    from lora_kit.lora import LoraSpec, add_lora, lora_layers, remove_lora, save_lora

    model, made = base(args).float(), {}
    for i in range(count):
        target = folder / f"r{rank}-{len(targets or [])}" / f"a{i}"
        made[f"a{i}"] = target
        if target.exists():
            continue
        add_lora(model, LoraSpec(rank, 2 * rank, *([targets] if targets else [])), seed=i)
        for layer in lora_layers(model).values():
            with torch.no_grad():
                layer.lora_B["default"].normal_(0, 0.01)
        save_lora(model, target)
        remove_lora(model)
    return made


def clock(args):
    """A function of no arguments that returns seconds."""
    if args.device == "cuda":
        import torch

        def now() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

        return now
    return time.process_time if args.clock == "cpu" else time.perf_counter


def in_turns(args, ways: dict, repeats: int = 1) -> dict[str, list[float]]:
    """{way: milliseconds of a call, one for each round}."""
    now, times = clock(args), {name: [] for name in ways}
    for step in ways.values():
        step()
    for turn in range(args.rounds):
        for name in list(ways) if turn % 2 else list(ways)[::-1]:
            start = now()
            for _ in range(repeats):
                ways[name]()
            times[name].append(1000 * (now() - start) / repeats)
    return times


def ratio(over: list[float], under: list[float]) -> tuple[float, str]:
    """The median of the rounds' ratios, and it in words with lowest and highest."""
    each = sorted(a / b for a, b in zip(over, under, strict=True))
    middle = statistics.median(each)
    return middle, f"{middle:.2f} ({each[0]:.2f}, {each[-1]:.2f})"


def middle(times: list[float]) -> str:
    return f"{statistics.median(times):.3g}"


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


# ------------------------------------------------------------------ mixed


def mixed(args, folder: Path):
    """A step of one token for each of 32 rows, without a cache, so that both sides do the same."""
    import torch
    from peft import PeftModel

    from lora_kit.lora import read_adapter
    from lora_kit.serve.mixed import MixedLora

    found = write_adapters(args, folder, max(DISTINCT), args.rank)
    ours, plain = MixedLora(base(args)), base(args)
    wrapped = PeftModel.from_pretrained(base(args), found["a0"], adapter_name="a0").eval()
    for name, path in found.items():
        ours.put(name, ours.factors(read_adapter(path)))
        if name != "a0":
            wrapped.load_adapter(path, adapter_name=name)
    rows, metrics = [], {}
    for tokens, distinct in ((1, DISTINCT), (8, (1, 16))):
        ids = torch.randint(49152, (ROWS, tokens), generator=torch.Generator().manual_seed(0))
        ids = ids.to(args.device)

        def step(model, names, ids=ids):
            with torch.inference_mode():
                if model is not ours.model:
                    named = {"adapter_names": names} if model is wrapped else {}
                    model(ids, logits_to_keep=1, **named)
                else:
                    with ours.rows(names):
                        model(ids, logits_to_keep=1)

        named = {n: [f"a{i % n}" for i in range(ROWS)] for n in distinct}
        ways = {"bare": lambda step=step: step(plain, None)}
        for n, names in named.items():
            ways[f"ours {n}"] = lambda names=names, step=step: step(ours.model, names)
            ways[f"peft {n}"] = lambda names=names, step=step: step(wrapped, names)
        times = in_turns(args, ways, repeats=1 if args.device == "cpu" else 10)
        bare = statistics.median(times["bare"])
        for n in distinct:
            mine, theirs = times[f"ours {n}"], times[f"peft {n}"]
            added = [max(1e-9, statistics.median(t) - bare) for t in (mine, theirs)]
            rows.append(
                {
                    "tokens a row": tokens,
                    "adapters": n,
                    "bare base ms": f"{bare:.4g}",
                    "ours ms": middle(mine),
                    "peft ms": middle(theirs),
                    "peft over ours": ratio(theirs, mine)[1],
                    "ours over 1 adapter": ratio(mine, times["ours 1"])[1],
                    "ours over base": ratio(mine, times["bare"])[1],
                    "added to the base, peft over ours": f"{added[1] / added[0]:.1f}",
                }
            )
        metrics |= {
            f"sixteen_over_one_{tokens}": ratio(times["ours 16"], times["ours 1"])[0],
            f"peft_over_ours_{tokens}": ratio(times["peft 16"], times["ours 16"])[0],
            f"ours_over_base_{tokens}": ratio(times["ours 16"], times["bare"])[0],
        }
    return metrics, {"32 rows": rows}


# ------------------------------------------------------------------ decode


class Bare:
    """In the place of MixedLora on a base that has none, not even its hooks."""

    masked = True

    def rows(self, names):
        return contextlib.nullcontext()

    using = rows

    def places(self, names):
        return [None] * len(names)


def decode(args, folder: Path):
    """A step of the engine's decoder, its cache holding 64 tokens of each row. On a GPU it replays
    a CUDA graph; the same is timed without it, kernel by kernel, launched from Python."""
    from lora_kit.lora import read_adapter
    from lora_kit.serve.decoder import Decoder
    from lora_kit.serve.mixed import MixedLora

    rows, metrics = [], {}
    kinds = {
        f"rank {args.rank}, all layers": (args.rank, None),
        "rank 8, q and v": (8, ["q_proj", "v_proj"]),
    }
    for kind, (rank, targets) in kinds.items():
        found = write_adapters(args, folder, 16, rank, targets)
        ours = MixedLora(base(args))
        for name, path in found.items():
            ours.put(name, ours.factors(read_adapter(path)))
        decoder, plain = Decoder(ours.model, ours, ROWS), Decoder(base(args), Bare(), ROWS)
        for count in (1, 8, 32):
            for side in (decoder, plain):
                side.prefill([list(range(64))] * count, [None] * count)

            def step(keys, side=decoder, count=count, graphs=True):
                kept = side.graphs
                side.graphs = kept if graphs else None
                side.step([5] * count, keys)
                side.graphs = kept
                side.cache.lengths = [64] * count

            names = [f"a{i % 16}" for i in range(count)]
            ways = {
                "bare": lambda step=step, side=plain, n=count: step([None] * n, side),
                "one": lambda step=step, n=count: step(["a0"] * n),
                "mixed": lambda step=step, names=names: step(names),
            }
            if decoder.graphs is not None:
                ways |= {
                    "bare, launched": lambda step=step, side=plain, n=count: step(
                        [None] * n, side, graphs=False
                    ),
                    "one, launched": lambda step=step, n=count: step(["a0"] * n, graphs=False),
                }
                for way in ways.values():  # a graph is recorded the second time
                    way()
            times = in_turns(args, ways, repeats=3 if args.device == "cpu" else 10)
            over = {k: ratio(times[k], times["bare"]) for k in ("one", "mixed")}
            rows.append(
                {
                    "adapters of": kind,
                    "rows": count,
                    "bare base ms": middle(times["bare"]),
                    "one adapter ms": middle(times["one"]),
                    "over the base": over["one"][1],
                    "16 adapters in turn, over the base": over["mixed"][1],
                }
            )
            if decoder.graphs is not None:
                launched = {k: times[f"{k}, launched"] for k in ("bare", "one")}
                rows[-1] |= {
                    "without graphs: bare base ms": middle(launched["bare"]),
                    "one adapter ms, without": middle(launched["one"]),
                }
                metrics |= {
                    f"graphs_faster_{k}_{'all' if targets is None else 'qv'}_{count}": ratio(
                        launched[k], times[k]
                    )[0]
                    for k in launched
                }
            key = f"{'all' if targets is None else 'qv'}_{count}"
            metrics[f"decode_over_base_{key}"] = over["one"][0]
            metrics[f"decode_mixed_over_base_{key}"] = over["mixed"][0]
            for _ in range(count):
                decoder.cache.drop(0)
                plain.cache.drop(0)
    return metrics, {"a decoding step": rows}


# ------------------------------------------------------------------ products


def products(args, folder: Path):
    """Gathered against masked, whole steps: rows × tokens × distinct adapters."""
    import torch

    from lora_kit.lora import read_adapter
    from lora_kit.serve.mixed import MixedLora

    found = write_adapters(args, folder, max(DISTINCT), args.rank)
    sides = {
        "gathered": MixedLora(base(args), masked=False),
        "masked": MixedLora(base(args), masked=True),
    }
    for side in sides.values():
        for name, path in found.items():
            side.put(name, side.factors(read_adapter(path)))
    rows, metrics = [], {}
    for tokens, n in ((1, 1), (1, 4), (1, 16), (8, 16)):
        ids = torch.zeros((ROWS, tokens), dtype=torch.long, device=args.device)
        names = [f"a{i % n}" for i in range(ROWS)]

        def step(side, ids=ids, names=names):
            with torch.inference_mode(), side.rows(names):
                side.model(ids, logits_to_keep=1)

        ways = {k: lambda s=side, step=step: step(s) for k, side in sides.items()}
        times = in_turns(args, ways, repeats=1 if args.device == "cpu" else 10)
        rows.append(
            {
                "tokens a row": tokens,
                "adapters": n,
                **{f"{k} ms": middle(t) for k, t in times.items()},
                "masked over gathered": ratio(times["masked"], times["gathered"])[1],
            }
        )
        metrics[f"masked_over_gathered_{tokens}_{n}"] = ratio(times["masked"], times["gathered"])[0]
    return metrics, {"32 rows, two ways": rows}


if __name__ == "__main__":
    main()
