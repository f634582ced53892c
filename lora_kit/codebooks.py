"""The tables of values a code can stand for: NF4, FP4, int4, int8 and the dynamic 8-bit tree.

A block-wise quantiser divides a block of weights by its largest magnitude, so that every value lies
in [-1, 1], and keeps for each the index of a nearby entry of one table, the *codebook*. All formats
here differ in nothing but that table.

Sources: NF4 and double quantisation, QLoRA (Dettmers et al. 2023, section 3 and appendix E); the
dynamic tree, 8-bit Optimizers via Block-wise Quantization (Dettmers et al. 2021, section 1.3, after
Dettmers 2015).
"""

from __future__ import annotations

from functools import lru_cache
from statistics import NormalDist

import torch

from lora_kit.errors import unknown_name

# As published with QLoRA; `derive_nf4` shows where the numbers come from.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

BITS = {"nf4": 4, "fp4": 4, "int4": 4, "int8": 8, "dynamic8": 8, "dynamic8_unsigned": 8}
FORMATS = ("nf4", "fp4", "int4", "int8", "dynamic8")


# The outermost quantile as QLoRA's code writes it; `nf4_offset` says where it comes from.
NF4_OFFSET = 0.9677083


def nf4_offset() -> float:
    """The outermost quantile of NF4: 1 - (1/32 + 1/30) / 2 = 0.967708333…

    The quantiles 0 and 1 of a normal distribution are infinite, so the outer levels must stand a
    little inside. Sixteen levels leave 1/(2·16) of the mass beyond the last one, fifteen levels
    1/(2·15); NF4, asymmetric around its zero, takes the mean of the two.
    """
    return 1.0 - 0.5 * (1 / 32 + 1 / 30)


def derive_nf4(offset: float = NF4_OFFSET) -> list[float]:
    """NF4's 16 levels from the quantile function of N(0, 1), ascending, in [-1, 1].

    With p = `offset` and Q the normal quantile function, the positive levels are Q at 8 evenly
    spaced probabilities from 0.5 (excluded) to p, the negative ones -Q at 7 such, and zero is a
    level of its own; all are divided by Q(p). Sixteen levels with an exact zero cannot be
    symmetric: the positive side has one more. (QLoRA, section 3 and equation 4.)

    The probabilities are spaced in single precision, as they were for the published table.
    """
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in torch.linspace(offset, 0.5, 9)[:-1].tolist()]
    negative = [-quantile(p) for p in torch.linspace(offset, 0.5, 8)[:-1].tolist()]
    return [v / positive[0] for v in sorted([*negative, 0.0, *positive])]


def derive_fp4() -> list[float]:
    """FP4's 16 values in order of their bit patterns (sign, two of exponent, one of mantissa).

    The exponent field e counts *down*: e = 1, 2, 3 stand for 2², 2¹, 2⁰ and the value is
    2^(3-e)·(1 + m/2)·2; e = 0 is subnormal, 0 or 1/16. Divided by the largest value, 12. The sign
    bit (8) gives the negatives, so that patterns 0 and 8 are both zero.
    """
    magnitudes = [0.0, 1 / 16]
    for exponent in (1, 2, 3):
        magnitudes += [2.0 ** (4 - exponent) * (1 + mantissa / 2) for mantissa in (0, 1)]
    return [m / 12 for m in magnitudes] + [-m / 12 for m in magnitudes]


def dynamic_tree(signed: bool = True, exponent_bits: int = 7) -> torch.Tensor:
    """The 256 values of the 8-bit dynamic tree type, ascending, float32.

    After the sign, leading zeros count powers of ten and the bits left over are a linear fraction
    in [0.1, 1): value = ±10^(-zeros)·fraction. Few zeros leave many fraction bits (large values,
    fine steps), many zeros leave few (values down to 1e-7, coarse steps). The unsigned form, for
    Adam's second moment, spends the sign bit on one more fraction bit. (Dettmers et al. 2021.)
    """
    values: list[float] = []
    for i in range(exponent_bits):
        edges = torch.linspace(0.1, 1.0, 2 ** (i + (0 if signed else 1)) + 1)
        middles = (edges[:-1] + edges[1:]) / 2.0
        scaled = 10 ** (i - exponent_bits + 1) * middles
        values += scaled.tolist()
        if signed:
            values += (-scaled).tolist()
    return torch.tensor(sorted([*values, 0.0, 1.0]), dtype=torch.float32)


def linear_8bit() -> torch.Tensor:
    """k/127 for k = -127 … 127, ascending, float32, with one more zero to make 256 entries.

    Of the two zeros the second is 5e-9, as torch.linspace computes it; bitsandbytes' table has it.
    """
    steps = torch.linspace(-1.0, 1.0, 255)
    return torch.cat([steps[:127], torch.zeros(1), steps[127:]])


@lru_cache(maxsize=64)
def _codebook_on(name: str, device: torch.device) -> torch.Tensor:
    if name == "nf4":
        table = torch.tensor(NF4)
    elif name == "fp4":
        table = torch.tensor(derive_fp4())
    elif name == "int4":
        # -7 … 7: a symmetric absmax quantiser leaves the sixteenth pattern unused.
        table = torch.tensor([k / 7 for k in range(-7, 8)] + [1.0])
    elif name == "int8":
        table = linear_8bit()
    else:
        table = dynamic_tree(signed=name == "dynamic8")
    return table.to(device)


def codebook(name: str, device: torch.device | str = "cpu") -> torch.Tensor:
    """The table of `name`: 16 or 256 float32 values, entry i being what code i stands for.

    NF4, int4 and the 8-bit tables ascend; FP4's is in the order of its bit patterns.

    Raises:
        UnknownNameError: no such format.
    """
    if name not in BITS:
        raise unknown_name("quantisation format", name, BITS)
    return _codebook_on(name, torch.device(device))


@lru_cache(maxsize=64)
def _sorted_on(name: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    table = _codebook_on(name, torch.device("cpu"))
    # Stable: of FP4's two zeros, pattern 0 comes before pattern 8, on every device.
    order = torch.argsort(table, stable=True)
    ascending = table[order]
    bounds = (ascending[:-1] + ascending[1:]) / 2
    return bounds.to(device), order.to(device=device, dtype=torch.uint8)


def decision_bounds(name: str, device: torch.device | str = "cpu"):
    """(bounds, order): the 15 or 255 midpoints between neighbouring levels, and each rank's code.

    A value v in [-1, 1] has rank #{bounds < v} and code order[rank]; a value on a bound goes to the
    lower level.
    """
    codebook(name)
    return _sorted_on(name, torch.device(device))
