"""The small adapters: recipes of one to three megabytes; what is shipped is what was measured."""

import math

import pytest
import torch

from lora_kit.architectures import architecture, check_targets
from lora_kit.lora import read_adapter
from lora_kit.skills import SKILLS
from lora_kit.store import repository
from lora_kit.studies.records import read_record
from lora_kit.train import RECIPES, skill_rows
from lora_kit.train.small import SMALL_RECIPES

ADAPTERS = repository() / "data" / "adapters"
RECORDS = repository() / "data" / "results" / "05_adapter_swapping"
SHIPPED = sorted(p.parent.name for p in ADAPTERS.glob("*/adapter_config.json"))
# Before they are made there is nothing to check; one that skips says so.
EACH = SHIPPED or [
    pytest.param("none", marks=pytest.mark.skip(reason="data/adapters holds no adapter yet"))
]


def test_every_skill_has_a_recipe_and_is_in_the_registry():
    assert {made.skill for made in SMALL_RECIPES.values()} == set(SKILLS)
    for name, made in SMALL_RECIPES.items():
        assert name == f"{made.skill}-small"
        assert RECIPES[name] is made


@pytest.mark.parametrize("name", SMALL_RECIPES)
def test_three_megabytes_at_most(name):
    spec, shape = SMALL_RECIPES[name].spec, architecture("smollm2-135m")
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    outputs = {"q_proj": q, "k_proj": kv, "v_proj": kv, "o_proj": shape.hidden_size}
    outputs |= {"gate_proj": shape.intermediate_size, "up_proj": shape.intermediate_size}
    outputs |= {"down_proj": shape.hidden_size}
    inputs = {"o_proj": q, "down_proj": shape.intermediate_size}
    numbers = shape.num_layers * sum(
        spec.rank * (inputs.get(t, shape.hidden_size) + outputs[t])
        for t in check_targets(spec.targets)
    )
    assert numbers == (1_221_120 if spec.targets == "all" else 460_800)
    assert 2 * numbers < 3e6


@pytest.mark.parametrize("name", SMALL_RECIPES)
def test_rows_are_disjoint(name):
    train, test = skill_rows(name)
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in test}
    assert len(test) >= 150
    assert len(train) >= SMALL_RECIPES[name].spec.steps * 32


@pytest.mark.parametrize("skill", EACH)
def test_what_is_shipped_is_whole_small_and_recorded(skill):
    files = read_adapter(ADAPTERS / skill)
    tensors = [t for parts in files.tensors.values() for t in parts.values()]
    assert {t.dtype for t in tensors} == {torch.float16}
    size = (ADAPTERS / skill / "adapter_model.safetensors").stat().st_size
    assert size < 3e6
    assert files.fingerprint is not None
    spec = SMALL_RECIPES[f"{skill}-small"].spec
    assert (files.config["r"], files.config["lora_alpha"]) == (spec.rank, spec.alpha)
    record = read_record(RECORDS / f"adapter_{skill}.json")
    assert record.metrics["bytes"] == size
    accuracy = record.metrics["accuracy"]
    assert accuracy.low <= accuracy.value <= accuracy.high
    assert accuracy.n >= 100
    assert f"| {skill} |" in (ADAPTERS / "README.md").read_text(encoding="utf-8")


@pytest.mark.model
@pytest.mark.parametrize("skill", EACH)
def test_what_is_shipped_does_what_its_record_says(skill):
    from lora_kit.generation import exact_match, generate
    from lora_kit.lora import load_lora
    from lora_kit.models import load_model

    loaded = load_model(dtype="float32", device="cpu")
    load_lora(loaded.model, ADAPTERS / skill)  # the fingerprint is this base's
    rows = skill_rows(f"{skill}-small")[1].take(32)
    answers = generate(loaded.model, loaded.tokenizer, [r["prompt"] for r in rows], 16)
    right = sum(exact_match(answers, [r["completion"] for r in rows])) / len(rows)
    recorded = read_record(RECORDS / f"adapter_{skill}.json").metrics["accuracy"].value
    # Four standard errors of 32 rows, at least two rows: fp16 there, fp32 here.
    assert abs(right - recorded) <= max(2 / 32, 4 * math.sqrt(recorded * (1 - recorded) / 32))
