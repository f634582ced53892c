"""Packed linear layers: the same products, used where they pay, and gone afterwards."""

import pytest
import torch
from lora_fixtures import tiny_llama
from torch import nn

from lora_kit import packed_linear
from lora_kit.packed_linear import TOKENS_FROM, packed_linears, packed_speed


@pytest.fixture(autouse=True)
def pays(monkeypatch):
    """As on a machine where packing pays."""
    if packed_speed() == 0:
        pytest.skip("this build of torch has no packed linear layer")
    monkeypatch.setattr(packed_linear, "packed_speed", lambda: 2.0)


def forwards(model):
    return [m for m in model.modules() if "forward" in m.__dict__]


@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_the_layer(rows, bias):
    torch.manual_seed(0)
    layer = nn.Linear(96, 160, bias=bias)
    with torch.no_grad():
        for shape in ((rows, 96), (2, rows, 96)):
            x = torch.randn(shape)
            with packed_linears(layer, tokens=TOKENS_FROM) as count:
                packed = layer(x)
            assert count == 1
            torch.testing.assert_close(packed, layer(x), atol=1e-5, rtol=1e-5)


def test_a_model_says_the_same_and_is_itself_again(monkeypatch):
    used, product = [], packed_linear._product

    def counted(*given):
        used.append(1)
        return product(*given)

    monkeypatch.setattr(packed_linear, "_product", counted)
    model = tiny_llama(initializer_range=0.2).eval()
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        plain = model(ids).logits
        with packed_linears(model, tokens=TOKENS_FROM) as count:
            assert count == len(forwards(model)) == 2 * 7 + 1
            packed = model(ids).logits
        assert len(used) == count
        torch.testing.assert_close(packed, plain, atol=1e-4, rtol=1e-4)
        assert forwards(model) == []
        assert torch.equal(model(ids).logits, plain)
        with pytest.raises(RuntimeError), packed_linears(model, tokens=TOKENS_FROM):
            raise RuntimeError
    assert forwards(model) == []


def test_what_does_not_pay_is_left_alone(monkeypatch):
    layer = nn.Linear(8, 8)
    for model, tokens in (
        (layer, TOKENS_FROM - 1),
        (nn.Linear(8, 8).to(torch.bfloat16), TOKENS_FROM),
        (nn.Linear(8, 8, device="meta"), TOKENS_FROM),
    ):
        with packed_linears(model, tokens=tokens) as count:
            assert (count, forwards(model)) == (0, [])
    monkeypatch.setattr(packed_linear, "packed_speed", lambda: 1.1)
    with packed_linears(layer, tokens=TOKENS_FROM) as count:
        assert count == 0
    monkeypatch.setattr(packed_linear, "packed_speed", lambda: 2.0)
    from types import SimpleNamespace

    monkeypatch.setattr(packed_linear, "detect", lambda: SimpleNamespace(memory_free=100))
    with packed_linears(layer, tokens=TOKENS_FROM) as count:
        assert count == 0


def test_another_librarys_forward_and_other_layers_are_left_alone():
    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = nn.Sequential(nn.Linear(8, 8), Odd(8, 8), nn.Linear(8, 8))
    model[2].forward = lambda x: x
    with packed_linears(model, tokens=TOKENS_FROM) as count:
        assert count == 1
    assert forwards(model) == [model[2]]


def test_a_build_of_torch_without_it(monkeypatch):
    def missing(_):
        raise AttributeError("no such operator")

    monkeypatch.setattr(packed_linear, "_pack", missing)
    packed_speed.cache_clear()
    try:
        assert packed_speed() == 0.0
    finally:
        packed_speed.cache_clear()


def test_it_can_be_asked_each_time(monkeypatch):
    torch.manual_seed(0)
    layer, x, asked = nn.Linear(96, 160), torch.randn(4, 96), []
    product = packed_linear._product
    used = []
    monkeypatch.setattr(packed_linear, "_product", lambda *given: used.append(1) or product(*given))
    with torch.no_grad():
        plain = layer(x)
        with packed_linears(layer, tokens=TOKENS_FROM, when=lambda: bool(asked)):
            assert torch.equal(layer(x), plain)
            assert used == []
            asked.append(1)
            torch.testing.assert_close(layer(x), plain)
            assert used == [1]


def test_a_weight_that_is_no_longer_the_packed_one_is_not_used():
    torch.manual_seed(0)
    layer, x = nn.Linear(96, 160), torch.randn(4, 96)
    with torch.no_grad(), packed_linears(layer, tokens=TOKENS_FROM, when=lambda: True):
        kept, before = layer.weight.data, layer(x)
        layer.weight.data = kept + 1
        torch.testing.assert_close(layer(x), x @ (kept + 1).T + layer.bias)
        layer.weight.data = kept  # the packed one again
        assert torch.equal(layer(x), before)
        layer.weight.add_(1)
        torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias)
        layer.weight.sub_(1)
        assert not torch.equal(layer.bias, torch.zeros(160))
        layer.bias = nn.Parameter(torch.zeros(160))
        torch.testing.assert_close(layer(x), x @ layer.weight.T)
        layer.weight = nn.Parameter(torch.randn_like(kept))
        torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias)
