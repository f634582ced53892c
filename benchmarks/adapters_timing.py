"""What the parts of `benchmarks/adapters.py` are made of: models, adapters, and times in turns."""

from __future__ import annotations

import statistics
import time
from pathlib import Path


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
