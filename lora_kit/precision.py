"""Floating-point formats bit by bit: encode, decode, range, spacing, rounding.

A number of a format with E exponent bits, M mantissa bits and bias b, with sign s, exponent field
e and mantissa field m, is

    (-1)^s · 2^(e - b) · (1 + m / 2^M)      for e ≥ 1 (normal)
    (-1)^s · 2^(1 - b) · (m / 2^M)          for e = 0 (subnormal)

and the largest e is kept for infinity (m = 0) and NaN, except in fp8 E4M3, which has no infinity
and gives up one pattern for NaN only. (IEEE 754-2019; OCP 8-bit Floating Point, revision 1.0.)

Everything is done in float64, where each number of these formats is exact, and rounds once, to the
nearest, ties to the even mantissa.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_kit.errors import BadInputError, unknown_name


@dataclass(frozen=True)
class FloatFormat:
    """One floating-point format. `stored_bits`: what a number takes in memory (tf32 takes 32)."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    stored_bits: int
    torch_dtype: torch.dtype | None = None
    has_infinity: bool = True

    @property
    def bits(self) -> int:
        """Sign, exponent and mantissa together."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def largest(self) -> float:
        """The largest finite number."""
        top = 2**self.exponent_bits - (2 if self.has_infinity else 1)
        last = 2**self.mantissa_bits - (1 if self.has_infinity else 2)
        return 2.0 ** (top - self.bias) * (1 + last / 2**self.mantissa_bits)

    @property
    def smallest_normal(self) -> float:
        return 2.0 ** (1 - self.bias)

    @property
    def smallest(self) -> float:
        """The smallest positive (subnormal) number: also the spacing next to zero."""
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    @property
    def epsilon(self) -> float:
        """The gap between 1 and the next number; half of it bounds the relative rounding error."""
        return 2.0**-self.mantissa_bits


FLOAT_FORMATS: dict[str, FloatFormat] = {
    f.name: f
    for f in (
        FloatFormat("fp32", 8, 23, 32, torch.float32),
        FloatFormat("tf32", 8, 10, 32),
        FloatFormat("fp16", 5, 10, 16, torch.float16),
        FloatFormat("bf16", 8, 7, 16, torch.bfloat16),
        FloatFormat("fp8_e4m3", 4, 3, 8, torch.float8_e4m3fn, has_infinity=False),
        FloatFormat("fp8_e5m2", 5, 2, 8, torch.float8_e5m2),
    )
}


def float_format(name: str | FloatFormat) -> FloatFormat:
    """The format called `name`: fp32, tf32, fp16, bf16, fp8_e4m3 or fp8_e5m2.

    Raises:
        UnknownNameError: none such.
    """
    if isinstance(name, FloatFormat):
        return name
    if name not in FLOAT_FORMATS:
        raise unknown_name("number format", name, FLOAT_FORMATS)
    return FLOAT_FORMATS[name]


def spacing(values, format: str | FloatFormat) -> torch.Tensor:
    """The gap between neighbouring numbers of the format around each value, float64.

    2^(floor(log2 |x|) - M), and never less than the smallest subnormal.
    """
    f = float_format(format)
    x = torch.as_tensor(values, dtype=torch.float64)
    # frexp gives |x| = fraction · 2^exponent with fraction in [1/2, 1): one above floor(log2 |x|).
    exponent = torch.frexp(x.abs())[1] - 1
    lowest = 1 - f.bias
    exponent = torch.where(x == 0, lowest, exponent).clamp(min=lowest)
    return torch.ldexp(torch.ones_like(x), exponent - f.mantissa_bits)


def round_to(values, format: str | FloatFormat) -> torch.Tensor:
    """Each value as the nearest number of the format, in float64.

    What rounds beyond the largest number becomes infinite; fp8 E4M3, which has no infinity,
    saturates at ±448 (as torch 2.13 does, infinities included; before, it gave NaN).
    """
    f = float_format(format)
    x = torch.as_tensor(values, dtype=torch.float64)
    step = spacing(torch.where(torch.isfinite(x), x, 0.0), f)
    rounded = torch.round(x / step) * step  # both exact; torch.round takes ties to even
    over = rounded.abs() > f.largest
    beyond = torch.inf if f.has_infinity else f.largest
    return torch.where(over, torch.copysign(torch.full_like(x, beyond), x), rounded)


def encode(values, format: str | FloatFormat) -> torch.Tensor:
    """The bit pattern of each value, rounded to the format first, as int64.

    NaN becomes the format's quiet NaN with a clear sign.
    """
    f = float_format(format)
    x = round_to(values, f)
    finite = torch.where(torch.isfinite(x), x, 0.0)
    step = spacing(finite, f)
    # |x| / step counts mantissa steps: from 2^M for a normal number, below it for a subnormal one.
    steps = (finite.abs() / step).long()
    exponent = torch.frexp(step)[1] - 1 + f.mantissa_bits + f.bias
    field = torch.where(steps >= 2**f.mantissa_bits, exponent, 0).long()
    mantissa = steps % 2**f.mantissa_bits
    pattern = field << f.mantissa_bits | mantissa
    special = (2**f.exponent_bits - 1) << f.mantissa_bits
    quiet = special | (2 ** (f.mantissa_bits - 1) if f.has_infinity else 2**f.mantissa_bits - 1)
    pattern = torch.where(torch.isinf(x), special, pattern)
    sign = torch.signbit(x).long() << (f.bits - 1)
    return torch.where(torch.isnan(x), quiet, pattern | sign)


def fields(patterns, format: str | FloatFormat) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sign, exponent field, mantissa field) of each bit pattern.

    Raises:
        BadInputError: a pattern that does not fit the format's bits.
    """
    f = float_format(format)
    p = torch.as_tensor(patterns, dtype=torch.int64)
    if p.numel() and (p.min() < 0 or p.max() >= 2**f.bits):
        raise BadInputError(f"A {f.name} pattern has {f.bits} bits: 0 to {2**f.bits - 1}.")
    exponent = p >> f.mantissa_bits & (2**f.exponent_bits - 1)
    return p >> (f.bits - 1), exponent, p & (2**f.mantissa_bits - 1)


def decode(patterns, format: str | FloatFormat) -> torch.Tensor:
    """The number each bit pattern stands for, float64 (exact)."""
    f = float_format(format)
    sign, e, m = fields(patterns, f)
    normal = e > 0
    steps = (m + torch.where(normal, 2**f.mantissa_bits, 0)).double()
    value = torch.ldexp(steps, torch.where(normal, e, 1) - f.bias - f.mantissa_bits)
    last = e == 2**f.exponent_bits - 1
    if f.has_infinity:
        value = torch.where(last, torch.where(m == 0, torch.inf, torch.nan), value)
    else:
        value = torch.where(last & (m == 2**f.mantissa_bits - 1), torch.nan, value)
    return torch.where(sign == 1, -value, value)


def bit_string(value: float, format: str | FloatFormat) -> str:
    """A value's bits as 'sign exponent mantissa', e.g. 1.5 in fp16: '0 01111 1000000000'."""
    f = float_format(format)
    text = format_binary(int(encode(value, f)), f.bits)
    return f"{text[0]} {text[1 : 1 + f.exponent_bits]} {text[1 + f.exponent_bits :]}"


def format_binary(pattern: int, bits: int) -> str:
    """A whole number as `bits` binary digits."""
    return f"{pattern:0{bits}b}"
