"""The shipped addition models: they add, and the recipe runs."""

from __future__ import annotations

import pytest

from lora_kit.errors import BadInputError, NotAvailableError
from lora_kit.tinylm import (
    WIDTHS,
    addition_accuracy,
    addition_loss,
    encode_text,
    held_out_rows,
    load_addition_model,
    train_addition_model,
)


@pytest.mark.parametrize("width", WIDTHS)
def test_shipped_models_add_what_they_never_saw(width):
    model, rows = load_addition_model(width), held_out_rows(50)
    found = addition_accuracy(model, rows)
    assert found["n"] == 100
    assert found["value"] == 1.0
    assert addition_loss(model, rows) < 0.01
    wrong = [row | {"completion": str(int(row["completion"]) + 1)} for row in rows]
    assert addition_accuracy(model, wrong)["value"] == 0.0


def test_recipe_lowers_the_loss_and_repeats_itself():
    first, losses = train_addition_model(40, 12, 16, say=lambda text: None)
    second, again = train_addition_model(40, 12, 16, say=lambda text: None)
    assert losses == again
    assert losses[-1] < losses[0]
    assert not first.training
    assert sum(p.numel() for p in second.parameters()) == 76_400


def test_bad_input_is_named(tmp_path):
    with pytest.raises(BadInputError, match="x"):
        encode_text("1x2")
    with pytest.raises(BadInputError, match="200"):
        held_out_rows(201)
    with pytest.raises(NotAvailableError, match="40, 56, 72"):
        load_addition_model(48)
    with pytest.raises(NotAvailableError, match="tinylm"):
        load_addition_model(40, tmp_path)
