"""The LoRA layer: a frozen linear layer and a trainable low-rank detour around it.

    y = W x + s · B A dropout(x),      W (out, in) frozen,  A (rank, in),  B (out, rank)

with s = alpha / rank (Hu et al. 2021, section 4.1) or alpha / sqrt(rank) (rank-stabilised LoRA,
Kalajdzievski 2023). The dozen lines that teach it are in notebook 02; here the layer is what keeps
adapters apart and chooses between them, and `lora_products` does the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import nn

from lora_kit.errors import BadInputError
from lora_kit.lora_base import NF4, base_kind, keep_from_repacking, place_of, true_weight
from lora_kit.lora_products import FusedLora, adapted_product, add_low_rank

INITS = ("kaiming", "gaussian", "pissa")


@dataclass(frozen=True)
class LoraSpec:
    """What an adapter is, before it has weights.

    rank: r, the inner width of the detour. alpha: the numerator of the scale.
    targets: "all" (attention and MLP), "attention", "mlp", a layer name, a regular expression over
        whole paths, or a list of names.
    dropout: probability of zeroing an input of the detour while training.
    init: "kaiming" (A uniform as in nn.Linear, B = 0), "gaussian" (A normal with deviation 1/r,
        B = 0), or "pissa" (A and B from the r largest singular triples of W, which are taken out of
        the frozen part; Meng et al. 2024, section 3).
    rslora: scale alpha / sqrt(r) in place of alpha / r.
    dora: train direction and magnitude apart (Liu et al. 2024, section 4).
    Raises BadInputError for values outside these.
    """

    rank: int
    alpha: float
    targets: str | Sequence[str] = "all"
    dropout: float = 0.0
    init: str = "kaiming"
    rslora: bool = False
    dora: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise BadInputError(f"rank must be a whole number of at least 1, not {self.rank!r}.")
        if not isinstance(self.alpha, int | float) or not 0 < self.alpha < math.inf:
            raise BadInputError(f"alpha must be a positive number, not {self.alpha!r}.")
        if not 0 <= self.dropout < 1:
            raise BadInputError(f"dropout must lie in [0, 1), not {self.dropout!r}.")
        if self.init not in INITS:
            raise BadInputError(f"init must be one of {', '.join(INITS)}, not {self.init!r}.")
        if self.dora and self.init == "pissa":
            raise BadInputError("dora and init='pissa' cannot be combined: choose one.")

    @cached_property
    def plain(self) -> bool:
        """Whether the detour is s · B A x and nothing else: no magnitude, no starting factors."""
        return not self.dora and self.init != "pissa"

    @cached_property
    def scale(self) -> float:
        """s in y = W x + s · B A x."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoRALinear(nn.Module):
    """A frozen linear layer (dense, NF4 or bitsandbytes 4-bit) that carries named adapters.

    At most one adapter is active; the others wait. Shapes: x (..., in) to y (..., out).
    Parameters: `lora_A[name]` (rank, in), `lora_B[name]` (out, rank), for DoRA
    `lora_magnitude[name]` (out). PiSSA's starting factors are kept as buffers and subtracted, so W
    itself stays as it was: y = W x + s · (B A − B₀ A₀) x, which equals training A and B over the
    residual W − s · B₀ A₀.
    """

    # Whether a long input may be multiplied by W + s · B A in place of W and the detour. A merge
    # turns it off while it proves itself: it must not be compared with another merge.
    may_fold = True

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        if base_kind(base_layer) is None:
            raise BadInputError(f"LoRA cannot sit on a {type(base_layer).__name__}.")
        self.base_layer = base_layer
        self.in_features = base_layer.in_features
        self.out_features = base_layer.out_features
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.lora_magnitude = nn.ParameterDict()
        self.specs: dict[str, LoraSpec] = {}
        self.active: str | None = None
        self.enabled = True
        self.merged: str | None = None
        self._aside: list[nn.Module] = []  # what a reversible merge set aside; in a list, torch
        # does not take it for a part of the model
        keep_from_repacking(base_layer)

    # ------------------------------------------------------------------ adapters
    def add(self, name: str, spec: LoraSpec, generator=None, dtype: torch.dtype | None = None):
        """Give the layer an adapter. Raises BadInputError on a rank above min(in, out)."""
        check_rank(spec, self.in_features, self.out_features)
        device, stored = place_of(self.base_layer)
        if dtype is None:  # half-precision and 4-bit bases get fp32 adapters: fp16 steps underflow
            dtype = torch.float64 if stored == torch.float64 else torch.float32
        a, b = self._initial(spec, generator)
        place = {"device": device, "dtype": dtype}
        self.lora_A[name] = nn.Parameter(a.to(**place))
        self.lora_B[name] = nn.Parameter(b.to(**place))
        if spec.init == "pissa":
            self.register_buffer(f"start_A_{name}", self.lora_A[name].detach().clone())
            self.register_buffer(f"start_B_{name}", self.lora_B[name].detach().clone())
        if spec.dora:
            norms = torch.linalg.norm(true_weight(self.base_layer).to(**place), dim=1)
            self.lora_magnitude[name] = nn.Parameter(norms)
        self.specs[name] = spec

    def _initial(self, spec: LoraSpec, generator) -> tuple[torch.Tensor, torch.Tensor]:
        if spec.init == "pissa":
            return pissa_factors(true_weight(self.base_layer), spec)
        a = torch.empty(spec.rank, self.in_features)
        if spec.init == "gaussian":
            a.normal_(std=1 / spec.rank, generator=generator)
        else:  # what nn.Linear does: kaiming_uniform with a = sqrt(5) is U(-1/sqrt(in), 1/sqrt(in))
            bound = 1 / math.sqrt(self.in_features)
            a.uniform_(-bound, bound, generator=generator)
        return a, torch.zeros(self.out_features, spec.rank)

    def drop(self, name: str) -> None:
        del self.lora_A[name], self.lora_B[name], self.specs[name]
        if name in self.lora_magnitude:
            del self.lora_magnitude[name]
        for start in (f"start_A_{name}", f"start_B_{name}"):
            if hasattr(self, start):
                delattr(self, start)
        if self.active == name:
            self.active = None

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        found = [self.lora_A[name], self.lora_B[name]]
        return [*found, self.lora_magnitude[name]] if name in self.lora_magnitude else found

    @property
    def original(self) -> nn.Module | None:
        """The base layer that a reversible merge set aside."""
        return self._aside[0] if self._aside else None

    def set_aside(self, layer: nn.Module | None) -> None:
        """Keep `layer` as the original of a merge, or (None) let the kept one go."""
        self._aside = [] if layer is None else [layer]

    @property
    def unmerged_base(self) -> nn.Module:
        """The base layer as it was before any merge."""
        return self.original if self.original is not None else self.base_layer

    @property
    def weight(self) -> torch.Tensor:
        """The base layer's stored weight (some models look at `.weight.dtype`)."""
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def delta_weight(self, name: str) -> torch.Tensor:
        """ΔW = s · (B A − B₀ A₀), (out, in), in fp32 or finer; DoRA's magnitude is not in it."""
        dtype = torch.promote_types(self.lora_A[name].dtype, torch.float32)
        scale = self.specs[name].scale
        delta = (
            self.lora_B[name].detach().to(dtype) @ self.lora_A[name].detach().to(dtype)
        ) * scale
        if self.specs[name].init == "pissa":
            start_a, start_b = self.start(name)
            delta -= (start_b.to(dtype) @ start_a.to(dtype)) * scale
        return delta

    def start(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return getattr(self, f"start_A_{name}"), getattr(self, f"start_B_{name}")

    def merged_weight(self, name: str) -> torch.Tensor:
        """W + ΔW, or for DoRA m · (W + ΔW) / ‖W + ΔW‖ by rows, in fp32 or finer; a new tensor."""
        delta = self.delta_weight(name)
        merged = true_weight(self.unmerged_base).to(delta.dtype) + delta
        if self.specs[name].dora:
            norms = torch.linalg.norm(merged, dim=1)
            merged = merged * (self.lora_magnitude[name].detach() / norms).to(merged.dtype)[:, None]
        return merged

    # ------------------------------------------------------------------ forward
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        name = self.active
        if name is None or self.merged is not None or not self.enabled:
            if self.merged is not None and self.training:
                raise BadInputError(
                    f"Adapter {self.merged!r} is merged, so training would not reach it: "
                    "call unmerge_lora(model) first."
                )
            return self.base_layer(x)
        spec, parts = self.specs[name], self._modules
        a, b = parts["lora_A"]._parameters[name], parts["lora_B"]._parameters[name]
        base = parts["base_layer"]
        simple = type(base) is nn.Linear and not (base._forward_hooks or base._forward_pre_hooks)
        simple = simple and spec.plain and not torch.is_grad_enabled()
        if simple and x.is_cpu and not self.training and not torch.is_autocast_enabled("cpu"):
            # A generated token is a few microseconds of arithmetic a layer: every look counts.
            weights = base._parameters
            weight, bias = weights["weight"], weights["bias"]
            if x.dtype == a.dtype == weight.dtype:
                return adapted_product(x, weight, bias, a, b, spec.scale, self.may_fold)
        kind = "cpu" if x.is_cpu else x.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            x, a, b = x.to(dtype), a.to(dtype), b.to(dtype)
        dropping = self.training and spec.dropout > 0
        if spec.dora or x.dtype != a.dtype:
            return self._plain_forward(x, a, b, spec, name, dropping)
        if simple and not dropping:
            weights = base._parameters
            out = F.linear(x, weights["weight"], weights["bias"])
            return add_low_rank(out, x, a, b, spec.scale)
        if spec.init == "pissa" and not dropping:  # one detour of rank 2r: s · [B, −B₀] [A; A₀] x
            start_a, start_b = (start.to(x.dtype) for start in self.start(name))
            a, b = torch.cat([a, start_a]), torch.cat([b, -start_b], dim=1)
        if torch.is_grad_enabled() and not dropping and not x.is_cuda:
            weight = _fusable_weight(base, x)
            if weight is not None:
                return FusedLora.apply(x, weight, base.bias, a, b, spec.scale)
        out = base(x)
        if base._forward_hooks:  # a hook may have kept the base's output: do not write into it
            out = out.clone()
        if not dropping:
            return add_low_rank(out, x, a, b, spec.scale)
        if spec.init == "pissa":  # W − s · B₀ A₀ is the frozen part: dropout is not for it
            start_a, start_b = (start.to(x.dtype) for start in self.start(name))
            out = add_low_rank(out, x, start_a, start_b, -spec.scale)
        return add_low_rank(out, F.dropout(x, spec.dropout, training=True), a, b, spec.scale)

    def _plain_forward(self, x, a, b, spec, name, dropping) -> torch.Tensor:
        """Torch's own operations, for DoRA and for an adapter finer than its input."""
        out = self.base_layer(x)
        dtype = out.dtype
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(a.dtype)
        dropped = F.dropout(x, spec.dropout, training=True) if dropping else x
        low = F.linear(F.linear(dropped, a), b) * spec.scale
        if spec.init == "pissa":
            start_a, start_b = (t.to(x.dtype) for t in self.start(name))
            low = low - F.linear(F.linear(x, start_a), start_b) * spec.scale
        if not spec.dora:
            return (out + low).to(dtype)
        weight = true_weight(self.base_layer).to(x.dtype)
        # The norm is a constant to the gradient (DoRA, section 4.3).
        with torch.no_grad():
            norms = torch.linalg.norm(weight + spec.scale * (b @ a).to(x.dtype), dim=1)
        ratio = (self.lora_magnitude[name] / norms).to(x.dtype)
        bias = self.base_layer.bias
        plain = F.linear(dropped, weight) if dropping else out if bias is None else out - bias
        return (out + (ratio - 1) * plain + ratio * low).to(dtype)

    def extra_repr(self) -> str:
        adapters = ", ".join(f"{n}: rank {s.rank}" for n, s in self.specs.items()) or "none"
        state = f", merged: {self.merged}" if self.merged else "" if self.enabled else ", disabled"
        return f"adapters: {adapters}, active: {self.active}{state}"


def _fusable_weight(base: nn.Module, x: torch.Tensor):
    """What `FusedLora` multiplies by, or None: the base must be frozen, compute in the input's
    dtype, and have no hook that a by-pass would skip."""
    if base._forward_hooks or base._forward_pre_hooks:
        return None
    if base._backward_hooks or base._backward_pre_hooks:
        return None
    bias = base.bias
    if bias is not None and (bias.requires_grad or bias.dtype != x.dtype):
        return None
    if type(base) is nn.Linear:
        frozen = not base.weight.requires_grad and base.weight.dtype == x.dtype
        return base.weight if frozen else None
    if base_kind(base) == NF4 and base.in_features == x.shape[-1]:
        return base.dequantized_weight if base.compute_dtype in (None, x.dtype) else None
    return None


def check_rank(spec: LoraSpec, in_features: int, out_features: int, path: str = "") -> None:
    most = min(in_features, out_features)
    if spec.rank > most:
        where = f" of {path}" if path else ""
        raise BadInputError(
            f"rank {spec.rank} is above min(in, out) = {most}{where} "
            f"({out_features} x {in_features}): a product of that rank cannot use it. "
            f"Use a rank of at most {most}."
        )


def pissa_factors(weight: torch.Tensor, spec: LoraSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """A₀ (rank, in) and B₀ (out, rank) with s · B₀ A₀ = the best rank-r part of W.

    PiSSA (Meng et al. 2024), equations 2 and 3: with W = U S Vᵀ, B₀ = U_r sqrt(S_r / s) and
    A₀ = sqrt(S_r / s) V_rᵀ.
    """
    u, s, vh = torch.linalg.svd(weight.to(torch.float32), full_matrices=False)
    root = torch.sqrt(s[: spec.rank] / spec.scale)
    a0 = (root[:, None] * vh[: spec.rank]).contiguous()
    b0 = (u[:, : spec.rank] * root).contiguous()
    return a0, b0
