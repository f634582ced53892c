import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from train_fixtures import adapted, some_rows, trained

from lora_kit.errors import BadInputError
from lora_kit.train import native
from lora_kit.train.packing import MULTIPLE, collate, place_rows

FP32 = torch.float32


def packed_logits(model, batch):
    hidden = model.get_decoder()(
        input_ids=batch.input_ids,
        attention_mask=batch.mask(FP32),
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    return model.get_output_embeddings()(hidden)


def rows_in(batch, rows):
    """(sequence, start, row) of every row of a packed batch, found by its tokens."""
    found = []
    for n in range(len(batch.input_ids)):
        for segment in range(int(batch.segments[n].max()) + 1):
            places = (batch.segments[n] == segment).nonzero().squeeze(1)
            ids = batch.input_ids[n, places].tolist()
            found.append((n, int(places[0]), next(r for r in rows if r["input_ids"] == ids)))
    return found


@pytest.mark.parametrize("count", [2, 9, 70])  # one sequence, and several
def test_packed_rows_have_the_logits_they_have_alone(count):
    model, rows = adapted(), some_rows(count)
    batch = collate(rows, pad_id=0)
    assert batch.packed
    with torch.no_grad():
        together = packed_logits(model, batch)
        places = rows_in(batch, rows)
        assert len(places) == count
        for n, start, row in places:
            alone = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
            here = together[n, start : start + len(alone)]
            torch.testing.assert_close(here, alone, atol=1e-5, rtol=0)


def test_no_gradient_flows_from_one_row_to_another():
    model, rows = adapted(), some_rows(5)
    batch = collate(rows, pad_id=0)
    embedded = model.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
    hidden = model.get_decoder()(
        inputs_embeds=embedded,
        attention_mask=batch.mask(FP32),
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    mine = batch.segments[0] == 2
    hidden[0, mine].sum().backward()
    reached = embedded.grad[0].abs().sum(-1) > 0
    assert bool(reached[mine].any())
    assert not bool(reached[~mine].any())


def test_without_the_mask_rows_would_see_each_other():
    """The test above can fail: with plain causal attention the logits do differ."""
    model, rows = adapted(initializer_range=0.3), some_rows(5)
    batch = collate(rows, pad_id=0)
    causal = torch.zeros(1, 1, *[batch.input_ids.shape[1]] * 2)
    causal.masked_fill_(torch.ones_like(causal).triu(1).bool(), torch.finfo(FP32).min)
    with torch.no_grad():
        right = packed_logits(model, batch)
        hidden = model.get_decoder()(
            input_ids=batch.input_ids,
            attention_mask=causal,
            position_ids=batch.positions,
            use_cache=False,
        ).last_hidden_state
        wrong = model.get_output_embeddings()(hidden)
    later = batch.segments[0] > 0
    assert float((right - wrong)[0, later].abs().max()) > 1e-2


def test_the_gradient_does_not_depend_on_packing():
    rows, gradients = some_rows(10), []
    for pack in (True, False):
        model = adapted()
        native.loss_sum(model, collate(rows, 0, pack), FP32).backward()
        gradients.append({n: p.grad for n, p in trained(model).items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-4)


def test_the_last_token_of_a_row_is_not_asked_for_the_next_rows_first():
    rows = [
        {"input_ids": [5, 6, 7], "labels": [5, 6, 7]},
        {"input_ids": [8, 9], "labels": [8, 9]},
    ]
    batch = collate(rows, pad_id=0)
    assert batch.input_ids[0, :5].tolist() == [5, 6, 7, 8, 9]
    assert batch.positions[0, :5].tolist() == [0, 1, 2, 0, 1]
    assert list(zip(batch.picked.tolist(), batch.targets.tolist(), strict=True)) == [
        (0, 6),
        (1, 7),
        (3, 9),
    ]
    assert batch.tokens == 5
    assert batch.input_ids.shape[1] % MULTIPLE == 0


def test_padding_is_never_all_masked():
    """A row of the mask without an allowed place would make NaN."""
    batch = collate(some_rows(5), pad_id=0)
    assert bool((batch.mask(FP32) == 0).any(-1).all())


def test_single_rows_need_no_mask():
    batch = collate(some_rows(3), pad_id=0, pack=False)
    assert batch.mask(FP32) is None
    assert len(batch.input_ids) == 3


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(50, 120))
def test_every_row_is_placed_once_and_fits(lengths, capacity):
    places = place_rows(lengths, capacity)
    assert sorted(i for place in places for i in place) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in place) <= capacity for place in places)
    # Best fit leaves at most one sequence half empty or emptier.
    assert sum(2 * sum(lengths[i] for i in p) <= capacity for p in places) <= 1


def test_refusals():
    with pytest.raises(BadInputError, match="7 tokens does not fit into 5"):
        place_rows([3, 7], 5)
    with pytest.raises(BadInputError, match="at least one row"):
        collate([], 0)
    with pytest.raises(BadInputError, match="at least one token"):
        collate([{"input_ids": [], "labels": []}], 0)
