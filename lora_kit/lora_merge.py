"""Merging that proves itself.

W' = W + ΔW is computed for every layer, tried on real inputs, and kept only if the model still says
what it said with the adapter beside the weights. A 4-bit base is dequantised from its true weight
(`lora_base.true_weight`), proved in that dense form, and only then quantised again; what the second
quantisation costs is measured and reported. Until the proof has passed, every old layer is still
there; a refused merge puts it back, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_kit.errors import BadInputError, LoraKitError, unknown_name
from lora_kit.lora_base import DENSE, base_kind, place_of, true_weight, with_weight
from lora_kit.lora_layer import LoRALinear
from lora_kit.lora_state import (
    active_adapter,
    adapter_names,
    lora_layers,
    require_adapters,
    set_active,
    swap_module,
)

# Largest relative output difference, ‖merged − unmerged‖ / ‖unmerged‖, that rounding explains.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
REQUANTISED_AT_MOST = 0.25  # relative weight error; NF4's own is about 0.09


class MergeError(LoraKitError):
    """A merge whose proof failed; the model is as it was before."""


@dataclass(frozen=True)
class MergeReport:
    """What the proof of a merge found. Distances are relative: ‖a − b‖ / ‖b‖ over the outputs.

    effect: how far the adapter moves the base's outputs (the size of what was merged).
    difference: merged against unmerged outputs; at most `tolerance`, or the merge is refused.
    weight_loss: mean relative error of the re-quantised weights (None for a dense result).
    delta_loss: the same error over ‖ΔW‖: at 1 the rounding is as large as all that was merged,
        and the adapter is as good as gone (None for a dense result).
    output_loss: outputs after re-quantisation against before it (None for a dense result).
    """

    name: str
    layers: int
    effect: float
    difference: float
    tolerance: float
    weight_loss: float | None = None
    delta_loss: float | None = None
    output_loss: float | None = None

    def __str__(self) -> str:
        said = (
            f"Merged {self.name!r} into {self.layers} layers: outputs moved by the adapter "
            f"{self.effect:.2%}, merged against unmerged {self.difference:.1e} "
            f"(allowed {self.tolerance:.0e})"
        )
        if self.weight_loss is not None:
            said += (
                f"; back in 4 bits the weights are {self.weight_loss:.1%} off, which is "
                f"{self.delta_loss:.0%} of the change merged; the outputs {self.output_loss:.2%}"
            )
        return said + "."


def merge_lora(
    model: nn.Module,
    inputs: Any = None,
    name: str | None = None,
    *,
    reversible: bool = True,
    dense: bool = False,
    tolerance: float | None = None,
) -> MergeReport:
    """Fold an adapter into the weights: W' = W + s · B A (for DoRA, rescaled by rows).

    inputs: a batch to prove it on, as the model takes it (a tensor, or a mapping such as a
        tokenizer's output); by default 2 x 16 seeded random token ids.
    name: the adapter; by default the active one.
    reversible: keep the old layers, so that `unmerge_lora` restores them bit for bit; costs the
        memory of the merged layers.
    dense: leave dense layers where the base was 4-bit, at the input's dtype: no re-quantisation.
    tolerance: largest relative output difference; by default from the dtype (fp32: 1e-4).
    Merging the merged adapter again changes nothing and returns the first report.
    Raises BadInputError in training mode, without adapters, or when another one is merged;
        UnknownNameError; MergeError when a number is not finite or the proof fails.
    """
    name, layers = _what_to_merge(model, name)
    if all(layer.merged == name for layer in layers.values()):
        return model._lora_merge_report
    _check_finite(layers, name)
    olds = {path: layer.base_layer for path, layer in layers.items()}
    before = active_adapter(model)
    set_active(model, name)
    try:
        report = _prove(model, layers, name, _batch(model, inputs), dense, tolerance)
    except BaseException:
        for path, layer in layers.items():
            layer.base_layer, layer.merged = olds[path], None
        set_active(model, before)
        raise
    for path, layer in layers.items():
        layer.set_aside(olds[path] if reversible else None)
    model._lora_merge_report = report
    return report


def _what_to_merge(model: nn.Module, name: str | None) -> tuple[str, dict[str, LoRALinear]]:
    """The adapter and its layers, after the checks that need no arithmetic."""
    require_adapters(model)
    names = adapter_names(model)
    if name is not None and name not in names:
        raise unknown_name("adapter", name, names)
    everything = lora_layers(model)
    merged = {layer.merged for layer in everything.values()} - {None}
    chosen = name or active_adapter(model) or (merged.pop() if merged else None)
    if chosen is None:
        raise BadInputError(f"No adapter is active: name the one to merge ({', '.join(names)}).")
    if merged - {chosen}:
        raise BadInputError(
            f"Adapter {merged.pop()!r} is merged already: unmerge_lora(model) before {chosen!r}."
        )
    if model.training or any(layer.training for layer in everything.values()):
        raise BadInputError(
            "The model is in training mode: finish training and call model.eval() before merging."
        )
    if not all(layer.enabled for layer in everything.values()):
        raise BadInputError("The adapters are disabled: enable_lora(model) before merging.")
    return chosen, {path: layer for path, layer in everything.items() if chosen in layer.specs}


def _check_finite(layers: dict[str, LoRALinear], name: str) -> None:
    for path, layer in layers.items():
        for parameter in layer.adapter_parameters(name):
            if not torch.isfinite(parameter).all():
                raise MergeError(f"Adapter {name!r} holds NaN or infinity at {path}: not merged.")


@torch.no_grad()
def _prove(model, layers, name, batch, dense, tolerance) -> MergeReport:
    with _input_dtypes(layers) as dtypes, _detours_kept(layers):
        unmerged = _outputs(model, batch, "with the adapter beside the weights")
    set_active(model, None)
    bare = _outputs(model, batch, "of the base alone")
    set_active(model, name)
    allowed = tolerance or max(TOLERANCE[_coarsest(layers[p], dtypes.get(p))] for p in layers)
    olds = {path: layer.base_layer for path, layer in layers.items()}
    four_bit = [path for path, old in olds.items() if base_kind(old) != DENSE]
    for path, layer in layers.items():
        weight = layer.merged_weight(name)
        if not torch.isfinite(weight).all():
            raise MergeError(f"The merged weight of {path} holds NaN or infinity: not merged.")
        old = olds[path]
        dtype = dtypes.get(path, weight.dtype) if path in four_bit else old.weight.dtype
        layer.base_layer = with_weight(old, weight.to(dtype), dense=True)
        layer.merged = name
    merged = _outputs(model, batch, "after merging")
    difference = _distance(merged, unmerged)
    if not difference <= allowed:
        raise MergeError(
            f"Merging {name!r} would change the outputs by {difference:.2e} (relative), more than "
            f"the {allowed:.0e} that rounding explains: not merged, nothing was changed."
        )
    effect = _distance(unmerged, bare)
    report = MergeReport(name, len(layers), effect, difference, allowed)
    if dense or not four_bit:
        return report
    changes = [float((layers[p].base_layer.weight - true_weight(olds[p])).norm()) for p in four_bit]
    losses = [_requantise(layers[path], olds[path], path) for path in four_bit]
    of_weight = sum(error / size for error, size in losses) / len(losses)
    of_delta = sum(e**2 for e, _ in losses) ** 0.5 / max(sum(c**2 for c in changes) ** 0.5, 1e-30)
    of_outputs = _distance(_outputs(model, batch, "after re-quantising"), merged)
    return MergeReport(
        name, len(layers), effect, difference, allowed, of_weight, of_delta, of_outputs
    )


def _requantise(layer: LoRALinear, like: nn.Module, path: str) -> tuple[float, float]:
    """Swap the proved dense layer for one stored as `like` is; returns ‖error‖ and ‖weight‖."""
    wanted = layer.base_layer.weight.to(torch.float32)
    packed = with_weight(like, wanted)
    error = float((true_weight(packed).to(torch.float32) - wanted).norm())
    size = max(float(wanted.norm()), 1e-30)
    if not error <= REQUANTISED_AT_MOST * size:
        raise MergeError(
            f"Re-quantising {path} would change its weights by {error / size:.0%}: not merged. "
            "Merge with dense=True instead."
        )
    layer.base_layer = packed
    return error, size


def unmerge_lora(model: nn.Module) -> None:
    """Put the layers back that the merge set aside: the base's exact bits, the adapter beside them.

    Unmerging what is not merged changes nothing. Raises BadInputError after a merge with
    reversible=False.
    """
    require_adapters(model)
    merged = [layer for layer in lora_layers(model).values() if layer.merged]
    if any(layer.original is None for layer in merged):
        raise BadInputError(
            "This merge was made with reversible=False, so the old weights are gone: "
            "load the base again."
        )
    for layer in merged:
        device, _ = place_of(layer.base_layer)  # the model may have moved since
        layer.base_layer, layer.merged = layer.original.to(device), None
        layer.set_aside(None)


def bake_lora(
    model: nn.Module, inputs: Any = None, name: str | None = None, *, dense: bool = True
) -> MergeReport:
    """Merge for good and take the wrappers off: a plain model, ready to be saved or converted.

    All adapters leave the model. A tied output head that was adapted gets its own weight, and
    `config.tie_word_embeddings` becomes False. Arguments and errors as in `merge_lora`.
    """
    head = _tied_head(model)
    report = merge_lora(model, inputs, name, reversible=False, dense=dense)
    for path, layer in lora_layers(model).items():
        swap_module(model, path, layer.base_layer)
        if layer is head:
            model.config.tie_word_embeddings = False
    for note in ("_lora_thawed", "_lora_merge_report"):
        if hasattr(model, note):
            delattr(model, note)
    return report


def _tied_head(model: nn.Module) -> nn.Module | None:
    """The adapted output head whose weight is also the embedding table, if there is one."""
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "config"):
        return None
    head = model.get_output_embeddings()
    table = model.get_input_embeddings()
    tied = isinstance(head, LoRALinear) and head.base_layer.weight is table.weight
    return head if tied else None


# ---------------------------------------------------------------------- measuring
def _batch(model: nn.Module, inputs: Any) -> Any:
    if inputs is not None:
        return inputs
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if size is None:
        raise BadInputError("Give merge_lora a batch of inputs to prove the merge on.")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(size, (2, 16), generator=generator)
    return ids.to(next(model.parameters()).device)


def _outputs(model: nn.Module, batch: Any, when: str) -> torch.Tensor:
    with torch.no_grad():
        out = model(**batch) if isinstance(batch, Mapping) else model(batch)
    for field in ("logits", "last_hidden_state"):
        if getattr(out, field, None) is not None:
            out = getattr(out, field)
            break
    out = out[0] if isinstance(out, tuple) else out
    if not torch.isfinite(out).all():
        raise MergeError(f"The model's outputs {when} hold NaN or infinity: not merged.")
    return out.to(torch.float32) if out.dtype != torch.float64 else out


def _distance(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).norm() / two.norm().clamp_min(1e-30))


def _coarsest(layer: LoRALinear, seen: torch.dtype | None) -> torch.dtype:
    dtypes = [seen or torch.float32, getattr(layer.base_layer, "compute_dtype", None)]
    if base_kind(layer.base_layer) == DENSE:
        dtypes.append(layer.base_layer.weight.dtype)
    return max((d for d in dtypes if d in TOLERANCE), key=lambda d: TOLERANCE[d])


@contextmanager
def _detours_kept(layers: dict[str, LoRALinear]):
    """During the block no layer folds its adapter into a copy of W: that would be the merge itself,
    and a proof against itself proves nothing."""
    for layer in layers.values():
        layer.may_fold = False
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.may_fold


@contextmanager
def _input_dtypes(layers: dict[str, LoRALinear]):
    """Notes the dtype of what each layer is given during the block."""
    seen: dict[str, torch.dtype] = {}

    def note(path):
        return lambda _module, args: seen.__setitem__(path, args[0].dtype)

    hooks = [layer.register_forward_pre_hook(note(p)) for p, layer in layers.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
