"""Our formats against torch's own casts, on every pattern where there are few enough."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kit.errors import BadInputError, UnknownNameError
from lora_kit.precision import (
    FLOAT_FORMATS,
    bit_string,
    decode,
    encode,
    fields,
    float_format,
    round_to,
    spacing,
)

CASTABLE = [n for n, f in FLOAT_FORMATS.items() if f.torch_dtype is not None]
SMALL = [n for n in CASTABLE if FLOAT_FORMATS[n].bits <= 16]
INTS = {8: torch.uint8, 16: torch.int16}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit, but that any NaN equals any NaN."""
    a, b = a.double(), b.double()
    nan = a.isnan() & b.isnan()
    return bool((nan | ((a == b) & (torch.signbit(a) == torch.signbit(b)))).all())


def all_patterns(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(patterns 0 … 2^bits - 1, the same bits seen by torch as numbers of the format)."""
    f = FLOAT_FORMATS[name]
    patterns = torch.arange(2**f.bits)
    return patterns, patterns.to(INTS[f.bits]).view(f.torch_dtype)


@pytest.mark.parametrize("name", SMALL)
def test_decode_equals_torch_on_every_pattern(name):
    patterns, numbers = all_patterns(name)
    assert same(decode(patterns, name), numbers.double())


@pytest.mark.parametrize("name", SMALL)
def test_encode_undoes_decode_on_every_pattern(name):
    patterns, numbers = all_patterns(name)
    finite = ~numbers.double().isnan()
    assert torch.equal(encode(numbers.double(), name)[finite], patterns[finite])
    again = decode(encode(numbers.double(), name), name)
    assert again.isnan().equal(~finite)


@pytest.mark.parametrize("name", SMALL)
def test_midpoints_and_their_neighbours_round_as_torch_does(name):
    f = FLOAT_FORMATS[name]
    _, numbers = all_patterns(name)
    line = numbers.double()
    line = line[line.isfinite()].unique()
    beyond = torch.tensor([f.largest * k for k in (1.01, 1.07, 1.2, 2.0)])
    values = torch.cat([(line[1:] + line[:-1]) / 2, line, beyond, -beyond]).float()
    inf = torch.tensor(torch.inf)
    values = torch.cat([values, torch.nextafter(values, inf), torch.nextafter(values, -inf)])
    assert same(round_to(values, name), values.to(f.torch_dtype))


@pytest.mark.parametrize("name", CASTABLE)
def test_random_numbers_of_all_sizes_round_as_torch_does(name):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator, dtype=torch.int64)
    values = bits.to(torch.int32).view(torch.float32)
    cast = values.to(FLOAT_FORMATS[name].torch_dtype)
    assert same(round_to(values, name), cast)


@given(st.floats(width=64))
@settings(max_examples=300, deadline=None)
def test_any_double_rounds_to_fp32_as_torch_does(value):
    x = torch.tensor([value], dtype=torch.float64)
    assert same(round_to(x, "fp32"), x.float())


def test_tf32_drops_thirteen_mantissa_bits():
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    bits = x.view(torch.int32).long()
    half_even = bits + 0xFFF + (bits >> 13 & 1)
    expected = (half_even & ~0x1FFF).to(torch.int32).view(torch.float32)
    assert same(round_to(x, "tf32"), expected)


@pytest.mark.parametrize("name", CASTABLE)
def test_range_equals_torch_finfo(name):
    f, info = FLOAT_FORMATS[name], torch.finfo(FLOAT_FORMATS[name].torch_dtype)
    assert f.largest == info.max
    assert f.smallest_normal == info.tiny
    assert f.epsilon == info.eps
    assert f.stored_bits == info.bits


@pytest.mark.parametrize("name", SMALL)
def test_spacing_is_the_gap_to_the_next_number(name):
    f = FLOAT_FORMATS[name]
    _, numbers = all_patterns(name)
    line = numbers.double()
    line = line[line.isfinite() & (line >= 0)].unique()
    assert torch.equal(spacing(line[:-1], f), line[1:] - line[:-1])


@pytest.mark.parametrize("name", sorted(FLOAT_FORMATS))
def test_relative_error_is_at_most_half_an_epsilon(name):
    f = FLOAT_FORMATS[name]
    generator = torch.Generator().manual_seed(0)
    x = 2.0 ** torch.empty(4000, dtype=torch.float64).uniform_(-5, 8, generator=generator)
    error = (round_to(x, f) - x).abs() / x
    assert error.max() <= f.epsilon / 2
    assert error.max() > f.epsilon / 8  # the bound is not idle


def test_fields_and_strings():
    assert bit_string(1.5, "fp16") == "0 01111 1000000000"
    assert bit_string(-2.0, "bf16") == "1 10000000 0000000"
    sign, exponent, mantissa = fields(encode(torch.tensor([-0.375]), "fp8_e4m3"), "fp8_e4m3")
    assert (int(sign), int(exponent), int(mantissa)) == (1, 5, 4)


def test_what_overflows_where():
    value = 70_000.0
    assert round_to(value, "fp16").isinf()
    assert round_to(value, "bf16").isfinite()
    assert round_to(500.0, "fp8_e4m3") == 448
    assert round_to(1e-8, "fp16") == 0
    assert round_to(1e-8, "bf16") != 0


def test_unknown_format_and_oversized_pattern_are_refused():
    with pytest.raises(UnknownNameError, match="fp16"):
        float_format("fp61")
    with pytest.raises(BadInputError, match="16 bits"):
        decode(65536, "fp16")
    with pytest.raises(BadInputError, match="8 bits"):
        fields(torch.tensor([-1]), "fp8_e5m2")
