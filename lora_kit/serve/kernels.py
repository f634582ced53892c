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

# What a program of each kernel takes at once, and its warps; chosen by timing whole decoding steps.
FIRST_RANKS, FIRST_INS, FIRST_WARPS = 8, 1024, 4
SECOND_RANKS, SECOND_OUTS, SECOND_WARPS = 16, 128, 1


@triton.jit
def _first(
    x, a, own, hidden, layer_stride, width: tl.constexpr, rank: tl.constexpr,
    ranks: tl.constexpr, ins: tl.constexpr,
):  # fmt: skip
    row, layer = tl.program_id(0), tl.program_id(1)
    slot = tl.load(own + row)
    if slot >= 0:
        r = tl.program_id(2) * ranks + tl.arange(0, ranks)
        factors = a + layer * layer_stride + (slot * rank + r[:, None]) * width
        total = tl.zeros((ranks, ins), dtype=tl.float32)
        for start in range(0, width, ins):
            at = start + tl.arange(0, ins)
            mine = tl.load(x + row * width + at, mask=at < width, other=0.0).to(tl.float32)
            inside = (r[:, None] < rank) & (at[None, :] < width)
            read = tl.load(factors + at[None, :], mask=inside, other=0.0)
            total += read.to(tl.float32) * mine[None, :]
        place = (row * tl.num_programs(1) + layer) * rank + r
        tl.store(hidden + place, tl.sum(total, axis=1), mask=r < rank)


@triton.jit
def _second(
    hidden, b, own, out, row_stride, width: tl.constexpr, rank: tl.constexpr,
    ranks: tl.constexpr, outs: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    slot = tl.load(own + row)
    if slot >= 0:
        at = tl.program_id(1) * outs + tl.arange(0, outs)
        total = tl.zeros((outs,), dtype=tl.float32)
        for start in range(0, rank, ranks):
            r = start + tl.arange(0, ranks)
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
    grid = (len(x), layers, triton.cdiv(rank, FIRST_RANKS))
    ins = min(FIRST_INS, triton.next_power_of_2(width))
    _first[grid](
        x, a, own, hidden, a.stride(0), width, rank, FIRST_RANKS, ins, num_warps=FIRST_WARPS
    )
    return hidden


def add_second_products(
    hidden: torch.Tensor, b: torch.Tensor, own: torch.Tensor, out: torch.Tensor
) -> None:
    """out (rows, out_features) += the rows' own H B, b (slots, r, out_features); hidden (rows, r)
    may be a part of what `first_products` gave. Rows without a slot are not touched."""
    _, rank, width = b.shape
    grid = (len(out), triton.cdiv(width, SECOND_OUTS))
    _second[grid](
        hidden, b, own, out, hidden.stride(0), width, rank, SECOND_RANKS, SECOND_OUTS,
        num_warps=SECOND_WARPS,
    )  # fmt: skip


def try_out() -> None:
    """Run both once, on nothing. Raises whatever Triton raises where it cannot."""
    x, out = (torch.zeros((1, 16), dtype=torch.float16, device="cuda") for _ in range(2))
    factors = torch.zeros((1, 1, 4, 16), dtype=torch.float16, device="cuda")
    own = torch.zeros(1, dtype=torch.long, device="cuda")
    add_second_products(first_products(x, factors, own)[:, 0], factors[0], own, out)
    torch.cuda.synchronize()
