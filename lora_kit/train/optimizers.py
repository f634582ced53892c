"""The optimiser of the native engine."""

from __future__ import annotations

import torch

from lora_kit.train.spec import TrainSpec


def make_optimizer(parameters, spec: TrainSpec, device: torch.device):
    """AdamW: torch's fused one, or bitsandbytes' with 8-bit states (also paged), for a GPU."""
    options = {"lr": spec.learning_rate, "weight_decay": spec.weight_decay}
    if spec.optimizer in ("auto", "adamw") or device.type == "cpu":
        return torch.optim.AdamW(parameters, fused=True, **options)
    from bitsandbytes.optim import AdamW8bit, PagedAdamW, PagedAdamW8bit

    made = {"adamw-8bit": AdamW8bit, "paged-adamw-8bit": PagedAdamW8bit, "paged-adamw": PagedAdamW}
    return made[spec.optimizer](parameters, **options)
