"""The decoder: rows that come and go, each with the logits it would have alone."""

import pytest
import torch
from serve_models import adapters_of_kinds, llama, make_adapter, talking

from lora_kit.lora import read_adapter
from lora_kit.serve.decoder import Decoder
from lora_kit.serve.mixed import MixedLora
from lora_kit.serve.pool import AdapterPool
from lora_kit.serve.runs import cheapest_runs


def test_the_logits_of_a_row_do_not_depend_on_its_neighbours(tmp_path):
    """Why greedy answers are the same: neighbours move a logit by rounding alone (1e-5 of the
    largest), so only a tie closer than that can fall the other way."""
    model = talking()
    pool = AdapterPool(model, adapters_of_kinds(tmp_path))
    decoder = Decoder(model, pool.mixed)
    prompt, names = [5, 9, 200, 31], ["all4", "one", None, "attention8", "mlp2"]
    keys = [n and pool.acquire(n, wait=True) for n in names]
    single = {}
    for key in set(keys):
        steps = [decoder.prefill([prompt], [key])]
        steps += [decoder.step([token], [key]) for token in (7, 8, 9)]
        decoder.cache.drop(0)
        single[key] = torch.cat(steps)
    others = [[3] * n for n in (2, 9, 1, 30)]
    for key in keys:
        steps = [decoder.prefill([*others[:2], prompt], [keys[0], keys[1], key])[2]]
        steps.append(decoder.step([1, 2, 7], [keys[0], keys[1], key])[2])
        decoder.prefill(others[2:], [keys[3], keys[4]])
        steps.append(decoder.step([1, 2, 8, 3, 4], [keys[0], keys[1], key, keys[3], keys[4]])[2])
        decoder.cache.drop(0)  # the last row takes its place
        steps.append(decoder.step([4, 2, 9, 3], [keys[4], keys[1], key, keys[3]])[2])
        for _ in range(4):
            decoder.cache.drop(0)
        difference = (torch.stack(steps) - single[key]).abs().max() / single[key].abs().max()
        assert difference < 1e-5


@pytest.mark.parametrize("way", ["sdpa", "eager"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_of_every_kind_of_heads(way, groups):
    """Grouped, multi-query and plain heads, torch's attention and the eager one: a step's logits
    are the whole sequence's last ones, and transformers' own calls are answered as before."""
    options = {"num_key_value_heads": groups, "attn_implementation": way}
    model, prompts = llama(**options), [[1, 2, 3, 4], [9, 8], [5, 6, 7]]
    with torch.inference_mode():
        whole = [model(torch.tensor([[*p, 11, 12]])).logits[0, -1] for p in prompts]
        decoder = Decoder(model, AdapterPool(model).mixed)
        decoder.prefill(prompts, [None] * 3)
        for token in (11, 12):
            logits = decoder.step([token] * 3, [None] * 3)
        again = [model(torch.tensor([[*p, 11, 12]])).logits[0, -1] for p in prompts]
    for row, expected, later in zip(logits, whole, again, strict=True):
        assert (row - expected).abs().max() < 1e-5 * expected.abs().max()
        assert torch.equal(expected, later)


LENGTHS = [3, 60, 4, 58, 2]


def test_prompts_of_about_one_length_are_read_together(tmp_path, monkeypatch):
    """A short prompt is not padded up to a long one; rows stand in the order they came in."""
    adapter = make_adapter(tmp_path / "a", 4, "all", 1)
    prompts = [[(7 * i + j) % 60 for j in range(n)] for i, n in enumerate(LENGTHS)]
    keys = ["a", None, None, "a", "a"]
    read, shapes = Decoder.read, []
    monkeypatch.setattr(
        Decoder, "read", lambda self, ids, last: shapes.append(ids.shape) or read(self, ids, last)
    )

    def decoder():
        model = llama()
        mixed = MixedLora(model)
        mixed.put("a", mixed.factors(read_adapter(adapter)))
        return Decoder(model, mixed)

    together, alone = decoder(), [decoder() for _ in prompts]
    logits = [together.prefill(prompts, keys)]
    assert shapes == [(3, 4), (2, 60)]
    logits += [together.step([9] * 5, keys) for _ in range(2)]
    for row, (prompt, key, one) in enumerate(zip(prompts, keys, alone, strict=True)):
        expected = [one.prefill([prompt], [key])] + [one.step([9], [key]) for _ in range(2)]
        for ours, theirs in zip(logits, expected, strict=True):
            torch.testing.assert_close(ours[row], theirs[0], atol=1e-5, rtol=1e-5)
    assert together.cache.lengths == [n + 2 for n in LENGTHS]


def test_a_pass_that_fails_after_another_leaves_no_row(monkeypatch):
    model = llama()
    decoder, read = Decoder(model, MixedLora(model)), Decoder.read

    def fails(self, ids, last):
        if ids.shape[1] > 50:
            raise RuntimeError("no")
        return read(self, ids, last)

    decoder.prefill([[1, 2]], [None])
    monkeypatch.setattr(Decoder, "read", fails)
    with pytest.raises(RuntimeError):
        decoder.prefill([[1] * n for n in LENGTHS], [None] * 5)
    assert decoder.cache.lengths == [2]


def test_runs_cost_least():
    assert cheapest_runs(0, None) == []
    assert cheapest_runs(1, lambda first, last: 1) == [(0, 1)]
    assert cheapest_runs(3, lambda first, last: 5) == [(0, 3)]
    assert cheapest_runs(3, lambda first, last: (last - first) ** 2) == [(0, 1), (1, 2), (2, 3)]
    assert cheapest_runs(4, lambda first, last: float("inf") if last - first > 3 else 1)[-1][1] == 4
