"""peft's format both ways, the fingerprint in the file, and files that must be refused."""

import itertools
import json
import pickle
import shutil
import warnings

import pytest
import torch
from lora_fixtures import PLACEMENTS, close, ids, tiny_llama
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from lora_kit.errors import BadInputError, CorruptFileError, NotAvailableError, UnknownNameError
from lora_kit.fingerprint import fingerprint_model
from lora_kit.lora import (
    LoraSpec,
    active_adapter,
    adapter_names,
    add_lora,
    load_lora,
    lora_layers,
    merge_lora,
    read_adapter,
    remove_lora,
    save_lora,
    stamp_fingerprint,
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
VARIANTS = {
    "plain": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "gaussian": {"init": "gaussian"},
    "pissa": {"init": "pissa"},
    "pissa-rslora": {"init": "pissa", "rslora": True},
}


def logits(model):
    with torch.no_grad():
        return model(ids()).logits


def trained(spec, name="default", seed=0):
    model = add_lora(tiny_llama(seed), spec, name, seed=0)
    generator = torch.Generator().manual_seed(1)
    for layer in lora_layers(model).values():
        for parameter in layer.adapter_parameters(name):
            step = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(step.to(parameter) * 0.05)
    return model


@pytest.fixture
def saved(tmp_path):
    return save_lora(trained(LoraSpec(4, 8)), tmp_path / "adapter")


# ---------------------------------------------------------------- round trips
@pytest.mark.parametrize(("variant", "placement"), itertools.product(VARIANTS, PLACEMENTS))
def test_ours_to_ours_and_to_peft(tmp_path, variant, placement):
    model = trained(LoraSpec(4, 6, placement, **VARIANTS[variant]))
    before = logits(model)
    save_lora(model, tmp_path)
    exact = VARIANTS[variant].get("init") != "pissa"  # that one is saved as a sum of two products
    again = load_lora(tiny_llama(), tmp_path)
    close(logits(again), before, 0 if exact else 1e-6)
    other = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    close(logits(other), before, 1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "pissa"},
    ],
    ids=str,
)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_pefts_to_ours(tmp_path, options, placement):
    config = LoraConfig(r=4, lora_alpha=6, target_modules=PLACEMENTS[placement], **options)
    other = get_peft_model(tiny_llama(), config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in other.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
    other.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no fingerprint"):
        mine = load_lora(tiny_llama(), tmp_path)
    close(logits(mine), logits(other), 1e-6)
    remove_lora(mine)
    close(logits(mine), logits(tiny_llama()), 0)


def test_pefts_named_adapter_lies_in_a_folder_of_its_name(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    other = get_peft_model(tiny_llama(), config, adapter_name="maths").eval()
    other.save_pretrained(tmp_path)
    stamp_fingerprint(tmp_path / "maths", fingerprint_model(tiny_llama(), "tiny"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine = load_lora(tiny_llama(), tmp_path, "maths")
    close(logits(mine), logits(other), 1e-6)


def test_a_head_saved_along_must_be_this_models_own(tmp_path):
    config = LoraConfig(r=2, target_modules=["lm_head", "q_proj"])
    other = get_peft_model(tiny_llama(), config).eval()
    other.save_pretrained(tmp_path)
    refused(tmp_path, BadInputError, "brings its own weight for lm_head", tiny_llama(1), force=True)


def test_peft_reads_our_config_without_complaint(saved):
    config = LoraConfig.from_pretrained(saved)
    assert (config.r, config.lora_alpha, config.target_modules) == (4, 8, set(PLACEMENTS["all"]))
    assert config.task_type == "CAUSAL_LM"


def test_one_layer_of_many_is_written_by_its_path(tmp_path):
    path = "model.layers.1.mlp.up_proj"
    model = trained(LoraSpec(4, 8, path))
    save_lora(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == [path]
    other = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    close(logits(other), logits(model), 1e-6)


def test_saving_while_merged_and_twice_over(tmp_path):
    model = trained(LoraSpec(4, 8))
    before = logits(model)
    save_lora(model, tmp_path)
    first = load_file(tmp_path / WEIGHTS)
    merge_lora(model, ids())
    save_lora(model, tmp_path, "default")
    second = load_file(tmp_path / WEIGHTS)
    assert second.keys() == first.keys()
    assert all(torch.equal(second[key], first[key]) for key in first)
    assert read_adapter(tmp_path).fingerprint.digest == fingerprint_model(tiny_llama()).digest
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    close(logits(load_lora(tiny_llama(), tmp_path)), before, 0)


def test_two_adapters_load_side_by_side_and_the_first_stays_active_if_asked(tmp_path):
    one, two = trained(LoraSpec(4, 8)), trained(LoraSpec(2, 2, "mlp"))
    save_lora(one, tmp_path / "1"), save_lora(two, tmp_path / "2")
    both = load_lora(tiny_llama(), tmp_path / "1", "one")
    load_lora(both, tmp_path / "2", "two", activate=False)
    assert adapter_names(both) == ["one", "two"]
    assert active_adapter(both) == "one"
    close(logits(both), logits(one), 0)


def test_loading_spares_the_global_random_generator(saved):
    model = tiny_llama()
    torch.manual_seed(3)
    load_lora(model, saved)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), after)


def test_half_precision_base_loads_the_same_adapter(saved):
    model = load_lora(tiny_llama().to(torch.bfloat16), saved)
    reference = logits(load_lora(tiny_llama(), saved))
    assert (logits(model).float() - reference).norm() < 0.02 * reference.norm()


# ---------------------------------------------------------------- refusals: nothing changes
def refused(folder, error, match, model=None, **options):
    model = tiny_llama() if model is None else model
    before, modules = logits(model), [type(m) for m in model.modules()]
    trains = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=match) as caught:
        load_lora(model, folder, **options)
    assert "\n" not in str(caught.value)
    assert torch.equal(logits(model), before)
    assert [type(m) for m in model.modules()] == modules
    assert [p.requires_grad for p in model.parameters()] == trains


def test_another_base_is_refused_with_both_names(saved):
    stamp_fingerprint(saved, fingerprint_model(tiny_llama(0), "tiny-a"))
    stranger = tiny_llama(1)
    stranger.config._name_or_path = "tiny-b"
    refused(saved, BadInputError, r"trained on another base: tiny-a .* tiny-b", stranger)
    model = load_lora(stranger, saved, force=True)
    assert adapter_names(model) == ["default"]


@pytest.mark.parametrize("layers", [1, 3])
def test_a_base_with_fewer_or_more_layers(saved, layers):
    model = tiny_llama(num_hidden_layers=layers)
    refused(saved, BadInputError, f"num_hidden_layers is 2 there and {layers} here", model)
    if layers == 1:  # force does not make weights fit that have no place
        refused(
            saved,
            BadInputError,
            "which this model lacks",
            tiny_llama(num_hidden_layers=1),
            force=True,
        )


def test_wrong_shapes_are_refused_even_with_force(saved):
    model = tiny_llama(intermediate_size=48)
    refused(saved, BadInputError, "lora_. of shape .* belongs to another base", model, force=True)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_truncated_safetensors(saved, keep):
    whole = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(whole[:keep])
    refused(saved, CorruptFileError, "not a whole safetensors file")


def test_a_pickle_is_refused_unopened(tmp_path, saved):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was opened",))

    folder = tmp_path / "pickled"
    folder.mkdir()
    shutil.copy(saved / CONFIG, folder / CONFIG)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    refused(folder, BadInputError, "is a pickle, which can run code")
    refused(folder / "adapter_model.bin", BadInputError, "is a pickle")
    shutil.move(folder / "adapter_model.bin", folder / WEIGHTS)  # renaming does not help
    refused(folder, CorruptFileError, "not a whole safetensors file")


def test_duplicate_name(saved):
    model = load_lora(tiny_llama(), saved)
    refused(saved, BadInputError, "'default' is already there", model)


def edit(folder, **changes):
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"r": 5}, BadInputError, "shape"),
        ({"r": 0}, BadInputError, "rank must be"),
        ({"lora_alpha": 0}, BadInputError, "alpha must be"),
        ({"peft_type": "LOHA"}, BadInputError, "kind 'LOHA'"),
        ({"alpha_pattern": {"q_proj": 2}}, BadInputError, "alpha_pattern, which this kit"),
        ({"modules_to_save": ["lm_head"]}, BadInputError, "modules_to_save"),
        ({"bias": "all"}, BadInputError, "bias"),
        ({"use_dora": True}, CorruptFileError, "lacks the DoRA magnitude"),
        ({"init_lora_weights": "olora"}, BadInputError, "started with 'olora'"),
    ],
)
def test_configs_we_do_not_do(saved, changes, error, match):
    edit(saved, **changes)
    refused(saved, error, match)


def test_missing_or_broken_files(tmp_path, saved):
    refused(tmp_path / "nowhere", NotAvailableError, "not a saved adapter")
    (saved / CONFIG).write_text('{"peft_type": "LO')
    refused(saved, CorruptFileError, "not valid JSON")
    (saved / CONFIG).unlink()
    refused(saved, NotAvailableError, "no adapter_config.json")


def rewrite(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def test_broken_contents(saved):
    first = sorted(load_file(saved / WEIGHTS))[0]
    rewrite(saved, lambda t: t[first].fill_(float("nan")))
    refused(saved, CorruptFileError, "NaN or infinity")
    rewrite(saved, lambda t: t.pop(first))
    refused(saved, CorruptFileError, "only half of the adapter")


def test_another_kind_of_adapter(tmp_path):
    config = PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    refused(tmp_path, BadInputError, "kind 'PREFIX_TUNING'")


def test_embedding_adapters_are_refused_clearly(tmp_path):
    config = LoraConfig(r=2, target_modules=["embed_tokens"])
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    refused(tmp_path, BadInputError, "not a LoRA weight of a linear layer")


def test_saving_nan_or_an_unknown_name_writes_nothing(tmp_path):
    model = trained(LoraSpec(4, 8))
    with pytest.raises(UnknownNameError, match="Unknown adapter 'x'"):
        save_lora(model, tmp_path / "a", "x")
    next(iter(lora_layers(model).values())).lora_A["default"].data[0, 0] = float("inf")
    with pytest.raises(BadInputError, match="not saved"):
        save_lora(model, tmp_path / "a")
    with pytest.raises(BadInputError, match="no adapter"):
        save_lora(tiny_llama(), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_read_adapter_shows_what_is_inside(saved):
    files = read_adapter(saved)
    assert files.config["r"] == 4
    assert len(files.tensors) == 14
    assert files.fingerprint.mismatch(fingerprint_model(tiny_llama())) is None
