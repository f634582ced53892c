"""Adapter layers, prefix tuning, last layers: exact starts, who trains, counts, peft's prefix."""

import pytest
import torch
from lora_fixtures import close, ids, tiny_llama
from peft import PrefixTuningConfig, get_peft_model
from torch import nn

from lora_kit.errors import BadInputError
from lora_kit.lora import count_parameters
from lora_kit.peft_families import (
    AdapterLayer,
    PrefixTuned,
    add_adapter_layers,
    remove_adapter_layers,
    tune_last_layers,
)


def logits(model, **options):
    with torch.no_grad():
        return model(ids(), **options).logits


def step(model):
    """One optimiser step; returns the names of what moved."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(ids(), labels=ids()).loss.backward()
        optimizer.step()
    return {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}


def test_adapter_layers_start_as_the_base_and_leave_it_alone():
    model = tiny_llama()
    bare = logits(model)
    add_adapter_layers(model, 5, seed=0)
    assert torch.equal(logits(model), bare)
    trainable, _ = count_parameters(model)
    assert trainable == 2 * 2 * (32 * (2 * 5 + 1) + 5)
    moved = step(model)
    assert moved == {k for k in model.state_dict() if ".down." in k or ".up." in k}
    assert not torch.allclose(logits(model), bare)
    with pytest.raises(BadInputError, match="already"):
        add_adapter_layers(model, 5)
    remove_adapter_layers(model)
    assert torch.equal(logits(model), bare)
    assert all(p.requires_grad for p in model.parameters())


def test_adapter_layer_is_the_formula():
    base = nn.Linear(6, 4)
    layer = AdapterLayer(base, 3, torch.Generator().manual_seed(0))
    nn.init.normal_(layer.up.weight)
    x = torch.randn(2, 6)
    y = base(x)
    hidden = torch.nn.functional.gelu(y @ layer.down.weight.T + layer.down.bias)
    assert torch.allclose(layer(x), y + hidden @ layer.up.weight.T + layer.up.bias, atol=1e-6)


def test_prefix_equals_real_tokens_in_front():
    """A prefix made of real tokens' keys and values is those tokens, as far as attention goes."""
    model = tiny_llama()
    front = ids(1, 4, seed=9)
    tuned = PrefixTuned(model, 4)
    tuned.start_from(front)
    whole = torch.cat([front.expand(3, -1), ids()], dim=1)
    with torch.no_grad():
        expected = model(whole).logits[:, 4:]
    close(logits(tuned), expected, 1e-5)
    mask = torch.ones_like(ids())
    close(logits(tuned, attention_mask=mask), expected, 1e-5)


def test_prefix_equals_pefts():
    tuned = PrefixTuned(tiny_llama(), 3, seed=1)
    nn.init.normal_(tuned.prefix, std=0.3)
    other = get_peft_model(
        tiny_llama(), PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    ).eval()
    # peft keeps one row per virtual token: layers x (key, value) x heads x head size
    rows = tuned.prefix.detach().permute(3, 0, 1, 2, 4).reshape(3, -1)
    other.prompt_encoder["default"].embedding.weight.data.copy_(rows)
    close(logits(tuned), logits(other), 1e-5)
    assert count_parameters(tuned)[0] == other.get_nb_trainable_parameters()[0]


def test_only_the_prefix_trains():
    tuned = PrefixTuned(tiny_llama(), 3)
    assert step(tuned) == {"prefix"}


@pytest.mark.parametrize("blocks", [1, 2])
def test_last_layers(blocks):
    model = tune_last_layers(tiny_llama(), blocks)
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    assert count_parameters(model)[0] == blocks * block + 32
    moved = step(model)
    assert moved == {k for k, p in model.named_parameters() if p.requires_grad}
    assert any("layers.1." in k for k in moved)
    assert any("layers.0." in k for k in moved) == (blocks == 2)


@pytest.mark.parametrize(
    ("action", "match"),
    [
        (lambda m: add_adapter_layers(m, 0), "width must be"),
        (lambda m: tune_last_layers(m, 3), "between 1 and 2, not 3"),
        (lambda m: tune_last_layers(m, 0), "between 1 and 2"),
        (lambda m: PrefixTuned(m, 0), "length must be"),
        (lambda m: PrefixTuned(nn.Linear(2, 2), 3), "needs a decoder"),
        (lambda m: add_adapter_layers(nn.Sequential(nn.Linear(2, 2)), 3), "nowhere to go"),
        (lambda m: tune_last_layers(nn.Linear(2, 2)), "no stack of blocks"),
    ],
)
def test_bad_input_changes_nothing(action, match):
    model = tiny_llama()
    before = logits(model)
    with pytest.raises(BadInputError, match=match):
        action(model)
    assert torch.equal(logits(model), before)
    assert all(p.requires_grad for p in model.parameters())
