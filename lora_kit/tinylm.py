"""Language models small enough to ship: addition, in full precision, trained from scratch.

The default model's linear weights are already 4-bit, so what a 4-bit format does to a *language
model's answers* cannot be seen on it. These have real float32 weights: Llamas of four layers that
read `12+34=` and write the sum, units first (`64` for 46, so that a digit needs only what was read
before), then a full stop. There are three widths, so that many weights of few bits can be weighed
against few weights of many bits.

They lie in `data/models/addition-tiny/`; `python -m lora_kit.tinylm FOLDER cuda` trains them
again, in four minutes (without `cuda` on the CPU, in an hour or more).
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
LENGTHS = (1, 2, 3)
TEST_SEED, TEST_ROWS = 20260, 200  # the rows that training never sees
WIDTHS = (40, 56, 72)
STOP = ALPHABET.index(".")


def addition_config(width: int):
    """The Llama config of one width."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(ALPHABET),
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 8 * 8,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=STOP,
        pad_token_id=STOP,
    )


def encode_text(text: str) -> list[int]:
    """One token for each character of `ALPHABET`.

    Raises:
        BadInputError: another character.
    """
    unknown = set(text) - set(ALPHABET)
    if unknown:
        raise BadInputError(f"The addition model reads {ALPHABET!r} only, not {sorted(unknown)}.")
    return [ALPHABET.index(c) for c in text]


def load_addition_model(width: int = WIDTHS[-1], folder: Path | None = None):
    """The shipped model of a width, in eval mode, float32.

    Raises:
        NotAvailableError: no such model here (or the kit was installed without its data).
    """
    from transformers import LlamaForCausalLM

    from lora_kit.models import quiet_libraries

    folder = (folder or repository() / "data" / "models" / "addition-tiny") / str(width)
    if not (folder / "model.safetensors").exists():
        raise NotAvailableError(
            f"No addition model in {folder}: there are widths {', '.join(map(str, WIDTHS))} in a "
            f"clone of the kit, and 'python -m lora_kit.tinylm {folder.parent}' trains them."
        )
    with quiet_libraries():
        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def held_out_rows(per_length: int = TEST_ROWS) -> list[dict]:
    """Rows of 2 and 3 digits that the shipped model was not trained on, `per_length` (<= 200) each.

    One-digit sums are too few to hold any out.
    """
    if not 1 <= per_length <= TEST_ROWS:
        raise BadInputError(f"Between 1 and {TEST_ROWS} rows a length are held out.")
    rows = draw_skill("addition", LENGTHS[1:], TEST_ROWS, TEST_SEED).rows
    return [r for k in LENGTHS[1:] for r in [x for x in rows if x["digits"] == k][:per_length]]


@torch.no_grad()
def addition_accuracy(model, rows) -> dict[str, float | int]:
    """Greedy answers: {"value", "stderr", "n"}; right means every digit and then the stop."""
    right = 0
    for digits in sorted({row["digits"] for row in rows}):
        batch = [row for row in rows if row["digits"] == digits]
        ids = torch.tensor([encode_text(row["prompt"]) for row in batch], device=model.device)
        start = ids.shape[1]
        for _ in range(digits + 2):
            following = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1)
            ids = torch.cat([ids, following[:, None]], dim=1)
        for row, answer in zip(batch, ids[:, start:].tolist(), strict=True):
            text = "".join(ALPHABET[i] for i in answer)
            right += text.startswith(row["completion"][::-1] + ".")
    share = right / len(rows)
    return {"value": share, "stderr": (share * (1 - share) / len(rows)) ** 0.5, "n": len(rows)}


def addition_loss(model, rows) -> float:
    """Mean cross-entropy in nats of the answers' characters, the stop included."""
    total, count = 0.0, 0
    with torch.no_grad():
        for digits in sorted({row["digits"] for row in rows}):
            batch = [row for row in rows if row["digits"] == digits]
            ids = _padded(batch, digits).to(model.device)
            total += _answer_loss(model, ids, digits, reduction="sum").item()
            count += len(batch) * (digits + 2)
    return total / count


def addition_batch(rng: random.Random, digits: int, size: int, held_out: set[str]) -> torch.Tensor:
    """Random rows of one length, none of them held out: token ids, (size, 3 · digits + 4)."""
    low, high = (0, 9) if digits == 1 else (10 ** (digits - 1), 10**digits - 1)
    rows = []
    while len(rows) < size:
        a, b = rng.randint(low, high), rng.randint(low, high)
        if f"{a}+{b}=" not in held_out:
            rows.append({"prompt": f"{a}+{b}=", "completion": str(a + b)})
    return _padded(rows, digits)


def train_addition_model(
    width: int = WIDTHS[-1],
    steps: int = 8000,
    batch: int = 256,
    seed: int = 0,
    make_optimizer=None,
    say=print,
    learning_rate: float = 3e-3,
    device: str = "cpu",
):
    """Train from scratch on sums of 1 to 3 digits, never one of the held-out rows.

    AdamW, or the optimiser that `make_optimizer(parameters)` gives, with one cosine cycle up to
    `learning_rate`. Rows of one step have one length: nothing is padded but shorter sums.

    Returns:
        (model in eval mode, the loss of each step).
    """
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    rng = random.Random(seed)
    held_out = {row["prompt"] for row in held_out_rows()}
    model = LlamaForCausalLM(addition_config(width)).train().to(device)
    make_optimizer = make_optimizer or torch.optim.AdamW
    optimizer = make_optimizer(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, steps, pct_start=0.05, cycle_momentum=False
    )
    losses = []
    for step in range(steps):
        digits = rng.choices(LENGTHS, weights=(1, 2, 5))[0]
        ids = addition_batch(rng, digits, batch, held_out).to(device)
        loss = _answer_loss(model, ids, digits)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 250 == 0:
            share = addition_accuracy(model.eval(), held_out_rows())["value"]
            model.train()
            say(f"width {width}, step {step + 1}: loss {loss.item():.4f}, accuracy {share:.3f}")
    return model.eval(), losses


def _padded(rows, digits: int) -> torch.Tensor:
    # Sums have k or k + 1 digits: a second stop fills the shorter ones.
    texts = (r["prompt"] + (r["completion"][::-1] + "..")[: digits + 2] for r in rows)
    return torch.tensor([encode_text(text) for text in texts])


def _answer_loss(model, ids, digits: int, reduction: str = "mean") -> torch.Tensor:
    first = 2 * digits + 1  # the position that predicts the answer's first digit
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits[:, first:]
    target = ids[:, first + 1 :]
    return functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction=reduction)


if __name__ == "__main__":
    for each in WIDTHS:
        trained = train_addition_model(each, device=sys.argv[2] if len(sys.argv) > 2 else "cpu")[0]
        trained.save_pretrained(Path(sys.argv[1]) / str(each))
