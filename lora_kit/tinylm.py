"""A language model small enough to ship: addition, in full precision, trained from scratch.

The default model's linear weights are already 4-bit, so what a 4-bit format does to a *language
model's answers* cannot be seen on it. This one has real float32 weights: a Llama of four layers and
0.44 million parameters that reads `12+34=` and writes the sum, units first (`64` for 46, so that a
digit needs only what was read before), then a full stop.

It lies in `data/models/addition-tiny/`; `python -m lora_kit.tinylm FOLDER` trains it again.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
from torch.nn import functional

from lora_kit.errors import BadInputError, NotAvailableError
from lora_kit.skills import draw_skill
from lora_kit.store import repository

ALPHABET = "0123456789+=."
LENGTHS = (1, 2, 3, 4)
TEST_SEED, TEST_ROWS = 20260, 50  # the rows that training never sees
SIZES = {
    "vocab_size": len(ALPHABET),
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": ALPHABET.index("."),
    "pad_token_id": ALPHABET.index("."),
}


def encode_text(text: str) -> list[int]:
    """One token for each character of `ALPHABET`.

    Raises:
        BadInputError: another character.
    """
    unknown = set(text) - set(ALPHABET)
    if unknown:
        raise BadInputError(f"The addition model reads {ALPHABET!r} only, not {sorted(unknown)}.")
    return [ALPHABET.index(c) for c in text]


def load_addition_model(folder: Path | None = None):
    """The shipped model, in eval mode, float32.

    Raises:
        NotAvailableError: no such folder (the kit was installed without its data).
    """
    from transformers import LlamaForCausalLM

    from lora_kit.models import quiet_libraries

    folder = folder or repository() / "data" / "models" / "addition-tiny"
    if not (folder / "model.safetensors").exists():
        raise NotAvailableError(
            f"No addition model in {folder}: run from a clone, or train it with "
            f"'python -m lora_kit.tinylm {folder}'."
        )
    with quiet_libraries():
        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def held_out_rows(per_length: int = TEST_ROWS) -> list[dict]:
    """Rows of 2 to 4 digits that the shipped model was not trained on, `per_length` (<= 50) each.

    One-digit sums are too few to hold any out.
    """
    if not 1 <= per_length <= TEST_ROWS:
        raise BadInputError(f"Between 1 and {TEST_ROWS} rows a length are held out.")
    rows = draw_skill("addition", LENGTHS[1:], TEST_ROWS, TEST_SEED).rows
    return [r for k in LENGTHS[1:] for r in [x for x in rows if x["digits"] == k][:per_length]]


@torch.no_grad()
def addition_accuracy(model, rows) -> dict[str, float | int]:
    """Greedy answers to each row: {"value", "stderr", "n"}; right means every digit and the stop."""
    right = 0
    for digits in sorted({row["digits"] for row in rows}):
        batch = [row for row in rows if row["digits"] == digits]
        ids = torch.tensor([encode_text(row["prompt"]) for row in batch])
        start = ids.shape[1]
        for _ in range(digits + 2):
            following = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1)
            ids = torch.cat([ids, following[:, None]], dim=1)
        for row, answer in zip(batch, ids[:, start:].tolist(), strict=True):
            text = "".join(ALPHABET[i] for i in answer)
            right += text.startswith(row["completion"][::-1] + ".")
    share = right / len(rows)
    return {"value": share, "stderr": (share * (1 - share) / len(rows)) ** 0.5, "n": len(rows)}


def train_addition_model(steps: int = 6000, batch: int = 256, seed: int = 0, say=print):
    """Train from scratch on sums of 1 to 4 digits, never one of the held-out rows; AdamW, cosine.

    Rows of one step have one length, so that nothing is padded. About five minutes on two cores.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    rng = random.Random(seed)
    held_out = {row["prompt"] for row in held_out_rows()}
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.05)
    for step in range(steps):
        k = rng.choices(LENGTHS, weights=(1, 2, 4, 6))[0]
        rows = []
        low, high = (0, 9) if k == 1 else (10 ** (k - 1), 10**k - 1)
        while len(rows) < batch:
            a, b = rng.randint(low, high), rng.randint(low, high)
            if f"{a}+{b}=" not in held_out:
                # Sums have k or k + 1 digits: a second stop fills the shorter ones.
                answer = (str(a + b)[::-1] + "..")[: k + 2]
                rows.append(encode_text(f"{a}+{b}={answer}"))
        ids = torch.tensor(rows)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        first = 2 * k + 1  # the position that predicts the answer's first digit
        target = ids[:, 1:][:, first:].reshape(-1)
        loss = functional.cross_entropy(logits[:, first:].flatten(0, 1), target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 500 == 0:
            share = addition_accuracy(model.eval(), held_out_rows())["value"]
            model.train()
            say(f"step {step + 1}: loss {loss.item():.4f}, held-out accuracy {share:.3f}")
    return model.eval()


if __name__ == "__main__":
    train_addition_model().save_pretrained(Path(sys.argv[1]))
