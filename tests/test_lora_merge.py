"""Merging proves itself: on dense, NF4 and bitsandbytes bases, and where it must refuse."""

import warnings

import pytest
import torch
from lora_fixtures import PLACEMENTS, ids, peft_layers, tiny_llama
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from lora_kit.errors import BadInputError, UnknownNameError
from lora_kit.linear4bit import NF4Linear
from lora_kit.lora import (
    LoraSpec,
    add_lora,
    bake_lora,
    disable_lora,
    lora_layers,
    merge_lora,
    remove_lora,
    switch_lora,
    unmerge_lora,
)
from lora_kit.lora_base import is_repacked, true_weight
from lora_kit.lora_merge import MergeError

WIDE = dict(hidden_size=64, intermediate_size=128)  # bitsandbytes repacks tiles of 32 rows


def distance(a, b):
    return float((a - b).norm() / b.norm())


def logits(model, batch=None):
    with torch.no_grad():
        return model(ids() if batch is None else batch).logits


def adapted(model, spec=None, name="default", seed=0):
    add_lora(model, spec or LoraSpec(4, 8), name, seed=seed)
    generator = torch.Generator().manual_seed(seed + 10)
    for layer in lora_layers(model).values():
        if name in layer.specs:
            layer.lora_B[name].data.normal_(std=0.05, generator=generator)
    return model


def replace_linears(model, make):
    for path, layer in [m for m in model.named_modules() if type(m[1]) is nn.Linear]:
        if path != "lm_head":
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, make(layer))
    return model.eval()


def bitsandbytes_llama(double_quant=True):
    bnb = pytest.importorskip("bitsandbytes")

    def make(layer):
        kind = dict(quant_type="nf4", compress_statistics=double_quant)
        packed = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, False, compute_dtype=torch.float32, **kind
        )
        packed.weight = bnb.nn.Params4bit(layer.weight.data.clone(), requires_grad=False, **kind)
        return packed.to("cpu")

    model = replace_linears(tiny_llama(**WIDE), make)
    model.is_loaded_in_4bit = True  # what transformers notes, and what peft looks at
    return model


def nf4_llama(**options):
    return replace_linears(
        tiny_llama(**WIDE), lambda layer: NF4Linear.from_linear(layer, **options)
    )


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def unchanged(model, before, modules):
    after = model.state_dict()
    assert list(after) == list(before)
    # torch.equal says no where both hold the same NaN
    same = all(torch.allclose(after[k], before[k], 0, 0, equal_nan=True) for k in before)
    return same and [type(m) for m in model.modules()] == modules


@pytest.mark.parametrize("variant", [{}, {"rslora": True}, {"dora": True}, {"init": "pissa"}])
def test_merge_is_idempotent_and_reversible_bit_for_bit(variant):
    model = tiny_llama()
    bare = logits(model)
    adapted(model, LoraSpec(4, 8, **variant))
    weights = {p: layer.base_layer.weight.clone() for p, layer in lora_layers(model).items()}
    before = logits(model)
    first = merge_lora(model, ids())
    assert first.effect > 0.01
    assert first.difference < 1e-5
    assert first.weight_loss is None
    merged = snapshot(model)
    assert merge_lora(model, ids()) is first
    assert all(torch.equal(merged[k], v) for k, v in model.state_dict().items())
    assert distance(logits(model), before) < 1e-5
    unmerge_lora(model)
    unmerge_lora(model)  # and this one does nothing
    for path, layer in lora_layers(model).items():
        assert torch.equal(layer.base_layer.weight, weights[path])
    assert torch.equal(logits(model), before)
    remove_lora(model)
    assert torch.equal(logits(model), bare)


def test_merging_with_only_some_layers_and_two_adapters():
    model = adapted(tiny_llama(), LoraSpec(4, 8, "attention"), "one")
    one = logits(model)
    adapted(model, LoraSpec(2, 8, "mlp"), "two", seed=1)
    two = logits(model)
    merge_lora(model, ids(), "one")
    assert distance(logits(model), one) < 1e-5
    with pytest.raises(BadInputError, match="'one' is merged already"):
        merge_lora(model, ids(), "two")
    unmerge_lora(model)
    assert torch.equal(logits(model), one)
    switch_lora(model, "two")
    assert torch.equal(logits(model), two)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_merge_stays_in_its_dtype_and_reverses_exactly(dtype):
    model = adapted(tiny_llama().to(dtype))
    before = logits(model)
    report = merge_lora(model, ids())
    assert 0 < report.difference < report.tolerance
    assert {layer.base_layer.weight.dtype for layer in lora_layers(model).values()} == {dtype}
    unmerge_lora(model)
    assert torch.equal(logits(model), before)


def test_nf4_merge_measures_what_the_second_quantisation_costs():
    model = adapted(nf4_llama())
    before, packed = logits(model), snapshot(model)
    report = merge_lora(model, ids())
    assert report.difference < 1e-5
    assert 0.05 < report.weight_loss < 0.15
    assert report.output_loss == pytest.approx(distance(logits(model), before), rel=1e-3)
    error = change = 0.0
    for layer in lora_layers(model).values():
        wanted = layer.merged_weight("default")
        error += float((layer.base_layer.dequantized_weight() - wanted).norm() ** 2)
        change += float(layer.delta_weight("default").norm() ** 2)
    assert report.delta_loss == pytest.approx((error / change) ** 0.5, rel=1e-3)
    assert all(isinstance(m.base_layer, NF4Linear) for m in lora_layers(model).values())
    assert f"{report.output_loss:.2%}" in str(report)
    unmerge_lora(model)
    assert unchanged(model, packed, [type(m) for m in model.modules()])
    dense = merge_lora(model, ids(), dense=True)
    assert dense.weight_loss is None
    assert distance(logits(model), before) < 1e-5
    unmerge_lora(model)
    assert torch.equal(logits(model), before)


def test_a_small_change_does_not_survive_four_bits():
    """What the report is for: half a step of the 4-bit grid swallows a gently trained adapter."""
    model = adapted(nf4_llama())
    for layer in lora_layers(model).values():
        layer.lora_B["default"].data.mul_(0.01)
    report = merge_lora(model, ids())
    assert report.weight_loss < 0.01  # the weights are nearly right, and yet
    assert report.delta_loss > 0.8


@pytest.mark.parametrize("options", [dict(double_quant=False), dict(block_size=128, format="fp4")])
def test_nf4_merge_keeps_the_storage_it_found(options):
    model = adapted(nf4_llama(**options))
    merge_lora(model, ids())
    for layer in lora_layers(model).values():
        for option, value in options.items():
            assert getattr(layer.base_layer, option) == value


# ---------------------------------------------------------------- bitsandbytes' silent corruption
needs_repack = pytest.mark.skipif(
    "not __import__('bitsandbytes.functional', fromlist=['x']).has_avx512bf16()",
    reason="bitsandbytes repacks only on a CPU with AVX512-bf16",
)


@needs_repack
@pytest.mark.parametrize("double_quant", [True, False])
def test_plain_peft_merges_garbage_without_an_error(double_quant):
    """The trap itself: should this ever fail, bitsandbytes or peft has mended it."""
    model = bitsandbytes_llama(double_quant)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=PLACEMENTS["all"])
    model = get_peft_model(model, config).eval()
    for layer in peft_layers(model).values():
        layer.lora_B["default"].weight.data.normal_(std=0.05)
    before = logits(model)  # this forward pass repacks the weights in place
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = model.merge_and_unload()
    assert distance(logits(merged), before) > 1.0


@needs_repack
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("when", ["repacked before adding", "never repacked"])
def test_ours_merges_the_true_weight(double_quant, when):
    model = bitsandbytes_llama(double_quant)
    path = "model.layers.0.mlp.up_proj"
    truth = true_weight(model.get_submodule(path))
    if when == "repacked before adding":
        logits(model)
        assert is_repacked(model.get_submodule(path))
        # Scales were rounded to bf16 by bitsandbytes; the 4-bit codes are recovered exactly.
        assert 0 < distance(true_weight(model.get_submodule(path)), truth) < 2**-8
    adapted(model)
    before = logits(model)
    base = lora_layers(model)[path].base_layer
    assert not is_repacked(base)  # an evaluation pass no longer touches the weights
    report = merge_lora(model, ids())
    assert report.difference < 1e-5
    assert report.weight_loss < 0.15
    assert distance(logits(model), before) < 0.3
    assert distance(logits(model), before) == pytest.approx(report.output_loss, rel=1e-3)
    unmerge_lora(model)
    assert torch.equal(logits(model), before)
    merge_lora(model, ids(), dense=True)
    assert distance(logits(model), before) < 1e-5


def test_bitsandbytes_layer_that_was_never_quantised_is_refused():
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 64)
    with pytest.raises(BadInputError, match="not quantised yet"):
        true_weight(layer)


# ---------------------------------------------------------------- refusals
def refuse(model, error, match, **arguments):
    before, modules = snapshot(model), [type(m) for m in model.modules()]
    active = {p: layer.active for p, layer in lora_layers(model).items()}
    with pytest.raises(error, match=match):
        merge_lora(model, ids(), **arguments)
    assert unchanged(model, before, modules)
    assert active == {p: layer.active for p, layer in lora_layers(model).items()}
    assert not any(layer.merged for layer in lora_layers(model).values())


def test_refused_merges_change_nothing():
    model = adapted(tiny_llama())
    refuse(
        model, UnknownNameError, "Unknown adapter 'defualt'. Did you mean 'default'", name="defualt"
    )
    refuse(model.train(), BadInputError, "training mode")
    model.eval()
    refuse(model, MergeError, "would change the outputs", tolerance=1e-12)
    with disable_lora(model):
        refuse(model, BadInputError, "disabled")
    with pytest.raises(BadInputError, match="no adapter"):
        merge_lora(tiny_llama(), ids())


@pytest.mark.parametrize("where", ["adapter", "base", "embedding"])
def test_nan_anywhere_stops_it(where):
    model = adapted(tiny_llama())
    layer = lora_layers(model)["model.layers.1.mlp.up_proj"]
    place = {
        "adapter": layer.lora_B["default"],
        "base": layer.base_layer.weight,
        "embedding": model.model.embed_tokens.weight,
    }[where]
    place.data[:, 0] = float("nan")
    refuse(model, MergeError, "NaN or infinity")


def test_a_wrong_merge_is_caught(monkeypatch):
    """Were the arithmetic wrong (here: the scale forgotten), the proof would say so."""
    from lora_kit.lora_layer import LoRALinear

    right = LoRALinear.delta_weight
    monkeypatch.setattr(LoRALinear, "delta_weight", lambda self, name: right(self, name) / 2)
    refuse(adapted(tiny_llama()), MergeError, "more than")
    refuse(adapted(nf4_llama()), MergeError, "more than")


def test_the_proof_compares_with_detours_not_with_another_merge(monkeypatch):
    """A long input is multiplied by W + s · B A anyway: the proof must not count that unmerged."""
    import lora_kit.lora_layer as module

    folds, right = [], module.adapted_product
    monkeypatch.setattr(
        module, "adapted_product", lambda *args: folds.append(args[6]) or right(*args)
    )
    model = adapted(tiny_llama())
    with torch.no_grad():
        model(ids())
    assert folds
    assert all(folds)
    folds.clear()
    merge_lora(model, ids())
    assert folds
    assert not any(folds)
    unmerge_lora(model)
    assert all(layer.may_fold for layer in lora_layers(model).values())


def test_a_bad_requantisation_is_caught(monkeypatch):
    """As if packed bytes were scrambled: the dense proof passes, the 4-bit layer must not."""
    import lora_kit.lora_merge as module

    scrambled = lambda layer: true_weight(layer).flip(0)  # noqa: E731
    model = adapted(nf4_llama())
    monkeypatch.setattr(module, "true_weight", scrambled)
    refuse(model, MergeError, "Re-quantising")


def test_irreversible_merge_says_so():
    model = adapted(tiny_llama())
    merge_lora(model, ids(), reversible=False)
    with pytest.raises(BadInputError, match="reversible=False"):
        unmerge_lora(model)


# ---------------------------------------------------------------- baking
@pytest.mark.parametrize("tied", [False, True])
def test_a_baked_model_is_plain_saves_and_loads(tmp_path, tied):
    model = tiny_llama(tie_word_embeddings=tied)
    table = model.model.embed_tokens.weight.clone()
    adapted(model, LoraSpec(4, 8, ["all", "lm_head"]))
    before = logits(model)
    bake_lora(model, ids())
    assert not lora_layers(model)
    assert type(model.lm_head) is nn.Linear
    assert distance(logits(model), before) < 1e-5
    assert torch.equal(model.model.embed_tokens.weight, table)  # the head's change is not its
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert distance(logits(again), before) < 1e-5


def test_baking_a_4_bit_base_gives_a_dense_model():
    model = adapted(nf4_llama())
    before = logits(model)
    bake_lora(model, ids())
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert distance(logits(model), before) < 1e-5
