"""How a step is run on this machine: rows at once, accumulation, checkpointing. The memory planner
decides, so that a run starts with what fits instead of finding out.
"""

from __future__ import annotations

from dataclasses import replace

from lora_kit.architectures import Architecture
from lora_kit.hardware import GIB, Hardware
from lora_kit.memory import plan_memory
from lora_kit.train.spec import TrainSpec

USABLE = 0.9  # of what is free: the planner's error and the allocator's gaps stay below the rest
FEW = 4  # checkpointing is needed where not even this part of a step's rows fits without it


def settle(
    spec: TrainSpec, shape: Architecture, hardware: Hardware, engine: str, longest: int
) -> tuple[TrainSpec, str]:
    """The spec with `checkpointing` decided and batch_size and accumulation as they fit; and why.

    Rows a step (batch_size × accumulation) stay what they were, so the updates do too. Without
    checkpointing where at least a quarter of them fits at once, else with it; then the largest
    batch that fits and divides the step. A setting that was given (True or False) is kept.

    Args:
        longest: tokens of the longest row; all are planned as if they had so many.
    """
    per_step = spec.batch_size * spec.accumulation
    if hardware.device == "cpu":
        return replace(spec, checkpointing=spec.checkpointing is True), "a CPU: as given"
    free = int(hardware.gpu_memory_free * USABLE)

    def most(checkpointing: bool) -> int:
        fitting = [
            rows
            for rows in range(1, per_step + 1)
            if per_step % rows == 0
            and planned_bytes(spec, shape, hardware, engine, rows, longest, checkpointing) <= free
        ]
        return max(fitting, default=0)

    if spec.checkpointing == "auto":
        plain = most(False)
        on = plain * FEW < per_step and most(True) > plain
    else:
        on = spec.checkpointing
    rows = most(on) or 1
    needed = planned_bytes(spec, shape, hardware, engine, rows, longest, on) / GIB
    why = (
        f"{rows} rows of {longest} tokens at once, checkpointing {'on' if on else 'off'}: "
        f"{needed:.1f} of {free / GIB:.1f} GiB planned"
    )
    # A batch that was given smaller is left: the planner's is an upper bound, not a wish.
    if spec.checkpointing != "auto":
        rows = min(rows, spec.batch_size)
    return replace(spec, batch_size=rows, accumulation=per_step // rows, checkpointing=on), why


def planned_bytes(spec, shape, hardware, engine, rows, longest, checkpointing) -> int:
    """What the planner expects torch to hold at most in such a step."""
    optimizer = "adamw" if spec.optimizer in ("adamw", "paged-adamw") else "adamw-8bit"
    if engine == "native" and spec.optimizer == "auto":
        optimizer = "adamw"
    return plan_memory(
        shape,
        rank=spec.rank,
        targets=spec.targets.split(",") if "," in spec.targets else spec.targets,
        batch=rows,
        seq=min(longest, shape.max_position),
        dtype=hardware.dtype if spec.dtype == "auto" else spec.dtype,
        quantization="nf4-double" if spec.quantization == "nf4" else None,
        optimizer=optimizer,
        checkpointing=checkpointing,
        gpu="h200" if (hardware.capability or (0, 0)) >= (9, 0) else "t4",
        engine=engine,
        flash=(hardware.capability or (0, 0)) >= (8, 0) and hardware.kind == "gpu",
    ).torch_bytes
