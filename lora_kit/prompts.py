"""Prompts: how a row of data becomes the text a model sees, and which of its tokens are learnt.

Every row becomes one `Example(prompt, completion)`; formatting happens here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lora_kit.errors import BadInputError

IGNORE = -100  # torch's cross-entropy leaves these positions out of the loss
FORMATS = ("bare", "alpaca", "chat")

# Stanford Alpaca's two templates (Taori et al. 2023, README).
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Example:
    """What the model is given, and what it should answer. The end-of-sequence token is added when
    the completion is tokenised, so that a tuned model learns to stop."""

    prompt: str
    completion: str


def to_example(row: Mapping, style: str = "bare", tokenizer=None) -> Example:
    """Format one row.

    Args:
        row: {prompt, completion}, {instruction, input, output} or {messages: [...]}, whose last
            turn is the assistant's.
        style: "bare" leaves a prompt as it is; "alpaca" wraps it in Alpaca's template; "chat" in
            the tokenizer's chat template.
        tokenizer: needed for "chat".

    Raises:
        BadInputError: fields that are none of the three shapes, a field that is no text, or an
            unknown style.
    """
    example = _to_example(row, style, tokenizer)
    for part in (example.prompt, example.completion):
        if not isinstance(part, str):
            raise BadInputError(f"A row's prompt and answer must be texts, not {part!r}.")
    return example


def _to_example(row: Mapping, style: str, tokenizer) -> Example:
    if style not in FORMATS:
        raise BadInputError(f"style must be one of {', '.join(FORMATS)}, not {style!r}.")
    if "messages" in row:
        *turns, last = row["messages"] or [{}]
        if not turns or last.get("role") != "assistant":
            raise BadInputError("A messages row needs turns that end with the assistant's.")
        return Example(chat_prompt(tokenizer, turns), last["content"])
    if "instruction" in row and "output" in row:
        instruction, given, answer = row["instruction"], row.get("input") or "", row["output"]
    elif "prompt" in row and "completion" in row:
        instruction, given, answer = row["prompt"], "", row["completion"]
    else:
        raise BadInputError(
            f"A row with the fields {sorted(row)} is neither prompt/completion, "
            "instruction/input/output nor messages."
        )
    if style == "alpaca":
        return Example(alpaca_prompt(instruction, given), answer)
    text = f"{instruction}\n\n{given}" if given else instruction
    if style == "chat":
        return Example(chat_prompt(tokenizer, [{"role": "user", "content": text}]), answer)
    return Example(text, answer)


def alpaca_prompt(instruction: str, given: str = "") -> str:
    """Alpaca's template, with or without the input block."""
    template = ALPACA_WITH_INPUT if given else ALPACA
    return template.format(instruction=instruction, input=given)


def chat_prompt(tokenizer, messages: list[dict]) -> str:
    """The tokenizer's chat template over `messages`, ending where the assistant starts to write.

    Raises:
        BadInputError: the tokenizer has no chat template.
    """
    if tokenizer is None or not tokenizer.chat_template:
        raise BadInputError(
            "This model has no chat template; use style='alpaca' or style='bare' with it."
        )
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def encode(tokenizer, example: Example, max_length: int = 1024) -> dict[str, list[int]]:
    """Tokenise an example for completion-only training.

    Prompt and completion are tokenised apart and joined, so that the mask's edge is exact; labels
    are IGNORE over the prompt and the ids themselves over the completion and the closing EOS.
    A row longer than `max_length` keeps its first `max_length` tokens.

    Returns:
        {"input_ids": [...], "labels": [...]}, of equal length.
    """
    prompt = prompt_ids(tokenizer, example.prompt)
    answer = tokenizer(example.completion, add_special_tokens=False)["input_ids"]
    answer = [*answer, tokenizer.eos_token_id]
    return {
        "input_ids": (prompt + answer)[:max_length],
        "labels": ([IGNORE] * len(prompt) + answer)[:max_length],
    }


def show_mask(tokenizer, encoded: dict[str, list[int]]) -> str:
    """The text of an encoded example with its trained tokens in ⟦brackets⟧."""
    pieces = []
    for token, label in zip(encoded["input_ids"], encoded["labels"], strict=True):
        text = tokenizer.decode([token])
        pieces.append(text if label == IGNORE else f"⟦{text}⟧")
    return "".join(pieces)


def prompt_ids(tokenizer, prompt: str) -> list[int]:
    """The token ids of a prompt as the tokenizer opens a text, with one BOS token at most.

    A Llama tokenizer writes BOS before any text, and so does its chat template: tokenising a
    templated prompt the ordinary way would put two there.
    """
    opened_by_template = tokenizer.bos_token and prompt.startswith(tokenizer.bos_token)
    return tokenizer(prompt, add_special_tokens=not opened_by_template)["input_ids"]
