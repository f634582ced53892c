"""A fingerprint of a base model: enough of it to notice when an adapter meets another one.

peft loads an adapter onto any model whose layers have the right shapes, without a word. A
fingerprint holds the facts of the architecture and a small sample of the weights. Two fingerprints
agree when the facts are equal and the samples agree to within what the coarser storage can hold:
one base loaded in fp32, fp16, bf16 or 4 bits is one base, and another model of the same shape is
not.

Tolerances, per sampled tensor, relative Euclidean distance ‖a − b‖ / ‖a‖:

    both fp32 (or finer)    1e-5
    one of them fp16        1e-3     (fp16 keeps 11 bits: rounding at most 2^-11 = 4.9e-4)
    one of them bf16        4e-3     (bf16 keeps 8 bits: rounding at most 2^-8 = 3.9e-3)
    one of them 4-bit       0.25     (NF4's own error is about 0.09, FP4's about 0.13)

Norms and embeddings stay dense in a 4-bit model and are still held to the tight line.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_kit.lora_base import DENSE, base_kind, true_weight
from lora_kit.lora_targets import canonical_name

SAMPLED_LINEARS = 8
VALUES_PER_TENSOR = 64
TOLERANCE = {"float64": 1e-5, "float32": 1e-5, "float16": 1e-3, "bfloat16": 4e-3, "4bit": 0.25}
FACTS = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "vocab_size"),
)


@dataclass(frozen=True)
class ModelFingerprint:
    """Facts of an architecture and a sample of its weights.

    name: what to call the model in a sentence.
    facts: the architecture, e.g. {"model_type": "llama", "hidden_size": 576, ...}.
    samples: {tensor path: {"dtype": how it was stored, "values": numbers at evenly spaced places}}.
    digest: 12 hex digits over facts and samples; equal for equal weights loaded the same way.
    """

    name: str
    facts: dict[str, Any]
    samples: dict[str, dict[str, Any]] = field(repr=False)
    digest: str = ""

    def __post_init__(self) -> None:
        if not self.digest:
            object.__setattr__(self, "digest", _digest(self.facts, self.samples))

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "digest": self.digest,
            "facts": self.facts,
            "samples": self.samples,
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> ModelFingerprint:
        return cls(record["name"], record["facts"], record["samples"], record["digest"])

    def mismatch(self, other: ModelFingerprint) -> str | None:
        """One sentence naming both models and the first difference, or None when they agree."""
        if self.digest == other.digest:
            return None
        pair = f"{self.name} ({self.digest}) is not {other.name} ({other.digest})"
        for fact in [*self.facts, *(f for f in other.facts if f not in self.facts)]:
            mine, theirs = self.facts.get(fact), other.facts.get(fact)
            if mine != theirs:
                return f"{pair}: {fact} is {mine} there and {theirs} here."
        if set(self.samples) != set(other.samples):
            odd = sorted(set(self.samples) ^ set(other.samples))
            return f"{pair}: their layers have other names ({odd[0]})."
        for path, sample in self.samples.items():
            distance, allowed = _compare(sample, other.samples[path])
            if not distance <= allowed:
                return (
                    f"{pair}: the weights of {path} differ by {100 * distance:.3g}% "
                    f"where storage explains at most {100 * allowed:.3g}%."
                )
        return None


def _compare(one: dict[str, Any], two: dict[str, Any]) -> tuple[float, float]:
    a = torch.tensor(one["values"], dtype=torch.float64)
    b = torch.tensor(two["values"], dtype=torch.float64)
    if a.shape != b.shape:
        return float("inf"), 0.0
    allowed = max(TOLERANCE[one["dtype"]], TOLERANCE[two["dtype"]])
    scale = a.norm().clamp_min(1e-30)
    return float((a - b).norm() / scale), allowed


def _digest(facts: dict[str, Any], samples: dict[str, dict[str, Any]]) -> str:
    text = json.dumps([facts, samples], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def fingerprint_model(model: nn.Module, name: str | None = None) -> ModelFingerprint:
    """The fingerprint of `model`'s base weights; adapters and their wrappers are looked through.

    model: any torch model; a `transformers` one gives its config's facts as well.
    name: what to call it; by default its config's name or path, else its class.
    Sampled: the embeddings, the first and last norm, and 8 evenly spaced linear layers, 64 values
    of each. An adapter merged with this kit is looked through; one merged by other means is not.
    """
    config = getattr(model, "config", None)
    facts = {
        fact: getattr(config, fact) for fact in FACTS if getattr(config, fact, None) is not None
    }
    linears, norms, embeddings = _sampled_modules(model)
    facts["linear_layers"] = len(linears)
    step = max(1, (len(linears) - 1) // (SAMPLED_LINEARS - 1)) if len(linears) > 1 else 1
    chosen = linears[::step][: SAMPLED_LINEARS - 1] + linears[-1:]
    samples = {}
    for path, module in dict([*embeddings[:2], *norms[:1], *norms[-1:], *chosen]).items():
        samples[f"{path}.weight"] = _sample(module)
        samples[f"{path}.weight"]["shape"] = _shape(module)
    return ModelFingerprint(name or _name_of(model), facts, samples)


def _sampled_modules(model: nn.Module):
    linears, norms, embeddings, seen = [], [], [], set()
    for path, module in model.named_modules():
        if any(part.startswith("lora_") for part in path.split(".")):
            continue
        bare = canonical_name(path)
        module = getattr(module, "unmerged_base", module)  # LoRALinear knows what lies under it
        if bare in seen:
            continue
        weight = getattr(module, "weight", None)
        if base_kind(module):
            linears.append((bare, module))
        elif isinstance(module, nn.Embedding):
            embeddings.append((bare, module))
        elif isinstance(weight, torch.Tensor) and weight.ndim == 1:
            norms.append((bare, module))
        else:
            continue
        seen.add(bare)
    return linears, norms, embeddings


def _shape(module: nn.Module) -> list[int]:
    if base_kind(module):
        return [module.out_features, module.in_features]
    return list(module.weight.shape)


def _sample(module: nn.Module) -> dict[str, Any]:
    quantised = base_kind(module) not in (None, DENSE)
    weight = true_weight(module) if base_kind(module) else module.weight.detach()
    flat = weight.reshape(-1)
    count = min(VALUES_PER_TENSOR, flat.numel())
    # Half-way points, so that neither the first nor the last row alone decides.
    places = ((torch.arange(count, dtype=torch.float64) + 0.5) * flat.numel() / count).long()
    values = flat[places.to(flat.device)].to("cpu", torch.float32)
    dtype = "4bit" if quantised else str(weight.dtype).removeprefix("torch.")
    return {"dtype": dtype, "values": [float(f"{v:.9g}") for v in values.tolist()]}


def _name_of(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    inner = getattr(model, "name_or_path", None) or getattr(config, "_name_or_path", None)
    # Of a local folder only its own name: the rest of the path says nothing about the model.
    return (
        Path(str(inner)).name
        if inner and Path(str(inner)).exists()
        else str(inner or type(model).__name__)
    )
