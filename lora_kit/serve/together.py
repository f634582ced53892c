"""Layers that read one input, multiplied as one: q, k and v; gate and up.

A GPU works through one wide product faster than through three narrow ones, each of which it has to
be told of. The weights are laid one below the other, and whichever layer is called first multiplies
for all; the others find their columns ready:

    x [W_q; W_k; W_v]ᵀ  →  q | k | v

The layers keep their weights, as views into the joined one: no memory is taken for it, and a change
in place is seen by both.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import nn

from lora_kit.packed_linear import plain_weight
from lora_kit.serve.slots import site_of

__all__ = ["Left", "Together", "lay_together"]


class Together:
    """Dense layers of one site, as one product.

    layers: {path: layer}; columns: {path: its columns of the product}.
    """

    def __init__(self, site: str, layers: Mapping[str, nn.Linear]):
        self.site, self.layers, self.columns = site, dict(layers), {}
        first = 0
        for path, layer in layers.items():
            self.columns[path] = slice(first, first + layer.out_features)
            first += layer.out_features
        with torch.inference_mode(False), torch.no_grad():
            self.weight = torch.cat([layer.weight for layer in layers.values()])
            biases = [layer.bias for layer in layers.values() if layer.bias is not None]
            self.bias = torch.cat(biases) if biases else None
            for path, layer in layers.items():
                layer.weight.data = self.weight[self.columns[path]]
                if self.bias is not None:
                    layer.bias.data = self.bias[self.columns[path]]
        self.places = [_place(layer) for layer in self.layers.values()]

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """(..., all columns) of x (..., in)."""
        return nn.functional.linear(x, self.weight, self.bias)

    @property
    def current(self) -> bool:
        """Whether the layers' numbers are those here still: not moved, not replaced."""
        return self.places == [_place(layer) for layer in self.layers.values()]

    def part(self) -> None:
        """Give the layers numbers and forward passes of their own again."""
        with torch.inference_mode(False), torch.no_grad():
            for layer, place in zip(self.layers.values(), self.places, strict=True):
                layer.__dict__.pop("forward", None)
                for held, there in zip((layer.weight, layer.bias), place, strict=True):
                    if held is not None and held.data_ptr() == there:
                        held.data = held.data.clone()


class Left:
    """Of the product made last by each thread, the parts that nobody has taken out yet."""

    def __init__(self):
        self._now = threading.local()

    def keep(self, together: Together, x: torch.Tensor, batch: object, out: torch.Tensor) -> dict:
        """{path: its part of the product of x}; the caller takes one out."""
        parts = {path: out[..., columns] for path, columns in together.columns.items()}
        self._now.kept = together, x, batch, parts
        return parts

    def of(self, together: Together, x: torch.Tensor, batch: object) -> dict[str, torch.Tensor]:
        """The parts left of the product of this very x; none of another."""
        whose, of, under, parts = getattr(self._now, "kept", (None, None, None, {}))
        if whose is together and of is x and under is batch:
            if len(parts) == 1:  # the last one goes: x need not be kept any longer
                self.clear()
            return parts
        return {}

    def clear(self) -> None:
        self._now.__dict__.pop("kept", None)


def _place(layer: nn.Linear) -> tuple[int, int]:
    return layer.weight.data_ptr(), 0 if layer.bias is None else layer.bias.data_ptr()


def lay_together(layers: Mapping[str, nn.Module], forward) -> Iterator[Together]:
    """Join the dense layers of each site that has several alike, one site after another.

    forward: (together, path, x) → the layer's answer, set as its forward pass.
    """
    sites: dict[str, dict[str, nn.Module]] = {}
    for path, layer in layers.items():
        sites.setdefault(site_of(path), {})[path] = layer
    for site, some in sites.items():
        if len(some) > 1 and _alike(list(some.values())):
            together = Together(site, some)
            for path, layer in some.items():
                layer.forward = partial(forward, together, path)
            yield together


def _alike(layers: list[nn.Module]) -> bool:
    """Dense, of one dtype and input, all with a bias or none, each with a weight to itself, and
    nobody else's forward pass set on them."""
    if any(plain_weight(layer) is None or "forward" in layer.__dict__ for layer in layers):
        return False
    kinds = {(w.dtype, w.device, w.shape[1]) for w in (layer.weight for layer in layers)}
    return (
        len(kinds) == 1
        and len({layer.bias is None for layer in layers}) == 1
        and len({layer.weight.data_ptr() for layer in layers}) == len(layers)
    )
