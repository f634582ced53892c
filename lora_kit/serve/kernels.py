"""Detours of single tokens on a GPU: each row reads the A and B of its own slot and nothing else.

    H[i] = A_slot(i) x_i  (layers of the site, r), in fp32        Y[i] += B_slot(i)ᵀ H[i]

Two kernels, whatever the adapters, where products over all slots of a page need three and read them
all. For one token a row, as in decoding: a prompt's many tokens are better off with a matrix
product. (Chen et al. 2023, "Punica", section 4; written in Triton, which comes with torch's builds
for NVIDIA's GPUs.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

# What a program of each kernel takes at once, and its warps; chosen by timing whole decoding steps.
FIRST_RANKS, FIRST_INS, FIRST_WARPS = 8, 1024, 4
SECOND_RANKS, SECOND_OUTS, SECOND_WARPS = 16, 128, 1
MOST_LAYERS = 3  # whose second products are one kernel: those of q, k and v


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
def _add_block(
    hidden, b, slot, out, block, width: tl.constexpr, rank: tl.constexpr,
    ranks: tl.constexpr, outs: tl.constexpr,
):  # fmt: skip
    at = block * outs + tl.arange(0, outs)
    total = tl.zeros((outs,), dtype=tl.float32)
    for start in range(0, rank, ranks):
        r = start + tl.arange(0, ranks)
        mine = tl.load(hidden + r, mask=r < rank, other=0.0)
        inside = (r[:, None] < rank) & (at[None, :] < width)
        factors = b + (slot * rank + r[:, None]) * width + at[None, :]
        read = tl.load(factors, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(read * mine[:, None], axis=0)
    before = tl.load(out + at, mask=at < width, other=0.0).to(tl.float32)
    tl.store(out + at, (before + total).to(out.dtype.element_ty), mask=at < width)


@triton.jit
def _second(
    hidden, b0, b1, b2, own, out, hidden_stride, out_stride,
    width0: tl.constexpr, width1: tl.constexpr, width2: tl.constexpr,
    first0: tl.constexpr, first1: tl.constexpr, first2: tl.constexpr,
    rank: tl.constexpr, ranks: tl.constexpr, outs: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0), tl.program_id(1)
    blocks0: tl.constexpr = (width0 + outs - 1) // outs
    blocks1: tl.constexpr = (width1 + outs - 1) // outs
    slot = tl.load(own + row)
    if slot >= 0:
        mine, to = hidden + row * hidden_stride, out + row * out_stride
        if block < blocks0:
            _add_block(mine, b0, slot, to + first0, block, width0, rank, ranks, outs)
        elif block < blocks0 + blocks1:
            at = block - blocks0
            _add_block(mine + rank, b1, slot, to + first1, at, width1, rank, ranks, outs)
        else:
            at = block - blocks0 - blocks1
            _add_block(mine + 2 * rank, b2, slot, to + first2, at, width2, rank, ranks, outs)


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
    hidden: torch.Tensor,
    factors: Sequence[torch.Tensor],
    own: torch.Tensor,
    out: torch.Tensor,
    firsts: Sequence[int] = (0,),
) -> None:
    """out (rows, columns) += the rows' own H B of one to three layers that read one input.

    factors: the layers' b (slots, r, out_features); hidden (rows, at least so many layers, r) as
    `first_products` gives it, or a part of it; firsts: the column of out where each layer begins.
    Rows without a slot are not touched.
    """
    _, rank, _ = factors[0].shape
    empty = MOST_LAYERS - len(factors)
    widths = [b.shape[2] for b in factors] + [0] * empty
    begins = [*firsts, *[0] * empty]
    b0, b1, b2 = [*factors, *[factors[0]] * empty]
    grid = (len(out), sum(triton.cdiv(width, SECOND_OUTS) for width in widths))
    _second[grid](
        hidden, b0, b1, b2, own, out, hidden.stride(0), out.stride(0), *widths, *begins,
        rank, SECOND_RANKS, SECOND_OUTS, num_warps=SECOND_WARPS,
    )  # fmt: skip


def try_out() -> None:
    """Run both once, on nothing. Raises whatever Triton raises where it cannot."""
    x, out = (torch.zeros((1, 16), dtype=torch.float16, device="cuda") for _ in range(2))
    factors = torch.zeros((1, 1, 4, 16), dtype=torch.float16, device="cuda")
    own = torch.zeros(1, dtype=torch.long, device="cuda")
    add_second_products(first_products(x, factors, own), [factors[0]], own, out)
    torch.cuda.synchronize()
