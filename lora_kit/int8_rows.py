"""int8 by row, and the outlier split of LLM.int8().

A matrix product x Wᵀ is taken in 8-bit integers when each row of x and each row of W has one scale:

    q(x)_ij = round(127 · x_ij / absmax_i),   x Wᵀ ≈ (absmax_x absmax_Wᵀ / 127²) · q(x) q(W)ᵀ

One large feature in x then spoils its whole row. LLM.int8() takes the few columns of x where any
value reaches `threshold` out, multiplies those in full precision, and adds the two products.
(LLM.int8(), Dettmers et al. 2022, sections 2 and 3.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_kit.errors import BadInputError


@dataclass(frozen=True)
class Int8Rows:
    """codes: int8, the matrix's shape; absmax: float32, one a row; outliers: columns left out."""

    codes: torch.Tensor
    absmax: torch.Tensor
    outliers: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.codes.numel() + 4 * self.absmax.numel()


def quantize_rows(matrix: torch.Tensor, threshold: float = 0.0) -> Int8Rows:
    """Quantise each row of a matrix to int8 by its absmax.

    With threshold > 0 values of at least that size do not count for the absmax, and the codes of
    every column that holds one are 0. Equals bitsandbytes' `int8_vectorwise_quant`.

    Raises:
        BadInputError: no matrix of floats, empty, or not finite; a negative threshold.
    """
    if matrix.ndim != 2 or not matrix.is_floating_point() or matrix.numel() == 0:
        raise BadInputError(
            f"quantize_rows takes a matrix of floats, not {matrix.dtype} of {tuple(matrix.shape)}."
        )
    if threshold < 0:
        raise BadInputError(f"The outlier threshold must be 0 (none) or more, not {threshold}.")
    if not torch.isfinite(matrix).all():
        raise BadInputError("The matrix has NaN or infinite values: mend them before quantising.")
    x, columns = matrix, torch.zeros(matrix.shape[1], dtype=torch.bool, device=matrix.device)
    if threshold > 0:
        large = matrix.abs() >= threshold
        columns = large.any(dim=0)
        x = matrix.masked_fill(large, 0)
    absmax = x.abs().amax(dim=1).float()
    factor = torch.where(absmax > 0, 127.0 / absmax, 0.0).unsqueeze(1)
    codes = torch.round(x * factor).to(torch.int8)
    codes[:, columns] = 0
    return Int8Rows(codes, absmax, columns.nonzero().flatten())


def dequantize_rows(q: Int8Rows) -> torch.Tensor:
    """codes · absmax / 127, float32; outlier columns are 0."""
    return q.codes.float() * (q.absmax / 127).unsqueeze(1)


def int8_matmul(x: torch.Tensor, weight: Int8Rows, threshold: float = 6.0) -> torch.Tensor:
    """x Wᵀ for x (tokens, in) and W (out, in) held as int8 rows, float32.

    Products and sums of codes are exact integers. Columns of x with a value of at least `threshold`
    (6.0 in the paper; 0 for none) are multiplied in float32 with the dequantised weight.
    """
    if x.ndim != 2 or x.shape[1] != weight.codes.shape[1]:
        raise BadInputError(
            f"x of {tuple(x.shape)} and a weight of {tuple(weight.codes.shape)} do not multiply."
        )
    q = quantize_rows(x, threshold)
    # float64 holds every integer below 2^53: the sum is the one that int32 hardware would give.
    whole = (q.codes.double() @ weight.codes.double().t()).float()
    y = whole * torch.outer(q.absmax / 127, weight.absmax / 127)
    if q.outliers.numel():
        apart = dequantize_rows(weight)[:, q.outliers]
        y = y + x[:, q.outliers].float() @ apart.t()
    return y
