"""The planner by engine, against peaks that torch measured on a GPU."""

import pytest

from lora_kit.architectures import architecture
from lora_kit.engine_memory import (
    ENGINES,
    packed_tokens,
    step_bytes,
    unsloth_loss,
    unsloth_tiles_from,
)
from lora_kit.memory import plan_memory
from lora_kit.studies.records import read_records

PEAKS = [row for record in read_records("memory_planner") for row in record.tables["peaks"]]


def known(row):
    return f"{row['engine']}-{row['model']}-{row['batch']}x{row['seq']}-{row['checkpointing']}"


@pytest.mark.parametrize("row", PEAKS, ids=known)
def test_the_plan_is_within_a_tenth_of_the_measured_peak(row):
    plan = plan_memory(
        architecture(row["model"]),
        rank=16,
        targets="all",
        batch=row["batch"],
        seq=row["seq"],
        optimizer="adamw" if row["engine"] == "native" else "adamw-8bit",
        checkpointing=row["checkpointing"],
        gpu="h200",
        engine=row["engine"],
        flash=False,
    )
    assert plan.torch_bytes == pytest.approx(row["peak_bytes"], rel=0.10)


def test_enough_was_measured_for_that():
    assert len([row for row in PEAKS if row["use"] == "predicted"]) >= 8
    assert {row["engine"] for row in PEAKS} == {"native", "trl", "unsloth"}


@pytest.mark.parametrize(
    ("batch", "seq", "tokens"), [(3, 384, 1536), (6, 384, 2304), (8, 100, 896)]
)
def test_packing_pads_to_whole_sequences(batch, seq, tokens):
    assert packed_tokens(batch, seq) == tokens


@pytest.mark.parametrize(
    ("model", "labels", "tiles_from", "rows", "columns"),
    [
        ("smollm2-135m", 8 * 511, 4096, 1024, 49_152),  # chunks: all of the vocabulary
        ("smollm2-135m", 12 * 383, 4096, 4096, 16_384),  # tiles, of 4096 labels at most
        ("smollm2-135m", 12 * 383, None, 1024, 49_152),  # a T4 has no tiles
        ("smollm2-135m", 500, 0, 500, 16_384),  # a small newer GPU has nothing else
        ("smollm2-135m", 300, 4096, 300, 49_152),
        ("llama-3.2-1b", 8 * 383, 4096, 512, 128_256),
        ("llama-2-7b", 8192, 4096, 2048, 32_000),  # too small a vocabulary for tiles
        ("llama-2-7b", 32_768, 4096, 4096, 32_000),
    ],
)
def test_the_loss_of_unsloth_goes_in_chunks_or_in_tiles(model, labels, tiles_from, rows, columns):
    shape = architecture(model)
    gathered = (4 + 2) * shape.hidden_size  # the gradient in float32, the hidden states in fp16
    assert unsloth_loss(shape, labels, 2, tiles_from) == rows * (4 * columns + gathered)


def test_which_gpus_tile_the_loss_of_unsloth():
    assert unsloth_tiles_from(15.0, capability_8=False) is None
    assert unsloth_tiles_from(22.2, capability_8=True) == 0
    assert unsloth_tiles_from(139.8, capability_8=True) == 4096


def test_unsloth_trains_a_whole_model_without_tiles():
    shape = architecture("smollm2-135m")

    def loss(rank):
        return step_bytes("unsloth", shape, rank, 12, 384, 2, True, False, tiles_from=4096).loss

    assert loss(16) > loss(0)


def test_the_buffers_of_unsloth_stand_beside_the_loss():
    shape = architecture("llama-3.2-1b")
    common = {"batch": 2, "seq": 512, "checkpointing": False, "gpu": "h200", "engine": "unsloth"}
    four, sixteen = (plan_memory(shape, quantization=q, **common) for q in ("nf4", None))
    assert four.row("working") - sixteen.row("working") == 2 * 2048 * 8192
    assert sixteen.row("working") == 64 * 2**20 + 2 * 2 * 64 * 131_072


@pytest.mark.parametrize("engine", ENGINES)
def test_checkpointing_and_shorter_rows_take_less(engine):
    shape = architecture("llama-3.2-1b")

    def total(batch, seq, checkpointing):
        step = step_bytes(engine, shape, 16, batch, seq, 2, checkpointing, flash=False)
        return step.kept + max(step.loss, step.again)

    assert total(4, 512, True) < total(4, 512, False)
    assert total(4, 256, False) < total(4, 512, False) < total(8, 512, False)
