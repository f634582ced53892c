"""int8 by row against bitsandbytes, and what the outlier split is for."""

from __future__ import annotations

import pytest
import torch

from lora_kit.errors import BadInputError
from lora_kit.int8_rows import dequantize_rows, int8_matmul, quantize_rows

bnb = pytest.importorskip("bitsandbytes.functional")


def matrix(rows=33, columns=128, outliers=(), seed=0):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    for column in outliers:
        x[::3, column] *= 30
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threshold", [0.0, 3.0, 6.0])
def test_codes_equal_bitsandbytes(threshold, dtype):
    x = matrix(outliers=(7, 90)).to(dtype)
    codes, absmax, columns = bnb.int8_vectorwise_quant(x.clone(), threshold)
    ours = quantize_rows(x, threshold)
    assert torch.equal(codes, ours.codes)
    assert torch.equal(absmax, ours.absmax)
    if threshold:
        assert columns.tolist() == ours.outliers.tolist()


def test_error_is_at_most_half_a_step():
    x = matrix()
    q = quantize_rows(x)
    assert ((dequantize_rows(q) - x).abs() <= q.absmax.unsqueeze(1) / 254 * 1.0001).all()
    assert q.nbytes == 33 * 128 + 4 * 33


def test_product_is_near_and_the_split_saves_it_from_outliers():
    weight = matrix(64, 128, seed=1)
    held = quantize_rows(weight)
    for outliers, least_gain in (((), 0.9), ((7, 90), 2.0)):
        x = matrix(outliers=outliers)
        want = x @ weight.t()
        gap = [(int8_matmul(x, held, t) - want).norm() / want.norm() for t in (0.0, 6.0)]
        assert gap[1] < 0.015
        assert gap[0] / gap[1] > least_gain


def test_rows_of_zeros_stay_zero():
    x = matrix()
    x[3] = 0
    assert torch.equal(dequantize_rows(quantize_rows(x))[3], torch.zeros(128))


@pytest.mark.parametrize(
    ("x", "threshold", "words"),
    [
        (torch.zeros(3), 0.0, "matrix"),
        (torch.zeros(3, 3, dtype=torch.int32), 0.0, "int32"),
        (torch.zeros(0, 3), 0.0, "matrix"),
        (torch.full((2, 2), torch.nan), 0.0, "NaN"),
        (torch.ones(2, 2), -1.0, "threshold"),
    ],
)
def test_bad_input_is_named(x, threshold, words):
    with pytest.raises(BadInputError, match=words):
        quantize_rows(x, threshold)


def test_sizes_that_do_not_multiply_are_refused():
    with pytest.raises(BadInputError, match="do not multiply"):
        int8_matmul(torch.ones(2, 3), quantize_rows(torch.ones(2, 4)))
