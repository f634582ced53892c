"""The router: plain arithmetic on known states, honest choices, files, and another base."""

import pytest
import torch
from lora_fixtures import tiny_llama

from lora_kit.errors import BadInputError, CorruptFileError, NotAvailableError
from lora_kit.fingerprint import fingerprint_model
from lora_kit.serve.router import Router, confusion, fit_router, load_router, save_router
from lora_kit.skills import draw_skill

KINDS = ("reversal", "spelling", "case")
OTHERS = ["Why does bread rise?", "How are pearls formed?", "Why do cats purr?", "Is ice cold?"]


def prompts(seed):
    return {n: [r["prompt"] for r in draw_skill(n, 3, 8, seed)] for n in KINDS}


def sets():
    fit, held, new = prompts(0), prompts(1), prompts(2)
    held = {n: [p for p in ps if p not in fit[n]] for n, ps in held.items()}
    new = {n: [p for p in ps if p not in fit[n] + held[n]] for n, ps in new.items()}
    return fit, held, new


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    from lora_kit.models import load_model

    return load_model(str(tiny_folder), "float32")


@pytest.fixture(scope="module")
def router(loaded):
    fit, held, _ = sets()
    return fit_router(loaded.model, loaded.tokenizer, fit, held, OTHERS[:2], layers=[1, 2])


def by_hand(loaded, threshold, centroids):
    """Two adapters in the plane."""
    return Router(
        ("east", "north"),
        torch.tensor(centroids),
        torch.arange(len(centroids)) % 2,
        torch.tensor([1.0, 1.0]),
        *(1, "mean", threshold),
        fingerprint_model(loaded.model),
    )


def test_the_nearest_centroid_wins_and_the_unsure_go_to_the_base(loaded):
    router = by_hand(loaded, 0.9, [[1.0, 0.0], [0.0, 1.0]])
    states = torch.tensor([[3.0, 1.0], [1.0, 9.0], [2.0, 2.0], [-4.0, 1.0]])
    routes = router.decide(states)
    assert [r.adapter for r in routes] == ["east", "north", None, None]
    assert [r.nearest for r in routes[:2]] == ["east", "north"]
    assert [round(r.similarity, 4) for r in routes] == [1.0, 1.0, 0.7071, 0.0]


def test_an_adapter_may_have_several_centroids(loaded):
    router = by_hand(loaded, 0.9, [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    routes = router.decide(torch.tensor([[3.0, 1.0], [-4.0, 1.0], [1.0, 5.0], [1.0, -5.0]]))
    assert [r.adapter for r in routes] == ["east", "east", "north", None]


def test_kinds_are_told_apart_even_by_a_random_model(loaded, router):
    _, _, new = sets()
    table = confusion(router, loaded.model, loaded.tokenizer, new)
    asked = sum(len(p) for p in new.values())
    right = sum(row[row["prompts of"]] for row in table)
    assert right >= 0.9 * asked
    assert [sum(v for k, v in row.items() if k != "prompts of") for row in table] == [
        len(p) for p in new.values()
    ]
    assert set(table[0]) == {"prompts of", *KINDS, "base"}


def test_choices_are_sorted_and_the_best_was_taken(router):
    scores = [c.score for c in router.choices]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == 4  # two layers, two poolings
    best = router.choices[0]
    assert (best.layer, best.pooling, best.threshold) == (
        router.layer,
        router.pooling,
        router.threshold,
    )
    assert best.score == (best.right + best.refused) / 2


def test_the_threshold_without_other_prompts_keeps_the_share_asked_for(loaded):
    fit, held, _ = sets()
    shares = []
    for keep in (0.5, 1.0):
        router = fit_router(
            loaded.model, loaded.tokenizer, fit, held, layers=[1], poolings=["last"], keep=keep
        )
        routes = [
            r.adapter for n in KINDS for r in router.route(loaded.model, loaded.tokenizer, held[n])
        ]
        shares.append(sum(r is not None for r in routes) / len(routes))
        assert router.choices[0].refused is None
    assert shares[1] == 1.0
    assert abs(shares[0] - 0.5) < 0.1


def test_fitting_twice_gives_the_same(loaded, router):
    fit, held, _ = sets()
    again = fit_router(loaded.model, loaded.tokenizer, fit, held, OTHERS[:2], layers=[1, 2])
    assert torch.equal(again.centroids, router.centroids)
    assert again.choices == router.choices


def test_saved_and_loaded_it_decides_alike(loaded, router, tmp_path):
    _, _, new = sets()
    save_router(router, tmp_path / "r")
    again = load_router(tmp_path / "r", loaded.model)
    asked = [*new["case"], *OTHERS]
    routes = [x.route(loaded.model, loaded.tokenizer, asked) for x in (router, again)]
    assert routes[0] == routes[1]
    assert again.choices == router.choices
    with pytest.raises(BadInputError, match="made with another base"):
        load_router(tmp_path / "r", tiny_llama(3, vocab_size=300, initializer_range=0.3))


def test_files_that_are_no_router(router, tmp_path):
    with pytest.raises(NotAvailableError, match="holds no router"):
        load_router(tmp_path)
    folder = save_router(router, tmp_path / "r")
    weights, facts = folder / "router.safetensors", folder / "router.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    with pytest.raises(CorruptFileError, match="fit it again"):
        load_router(folder)
    weights.write_bytes(whole)
    text = facts.read_text()
    facts.write_text(text.replace('"names"', '"nams"'))
    with pytest.raises(CorruptFileError, match="fit it again"):
        load_router(folder)
    facts.write_text(text.replace('"reversal",', ""))
    with pytest.raises(CorruptFileError, match="parts do not fit"):
        load_router(folder)
    facts.write_text("{")
    with pytest.raises(CorruptFileError, match="not a JSON file"):
        load_router(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": {"a": ["x"]}}, "at least two adapters"),
        ({"held_out": {"a": ["x"], "c": ["y"]}}, "must name the same adapters; b differs"),
        ({"held_out": {"a": ["q"], "b": []}}, "b has no prompts, or none held out"),
        ({"held_out": {"a": ["x"], "b": ["z"]}}, "'x' of a is held out and fitted on"),
        ({"keep": 0}, r"keep must lie in \(0, 1\]"),
        ({"groups": 0}, "groups must be at least 1"),
        ({"layers": [3]}, "layers must lie in 1 to 2"),
        ({"poolings": ["max"]}, "poolings be of mean, last"),
    ],
)
def test_bad_input(loaded, change, message):
    given = {"prompts": {"a": ["x"], "b": ["y"]}, "held_out": {"a": ["q"], "b": ["z"]}} | change
    with pytest.raises(BadInputError, match=message):
        fit_router(loaded.model, loaded.tokenizer, **given)


def test_the_bases_name_is_taken(loaded):
    with pytest.raises(BadInputError, match="'base' stands for no adapter"):
        fit_router(
            *(loaded.model, loaded.tokenizer),
            {"base": ["x"], "b": ["y"]},
            {"base": ["q"], "b": ["z"]},
        )
