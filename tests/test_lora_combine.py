"""Combining: sums that can be checked by hand, the base untouched, and what is refused."""

import pytest
import torch
from lora_fixtures import close, ids, tiny_llama

from lora_kit.errors import BadInputError
from lora_kit.lora import LoraSpec, add_lora, load_lora, lora_layers, read_adapter, save_lora
from lora_kit.lora_combine import METHODS, combine_adapters, delta_weights


def adapter(folder, seed, rank=4, targets="attention", base=0, **options):
    model = add_lora(tiny_llama(base), LoraSpec(rank, 8, targets, **options), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        with torch.no_grad():
            layer.lora_B["default"].normal_(std=0.1, generator=generator)
    return save_lora(model, folder)


@pytest.fixture
def pair(tmp_path):
    return {"one": adapter(tmp_path / "one", 1), "two": adapter(tmp_path / "two", 2)}


def deltas(folder):
    return delta_weights(read_adapter(folder))


@pytest.mark.parametrize("weights", [None, [0.5, 2.0]])
def test_cat_is_the_exact_sum(pair, tmp_path, weights):
    one, two = (deltas(f) for f in pair.values())
    made = deltas(combine_adapters(tiny_llama(), pair, tmp_path / "c", "cat", weights))
    w = weights or [1, 1]
    assert set(made) == set(one)
    for path in one:
        close(made[path], w[0] * one[path] + w[1] * two[path])


def test_svd_is_the_best_of_its_rank(pair, tmp_path):
    one, two = (deltas(f) for f in pair.values())
    made = deltas(combine_adapters(tiny_llama(), pair, tmp_path / "c", "svd", rank=5))
    whole = deltas(combine_adapters(tiny_llama(), pair, tmp_path / "d", "svd", rank=8))
    for path in one:
        both = one[path] + two[path]
        close(whole[path], both, 1e-5)
        u, s, vh = torch.linalg.svd(both, full_matrices=False)
        close(made[path], (u[:, :5] * s[:5]) @ vh[:5], 1e-5)


def test_linear_adds_the_factors_and_so_has_strangers_products(pair, tmp_path):
    files = [read_adapter(f) for f in pair.values()]
    made = deltas(combine_adapters(tiny_llama(), pair, tmp_path / "c", "linear"))
    root = 2**0.5  # of alpha / rank
    for path in files[0].tensors:
        a, b = (sum(root * f.tensors[path][k] for f in files) for k in ("lora_A", "lora_B"))
        close(made[path], b @ a, 1e-5)
        assert (made[path] - sum(delta_weights(f)[path] for f in files)).norm() > 0.1


@pytest.mark.parametrize("method", ["ties", "dare", "dare-ties", "ties-svd", "dare-svd"])
def test_thinning_methods_keep_part_of_the_entries(pair, tmp_path, method):
    model = tiny_llama()
    thin, same = (
        combine_adapters(model, pair, tmp_path / name, method, density=0.25, seed=3)
        for name in ("c", "d")
    )
    full = deltas(combine_adapters(model, pair, tmp_path / "e", method, density=1.0))
    for path, delta in deltas(thin).items():
        assert torch.equal(delta, deltas(same)[path])  # the same seed, the same result
        assert 0 < delta.norm() < 16 * full[path].norm()  # dare divides both factors by 0.25
        assert not torch.allclose(delta, full[path], atol=1e-3)
    if "svd" not in method:
        zeros = torch.cat([p["lora_A"].flatten() for p in read_adapter(thin).tensors.values()])
        assert 0.4 < (zeros == 0).float().mean() < 0.8  # each keeps a quarter, the sum up to half


def test_dare_at_full_density_is_linear(pair, tmp_path):
    model = tiny_llama()
    dare = deltas(combine_adapters(model, pair, tmp_path / "c", "dare", density=1.0))
    linear = deltas(combine_adapters(model, pair, tmp_path / "d", "linear"))
    for path in dare:
        close(dare[path], linear[path])


def test_the_base_comes_back_and_the_result_loads(pair, tmp_path):
    model = tiny_llama()
    before, state = model(ids()).logits, {n: p.clone() for n, p in model.named_parameters()}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    made = combine_adapters(model, pair, tmp_path / "c", "dare")
    assert torch.equal(torch.rand(1), expected)  # the caller's generator is left as it was
    assert torch.equal(model(ids()).logits, before)
    assert {n for n, _ in model.named_parameters()} == set(state)
    assert {p.name for p in made.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    load_lora(model, made)  # the fingerprint is the base's
    assert not torch.allclose(model(ids()).logits, before)
    other = tiny_llama(7)
    with pytest.raises(BadInputError, match="another base"):
        load_lora(other, made)


def test_ranks_and_placements_may_differ_for_svd(tmp_path):
    mixed = {
        "one": adapter(tmp_path / "one", 1, rank=4),
        "two": adapter(tmp_path / "two", 2, rank=8, targets=["q_proj", "v_proj"]),
    }
    made = deltas(combine_adapters(tiny_llama(), mixed, tmp_path / "c", "svd", rank=12))
    one, two = (deltas(f) for f in mixed.values())
    for path, delta in made.items():
        close(delta, one[path] + two.get(path, torch.zeros(())), 1e-5)
    with pytest.raises(BadInputError, match=r"equal ranks \(one 4, two 8\): use svd"):
        combine_adapters(tiny_llama(), mixed, tmp_path / "d", "ties")
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "sum"}, "method must be one of cat, svd"),
        ({"weights": [1]}, "1 weights for 2 adapters"),
        ({"weights": [1, -1]}, "must be above 0"),
        ({"weights": [1, float("nan")]}, "must be above 0"),
        ({"density": 0}, r"density must lie in \(0, 1\]"),
        ({"rank": 3, "method": "ties"}, "rank is for the methods with svd"),
        ({"rank": 0}, "rank is for the methods with svd, and must be at least 1"),
    ],
)
def test_bad_values(pair, tmp_path, change, message):
    with pytest.raises(BadInputError, match=message):
        combine_adapters(tiny_llama(), pair, tmp_path / "c", **change)
    assert not (tmp_path / "c").exists()


def test_what_cannot_be_combined(pair, tmp_path):
    with pytest.raises(BadInputError, match="at least two"):
        combine_adapters(tiny_llama(), {"one": pair["one"]}, tmp_path / "c")
    with pytest.raises(BadInputError, match="one was trained on another base"):
        combine_adapters(tiny_llama(3), pair, tmp_path / "c")
    with pytest.raises(BadInputError, match="carries adapters already"):
        combine_adapters(add_lora(tiny_llama(), LoraSpec(2, 2), seed=0), pair, tmp_path / "c")
    odd = {**pair, "odd": adapter(tmp_path / "odd", 3, rslora=True)}
    with pytest.raises(BadInputError, match="odd has use_rslora"):
        combine_adapters(tiny_llama(), odd, tmp_path / "c")
    assert set(METHODS) >= {"linear", "svd", "ties", "dare"}
