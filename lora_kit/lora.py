"""LoRA's verbs: add, enable, disable, switch, remove, count; and, from their own modules, merge,
unmerge (`lora_merge`), save and load (`lora_files`).

    spec = LoraSpec(rank=16, alpha=32)            # s = 2 on q, k, v, o, gate, up and down
    add_lora(model, spec, seed=0)                 # B = 0: the model still says what it said
    ...train the parameters that require a gradient...
    save_lora(model, "my-adapter")                # peft's own format, and a fingerprint of the base

Every verb checks first and changes the model after, so a refused call leaves it as it was.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lora_kit.errors import BadInputError, unknown_name
from lora_kit.lora_base import DENSE, base_kind
from lora_kit.lora_files import load_lora, read_adapter, save_lora, stamp_fingerprint
from lora_kit.lora_layer import LoRALinear, LoraSpec, check_rank
from lora_kit.lora_merge import MergeReport, bake_lora, merge_lora, unmerge_lora
from lora_kit.lora_state import (
    active_adapter,
    adapter_names,
    attach,
    check_new_name,
    lora_layers,
    require_adapters,
    set_active,
    swap_module,
)
from lora_kit.lora_targets import linear_layers, match_targets

__all__ = [
    "LoRALinear",
    "LoraSpec",
    "MergeReport",
    "active_adapter",
    "adapter_names",
    "add_lora",
    "bake_lora",
    "count_parameters",
    "disable_lora",
    "enable_lora",
    "load_lora",
    "lora_layers",
    "match_targets",
    "merge_lora",
    "read_adapter",
    "remove_lora",
    "save_lora",
    "stamp_fingerprint",
    "switch_lora",
    "unmerge_lora",
]


def add_lora(
    model: nn.Module,
    spec: LoraSpec,
    name: str = "default",
    seed: int | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Wrap the targeted layers, freeze everything else, and make the new adapter the active one.

    seed: makes A's random start repeatable without touching torch's global generator.
    dtype: of A and B; by default fp32, also over half-precision and 4-bit bases.
    Returns the same model (changed in place).
    Raises BadInputError on a name already taken, a target that matches nothing, a rank above
        min(in, out) of any targeted layer, a merged model, or a model wrapped by peft.
    """
    check_new_name(model, name)
    paths = match_targets(model, spec.targets)
    layers = linear_layers(model)
    for path in paths:
        check_rank(spec, layers[path].in_features, layers[path].out_features, path)
        if spec.init == "pissa" and base_kind(layers[path]) != DENSE:
            raise BadInputError(
                f"init='pissa' needs a dense base, and {path} is stored in 4 bits: "
                "add the adapter before quantising, or use init='kaiming'."
            )
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    attach(model, {path: spec for path in paths}, name, generator, dtype)
    set_active(model, name)
    return model


def switch_lora(model: nn.Module, name: str | None) -> None:
    """Make `name` the active adapter, the one that answers and the one that trains.

    name: an adapter of this model, or None for the bare base.
    Raises UnknownNameError (listing the known ones), BadInputError while merged.
    """
    require_adapters(model)
    if name is not None and name not in adapter_names(model):
        raise unknown_name("adapter", name, adapter_names(model))
    _refuse_merged(model, "switching")
    set_active(model, name)


def remove_lora(model: nn.Module, name: str | None = None) -> None:
    """Take an adapter off, or all of them (name=None); the last one to go leaves the bare model.

    Layers are unwrapped, and what required a gradient before the first `add_lora` does so again.
    Raises UnknownNameError; BadInputError when there is none, or while merged.
    """
    require_adapters(model)
    if name is not None and name not in adapter_names(model):
        raise unknown_name("adapter", name, adapter_names(model))
    _refuse_merged(model, "removing")
    for path, layer in lora_layers(model).items():
        for mine in [name] if name else list(layer.specs):
            if mine in layer.specs:
                layer.drop(mine)
        if not layer.specs:
            swap_module(model, path, layer.base_layer)
    if not lora_layers(model):
        for parameter in model._lora_thawed:
            parameter.requires_grad_(True)
        del model._lora_thawed


def _refuse_merged(model: nn.Module, doing: str) -> None:
    merged = {layer.merged for layer in lora_layers(model).values()} - {None}
    if merged:
        raise BadInputError(
            f"Adapter {merged.pop()!r} is merged: call unmerge_lora(model) before {doing}."
        )


class _Restore:
    """What enable and disable hand back: usable as a context, which puts the old state back."""

    def __init__(self, undo: Callable[[], None]):
        self._undo = undo

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_) -> None:
        self._undo()


def disable_lora(model: nn.Module) -> _Restore:
    """The bare base answers until `enable_lora`, or to the end of a `with disable_lora(model):`."""
    return _set_enabled(model, False)


def enable_lora(model: nn.Module) -> _Restore:
    """The active adapter answers again; as a context, to the end of the block."""
    return _set_enabled(model, True)


def _set_enabled(model: nn.Module, enabled: bool) -> _Restore:
    require_adapters(model)
    _refuse_merged(model, "enabling or disabling")
    before = [(layer, layer.enabled) for layer in lora_layers(model).values()]
    for layer, _ in before:
        layer.enabled = enabled

    def undo() -> None:
        for layer, state in before:
            layer.enabled = state

    return _Restore(undo)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total). A 4-bit weight counts as its out · in numbers, a shared one once."""
    packed: dict[int, int] = {}
    extra = 0
    for module in model.modules():
        kind = base_kind(module)
        if kind not in (None, DENSE):
            logical = module.in_features * module.out_features
            own = [t for n, t in module.named_parameters(recurse=False) if n != "bias"]
            packed.update({id(t): 0 for t in own})
            extra += logical
    trainable = total = 0
    for parameter in model.parameters():
        count = packed.get(id(parameter), parameter.numel())
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total + extra
