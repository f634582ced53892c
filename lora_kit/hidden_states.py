"""Hidden states of a base model, pooled over a prompt, from no more layers than are needed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch

from lora_kit.errors import BadInputError
from lora_kit.prompts import prompt_ids

POOLINGS = ("mean", "last")


class _Reached(Exception):
    """Raised inside the forward pass once the last wanted layer is done: no more is needed."""


@torch.inference_mode()
def hidden_states(
    model, tokenizer, prompts: Sequence[str], layers: Sequence[int], batch_size: int = 32
) -> dict[tuple[int, str], torch.Tensor]:
    """The base's pooled states: {(layer, pooling): (prompts, d) float32 on the CPU}.

    "last" is the state of the last token, "mean" the mean over all tokens but the first, whose
    state is far longer than the others' whatever the text says (Sun et al. 2024, "Massive
    Activations in Large Language Models"). The pass ends at the last layer asked for. Prompts are
    batched by length and padded on the right, where a causal model's earlier tokens do not look.

    Raises:
        BadInputError: a single text instead of a list, or an empty prompt.
    """
    if isinstance(prompts, str):
        raise BadInputError("prompts must be a list of texts; put a single one in brackets.")
    ids = [prompt_ids(tokenizer, p) for p in prompts]
    if not ids or any(not row for row in ids):
        raise BadInputError("There is no prompt, or an empty one.")
    modules = decoder_layers(model)
    found: dict[tuple[int, str], list] = {
        (n, p): [None] * len(ids) for n in layers for p in POOLINGS
    }
    seen: dict[int, torch.Tensor] = {}

    def catch(number: int):
        def hook(_module, _inputs, output):
            seen[number] = output[0] if isinstance(output, tuple) else output
            if number == max(layers):
                raise _Reached

        return hook

    handles = [modules[n - 1].register_forward_hook(catch(n)) for n in set(layers)]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    try:
        with _base_alone(model):
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                lengths = torch.tensor([len(ids[i]) for i in rows])
                padded = torch.full((len(rows), int(lengths.max())), tokenizer.pad_token_id or 0)
                for place, i in enumerate(rows):
                    padded[place, : len(ids[i])] = torch.tensor(ids[i])
                mask = torch.arange(padded.shape[1]) < lengths[:, None]
                try:
                    model.get_decoder()(
                        input_ids=padded.to(model.device),
                        attention_mask=mask.long().to(model.device),
                        use_cache=False,
                    )
                except _Reached:
                    pass
                for number in layers:
                    pooled = _pool(seen[number].float(), mask.to(seen[number].device))
                    for pooling, vectors in pooled.items():
                        for place, i in enumerate(rows):
                            found[number, pooling][i] = vectors[place].cpu()
    finally:
        for handle in handles:
            handle.remove()
    return {key: torch.stack(rows) for key, rows in found.items()}


def _pool(states: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """states (rows, tokens, d), mask (rows, tokens) of real tokens."""
    lengths = mask.sum(1)
    last = states[torch.arange(len(states)), lengths - 1]
    inner = mask.clone()
    inner[:, 0] = lengths == 1  # a prompt of one token has nothing else to offer
    weights = inner.to(states.dtype)[:, :, None]
    return {"last": last, "mean": (states * weights).sum(1) / weights.sum(1)}


def decoder_layers(model):
    """The decoder layers of a transformers causal language model, in order."""
    return model.get_decoder().layers


def _base_alone(model):
    from lora_kit.lora import disable_lora, lora_layers

    if hasattr(model, "peft_config"):
        return model.disable_adapter()
    return disable_lora(model) if lora_layers(model) else nullcontext()
