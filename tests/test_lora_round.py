"""Half-precision copies: the same adapter to within fp16's rounding, for peft and for this kit."""

import json

import pytest
import torch
from lora_fixtures import close, ids, tiny_llama
from peft import PeftModel
from safetensors.torch import load_file

from lora_kit.errors import BadInputError, CorruptFileError
from lora_kit.lora import LoraSpec, add_lora, load_lora, lora_layers, read_adapter, save_lora
from lora_kit.lora_round import round_adapter


@pytest.fixture
def saved(tmp_path):
    model = add_lora(tiny_llama(), LoraSpec(4, 8), seed=0)
    generator = torch.Generator().manual_seed(1)
    for layer in lora_layers(model).values():
        with torch.no_grad():
            layer.lora_B["default"].normal_(std=0.1, generator=generator)
    return save_lora(model, tmp_path / "full")


def test_half_the_bytes_the_same_adapter(saved, tmp_path):
    small = round_adapter(saved, tmp_path / "small", base="somebody/some-model")
    full, half = read_adapter(saved), read_adapter(small)
    assert half.fingerprint == full.fingerprint
    assert half.config == full.config | {"base_model_name_or_path": "somebody/some-model"}
    for path, parts in full.tensors.items():
        for kind, tensor in parts.items():
            assert half.tensors[path][kind].dtype == torch.float16
            assert torch.equal(half.tensors[path][kind], tensor.to(torch.float16))
    sizes = [sum(t.nbytes for t in load_file(f / "adapter_model.safetensors").values())
             for f in (saved, small)]  # fmt: skip
    assert sizes[1] * 2 == sizes[0]


def test_it_answers_as_the_full_one_here_and_in_peft(saved, tmp_path):
    small = round_adapter(saved, tmp_path / "small")
    with torch.no_grad():
        full = load_lora(tiny_llama(), saved)(ids()).logits
        half = load_lora(tiny_llama(), small)(ids()).logits
        theirs = PeftModel.from_pretrained(tiny_llama(), small)(ids()).logits
    close(half, full, 2e-3)
    assert not torch.equal(half, full)
    close(theirs, half)


def test_what_fp16_cannot_hold(saved, tmp_path):
    model = load_lora(tiny_llama(), saved)
    with torch.no_grad():
        next(iter(lora_layers(model).values())).lora_B["default"][0, 0] = 1e5
    save_lora(model, saved)
    with pytest.raises(BadInputError, match=r"lora_B of model\.layers\.0\.self_attn\.q_proj"):
        round_adapter(saved, tmp_path / "small")
    assert not (tmp_path / "small").exists()
    assert read_adapter(round_adapter(saved, tmp_path / "b", torch.bfloat16))


def test_a_broken_adapter_is_refused(saved, tmp_path):
    weights = saved / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CorruptFileError, match="not a whole safetensors file"):
        round_adapter(saved, tmp_path / "small")
    (saved / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(BadInputError, match="'IA3'"):
        round_adapter(saved, tmp_path / "small")
