"""Adapters on disk: peft's format, read and written without peft, with a fingerprint of the base.

A folder holds `adapter_config.json` and `adapter_model.safetensors` (keys such as
`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`). The fingerprint rides in the
safetensors header, so it cannot be parted from the weights, and peft reads past it.
"""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import nn

from lora_kit.errors import BadInputError, CorruptFileError, NotAvailableError, unknown_name
from lora_kit.fingerprint import ModelFingerprint, fingerprint_model
from lora_kit.lora_base import DENSE, base_kind, true_weight
from lora_kit.lora_layer import LoRALinear, LoraSpec, check_rank, pissa_factors
from lora_kit.lora_state import (
    active_adapter,
    adapter_names,
    attach,
    check_new_name,
    lora_layers,
    require_adapters,
    set_active,
)
from lora_kit.lora_targets import linear_layers, shortest_targets
from lora_kit.store import write_json

CONFIG, WEIGHTS, STAMP = "adapter_config.json", "adapter_model.safetensors", "lora_kit.fingerprint"
PREFIX = "base_model.model."
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
# Fields of peft's config that change what an adapter computes and that this kit does not do.
UNSUPPORTED = (
    *("alpha_pattern", "rank_pattern", "modules_to_save", "fan_in_fan_out", "lora_bias"),
    *("layer_replication", "trainable_token_indices", "alora_invocation_tokens", "use_qalora"),
    *("use_bdlora", "arrow_config", "kasa_config", "velora_config", "monteclora_config"),
    *("target_parameters", "megatron_config"),
)


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter as read from disk, before it meets a model.

    tensors: {layer path: {"lora_A" | "lora_B" | "lora_magnitude": tensor}}.
    fingerprint: of the base it was trained on, or None where the file carries none.
    copies: {layer path: weight} of base layers that peft saved along (it does so for an output head
        that carries an adapter).
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, dict[str, torch.Tensor]] = field(repr=False)
    fingerprint: ModelFingerprint | None
    copies: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)


# ---------------------------------------------------------------------- writing
def save_lora(model: nn.Module, folder: str | Path, name: str | None = None) -> Path:
    """Write an adapter in peft's format. Both files appear whole or not at all.

    name: which adapter; by default the active one. A PiSSA adapter is written as the plain LoRA of
    rank 2r that it is relative to the untouched base: [B, B₀] [A; −A₀].
    Returns the folder. Raises BadInputError without adapters or with NaN in one; UnknownNameError.
    """
    require_adapters(model)
    name = name or active_adapter(model) or _only_name(model)
    if name not in adapter_names(model):
        raise unknown_name("adapter", name, adapter_names(model))
    layers = {p: layer for p, layer in lora_layers(model).items() if name in layer.specs}
    tensors = {}
    for path, layer in layers.items():
        for kind, tensor in _tensors_to_save(layer, name).items():
            if not torch.isfinite(tensor).all():
                raise BadInputError(f"Adapter {name!r} holds NaN or infinity at {path}: not saved.")
            tensors[f"{PREFIX}{path}.{kind}"] = tensor.to("cpu").contiguous()
    fingerprint = fingerprint_model(model)
    config = _config(model, layers, name, fingerprint)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stamp = {"format": "pt", STAMP: json.dumps(fingerprint.to_dict(), separators=(",", ":"))}
    _write_weights(folder, tensors, stamp)
    write_json(folder / CONFIG, config)
    return folder


def _write_weights(folder: Path, tensors: dict[str, torch.Tensor], stamp: dict[str, str]) -> None:
    draft = folder / f".{WEIGHTS}.part"
    save_file(tensors, draft, metadata=stamp)
    os.replace(draft, folder / WEIGHTS)


def _only_name(model: nn.Module) -> str:
    names = adapter_names(model)
    if len(names) != 1:
        raise BadInputError(f"No adapter is active: name the one to save ({', '.join(names)}).")
    return names[0]


def _tensors_to_save(layer: LoRALinear, name: str) -> dict[str, torch.Tensor]:
    a, b = layer.lora_A[name].detach(), layer.lora_B[name].detach()
    if layer.specs[name].init == "pissa":
        start_a, start_b = layer.start(name)
        a, b = torch.cat([a, -start_a], dim=0), torch.cat([b, start_b], dim=1)
    found = {"lora_A.weight": a, "lora_B.weight": b}
    if name in layer.lora_magnitude:
        found["lora_magnitude_vector"] = layer.lora_magnitude[name].detach()
    return found


def _config(model, layers, name, fingerprint) -> dict[str, Any]:
    spec = next(iter(layers.values())).specs[name]
    rank, alpha = spec.rank, spec.alpha
    if spec.init == "pissa":  # twice the rank at the same scale: alpha/r or alpha/sqrt(r)
        rank, alpha = 2 * rank, alpha * (2**0.5 if spec.rslora else 2)
    causal = type(model).__name__.endswith("ForCausalLM")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": fingerprint.name,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "target_modules": shortest_targets(list(layers), list(linear_layers(model))),
        "lora_dropout": spec.dropout,
        "init_lora_weights": "gaussian" if spec.init == "gaussian" else True,
        "use_rslora": spec.rslora,
        "use_dora": spec.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def stamp_fingerprint(folder: str | Path, fingerprint: ModelFingerprint) -> None:
    """Write a base's fingerprint into an adapter that another library saved."""
    path = _weights_file(Path(folder))
    tensors, header = _read_tensors(path)
    header = {"format": "pt", **header, STAMP: json.dumps(fingerprint.to_dict())}
    _write_weights(path.parent, tensors, header)


# ---------------------------------------------------------------------- reading
def read_adapter(folder: str | Path, name: str | None = None) -> AdapterFiles:
    """Read and check an adapter folder. peft keeps adapters not called "default" in a sub-folder
    of their name: that is looked into when `name` is given.

    Raises NotAvailableError (no such folder or file), BadInputError (a pickle, or a kind of adapter
    this kit does not do), CorruptFileError (truncated, or not what its name says).
    """
    folder = Path(folder)
    if not (folder / CONFIG).exists() and name and (folder / name / CONFIG).exists():
        folder = folder / name
    weights = _weights_file(folder)
    if not (folder / CONFIG).exists():
        raise NotAvailableError(f"{folder} has no {CONFIG}: it is not a saved adapter.")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise CorruptFileError(f"{folder / CONFIG} is not valid JSON: {error}.") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise BadInputError(f"{folder} holds an adapter of kind {kind!r}; this kit reads LORA.")
    unsupported = [f for f in UNSUPPORTED if config.get(f)]
    if config.get("bias", "none") != "none":
        unsupported.append("bias")
    if unsupported:
        raise BadInputError(f"{folder} uses {', '.join(unsupported)}, which this kit does not do.")
    raw, header = _read_tensors(weights)
    fingerprint = None
    if STAMP in header:
        try:
            fingerprint = ModelFingerprint.from_dict(json.loads(header[STAMP]))
        except (ValueError, KeyError, TypeError):
            raise CorruptFileError(f"The fingerprint in {weights} cannot be read.") from None
    ending = ".base_layer.weight"
    copies = {
        key.removesuffix(ending).removeprefix(PREFIX): raw.pop(key)
        for key in list(raw)
        if key.endswith(ending)
    }
    return AdapterFiles(folder, config, _by_layer(raw, weights), fingerprint, copies)


def _weights_file(folder: Path) -> Path:
    if folder.suffix in PICKLES or (folder.is_dir() and not (folder / WEIGHTS).exists()):
        pickles = [folder] if folder.suffix in PICKLES else _pickles(folder)
        if pickles:
            raise BadInputError(
                f"{pickles[0]} is a pickle, which can run code when it is opened: refused. "
                "Save the adapter as safetensors."
            )
    if not (folder / WEIGHTS).exists():
        raise NotAvailableError(f"{folder} has no {WEIGHTS}: it is not a saved adapter.")
    return folder / WEIGHTS


def _pickles(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix in PICKLES)


def _read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and header, read into memory and not mapped: a mapped file that somebody shortens
    later ends the whole process (SIGBUS), and one that is overwritten changes the tensors."""
    data = path.read_bytes()
    try:
        tensors = load_tensors(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return tensors, dict(header.get("__metadata__") or {})
    except (SafetensorError, ValueError, RuntimeError, KeyError) as error:
        raise CorruptFileError(
            f"{path} is not a whole safetensors file ({error}): copy or download it again."
        ) from None


def _by_layer(raw: dict[str, torch.Tensor], path: Path) -> dict[str, dict[str, torch.Tensor]]:
    endings = {
        ".lora_A.weight": "lora_A",
        ".lora_B.weight": "lora_B",
        ".lora_magnitude_vector": "lora_magnitude",
        ".lora_magnitude_vector.weight": "lora_magnitude",
    }
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in raw.items():
        ending = next((e for e in endings if key.endswith(e)), None)
        if ending is None:
            raise BadInputError(
                f"{path} holds {key}, which is not a LoRA weight of a linear layer."
            )
        if not torch.isfinite(tensor).all():
            raise CorruptFileError(f"{path} holds NaN or infinity in {key}.")
        layer = key.removesuffix(ending).removeprefix(PREFIX)
        layers.setdefault(layer, {})[endings[ending]] = tensor
    for layer, parts in layers.items():
        if "lora_A" not in parts or "lora_B" not in parts:
            raise CorruptFileError(f"{path} has only half of the adapter of {layer}.")
    if not layers:
        raise CorruptFileError(f"{path} holds no weights.")
    return layers


def load_lora(
    model: nn.Module,
    folder: str | Path,
    name: str = "default",
    force: bool = False,
    activate: bool = True,
) -> nn.Module:
    """Put a saved adapter (this kit's or peft's) on its base.

    force: load although the fingerprint names another base. Shapes must still fit.
    activate: make it the active adapter.
    Returns the same model. Raises what `read_adapter` raises, and BadInputError on a name already
        taken, another base (naming both), or layers this model lacks; the model is then unchanged.
    """
    check_new_name(model, name)
    files = read_adapter(folder, name)
    _check_base(model, files, force)
    spec = check_fit(files, linear_layers(model))
    before = active_adapter(model)
    plain = LoraSpec(spec.rank, spec.alpha, spec.targets, spec.dropout, "kaiming", spec.rslora)
    generator = torch.Generator().manual_seed(0)  # overwritten at once: spare the global one
    wrapped = attach(model, dict.fromkeys(files.tensors, plain), name, generator)
    with torch.no_grad():
        for path, parts in files.tensors.items():
            _fill(wrapped[path], name, spec, parts)
    set_active(model, name if activate else before)
    return model


def check_fit(files: AdapterFiles, layers: dict[str, nn.Module]) -> LoraSpec:
    """Check that an adapter's tensors and saved base weights fit these layers (by path); say what
    it is. Raises BadInputError, CorruptFileError."""
    spec = _spec(files)
    for path, parts in files.tensors.items():
        _check_tensors(files, path, parts, layers.get(path), spec)
    for path, weight in files.copies.items():
        _check_copy(files, path, weight, layers.get(path), spec)
    return spec


def _check_base(model: nn.Module, files: AdapterFiles, force: bool) -> None:
    if force:
        return
    if files.fingerprint is None:
        warnings.warn(
            f"{files.folder} carries no fingerprint of its base (it was saved by another library): "
            "only names and shapes are checked.",
            stacklevel=3,
        )
        return
    sentence = files.fingerprint.mismatch(fingerprint_model(model))
    if sentence:
        raise BadInputError(
            f"This adapter was trained on another base: {sentence} "
            "Load it on its own base, or pass force=True."
        )


def _spec(files: AdapterFiles) -> LoraSpec:
    config = files.config
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init not in ("gaussian", "pissa", "eva", "orthogonal"):
        raise BadInputError(
            f"{files.folder} was started with {init!r}, which changes the base's weights in a way "
            "this kit does not repeat; convert it to plain LoRA when saving."
        )
    targets = config.get("target_modules") or "all"
    return LoraSpec(
        rank=int(config["r"]),
        alpha=config["lora_alpha"],
        targets=targets if isinstance(targets, str) else tuple(targets),
        dropout=config.get("lora_dropout", 0.0),
        init=init if init in ("gaussian", "pissa") else "kaiming",
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
    )


def _check_tensors(files, path, parts, module, spec) -> None:
    if module is None:
        raise BadInputError(
            f"The adapter in {files.folder} has weights for {path}, which this model lacks: "
            "it belongs to another base."
        )
    check_rank(spec, module.in_features, module.out_features, path)
    wanted = {
        "lora_A": (spec.rank, module.in_features),
        "lora_B": (module.out_features, spec.rank),
        "lora_magnitude": (module.out_features,),
    }
    for kind, tensor in parts.items():
        if tuple(tensor.shape) != wanted[kind]:
            raise BadInputError(
                f"The adapter in {files.folder} has a {kind} of shape {tuple(tensor.shape)} for "
                f"{path}, where this model needs {wanted[kind]}: it belongs to another base."
            )
    if spec.dora and "lora_magnitude" not in parts:
        raise CorruptFileError(f"{files.folder} lacks the DoRA magnitude of {path}.")
    if spec.init == "pissa" and base_kind(getattr(module, "base_layer", module)) != DENSE:
        raise BadInputError(
            f"The adapter in {files.folder} is PiSSA over a dense base, and {path} is 4-bit here."
        )


def _check_copy(files, path, saved, module, spec) -> None:
    """A base weight saved along must be this model's own (for PiSSA: what is left of it)."""
    here = None if module is None else true_weight(module).to(torch.float32).cpu()
    if here is not None and here.shape == saved.shape:
        if spec.init == "pissa":
            a, b = pissa_factors(here, spec)
            here = here - spec.scale * b @ a
        if (here - saved.to(torch.float32)).norm() <= 4e-3 * here.norm():
            return
    raise BadInputError(
        f"The adapter in {files.folder} brings its own weight for {path}, and it is not this "
        "model's: the adapter belongs to another base, or that layer was trained as a whole."
    )


def _fill(layer: LoRALinear, name: str, spec: LoraSpec, parts: dict[str, torch.Tensor]) -> None:
    layer.specs[name] = spec
    a, b = layer.lora_A[name], layer.lora_B[name]
    a.copy_(parts["lora_A"])
    b.copy_(parts["lora_B"])
    if spec.dora:
        layer.lora_magnitude[name] = nn.Parameter(parts["lora_magnitude"].to(a))
    if spec.init == "pissa":  # peft saved it relative to the residual: find the same start again
        start_a, start_b = pissa_factors(true_weight(layer.unmerged_base), spec)
        layer.register_buffer(f"start_A_{name}", start_a.to(a))
        layer.register_buffer(f"start_B_{name}", start_b.to(b))
