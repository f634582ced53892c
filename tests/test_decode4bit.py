"""The fast decoder gives `dequantize`'s bits, whatever it is asked and whatever is installed."""

from __future__ import annotations

import itertools

import pytest
import torch

import lora_kit.decode4bit as module
from lora_kit.decode4bit import KERNEL_BLOCKS, decode, kernel_is_right
from lora_kit.linear4bit import NF4Linear
from lora_kit.quantize import dequantize, quantize

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((64, 96), (7, 576), (33, 131), (4097,), (5, 7, 128), (1, 2048), (256, 1))


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32 if x.element_size() == 4 else torch.int16)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("format", ["nf4", "fp4", "int4", "int8"])
def test_the_same_bits_for_every_shape_block_and_dtype(format, double):
    """(64, 96) in blocks of 64 is where bitsandbytes' own entry point returns wrong values."""
    for shape, block_size, made, wanted in itertools.product(
        SHAPES, (32, 64, 2048), DTYPES, DTYPES
    ):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(made)
        if weight.numel() >= block_size:
            q = quantize(weight, format, block_size, double)
            got = decode(q, wanted)
            assert got.shape == weight.shape
            assert torch.equal(bits(got), bits(dequantize(q, wanted)))
            assert torch.equal(bits(decode(q)), bits(dequantize(q)))


def test_the_kernel_is_used_where_it_is_right(monkeypatch):
    pytest.importorskip("bitsandbytes")
    cases = list(itertools.product(KERNEL_BLOCKS, (False, True), DTYPES))
    if not all(kernel_is_right(*case) for case in cases):
        pytest.skip("bitsandbytes' kernel is not right on this processor: dequantize is used")
    monkeypatch.setattr(module, "dequantize", None)  # calling it would fail
    q = quantize(torch.randn(64, 96), "nf4", 64, True)
    assert decode(q).shape == (64, 96)


def test_a_kernel_that_is_wrong_is_not_used(monkeypatch):
    right = module._by_kernel
    monkeypatch.setattr(module, "_by_kernel", lambda q, dtype: right(q, dtype) * (1 + 2**-20))
    kernel_is_right.cache_clear()
    try:
        q = quantize(torch.randn(64, 96), "nf4", 64, True)
        assert not kernel_is_right(64, True, torch.float32)
        assert torch.equal(decode(q), dequantize(q))
    finally:
        kernel_is_right.cache_clear()


def test_without_bitsandbytes_the_numbers_are_the_same(monkeypatch):
    q = quantize(torch.randn(64, 96), "nf4", 64, True)
    before = decode(q)
    monkeypatch.setattr(module, "_bitsandbytes", lambda: None)
    kernel_is_right.cache_clear()
    try:
        assert not kernel_is_right(64, True, torch.float32)
        assert torch.equal(decode(q), before)
    finally:
        kernel_is_right.cache_clear()


@pytest.mark.parametrize("made", DTYPES)
@pytest.mark.parametrize("wanted", [*DTYPES, torch.float64])
def test_a_layer_rounds_as_often_as_its_weight_was_stored(made, wanted):
    """A bfloat16 weight asked for in float32 is still a bfloat16 number."""
    layer = NF4Linear.from_linear(torch.nn.Linear(64, 32).to(made))
    expected = dequantize(layer.quantized_weight).to(wanted)
    assert torch.equal(layer.dequantized_weight(wanted), expected)
