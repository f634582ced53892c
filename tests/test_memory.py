"""The planner's arithmetic against published counts, real modules and measured peaks."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from lora_kit.errors import BadInputError, UnknownNameError
from lora_kit.memory import (
    ARCHITECTURES,
    GIB,
    LINEAR,
    Architecture,
    architecture,
    format_plan,
    plan_memory,
    weight_bytes,
)

# As published on each model's page or in its safetensors index.
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "tinyllama-1.1b": 1_100_048_384,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "mistral-7b-v0.3": 7_248_023_552,
    "llama-2-7b": 6_738_415_616,
    "llama-65b": 65_285_660_672,
}
TINY = Architecture("tiny", 64, 160, 2, 4, 2, 16, 96, True, False, 128)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_parameter_count_is_the_published_one(name):
    assert ARCHITECTURES[name].num_parameters == PUBLISHED[name]


def test_every_architecture_has_a_published_count():
    assert set(ARCHITECTURES) == set(PUBLISHED)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_count_and_shapes_equal_the_real_module(kind, tied):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        tie_word_embeddings=tied,
        max_position_embeddings=128,
    )
    model = AutoModelForCausalLM.from_config(config)
    shape = Architecture.from_config(config, name="tiny")
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    layer = dict(model.model.layers[0].named_modules())
    found = {n.split(".")[-1]: tuple(m.weight.shape) for n, m in layer.items() if "_proj" in n}
    assert shape.linear_shapes() == found
    assert Architecture.from_config(config.to_dict(), name="tiny") == shape
    assert shape.max_position == 128


def test_lora_parameters_equal_peft():
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        tie_word_embeddings=True,
    )
    for targets in (("q_proj", "v_proj"), LINEAR):
        spec = LoraConfig(r=4, lora_alpha=8, target_modules=list(targets))
        model = get_peft_model(LlamaForCausalLM(config), spec)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert TINY.lora_parameters(4, targets) == trainable


@pytest.mark.parametrize("double", [False, True])
def test_weight_bytes_equal_quantised_tensors(double):
    import torch

    from lora_kit.quantize import quantize

    total = 0
    for out, inner in TINY.linear_shapes().values():
        total += TINY.num_layers * quantize(torch.randn(out, inner), "nf4", 64, double).nbytes
    rest = 2 * (TINY.num_parameters - TINY.linear_parameters)
    kind = "nf4-double" if double else "nf4"
    assert sum(weight_bytes(TINY, kind, "float16")) == total + rest


def test_double_quantisation_costs_the_papers_bits():
    shape = ARCHITECTURES["llama-2-7b"]
    for kind, bits in (("nf4", 0.5), ("nf4-double", 0.127)):
        constants = 8 * weight_bytes(shape, kind)[1] / shape.linear_parameters
        assert constants == pytest.approx(bits, abs=5e-4)


def test_rows_follow_the_formulas():
    plan = plan_memory(TINY, 4, "q_proj,v_proj", 2, 16, "float32", None, "adamw", False, "t4")
    trained = 2 * 4 * ((64 + 64) + (32 + 64))
    tokens = 32
    layer = tokens * (8 * 64 + 4 * (2 * 64 + 2 * 64 + 2 * 32 + 4 * 160 + 6 * 4))
    assert plan.row("weights") == 4 * TINY.num_parameters
    assert plan.row("quantisation constants") == 0
    assert plan.row("adapters") == plan.row("gradients") == 4 * trained
    assert plan.row("optimiser states") == 8 * trained
    assert plan.row("activations") == 2 * layer
    assert plan.row("logits and loss") == 12 * tokens * 96
    assert plan.total_bytes == sum(size for _, size in plan.rows)
    assert plan.torch_bytes == plan.total_bytes - plan.row("CUDA context")


def test_full_fine_tuning_takes_sixteen_bytes_a_parameter():
    for dtype in ("float16", "float32"):
        plan = plan_memory(TINY, 0, dtype=dtype, seq=16, quantization=None)
        rows = ("weights", "master weights", "gradients", "optimiser states")
        assert sum(plan.row(r) for r in rows) == 16 * TINY.num_parameters


# torch.cuda.max_memory_allocated of one step (forward, backward, AdamW) of this kit's own layers,
# rank 16 on all linear layers, fp16 autocast, random weights: one H100, torch 2.11, transformers
# 5.17, FlashAttention off. GiB.
@pytest.mark.parametrize(
    ("name", "quantization", "batch", "seq", "checkpointing", "measured_gib"),
    [
        ("llama-3.2-1b", "nf4-double", 2, 1024, False, 7.219),
        ("llama-3.2-1b", "nf4-double", 4, 1024, True, 7.341),
        ("llama-3.2-1b", "nf4-double", 1, 512, True, 1.959),
        ("llama-3.2-1b", "nf4-double", 8, 256, False, 7.242),
        ("llama-3.2-1b", None, 2, 1024, False, 8.564),
        ("smollm2-135m", "nf4-double", 8, 1024, False, 9.958),
        ("smollm2-135m", "nf4-double", 8, 1024, True, 5.024),
    ],
)
def test_plan_is_near_measured_peaks(name, quantization, batch, seq, checkpointing, measured_gib):
    settings = {"batch": batch, "seq": seq, "checkpointing": checkpointing, "gpu": "h100"}
    plan = plan_memory(ARCHITECTURES[name], quantization=quantization, **settings)
    assert plan.torch_bytes / GIB == pytest.approx(measured_gib, rel=0.02)


def test_largest_batch_is_the_last_that_fits():
    shape = ARCHITECTURES["llama-3.2-1b"]
    most = plan_memory(shape, gpu="t4").largest_batch
    assert most > 1
    assert plan_memory(shape, batch=most, gpu="t4").fits
    assert not plan_memory(shape, batch=most + 1, gpu="t4").fits
    assert plan_memory(ARCHITECTURES["llama-65b"], gpu="t4").largest_batch == 0


def test_what_saves_memory_saves_it():
    shape = ARCHITECTURES["llama-3.2-3b"]

    def total(**change):
        return plan_memory(shape, **{"batch": 4, "seq": 1024} | change).total_bytes

    assert total(checkpointing=True) < total(checkpointing=False)
    order = [total(quantization=q) for q in ("nf4-double", "nf4", "int8", None)]
    assert order == sorted(order)
    order = [total(optimizer=o) for o in ("sgd", "adamw-8bit", "adamw")]
    assert order == sorted(order)
    assert len(set(order)) == 3


def test_eight_bit_states_equal_our_optimiser():
    import torch

    from lora_kit.memory import _optimizer_bytes
    from lora_kit.optimizer8bit import Adam8bit

    weight = torch.nn.Parameter(torch.randn(96, 1000))
    optimizer = Adam8bit([weight])
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    assert optimizer.state_bytes() == _optimizer_bytes("adamw-8bit", weight.numel())


def test_table_shows_every_row_and_the_verdict():
    plan = plan_memory(architecture("llama-3.2-1b-instruct"))
    text = format_plan(plan)
    for name, size in plan.rows:
        assert f"{name:<24}{size / GIB:>10.3f} GiB" in text
    assert "Fits" in text
    assert f"Largest batch of 512 tokens that fits: {plan.largest_batch}." in text
    text = format_plan(plan_memory(ARCHITECTURES["llama-65b"]))
    assert "Does not fit" in text
    assert "Not even one sequence" in text


def test_planning_needs_no_torch():
    code = (
        "import sys; from lora_kit.memory import *; "
        "text = format_plan(plan_memory(ARCHITECTURES['llama-3.2-1b'])); "
        "print(text != '', 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["True", "False"]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"gpu": "t5"}, UnknownNameError, "t4"),
        ({"dtype": "float8"}, UnknownNameError, "float16"),
        ({"quantization": "nf5"}, UnknownNameError, "nf4"),
        ({"optimizer": "adam9"}, UnknownNameError, "adamw"),
        ({"targets": "q_prog"}, UnknownNameError, "q_proj"),
        ({"targets": ()}, BadInputError, "at least one"),
        ({"rank": -1}, BadInputError, "rank"),
        ({"rank": 1.5}, BadInputError, "rank"),
        ({"batch": 0}, BadInputError, "batch"),
        ({"seq": 0}, BadInputError, "seq"),
        ({"seq": 129}, BadInputError, "at most 128"),
        ({"rank": 0}, BadInputError, "Full fine-tuning"),
    ],
)
def test_bad_input_is_named(change, error, words):
    with pytest.raises(error, match=words):
        plan_memory(TINY, **{"seq": 16} | change)


def test_unknown_architecture_offers_the_nearest():
    with pytest.raises(UnknownNameError, match=r"llama-3\.2-1b"):
        architecture("lama-3.2-1b")
    with pytest.raises(UnknownNameError, match="weights"):
        plan_memory(TINY, seq=16).row("wights")


def test_config_of_another_family_or_with_holes_is_refused():
    with pytest.raises(BadInputError, match="gpt2"):
        Architecture.from_config({"model_type": "gpt2"})
    with pytest.raises(BadInputError, match="vocab_size"):
        Architecture.from_config(
            {
                "hidden_size": 8,
                "intermediate_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            }
        )
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.hidden_size = 3
