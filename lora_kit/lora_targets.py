"""Placement by name: which linear layers an adapter sits on.

The papers' terms: `attention` is q, k, v, o; `mlp` is gate, up, down; `all` is both (never the
output head). Anything else is a name ("q_proj"), a list of names, or a regular expression over the
whole path ("model[.]layers[.][01][.].*_proj").
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from lora_kit.errors import BadInputError, nearest
from lora_kit.lora_base import base_kind

Targets = str | Sequence[str]

ATTENTION = {
    *("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "q_lin", "k_lin", "v_lin"),
    *("out_lin", "query", "key", "value", "query_key_value", "Wqkv", "attention.output.dense"),
}
MLP = {
    *("gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "lin1", "lin2"),
    *("dense_h_to_4h", "dense_4h_to_h", "intermediate.dense", "output.dense"),
}
NOT_LINEAR = {
    "Embedding": "an embedding table, which this kit leaves alone (LoRA sits on linear layers; "
    "target the output head with 'lm_head')",
    "Conv1D": "a transposed Conv1D (GPT-2), which this kit does not adapt",
}


def canonical_name(path: str) -> str:
    """A module's path in the bare model: peft's and this kit's wrappers taken out."""
    while path.startswith("base_model.model."):
        path = path[len("base_model.model.") :]
    return ".".join(part for part in path.split(".") if part not in ("base_layer", "_orig_mod"))


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer LoRA can sit on, by canonical path, in the model's order."""
    found = {}
    for path, module in model.named_modules():
        if base_kind(module) and not any(p.startswith("lora_") for p in path.split(".")):
            found[canonical_name(path)] = module
    return found


def _ends_with(path: str, names) -> bool:
    return any(path == name or path.endswith("." + name) for name in names)


def _role(path: str) -> str | None:
    # "attention.output.dense" (BERT) also ends with MLP's "output.dense": attention is asked first.
    if _ends_with(path, ATTENTION):
        return "attention"
    return "mlp" if _ends_with(path, MLP) else None


def match_targets(model: nn.Module, targets: Targets) -> list[str]:
    """The canonical paths `targets` names, in the model's order.

    targets: "all", "attention", "mlp", a layer's name or path, a regular expression that matches
        a whole path, or a list of these.
    Raises BadInputError when a target matches nothing (with the nearest names), is an embedding, or
        is not a regular expression.
    """
    wanted = [targets] if isinstance(targets, str) else list(targets)
    if not wanted:
        raise BadInputError("targets is empty: name at least one layer, or use 'all'.")
    layers = list(linear_layers(model))
    chosen: set[str] = set()
    for target in wanted:
        matched = _match_one(target, layers)
        if not matched:
            raise BadInputError(_nothing_matched(model, target, layers))
        chosen.update(matched)
    return [path for path in layers if path in chosen]


def _match_one(target: str, layers: list[str]) -> list[str]:
    if not isinstance(target, str) or not target:
        raise BadInputError(f"A target must be a name or a pattern, not {target!r}.")
    if target in ("attention", "mlp", "all"):
        return [p for p in layers if _role(p) and target in ("all", _role(p))]
    by_name = [p for p in layers if _ends_with(p, [target])]
    if by_name:
        return by_name
    try:
        pattern = re.compile(target)
    except re.error as error:
        raise BadInputError(f"Target {target!r} is not a regular expression: {error}.") from None
    return [p for p in layers if pattern.fullmatch(p)]


def _nothing_matched(model: nn.Module, target: str, layers: list[str]) -> str:
    for path, module in model.named_modules():
        kind = type(module).__name__
        if kind in NOT_LINEAR and _ends_with(canonical_name(path), [target]):
            return f"Target {target!r} is {NOT_LINEAR[kind]}."
    names = list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in layers))
    close = nearest(target, names) or nearest(target, layers)
    offer = f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
    return (
        f"Target {target!r} matches no linear layer of this {type(model).__name__}.{offer} "
        f"Its linear layers are called: {', '.join(names[:20]) or 'none'}."
    )


def shortest_targets(paths: Sequence[str], layers: Sequence[str]) -> list[str]:
    """The last name of each path where those names mean exactly these paths, else the paths."""
    names = sorted({path.rsplit(".", 1)[-1] for path in paths})
    meant = {path for path in layers if _ends_with(path, names)}
    return names if meant == set(paths) else sorted(paths)
