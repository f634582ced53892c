"""Linear layers on a CPU, run by oneDNN over weights that were laid out for it once.

Torch multiplies fp32 matrices with MKL, which on processors that are not Intel's keeps to 8 numbers
at a time where the processor could do 16; and it lays the weight out anew at each call. oneDNN over
a weight packed beforehand does neither: on an AMD EPYC with AVX-512 it is 2 to 2.6 times as fast,
from one row of input to a thousand. The numbers are fp32 products summed in another order.

Packing takes about as long as 300 tokens' worth of products and as much memory as the weights.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import torch
from torch import nn

from lora_kit.hardware import detect

PAYS_FROM = 1.2  # times as fast as torch's own product, or the weights stay as they are
TOKENS_FROM = 1_000  # of work ahead: fewer do not earn back the packing
Weight = tuple[torch.Tensor, torch.Tensor | None]


def plain_weight(module: nn.Module) -> Weight | None:
    """Weight and bias of a linear layer that is nothing but one, else None."""
    return (module.weight, module.bias) if type(module) is nn.Linear else None


@contextlib.contextmanager
def packed_linears(
    *models: nn.Module,
    tokens: int,
    weight_of: Callable[[nn.Module], Weight | None] = plain_weight,
    when: Callable[[], bool] | None = None,
) -> Iterator[int]:
    """Within the block, the fp32 linear layers of these models run over packed weights.

    Nothing changes where that does not pay: on a GPU, in other dtypes, for fewer than a thousand
    tokens, where the copy would take more than a third of the free memory, or where this machine
    was measured to be no faster for it. Weights changed within the block are not seen, unless there
    is a `when`.

    Args:
        models: modules; a layer that is in several is packed once.
        tokens: the work ahead.
        weight_of: the weight and bias that a module stands for, or None to look inside it.
        when: asked at each call whether to. Where it says no the layer runs as it did, and so it
            does while its weight or bias is another than was packed, or was changed in place. A
            change in place through `.data`, or by an optimiser's fused step, is not noticed. By
            default nobody is asked and nothing is looked at.

    Yields:
        the number of layers packed.
    """
    found: dict[int, tuple[nn.Module, Weight]] = {}
    if tokens >= TOKENS_FROM:
        for model in models:
            _collect(model, weight_of, found)
    layers = [(m, w) for m, w in found.values() if _fits(m, w[0])]
    size = sum(weight.nbytes for _, (weight, _) in layers)
    if not layers or size > detect().memory_free // 3 or packed_speed() < PAYS_FROM:
        layers = []
    packed: dict[int, torch.Tensor] = {}
    try:
        for module, (weight, bias) in layers:
            kept = packed.get(weight.data_ptr())
            if kept is None:
                kept = packed[weight.data_ptr()] = _pack(weight.detach())
            product = partial(_product, kept, bias)
            module.forward = product
            if when is not None:
                # Held, so that nothing else comes to lie at their addresses.
                was = weight.detach(), None if bias is None else bias.detach()
                state = [_state(tensor) for tensor in was]
                module.forward = partial(_either, when, product, was, state, module)
        yield len(layers)
    finally:
        for module, _ in layers:
            module.__dict__.pop("forward", None)


@lru_cache(maxsize=1)
def packed_speed() -> float:
    """How many times as fast as torch's own a packed product is here; 0 where there is none.

    Measured once, in about 20 ms: 128 rows, 512 × 1024.
    """
    x, weight = torch.ones(128, 512), torch.ones(1024, 512)
    try:
        with torch.inference_mode():
            kept = _pack(weight)
            if not torch.allclose(_product(kept, None, x), x @ weight.T):
                return 0.0
            own = _seconds(lambda: nn.functional.linear(x, weight))
            return own / _seconds(lambda: _product(kept, None, x))
    except (AttributeError, NotImplementedError, RuntimeError):  # not in this build of torch
        return 0.0


def _pack(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def _product(packed: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _either(when, product, _was: tuple, state: list, module: nn.Module, x: torch.Tensor):
    if when() and [_state(module.weight), _state(module.bias)] == state:
        return product(x)
    return type(module).forward(module, x)


def _state(tensor: torch.Tensor | None) -> tuple[int, int] | None:
    if tensor is None:
        return None
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _seconds(work: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def _collect(module: nn.Module, weight_of, found: dict[int, tuple[nn.Module, Weight]]) -> None:
    weight = weight_of(module)
    if weight is not None:
        found[id(module)] = module, weight
        return
    for child in module.children():
        _collect(child, weight_of, found)


def _fits(module: nn.Module, weight: torch.Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and "forward" not in module.__dict__  # another library has put its own there
    )
