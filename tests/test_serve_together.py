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
from lora_kit.serve.together import Left, Together, lay_together


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
        mixed = MixedLora(model, masked=True, joined=True)
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
    mixed = MixedLora(model, masked=True, joined=True)
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
    MixedLora(model, masked=True, joined=True)
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
    calls, left = [], Left()

    def forward(together, path, x):
        parts = left.of(together, x, None)
        if path not in parts:
            calls.append(path)
            parts = left.keep(together, x, None, together.product(x))
        return parts.pop(path)

    (together,) = lay_together(layers, forward)
    return layers, together, calls, left


@torch.no_grad()
def test_a_product_serves_each_layer_once():
    layers, together, calls, left = pair(bias=True)
    q, k = layers.values()
    x = torch.randn(3, 8)

    def expected(layer):
        return nn.functional.linear(x, layer.weight, layer.bias)

    torch.testing.assert_close(q(x), expected(q))
    torch.testing.assert_close(k(x), expected(k))
    assert calls == ["x.q_proj"]
    assert left.of(together, x, None) == {}  # and keeps nothing
    q(x)
    q.weight.add_(1)  # a change in place is seen by both
    torch.testing.assert_close(q(x), expected(q))
    torch.testing.assert_close(q(x.clone()), expected(q))
    assert calls == ["x.q_proj"] * 4
    assert together.current
    q.bias = nn.Parameter(q.bias + 1)
    assert not together.current


@torch.no_grad()
def test_a_product_is_the_threads_own():
    layers, _, calls, _ = pair()
    q, k = layers.values()
    x = torch.randn(2, 8)
    q(x)
    thread = threading.Thread(target=torch.no_grad()(k), args=(x,))
    thread.start()
    thread.join()
    assert calls == ["x.q_proj", "x.k_proj"]
    k(x)
    assert len(calls) == 2


def test_parted_layers_share_nothing_whichever_was_replaced():
    layers, together, _, _ = pair(bias=True)
    q, k = layers.values()
    q.weight = nn.Parameter(q.weight.detach() + 1)
    before = k.weight.detach().clone(), q.bias.detach().clone()
    with torch.inference_mode():
        together.part()
    assert torch.equal(k.weight, before[0])
    assert torch.equal(q.bias, before[1])
    for tensor in (k.weight, k.bias, q.bias):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    (k(torch.randn(2, 8)).sum() + q(torch.randn(2, 8)).sum()).backward()  # no inference tensors


def test_nothing_stays_of_a_pass_that_fails(monkeypatch):
    model = llama()
    mixed = MixedLora(model, masked=True, joined=True)
    monkeypatch.setattr(model.model.layers[0].mlp.act_fn, "forward", lambda x: 1 / 0)
    with torch.inference_mode(), pytest.raises(ZeroDivisionError), mixed.rows([None] * 3):
        model(ids())
    assert not hasattr(mixed._left._now, "kept")


def test_what_was_set_up_halfway_is_taken_down(monkeypatch):
    def fails(*_, **__):
        raise MemoryError

    model = llama()
    monkeypatch.setattr("lora_kit.serve.mixed.packed_linears", fails)
    with pytest.raises(MemoryError):
        MixedLora(model, masked=True, joined=True)
    monkeypatch.undo()
    assert not any("forward" in m.__dict__ or m._forward_hooks for m in model.modules())
    assert MixedLora(model, masked=True, joined=True).layers


def test_a_weight_put_in_its_place_is_used(products, tmp_path):
    model = llama()
    mixed = MixedLora(model, masked=True, joined=True)
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
        assert not list(lay_together({"x.q_proj": a, "x.k_proj": other}, None))
    assert not list(lay_together({"x.q_proj": a, "y.k_proj": b}, None))
    assert not list(lay_together({"x.o_proj": a, "x.k_proj": b}, None))
    assert "forward" not in a.__dict__
