"""Addition from scratch that goes on past the lengths it was trained on: coupled positions.

A transformer that knows tokens by their place in the text has never seen the places of a longer
sum. Position coupling (Cho et al. 2024, "Position Coupling") gives the digits that belong together
one position: units of both numbers and of the sum, then tens, and so on. Abacus embeddings
(McLeish et al. 2024) give the same to digits and nothing to the signs.

    text        0 4 7 + 9 5 8 = 5 0 0 1 $        047 + 958 = 1005, the sum written units first
    "coupled"   3 2 1 0 3 2 1 0 1 2 3 4 5        + s, drawn for each row of training
    "abacus"    3 2 1 . 3 2 1 . 1 2 3 4 .        + s on digits; the signs stand at 0
    "absolute"  0 1 2 3 4 5 6 7 8 …              + s: what everybody knows, for comparison

Adding s, a random start, has every position trained though the numbers are short. Both operands
are padded with zeros to one length n and the sum has n + 1 digits, so a step needs the two digits
of its own position, those of the one before, and the digit just written: with these the carry is
known without looking further (Cho et al., theorem 5.1: one layer with two heads can do it).

Both papers add a learnt vector for each position to the token's: reading "learnt". A longer sum
then holds pairs of positions that no training sum held together, and nothing was learnt of passing
them over. Reading "relative" is ours: distances between coupled positions, cut off at REACH.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from lora_kit.errors import BadInputError
from lora_kit.store import sha256_json

PLUS, EQUALS, STOP, VOCABULARY = 10, 11, 12, 13
SCHEMES = ("coupled", "abacus", "absolute")
READINGS = ("learnt", "relative")
REACH = 3  # distances told apart by "relative"; what is further is all the same
HELD_OUT_SEED = 20_260


@dataclass(frozen=True)
class CoupledSpec:
    """A model and its training.

    scheme: a name of SCHEMES. reading: how the model reads position ids, a name of READINGS.
    sharpen: scores of attention grow with the logarithm of what is read. most_trained: longest
    numbers in training, every length from 1 equally often. most_tested: longest that has to fit,
    which sizes the table of positions. width, layers, heads: the transformer. steps, batch,
    learning_rate: AdamW, warmed up over a twentieth and then a cosine to a hundredth.
    """

    scheme: str = "coupled"
    reading: str = "learnt"
    sharpen: bool = True
    most_trained: int = 20
    most_tested: int = 60
    width: int = 128
    layers: int = 1
    heads: int = 4
    steps: int = 6000
    batch: int = 128
    learning_rate: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise BadInputError(f"scheme must be one of {', '.join(SCHEMES)}, not {self.scheme!r}.")
        if self.reading not in READINGS:
            raise BadInputError(
                f"reading must be one of {', '.join(READINGS)}, not {self.reading!r}."
            )
        for name in ("most_trained", "width", "layers", "heads", "steps", "batch"):
            if getattr(self, name) < 1:
                raise BadInputError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.most_tested < self.most_trained:
            raise BadInputError("most_tested must be most_trained or more.")
        if self.width % self.heads:
            raise BadInputError(f"{self.width} channels do not divide among {self.heads} heads.")

    @property
    def positions(self) -> int:
        """Rows of the table of positions; row 0 is for tokens without one."""
        longest = self.most_tested
        return (3 * longest + 4 if self.scheme == "absolute" else longest + 3) + 1

    def to_dict(self) -> dict:
        return asdict(self)


class CoupledTransformer(nn.Module):
    """A decoder whose only notion of place is the position ids it is given.

    reading "learnt": a learnt vector for each id, added to the token's, as the two papers have it.
    "relative": the ids are compared instead. A key at a distance of up to REACH from the query adds
    a learnt number to its score, one for each head and distance; all that is further adds the same,
    so that digits further away than any in training are passed over like those that were there.
    """

    def __init__(self, spec: CoupledSpec):
        super().__init__()
        self.spec = spec
        self.token = nn.Embedding(VOCABULARY, spec.width)
        if spec.reading == "learnt":
            self.position = nn.Embedding(spec.positions, spec.width)
        else:
            self.distance = nn.Parameter(torch.zeros(spec.layers, spec.heads, 2 * REACH + 1))
        self.blocks = nn.ModuleList(_Block(spec) for _ in range(spec.layers))
        self.norm = nn.RMSNorm(spec.width)
        self.head = nn.Linear(spec.width, VOCABULARY, bias=False)

    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, past: list | None = None
    ) -> torch.Tensor:
        """Logits of the following tokens, (rows, new, 13).

        Args:
            ids: (rows, new) tokens.
            positions: (rows, seen + new) ids of all tokens so far, below `spec.positions`.
            past: a list that keeps each layer's keys and values of what was seen; empty at first.
        """
        x, seen = self.token(ids), positions.shape[1] - ids.shape[1]
        scores = self._scores(positions[0], seen)
        if self.spec.reading == "learnt":
            x = x + self.position(positions[:, seen:])
        for i, block in enumerate(self.blocks):
            if past is not None and len(past) == i:
                past.append(None)
            x = block(x, scores[i], seen, past, i)
        return self.head(self.norm(x))

    def _scores(self, places: torch.Tensor, seen: int) -> list[torch.Tensor]:
        """What each layer adds to its heads' scores, (heads or 1, new, seen + new): −∞ ahead, and
        the distances' numbers. Rows of a batch have the same distances, whatever their starts."""
        apart = places[None, :] - places[seen:, None]
        ahead = torch.ones_like(apart, dtype=torch.bool).triu(seen + 1)
        if self.spec.reading == "learnt":
            plain = torch.zeros(1, *apart.shape).masked_fill(ahead, -torch.inf)
            return [plain] * self.spec.layers
        # Times 8: a score that settles a softmax is within reach of the learning rate.
        scale = 8 * _sharpness(seen, len(places), self.spec.sharpen)[:, None]
        near = apart.clamp(-REACH, REACH) + REACH
        return [(scale * d[:, near]).masked_fill(ahead, -torch.inf) for d in self.distance]


def _sharpness(seen: int, length: int, wanted: bool) -> torch.Tensor:
    """A factor for the scores of each new query: log(t + 1)/log 16, t the keys it sees; (new,).

    The share of a softmax that one key keeps falls with every key beside it. Scores that grow with
    the logarithm of their number keep it (Chiang and Cholak 2022, section 5.3).
    """
    keys = torch.arange(seen + 2, length + 2, dtype=torch.float32)
    return keys.log() / math.log(16) if wanted else torch.ones(length - seen)


class _Block(nn.Module):
    def __init__(self, spec: CoupledSpec):
        super().__init__()
        self.heads, self.sharpen, width = spec.heads, spec.sharpen, spec.width
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x, scores, seen: int, past: list | None, i: int) -> torch.Tensor:
        q, k, v = self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        if past is not None:
            if past[i] is not None:
                k, v = (torch.cat(pair, dim=2) for pair in zip(past[i], (k, v), strict=True))
            past[i] = (k, v)
        q = q * _sharpness(seen, k.shape[2], self.sharpen)[:, None]
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=scores)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


# ------------------------------------------------------------------ sums as tensors


def draw_digits(rows: int, n: int, generator: torch.Generator) -> torch.Tensor:
    """(rows, 2, n) digits of two n-digit numbers, highest place first; no zero leads, but where
    n is 1."""
    digits = torch.randint(10, (rows, 2, n), generator=generator)
    if n > 1:
        digits[:, :, 0] = torch.randint(1, 10, (rows, 2), generator=generator)
    return digits


def carry_digits(rows: int, n: int, generator: torch.Generator) -> torch.Tensor:
    """(rows, 2, n) digits whose units carry, and every place above passes the carry on: the hardest
    sums, a chain of n carries each."""
    digits = draw_digits(rows, n, generator)
    digits[:, 0] = digits[:, 0].clamp(max=8) if n > 1 else digits[:, 0]
    digits[:, 1] = 9 - digits[:, 0]
    digits[:, 0, -1] = torch.randint(1, 10, (rows,), generator=generator)
    units = digits[:, 0, -1]
    digits[:, 1, -1] = 10 - units + (torch.rand(rows, generator=generator) * units).long()
    return digits


def add_digits(digits: torch.Tensor) -> torch.Tensor:
    """(rows, n + 1) digits of the sums, units first."""
    columns = digits.sum(1).flip(-1)
    carry, found = torch.zeros_like(columns[:, 0]), []
    for i in range(columns.shape[1]):
        total = columns[:, i] + carry
        found.append(total % 10)
        carry = total // 10
    return torch.stack([*found, carry], dim=1)


def sum_tokens(digits: torch.Tensor) -> torch.Tensor:
    """(rows, 3n + 4) token ids: both numbers, the sum units first, and the stop."""
    rows = digits.shape[0]
    sign = torch.full((rows, 1), PLUS)
    answer = add_digits(digits)
    parts = (digits[:, 0], sign, digits[:, 1], sign + 1, answer, sign + 2)
    return torch.cat(parts, dim=1)


def position_ids(n: int, starts: torch.Tensor, scheme: str) -> torch.Tensor:
    """(rows, 3n + 4) position ids of sums of n-digit numbers; `starts`: s of each row, from 1."""
    down, up = torch.arange(n, 0, -1), torch.arange(1, n + 2)
    zero = torch.zeros(1, dtype=torch.long)
    if scheme == "absolute":
        return torch.arange(3 * n + 4) + starts[:, None]
    ids = torch.cat([down, zero, down, zero, up, zero + n + 2]) + starts[:, None]
    if scheme == "abacus":
        ids[:, [n, 2 * n + 1, 3 * n + 3]] = 0
    return ids


def _start_range(spec: CoupledSpec, n: int) -> int:
    """How many starts s leave all of a sum's positions inside the table."""
    used = 3 * n + 4 if spec.scheme == "absolute" else n + 3
    return spec.positions - used


def held_out_digits(n: int, rows: int) -> torch.Tensor:
    """The test sums of a length: the first `rows` of a fixed stream."""
    generator = torch.Generator().manual_seed(HELD_OUT_SEED + n)
    return draw_digits(rows, n, generator)


def _keys(digits: torch.Tensor) -> torch.Tensor:
    """One number for each pair, for telling trained from held-out sums."""
    flat = digits.flatten(1)
    return (flat * 10 ** torch.arange(flat.shape[1])).sum(1)


# ------------------------------------------------------------------ training


def train_coupled(
    spec: CoupledSpec, folder: Path | None = None, seconds: float = math.inf, say=print
) -> tuple[CoupledTransformer | None, dict]:
    """Train on random sums of 1 to `most_trained` digits, all of a step of one length.

    The held-out sums (`held_out_digits`, 500 a length) of 2 to 8 digits are never trained on, as
    far as there are others (at most a tenth of a length is held out); of more digits the odds of
    meeting one are below 10^-9.

    Args:
        spec: model and training.
        folder: where checkpoints are kept; the same call carries on there.
        seconds: stop after about as long, at a checkpoint.
        say: prints progress.

    Returns:
        (the model in eval mode, facts) or (None, facts) where the time ran out first. facts:
        `losses` (step, loss) every 100 steps, `seconds` of training in all, `step`.
    """
    from lora_kit.train.checkpoints import Checkpoints

    torch.manual_seed(spec.seed)
    generator = torch.Generator().manual_seed(spec.seed)
    model = CoupledTransformer(spec).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.learning_rate, betas=(0.9, 0.98))
    keep = None
    step, spent, losses = 0, 0.0, []
    if folder is not None:
        keep = Checkpoints(Path(folder), sha256_json(spec.to_dict()), say=say)
        state = keep.newest()
        if state is not None:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            generator.set_state(state["generator"])
            step, spent, losses = state["step"], state["seconds"], state["losses"]
    held = {
        n: _keys(held_out_digits(n, min(500, (9 * 10 ** (n - 1)) ** 2 // 10)))
        for n in range(2, min(spec.most_trained, 8) + 1)
    }
    started = saved = time.perf_counter()

    def save() -> None:
        if keep is not None:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "generator": generator.get_state(),
                "step": step,
                "seconds": spent + time.perf_counter() - started,
                "losses": losses,
            }
            keep.save(step, state)

    while step < spec.steps:
        n = int(torch.randint(1, spec.most_trained + 1, (1,), generator=generator))
        digits = draw_digits(spec.batch, n, generator)
        if n in held:
            fresh = ~torch.isin(_keys(digits), held[n])
            digits = digits[fresh]
        starts = torch.randint(1, _start_range(spec, n) + 1, (len(digits),), generator=generator)
        loss = answer_loss(model, digits, starts)
        for group in optimizer.param_groups:
            group["lr"] = spec.learning_rate * _rate(step / spec.steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            losses.append([step, loss.item()])
        if step % 1000 == 0:
            say(f"step {step:,}: loss {loss.item():.5f}")
        now = time.perf_counter()
        if now - started > seconds and step < spec.steps:
            save()
            return None, {"losses": losses, "seconds": spent + now - started, "step": step}
        if now - saved > 60:
            save()
            saved = now
    facts = {"losses": losses, "seconds": spent + time.perf_counter() - started, "step": step}
    save()
    return model.eval(), facts


def _rate(done: float) -> float:
    if done < 0.05:
        return max(done / 0.05, 0.01)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (done - 0.05) / 0.95))


def answer_loss(model, digits: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy, in nats, of the sum's digits and the stop."""
    n = digits.shape[-1]
    ids, places = sum_tokens(digits), position_ids(n, starts, model.spec.scheme)
    logits = model(ids[:, :-1], places[:, :-1])[:, 2 * n + 1 :]
    return functional.cross_entropy(logits.flatten(0, 1), ids[:, 2 * n + 2 :].flatten())


# ------------------------------------------------------------------ asking


@torch.inference_mode()
def answer_sums(model: CoupledTransformer, digits: torch.Tensor, start: int = 1) -> torch.Tensor:
    """Greedy answers, token by token: (rows, n + 2) ids, to be compared with `sum_tokens`."""
    n = digits.shape[-1]
    new, past, said = sum_tokens(digits)[:, : 2 * n + 2], [], []
    places = position_ids(n, torch.full((len(digits),), start), model.spec.scheme)
    for i in range(n + 2):
        logits = model(new, places[:, : 2 * n + 2 + i], past)[:, -1]
        new = logits.argmax(-1, keepdim=True)
        said.append(new)
    return torch.cat(said, dim=1)


@torch.inference_mode()
def right_answers(
    model: CoupledTransformer, digits: torch.Tensor, start: int = 1, at_once: int = 256
) -> torch.Tensor:
    """(rows, n + 2) of bool: which tokens of the greedy answer are right; a sum is right where all
    are.

    One pass over the right answers finds the rows in which every next token is predicted: greedy
    answering, which then reads the same tokens, gives the same. Only the other rows are answered
    token by token.
    """
    n, found = digits.shape[-1], []
    for part in digits.split(at_once):
        ids = sum_tokens(part)
        wanted = ids[:, 2 * n + 2 :]
        places = position_ids(n, torch.full((len(part),), start), model.spec.scheme)
        right = model(ids[:, :-1], places[:, :-1])[:, 2 * n + 1 :].argmax(-1) == wanted
        wrong = ~right.all(1)
        if wrong.any():
            right[wrong] = answer_sums(model, part[wrong], start) == wanted[wrong]
        found.append(right)
    return torch.cat(found)
