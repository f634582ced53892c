"""The arithmetic of an adapted layer, y = W x + s · B A x: which products, in which order.

Nothing here knows what an adapter is: tensors and a scale come in. The scale rides inside a matrix
product, the detour is added into the base's output in place, and nothing of the output's size is
kept for the backward pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

FOLDING = (torch.float32, torch.float64)  # dtypes fine enough to hold W + ΔW


class FusedLora(torch.autograd.Function):
    """y = x Wᵀ + b + s · x Aᵀ Bᵀ over a frozen W: matrix products only, no elementwise pass.

    weight: W, (out, in); or a function dtype → W for one held in 4 bits, which is decoded once for
    each pass and never kept.
    Saved for the backward pass: x, a dense W, A, B and s·x·Aᵀ, which is only `rank` wide.
    For a CPU; `add_low_rank` says what a GPU runs.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale):
        ctx.decode = weight if callable(weight) else None
        dense = weight(x.dtype) if ctx.decode else weight
        flat = x.reshape(-1, x.shape[-1])
        inner = _scaled_mm(flat, a.t(), scale)
        out = F.linear(x, dense, bias)
        out.view(-1, out.shape[-1]).addmm_(inner, b.t())
        ctx.save_for_backward(flat, None if ctx.decode else dense, a, b, inner)
        ctx.scale, ctx.shape = scale, x.shape
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        flat, dense, a, b, inner = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        back = _scaled_mm(grad, b, ctx.scale)
        grad_a = back.t() @ flat if ctx.needs_input_grad[3] else None
        grad_b = grad.t() @ inner if ctx.needs_input_grad[4] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            dense = ctx.decode(grad.dtype) if ctx.decode else dense
            grad_x = (grad @ dense).addmm_(back, a).view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, None


class _AddLowRank(torch.autograd.Function):
    """out + s · x Aᵀ Bᵀ, written into `out` (the base layer's fresh result)."""

    @staticmethod
    def forward(ctx, out, x, a, b, scale):
        flat = x.reshape(-1, x.shape[-1])
        inner = _scaled_mm(flat, a.t(), scale)
        out.view(-1, out.shape[-1]).addmm_(inner, b.t())
        ctx.mark_dirty(out)
        ctx.save_for_backward(flat, a, b, inner)
        ctx.scale, ctx.shape = scale, x.shape
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        flat, a, b, inner = ctx.saved_tensors
        grads = grad.reshape(-1, grad.shape[-1])
        back = _scaled_mm(grads, b, ctx.scale)
        grad_a = back.t() @ flat if ctx.needs_input_grad[2] else None
        grad_b = grads.t() @ inner if ctx.needs_input_grad[3] else None
        grad_x = (back @ a).view(ctx.shape) if ctx.needs_input_grad[1] else None
        return grad, grad_x, grad_a, grad_b, None


def _scaled_mm(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """scale · left @ right in one product: the scale is the alpha that GEMM has anyway."""
    out = left.new_empty(left.shape[0], right.shape[1])
    return torch.addmm(out, left, right, beta=0, alpha=scale, out=out)


def adapted_product(x, weight, bias, a, b, scale: float, may_fold: bool = True) -> torch.Tensor:
    """W x + bias + scale · B A x on a CPU and without a graph, in the cheapest order.

    With T rows of x and rank r the detour takes T · r · (in + out) multiplications. Folding B A
    into a passing copy of W takes r · in · out and spares x a second visit, so from
    T = in · out / (in + out) rows on it is the cheaper one. One row, a generated token, takes
    matrix-vector products, which cost less to call.

    Shapes: x (..., in), weight (out, in), a (rank, in), b (out, rank), one dtype. In half precision
    W + ΔW would lose a small ΔW to rounding: there, or with may_fold=False, nothing is folded.
    """
    n_in = x.shape[-1]
    rows = x.numel() // n_in
    if rows == 1:
        out = F.linear(x, weight, bias)
        out.view(-1).addmv_(b, torch.mv(a, x.view(-1)), alpha=scale)
        return out
    n_out = b.shape[0]
    if rows * (n_in + n_out) > n_in * n_out and may_fold and x.dtype in FOLDING:
        return F.linear(x, torch.addmm(weight, b, a, alpha=scale), bias)
    out = F.linear(x, weight, bias)
    inner = F.linear(x.reshape(-1, n_in), a)
    out.view(-1, n_out).addmm_(inner, b.t(), alpha=scale)
    return out


def add_low_rank(out, x, a, b, scale: float) -> torch.Tensor:
    """out + scale · x Aᵀ Bᵀ, in place where `out` may be written to.

    Shapes: out (..., out_features), x (..., in_features), a (rank, in), b (out, rank), one dtype.
    """
    if out.dtype != a.dtype or (out.requires_grad and out.is_leaf):
        low = F.linear(F.linear(x.to(a.dtype), a), b) * scale
        return (out + low).to(out.dtype)
    if out.is_cuda and torch.is_grad_enabled():
        # A step of a small model waits for launches, and a Function in Python takes longer to call
        # than its kernels to run: torch's own nodes, three kernels forward.
        inner = F.linear(x, a).reshape(-1, a.shape[0])
        flat = out.reshape(-1, out.shape[-1])
        return torch.addmm(flat, inner, b.t(), alpha=scale).view(out.shape)
    if torch.is_grad_enabled():
        if out._is_view():  # autograd refuses to write into some views, and is slow for the others
            out = out.clone()
        return _AddLowRank.apply(out, x, a, b, scale)
    inner = x.reshape(-1, x.shape[-1]) @ a.t()
    out.view(-1, out.shape[-1]).addmm_(inner, b.t(), alpha=scale)
    return out
