"""Users who ask again: every request is asked once, and the three times add up."""

import pytest
from serve_models import engine_over, make_adapter, talking

from lora_kit.errors import BadInputError, BusyError, RunFailedError, UnknownNameError
from lora_kit.serve.traffic import QUANTITIES, Answered, Load, Traffic, drive

SHORT = {"tokens_in": (1, 12), "tokens_out": (1, 5)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for i, name in enumerate(("a", "b", "c")):
        make_adapter(root / name, 2, "attention", i, model=talking)
    return root


def test_every_request_is_answered_once_and_as_long_as_drawn(folder, tokenizer):
    traffic = Traffic(5, 40, ("a", "b", None), **SHORT)
    with engine_over(tokenizer, folder, max_rows=3) as engine:
        load = drive(engine, traffic)
    assert [a.number for a in load.answered] == list(range(40))
    for a in load.answered:
        asked = traffic.request(a.number, 300)
        assert (a.adapter, a.tokens_in) == (asked.adapter, len(asked.prompt_ids))
        assert a.tokens_out == asked.max_tokens
        assert 0 <= a.waited_ms <= a.first_ms <= a.total_ms
        assert a.streaming_ms == a.total_ms - a.first_ms
    assert {a.adapter for a in load.answered} == {"a", "b", None}
    # No user has two requests under way.
    events = [(a.submitted_s, 1) for a in load.answered]
    events += [(a.submitted_s + a.total_ms / 1000, -1) for a in load.answered]
    under_way = most = 0
    for _, step in sorted(events):
        under_way += step
        most = max(most, under_way)
    assert 2 <= most <= 5
    assert 0 < load.seconds
    assert load.cpu_seconds > 0


def test_several_engines_take_turns(folder, tokenizer):
    with engine_over(tokenizer, folder) as one, engine_over(tokenizer, folder) as two:
        drive([one, two], Traffic(4, 20, ("a",), **SHORT))
        assert one.stats()["submitted"] == two.stats()["submitted"] == 10


def test_the_same_seed_asks_the_same():
    traffic = Traffic(1, 5, ("a", "b"), seed=3)
    assert traffic.request(4, 300) == Traffic(9, 7, ("a", "b"), seed=3).request(4, 300)
    assert traffic.request(4, 300) != traffic.request(3, 300)
    lengths = {len(traffic.request(i, 300).prompt_ids) for i in range(200)}
    assert min(lengths) >= 30
    assert max(lengths) <= 500
    assert len(lengths) > 100


def test_averages_and_p90():
    rows = [Answered(i, None, 1, 2, 0.0, 0.0, 1.0, 10.0 * (i + 1)) for i in range(10)]
    load = Load(rows, 4.0, 1.0)
    assert load.average("Total request time") == 55.0
    assert load.p90("Total request time") == 90.0
    assert load.average("Token streaming time") == 54.0
    assert load.tokens_a_second == 5.0
    assert len(load.row()) == 2 * len(QUANTITIES) + 1
    assert Load(rows[:1], 1.0, 1.0).p90("Total request time") == 10.0


def test_what_goes_wrong_is_raised(folder, tokenizer):
    for bad in ({"users": 0}, {"requests": 0}, {"adapters": ()}, {"tokens_in": (0, 3)}):
        with pytest.raises(BadInputError):
            Traffic(**{"users": 1, "requests": 1} | bad)
    with engine_over(tokenizer, folder, max_rows=1, max_waiting=1) as engine:
        with pytest.raises(UnknownNameError):
            drive(engine, Traffic(1, 3, ("z",), **SHORT))
        with pytest.raises(BusyError):
            drive(engine, Traffic(20, 40, ("a",), (1, 2), (30, 30)))
        engine.decoder.step = lambda *_: 1 / 0
        with pytest.raises(RunFailedError, match="ended with error"):
            drive(engine, Traffic(1, 1, ("a",), (1, 2), (5, 5)))
