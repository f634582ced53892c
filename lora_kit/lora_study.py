"""One cell of the rank and placement comparison: fresh adapter, same rows, same steps, a score.

Small and plain on purpose: the point is that nothing but the adapter differs between two cells. The
kit's real training road (packing, checkpoints, mixed precision) is elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lora_kit.errors import BadInputError

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """ids, mask and labels, each (rows, length); labels are -100 on prompts and padding."""

    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor

    def take(self, rows: torch.Tensor) -> Batch:
        return Batch(self.ids[rows], self.mask[rows], self.labels[rows])


def encode_rows(tokenizer, rows: Iterable[Mapping], device: str = "cpu") -> Batch:
    """Prompt and completion as token ids, the loss on the completion and the end token only."""
    pairs = []
    for row in rows:
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        pairs.append((prompt, [*answer, tokenizer.eos_token_id]))
    if not pairs:
        raise BadInputError("There are no rows to encode.")
    length = max(len(p) + len(a) for p, a in pairs)
    ids = torch.full((len(pairs), length), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for i, (prompt, answer) in enumerate(pairs):
        whole = torch.tensor(prompt + answer)
        ids[i, : len(whole)] = whole
        mask[i, : len(whole)] = 1
        labels[i, len(prompt) : len(whole)] = whole[len(prompt) :]
    return Batch(ids.to(device), mask.to(device), labels.to(device))


def answer_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of the answer tokens, in nats a token.

    Only the answers' positions go through the output head: it is a fifth of the default model.
    """
    return F.cross_entropy(*_answer_logits(model, batch))


def _answer_logits(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    wanted = batch.labels[:, 1:] != IGNORED
    first = int(wanted.any(dim=0).nonzero()[0])
    kept = batch.ids.shape[1] - first
    logits = model(batch.ids, attention_mask=batch.mask, logits_to_keep=kept).logits[:, :-1]
    labels = batch.labels[:, first + 1 :]
    chosen = labels != IGNORED
    return logits[chosen].float(), labels[chosen]


def fit(
    model: nn.Module, train: Batch, steps: int, batch_size: int, lr: float, seed: int
) -> list[float]:
    """AdamW on what requires a gradient; a tenth of the steps to warm up, then down to zero.

    Rows are drawn in seeded order without replacement, epoch after epoch: equal seeds give equal
    batches whatever the model. Returns the loss of every step.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    warm = max(1, steps // 10)

    def factor(step: int) -> float:
        return min((step + 1) / warm, (steps - step) / max(1, steps - warm))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses = []
    model.train()
    for rows in _orders(len(train.ids), steps, batch_size, seed):
        loss = answer_loss(model, train.take(rows.to(train.ids.device)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.detach())
    model.eval()
    return [float(loss) for loss in losses]


def _orders(rows: int, steps: int, size: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    pool = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(pool) < size:
            pool = torch.cat([pool, torch.randperm(rows, generator=generator)])
        yield pool[:size]
        pool = pool[size:]


@torch.no_grad()
def score(model: nn.Module, test: Batch, batch_size: int = 128) -> dict[str, float]:
    """{"loss": nats an answer token, "accuracy": share of rows answered right to the last token}.

    A row counts as right when every answer token is the model's first choice given those before:
    the same rows that greedy generation gets right.
    """
    model.eval()
    total = right = tokens = 0.0
    for rows in torch.arange(len(test.ids)).split(batch_size):
        batch = test.take(rows.to(test.ids.device))
        logits, labels = _answer_logits(model, batch)
        total += float(F.cross_entropy(logits, labels, reduction="sum"))
        tokens += len(labels)
        owner = (batch.labels != IGNORED).nonzero()[:, 0]
        wrong = torch.zeros(len(rows), device=owner.device)
        wrong.index_add_(0, owner, (logits.argmax(-1) != labels).float())
        right += float((wrong == 0).sum())
    return {"loss": total / tokens, "accuracy": right / len(test.ids)}


@dataclass(frozen=True)
class Budget:
    """What every cell of a comparison gets: the same."""

    steps: int
    batch_size: int
    lr: float

    def to_dict(self) -> dict:
        return asdict(self)


def placement_cell(
    model: nn.Module, train: Batch, test: Batch, spec, budget: Budget, seed: int
) -> dict[str, float]:
    """Add an adapter, train it, score it, take it off: one cell, one seed.

    The seed sets both the adapter's start and the order of the rows. The model comes back as it
    was. Returns loss, accuracy, trainable (parameters), seconds and the last training losses' mean.
    """
    from lora_kit.lora import add_lora, count_parameters, remove_lora

    start = time.perf_counter()
    add_lora(model, spec, "cell", seed=seed)
    try:
        trainable, _ = count_parameters(model)
        losses = fit(model, train, budget.steps, budget.batch_size, budget.lr, seed)
        found = score(model, test)
    finally:
        remove_lora(model, "cell")
    last = losses[-max(1, len(losses) // 10) :]
    return {
        **found,
        "train_loss": sum(last) / len(last),
        "trainable": trainable,
        "seconds": time.perf_counter() - start,
    }


def mean_and_interval(values: Sequence[float]) -> dict[str, float | int]:
    """{"value", "stderr", "low", "high", "n"} of a mean over seeds (95 %, Student's t)."""
    from scipy import stats

    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return {"value": mean, "n": n}
    error = (sum((v - mean) ** 2 for v in values) / (n - 1) / n) ** 0.5
    reach = float(stats.t.ppf(0.975, n - 1)) * error
    return {"value": mean, "stderr": error, "low": mean - reach, "high": mean + reach, "n": n}
