"""Generation: answers to a list of prompts, in batches, cut where the model stops."""

from __future__ import annotations

from collections.abc import Sequence

from lora_kit.errors import BadInputError


def generate(
    model,
    tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int = 64,
    batch_size: int = 32,
    adapter_names: Sequence[str] | None = None,
) -> list[str]:
    """Greedy answers to `prompts`, in their order.

    Prompts are batched by length and padded on the left, where a decoder-only model reads nothing.

    Args:
        model: a transformers or peft model, in eval mode.
        tokenizer: its tokenizer; its padding side is left as it was.
        prompts: texts as the model should see them (chat templates applied already).
        max_new_tokens: at most this many tokens an answer.
        batch_size: rows at once.
        adapter_names: for a peft model, the adapter of each prompt ("__base__" for none).

    Raises:
        BadInputError: one text instead of a list, an empty prompt, max_new_tokens < 1, or names
            that do not match.
    """
    import torch

    from lora_kit.prompts import prompt_ids

    if max_new_tokens < 1 or batch_size < 1:
        raise BadInputError("max_new_tokens and batch_size must be at least 1.")
    if isinstance(prompts, str):
        raise BadInputError("prompts must be a list of texts; put a single one in brackets.")
    if any(not p for p in prompts):
        raise BadInputError(f"Prompt {[bool(p) for p in prompts].index(False)} is empty.")
    if adapter_names is not None and len(adapter_names) != len(prompts):
        raise BadInputError(f"{len(adapter_names)} adapter names for {len(prompts)} prompts.")
    answers: list[str] = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        inputs = tokenizer.pad(
            {"input_ids": [prompt_ids(tokenizer, prompts[i]) for i in rows]},
            return_tensors="pt",
            padding_side="left",
        ).to(model.device)
        options = (
            {} if adapter_names is None else {"adapter_names": [adapter_names[i] for i in rows]}
        )
        with torch.inference_mode():
            output = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                # A config's sampling values would only raise warnings beside do_sample=False.
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                **options,
            )
        new = output[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        for i, text in zip(rows, texts, strict=True):
            answers[i] = text
    return answers


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> list[bool]:
    """Whether each answer, stripped of surrounding white space, is the expected text."""
    return [a.strip() == e.strip() for a, e in zip(answers, expected, strict=True)]
