"""What a frozen linear layer really holds: its true weight, whatever the storage.

Three kinds of base layer carry an adapter here: a dense `nn.Linear`, this kit's `NF4Linear`, and
bitsandbytes' `Linear4bit`. Everything that needs the numbers inside one (merging, PiSSA, DoRA, the
fingerprint) asks this module, because reading `layer.weight` is not safe for the last kind: on a
CPU with AVX512-bf16, bitsandbytes re-orders the packed 4-bit bytes and transposes the block scales
in place during the first forward pass in evaluation mode, and the ordinary dequantisation routine
then returns wrong numbers without an error.
"""

from __future__ import annotations

import torch
from torch import nn

from lora_kit.errors import BadInputError

DENSE, NF4, BNB4 = "dense", "nf4", "bitsandbytes-4bit"


def base_kind(module: nn.Module) -> str | None:
    """`"dense"`, `"nf4"` or `"bitsandbytes-4bit"`; None where LoRA cannot sit."""
    if type(module).__name__ == "Linear4bit" and hasattr(module, "quant_storage"):
        return BNB4
    if hasattr(module, "dequantized_weight") and hasattr(module, "in_features"):
        return NF4
    # Subclasses of nn.Linear with their own storage (8-bit, for one) are not plain matrices.
    if type(module) is nn.Linear or type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return DENSE
    return None


def true_weight(module: nn.Module) -> torch.Tensor:
    """The (out_features, in_features) matrix the layer multiplies by, dequantised if need be.

    Returns: for a dense layer the weight itself (not a copy); else a new tensor.
    Raises BadInputError for a layer that is none of the three kinds, or not yet quantised.
    """
    kind = base_kind(module)
    if kind == DENSE:
        return module.weight.detach()
    if kind == NF4:
        return module.dequantized_weight().detach()
    if kind == BNB4:
        return _bnb_weight(module)
    raise BadInputError(
        f"A {type(module).__name__} is not a linear layer this kit can read; "
        "LoRA sits on nn.Linear, NF4Linear and bitsandbytes Linear4bit."
    )


def place_of(module: nn.Module) -> tuple[torch.device, torch.dtype | None]:
    """Where the layer's numbers lie, and their dtype where they are dense (None for 4 bits)."""
    if base_kind(module) == NF4:
        return module.codes.device, None
    dtype = module.weight.dtype if base_kind(module) == DENSE else None
    return module.weight.device, dtype


def is_repacked(module: nn.Module) -> bool:
    """True when bitsandbytes has re-ordered this layer's bytes for its CPU kernel."""
    state = getattr(module.weight, "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def _bnb_weight(module: nn.Module) -> torch.Tensor:
    state = getattr(module.weight, "quant_state", None)
    if state is None:
        raise BadInputError(
            "This Linear4bit is not quantised yet: move the model to its device first "
            "(bitsandbytes quantises in .to(...))."
        )
    if is_repacked(module):
        return _bnb_repacked_weight(module.weight.data, state)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(module.weight.data, state)


def _bnb_repacked_weight(packed: torch.Tensor, state) -> torch.Tensor:
    """Undo the CPU repack: 4-bit codes exactly, block scales as bitsandbytes left them (bf16).

    Layout after the repack, for N rows, K columns, tiles of 32 rows: byte [n, t] of the tile's
    (K/2, 2, 32) nibbles; low nibbles hold the first of each pair of columns' halves. The scales are
    (K / block_size, N), rounded to bfloat16: that rounding (at most 1 part in 256) is for good.
    """
    rows, columns = state.shape
    nibbles = packed.reshape(-1, 32)
    codes = torch.cat([nibbles & 0xF, nibbles >> 4], dim=-1)
    codes = codes.reshape(rows // 32, columns // 2, 32, 2).transpose(1, 2).reshape(rows, columns)
    values = state.code.to(torch.float32)[codes.long()]
    scales = state.absmax.t().to(torch.float32).repeat_interleave(state.blocksize, dim=1)
    return (values * scales).to(getattr(state, "original_dtype", torch.float32))


def keep_from_repacking(module: nn.Module) -> None:
    """Stop bitsandbytes from repacking this layer, and undo a repack that has happened.

    The layer then takes the dequantise-and-multiply path in evaluation too: the same numbers as in
    training, instead of the CPU kernel's bf16 arithmetic.
    """
    if base_kind(module) != BNB4:
        return
    if is_repacked(module):
        _undo_repack(module)
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False


def _undo_repack(module: nn.Module) -> None:
    """Put codes and scales of a repacked layer back in bitsandbytes' ordinary order, in place."""
    state = module.weight.quant_state
    rows, columns = state.shape
    nibbles = module.weight.data.reshape(-1, 32)
    codes = torch.cat([nibbles & 0xF, nibbles >> 4], dim=-1)
    codes = codes.reshape(rows // 32, columns // 2, 32, 2).transpose(1, 2).reshape(-1, 2)
    module.weight.data = ((codes[:, 0] << 4) | codes[:, 1]).reshape(state.original_qshape)
    # Scales stay plain fp32: quantising them a second time would lose more than it saves.
    state.absmax = state.absmax.t().reshape(-1).to(torch.float32).contiguous()
    state.nested = False
    state.dtype = state.original_dtype
    state.packing_format_for_cpu = False
    module.quant_state = state


def with_weight(module: nn.Module, weight: torch.Tensor, dense: bool = False) -> nn.Module:
    """A new layer of the same kind holding `weight` (re-quantised for a 4-bit kind), same bias.

    dense: give an `nn.Linear` whatever the kind. The layer passed in is not touched.
    """
    kind = base_kind(module)
    bias = module.bias
    if kind == DENSE or dense:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        layer.train(module.training)
        return layer
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        plain.bias = bias
    if kind == NF4:
        layer = type(module).from_linear(
            plain,
            block_size=module.block_size,
            double_quant=module.double_quant,
            compute_dtype=module.compute_dtype,
            format=module.format,
        )
        layer.weight_dtype = module.weight_dtype
    else:
        layer = _bnb_from_linear(module, plain)
    layer.train(module.training)
    return layer


def _bnb_from_linear(like: nn.Module, plain: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    device = like.weight.device
    layer = bnb.nn.Linear4bit(
        plain.in_features,
        plain.out_features,
        bias=plain.bias is not None,
        compute_dtype=like.compute_dtype,
        compress_statistics=like.weight.compress_statistics,
        quant_type=like.weight.quant_type,
        quant_storage=like.quant_storage,
        device="meta",
    )
    layer.weight = bnb.nn.Params4bit(
        plain.weight.data.to("cpu"),
        requires_grad=False,
        compress_statistics=like.weight.compress_statistics,
        quant_type=like.weight.quant_type,
        blocksize=like.weight.blocksize,
        quant_storage=like.quant_storage,
        module=layer,
    )
    if plain.bias is not None:
        layer.bias = plain.bias
    layer = layer.to(device)
    keep_from_repacking(layer)
    return layer
