"""Which models `FastLM` takes, and how much it does at once on this machine."""

from __future__ import annotations

from dataclasses import dataclass

# Attention, positions and output layer are what `FastLM` takes them to be.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")


@dataclass(frozen=True)
class Sizes:
    """How much to do at once. Tokens; `logit_bytes` for one block of logits.

    row: packed items a row. batch: tokens a forward pass, padding included. run_cost: what a run
    must save to have a prefix of its own. answers: generated side by side at most, as far as
    `cache_bytes` for their keys and values reach.
    """

    row: int
    batch: int
    run_cost: int
    logit_bytes: int
    cache_bytes: int = 2**28
    answers: int = 32


def why_not_fast(model) -> str | None:
    """Why `FastLM` cannot take this model, in a few words; None where it can."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config
    if config.model_type not in FAMILIES:
        return f"its architecture is {config.model_type}"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"its attention ({config._attn_implementation}) takes no mask of ours"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "sliding_window", None) and getattr(
        config, "use_sliding_window", True
    )
    if windowed or kinds != {"full_attention"}:
        return "its attention has a sliding window"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") in ("dynamic", "longrope"):
        return "its positions depend on the longest row of a batch"
    peft = getattr(model, "peft_config", None)
    if isinstance(peft, dict) and any(
        getattr(c, "is_prompt_learning", False) for c in peft.values()
    ):
        return "its adapter adds tokens to the prompt"
    return None


def choose_sizes(model, budget: int | None = None) -> Sizes:
    """Sizes for this model on this machine.

    A forward token takes about (12·h + 4·f) values of activations (h hidden, f intermediate size)
    and its row of the attention mask; a quarter of the free memory is taken. On a CPU batches of
    more than a few hundred tokens are no faster, and fall out of its caches.

    Args:
        model: on the device it will run on.
        budget: bytes to use; by default a quarter of what `hardware.detect` finds free.
    """
    import torch

    from lora_kit.hardware import detect

    hardware, config = detect(), model.config
    cuda = model.device.type == "cuda"
    free = hardware.gpu_memory_free if cuda else hardware.memory_free
    budget = free // 4 if budget is None else budget
    width = torch.finfo(model.dtype).bits // 8
    row = 512 if cuda else 192
    a_token = width * (12 * config.hidden_size + 4 * config.intermediate_size + 4 * row)
    most = 131_072 if cuda else 512
    return Sizes(
        row=row,
        batch=max(row, min(most, budget // 2 // a_token)),
        run_cost=4_096 if cuda else 64,
        logit_bytes=max(2**24, min(2**30 if cuda else 2**26, budget // 4)),
        cache_bytes=budget,
        answers=2_048 if cuda else 64,
    )
