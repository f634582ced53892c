"""Compiled layers: torch.compile over each decoder layer, for the time of a training run.

The adapters' own fused step (`lora_products`) writes into tensors in ways a tracer does not
follow, so while the layers are compiled each adapter runs the plain formula, W x + s · B A x, and
the compiler does the fusing. One graph serves all layers, and all lengths (`dynamic=True`).
Compiling takes half a minute or so: it pays on long runs only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn import functional

from lora_kit.lora import lora_layers


@contextmanager
def compiled_layers(model, wanted: bool) -> Iterator[None]:
    """Compile the decoder layers of `model` (in place) until the block ends, if `wanted`."""
    if not wanted:
        yield
        return
    adapted = lora_layers(model).values()
    layers = model.get_decoder().layers
    for adapter in adapted:
        adapter.forward = _plain_forward(adapter)
    for layer in layers:
        layer.compile(dynamic=True)
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None  # what Module.compile sets; torch has no undo for it
        for adapter in adapted:
            del adapter.forward


def _plain_forward(adapter):
    spec = adapter.specs[adapter.active]
    a, b = adapter.lora_A[adapter.active], adapter.lora_B[adapter.active]

    def forward(x):
        dropped = functional.dropout(x, spec.dropout, adapter.training)
        low = functional.linear(functional.linear(dropped, a), b)
        return adapter.base_layer(x) + low * spec.scale

    return forward
