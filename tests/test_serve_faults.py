"""What a failing device or row does to the requests of an engine: each is told, none waits."""

import pytest
from serve_models import engine_over, make_adapter, talking

from lora_kit.serve.handle import Request

WAIT = 30


def ended(handles):
    return [handle.result(timeout=WAIT) for handle in handles]


@pytest.mark.parametrize("count", [1, 3])
def test_a_cache_that_cannot_be_cleared_keeps_nobody_waiting(tokenizer, count, monkeypatch):
    with engine_over(tokenizer, max_rows=4) as engine:
        cache, step = engine.decoder.cache, engine.decoder.step

        class Held(list):
            """Buffers that a device will not write to any more."""

            def __iter__(self):
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

        def fail(*told, **how):
            cache.keys = Held(cache.keys)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(engine.decoder, "step", fail)
        found = ended([engine.submit(Request(f"a{i}", max_tokens=5)) for i in range(count)])
        assert {done.reason for done in found} == {"error"}
        monkeypatch.setattr(engine.decoder, "step", step)
        cache.keys = [None] * len(cache.keys)
        cache.values = [None] * len(cache.values)
        assert not cache.lengths
        (after,) = ended([engine.submit(Request("b", max_tokens=3, ignore_eos=True))])
        assert after.reason == "length"


def test_a_first_half_that_fails_after_its_prompts_does_not_lose_the_second(tokenizer, monkeypatch):
    with engine_over(tokenizer, max_rows=4) as engine:
        prefill, advance, calls = engine.decoder.prefill, engine._advance, []

        def whole_fails(prompts, keys):
            if len(prompts) > 1:
                raise RuntimeError("out of memory")
            return prefill(prompts, keys)

        def first_fails(rows, logits):
            calls.append(len(rows))
            if len(calls) == 1:
                raise RuntimeError("CUDA error")
            return advance(rows, logits)

        monkeypatch.setattr(engine.decoder, "prefill", whole_fails)
        monkeypatch.setattr(engine, "_advance", first_fails)
        with engine._wake:  # both are let in together
            handles = [engine.submit(Request(f"a{i}", max_tokens=4)) for i in range(2)]
        found = ended(handles)
        assert len(found) == 2
        assert "error" in {done.reason for done in found}
        assert not engine.stats()["running"]


def test_an_adapter_that_cannot_be_read_is_told_to_those_who_want_it(tokenizer, tmp_path):
    make_adapter(tmp_path / "good", 2, "attention", 1, model=talking)
    bad = make_adapter(tmp_path / "bad", 2, "attention", 2, model=talking)
    (bad / "adapter_model.safetensors").write_bytes(b"nothing")
    with engine_over(tokenizer, tmp_path) as engine:
        ends = ended([engine.submit(Request("x", adapter=n)) for n in ("bad", "good", "bad")])
        assert [e.reason == "error" for e in ends] == [True, False, True]
        assert "adapter_model.safetensors" in ends[0].error
        assert engine.stats()["adapters_in_use"] == 0
