"""Our LoRA against peft's, number by number: forward, gradients, merged weights, counts, steps."""

import itertools

import pytest
import torch
from lora_fixtures import PLACEMENTS, close, ids, peft_layers, tiny_llama
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_kit.linear4bit import NF4Linear
from lora_kit.lora import (
    LoRALinear,
    LoraSpec,
    add_lora,
    count_parameters,
    lora_layers,
    merge_lora,
)

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


@pytest.mark.parametrize("rows", [1, 2, 24, 25, 200])
@pytest.mark.parametrize("bias", [False, True])
def test_every_order_of_the_products_without_a_graph(rows, bias):
    """One row: matrix times vector; few: the detour; from in · out / (in + out) rows on: folded."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(64, 40, bias=bias).requires_grad_(False)).eval()  # turns at 24.6
    layer.add("default", LoraSpec(4, 6))
    layer.lora_B["default"].data.normal_(std=0.3)
    layer.active = "default"
    x = torch.randn(rows, 64)
    with torch.no_grad():
        folded, layer.may_fold = layer(x), False
        kept = layer(x)
    close(folded, layer(x).detach())  # with a graph
    close(kept, layer(x).detach())
    exact = layer.double()(x.double()).detach()
    close(folded.double(), exact)
    close(kept.double(), exact)
    assert torch.equal(folded, kept) == (rows < 25)  # rounding tells which way was taken


def test_a_folded_copy_leaves_the_weight_alone_and_follows_the_adapter():
    layer = LoRALinear(nn.Linear(32, 32).requires_grad_(False)).eval()
    layer.add("default", LoraSpec(4, 8))
    layer.active = "default"
    before, x = layer.base_layer.weight.clone(), torch.randn(3, 100, 32)
    with torch.no_grad():
        bare = layer(x)
        assert torch.equal(bare, layer.base_layer(x))  # B = 0: the same bits, folded or not
        layer.lora_B["default"].normal_()
        assert not torch.allclose(layer(x), bare)
        layer.lora_B["default"].zero_()
        assert torch.equal(layer(x), bare)
    assert torch.equal(layer.base_layer.weight, before)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_step_over_nf4_is_fused_and_holds_nothing_dense(dtype, bias):
    torch.manual_seed(0)
    layer = LoRALinear(NF4Linear.from_linear(nn.Linear(96, 64, bias=bias).to(dtype)))
    layer.add("default", LoraSpec(4, 6), dtype=dtype)
    layer.lora_B["default"].data.normal_(std=0.3)
    layer.active = "default"
    inputs = [torch.randn(5, 7, 96).to(dtype).requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    held, results = [], []
    for fused, x in zip((True, False), inputs, strict=True):
        a.grad = b.grad = None
        # A hook on the base wants to see its output: nothing is fused then.
        hook = None if fused else layer.base_layer.register_forward_hook(lambda *_: None)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
            y = layer(x)
        assert ("FusedLora" in type(y.grad_fn).__name__) == fused
        y.square().sum().backward()
        results.append((y.detach(), x.grad, a.grad, b.grad))
        if hook is not None:
            hook.remove()
    assert all(t.numel() < 96 * 64 for t in held)
    for one, two in zip(*results, strict=True):
        close(one.float(), two.float(), 1e-6 if dtype == torch.float32 else 2e-2)


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


def on_the_default_model(side, placement, variant, dtype, starts):
    """Logits, counts and the gradient of every A and B on two sums, with the same adapter."""
    from lora_kit.models import load_model

    ours, theirs = VARIANTS[variant]
    loaded = load_model("smollm2-135m-instruct", dtype="float32")
    sums = loaded.tokenizer(["12+34=46", "56+78=134"], return_tensors="pt", padding=True)
    base = loaded.model.to(dtype)
    if side == "ours":
        model = add_lora(base, LoraSpec(8, 16, placement, **ours), seed=0).eval()
        layers = lora_layers(model)
        found = {p: (m.lora_A["default"], m.lora_B["default"]) for p, m in layers.items()}
        starts.update({p: a.detach().clone() for p, (a, _) in found.items() if p not in starts})
    else:
        config = LoraConfig(r=8, lora_alpha=16, target_modules=PLACEMENTS[placement], **theirs)
        model = get_peft_model(base, config).eval().to(dtype)
        layers = peft_layers(model)
        found = {
            p: (m.lora_A["default"].weight, m.lora_B["default"].weight) for p, m in layers.items()
        }
    assert found.keys() == starts.keys()
    for path, (a, b) in found.items():
        generator = torch.Generator().manual_seed(len(path))
        a.data.copy_(starts[path])
        b.data.copy_(torch.randn(b.shape, generator=generator) * 0.002)
        assert a.dtype == b.dtype == dtype
    out = model(**sums, labels=sums["input_ids"])
    out.loss.backward()
    counts = count_parameters(model) if side == "ours" else model.get_nb_trainable_parameters()
    grads = {f"{p}.{k}": t.grad.double() for p, ab in found.items() for k, t in enumerate(ab)}
    return out.logits.detach(), grads, counts


def gradient_distance(one, two):
    """‖one − two‖ / ‖two‖: of all gradients as one vector, and the worst of any one tensor."""
    gaps = {k: float((one[k] - t).norm()) for k, t in two.items()}
    whole = sum(g**2 for g in gaps.values()) ** 0.5
    return (
        whole / sum(float(t.norm()) ** 2 for t in two.values()) ** 0.5,
        max(gaps[k] / float(t.norm()) for k, t in two.items()),
    )


@pytest.mark.model
@pytest.mark.parametrize(("placement", "variant"), [("all", "plain"), ("attention", "rslora")])
def test_on_the_default_model(placement, variant):
    """The same on real weights, 30 layers deep, where fp32's own rounding is the floor.

    In float64 the two agree to 4e-15, tensor by tensor: they compute one and the same gradient. In
    fp32 each lies 2 to 3e-6 from that (‖error‖ / ‖gradient‖), peft no less than this kit, and from
    each other 6e-7 where s = 2, which multiplies without rounding, and 2.2e-6 where s = 16/√8,
    which each rounds at another place. So 1e-6 is finer than fp32 carries through 30 layers. A
    single small tensor is no measure in fp32: on one AMD EPYC the worst of ours is nearer the
    truth than the worst of peft's, on the next farther (7e-6 and 8e-6; 1.4e-5 and 8e-6).
    """
    starts, run = {}, {}
    for side in ("ours", "peft"):
        for dtype in (torch.float32, torch.float64):
            run[side, dtype] = on_the_default_model(side, placement, variant, dtype, starts)
    (mine, my_grads, my_counts), (other, its_grads, its_counts) = (
        run[side, torch.float32] for side in ("ours", "peft")
    )
    exact, truth, _ = run["peft", torch.float64]
    assert my_counts == its_counts
    close(mine, other, 2e-6)
    close(run["ours", torch.float64][0], exact, 1e-13)
    assert max(gradient_distance(run["ours", torch.float64][1], truth)) <= 2e-14
    apart, _ = gradient_distance(my_grads, its_grads)
    ours_off, theirs_off = (gradient_distance(g, truth)[0] for g in (my_grads, its_grads))
    assert apart <= 3e-6
    assert ours_off <= 1.1 * theirs_off
