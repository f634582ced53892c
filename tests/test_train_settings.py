"""Rows at once and checkpointing, as the memory planner settles them."""

from dataclasses import replace

import pytest
from train_fixtures import tiny_spec

from lora_kit.architectures import architecture
from lora_kit.hardware import GIB, detect
from lora_kit.train.settings import planned_bytes, settle

SHAPE = architecture("llama-3.2-1b")


def gpu(gib, name="gpu-t4-rules", capability=(7, 5)):
    return replace(
        detect(), kind=name, gpu_memory_free=int(gib * GIB), capability=capability, dtype="float16"
    )


def spec(**changes):
    made = {"batch_size": 16, "accumulation": 2, "quantization": "nf4", "checkpointing": "auto"}
    return tiny_spec(**{**made, "dtype": "auto", **changes})


@pytest.mark.parametrize("engine", ["native", "trl", "unsloth"])
@pytest.mark.parametrize("gib", [3, 5, 8, 15, 80])
def test_what_is_settled_fits_and_keeps_the_rows_of_a_step(engine, gib):
    settled, why = settle(spec(), SHAPE, gpu(gib), engine, 512)
    assert settled.batch_size * settled.accumulation == 32
    assert settled.checkpointing in (True, False)
    rows, on = settled.batch_size, settled.checkpointing
    needed = planned_bytes(spec(), SHAPE, gpu(gib), engine, rows, 512, on)
    assert needed <= 0.9 * gib * GIB
    assert f"{rows} rows of 512 tokens" in why


@pytest.mark.parametrize("engine", ["native", "trl", "unsloth"])
def test_more_memory_never_means_fewer_rows_and_turns_checkpointing_off(engine):
    found = [settle(spec(), SHAPE, gpu(g), engine, 512)[0] for g in (3, 6, 12, 24, 80)]
    on = [s.checkpointing for s in found]
    assert on == sorted(on, reverse=True)
    assert on[0]
    assert not on[-1]
    for state in (True, False):
        rows = [s.batch_size for s in found if s.checkpointing is state]
        assert rows == sorted(rows)


def test_a_choice_that_was_made_is_kept():
    for given in (True, False):
        settled, _ = settle(spec(checkpointing=given), SHAPE, gpu(80), "unsloth", 256)
        assert (settled.checkpointing, settled.batch_size) == (given, 16)


def test_a_cpu_changes_nothing():
    given = spec()
    settled, why = settle(given, SHAPE, detect(), "native", 512)
    assert settled == replace(given, checkpointing=False)
    assert "CPU" in why
