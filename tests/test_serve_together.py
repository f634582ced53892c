"""Layers multiplied as one: the same answers, and the model as it was afterwards."""

import threading

import pytest
import torch
from serve_models import llama, make_adapter
from torch import nn

from lora_kit.linear4bit import NF4Linear
from lora_kit.lora import read_adapter
from lora_kit.lora_targets import linear_layers
from lora_kit.serve.mixed import MixedLora
from lora_kit.serve.together import Together, lay_together


def biased(seed=0):
    model = llama(seed, attention_bias=True, mlp_bias=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in linear_layers(model).values():
            if layer.bias is not None:
                layer.bias.normal_(generator=generator)
    return model


def ids(rows=3, tokens=5):
    return torch.randint(64, (rows, tokens), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def products(monkeypatch):
    """The sites multiplied, as they come."""
    made, product = [], Together.product

    def counted(self, x):
        made.append(self.site)
        return product(self, x)

    monkeypatch.setattr(Together, "product", counted)
    return made


@pytest.mark.parametrize("build", [llama, biased])
def test_one_product_for_each_input(build, products, tmp_path):
    model = build()
    names = ["a", None, "b"]
    with torch.inference_mode():
        bare = model(ids()).logits
        mixed = MixedLora(model, masked=True)
        for seed, (name, rank, targets) in enumerate(
            (("a", 4, "all"), ("b", 2, ["q_proj", "v_proj"]))
        ):
            folder = make_adapter(tmp_path / name, rank, targets, seed, model=build)
            mixed.put(name, mixed.factors(read_adapter(folder)))
        with mixed.rows([None] * 3):
            joined = model(ids()).logits
        assert len(products) == len(set(products)) == 2 * model.config.num_hidden_layers
        torch.testing.assert_close(joined, bare, atol=1e-5, rtol=1e-5)
        gathered = MixedLora(build(), masked=False)
        for name in ("a", "b"):
            gathered.put(name, gathered.factors(read_adapter(tmp_path / name)))
        with mixed.rows(names), gathered.rows(names):
            ours, expected = mixed.model(ids()).logits, gathered.model(ids()).logits
    assert not torch.allclose(ours[0], bare[0], atol=1e-2)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_the_model_keeps_its_weights(products):
    model, fresh = biased(), biased()
    names = [n for n, _ in model.named_parameters()]
    mixed = MixedLora(model, masked=True)
    q, k = (model.model.layers[0].self_attn.get_submodule(n) for n in ("q_proj", "k_proj"))
    assert q.weight.untyped_storage().data_ptr() == k.weight.untyped_storage().data_ptr()
    mixed.close()
    assert q.weight.untyped_storage().data_ptr() != k.weight.untyped_storage().data_ptr()
    assert [n for n, _ in model.named_parameters()] == names
    for (name, mine), theirs in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
        assert mine.untyped_storage().nbytes() == mine.nbytes
    assert not any("forward" in m.__dict__ for m in model.modules())
    with torch.inference_mode():
        assert torch.equal(model(ids()).logits, fresh(ids()).logits)
    assert products == []


def test_training_outside_of_rows_goes_through_the_layers(products):
    model, fresh = llama(), llama()
    MixedLora(model, masked=True)
    for each in (model, fresh):
        each(ids()).logits.square().mean().backward()
    assert products == []
    for mine, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def pair(bias=False):
    torch.manual_seed(0)
    layers = {
        "x.q_proj": nn.Linear(8, 6, bias=bias),
        "x.k_proj": nn.Linear(8, 4, bias=bias),
    }
    calls = []

    def forward(together, path, x):
        parts = together.left(x, None)
        if path not in parts:
            calls.append(path)
            parts = together.keep(x, None, together.product(x))
        return parts.pop(path)

    return layers, lay_together(layers, forward), calls


@torch.no_grad()
def test_a_product_serves_each_layer_once():
    layers, (together,), calls = pair(bias=True)
    q, k = layers.values()
    x = torch.randn(3, 8)

    def expected(layer):
        return nn.functional.linear(x, layer.weight, layer.bias)

    torch.testing.assert_close(q(x), expected(q))
    torch.testing.assert_close(k(x), expected(k))
    assert calls == ["x.q_proj"]
    assert together.left(x, None) == {}  # and keeps nothing
    q(x)
    q.weight.add_(1)  # a change in place is seen by both
    torch.testing.assert_close(q(x), expected(q))
    torch.testing.assert_close(q(x.clone()), expected(q))
    assert calls == ["x.q_proj"] * 4
    assert together.current
    q.weight = nn.Parameter(q.weight + 1)
    assert not together.current


@torch.no_grad()
def test_a_product_is_the_threads_own():
    layers, _, calls = pair()
    q, k = layers.values()
    x = torch.randn(2, 8)
    q(x)
    thread = threading.Thread(target=torch.no_grad()(k), args=(x,))
    thread.start()
    thread.join()
    assert calls == ["x.q_proj", "x.k_proj"]
    k(x)
    assert len(calls) == 2


def test_a_weight_put_in_its_place_is_used(products, tmp_path):
    model = llama()
    mixed = MixedLora(model, masked=True)
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))
    with torch.inference_mode():
        outside = model(ids()).logits
        with mixed.rows([None] * 3):
            torch.testing.assert_close(model(ids()).logits, outside, atol=1e-5, rtol=1e-5)
    assert "model.layers.0.mlp:gate_proj" not in products
    assert "model.layers.1.mlp:gate_proj" in products


def test_what_is_not_alike_stays_apart():
    a, b, tied = nn.Linear(8, 6), nn.Linear(8, 4), nn.Linear(8, 6)
    tied.weight = a.weight
    own = nn.Linear(8, 4)
    own.forward = lambda x: x
    for other in (
        nn.Linear(8, 4, bias=False),
        nn.Linear(8, 4).half(),
        NF4Linear.from_linear(nn.Linear(64, 4)),
        own,
        tied,
    ):
        assert lay_together({"x.q_proj": a, "x.k_proj": other}, None) == []
    assert lay_together({"x.q_proj": a, "y.k_proj": b}, None) == []
    assert lay_together({"x.o_proj": a, "x.k_proj": b}, None) == []
    assert "forward" not in a.__dict__
