"""Packing: several rows in one sequence, none of which sees another.

Padding a batch of short rows to the longest wastes most of it: half a batch of 8 Alpaca rows is
padding. Packed, rows stand one after the other,

    tokens     a a a b b b b c c
    segments   0 0 0 1 1 1 1 2 2        which row a token belongs to
    positions  0 1 2 0 1 2 3 0 1        start again with each row

and token i attends to token j exactly where segments are equal and j ≤ i: a block-diagonal mask.
With positions that start again, every row gets the logits it has alone (tests hold them to 1e-5).
The mask is an ordinary one, so any attention kernel that takes a mask will do; FlashAttention,
which a T4 lacks, is not needed. (Krell et al. 2021, "Efficient Sequence Packing without
Cross-contamination", section 3.2.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lora_kit.engine_memory import PACK_LENGTH  # attention's cost grows with the square
from lora_kit.errors import BadInputError
from lora_kit.prompts import IGNORE

MULTIPLE = 16  # lengths the memory-efficient attention kernel takes without copying the mask


@dataclass(frozen=True)
class Batch:
    """Rows ready for a forward pass; N sequences of S tokens.

    input_ids, positions, segments: (N, S) int64; padding has segment −1. picked: places, in the
    flattened (N·S), whose next token has a label; targets: those labels. tokens: padding left out.
    packed: a sequence holds more than one row, so the mask is needed.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor
    picked: torch.Tensor
    targets: torch.Tensor
    tokens: int
    packed: bool

    def to(self, device) -> Batch:
        tensors = (self.input_ids, self.positions, self.segments, self.picked, self.targets)
        if torch.device(device).type == "cuda":  # pinned memory lets the copy run beside the GPU
            tensors = tuple(t.pin_memory() for t in tensors)
        moved = (t.to(device, non_blocking=True) for t in tensors)
        return Batch(*moved, self.tokens, self.packed)

    def mask(self, dtype: torch.dtype) -> torch.Tensor | None:
        """(N, 1, S, S), added to the attention scores: 0 where a token may look, else the lowest
        number of `dtype`. None where no sequence holds two rows: plain causal attention is right
        there, for what stands before a token is its own row, and padding stands behind."""
        if not self.packed:
            return None
        length = self.segments.shape[1]
        same = self.segments[:, :, None] == self.segments[:, None, :]
        allowed = same & torch.ones(length, length, dtype=torch.bool, device=same.device).tril()
        blocked = torch.zeros(allowed.shape, dtype=dtype, device=same.device)
        return blocked.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


def place_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which rows share a sequence: best fit, longest row first (within 22 % of the fewest bins).

    Args:
        lengths: tokens of each row.
        capacity: tokens of a sequence.

    Returns:
        For each sequence the numbers of its rows.

    Raises:
        BadInputError: a row longer than the capacity.
    """
    if lengths and max(lengths) > capacity:
        raise BadInputError(f"A row of {max(lengths)} tokens does not fit into {capacity}.")
    bins: list[list[int]] = []
    free: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [b for b in range(len(bins)) if free[b] >= lengths[row]]
        if fitting:
            best = min(fitting, key=lambda b: free[b])
        else:
            best = len(bins)
            bins.append([])
            free.append(capacity)
        bins[best].append(row)
        free[best] -= lengths[row]
    return bins


def collate(rows: Sequence[dict], pad_id: int, pack: bool = True) -> Batch:
    """Encoded rows as one batch.

    Args:
        rows: {"input_ids", "labels"} as `prompts.encode` makes them.
        pad_id: the token that fills sequences up; it has no label and no row sees it.
        pack: put several rows into a sequence; else each has one of its own.

    Raises:
        BadInputError: no rows, or a row without tokens.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    if not lengths or min(lengths) == 0:
        raise BadInputError("A batch needs at least one row, and every row at least one token.")
    if pack:
        places = place_rows(lengths, max(max(lengths), min(PACK_LENGTH, sum(lengths))))
    else:
        places = [[i] for i in range(len(rows))]
    longest = max(sum(lengths[i] for i in place) for place in places)
    shape = (len(places), -(-longest // MULTIPLE) * MULTIPLE)
    ids = torch.full(shape, pad_id)
    segments = torch.full(shape, -1)
    positions = torch.arange(shape[1]).repeat(shape[0], 1)
    labels = torch.full(shape, IGNORE)
    for n, place in enumerate(places):
        start = 0
        for segment, i in enumerate(place):
            end = start + lengths[i]
            ids[n, start:end] = torch.tensor(rows[i]["input_ids"])
            segments[n, start:end] = segment
            positions[n, start:end] = torch.arange(lengths[i])
            # A label is predicted from the token before it: shifted inside its own row, so that no
            # row's last token is asked for the next row's first.
            labels[n, start : end - 1] = torch.tensor(rows[i]["labels"][1:])
            start = end
    picked = (labels.view(-1) != IGNORE).nonzero().squeeze(1)
    return Batch(
        input_ids=ids,
        positions=positions,
        segments=segments,
        picked=picked,
        targets=labels.view(-1)[picked],
        tokens=sum(lengths),
        packed=any(len(place) > 1 for place in places),
    )
