"""LoRA's verbs on small models: what they do, and that a refused call changes nothing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_fixtures import ids, tiny_llama
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_kit.errors import BadInputError, UnknownNameError
from lora_kit.lora import (
    LoRALinear,
    LoraSpec,
    active_adapter,
    adapter_names,
    add_lora,
    count_parameters,
    disable_lora,
    enable_lora,
    lora_layers,
    match_targets,
    merge_lora,
    remove_lora,
    switch_lora,
    unmerge_lora,
)

SPEC = LoraSpec(4, 8)


def logits(model):
    with torch.no_grad():
        return model(ids()).logits


def everything(model):
    """All that a refused call must leave alone: tensors, what trains, modules, what is active."""
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        [p.requires_grad for p in model.parameters()],
        [type(m) for m in model.modules()],
        [(m.active, m.enabled, m.merged, dict(m.specs)) for m in lora_layers(model).values()],
        hasattr(model, "_lora_thawed"),
    )


def refused(model, error, match, action):
    before = everything(model)
    with pytest.raises(error, match=match) as caught:
        action()
    assert "\n" not in str(caught.value)
    after = everything(model)
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(v, after[0][k]) for k, v in before[0].items())
    assert before[1:] == after[1:]


def train_a_little(model, steps=2, name=None):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(ids(), labels=ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


# ---------------------------------------------------------------- add, and what training touches
def test_b_zero_changes_nothing_and_a_step_moves_only_a_and_b():
    model = tiny_llama()
    before = logits(model)
    add_lora(model, SPEC, seed=0)
    assert torch.equal(logits(model), before)
    old = {k: v.clone() for k, v in model.state_dict().items()}
    train_a_little(model, steps=2)  # in the first step only B can move: its partner's gradient is 0
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, old[k])}
    assert moved == {k for k in old if "lora_A" in k or "lora_B" in k}
    assert not torch.equal(logits(model), before)


def test_add_enable_disable_switch_remove_round_trip():
    model = tiny_llama()
    bare, thawed = logits(model), [p.requires_grad for p in model.parameters()]
    add_lora(model, SPEC, "one", seed=0)
    train_a_little(model)
    one = logits(model)
    add_lora(model, LoraSpec(2, 2, "mlp"), "two", seed=1)
    assert adapter_names(model) == ["one", "two"]
    assert active_adapter(model) == "two"
    assert torch.equal(logits(model), bare)  # the new one is all zero in B
    train_a_little(model)
    two = logits(model)
    switch_lora(model, "one")
    assert torch.equal(logits(model), one)  # training "two" left "one" alone
    with disable_lora(model):
        assert torch.equal(logits(model), bare)
        with enable_lora(model):
            assert torch.equal(logits(model), one)
        assert torch.equal(logits(model), bare)
    switch_lora(model, None)
    assert torch.equal(logits(model), bare)
    switch_lora(model, "two")
    remove_lora(model, "one")
    assert torch.equal(logits(model), two)
    assert len(lora_layers(model)) == 6  # attention layers are bare again
    remove_lora(model)
    assert not lora_layers(model)
    assert torch.equal(logits(model), bare)
    assert [p.requires_grad for p in model.parameters()] == thawed


def test_only_the_active_adapter_trains():
    model = add_lora(add_lora(tiny_llama(), SPEC, "one"), SPEC, "two")
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains
    assert all(n.endswith(".two") for n in trains)
    switch_lora(model, "one")
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains
    assert all(n.endswith(".one") for n in trains)


def test_seed_repeats_and_spares_the_global_generator():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    models = [add_lora(tiny_llama(), SPEC, seed=3) for _ in range(2)]
    torch.manual_seed(5)
    add_lora(models[0], SPEC, "again", seed=4)
    assert torch.equal(torch.rand(3), expected)
    for one, two in zip(*(lora_layers(m).values() for m in models), strict=True):
        assert torch.equal(one.lora_A["default"], two.lora_A["default"])
        assert not torch.equal(one.lora_A["again"], one.lora_A["default"])


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_initial_spread_is_the_papers(init):
    layer = LoRALinear(nn.Linear(4000, 64))
    layer.add("a", LoraSpec(16, 16, init=init), torch.Generator().manual_seed(0))
    a = layer.lora_A["a"].detach()
    expected = 1 / 16 if init == "gaussian" else 1 / math.sqrt(3 * 4000)
    assert a.std() == pytest.approx(expected, rel=0.02)
    assert init == "gaussian" or a.abs().max() <= 1 / math.sqrt(4000)
    assert not layer.lora_B["a"].any()


def test_pissa_starts_from_the_best_low_rank_part():
    layer = LoRALinear(nn.Linear(24, 16))
    layer.add("p", LoraSpec(3, 6, init="pissa"))
    part = 2 * layer.lora_B["p"].detach() @ layer.lora_A["p"].detach()
    u, s, vh = torch.linalg.svd(layer.base_layer.weight)
    assert torch.allclose(part, u[:, :3] * s[:3] @ vh[:3], atol=1e-6)
    assert layer.delta_weight("p").abs().max() == 0
    assert count_parameters(layer) == (3 * 40 + 16 * 25, 3 * 40 + 16 * 25)  # its start is no weight


def test_paper_count_1000_by_1000_at_rank_10():
    model = nn.Sequential(nn.Linear(1000, 1000, bias=False))
    add_lora(model, LoraSpec(10, 10, "0"))
    assert count_parameters(model) == (20_000, 1_020_000)


def test_scales():
    assert LoraSpec(16, 32).scale == 2
    assert LoraSpec(16, 32, rslora=True).scale == 8


@given(
    rank=st.integers(1, 5),
    out=st.integers(5, 9),
    inner=st.integers(5, 9),
    rows=st.integers(1, 4),
    bias=st.booleans(),
    rslora=st.booleans(),
    grad=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_layer_is_the_formula(rank, out, inner, rows, bias, rslora, grad):
    torch.manual_seed(rank * 100 + out)
    base = nn.Linear(inner, out, bias=bias).requires_grad_(False)
    layer = LoRALinear(base)
    spec = LoraSpec(rank, 3.0, rslora=rslora)
    layer.add("a", spec)
    layer.active = "a"
    b = layer.lora_B["a"].data.normal_()
    a, x = layer.lora_A["a"].detach(), torch.randn(2, rows, inner)
    expected = base(x) + spec.scale * (x @ a.T @ b.T)
    with torch.set_grad_enabled(grad):
        assert torch.allclose(layer(x), expected, atol=1e-5)
        assert torch.allclose(layer(x[0, 0]), expected[0, 0], atol=1e-5)


def test_hooks_on_the_base_layer_are_neither_skipped_nor_written_over():
    model = add_lora(tiny_llama(), SPEC, seed=0)
    layer = lora_layers(model)["model.layers.0.mlp.up_proj"]
    layer.lora_B["default"].data.normal_()
    seen = []
    handle = layer.base_layer.register_forward_hook(lambda m, i, o: seen.append((i[0], o)))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            model(ids())
        x, out = seen.pop()
        assert torch.allclose(out, x @ layer.base_layer.weight.T, atol=1e-6)
    handle.remove()


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for on in (False, True):
        model = add_lora(tiny_llama(), SPEC, seed=0).train()
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in lora_layers(model).values():
            layer.lora_B["default"].data.fill_(0.01)
        model(ids(), labels=ids()).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*grads, strict=True))


# ---------------------------------------------------------------- placement
def test_placement_names():
    model = tiny_llama()
    attention, mlp = match_targets(model, "attention"), match_targets(model, "mlp")
    assert len(attention) == 8
    assert len(mlp) == 6
    assert set(match_targets(model, "all")) == set(attention) | set(mlp)
    assert match_targets(model, ["attention", "mlp"]) == match_targets(model, "all")
    assert match_targets(model, "lm_head") == ["lm_head"]
    assert len(match_targets(model, r".*layers[.]1[.].*")) == 7
    assert match_targets(model, "model.layers.0.mlp.up_proj") == ["model.layers.0.mlp.up_proj"]
    add_lora(model, SPEC)  # wrapped layers keep their names
    assert match_targets(model, "attention") == attention


def test_placement_on_an_encoder():
    from transformers import BertConfig, BertModel

    config = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, vocab_size=20)
    model = BertModel(BertConfig(num_hidden_layers=1, **config))
    layer = "encoder.layer.0."
    attention = ["attention.self.query", "attention.self.key", "attention.self.value"]
    attention += ["attention.output.dense"]
    assert match_targets(model, "attention") == [layer + n for n in attention]
    mlp = ["intermediate.dense", "output.dense"]
    assert match_targets(model, "mlp") == [layer + n for n in mlp]


@pytest.mark.parametrize(
    ("target", "match"),
    [
        ("q_prj", "matches no linear layer.*Did you mean 'q_proj'"),
        (["all", "wrong"], "'wrong' matches no linear layer.*q_proj, k_proj"),
        ("embed_tokens", "is an embedding table"),
        ("([", "not a regular expression"),
        ([], "targets is empty"),
        ([3], "must be a name or a pattern"),
    ],
)
def test_bad_targets(target, match):
    model = tiny_llama()
    refused(model, BadInputError, match, lambda: add_lora(model, LoraSpec(4, 8, target)))


def test_transposed_conv1d_is_refused_clearly():
    model = nn.ModuleDict({"c_attn": Conv1D(8, 4), "proj": nn.Linear(4, 4)})
    with pytest.raises(BadInputError, match="Conv1D"):
        add_lora(model, LoraSpec(2, 2, "c_attn"))


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (dict(rank=0, alpha=8), "rank must be a whole number of at least 1, not 0"),
        (dict(rank=-1, alpha=8), "not -1"),
        (dict(rank=2.5, alpha=8), "not 2.5"),
        (dict(rank=True, alpha=8), "not True"),
        (dict(rank=4, alpha=0), "alpha must be a positive number, not 0"),
        (dict(rank=4, alpha=-2), "not -2"),
        (dict(rank=4, alpha=float("nan")), "not nan"),
        (dict(rank=4, alpha=8, dropout=1.0), "dropout"),
        (dict(rank=4, alpha=8, init="zeros"), "kaiming, gaussian, pissa"),
        (dict(rank=4, alpha=8, init="pissa", dora=True), "choose one"),
    ],
)
def test_bad_specs(arguments, match):
    with pytest.raises(BadInputError, match=match):
        LoraSpec(**arguments)


def test_rank_above_the_layers_smaller_side():
    model = tiny_llama()  # k_proj is 16 x 32
    refused(
        model,
        BadInputError,
        r"rank 17 is above min\(in, out\) = 16 of model.layers.0.self_attn.k_proj",
        lambda: add_lora(model, LoraSpec(17, 8)),
    )
    add_lora(model, LoraSpec(16, 8))


@pytest.mark.parametrize("name", ["", "a.b", "keys", "pop", 3, "x" * 65, "../up"])
def test_bad_names(name):
    model = tiny_llama()
    refused(model, BadInputError, "Adapter name", lambda: add_lora(model, SPEC, name))


def test_adding_twice_is_refused_not_stacked():
    model = add_lora(tiny_llama(), SPEC)
    refused(model, BadInputError, "already there", lambda: add_lora(model, SPEC))
    # Not even with other layers: one name is one adapter.
    refused(model, BadInputError, "already", lambda: add_lora(model, LoraSpec(2, 2, "lm_head")))


def test_switching_to_or_removing_an_unknown_adapter():
    model = add_lora(tiny_llama(), SPEC, "maths")
    for verb in (switch_lora, remove_lora):
        refused(
            model,
            UnknownNameError,
            "Unknown adapter 'math'. Did you mean 'maths'",
            lambda verb=verb: verb(model, "math"),
        )


def test_verbs_without_an_adapter():
    model = tiny_llama()
    for action in (
        lambda: switch_lora(model, "x"),
        lambda: remove_lora(model),
        lambda: disable_lora(model),
        lambda: merge_lora(model, ids()),
        lambda: unmerge_lora(model),
    ):
        refused(model, BadInputError, "carries no adapter", action)


def test_verbs_while_merged():
    model = add_lora(add_lora(tiny_llama(), SPEC, "one"), SPEC, "two")
    merge_lora(model, ids())
    for action in (
        lambda: switch_lora(model, "one"),
        lambda: remove_lora(model),
        lambda: disable_lora(model),
        lambda: add_lora(model, SPEC, "three"),
    ):
        refused(model, BadInputError, "unmerge_lora", action)


def test_merging_while_training():
    model = add_lora(tiny_llama(), SPEC).train()
    refused(model, BadInputError, "training mode", lambda: merge_lora(model, ids()))


def test_a_model_wrapped_by_peft_is_refused():
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(BadInputError, match="wrapped by peft"):
        add_lora(model, SPEC)


def test_pissa_on_four_bits_is_refused():
    from lora_kit.linear4bit import NF4Linear

    model = tiny_llama()
    model.model.layers[1].mlp.up_proj = NF4Linear.from_linear(model.model.layers[1].mlp.up_proj)
    spec = LoraSpec(4, 8, init="pissa")
    refused(model, BadInputError, "needs a dense base", lambda: add_lora(model, spec))


def test_training_while_merged_is_refused():
    model = add_lora(tiny_llama(), SPEC)
    merge_lora(model, ids())
    model.train()
    with pytest.raises(BadInputError, match="is merged"):
        model(ids())
