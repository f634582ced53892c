"""The tables: derived, and equal to bitsandbytes' own."""

from __future__ import annotations

import itertools
from statistics import NormalDist

import pytest
import torch

from lora_kit.codebooks import (
    BITS,
    NF4,
    NF4_OFFSET,
    codebook,
    decision_bounds,
    derive_fp4,
    derive_nf4,
    dynamic_tree,
    nf4_offset,
)
from lora_kit.errors import UnknownNameError

bnb = pytest.importorskip("bitsandbytes.functional")


def test_nf4_is_derived_from_normal_quantiles():
    derived = torch.tensor(derive_nf4(), dtype=torch.float64)
    assert (derived - torch.tensor(NF4, dtype=torch.float64)).abs().max() <= 1e-7
    assert nf4_offset() == pytest.approx(NF4_OFFSET, abs=5e-8)
    assert derived.tolist() == sorted(derived.tolist())
    assert 0.0 in derived.tolist()


def test_nf4_levels_hold_nearly_equal_mass():
    # Each side's levels are quantiles: the probability between neighbours is the same throughout.
    sigma = 1 / NormalDist().inv_cdf(NF4_OFFSET)
    cdf = [NormalDist(0, sigma).cdf(v) for v in derive_nf4()]
    steps = [b - a for a, b in itertools.pairwise(cdf)]
    # Levels stand at ±1 for Q(p): 7 equal steps below zero, 8 above.
    assert steps[:7] == pytest.approx([steps[0]] * 7, rel=1e-4)
    assert steps[7:] == pytest.approx([steps[7]] * 8, rel=1e-4)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_four_bit_tables_equal_bitsandbytes(name):
    assert torch.equal(codebook(name), bnb.get_4bit_type(name, device="cpu"))


def test_derived_nf4_equals_bitsandbytes_own_derivation():
    pytest.importorskip("scipy")
    theirs = bnb.create_normal_map()
    theirs = torch.cat([theirs[:7], torch.zeros(1), theirs[-8:]])
    assert (torch.tensor(derive_nf4()) - theirs).abs().max() <= 1e-7


def test_fp4_is_the_float_type_that_bitsandbytes_generates_but_for_the_subnormal():
    theirs = bnb.create_fp8_map(signed=True, exponent_bits=2, precision_bits=1, total_bits=4)
    theirs, ours = theirs.unique(), torch.tensor(derive_fp4()).unique()
    same = (theirs - ours).abs() < 1e-7
    # The table in use has 1/16 of a unit (0.0052) where the generator gives 1/4 (0.0208).
    assert ours[~same].tolist() == pytest.approx([-1 / 192, 1 / 192])
    assert theirs[~same].tolist() == pytest.approx([-1 / 48, 1 / 48])


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_tree_equals_bitsandbytes(signed):
    assert torch.equal(dynamic_tree(signed), bnb.create_dynamic_map(signed=signed))


def test_linear_table_equals_bitsandbytes():
    assert torch.equal(codebook("int8"), bnb.create_linear_map())


@pytest.mark.parametrize("name", sorted(BITS))
def test_tables_lie_in_minus_one_to_one_and_hold_zero(name):
    table = codebook(name)
    assert table.numel() == 2 ** BITS[name]
    assert table.max() == 1
    assert table.min() >= -1
    assert (table == 0).any()


@pytest.mark.parametrize("name", sorted(BITS))
def test_bounds_ascend_and_order_is_a_permutation(name):
    bounds, order = decision_bounds(name)
    assert bounds.numel() == codebook(name).numel() - 1
    assert (bounds[1:] >= bounds[:-1]).all()
    assert order.long().sort().values.tolist() == list(range(codebook(name).numel()))


def test_unknown_format_is_refused_with_the_nearest():
    with pytest.raises(UnknownNameError, match="nf4"):
        codebook("nf5")
    with pytest.raises(UnknownNameError, match="int8"):
        decision_bounds("int9")
