"""The engine: whoever shares a batch, every answer is what it would be alone; what fails, fails
alone."""

import threading
import time

import pytest
import torch
from serve_fixtures import eventually
from serve_models import KINDS, adapters_of_kinds, answers_alone, engine_over, talking

from lora_kit.errors import BadInputError, BusyError, UnknownNameError
from lora_kit.serve import engine as engine_module
from lora_kit.serve import pool as pool_module
from lora_kit.serve.engine import Engine, Request
from lora_kit.serve.pool import AdapterPool

PROMPTS = ("reverse 417=", "12+34=", "x", "a much longer prompt than the others are, by far")
TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return adapters_of_kinds(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def alone(folder, tokenizer):
    """{(adapter, prompt): its greedy tokens}, by transformers."""
    return {
        (name, prompt): ids
        for name in (None, *KINDS)
        for prompt, ids in zip(
            PROMPTS,
            answers_alone(tokenizer, folder / name if name else None, PROMPTS, TOKENS),
            strict=True,
        )
    }


@pytest.fixture(scope="module")
def engine(folder, tokenizer):
    with engine_over(tokenizer, folder, max_rows=6) as made:
        yield made


def ask(engine, name, prompt=PROMPTS[0], **options):
    return engine.submit(Request(prompt, adapter=name, **{"max_tokens": TOKENS} | options))


def settle(engine):
    """Wait until nothing is under way; say what is left behind."""
    assert eventually(lambda: not engine.stats()["running"] and not engine.stats()["waiting"])
    stats = engine.stats()
    return stats["adapters_in_use"], stats["cache_bytes"]


# ---- what is answered


def test_answers_differ_by_adapter_and_prompt(alone):
    """Or the tests below would show nothing."""
    assert len({tuple(ids) for ids in alone.values()}) > 15


def test_every_answer_is_as_alone_whatever_shares_the_batch(engine, alone):
    """60 requests of five kinds through six rows, in three orders: rows join where others end."""
    pairs = list(alone) * 3
    for seed in range(3):
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
        handles = [(pairs[i], ask(engine, *pairs[i], max_tokens=TOKENS - i % 3)) for i in order]
        for (pair, handle), i in zip(handles, order, strict=True):
            done = handle.result(60)
            expected = alone[pair][: TOKENS - i % 3]
            assert done.tokens == expected, pair
            assert done.reason == ("stop" if len(expected) < TOKENS - i % 3 else "length")
    assert settle(engine) == (0, 0)


def test_pieces_add_up_and_come_before_the_end(engine, alone):
    handle = ask(engine, "all4")
    first = next(iter(handle))
    rest = "".join(handle)
    assert first + rest == handle.result(1).text
    assert engine.tokenizer.decode(alone["all4", PROMPTS[0]]).startswith(handle.result(1).text)


def test_stop_texts_end_an_answer_and_are_left_out(engine):
    whole = ask(engine, "all4").result(20).text
    stop = whole[3:5]
    done = ask(engine, "all4", stop=(stop,)).result(20)
    assert (done.text, done.reason) == (whole[: whole.index(stop)], "stop")


def test_ends_can_be_ignored(engine, alone):
    ended = next((p for p, ids in alone.items() if len(ids) < TOKENS), None)
    name, prompt = ended or (None, PROMPTS[0])
    assert len(ask(engine, name, prompt, ignore_eos=True).result(20).tokens) == TOKENS


def test_draws_depend_on_the_seed_and_on_nobody_else(engine):
    options = {"temperature": 1.0, "seed": 3}
    lone = ask(engine, "one", **options).result(20)
    crowd = [ask(engine, n, p, temperature=1.0) for n in KINDS for p in PROMPTS[:2]]
    again = ask(engine, "one", **options).result(20)
    assert again.tokens == lone.tokens
    assert any(ask(engine, "one", temperature=1.0, seed=s).result(20) != lone for s in range(3))
    for handle in crowd:
        handle.result(20)


# ---- what is asked wrongly


@pytest.mark.parametrize(
    ("request_", "kind", "words"),
    [
        (Request("x", adapter="all5"), UnknownNameError, "Did you mean 'all4'"),
        (Request(), BadInputError, "prompt or prompt_ids"),
        (Request("x", prompt_ids=[1]), BadInputError, "one of them"),
        (Request(prompt_ids=[]), BadInputError, "prompt is empty"),
        (Request(prompt_ids=[300]), BadInputError, "among the 300"),
        (Request(prompt_ids=[-1]), BadInputError, "among the 300"),
        (Request("x", max_tokens=0), BadInputError, "at least 1"),
        (Request("x", max_tokens=-7), BadInputError, "at least 1"),
        (Request("x", max_tokens=10**30), BadInputError, "together they may be 2,048"),
        (Request("x" * 5000), BadInputError, "together they may be"),
        (Request("x", temperature=-1.0), BadInputError, "temperature"),
        (Request("x", temperature=float("nan")), BadInputError, "temperature"),
        (Request("x", deadline_s=0.0), BadInputError, "deadline_s"),
    ],
    ids=str,
)
def test_bad_requests_are_told_at_once(engine, request_, kind, words):
    with pytest.raises(kind, match=words):
        engine.submit(request_)


def test_bad_limits(folder, tokenizer):
    model = talking()
    pool = AdapterPool(model)
    with pytest.raises(BadInputError, match="at least 1"):
        Engine(model, tokenizer, pool, max_rows=0)
    with pytest.raises(BadInputError, match="another model"):
        Engine(talking(), tokenizer, pool)


# ---- ends that come from outside


def test_cancelled_running_and_waiting(folder, tokenizer, alone):
    with engine_over(tokenizer, folder, max_rows=2) as engine:
        long = [ask(engine, "all4", max_tokens=1500, ignore_eos=True) for _ in range(2)]
        next(iter(long[0]))
        waiting = [ask(engine, n) for n in ("one", "mlp2")]
        waiting[0].cancel()
        assert waiting[0].result(10).reason == "cancelled"
        assert waiting[0].result(1).first_token_s is None
        long[0].cancel()
        done = long[0].result(10)
        assert done.reason == "cancelled"
        assert 0 < len(done.tokens) < 1500
        assert waiting[1].result(20).tokens == alone["mlp2", PROMPTS[0]]  # into the freed row
        long[1].cancel()
        assert settle(engine) == (0, 0)


def test_deadlines_running_and_waiting(folder, tokenizer):
    long = {"max_tokens": 1900, "ignore_eos": True}
    with engine_over(tokenizer, folder, max_rows=1) as engine:
        holds = ask(engine, "all4", **long)
        assert ask(engine, "one", deadline_s=0.05).result(10).reason == "deadline"
        holds.cancel()
        assert holds.result(10).reason == "cancelled"  # so it had the row all the while
        running = ask(engine, "all4", deadline_s=0.4, **long)
        assert running.result(10).reason == "deadline"
        assert running.result(1).tokens
        assert ask(engine, "one").result(10).reason in ("length", "stop")


def test_a_full_queue_refuses_and_nobody_is_lost(folder, tokenizer):
    """1,000 requests at once: as many as there is room for are answered, the rest told to come
    again."""
    with engine_over(tokenizer, folder, max_rows=8, max_waiting=40) as engine:
        names, taken, refused = [None, *KINDS], [], []
        gate = threading.Barrier(10)

        def crowd(number):
            gate.wait()
            for i in range(100):
                try:
                    taken.append(ask(engine, names[(number + i) % 5], max_tokens=3))
                except BusyError as e:
                    refused.append(str(e))

        threads = [threading.Thread(target=crowd, args=(n,)) for n in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(taken) + len(refused) == 1000
        assert len(taken) >= 48
        assert len(refused) > 100
        assert all("as many as may" in told for told in refused)
        assert {h.result(60).reason for h in taken} <= {"length", "stop"}
        stats = engine.stats()
        assert (stats["submitted"], stats["refused"]) == (len(taken), len(refused))
        assert settle(engine) == (0, 0)


def test_a_stopped_engine_leaves_nobody_waiting(folder, tokenizer):
    with engine_over(tokenizer, folder, max_rows=1) as engine:
        handles = [ask(engine, "all4", max_tokens=1500, ignore_eos=True) for _ in range(3)]
        next(iter(handles[0]))
        engine.stop()
        assert [h.result(5).reason for h in handles] == ["cancelled"] * 3
        assert engine.stats()["adapters_in_use"] == 0
        engine.start()
        assert ask(engine, "all4").result(10).reason in ("length", "stop")


# ---- fairness


def test_a_crowd_at_one_adapter_does_not_keep_others_out(folder, tokenizer):
    with engine_over(tokenizer, folder, max_rows=2) as engine:
        ended, lock = [], threading.Lock()

        def wait(name, handle):
            handle.result(60)
            with lock:
                ended.append(name)

        asked = [("all4", ask(engine, "all4", ignore_eos=True)) for _ in range(14)]
        asked += [("one", ask(engine, "one", ignore_eos=True)) for _ in range(2)]
        threads = [threading.Thread(target=wait, args=pair) for pair in asked]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        # They came last; two rows, taken in turns: both are among the first dozen.
        assert [i for i, name in enumerate(ended) if name == "one"][-1] < 12


def test_a_long_request_that_finds_no_room_is_not_passed_for_ever(folder, tokenizer, monkeypatch):
    monkeypatch.setattr(engine_module, "PATIENCE_SECONDS", 0.2)
    with engine_over(tokenizer, folder, max_rows=8, max_tokens_total=400) as engine:
        stop, short = threading.Event(), []

        def crowd():
            while not stop.is_set():
                handle = ask(engine, "all4", max_tokens=30, ignore_eos=True)
                handle.result(30)
                short.append(handle)

        threads = [threading.Thread(target=crowd) for _ in range(6)]
        for thread in threads:
            thread.start()
        assert eventually(lambda: engine.stats()["running"] >= 3)
        try:
            long = ask(engine, "one", max_tokens=350, ignore_eos=True)
            assert len(long.result(30).tokens) == 350
        finally:
            stop.set()
            for thread in threads:
                thread.join(30)


# ---- faults


def test_an_adapter_with_nan_ends_its_own_rows_only(folder, tokenizer, alone):
    with engine_over(tokenizer, folder, max_rows=6) as engine:
        engine.pool.load("one")
        page, slot = engine.pool.mixed.slots.at[engine.pool._entries["one"].key]
        for b in page.b.values():
            b[slot] = float("nan")
        for _ in range(2):  # twice: the freed rows' caches are used again
            handles = {n: ask(engine, n) for n in ("all4", "one", "mlp2", None)}
            bad = handles.pop("one").result(20)
            assert (bad.reason, "NaN" in bad.error) == ("error", True)
            for name, handle in handles.items():
                assert handle.result(20).tokens == alone[name, PROMPTS[0]]
        assert settle(engine) == (0, 0)


@pytest.mark.parametrize("stage", ["prefill", "step"])
def test_a_pass_that_raises_is_the_guilty_rows_own(folder, tokenizer, alone, monkeypatch, stage):
    with engine_over(tokenizer, folder, max_rows=6) as engine:
        engine.pool.load("one")
        guilty, plain = engine.pool._entries["one"].key, getattr(engine.decoder, stage)

        def raising(some, keys, *rest):
            if guilty in keys:
                raise RuntimeError("a kernel\nfailed")
            return plain(some, keys, *rest)

        monkeypatch.setattr(engine.decoder, stage, raising)
        names = ["all4", "one", "mlp2", "one", None, "attention8"]
        handles = [(n, ask(engine, n)) for n in names]
        for name, handle in handles:
            done = handle.result(20)
            if name == "one":
                assert done.reason == "error"
                assert "a kernel failed" in done.error
            else:
                assert done.tokens == alone[name, PROMPTS[0]]
        assert settle(engine) == (0, 0)


def test_memory_that_is_short_is_told_too(folder, tokenizer, monkeypatch):
    with engine_over(tokenizer, folder) as engine:

        def full(*_):
            raise MemoryError("no more")

        monkeypatch.setattr(engine.pool.mixed, "put", full)
        assert "MemoryError" in ask(engine, "one").result(10).error
        assert ask(engine, None).result(10).reason in ("length", "stop")


def test_a_slow_read_stalls_nobody_else(folder, tokenizer, alone, monkeypatch):
    go, plain = threading.Event(), pool_module.read_adapter

    def read(path):
        if path.name == "one":
            assert go.wait(20)
        return plain(path)

    monkeypatch.setattr(pool_module, "read_adapter", read)
    with engine_over(tokenizer, folder, max_rows=2) as engine:
        slow = [ask(engine, "one") for _ in range(3)]
        for name in ("all4", "mlp2", None):
            assert ask(engine, name).result(20).tokens == alone[name, PROMPTS[0]]
        assert not any(h.done for h in slow)
        go.set()
        assert all(h.result(20).tokens == alone["one", PROMPTS[0]] for h in slow)


def test_removed_while_waiting_and_while_running(folder, tokenizer):
    with engine_over(tokenizer, folder, max_rows=1) as engine:
        running = ask(engine, "all4", max_tokens=60, ignore_eos=True)
        next(iter(running))
        waiting = ask(engine, "one")
        engine.pool.remove("one")
        engine.pool.remove("all4")
        with pytest.raises(UnknownNameError):
            ask(engine, "all4")
        assert len(running.result(30).tokens) == 60
        assert "Unknown adapter 'one'" in waiting.result(10).error
        assert engine.stats()["adapters_on_device"] == 0


def test_a_fault_of_the_engine_itself_ends_what_is_under_way(folder, tokenizer, monkeypatch):
    with engine_over(tokenizer, folder, max_rows=1) as engine:
        running = ask(engine, "all4", max_tokens=1500, ignore_eos=True)
        next(iter(running))
        waiting = ask(engine, "one")
        monkeypatch.setattr(engine, "_sweep", lambda: 1 / 0)
        assert "ZeroDivisionError" in running.result(10).error
        assert "ZeroDivisionError" in waiting.result(10).error
        monkeypatch.undo()
        assert ask(engine, "one").result(10).reason in ("length", "stop")


def test_more_adapters_than_the_device_holds_take_turns(folder, tokenizer, alone):
    one = AdapterPool(talking(), folder)
    one.load("all4")
    options = {"device_bytes": one.stats()["device_bytes"] + 1, "host_bytes": 0}
    with engine_over(tokenizer, folder, options, max_rows=6) as engine:
        handles = [(n, ask(engine, n)) for n in [*KINDS, None] * 4]
        for name, handle in handles:
            assert handle.result(60).tokens == alone[name, PROMPTS[0]]
        stats = engine.stats()
        assert stats["evictions"] > 0
        assert stats["device_bytes"] <= options["device_bytes"]


def test_seconds_are_in_order(engine):
    started = time.perf_counter()
    done = ask(engine, "all4").result(20)
    assert 0 <= done.waited_s <= done.first_token_s <= done.total_s
    assert done.total_s <= time.perf_counter() - started
