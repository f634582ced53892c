"""Where the adapters of a model are, and putting layers in and out: what the verbs build on."""

from __future__ import annotations

import re

import torch
from torch import nn

from lora_kit.errors import BadInputError
from lora_kit.lora_layer import LoRALinear, LoraSpec
from lora_kit.lora_targets import canonical_name


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers that carry adapters, by canonical path, in the model's order."""
    return {
        canonical_name(path): module
        for path, module in model.named_modules()
        if isinstance(module, LoRALinear)
    }


def adapter_names(model: nn.Module) -> list[str]:
    """The adapters on this model, in the order they came."""
    return list(
        dict.fromkeys(name for layer in lora_layers(model).values() for name in layer.specs)
    )


def active_adapter(model: nn.Module) -> str | None:
    """The adapter that answers and trains, or None."""
    for layer in lora_layers(model).values():
        if layer.active is not None:
            return layer.active
    return None


def require_adapters(model: nn.Module) -> None:
    if not lora_layers(model):
        raise BadInputError("This model carries no adapter: add_lora or load_lora first.")


def check_new_name(model: nn.Module, name: str) -> None:
    """Raise BadInputError unless `name` can be a new adapter of this model as it stands."""
    if hasattr(model, "peft_config"):
        raise BadInputError(
            "This model is wrapped by peft: take its adapters off first (model.unload())."
        )
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise BadInputError(f"Adapter name {name!r} must be letters, digits, '_' or '-' (no dots).")
    if hasattr(nn.ParameterDict, name):
        raise BadInputError(f"Adapter name {name!r} is taken by torch: choose another.")
    if name in adapter_names(model):
        raise BadInputError(
            f"An adapter named {name!r} is already there: adding twice would train two in one. "
            "Choose another name, or remove_lora(model, name) first."
        )
    if any(layer.merged for layer in lora_layers(model).values()):
        raise BadInputError("An adapter is merged: unmerge_lora(model) before adding another.")


def swap_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put `new` where the module of this path is."""
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def attach(
    model: nn.Module,
    specs: dict[str, LoraSpec],
    name: str,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, LoRALinear]:
    """Wrap the layers at these paths and give each the adapter. Checks are the caller's."""
    if not hasattr(model, "_lora_thawed"):
        model._lora_thawed = [p for p in model.parameters() if p.requires_grad]
        model.requires_grad_(False)
    layers = {}
    for path, spec in specs.items():
        layer = model.get_submodule(path)
        if not isinstance(layer, LoRALinear):
            training = layer.training
            layer = LoRALinear(layer)
            swap_module(model, path, layer)
            layer.train(training)
        layer.add(name, spec, generator, dtype)
        layers[path] = layer
    return layers


def set_active(model: nn.Module, name: str | None) -> None:
    """Only the active adapter answers, and only its parameters require a gradient."""
    for layer in lora_layers(model).values():
        layer.active = name if name in layer.specs else None
        for other in layer.specs:
            for parameter in layer.adapter_parameters(other):
                parameter.requires_grad_(other == name)
                if other != name:
                    parameter.grad = None
