"""Asking a model for sums: batches as large as fit, and answers kept in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_kit import store
from lora_kit.arithmetic import find_form


def answer(model, tokenizer, rows: Sequence[Mapping], form: str, batch_size: int = 0) -> list[str]:
    """Greedy answers to rows of `in_form`, as they were written; batched, longest answers apart.

    Under fp16 or bf16 weights the adapter's fp32 products run in the weights' dtype (autocast).
    """
    import torch

    from lora_kit.generation import generate

    dtype = model.get_input_embeddings().weight.dtype
    found: list[str] = [""] * len(rows)
    room = find_form(form).tokens
    for k in sorted({row["digits"] for row in rows}):
        mine = [i for i, row in enumerate(rows) if row["digits"] == k]
        longest = max(len(rows[i]["prompt"]) for i in mine) + room(k) + 3
        at_once = batch_size or rows_at_once(model, longest)
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            said = generate(
                model, tokenizer, [rows[i]["prompt"] for i in mine], room(k) + 3, at_once
            )
        for i, text in zip(mine, said, strict=True):
            found[i] = text
    return found


def rows_at_once(model, tokens: int) -> int:
    """Rows whose keys and values fill 2 GiB, at most 1,000; 64 on a CPU. tokens: of one row, no
    more than its characters."""
    if model.device.type == "cpu":
        return 64
    c = model.config
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    row = 2 * c.num_hidden_layers * c.num_key_value_heads * width * 2 * tokens
    return max(1, min(1000, 2 * 2**30 // row))


def kept_answers(path: Path, ask, identity: Mapping[str, Any]) -> list[str]:
    """Answers from a file where they are there for the same question, else asked and written."""
    if path.exists():
        found = store.read_json(path)
        if found.get("of") == dict(identity):
            return found["answers"]
    said = ask()
    store.write_json(path, {"of": dict(identity), "answers": said})
    return said
