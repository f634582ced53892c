"""One base in any storage is one base; another model of the same shape is not."""

import json

import pytest
import torch
from lora_fixtures import ids, tiny_llama
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_kit.fingerprint import ModelFingerprint, fingerprint_model
from lora_kit.linear4bit import NF4Linear
from lora_kit.lora import LoraSpec, add_lora, merge_lora

WIDE = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3)


def base(seed=0):
    return tiny_llama(seed, **WIDE)


def packed(model, kind):
    for path, layer in [m for m in model.named_modules() if type(m[1]) is nn.Linear]:
        if path == "lm_head":
            continue
        if kind == "nf4":
            new = NF4Linear.from_linear(layer)
        else:
            bnb = pytest.importorskip("bitsandbytes")
            new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, False, quant_type="nf4")
            new.weight = bnb.nn.Params4bit(
                layer.weight.data.clone(), requires_grad=False, quant_type="nf4"
            )
            new = new.to("cpu")
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
    return model.eval()


def test_deterministic_and_round_trips_through_json():
    print_ = fingerprint_model(base(), "tiny")
    assert fingerprint_model(base(), "tiny").digest == print_.digest
    assert len(print_.digest) == 12
    assert int(print_.digest, 16) >= 0
    again = ModelFingerprint.from_dict(json.loads(json.dumps(print_.to_dict())))
    assert again == print_
    assert again.mismatch(print_) is None
    assert len(json.dumps(print_.to_dict())) < 20_000


@pytest.mark.parametrize(
    "storage", ["float16", "bfloat16", "nf4", "bitsandbytes", "bitsandbytes, used"]
)
def test_same_base_in_another_storage_matches(storage):
    dense = fingerprint_model(base())
    if storage.startswith(("nf4", "bits")):
        other = packed(base(), storage.split(",")[0])
        if "used" in storage:  # an evaluation pass repacks bitsandbytes' bytes in place
            with torch.no_grad():
                other(ids())
    else:
        other = base().to(getattr(torch, storage))
    other = fingerprint_model(other)
    assert other.digest != dense.digest
    assert other.mismatch(dense) is None
    assert dense.mismatch(other) is None


def test_another_model_of_the_same_shape_is_named():
    one, two = fingerprint_model(base(0), "tiny-a"), fingerprint_model(base(1), "tiny-b")
    sentence = one.mismatch(two)
    assert "tiny-a" in sentence
    assert "tiny-b" in sentence
    assert one.digest in sentence
    assert one.mismatch(fingerprint_model(packed(base(1), "nf4"))) is not None
    assert "num_hidden_layers is 3 there and 2 here" in one.mismatch(
        fingerprint_model(tiny_llama(0, **WIDE | {"num_hidden_layers": 2}))
    )


@pytest.mark.parametrize("part", ["model.embed_tokens", "model.norm", "model.layers.0.mlp.up_proj"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_one_percent_change_is_seen(part, dtype):
    changed = base()
    changed.get_submodule(part).weight.data *= 1.01
    changed = changed.to(getattr(torch, dtype))
    sampled = fingerprint_model(base())
    seen = f"{part}.weight" in sampled.samples
    assert seen or "up_proj" in part  # not every linear layer is in the sample
    assert (sampled.mismatch(fingerprint_model(changed)) is not None) == seen


def test_every_linear_layer_trained_is_seen():
    changed = base()
    generator = torch.Generator().manual_seed(0)
    for module in changed.modules():
        if type(module) is nn.Linear:
            noise = torch.randn(module.weight.shape, generator=generator)
            module.weight.data += 0.001 * module.weight.std() * noise
    assert fingerprint_model(base()).mismatch(fingerprint_model(changed))


def test_nan_never_matches():
    broken = base()
    broken.model.norm.weight.data.fill_(float("nan"))
    assert fingerprint_model(base()).mismatch(fingerprint_model(broken)) is not None


def test_adapters_and_wrappers_are_looked_through():
    plain = fingerprint_model(base()).digest
    model = add_lora(base(), LoraSpec(4, 8, ["all", "lm_head"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    assert fingerprint_model(model).digest == plain
    merge_lora(model, ids())
    assert fingerprint_model(model).digest == plain
    for dora in (False, True):
        config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], use_dora=dora)
        assert fingerprint_model(get_peft_model(base(), config)).digest == plain


def test_a_plain_torch_model_and_a_local_path_name(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    assert fingerprint_model(model).name == "Sequential"
    loaded = base()
    loaded.config._name_or_path = str(tmp_path)
    assert fingerprint_model(loaded).name == tmp_path.name
