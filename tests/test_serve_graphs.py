"""Recorded passes: what a recording answers for rows and adapters it was not made for.

A CUDA graph is the kernels of a step with their addresses. Where there is no GPU, `tape` stands in
for it and is as blind: it keeps the operations with the very tensors they read and wrote, and runs
them again without any of the Python that led to them.
"""

import pytest
import torch
from serve_models import engine_over, llama, make_adapter, talking
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kit.lora import read_adapter
from lora_kit.serve.decoder import Decoder
from lora_kit.serve.graphs import StepGraphs, padded, side_by_side
from lora_kit.serve.mixed import MixedLora

KINDS = {"a": (4, "all"), "b": (4, "all"), "c": (2, "q_proj"), "d": (4, "all")}


class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.ran.append((function, args, kwargs or {}, out))
        return out

    def again(self):
        for function, args, kwargs, out in self.ran:
            fresh = function(*args, **kwargs)
            for old, new in zip(_tensors(out), _tensors(fresh), strict=True):
                old.copy_(new)


def _tensors(out):
    return [t for t in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(t)]


def tape(work):
    """As `CudaRecorder`: records work; what is returned runs it again."""
    kept = Tape()
    with kept:
        work()
    return kept.again


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: make_adapter(root / name, rank, targets, seed)
        for seed, (name, (rank, targets)) in enumerate(KINDS.items())
    }


def decoder_over(folders, names, graphs):
    model = llama()
    mixed = MixedLora(model, masked=True, joined=True)
    for name in names:
        mixed.put(name, mixed.factors(read_adapter(folders[name])))
    decoder = Decoder(model, mixed, graphs=False)
    if graphs:
        decoder.graphs = StepGraphs(decoder, record=tape)
    return decoder


class Pair:
    """A decoder that records and one that does not, told the same."""

    def __init__(self, folders, names):
        self.both = [decoder_over(folders, names, graphs) for graphs in (True, False)]
        self.graphs, self.keys, self.drawn = self.both[0].graphs, [], 0

    def add(self, *keys, tokens=5):
        for key in keys:
            prompt = torch.randint(60, (tokens,), generator=self._generator()).tolist()
            logits = []
            for decoder in self.both:
                logits.append(decoder.prefill([prompt], [key]))
            torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
            self.keys.append(key)

    def drop(self, row):
        for decoder in self.both:
            decoder.cache.drop(row)
        self.keys[row] = self.keys[-1]
        self.keys.pop()

    def step(self, count=1):
        for _ in range(count):
            tokens = torch.randint(60, (len(self.keys),), generator=self._generator()).tolist()
            ours, plain = (decoder.step(tokens, self.keys) for decoder in self.both)
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)

    def shapes(self, kind):
        return list(dict.fromkeys(key[1:3] for key in self.graphs.recorded if key[0] == kind))

    def _generator(self):
        self.drawn += 1
        return torch.Generator().manual_seed(self.drawn)


def test_recorded_steps_answer_as_plain_ones_while_rows_come_and_go(folders):
    pair = Pair(folders, "abc")
    pair.add("a", None, "b")
    pair.step(3)
    assert pair.shapes("step") == [(4, 64)]
    pair.keys[:] = ["b", "a", None]  # another mix of the same page: the same graph
    pair.step(3)
    assert pair.shapes("step") == [(4, 64)]
    pair.add("c", "a", tokens=9)  # eight rows wide, two pages
    pair.step(3)
    pair.drop(0)
    pair.drop(1)
    pair.step(3)
    pair.add(None, tokens=3)  # into the place of one that went
    pair.step(3)
    assert {rows for rows, _ in pair.shapes("step")} == {4, 8}


def test_a_step_that_looks_further_back_is_another_shape(folders):
    pair = Pair(folders, "a")
    pair.add("a", None, tokens=60)
    pair.step(8)
    assert pair.shapes("step") == [(2, 128)]  # the buffers moved: 64 is forgotten
    pair.add("a", tokens=200)
    pair.step(3)
    pair.drop(2)
    pair.step(3)
    assert {reach for _, reach in pair.shapes("step")} >= {128, 256}


def test_prompts_are_recorded_too(folders):
    """One graph reads prompts of any length up to its width into any rows, with any adapters."""
    pair = Pair(folders, "ab")
    pair.add("a", None, tokens=7)
    pair.add("b", tokens=64)
    pair.add("a", "b", None, tokens=20)
    assert pair.shapes("prefill") == [(1, 64)]
    pair.step(3)
    pair.drop(1)
    pair.add("b", tokens=2)
    pair.add(None, "a", tokens=63)
    pair.step(3)
    assert len(pair.graphs.recorded) == 3  # prompts with and without adapters, steps of eight


def test_prompts_together_are_as_alone(folders):
    pair = Pair(folders, "ab")
    for prompts in ([[1, 2, 3], [4, 5]], [[6], [7, 8, 9, 10]], [[11, 12, 13], [14]]):
        keys = ["b", None]
        logits = [decoder.prefill(prompts, keys) for decoder in pair.both]
        torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
        pair.keys += keys
    assert pair.shapes("prefill") == [(2, 64)]
    pair.step(3)


def test_numbers_of_prompts_share_a_graph(folders):
    """What fills them up is the last prompt again: nobody is disturbed, no row is taken."""
    pair = Pair(folders, "ab")
    pair.add(None, "b", tokens=9)
    for count in (5, 6, 5):
        prompts = [list(range(1 + i, 4 + i + i % 2)) for i in range(count)]
        keys = [("a", "b", None)[i % 3] for i in range(count)]
        logits = [decoder.prefill(prompts, keys) for decoder in pair.both]
        torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
        pair.keys += keys
        assert all(len(decoder.cache) == len(pair.keys) for decoder in pair.both)
        pair.step(2)
        while len(pair.keys) > 2:
            pair.drop(2)
    assert pair.shapes("prefill") == [(6, 64)]
    assert {side_by_side(n) for n in range(1, 33)} == {1, 2, 3, 4, 6, 8, 12, 16, 24, 32}
    assert all(n <= side_by_side(n) < 1.5 * n for n in range(1, 100))


def test_more_rows_than_expected_are_made_room_for(folders):
    pair = Pair(folders, "ab")
    pair.add("a", "b")
    pair.step(3)
    pair.add(None, "a", "b")
    pair.step(3)
    for _ in range(3):
        pair.drop(0)
    pair.step(3)
    assert {rows for rows, _ in pair.shapes("step")} == {2, 8}


def test_widths_of_prompts():
    assert [padded(n) for n in (1, 64, 65, 512, 513, 1024, 1025)] == [
        64, 64, 128, 512, 1024, 1024, 2048,
    ]  # fmt: skip


def test_a_slot_used_again_answers_with_what_lies_there_now(folders):
    pair = Pair(folders, "ab")
    pair.add("a", "b")
    pair.step(3)
    graphs = list(pair.graphs.recorded.values())
    for decoder in pair.both:
        decoder.mixed.drop("b")
        decoder.mixed.put("d", decoder.mixed.factors(read_adapter(folders["d"])))
    pair.keys[1] = "d"
    pair.step(2)
    assert list(pair.graphs.recorded.values()) == graphs


def test_rows_that_only_fill_up_leave_no_trace(folders):
    """Their places in the cache are written to, and taken by the next rows that come."""
    pair = Pair(folders, "a")
    pair.add("a", None, "a")
    pair.step(3)
    pair.add("a", tokens=1)
    pair.step(3)


def test_some_rows_and_new_shapes_are_run_as_they_are(folders):
    decoder = decoder_over(folders, "a", graphs=True)
    decoder.prefill([[1, 2], [3, 4]], ["a", None])
    decoder.step([5, 6], ["a", None])
    decoder.step([7], ["a"], rows=[0])
    assert not decoder.graphs.recorded
    decoder.step([5, 6], ["a", None])
    assert len(decoder.graphs.recorded) == 1


def test_what_cannot_be_recorded_goes_on_without(folders):
    def out_of_memory(work):
        raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB\nand more")

    plain, decoder = (decoder_over(folders, "a", graphs=False) for _ in range(2))
    decoder.graphs = StepGraphs(decoder, record=out_of_memory)
    for side in (plain, decoder):
        side.prefill([[1, 2, 3]], ["a"])

    def same(token):
        told = [side.step([token], ["a"]) for side in (plain, decoder)]
        torch.testing.assert_close(*told, rtol=1e-5, atol=1e-5)

    same(4)
    with pytest.warns(UserWarning, match="goes on without: CUDA out of memory. Tried"):
        same(5)
    same(6)
    assert decoder.graphs.broken
    assert decoder.cache.idle_bytes == 0  # an idle engine holds no memory again


def test_where_memory_is_short_for_a_while_recording_is_tried_again(folders):
    failing = [True] * 2

    def record(work):
        if failing:
            failing.pop()
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return tape(work)

    pair = Pair(folders, "ab")
    pair.graphs.record = record
    pair.add("a", "b")
    pair.step(20)
    assert not pair.graphs.broken
    assert pair.shapes("step") == [(2, 64)]


def test_buffers_that_grew_in_part_are_not_taken_for_grown_ones(folders):
    """As after a prompt that found no memory half way: a recorded pass must not grow the rest."""
    pair = Pair(folders, "a")
    pair.add("a", None)
    pair.step(3)
    cache = pair.both[0].cache
    cache.keys[0] = cache._room(cache.keys[0], cache.keys[0], 4, 128)
    sizes = []

    def record(work):
        sizes.extend(t.shape[2] for t in (*cache.keys, *cache.values))
        return tape(work)

    pair.graphs.record = record
    pair.add("a", "a", tokens=70)
    pair.step(3)
    assert set(sizes) == {128}


def test_an_idle_decoder_keeps_what_its_recordings_write_to(folders):
    """Up to a quarter of the device's memory: a load after a pause finds its graphs."""
    pair = Pair(folders, "a")
    cache, made = pair.both[0].cache, []
    record = pair.graphs.record
    pair.graphs.record = lambda work: made.append(1) or record(work)

    def load():
        pair.add("a", None, "a", tokens=40)
        pair.step(3)
        for _ in range(3):
            pair.drop(0)

    load()
    load()  # prompts of one row are met a second time
    before = len(made)
    assert before > 0
    assert cache.bytes > 0
    load()
    assert len(made) == before
    cache.idle_bytes = cache.bytes - 1
    load()
    assert cache.bytes == 0
    load()
    assert len(made) > before
    assert pair.both[1].cache.bytes == 0  # nothing is recorded there


def test_closed_adapters_leave_no_recording(folders):
    """Their layers' weights lie elsewhere now."""
    pair = Pair(folders, "a")
    pair.add(None, None)
    pair.step(3)
    assert pair.graphs.recorded
    for decoder in pair.both:
        decoder.mixed.close()
        with torch.no_grad():
            decoder.model.model.layers[0].mlp.up_proj.weight.mul_(2)
    pair.step(3)


def test_graphs_where_there_can_be_none_are_refused(folders):
    from lora_kit.errors import BadInputError

    with pytest.raises(BadInputError, match="cannot be recorded"):
        Decoder(llama(), MixedLora(llama(), masked=True, joined=True), graphs=True)


def test_an_engine_that_records_says_the_same(tokenizer):
    from lora_kit.serve.handle import Request

    def answers(graphs):
        with engine_over(tokenizer, model=talking(), max_rows=3, graphs=False) as engine:
            if graphs:
                engine.decoder.graphs = StepGraphs(engine.decoder, record=tape)
            handles = [
                engine.submit(Request(f"sort {n}=", max_tokens=6 + n, ignore_eos=True))
                for n in range(7)
            ]
            found = [handle.result().tokens for handle in handles]
            return found, engine.decoder.graphs

    ours, graphs = answers(True)
    assert ours == answers(False)[0]
    assert graphs.recorded
