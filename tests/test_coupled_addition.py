"""Coupled positions: the tensors of sums, what a model may see, training that carries on."""

from dataclasses import replace

import pytest
import torch

from lora_kit.coupled_addition import (
    CoupledSpec,
    CoupledTransformer,
    add_digits,
    answer_sums,
    carry_digits,
    draw_digits,
    held_out_digits,
    position_ids,
    right_answers,
    sum_tokens,
    train_coupled,
)
from lora_kit.errors import BadInputError

TINY = CoupledSpec(most_trained=3, most_tested=6, width=16, heads=2, steps=12, batch=8)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def number(digits):
    return int("".join(map(str, digits.tolist())))


def test_sums_are_sums():
    generator = torch.Generator().manual_seed(0)
    for n in (1, 2, 9, 40):
        for digits in (draw_digits(50, n, generator), carry_digits(50, n, generator)):
            for (a, b), total in zip(digits, add_digits(digits), strict=True):
                assert number(a) + number(b) == number(total.flip(0))
        assert n == 1 or draw_digits(200, n, generator)[:, :, 0].min() == 1


def test_hard_sums_carry_through_every_place():
    from lora_kit.arithmetic import carries

    for n in (1, 2, 12):
        for a, b in carry_digits(50, n, torch.Generator().manual_seed(1)):
            assert carries(str(number(a)).zfill(n), str(number(b)).zfill(n)) == (n, n)


def test_text_and_positions_as_the_module_shows_them():
    digits = torch.tensor([[[0, 4, 7], [9, 5, 8]]])
    assert sum_tokens(digits).tolist() == [[0, 4, 7, 10, 9, 5, 8, 11, 5, 0, 0, 1, 12]]
    zero = torch.zeros(1, dtype=torch.long)
    coupled = position_ids(3, zero, "coupled")[0].tolist()
    assert coupled == [3, 2, 1, 0, 3, 2, 1, 0, 1, 2, 3, 4, 5]
    abacus = position_ids(3, zero + 7, "abacus")[0].tolist()
    assert abacus == [10, 9, 8, 0, 10, 9, 8, 0, 8, 9, 10, 11, 0]
    assert position_ids(3, zero + 2, "absolute")[0].tolist() == list(range(2, 15))


@pytest.mark.parametrize("scheme", ["coupled", "abacus", "absolute"])
@pytest.mark.parametrize("reading", ["learnt", "relative"])
def test_a_token_sees_nothing_behind_it(scheme, reading):
    torch.manual_seed(0)
    spec = replace(TINY, scheme=scheme, reading=reading, layers=2)
    model = CoupledTransformer(spec).eval()
    ids = sum_tokens(draw_digits(3, 4, torch.Generator().manual_seed(0)))
    places = position_ids(4, torch.ones(3, dtype=torch.long), scheme)
    assert places.max() < spec.positions
    whole = model(ids, places)
    changed = ids.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 10
    assert torch.allclose(model(changed, places)[:, :9], whole[:, :9], atol=1e-5)
    assert not torch.allclose(model(changed, places)[:, 9:], whole[:, 9:], atol=1e-3)


@pytest.mark.parametrize("reading", ["learnt", "relative"])
def test_token_by_token_sees_what_one_pass_sees(reading):
    torch.manual_seed(0)
    model = CoupledTransformer(replace(TINY, reading=reading, layers=2)).eval()
    if reading == "relative":
        torch.nn.init.normal_(model.distance)
    ids = sum_tokens(held_out_digits(4, 5))
    places = position_ids(4, torch.ones(5, dtype=torch.long), "coupled")
    whole, past = model(ids, places), []
    pieces = [model(ids[:, :6], places[:, :6], past)]
    pieces += [model(ids[:, i : i + 1], places[:, : i + 1], past) for i in range(6, 16)]
    assert torch.allclose(torch.cat(pieces, dim=1), whole, atol=1e-5)


def test_relative_reading_knows_no_start():
    torch.manual_seed(0)
    model = CoupledTransformer(replace(TINY, reading="relative")).eval()
    torch.nn.init.normal_(model.distance)
    ids = sum_tokens(held_out_digits(3, 4))
    at = [model(ids, position_ids(3, torch.full((4,), s), "coupled")) for s in (1, 4)]
    assert torch.equal(*at)


def test_one_pass_finds_what_greedy_answers_are_right():
    """A model whose slips hang on all it has read: one pass against token by token."""
    n = 4

    class Slips:
        spec = TINY

        def __call__(self, ids, places, past=None):
            new = ids.shape[1]
            if past is not None:
                ids = torch.cat([*past, ids], dim=1)
                past[:] = [ids]
            numbers = torch.stack([ids[:, :n], ids[:, n + 1 : 2 * n + 1]], dim=1)
            wanted = sum_tokens(numbers)[:, 1 : ids.shape[1] + 1]
            slips = ids.cumsum(1) % 11 == 0
            return torch.nn.functional.one_hot((wanted + slips) % 13, 13).float()[:, -new:]

    digits = held_out_digits(n, 300)
    wanted = sum_tokens(digits)[:, 2 * n + 2 :]
    token_by_token = answer_sums(Slips(), digits) == wanted
    assert 50 < token_by_token.all(1).sum() < 250
    assert torch.equal(right_answers(Slips(), digits, at_once=64), token_by_token)


def test_training_carries_on_as_if_unbroken(tmp_path):
    quiet = dict(say=lambda _: None)
    whole, facts = train_coupled(TINY, **quiet)
    cut, told = train_coupled(TINY, tmp_path, seconds=0, **quiet)
    assert cut is None
    assert told["step"] == 1
    steps = [told["step"]]
    while cut is None:
        cut, told = train_coupled(TINY, tmp_path, seconds=0, **quiet)
        steps.append(told["step"])
    assert steps[-1] == TINY.steps == facts["step"]
    assert len(steps) == TINY.steps
    for one, two in zip(whole.parameters(), cut.parameters(), strict=True):
        assert torch.equal(one, two)


def test_held_out_sums_are_not_trained(monkeypatch):
    import lora_kit.coupled_addition as module

    seen = []
    loss = module.answer_loss

    def spy(model, digits, starts):
        seen.append(digits)
        return loss(model, digits, starts)

    monkeypatch.setattr(module, "answer_loss", spy)
    train_coupled(replace(TINY, width=4, batch=300, steps=25), say=lambda _: None)
    held = {tuple(d.flatten().tolist()) for d in held_out_digits(2, 500)}
    trained = {tuple(d.flatten().tolist()) for some in seen for d in some if d.shape[-1] == 2}
    assert len(trained) > 1000
    assert not trained & held


def test_settings_out_of_range_are_refused():
    for wrong in (
        dict(scheme="rotary"),
        dict(reading="aloud"),
        dict(width=0),
        dict(most_tested=2),
        dict(heads=3),
    ):
        with pytest.raises(BadInputError):
            replace(TINY, **wrong)


def test_a_cell_leaves_a_record(tmp_path):
    from lora_kit.studies.coupled_cells import run_cell
    from lora_kit.studies.records import read_record, write_record

    setting = dict(most_trained=2, most_tested=5, width=8, heads=2, steps=100, batch=2)
    record = run_cell(setting | dict(test_rows=20, hard_rows=5), 3, tmp_path)
    again = read_record(write_record(record, tmp_path / "r.json"))
    assert [row["digits"] for row in again.tables["lengths"]] == [1, 2, 3, 4, 5]
    assert again.metrics["exact_trained"].n == 20
    assert again.seed == 3
    assert len(again.tables["losses"]) == 1
