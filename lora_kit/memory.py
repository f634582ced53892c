"""The memory planner: where each GiB of a fine-tuning run goes, before anything is downloaded.

Pure arithmetic on an `Architecture` (no torch), for a step with batch B of S tokens (T = B·S), a
decoder of N linear weights and E other ones, and c bytes to a number of the compute dtype (4 for
float32, else 2):

    weights      N · bytes of the format + E · c          (embeddings and norms are not quantised)
    constants    one float32 absmax for 64 weights; with double quantisation one byte, and one
                 float32 for 256 of those; int8: one float32 for each row
    adapters     4 · P, with P = rank · Σ (in + out): kept in float32, else fp16 steps are lost
    gradients    4 · P                                     (of the adapters: nothing else has any)
    optimiser    8 · P for AdamW; 2 · P and two float32 for 256 with 8-bit states; 0 for SGD
    activations, logits
                 by engine: `engine_memory` has the formulas
    working      what the peak holds beyond that: the matrix library's workspace; the largest
                 weight dequantised, and with checkpointing one layer computed again, where these
                 exceed the logits; under Unsloth its buffer for such a weight and rotary tables
    CUDA context the driver's own, which torch's counters do not show

Full fine-tuning (rank 0) keeps every weight trainable: c bytes of weight, c of gradient, 4 of a
master copy where c is 2, and the optimiser's: 16 bytes a parameter with AdamW at either precision
(ZeRO, Rajbhandari et al. 2020, section 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_kit.architectures import (
    ARCHITECTURES,
    LINEAR,
    Architecture,
    architecture,
    check_targets,
)
from lora_kit.engine_memory import ENGINES, step_bytes, unsloth_tiles_from
from lora_kit.errors import BadInputError, unknown_name

__all__ = [
    "ARCHITECTURES",
    "GPUS",
    "LINEAR",
    "Architecture",
    "MemoryPlan",
    "architecture",
    "format_plan",
    "plan_memory",
    "weight_bytes",
]

GIB = 2**30
# GiB that a program finds, as the driver reports them. A T4's 16 GB leave 15 GiB.
GPUS = {
    "t4": 15.0,
    "v100-16gb": 15.8,
    "rtx3060-12gb": 11.8,
    "rtx3090-24gb": 23.6,
    "rtx4090-24gb": 23.6,
    "rtx5090-32gb": 31.4,
    "l4": 22.2,
    "a10g": 22.2,
    "a100-40gb": 39.4,
    "a100-80gb": 79.2,
    "h100": 79.2,
    "h200": 139.8,
}
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
QUANTIZATIONS = ("none", "nf4", "nf4-double", "int8")
OPTIMIZERS = ("adamw", "adamw-8bit", "sgd")
CUDA_CONTEXT = int(0.45 * GIB)
# What torch gives cuBLAS and cuBLASLt to work in: 32 MiB each on Hopper, about 8 MiB before.
WORKSPACE, WORKSPACE_HOPPER, HOPPER = 16 * 2**20, 64 * 2**20, ("h100", "h200")
NO_FLASH = ("t4", "v100-16gb")  # FlashAttention needs compute capability 8.0
BLOCK, ABSMAX_BLOCK, STATE_BLOCK = 64, 256, 256


@dataclass(frozen=True)
class MemoryPlan:
    """`rows`: (what, bytes) in the order of the module's text; they add up to `total_bytes`.

    gpu_bytes: what the card has. largest_batch: the most sequences of this length that fit, 0 if
    not even one does.
    """

    architecture: Architecture
    settings: dict[str, object]
    rows: tuple[tuple[str, int], ...]
    gpu: str
    gpu_bytes: int
    largest_batch: int

    @property
    def total_bytes(self) -> int:
        return sum(size for _, size in self.rows)

    @property
    def torch_bytes(self) -> int:
        """What torch.cuda.max_memory_allocated should show: everything but the CUDA context."""
        return sum(size for name, size in self.rows if name != "CUDA context")

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.gpu_bytes

    def row(self, name: str) -> int:
        """The bytes of one row."""
        rows = dict(self.rows)
        if name not in rows:
            raise unknown_name("row", name, rows)
        return rows[name]


def weight_bytes(shape: Architecture, quantization: str = "none", dtype: str = "float16"):
    """(bytes of weights, bytes of quantisation constants) of a loaded model.

    Raises:
        UnknownNameError: no such quantisation or dtype.
    """
    kind, c = _choose("quantisation", quantization, QUANTIZATIONS), _bytes_of(dtype)
    n = shape.linear_parameters
    rest = (shape.num_parameters - n) * c
    if kind == "none":
        return n * c + rest, 0
    if kind == "int8":
        rows = shape.num_layers * sum(out for out, _ in shape.linear_shapes().values())
        return n + rest, 4 * rows
    modules = [o * i for o, i in shape.linear_shapes().values()]
    blocks = [-(-size // BLOCK) for size in modules]
    if kind == "nf4":
        constants = sum(4 * b for b in blocks)
    else:
        # One byte a block, one float32 for each 256 of them, and the mean that was taken off.
        constants = sum(b + 4 * -(-b // ABSMAX_BLOCK) + 4 for b in blocks)
    return sum(-(-size // 2) for size in modules) * shape.num_layers + rest, (
        constants * shape.num_layers
    )


def plan_memory(
    architecture: Architecture,
    rank: int = 16,
    targets="all-linear",
    batch: int = 1,
    seq: int = 512,
    dtype: str = "float16",
    quantization: str | None = "nf4-double",
    optimizer: str = "adamw",
    checkpointing: bool = True,
    gpu: str = "t4",
    engine: str = "plain",
    flash: bool | None = None,
) -> MemoryPlan:
    """Predict the peak memory of one training step; the module's text has the formulas.

    Args:
        rank: of the adapters; 0 means full fine-tuning (then `quantization` must be None).
        targets: "all-linear", "attention", "mlp", or names of modules.
        batch, seq: sequences of a step and tokens to each, padding counted.
        dtype: of weights that are not quantised, and of the arithmetic.
        quantization: None or "none", "nf4", "nf4-double" or "int8", for the linear modules.
        optimizer: "adamw", "adamw-8bit" or "sgd" (without momentum).
        checkpointing: keep one input for each layer and compute the rest again.
        gpu: one of `GPUS`.
        engine: one of `engine_memory.ENGINES`; what a step keeps differs with who runs it.
        flash: whether FlashAttention is to be had; None: as the card has it.

    Raises:
        UnknownNameError: a target, dtype, quantisation, optimiser, engine or GPU that is not known.
        BadInputError: rank < 0, batch or seq < 1, seq beyond the model's context, or full
            fine-tuning of quantised weights.
    """
    kind = _choose("quantisation", quantization or "none", QUANTIZATIONS)
    _choose("optimiser", optimizer, OPTIMIZERS)
    card = _choose("GPU", gpu, GPUS)
    _choose("engine", engine, ENGINES)
    _bytes_of(dtype)
    names = check_targets(targets)
    for what, value, least in (("rank", rank, 0), ("batch", batch, 1), ("seq", seq, 1)):
        if not isinstance(value, int) or value < least:
            raise BadInputError(
                f"{what} must be a whole number of at least {least}, not {value!r}."
            )
    if seq > architecture.max_position:
        raise BadInputError(
            f"{architecture.name} takes at most {architecture.max_position} tokens, not {seq}."
        )
    if rank == 0 and kind != "none":
        raise BadInputError(
            "Full fine-tuning (rank 0) cannot train quantised weights: take quantization none, "
            "or a rank of 1 or more for adapters beside them."
        )
    gpu_bytes = int(GPUS[card] * GIB)
    flash = card not in NO_FLASH if flash is None else flash
    how = (engine, flash)
    chosen = (
        architecture,
        rank,
        names,
        seq,
        dtype,
        kind,
        optimizer,
        bool(checkpointing),
        card,
        how,
    )
    most = _largest_batch(chosen, gpu_bytes)
    settings = {
        "rank": rank,
        "targets": names,
        "batch": batch,
        "seq": seq,
        "dtype": dtype,
        "quantization": kind,
        "optimizer": optimizer,
        "checkpointing": bool(checkpointing),
        "engine": engine,
    }
    rows = tuple(_rows(*chosen, batch).items())
    return MemoryPlan(architecture, settings, rows, card, gpu_bytes, most)


def format_plan(plan: MemoryPlan) -> str:
    """The plan as a table of text: a row for each part, the total, whether it fits."""
    s = plan.settings
    how = f"LoRA rank {s['rank']} on {_targets_text(s['targets'])}" if s["rank"] else "all weights"
    base = {"none": s["dtype"], "int8": "int8"}.get(s["quantization"], "NF4")
    base += ", double quantisation" if s["quantization"] == "nf4-double" else ""
    lines = [
        f"{plan.architecture.name}: {plan.architecture.num_parameters:,} parameters",
        f"trains {how}; base in {base}; batch {s['batch']} x {s['seq']} tokens; "
        f"{s['dtype']}; {s['optimizer']}; checkpointing {'on' if s['checkpointing'] else 'off'}",
        "",
    ]
    total = plan.total_bytes
    for name, size in (*plan.rows, ("total", total)):
        if name == "total":
            lines.append("-" * 46)
        lines.append(f"{name:<24}{size / GIB:>10.3f} GiB{100 * size / total:>6.1f} %")
    lines.append(f"{'on ' + plan.gpu:<24}{plan.gpu_bytes / GIB:>10.3f} GiB")
    lines.append("")
    if plan.fits:
        spare = (plan.gpu_bytes - total) / GIB
        lines.append(f"Fits, {spare:.2f} GiB to spare.")
    else:
        lines.append(f"Does not fit: {(total - plan.gpu_bytes) / GIB:.2f} GiB too much.")
    if plan.largest_batch:
        lines.append(f"Largest batch of {s['seq']} tokens that fits: {plan.largest_batch}.")
    else:
        lines.append(f"Not even one sequence of {s['seq']} tokens fits.")
    return "\n".join(lines)


# --- how it is done ---------------------------------------------------------------------------


def _choose(kind: str, name, known) -> str:
    key = str(name).lower()
    if key not in known:
        raise unknown_name(kind, str(name), known)
    return key


def _bytes_of(dtype) -> int:
    return DTYPES[_choose("dtype", str(dtype).replace("torch.", ""), DTYPES)]


def _targets_text(names) -> str:
    return "all linear modules" if set(names) == set(LINEAR) else ", ".join(names)


def _optimizer_bytes(optimizer: str, parameters: int) -> int:
    if optimizer == "adamw":
        return 8 * parameters
    if optimizer == "adamw-8bit":
        return 2 * (parameters + 4 * -(-parameters // STATE_BLOCK))
    return 0


def _rows(shape, rank, targets, seq, dtype, kind, optimizer, checkpointing, card, how, batch):
    c = _bytes_of(dtype)
    weights, constants = weight_bytes(shape, kind, dtype)
    full = rank == 0
    trained = shape.num_parameters if full else shape.lora_parameters(rank, targets)
    engine, flash = how
    # By the card, not by `flash`: a newer card held to T4 rules is still what Unsloth looks at.
    tiles_from = unsloth_tiles_from(GPUS[card], card not in NO_FLASH)
    step = step_bytes(engine, shape, rank, batch, seq, c, checkpointing, flash, tiles_from)
    largest = max(o * i for o, i in shape.linear_shapes().values()) * c if kind != "none" else 0
    scratch = step.again + largest
    standing = step.tables + (largest if engine == "unsloth" else 0)
    standing += WORKSPACE_HOPPER if card in HOPPER else WORKSPACE
    rows = {"weights": weights, "quantisation constants": constants}
    if full:
        rows["master weights"] = 4 * trained if c == 2 else 0
    else:
        rows["adapters"] = 4 * trained
    rows |= {
        "gradients": (c if full else 4) * trained,
        "optimiser states": _optimizer_bytes(optimizer, trained),
        "activations": step.kept,
        "logits and loss": step.loss,
        "working": standing + max(0, scratch - step.loss),
        "CUDA context": CUDA_CONTEXT,
    }
    return rows


def _largest_batch(chosen, gpu_bytes: int) -> int:
    def fits(batch: int) -> bool:
        return sum(_rows(*chosen, batch).values()) <= gpu_bytes

    if not fits(1):
        return 0
    high = 2
    while fits(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
