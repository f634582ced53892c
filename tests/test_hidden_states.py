"""Pooled states: those of transformers itself, whatever stands beside a prompt in its batch."""

import pytest
import torch

from lora_kit.errors import BadInputError
from lora_kit.hidden_states import hidden_states
from lora_kit.lora import LoraSpec, add_lora, lora_layers
from lora_kit.prompts import prompt_ids

PROMPTS = ["reverse 417=", "7", "a longer prompt than the others are", "12+34="]


def reference(model, tokenizer, prompt, layer):
    with torch.no_grad():
        ids = torch.tensor([prompt_ids(tokenizer, prompt)])
        states = []
        handle = (
            model.get_decoder()
            .layers[layer - 1]
            .register_forward_hook(
                lambda _m, _i, out: states.append(out[0] if isinstance(out, tuple) else out)
            )
        )
        model(ids)
        handle.remove()
    state = states[0][0].float()
    return {"last": state[-1], "mean": state[1:].mean(0) if len(state) > 1 else state[0]}


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_pooling_by_hand(tiny, batch_size):
    found = hidden_states(tiny.model, tiny.tokenizer, PROMPTS, [1, 2], batch_size)
    assert set(found) == {(n, p) for n in (1, 2) for p in ("mean", "last")}
    for i, prompt in enumerate(PROMPTS):
        for layer in (1, 2):
            wanted = reference(tiny.model, tiny.tokenizer, prompt, layer)
            for pooling, vector in wanted.items():
                torch.testing.assert_close(found[layer, pooling][i], vector, atol=1e-4, rtol=1e-4)


def test_no_layer_behind_the_last_wanted_is_run_and_no_hook_stays(tiny):
    ran = []
    handle = tiny.model.get_decoder().layers[1].register_forward_hook(lambda *_: ran.append(1))
    before = [len(m._forward_hooks) for m in tiny.model.modules()]
    hidden_states(tiny.model, tiny.tokenizer, PROMPTS, [1])
    assert not ran
    hidden_states(tiny.model, tiny.tokenizer, PROMPTS, [2])
    assert ran
    assert [len(m._forward_hooks) for m in tiny.model.modules()] == before
    handle.remove()


def test_an_adapter_on_the_model_does_not_speak(tiny):
    bare = hidden_states(tiny.model, tiny.tokenizer, PROMPTS, [2])
    add_lora(tiny.model, LoraSpec(4, 8), seed=0)
    for layer in lora_layers(tiny.model).values():
        torch.nn.init.normal_(layer.lora_B["default"])
    again = hidden_states(tiny.model, tiny.tokenizer, PROMPTS, [2])
    assert torch.equal(again[2, "mean"], bare[2, "mean"])
    assert all(layer.enabled for layer in lora_layers(tiny.model).values())


@pytest.mark.parametrize("prompts", ["one text", [], ["fine", ""]])
def test_what_is_no_list_of_prompts(tiny, prompts):
    with pytest.raises(BadInputError, match=r"list of texts|no prompt, or an empty one"):
        hidden_states(tiny.model, tiny.tokenizer, prompts, [1])
