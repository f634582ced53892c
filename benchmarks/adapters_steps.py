"""The parts of `benchmarks/adapters.py` that time one step of a batch: mixed, decode, products."""

from __future__ import annotations

import contextlib
import statistics
from functools import partial
from pathlib import Path

from adapters_timing import base, in_turns, middle, ratio, write_adapters

ROWS, DISTINCT = 32, (1, 2, 4, 8, 16)


# ------------------------------------------------------------------ mixed


def mixed(args, folder: Path):
    """A step of one token for each of 32 rows, without a cache, so that all sides do the same. The
    bare base is this kit's own, its products made as those under the adapters; transformers' beside
    it, on which peft's adapters sit."""
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
        ways = {
            "bare": lambda step=step: step(ours.model, [None] * ROWS),
            "transformers": lambda step=step: step(plain, None),
        }
        for n, names in named.items():
            ways[f"ours {n}"] = lambda names=names, step=step: step(ours.model, names)
            ways[f"peft {n}"] = lambda names=names, step=step: step(wrapped, names)
        times = in_turns(args, ways, repeats=1 if args.device == "cpu" else 10)
        bare, other = (statistics.median(times[k]) for k in ("bare", "transformers"))
        for n in distinct:
            mine, theirs = times[f"ours {n}"], times[f"peft {n}"]
            added = [
                max(1e-9, statistics.median(t) - b) for t, b in ((mine, bare), (theirs, other))
            ]
            rows.append(
                {
                    "tokens a row": tokens,
                    "adapters": n,
                    "bare base ms: ours": f"{bare:.4g}",
                    "transformers'": f"{other:.4g}",
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
            f"one_over_base_{tokens}": ratio(times["ours 1"], times["bare"])[0],
            f"ours_over_transformers_base_{tokens}": ratio(times["ours 16"], times["transformers"])[
                0
            ],
        }
    return metrics, {"32 rows": rows}


# ------------------------------------------------------------------ decode


class Untouched:
    """In the place of MixedLora on a base that is left to transformers: no hooks, no other
    products."""

    masked, version = True, 0

    def rows(self, names):
        return contextlib.nullcontext()

    using = rows

    def places(self, names):
        return [None] * len(names)


def decode(args, folder: Path):
    """A step of the engine's decoder, its cache holding 64 tokens of each row: without adapters,
    with them, and over transformers' own products. On a GPU it replays a CUDA graph; the first two
    are timed without it as well, kernel by kernel, launched from Python."""
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
        ours, none = MixedLora(base(args)), MixedLora(base(args))
        for name, path in found.items():
            ours.put(name, ours.factors(read_adapter(path)))
        decoder, plain = Decoder(ours.model, ours, ROWS), Decoder(none.model, none, ROWS)
        other = Decoder(base(args), Untouched(), ROWS)
        for count in (1, 8, 32):
            for side in (decoder, plain, other):
                side.prefill([list(range(64))] * count, [None] * count)

            def step(keys, side=decoder, count=count, graphs=True):
                kept = side.graphs
                side.graphs = kept if graphs else None
                side.step([5] * count, keys)
                side.graphs = kept
                side.cache.lengths = [64] * count

            nobody, names = [None] * count, [f"a{i % 16}" for i in range(count)]
            ways = {
                "bare": partial(step, nobody, plain),
                "transformers": partial(step, nobody, other),
                "one": partial(step, ["a0"] * count),
                "mixed": partial(step, names),
            }
            if decoder.graphs is not None:
                ways["bare, launched"] = partial(step, nobody, plain, graphs=False)
                ways["one, launched"] = partial(step, ["a0"] * count, graphs=False)
                for way in ways.values():  # a graph is recorded the second time
                    way()
            times = in_turns(args, ways, repeats=3 if args.device == "cpu" else 10)
            over = {k: ratio(times[k], times["bare"]) for k in ("one", "mixed")}
            over["other"] = ratio(times["one"], times["transformers"])
            rows.append(
                {
                    "adapters of": kind,
                    "rows": count,
                    "bare base ms": middle(times["bare"]),
                    "transformers' products ms": middle(times["transformers"]),
                    "one adapter ms": middle(times["one"]),
                    "over the base": over["one"][1],
                    "16 adapters in turn, over the base": over["mixed"][1],
                    "one adapter over transformers' base": over["other"][1],
                }
            )
            key = f"{'all' if targets is None else 'qv'}_{count}"
            metrics[f"decode_over_base_{key}"] = over["one"][0]
            metrics[f"decode_mixed_over_base_{key}"] = over["mixed"][0]
            metrics[f"decode_over_transformers_base_{key}"] = over["other"][0]
            if decoder.graphs is not None:
                launched = {k: times[f"{k}, launched"] for k in ("bare", "one")}
                rows[-1] |= {
                    "without graphs: bare base ms": middle(launched["bare"]),
                    "one adapter ms, without": middle(launched["one"]),
                }
                for k in launched:
                    metrics[f"graphs_faster_{k}_{key}"] = ratio(launched[k], times[k])[0]
            for side in (decoder, plain, other):
                for _ in range(count):
                    side.cache.drop(0)
    return metrics, {"a decoding step": rows}


# ------------------------------------------------------------------ products


def products(args, folder: Path):
    """Gathered against masked, whole steps: rows × tokens × distinct adapters."""
    import torch

    from lora_kit.lora import read_adapter
    from lora_kit.serve.mixed import MixedLora

    found = write_adapters(args, folder, max(DISTINCT), args.rank)
    sides = {
        "gathered": MixedLora(base(args), masked=False, joined=False),
        "masked": MixedLora(base(args), masked=True, joined=False),
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
