"""What to train: the hyperparameters of a run, checked before anything is loaded."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import asdict, dataclass

from lora_kit.architectures import HEAD, check_targets
from lora_kit.errors import BadInputError, unknown_name

ENGINES = ("auto", "native", "trl", "unsloth")
SCHEDULES = ("cosine", "linear", "constant")
OPTIMIZERS = ("auto", "adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit")


@dataclass(frozen=True)
class TrainSpec:
    """Hyperparameters of one fine-tuning run, in the field's own names.

    rank, alpha, dropout: LoRA's; ΔW = (alpha/rank)·B·A. targets: "attention", "mlp", "all", or
    names joined by commas; "all,lm_head" adds the output head, which the native engine alone
    trains.
    learning_rate: the peak, reached after `warmup` (a fraction of the steps), then a cosine to 0
    (or `schedule`: "linear" to 0, "constant"). optimizer: "adamw", "adamw-8bit", either "paged-";
    "auto" is the engine's own choice; a CPU knows plain AdamW only.
    steps: optimiser steps; 0 means `epochs` passes over the rows. batch_size × accumulation rows a
    step.
    checkpointing: True, False, or "auto": what the memory planner finds needed (`train.settings`,
    which also says how many rows go at once).
    max_length: tokens; longer rows are cut. style: how rows become prompts (`prompts.FORMATS`).
    quantization: "none", or "nf4" for QLoRA. dtype: see `models.load_model`.
    The native engine alone: packing puts several rows into a sequence; compile is "graph" (steps as
    CUDA graphs, `train.graphs`), True (torch.compile, `train.compiling`), False, or "auto": graphs
    on a GPU.

    Raises:
        BadInputError: a value out of range, named.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str = "all"
    learning_rate: float = 1e-3
    steps: int = 80
    batch_size: int = 32
    accumulation: int = 1
    warmup: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int = 256
    style: str = "bare"
    quantization: str = "none"
    dtype: str = "auto"
    checkpointing: bool | str = "auto"
    seed: int = 0
    epochs: float = 1.0
    schedule: str = "cosine"
    optimizer: str = "auto"
    packing: bool = True
    compile: bool | str = "auto"

    def __post_init__(self) -> None:
        from lora_kit.models import DTYPES, QUANTIZATIONS
        from lora_kit.prompts import FORMATS

        check_targets(self.targets)
        for name in ("rank", "batch_size", "accumulation", "max_length"):
            if getattr(self, name) < 1:
                raise BadInputError(f"{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("alpha", "learning_rate", "max_grad_norm", "epochs"):
            if not 0 < getattr(self, name) < math.inf:
                raise BadInputError(f"{name} must be above 0, not {getattr(self, name)}.")
        for name in ("dropout", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise BadInputError(f"{name} must be in [0, 1), not {getattr(self, name)}.")
        if self.steps < 0:
            raise BadInputError(f"steps must be 0 (one epoch) or more, not {self.steps}.")
        if not 0 <= self.weight_decay < math.inf:
            raise BadInputError(f"weight_decay must be 0 or more, not {self.weight_decay}.")
        for name, known in (
            ("style", FORMATS),
            ("quantization", QUANTIZATIONS),
            ("dtype", DTYPES),
            ("schedule", SCHEDULES),
            ("optimizer", OPTIMIZERS),
            ("checkpointing", (True, False, "auto")),
            ("compile", (True, False, "auto", "graph")),
        ):
            if getattr(self, name) not in known:
                names = ", ".join(map(str, known))
                raise BadInputError(f"{name} must be one of {names}, not {getattr(self, name)!r}.")

    def to_dict(self) -> dict:
        return asdict(self)


def check_engine(engine: str, spec: TrainSpec) -> None:
    """Hold an engine to what it can train.

    Raises:
        BadInputError: an adapter on the output head under another engine than native (trl 1.15
            refuses one).
    """
    if engine != "native" and HEAD in check_targets(spec.targets):
        raise BadInputError(
            f"The engine {engine} trains no adapter on {HEAD}: take engine='native', or leave "
            f"{HEAD} out of targets={spec.targets!r}."
        )


def choose_engine(engine: str = "auto", config: dict | None = None) -> tuple[str, str]:
    """The engine that will run here, and why. Call it before anything imports transformers:
    Unsloth patches the libraries when it is imported, so it must come first.

    Args:
        engine: "auto", or the one wanted; Unsloth falls back to trl where it cannot run. "auto" is
            native, the fastest of the three at the same held-out loss (benchmarks/training.py),
            for models whose loss it can compute.
        config: the model's config.json, where it is known already.

    Raises:
        UnknownNameError: no such engine.
    """
    if engine not in ENGINES:
        raise unknown_name("engine", engine, ENGINES)
    if engine in ("trl", "native"):
        return engine, f"{engine} was asked for."
    if engine == "auto":
        if config and config.get("final_logit_softcapping"):
            return "trl", "this model caps its logits, which the native engine does not: trl it is."
        return "native", "the fastest of the three at the same loss (benchmarks/training.py)."
    import torch

    if not torch.cuda.is_available():
        return "trl", (
            "Unsloth was asked for, but this machine has no GPU, which Unsloth needs: trl it is."
        )
    if importlib.util.find_spec("unsloth") is None:
        return "trl", (
            "Unsloth was asked for, but Unsloth is not installed (requirements-gpu.txt): trl it is."
        )
    import unsloth  # noqa: F401

    return "unsloth", "unsloth was asked for."
