"""A causal language model asked the shop's questions: one forward pass for a choice, a short answer
for an extraction; and tuned on them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import numpy as np

from lora_kit.data import Dataset
from lora_kit.train.spec import TrainSpec

ANSWER_TOKENS = 40


def word_scores(model, tokenizer, prompts: Sequence[str], choices: Sequence[str], batch_size=16):
    """(prompts, choices): the log-probability of the first token in which the choices differ,
    behind the prompt and the tokens that all choices begin with.

    Prompts are batched by length and padded on the right, where a causal model does not look; the
    vocabulary-wide logits are made for their last tokens only.

    Raises:
        BadInputError: a choice that another one begins with.
    """
    import torch

    from lora_kit.errors import BadInputError
    from lora_kit.prompts import prompt_ids

    spelt = [tokenizer(c, add_special_tokens=False)["input_ids"] for c in choices]
    same = 0
    while all(len(ids) > same for ids in spelt) and len({ids[same] for ids in spelt}) == 1:
        same += 1
    firsts = [ids[same] if len(ids) > same else None for ids in spelt]
    if None in firsts or len(set(firsts)) < len(firsts):
        raise BadInputError(f"The choices {', '.join(choices)} cannot be told by one token.")
    encoded = [prompt_ids(tokenizer, prompt) + spelt[0][:same] for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    found = np.zeros((len(prompts), len(choices)))
    dtype = model.get_input_embeddings().weight.dtype
    device = model.get_input_embeddings().weight.device
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        longest = max(len(encoded[i]) for i in rows)
        ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for k, i in enumerate(rows):
            ids[k, : len(encoded[i])] = torch.tensor(encoded[i])
            mask[k, : len(encoded[i])] = 1
        last = mask.sum(1) - 1
        with (
            torch.inference_mode(),
            torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
        ):
            states = model.get_decoder()(
                input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
            ).last_hidden_state
            logits = model.get_output_embeddings()(states[torch.arange(len(rows)), last])
        found[rows] = torch.log_softmax(logits.float(), -1)[:, firsts].cpu().numpy()
    return found


def answer_texts(model, tokenizer, prompts: Sequence[str], batch_size=16) -> list[str]:
    """Greedy answers of at most ANSWER_TOKENS tokens, cut at the first line's end."""
    import torch

    from lora_kit.generation import generate

    dtype = model.get_input_embeddings().weight.dtype
    with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        answers = generate(model, tokenizer, prompts, ANSWER_TOKENS, batch_size)
    return [answer.strip().split("\n", 1)[0] for answer in answers]


def with_example(question: dict, example: dict) -> str:
    """A one-shot prompt: an answered question of the training part, then the question."""
    return f"{example['prompt']}{example['completion']}\n\n{question['prompt']}"


def training_rows(questions: Sequence[dict], seed: int) -> list[dict]:
    """Prompt and completion of questions; where few are answered yes, these are repeated until they
    are as many as the others: a tenth of matches would teach to say no."""
    rows = [{"prompt": q["prompt"], "completion": q["completion"]} for q in questions]
    yes = [r for r in rows if r["completion"] == " yes"]
    no = [r for r in rows if r["completion"] == " no"]
    if yes and len(yes) < len(no):
        extra = len(no) - len(yes)
        rows += (yes * (extra // len(yes) + 1))[:extra]
    random.Random(f"order/{seed}").shuffle(rows)
    return rows


def tune(model_name: str, rows: Sequence[dict], spec: TrainSpec, say=print):
    """Train an adapter on rows with the native engine, without merging; (model, tokenizer, facts).

    facts: seconds, tokens, steps, first and last loss, peak memory in bytes, trainable parameters.
    """
    import math

    from lora_kit.models import fetch_model
    from lora_kit.train import engines
    from lora_kit.train.finetune import encode_rows

    data = Dataset("shop", "train", tuple(rows), "generated", "questions")
    model, tokenizer = engines.load_for_training(fetch_model(model_name), spec, "native")
    encoded = encode_rows(data, tokenizer, spec)
    per_step = spec.batch_size * spec.accumulation
    steps = spec.steps or math.ceil(math.ceil(len(encoded) / per_step) * spec.epochs)
    worked = time.process_time()
    done = engines.train_native(model, tokenizer, encoded, spec, steps)
    worked = time.process_time() - worked
    losses = [loss for _, loss in done.losses]
    say(f"{steps} steps in {done.seconds:.0f} s, loss {losses[0]:.2f} to {losses[-1]:.2f}")
    model.eval()
    facts = {
        "training_seconds": done.seconds,
        "training_cpu_seconds": worked,
        "training_tokens": float(done.tokens or 0),
        "training_steps": float(steps),
        "loss_first": losses[0],
        "loss_last": sum(losses[-10:]) / len(losses[-10:]),
        "trainable": float(sum(p.numel() for p in model.parameters() if p.requires_grad)),
    }
    return model, tokenizer, facts, done.peak_memory
