"""The loss on rows that training never saw."""

from __future__ import annotations

from collections.abc import Sequence

from lora_kit.errors import BadInputError
from lora_kit.prompts import IGNORE


def heldout_loss(model, tokenizer, encoded: Sequence[dict], batch_size: int = 16) -> float:
    """Mean cross-entropy over the trained tokens of encoded rows, in nats per token.

    L = −1/T · Σ log p(token | what stands before it), over the T labels that are not masked: every
    token counts once, however long its row is.

    Args:
        model: in eval mode.
        tokenizer: gives the padding token.
        encoded: rows as `prompts.encode` makes them.
        batch_size: rows at once; padding carries no label.

    Raises:
        BadInputError: no row has a label.
    """
    import torch

    total, tokens = 0.0, 0
    ordered = sorted(encoded, key=lambda e: len(e["input_ids"]))
    for start in range(0, len(ordered), batch_size):
        rows = ordered[start : start + batch_size]
        longest = max(len(r["input_ids"]) for r in rows)
        ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
        labels = torch.full((len(rows), longest), IGNORE)
        for i, row in enumerate(rows):
            ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
            labels[i, : len(row["labels"])] = torch.tensor(row["labels"])
        # Padding stands on the right, where a causal model's earlier tokens do not look.
        with torch.inference_mode():
            logits = model(input_ids=ids.to(model.device)).logits[:, :-1]
        wanted = labels[:, 1:].to(logits.device)
        total += torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]).float(),
            wanted.reshape(-1),
            ignore_index=IGNORE,
            reduction="sum",
        ).item()
        tokens += int((wanted != IGNORE).sum())
    if tokens == 0:
        raise BadInputError("No held-out row has a token to be scored.")
    return total / tokens
