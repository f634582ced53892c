"""LoRA here against peft, in one run: training step, peak memory, and what inference pays.

    python benchmarks/lora.py                          # CPU, fp32, SmolLM2-135M's shapes
    python benchmarks/lora.py --device cuda            # a GPU held to T4 rules: fp16
    python benchmarks/lora.py --json out.json --rounds 9

Models have random weights in the shapes of SmolLM2-135M (or, with --layers, fewer blocks of them):
speed does not depend on the values. Every pair of rows is measured in turns, round by round, so
that a slow minute hits both sides; the ratio is the median of the rounds' ratios. Ratio = peft's
time over ours: above 1, this kit is faster.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import platform
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

RANK, ALPHA = 16, 32
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base_model(layers: int, device: str, dtype: torch.dtype) -> nn.Module:
    """SmolLM2-135M's architecture with `layers` of its 30 blocks, seeded random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    )
    return LlamaForCausalLM(config).to(device=device, dtype=dtype).eval()


def in_four_bits(model: nn.Module, kind: str) -> nn.Module:
    """Every linear layer but the head in NF4 with double quantisation, ours or bitsandbytes'."""
    from lora_kit.linear4bit import NF4Linear

    for path, layer in [m for m in model.named_modules() if type(m[1]) is nn.Linear]:
        if path == "lm_head":
            continue
        parent, _, leaf = path.rpartition(".")
        if kind == "ours":
            new = NF4Linear.from_linear(layer)
        else:
            import bitsandbytes as bnb

            new = bnb.nn.Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=False,
                compute_dtype=layer.weight.dtype,
                quant_type="nf4",
            )
            new.weight = bnb.nn.Params4bit(
                layer.weight.data.cpu(), requires_grad=False, quant_type="nf4"
            )
            new = new.to(layer.weight.device)
        setattr(model.get_submodule(parent), leaf, new)
    if kind != "ours":
        model.is_loaded_in_4bit = True
    return model


def with_ours(model: nn.Module) -> nn.Module:
    from lora_kit.lora import LoraSpec, add_lora

    return add_lora(model, LoraSpec(RANK, ALPHA), seed=0)


def with_peft(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=NAMES, lora_dropout=0.0)
    return get_peft_model(model, config)


def frozen(model: nn.Module) -> nn.Module:
    """The bare base with its weights frozen, as they are under an adapter.

    Given the last hidden state of each row as a slice, torch multiplies by a head that requires a
    gradient in one product and by a frozen one row by row (`aten::bmm`), which has nothing to do
    with adapters: --thawed measures against the other base.
    """
    return model.requires_grad_(False)


def train_step(model: nn.Module, ids: torch.Tensor, amp: bool):
    trainable = [p for p in model.parameters() if p.requires_grad]

    def step():
        for p in trainable:
            p.grad = None
        with torch.autocast(ids.device.type, torch.float16, enabled=amp):
            loss = model(ids, labels=ids).loss
        (loss * 1024 if amp else loss).backward()

    return step


def forward(model: nn.Module, ids: torch.Tensor, amp: bool):
    def step():
        with torch.no_grad(), torch.autocast(ids.device.type, torch.float16, enabled=amp):
            model(ids, logits_to_keep=1)

    return step


def seconds(step, device: str, repeats: int) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def peak_bytes(step, device: str) -> int | None:
    """Most memory a call adds: exact on CUDA, by torch's allocation record on a CPU."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    held = most = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def compare(name: str, builders: dict, make, ids, options) -> dict | None:
    """One row: two models, measured in turns; None when --only leaves it out."""
    if options.only not in name:
        return None
    if "NF4" in name and importlib.util.find_spec("bitsandbytes") is None:
        print(f"{name}: left out, bitsandbytes is not installed", flush=True)
        return None
    steps = {}
    for side, build in builders.items():
        steps[side] = make(build(), ids, options.amp)
        for _ in range(2):
            steps[side]()
    times = {side: [] for side in steps}
    for turn in range(options.rounds):
        order = list(steps) if turn % 2 else list(steps)[::-1]
        for side in order:
            times[side].append(seconds(steps[side], options.device, options.repeats))
    first, second = times
    ratios = sorted(b / a for a, b in zip(times[first], times[second], strict=True))
    row = {
        "name": name,
        first: statistics.median(times[first]),
        second: statistics.median(times[second]),
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[0],
        "ratio_high": ratios[-1],
        "rounds": options.rounds,
        "tokens": ids.numel(),
    }
    peaks = {side: peak_bytes(step, options.device) for side, step in steps.items()}
    row |= {f"{side}_peak_bytes": peak for side, peak in peaks.items()}
    return row


def rows(options):
    device, layers = options.device, options.layers
    dtype = torch.float16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)

    def batch(count, length):
        return torch.randint(49152, (count, length), generator=generator).to(device)

    def fresh():
        return base_model(layers, device, dtype)

    def on(make, prepare=lambda m: m, mode="train"):
        return lambda: getattr(make(prepare(fresh())), mode)()

    def four(kind):
        return lambda model: in_four_bits(model, kind)

    def bare(model):
        return model if options.thawed else frozen(model)

    train = batch(*options.train)
    sides = {"ours": on(with_ours), "peft": on(with_peft)}
    yield compare("LoRA, dense base: forward + backward", sides, train_step, train, options)
    sides = {"ours": on(with_ours, four("bnb")), "peft": on(with_peft, four("bnb"))}
    yield compare("LoRA, bitsandbytes NF4: forward + backward", sides, train_step, train, options)
    sides = {"ours": on(with_ours, four("ours")), "peft": on(with_peft, four("bnb"))}
    yield compare("LoRA, NF4Linear (ours): forward + backward", sides, train_step, train, options)
    for count, length in ((1, 1), (1, 64), (32, 64)):
        ids = batch(count, length)
        name = f"inference, batch {count} x {length} tokens"
        sides = {"adapter": on(with_ours, mode="eval"), "peft": on(with_peft, mode="eval")}
        yield compare(f"{name}: ours against peft", sides, forward, ids, options)
        sides = {"adapter": on(with_ours, mode="eval"), "bare": on(bare, mode="eval")}
        yield compare(f"{name}: over the bare base", sides, forward, ids, options)


def table(found: list[dict]) -> str:
    lines = ["| what | ours ms | other ms | ratio (low, high) | peak MiB: ours, other |"]
    lines.append("|---|---|---|---|---|")
    for row in found:
        ours, other = [k for k in row if k in ("ours", "adapter", "peft", "bare")]
        peaks = [f"{row[f'{k}_peak_bytes'] / 2**20:.0f}" for k in (ours, other)]
        lines.append(
            f"| {row['name']} | {row[ours] * 1e3:.1f} | {row[other] * 1e3:.1f} | "
            f"{row['ratio']:.3f} ({row['ratio_low']:.2f}, {row['ratio_high']:.2f}) | "
            f"{', '.join(peaks)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layers", type=int, default=30, help="blocks of the model, 1 to 30")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, help="calls per round; 1 on a CPU, 10 on a GPU")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--thawed", action="store_true", help="leave the bare base unfrozen")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.repeats = options.repeats or (10 if options.device == "cuda" else 1)
    options.amp = options.device == "cuda"
    options.train = (16, 128) if options.device == "cuda" else (4, 32)
    warnings.filterwarnings("ignore")
    found = []
    for row in filter(None, rows(options)):
        found.append(row)
        print(f"{row['name']}: ratio {row['ratio']:.3f}", flush=True)
        gc.collect()
    import peft

    gpu = torch.cuda.get_device_name() if options.device == "cuda" else None
    notes = {
        "command": "python " + " ".join(["benchmarks/lora.py", *sys.argv[1:]]),
        "hardware": gpu or f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "peft": peft.__version__},
        "layers": options.layers,
        "rows": found,
    }
    print(f"\n{notes['command']}; {notes['hardware']}; torch {torch.__version__}\n")
    print(table(found))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
