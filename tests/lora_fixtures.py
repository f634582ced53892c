"""Tiny models and comparisons that the LoRA tests share."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

PLACEMENTS = {
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
    "q_proj": ["q_proj"],
    "lm_head": ["lm_head"],
}


def tiny_llama(seed=0, bias=False, **options) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=64)
    settings |= dict(num_attention_heads=4, num_key_value_heads=2, attention_bias=bias)
    return LlamaForCausalLM(LlamaConfig(**settings | options)).eval()


def ids(rows=3, columns=11, seed=1) -> torch.Tensor:
    return torch.randint(64, (rows, columns), generator=torch.Generator().manual_seed(seed))


def peft_layers(model):
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    }


def close(a, b, tolerance=1e-6):
    """Relative to the size of what is compared, as fp32 rounding is."""
    assert a.shape == b.shape
    scale = max(1.0, float(b.detach().abs().max()))
    worst = float((a - b).detach().abs().max())
    assert worst <= tolerance * scale
