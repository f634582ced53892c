"""The comparison's loop: masks, scores, equal batches for equal seeds; the committed records."""

import pytest
import torch
from lora_fixtures import tiny_llama

from lora_kit.errors import BadInputError
from lora_kit.lora import LoraSpec, lora_layers
from lora_kit.lora_study import (
    IGNORED,
    Batch,
    Budget,
    answer_loss,
    encode_rows,
    fit,
    mean_and_interval,
    placement_cell,
    score,
)
from lora_kit.studies.records import read_records


class Digits:
    """A tokenizer of single characters: enough for sums."""

    eos_token_id, pad_token_id = 1, 0

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(c) % 60 + 2 for c in text]}


ROWS = [
    {"prompt": "1+2=", "completion": "3"},
    {"prompt": "7+8=", "completion": "15"},
    {"prompt": "4+4=", "completion": "8"},
]


def test_only_answers_and_the_end_are_labelled():
    batch = encode_rows(Digits(), ROWS)
    assert batch.ids.shape == (3, 7)
    assert (batch.labels != IGNORED).sum(1).tolist() == [2, 3, 2]
    assert batch.mask.sum(1).tolist() == [6, 7, 6]
    chosen = batch.labels != IGNORED
    assert torch.equal(batch.labels[chosen], batch.ids[chosen])
    with pytest.raises(BadInputError, match="no rows"):
        encode_rows(Digits(), [])


def test_loss_is_the_models_own():
    model, batch = tiny_llama(), encode_rows(Digits(), ROWS)
    with torch.no_grad():
        own = model(batch.ids, attention_mask=batch.mask, labels=batch.labels).loss
        assert answer_loss(model, batch) == pytest.approx(float(own), abs=1e-6)
        assert score(model, batch, batch_size=2)["loss"] == pytest.approx(float(own), abs=1e-6)


def test_score_counts_rows_right_to_the_last_token():
    model, batch = tiny_llama(), encode_rows(Digits(), ROWS)
    with torch.no_grad():
        first = model(batch.ids, attention_mask=batch.mask).logits.argmax(-1)
    labels = batch.labels.clone()
    labels[:, 1:] = torch.where(labels[:, 1:] != IGNORED, first[:, :-1], IGNORED)
    assert score(model, Batch(batch.ids, batch.mask, labels))["accuracy"] == 1.0
    place = int((labels[1] != IGNORED).nonzero()[-1])
    labels[1, place] = (labels[1, place] + 1) % 64
    assert score(model, Batch(batch.ids, batch.mask, labels))["accuracy"] == pytest.approx(2 / 3)


def test_a_cell_repeats_learns_and_leaves_the_model_as_it_was():
    model, batch = tiny_llama(), encode_rows(Digits(), ROWS)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    start = score(model, batch)["loss"]
    budget = Budget(15, 2, 2e-2)
    cells = [placement_cell(model, batch, batch, LoraSpec(4, 8), budget, 3) for _ in range(2)]
    assert cells[0]["loss"] == cells[1]["loss"] < start - 0.5
    assert (
        placement_cell(model, batch, batch, LoraSpec(4, 8), budget, 4)["loss"] != cells[0]["loss"]
    )
    assert not lora_layers(model)
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_a_failing_cell_takes_its_adapter_off():
    model, batch = tiny_llama(), encode_rows(Digits(), ROWS)
    with pytest.raises(IndexError):
        placement_cell(
            model,
            batch,
            Batch(batch.ids, batch.mask, batch.labels[:1]),
            LoraSpec(2, 4),
            Budget(1, 2, 1e-3),
            0,
        )
    assert not lora_layers(model)


def test_steps_lower_the_loss_and_every_row_is_seen_before_any_twice():
    model, batch = tiny_llama(), encode_rows(Digits(), ROWS)
    losses = fit(model, batch, 20, 3, 1e-2, seed=0)
    assert len(losses) == 20
    assert losses[-1] < losses[0] / 2


def test_interval_is_students():
    found = mean_and_interval([1.0, 2.0, 3.0])
    assert found["value"] == 2.0
    assert found["high"] - found["value"] == pytest.approx(4.303 * 3**-0.5, rel=1e-3)
    assert mean_and_interval([5.0]) == {"value": 5.0, "n": 1}


def test_committed_records_are_whole_and_comparable():
    records = read_records("lora_placement")
    cells = {(r.parameters["placement"], r.parameters["rank"]): r for r in records}
    assert len(cells) == len(records) == 12
    for record in records:
        seeds = record.tables["seeds"]
        assert [row["seed"] for row in seeds] == record.parameters["seeds"] == [0, 1, 2]
        for metric in ("loss", "accuracy"):
            again = mean_and_interval([row[metric] for row in seeds])
            assert record.metrics[metric].value == pytest.approx(again["value"])
            assert record.metrics[metric].stderr == pytest.approx(again["stderr"])
    assert len({(r.data["fingerprint"], r.model["fingerprint"]) for r in records}) == 1
    assert len({(r.parameters["steps"], r.parameters["lr"]) for r in records}) == 1
