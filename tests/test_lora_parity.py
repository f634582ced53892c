"""Our LoRA against peft's, number by number: forward, gradients, merged weights, counts, steps."""

import itertools

import pytest
import torch
from lora_fixtures import PLACEMENTS, close, ids, peft_layers, tiny_llama
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_kit.linear4bit import NF4Linear
from lora_kit.lora import LoraSpec, add_lora, count_parameters, lora_layers, merge_lora

VARIANTS = {
    "plain": ({}, {}),
    "rslora": ({"rslora": True}, {"use_rslora": True}),
    "dora": ({"dora": True}, {"use_dora": True}),
    "gaussian": ({"init": "gaussian"}, {"init_lora_weights": "gaussian"}),
    "pissa": ({"init": "pissa"}, {"init_lora_weights": "pissa"}),
    "dora-rslora": ({"dora": True, "rslora": True}, {"use_dora": True, "use_rslora": True}),
}


def pair(placement, variant, seed=0, dropout=0.0, **model_options):
    """The same tiny model twice, with our adapter and with peft's, holding equal A and B."""
    ours, theirs = VARIANTS[variant]
    mine = tiny_llama(seed, **model_options)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=PLACEMENTS[placement], lora_dropout=dropout, **theirs
    )
    other = get_peft_model(tiny_llama(seed, **model_options), config).eval()
    add_lora(mine, LoraSpec(4, 6, placement, dropout=dropout, **ours), seed=0)
    perturb_and_copy(mine, other)
    return mine, other


def perturb_and_copy(mine, other, name="default"):
    generator = torch.Generator().manual_seed(2)
    theirs = peft_layers(other)
    with torch.no_grad():
        for path, layer in lora_layers(mine).items():
            target = theirs[path]
            if layer.specs[name].init == "pissa":  # keep both starts, move both alike
                for ours, its in (
                    (layer.lora_A[name], target.lora_A["default"].weight),
                    (layer.lora_B[name], target.lora_B["default"].weight),
                ):
                    step = torch.randn(its.shape, generator=generator) * 0.05
                    assert torch.allclose(ours, its, atol=1e-6)
                    ours.copy_(its + step)
                    its.add_(step)
                continue
            layer.lora_B[name].normal_(std=0.05, generator=generator)
            target.lora_A["default"].weight.copy_(layer.lora_A[name])
            target.lora_B["default"].weight.copy_(layer.lora_B[name])
            if layer.specs[name].dora:
                layer.lora_magnitude[name].mul_(1.1)
                target.lora_magnitude_vector["default"].weight.copy_(layer.lora_magnitude[name])


def compare_gradients(mine, other, tolerance=1e-6):
    theirs = peft_layers(other)
    compared = 0
    for path, layer in lora_layers(mine).items():
        pairs = [
            (layer.lora_A["default"], theirs[path].lora_A["default"].weight),
            (layer.lora_B["default"], theirs[path].lora_B["default"].weight),
        ]
        if layer.specs["default"].dora:
            magnitude = theirs[path].lora_magnitude_vector["default"].weight
            pairs.append((layer.lora_magnitude["default"], magnitude))
        for ours, its in pairs:
            assert its.grad.abs().max() > 1e-5  # there is something to compare
            close(ours.grad, its.grad, tolerance)
            compared += 1
    assert compared >= 2


@pytest.mark.parametrize(("placement", "variant"), itertools.product(PLACEMENTS, VARIANTS))
def test_forward_and_gradients(placement, variant):
    mine, other = pair(placement, variant)
    out, reference = mine(ids()).logits, other(ids()).logits
    close(out, reference)
    with torch.no_grad():  # the path without a graph is another one
        close(mine(ids()).logits, reference)
    for model in (mine, other):
        model(ids(), labels=ids()).loss.backward()
    compare_gradients(mine, other)


@pytest.mark.parametrize("variant", VARIANTS)
def test_in_double_precision_the_two_are_one(variant):
    mine, other = pair("all", variant)
    mine, other = mine.double(), other.double()
    close(mine(ids()).logits, other(ids()).logits, 1e-13 if variant != "pissa" else 1e-6)
    for model in (mine, other):
        model(ids(), labels=ids()).loss.backward()
    compare_gradients(mine, other, 1e-13 if variant != "pissa" else 1e-6)


@pytest.mark.parametrize(("placement", "variant"), itertools.product(PLACEMENTS, VARIANTS))
def test_merged_weights_and_counts(placement, variant):
    mine, other = pair(placement, variant)
    assert count_parameters(mine) == other.get_nb_trainable_parameters()
    before = mine(ids()).logits
    merge_lora(mine, ids())
    other.merge_adapter(safe_merge=True)
    theirs = peft_layers(other)
    for path, layer in lora_layers(mine).items():
        close(layer.base_layer.weight, theirs[path].get_base_layer().weight)
    close(mine(ids()).logits, before, 2e-6)


@pytest.mark.parametrize("variant", ["plain", "dora", "pissa"])
def test_bias_and_three_optimizer_steps(variant):
    mine, other = pair("all", variant, bias=True)
    losses = []
    for model in (mine, other):
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=1e-3)
        for step in range(3):
            batch = ids(seed=step)
            loss = model(batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    close(losses[0], losses[1])
    # Adam divides by the gradient's size, which magnifies rounding where a gradient is nearly zero.
    close(mine(ids()).logits, other(ids()).logits, 1e-4)


@pytest.mark.parametrize("variant", ["plain", "rslora", "dora", "pissa"])
def test_dropout_draws_the_same_numbers(variant):
    mine, other = pair("mlp", variant, dropout=0.3)
    outs = []
    for model in (mine, other):
        model.train()
        torch.manual_seed(7)
        outs.append(model(ids()).logits)
    close(outs[0], outs[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_base_keeps_fp32_adapters(dtype):
    ours, config = LoraSpec(4, 6), LoraConfig(r=4, lora_alpha=6, target_modules=PLACEMENTS["all"])
    mine = add_lora(tiny_llama().to(dtype), ours, seed=0)
    other = get_peft_model(tiny_llama().to(dtype), config).eval()
    perturb_and_copy(mine, other)
    assert {p.dtype for p in mine.parameters() if p.requires_grad} == {torch.float32}
    tolerance = 2 * torch.finfo(dtype).eps
    close(mine(ids()).logits.float(), other(ids()).logits.float(), tolerance)


def test_under_autocast_we_round_no_worse_than_peft():
    exact, _ = pair("all", "plain")
    exact(ids(), labels=ids()).loss.backward()
    mine, other = pair("all", "plain")
    with torch.autocast("cpu", torch.bfloat16):
        for model in (mine, other):
            out = model(ids(), labels=ids())
            assert out.logits.dtype == torch.bfloat16
            out.loss.backward()
    truth, theirs = lora_layers(exact), peft_layers(other)
    ours = its = 0.0
    for path, layer in lora_layers(mine).items():
        right = truth[path].lora_B["default"].grad
        ours += float((layer.lora_B["default"].grad - right).norm() ** 2)
        its += float((theirs[path].lora_B["default"].weight.grad - right).norm() ** 2)
    assert 0 < ours <= 1.5 * its


def test_nf4_base_equals_the_dense_base_with_dequantised_weights():
    packed, dense = tiny_llama(), tiny_llama()
    for path, layer in [m for m in packed.named_modules() if type(m[1]) is nn.Linear]:
        if path == "lm_head":
            continue
        quantised = NF4Linear.from_linear(layer)
        parent, _, leaf = path.rpartition(".")
        setattr(packed.get_submodule(parent), leaf, quantised)
        dense.get_submodule(path).weight.data = quantised.dequantized_weight()
    spec = LoraSpec(4, 6)
    for model in (packed, dense):
        add_lora(model, spec, seed=0)
        generator = torch.Generator().manual_seed(5)
        for layer in lora_layers(model).values():
            layer.lora_B["default"].data.normal_(std=0.1, generator=generator)
        out = model(ids()).logits
        out.square().sum().backward()
    assert count_parameters(packed) == count_parameters(dense)
    close(packed(ids()).logits, dense(ids()).logits)
    twins = lora_layers(dense)
    for path, layer in lora_layers(packed).items():
        close(layer.lora_A["default"].grad, twins[path].lora_A["default"].grad, 2e-6)
        close(layer.lora_B["default"].grad, twins[path].lora_B["default"].grad, 2e-6)


def test_a_base_left_trainable_still_gets_its_gradient():
    mine, other = pair("q_proj", "plain")
    path = "model.layers.0.self_attn.q_proj"
    base = lora_layers(mine)[path].base_layer.weight.requires_grad_(True)
    its = peft_layers(other)[path].get_base_layer().weight.requires_grad_(True)
    mine(ids()).logits.square().sum().backward()
    other(ids()).logits.square().sum().backward()
    close(base.grad, its.grad, 2e-6)


def test_gradients_against_finite_differences():
    torch.manual_seed(0)
    for init, bias in itertools.product(("kaiming", "pissa"), (True, False)):
        model = nn.Sequential(nn.Linear(6, 5, bias=bias), nn.Tanh(), nn.Linear(5, 4)).double()
        add_lora(model, LoraSpec(2, 3, ["0", "2"], init=init), seed=0)
        parameters = [p for p in model.parameters() if p.requires_grad]
        for p in parameters:
            p.data.normal_()
        x = torch.randn(3, 6, dtype=torch.double, requires_grad=True)
        assert torch.autograd.gradcheck(lambda *_, m=model, x=x: m(x), (x, *parameters))


@pytest.mark.model
@pytest.mark.parametrize(("placement", "variant"), [("all", "plain"), ("attention", "rslora")])
def test_on_the_default_model(placement, variant):
    """The same on real weights: 30 layers deep, so 1e-6 holds relative to the largest number."""
    from lora_kit.models import load_model

    ours, theirs = VARIANTS[variant]
    sums = None
    results = []
    for side in ("ours", "peft"):
        loaded = load_model("smollm2-135m-instruct", dtype="float32")
        sums = loaded.tokenizer(["12+34=46", "56+78=134"], return_tensors="pt", padding=True)
        if side == "ours":
            model = add_lora(loaded.model, LoraSpec(8, 16, placement, **ours), seed=0).eval()
            layers = lora_layers(model)
            starts = {p: layer.lora_A["default"].detach().clone() for p, layer in layers.items()}
        else:
            config = LoraConfig(r=8, lora_alpha=16, target_modules=PLACEMENTS[placement], **theirs)
            model = get_peft_model(loaded.model, config).eval()
            layers = peft_layers(model)
        grads = {}
        for path, start in starts.items():
            generator = torch.Generator().manual_seed(len(path))
            shape = (layers[path].out_features, 8)
            b = torch.randn(shape, generator=generator) * 0.002
            if side == "ours":
                layers[path].lora_B["default"].data.copy_(b)
            else:
                layers[path].lora_A["default"].weight.data.copy_(start)
                layers[path].lora_B["default"].weight.data.copy_(b)
        out = model(**sums, labels=sums["input_ids"])
        out.loss.backward()
        for path in starts:
            a, b = layers[path].lora_A["default"], layers[path].lora_B["default"]
            a, b = (a, b) if side == "ours" else (a.weight, b.weight)
            grads[path] = (a.grad, b.grad)
        counts = count_parameters(model) if side == "ours" else model.get_nb_trainable_parameters()
        results.append((out.logits.detach(), grads, counts))
    (mine, my_grads, my_counts), (other, its_grads, its_counts) = results
    assert my_counts == its_counts
    close(mine, other, 2e-6)
    for path, pair_ in its_grads.items():
        for ours_, its in zip(my_grads[path], pair_, strict=True):
            assert (ours_ - its).norm() <= 1e-4 * its.norm()
