"""Checks of Mai 2025, sections 1 and 2: formulas, sizes, and how the experiment was set up."""

from __future__ import annotations

import math

from lora_kit.architectures import architecture
from lora_kit.memory import plan_memory, weight_bytes
from lora_kit.studies.checks.outcome import (
    CONTRADICTED,
    HOLDS,
    NOT_REPRODUCED,
    OVERSTATED,
    Outcome,
    all_of,
    cell,
    check,
    equals,
    holds_if,
    some_of,
    text,
)

PAPER = "mai2025"


# ------------------------------------------------------------------ formulas and sizes


@check
def example_of_lora_counts() -> Outcome:
    side = int(text(PAPER, "1.2.1", "example: rows and columns of W").value)
    rank = int(text(PAPER, "1.2.1", "example: rank").value)
    return equals(text(PAPER, "1.2.1, eq. 1.2", "example: trainable parameters"), 2 * side * rank)


@check
def example_of_full_counts() -> Outcome:
    side = int(text(PAPER, "1.2.1", "example: rows and columns of W").value)
    return equals(text(PAPER, "1.2.1", "example: parameters of W"), side * side)


@check
def model_size_is_bytes_times_weights() -> Outcome:
    shape = architecture("llama-3.2-1b")
    n = shape.num_parameters
    half, four = sum(weight_bytes(shape)), sum(weight_bytes(shape, "nf4-double"))
    cases = {
        f"16 bits: {half / (2 * n):.2f} times the formula": abs(half / (2 * n) - 1) < 0.02,
        f"4 bits: {four / (n / 2):.2f} times": abs(four / (n / 2) - 1) < 0.02,
    }
    outcome = some_of(cases, "formats within 2 % of size = bytes x weights")
    return Outcome(outcome.verdict, outcome.found, "2 %")


@check
def seven_digits_are_float32() -> Outcome:
    digits = 24 * math.log10(2)
    return equals(text(PAPER, "1.2.1", "digits of Stata's output"), digits, unit=" digits")


@check
def forward_pass_of_lora() -> Outcome:
    import numpy as np

    draw = np.random.default_rng(0)
    w, a, b, x = (draw.normal(size=s) for s in ((8, 8), (8, 2), (2, 8), (8,)))
    gap = float(np.abs((w + a @ b) @ x - (w @ x + a @ (b @ x))).max())
    return holds_if(gap < 1e-12, f"(W + AB)x and Wx + A(Bx) differ by {gap:.0e}", "1e-12")


@check
def shapes_of_adapter_layers() -> Outcome:
    import numpy as np

    d, r = 8, 2
    down, x = np.zeros((d, r)), np.zeros(d)
    try:
        down @ x
    except ValueError:
        found = "W_down (d x r) times x (d) has no value; the two shapes must change places"
        return Outcome(CONTRADICTED, found)
    return Outcome(HOLDS, "the product exists")


@check
def feed_forward_network() -> Outcome:
    """With GELU outside, FFN(x) − b₂ never falls below GELU's minimum, −0.17."""
    low = min(x * 0.5 * math.erfc(-x / math.sqrt(2)) for x in (i / 1000 for i in range(-3000, 1)))
    found = (
        f"as printed the network cannot subtract more than {-low:.2f}; the outer GELU is no part"
    )
    return Outcome(NOT_REPRODUCED if low > -1 else HOLDS, found)


@check
def trainable_share_grows_with_rank() -> Outcome:
    shape = architecture("llama-3.2-1b")
    counts = [shape.lora_parameters(r) for r in (8, 16, 32)]
    shares = ", ".join(f"{c / shape.num_parameters:.2%}" for c in counts)
    return holds_if(counts == [counts[0], 2 * counts[0], 4 * counts[0]], f"r 8, 16, 32: {shares}")


@check
def merged_model_keeps_its_size() -> Outcome:
    count = architecture("llama-3.2-1b").num_parameters / 1e9
    return equals(text(PAPER, "2.2.3", "size after merging"), count, unit="B")


@check
def llama_size() -> Outcome:
    count = architecture("llama-3.2-1b").num_parameters / 1e9
    return equals(cell(PAPER, "table_01", "Base Llama 3.2 1B", "Model Size"), count, unit="B")


@check
def tinyllama_size() -> Outcome:
    count = architecture("tinyllama-1.1b").num_parameters / 1e9
    return equals(cell(PAPER, "table_01", "TinyLlama 1.1 1B", "Model Size"), count, unit="B")


@check
def both_fit_a_t4() -> Outcome:
    plans = {n: plan_memory(architecture(n), gpu="t4") for n in ("llama-3.2-1b", "tinyllama-1.1b")}
    cases = {f"{n} ({p.total_bytes / 2**30:.1f} GiB)": p.fits for n, p in plans.items()}
    outcome = all_of(cases, "models fit 15 GiB with QLoRA r 16, one row of 512 tokens")
    sizes = ", ".join(cases)
    return Outcome(outcome.verdict, f"{outcome.found}: {sizes}")


@check
def quantised_base_needs_less() -> Outcome:
    shape = architecture("llama-3.2-1b")
    half, four = sum(weight_bytes(shape)), sum(weight_bytes(shape, "nf4-double"))
    return holds_if(
        four < half, f"weights {half / 2**30:.2f} GiB in fp16, {four / 2**30:.2f} in NF4"
    )


# ------------------------------------------------------------------ the experiment's design


@check
def comparison_isolates_architecture() -> Outcome:
    rows = ("Fine-tuned Llama 3.2 1B", "TinyLlama 1.1 1B")
    sizes = [cell(PAPER, "table_01", row, "Training Size").value for row in rows]
    ratio = max(sizes) / min(sizes)
    verdict = HOLDS if ratio == 1 else OVERSTATED
    return Outcome(verdict, f"training rows differ {ratio:g}-fold, and no base TinyLlama is scored")


@check
def hardware_allows_2000_rows() -> Outcome:
    hours = text(PAPER, "table 1, note", "TinyLlama, time to tune").value
    most = text(PAPER, "2.3.1", "TinyLlama, samples").value
    few = text(PAPER, "table 1, note", "samples, limit").value
    need = 60 * hours * few / most
    found = (
        f"at the printed speed 2,000 rows take {need:.0f} minutes; 50,000 were run for the other"
    )
    return Outcome(OVERSTATED if need < 60 * hours else HOLDS, found)


@check
def twenty_five_times_less_data() -> Outcome:
    rows = ("TinyLlama 1.1 1B", "Fine-tuned Llama 3.2 1B")
    most, few = (cell(PAPER, "table_01", row, "Training Size").value for row in rows)
    return equals(text(PAPER, "3", "less data"), most / few, unit=" times")
