"""Detours of single tokens on a GPU: each row reads the A and B of its own slot and nothing else.

    H[i] = A_slot(i) x_i  (layers of the site, r), in fp32        Y[i] += B_slot(i)ᵀ H[i]

Two kernels, whatever the adapters, where products over all slots of a page need three and read them
all. For one token a row, as in decoding: a prompt's many tokens are better off with a matrix
product. (Chen et al. 2023, "Punica", section 4; written in Triton, which comes with torch's builds
for NVIDIA's GPUs.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

RANK_BLOCK, IN_BLOCK, OUT_BLOCK = 16, 256, 128


@triton.jit
def _first(
    x, a, own, hidden, layer_stride, width: tl.constexpr, rank: tl.constexpr,
    RANK_BLOCK: tl.constexpr, IN_BLOCK: tl.constexpr,
):  # fmt: skip
    row, layer = tl.program_id(0), tl.program_id(1)
    slot = tl.load(own + row)
    if slot >= 0:
        r = tl.program_id(2) * RANK_BLOCK + tl.arange(0, RANK_BLOCK)
        factors = a + layer * layer_stride + (slot * rank + r[:, None]) * width
        total = tl.zeros((RANK_BLOCK, IN_BLOCK), dtype=tl.float32)
        for start in range(0, width, IN_BLOCK):
            at = start + tl.arange(0, IN_BLOCK)
            mine = tl.load(x + row * width + at, mask=at < width, other=0.0).to(tl.float32)
            inside = (r[:, None] < rank) & (at[None, :] < width)
            read = tl.load(factors + at[None, :], mask=inside, other=0.0)
            total += read.to(tl.float32) * mine[None, :]
        place = (row * tl.num_programs(1) + layer) * rank + r
        tl.store(hidden + place, tl.sum(total, axis=1), mask=r < rank)


@triton.jit
def _second(
    hidden, b, own, out, row_stride, width: tl.constexpr, rank: tl.constexpr,
    RANK_BLOCK: tl.constexpr, OUT_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    slot = tl.load(own + row)
    if slot >= 0:
        at = tl.program_id(1) * OUT_BLOCK + tl.arange(0, OUT_BLOCK)
        total = tl.zeros((OUT_BLOCK,), dtype=tl.float32)
        for start in range(0, rank, RANK_BLOCK):
            r = start + tl.arange(0, RANK_BLOCK)
            mine = tl.load(hidden + row * row_stride + r, mask=r < rank, other=0.0)
            inside = (r[:, None] < rank) & (at[None, :] < width)
            factors = b + (slot * rank + r[:, None]) * width + at[None, :]
            read = tl.load(factors, mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(read * mine[:, None], axis=0)
        to = out + row * width + at
        before = tl.load(to, mask=at < width, other=0.0).to(tl.float32)
        tl.store(to, (before + total).to(out.dtype.element_ty), mask=at < width)


def first_products(x: torch.Tensor, a: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """H (rows, layers, r) in fp32, of rows x (rows, in), a (layers, slots, r, in) and each row's
    slot, own (rows,). Of rows without one, own < 0, H is left as it was found."""
    layers, _, rank, width = a.shape
    hidden = torch.empty((len(x), layers, rank), dtype=torch.float32, device=x.device)
    grid = (len(x), layers, triton.cdiv(rank, RANK_BLOCK))
    _first[grid](x, a, own, hidden, a.stride(0), width, rank, RANK_BLOCK, IN_BLOCK)
    return hidden


def add_second_products(
    hidden: torch.Tensor, b: torch.Tensor, own: torch.Tensor, out: torch.Tensor
) -> None:
    """out (rows, out_features) += the rows' own H B, b (slots, r, out_features); hidden (rows, r)
    may be a part of what `first_products` gave. Rows without a slot are not touched."""
    _, rank, width = b.shape
    grid = (len(out), triton.cdiv(width, OUT_BLOCK))
    _second[grid](hidden, b, own, out, hidden.stride(0), width, rank, RANK_BLOCK, OUT_BLOCK)
