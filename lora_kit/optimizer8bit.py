"""Adam with 8-bit states, in plain torch.

Adam keeps two running means for each parameter, of the gradient (m) and of its square (v): eight
bytes in float32. Here each is one byte, the code of the nearest value of the dynamic tree, with one
float32 absmax for a block of 256:

    m, v  ← decode the codes
    m     ← β₁ m + (1 - β₁) g
    v     ← β₂ v + (1 - β₂) g²
    θ     ← θ - lr·λ·θ - lr · (m / (1 - β₁ᵗ)) / (√v / √(1 - β₂ᵗ) + ε)
    codes ← encode m, v

Only the *states* are held in 8 bits: gradient, arithmetic and parameter keep their precision. A
tree with a magnitude from 1 down to 1e-7 suits them because within a block they spread over many
powers of ten; the second moment is never negative and spends its sign bit on precision.
(8-bit Optimizers via Block-wise Quantization, Dettmers et al. 2021, sections 2 and 3.)
"""

from __future__ import annotations

import math

import torch

from lora_kit.codebooks import codebook
from lora_kit.errors import BadInputError
from lora_kit.quantize import nearest_codes

STATE_BLOCK = 256


def encode_state(state: torch.Tensor, signed: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, absmax) of a float32 tensor: uint8 of its shape, and one float32 for 256 values.

    Raises:
        BadInputError: NaN or infinite values.
    """
    flat = state.detach().float().reshape(-1)
    if short := -flat.numel() % STATE_BLOCK:
        flat = torch.cat([flat, flat.new_zeros(short)])
    blocks = flat.view(-1, STATE_BLOCK)
    absmax = blocks.abs().amax(dim=1)
    if not torch.isfinite(absmax).all():
        raise BadInputError(
            "An optimiser state is NaN or infinite: skip the step where the gradient is not finite."
        )
    scaled = blocks / absmax.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
    codes = nearest_codes(scaled, "dynamic8" if signed else "dynamic8_unsigned")
    return codes.view(-1)[: state.numel()].view(state.shape), absmax


def decode_state(codes: torch.Tensor, absmax: torch.Tensor, signed: bool = True) -> torch.Tensor:
    """The float32 state that `encode_state`'s codes stand for."""
    table = codebook("dynamic8" if signed else "dynamic8_unsigned", codes.device)
    scale = absmax.repeat_interleave(STATE_BLOCK)[: codes.numel()].view(codes.shape)
    return table[codes.long()] * scale


class Adam8bit(torch.optim.Optimizer):
    """AdamW whose two states take a byte each; the module's text has the formulas.

    Args:
        params: as for any torch optimiser.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW (decay decoupled from the gradient).
        min_8bit_size: parameters with fewer values keep float32 states, for little memory lies
            there and biases and norms are sensitive.

    Raises:
        BadInputError: a setting outside its range.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        min_8bit_size: int = 4096,
    ):
        if lr < 0 or eps <= 0 or weight_decay < 0 or not all(0 <= b < 1 for b in betas):
            raise BadInputError(
                "Adam8bit takes lr >= 0, eps > 0, weight_decay >= 0 and betas in [0, 1), not "
                f"lr={lr}, eps={eps}, weight_decay={weight_decay}, betas={betas}."
            )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"min_8bit_size": min_8bit_size})

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: torch.Tensor, group: dict) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        small = parameter.numel() < group["min_8bit_size"]
        gradient = parameter.grad.float()
        if not state:
            state["step"] = 0
            m, v = torch.zeros_like(gradient), torch.zeros_like(gradient)
        elif small:
            m, v = state["m"], state["v"]
        else:
            m = decode_state(state["m"], state["m_absmax"])
            v = decode_state(state["v"], state["v_absmax"], signed=False)
        state["step"] += 1
        m.mul_(beta1).add_(gradient, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = v.sqrt().div_(math.sqrt(1 - beta2 ** state["step"])).add_(group["eps"])
        value = parameter.float()
        value = value * (1 - group["lr"] * group["weight_decay"])
        value = value.addcdiv_(m, root, value=-group["lr"] / (1 - beta1 ** state["step"]))
        if small:
            state["m"], state["v"] = m, v
        else:
            state["m"], state["m_absmax"] = encode_state(m)
            state["v"], state["v_absmax"] = encode_state(v, signed=False)
        parameter.copy_(value)

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, which would cast the codes to the parameter's dtype: they stay bytes."""
        super().load_state_dict(state_dict)
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, torch.Tensor):
                    self.state[parameter][key] = value.to(parameter.device, copy=True)

    def state_bytes(self) -> int:
        """Bytes held by all states now."""
        tensors = (v for s in self.state.values() for v in s.values() if torch.is_tensor(v))
        return sum(t.numel() * t.element_size() for t in tensors)
