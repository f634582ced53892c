"""`NF4Linear`: a linear layer whose frozen weight is held in 4 bits.

    y = x Ŵᵀ + b,   ∂L/∂x = ∂L/∂y · Ŵ,   Ŵ = dequantize(codes, absmax)

Ŵ is made when it is needed, forward and backward, and never kept: between the two passes the layer
holds codes only. The codes get no gradient, which is why QLoRA trains adapters beside them: the
weights are quantised, the gradients are not. (QLoRA, Dettmers et al. 2023, section 3, equation 5.)
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from lora_kit.decode4bit import decode
from lora_kit.errors import BadInputError
from lora_kit.quantize import ABSMAX_BLOCK, QuantizedTensor, quantize


class _FrozenMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, layer):
        ctx.layer = layer
        ctx.has_bias = bias is not None
        return functional.linear(x, layer.dequantized_weight(x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        need_x, need_bias, _ = ctx.needs_input_grad
        to_x = grad @ ctx.layer.dequantized_weight(grad.dtype) if need_x else None
        to_bias = grad.flatten(0, -2).sum(0) if ctx.has_bias and need_bias else None
        return to_x, to_bias, None


class NF4Linear(nn.Module):
    """y = x Ŵᵀ + b with Ŵ in 4 bits (16 levels, NF4 unless said otherwise).

    x: (..., in_features) of any float dtype; y: (..., out_features) of x's dtype. The product is
    taken in `compute_dtype`, else under autocast in autocast's dtype, else in x's.

    Everything lies in buffers (`codes`, `absmax` and, with double quantisation, `absmax_scales`
    and `absmax_offset`), so `state_dict` and `load_state_dict` need nothing special: an empty layer
    of the same sizes takes the state of another. `.to(dtype)` and `.half()` leave the absmax values
    in float32: they are part of the code, not of the arithmetic.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
        format: str = "nf4",
        weight_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.block_size, self.double_quant = block_size, double_quant
        self.compute_dtype, self.format = compute_dtype, format
        self.weight_dtype = weight_dtype
        n = in_features * out_features
        blocks = -(-n // block_size)
        byte = {"dtype": torch.uint8, "device": device}
        real = {"dtype": torch.float32, "device": device}
        self.register_buffer("codes", torch.zeros(-(-n // 2), **byte))
        self.register_buffer("absmax", torch.zeros(blocks, **(byte if double_quant else real)))
        scales = torch.zeros(-(-blocks // ABSMAX_BLOCK), **real) if double_quant else None
        self.register_buffer("absmax_scales", scales)
        self.register_buffer("absmax_offset", torch.zeros((), **real) if double_quant else None)
        empty = torch.zeros(out_features, device=device, dtype=weight_dtype) if bias else None
        # Frozen like the weight: a bias trained by accident would not be saved with an adapter.
        self.bias = nn.Parameter(empty, requires_grad=False) if bias else None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
        format: str = "nf4",
    ) -> NF4Linear:
        """Quantise `linear`'s weight; its bias is copied. `linear` itself is left alone.

        Raises:
            BadInputError: not a linear layer, or a weight that `quantize` refuses.
            UnknownNameError: no such format.
        """
        if not isinstance(linear, nn.Linear):
            raise BadInputError(f"from_linear takes a torch Linear, not {type(linear).__name__}.")
        if format not in ("nf4", "fp4", "int4"):
            raise BadInputError(f"A 4-bit layer takes nf4, fp4 or int4, not {format!r}.")
        q = quantize(linear.weight, format, block_size, double_quant)
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            block_size,
            double_quant,
            compute_dtype,
            format,
            linear.weight.dtype,
            linear.weight.device,
        )
        layer.codes, layer.absmax = q.codes, q.stored_absmax
        layer.absmax_scales, layer.absmax_offset = q.absmax_scales, q.absmax_offset
        if linear.bias is not None:
            layer.bias.data.copy_(linear.bias.detach())
        return layer.train(linear.training)

    @property
    def quantized_weight(self) -> QuantizedTensor:
        """The weight as a QuantizedTensor that shares this layer's memory."""
        return QuantizedTensor(
            self.codes,
            self.absmax,
            torch.Size((self.out_features, self.in_features)),
            self.weight_dtype,
            self.format,
            self.block_size,
            self.absmax_scales,
            self.absmax_offset,
        )

    def dequantized_weight(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Ŵ, (out_features, in_features), in the original weight's dtype or in `dtype`."""
        dtype = dtype or self.weight_dtype
        # A half-precision weight is rounded as it was before; a float32 one may be rounded at once.
        straight = self.weight_dtype == torch.float32 and not dtype.itemsize > 4
        return decode(self.quantized_weight, dtype if straight else self.weight_dtype).to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != self.in_features:
            raise BadInputError(
                f"This layer takes {self.in_features} features, not {x.shape[-1]} "
                f"(input of shape {tuple(x.shape)})."
            )
        dtype, kind = self.compute_dtype, x.device.type
        if dtype is None:
            auto = torch.is_autocast_enabled(kind)
            dtype = torch.get_autocast_dtype(kind) if auto else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(kind, enabled=False):
            y = _FrozenMatmul.apply(x.to(dtype), bias, self)
        return y if self.compute_dtype is None else y.to(x.dtype)

    def _apply(self, fn, recurse=True):
        # Module.half() and .to(dtype) cast every float buffer; the scales must keep all their bits.
        before = {k: v for k, v in self._buffers.items() if v is not None and v.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format}, block_size={self.block_size}, "
            f"double_quant={self.double_quant}"
        )
