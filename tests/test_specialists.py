"""The specialists study: scaling rules, exactly; cells, grids and plans; a tiny run of each."""

import math
from pathlib import Path

import pytest
import torch
import yaml
from lora_fixtures import ids, tiny_llama

from lora_kit.architectures import architecture
from lora_kit.errors import BadInputError, NotAvailableError, UnknownNameError
from lora_kit.lora import LoraSpec, add_lora, count_parameters, lora_layers
from lora_kit.studies.specialists import (
    ANCHOR,
    SCALINGS,
    adapter_bytes,
    blocks,
    cell_from,
    largest_rank,
    matched_rank,
    module_parameters,
    paper_cells,
    scale_of,
    size_table,
)
from lora_kit.studies.specialists_cells import DEFAULTS, check_setting, run_cell, spec_of
from lora_kit.studies.specialists_plan import grid_text, plan_cell, why_not

SHAPE = architecture("smollm2-135m")
torch.set_num_threads(1)


# ------------------------------------------------------------------ the rules, exactly


def test_rules_meet_at_the_anchor():
    assert {scale_of(ANCHOR, rule) for rule in SCALINGS} == {1.0}
    assert [scale_of(128, rule) for rule in SCALINGS] == pytest.approx([1 / 8, 1, 1 / math.sqrt(8)])
    for rule in SCALINGS:  # the engine divides alpha by the rank
        spec = spec_of(cell_from({"rank": 64, "scaling": rule}, 0))
        layer = LoraSpec(64, spec.alpha)
        assert layer.scale == pytest.approx(scale_of(64, rule))
    assert LoraSpec(64, 4.0, rslora=True).scale == pytest.approx(scale_of(64, "stabilised"))
    with pytest.raises(UnknownNameError, match="constant"):
        scale_of(8, "constnat")


def repeated(rank: int, times: int, rule: str, optimizer: str, steps: int):
    """A tiny Llama's update after some steps, with every direction of the adapter `times` over.

    An adapter of rank r·t whose A repeats r rows has the room of rank r and the scale of rank r·t:
    what the scale does is seen apart from what the room does.
    """
    model = tiny_llama().double()
    whole = rank * times
    # The rule as if the anchor were `rank`: all rules have s = 1 there.
    scale = scale_of(16 * times, rule)
    add_lora(model, LoraSpec(whole, scale * whole), seed=0, dtype=torch.float64)
    plain = tiny_llama().double()
    add_lora(plain, LoraSpec(rank, rank), seed=0, dtype=torch.float64)
    source = lora_layers(plain)
    with torch.no_grad():
        for path, layer in lora_layers(model).items():
            layer.lora_A["default"].copy_(source[path].lora_A["default"].repeat(times, 1))
    parameters = [p for p in model.parameters() if p.requires_grad]
    made = {
        "sgd": lambda: torch.optim.SGD(parameters, lr=1e-3),
        "adam": lambda: torch.optim.AdamW(parameters, lr=1e-3, eps=1e-30, weight_decay=0),
    }[optimizer]()
    for step in range(steps):
        made.zero_grad()
        batch = ids(seed=step)
        model(batch, labels=batch).loss.backward()
        made.step()
    return {
        path: layer.specs["default"].scale * layer.lora_B["default"] @ layer.lora_A["default"]
        for path, layer in lora_layers(model).items()
    }


@pytest.mark.parametrize(
    ("optimizer", "rule", "factor"),
    [
        ("sgd", "fixed", 1 / 4),
        ("sgd", "constant", 4.0),
        ("sgd", "stabilised", 1.0),
        ("adam", "fixed", 1.0),
        ("adam", "constant", 4.0),
        ("adam", "stabilised", 2.0),
    ],
)
def test_first_step_by_rule_and_optimizer(optimizer, rule, factor):
    """ΔW of the first step, four times the rank in repeated directions: SGD s²·r, Adam s·r."""
    one, four = (repeated(4, times, rule, optimizer, 1) for times in (1, 4))
    for path, update in one.items():
        torch.testing.assert_close(four[path], factor * update, rtol=1e-6, atol=1e-14)


def test_at_fixed_alpha_adam_walks_the_same_way_whatever_the_rank():
    """Not the first step alone: repeated directions at α/r are one adapter, step after step."""
    one, two = (repeated(4, times, "fixed", "adam", 4) for times in (1, 2))
    for path, update in one.items():
        torch.testing.assert_close(two[path], update, rtol=1e-5, atol=1e-12)
    other = repeated(4, 2, "constant", "adam", 4)
    assert not torch.allclose(other[path], update, rtol=1e-2)


# ------------------------------------------------------------------ sizes


def test_sizes_are_those_of_real_adapters():
    from lora_kit.architectures import Architecture

    model = tiny_llama()
    shape = Architecture.from_config(model.config)
    for placement in ("attention", "mlp", "all"):
        add_lora(model, LoraSpec(3, 3, placement), placement)
        trainable, _ = count_parameters(model)
        assert trainable == 3 * module_parameters(shape, placement)
        assert adapter_bytes(shape, 3, placement) == 2 * trainable


def test_matched_ranks_and_budgets():
    for rank in (16, 64):
        whole = rank * module_parameters(SHAPE, "all")
        for placement in ("attention", "mlp"):
            matched = matched_rank(SHAPE, placement, rank)
            assert matched * module_parameters(SHAPE, placement) == pytest.approx(whole, rel=0.02)
    for row in size_table(SHAPE):
        assert row["MB"] <= row["MB allowed"]
        more = adapter_bytes(SHAPE, row["rank"] + 1, row["placement"]) / 1e6
        assert more > row["MB allowed"]
        assert row["rank"] >= 1
    assert largest_rank(SHAPE, "all", 1e12) == 192  # the narrowest layer's
    assert largest_rank(SHAPE, "all", 10) == 0


# ------------------------------------------------------------------ cells and grids


def test_parameters_are_checked_by_name():
    with pytest.raises(UnknownNameError, match="placement"):
        cell_from({"placment": "all"}, 0)
    with pytest.raises(UnknownNameError, match="attention"):
        cell_from({"placement": "attentoin"}, 0)
    with pytest.raises(UnknownNameError, match="gsm8k"):
        check_setting({"task": "gms8k"})
    with pytest.raises(BadInputError, match=r"1\.0e-3"):
        cell_from({"learning_rate": "1e-3"}, 0)
    for wrong in ({"rank": 0}, {"steps": -1}, {"limit": True}, {"learning_rate": 0.0}):
        with pytest.raises(BadInputError, match=next(iter(wrong))):
            cell_from(wrong, 0)
    assert cell_from({}, 3).seed == 3
    assert "seed" not in DEFAULTS


def test_grid_files_are_what_the_code_says():
    folder = Path(__file__).parent.parent / "benchmarks" / "grids"
    for name, text in grid_text(SHAPE).items():
        assert (folder / name).read_text(encoding="utf-8") == text, f"--write-grid renews {name}"
        assert [cell_from(s, 0) for s in yaml.safe_load(text)]
    assert [c.to_dict() for c in paper_cells()] == [
        cell_from(s, 0).to_dict()
        for s in yaml.safe_load((folder / "saha2024_llama-3.2-1b.yaml").read_text(encoding="utf-8"))
    ]
    settings = yaml.safe_load((folder / "specialists.yaml").read_text(encoding="utf-8"))
    assert settings == [s for some in blocks(SHAPE).values() for s in some]
    cells = [cell_from(s, 0) for s in settings]
    assert len({(c.setting, c.tests) for c in cells}) == len(cells)
    asked = {(c.task, c.rank, c.placement) for c in cells if c.scaling == "fixed"}
    assert {
        (t, r, p)
        for t in ("gsm8k", "code", "dialogue")
        for r in (8, 16, 32, 64, 128)
        for p in ("attention", "mlp", "all")
    } <= asked
    for task in ("gsm8k", "code", "dialogue"):  # every rule and rank at the same three rates
        rates = {}
        for c in cells:
            if c.part == "tune" and c.task == task and c.placement == "all":
                rates.setdefault((c.rank, c.scaling), set()).add(c.learning_rate)
        whole = [v for k, v in rates.items() if k[0] in (8, 16, 32, 64, 128)]
        assert len(whole) >= 13
        assert all(v == {3e-4, 1e-3, 3e-3} for v in whole[:13])


def test_the_papers_protocol():
    cells = paper_cells()
    assert {c.rank for c in cells} == {16, 32, 64, 128}
    assert {c.alpha for c in cells} == {16.0}
    assert {c.placement for c in cells if c.task == "text"} == {"attention", "mlp", "all"}
    assert {c.completions for c in cells if c.task == "math"} == {5}
    assert {c.programs for c in cells if c.task == "python"} == {10}


def test_plans_grow_and_refuse():
    shape = architecture("llama-3.2-3b")
    small, large = (
        plan_cell(
            cell_from({"model": "llama-3.2-3b-instruct", "rank": r, "tests": "loss"}, 0), shape
        )
        for r in (16, 128)
    )
    assert large.least > small.least
    assert small.fits
    assert small.planned > small.least
    full = cell_from({"part": "full", "model": "llama-3.2-3b-instruct"}, 0)
    reason = why_not(full, shape)
    assert "GiB planned, t4 has 15.0" in reason
    assert "all weights" in reason
    assert why_not(cell_from({"part": "full"}, 0), SHAPE) is None
    assert plan_cell(full, shape).row()["GiB as run"] == "does not fit"


def tiny(tiny_folder, **changes):
    small = dict(rows=8, steps=2, batch_size=4, heldout=4, limit=2, max_length=256, programs=2)
    return {"model": str(tiny_folder), "rank": 4, "task": "sums", **small, **changes}


def test_a_cell_too_large_is_skipped_and_the_next_runs(tiny_folder, tmp_path):
    said = []
    large = {"part": "full", "model": "llama-3.2-3b-instruct"}
    settings = [large, tiny(tiny_folder, tests="loss")]
    first, second = (run_cell(s, 0, tmp_path, said.append) for s in settings)
    assert first.metrics == {}
    assert "t4 has 15.0" in first.parameters["skipped"]
    assert any("skipped" in line for line in said)
    assert second.metrics["loss"] > 0
    assert "skipped" not in second.parameters


def test_a_task_without_data_is_named(tiny_folder, tmp_path):
    with pytest.raises(NotAvailableError, match="task gsm8k has no data here: gsm8k/train"):
        run_cell(tiny(tiny_folder, task="gsm8k"), 0, tmp_path, print)
    assert run_cell(tiny(tiny_folder, tests="loss"), 0, tmp_path).metrics["loss"] > 0


def test_a_cell_learns_and_keeps_its_generations(tiny_folder, tmp_path):
    from lora_kit.studies.specialists_generations import score_generations, unpack

    setting = tiny(tiny_folder, steps=12, learning_rate=2e-2, limit=3, completions=2)
    record = run_cell(setting, 1, tmp_path, lambda line: None)
    assert record.metrics["loss"] < record.metrics["loss_before"] - 0.1
    assert record.parameters["scale"] == 4.0
    assert record.seed == 1
    assert 0 < record.metrics["update_norm"]
    assert record.metrics["effective_rank"] >= 1
    again = score_generations(tmp_path / "generations" / "sums.jsonl")
    (strict,) = [r for r in record.tables["items"] if r["metric"] == "strict"]
    assert unpack(strict["scores"]) == again.values["strict"]
    assert strict["n"] == 3
    again = run_cell({**setting, "tests": "loss"}, 1, tmp_path, lambda line: None)
    assert again.metrics["loss"] == pytest.approx(record.metrics["loss"], rel=1e-5)


def test_every_weight_can_be_trained(tiny_folder, tmp_path):
    record = run_cell(
        tiny(tiny_folder, part="full", learning_rate=1e-3, steps=8, tests="loss"), 0, tmp_path
    )
    whole = sum(p.numel() for p in tiny_llama(vocab_size=300).parameters())
    assert record.metrics["trainable"] == whole
    assert record.metrics["loss"] < record.metrics["loss_before"]


def test_serving_weighs_and_times_every_way(tiny_folder, tmp_path, monkeypatch):
    from lora_kit.studies import specialists_serving

    monkeypatch.setattr(specialists_serving, "SERVED", 2)
    monkeypatch.setattr(specialists_serving, "NEW_TOKENS", 2)
    monkeypatch.setattr(specialists_serving.serving_prompts, "__defaults__", (4,))
    record = run_cell(tiny(tiny_folder, part="serve"), 0, tmp_path, lambda line: None)
    m = record.metrics
    model = tiny_llama(vocab_size=300)
    add_lora(model, LoraSpec(4, 16.0))
    assert m["bytes one adapter"] == 4 * count_parameters(model)[0]
    assert m["bytes three adapters"] == pytest.approx(3 * m["bytes one adapter"])
    assert m["bytes three models"] == pytest.approx(3 * m["bytes base"], rel=0.01)
    assert all(v > 0 for k, v in m.items() if k.startswith("seconds"))


# ------------------------------------------------------------------ measures


def test_sampled_head_draws_from_the_nucleus():
    from lora_kit.studies.specialists_measures import SampledHead

    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.04, 0.01])
    logits = probabilities.log().repeat(20_000, 1)
    head = SampledHead(torch.nn.Identity(), 0, torch.device("cpu"), 1.0, 1.0)
    share = head(logits).argmax(-1).bincount(minlength=5) / 20_000
    torch.testing.assert_close(share, probabilities, atol=0.012, rtol=0)
    cut = SampledHead(torch.nn.Identity(), 0, torch.device("cpu"), 1.0, 0.9)
    share = cut(logits).argmax(-1).bincount(minlength=5) / 20_000
    kept = torch.tensor([0.5, 0.3, 0.15, 0, 0]) / 0.95  # the fewest that add up to 0.9
    torch.testing.assert_close(share, kept, atol=0.012, rtol=0)
    assert share[3:].sum() == 0
    cold = SampledHead(torch.nn.Identity(), 0, torch.device("cpu"), 0.05, 1.0)
    assert (cold(logits[:500]).argmax(-1) == 0).float().mean() > 0.99
    for wrong in ((0.0, 0.9), (1.0, 0.0), (1.0, 1.1)):
        with pytest.raises(BadInputError, match="temperature"):
            SampledHead(torch.nn.Identity(), 0, torch.device("cpu"), *wrong)


def test_update_norms_are_those_of_the_dense_update():
    from lora_kit.studies.specialists_measures import update_norms

    model = tiny_llama()
    add_lora(model, LoraSpec(4, 8), seed=0)
    moved = whole = 0.0
    ranks = []
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B["default"].normal_(std=0.1)
            update = 2.0 * layer.lora_B["default"] @ layer.lora_A["default"]
            singular = torch.linalg.svdvals(update)
            moved += float(update.square().sum())
            whole += float(layer.base_layer.weight.square().sum())
            ranks.append(float(singular.square().sum() / singular[0] ** 2))
    found = update_norms(model)
    assert found["update_norm"] == pytest.approx((moved / whole) ** 0.5, rel=1e-4)
    assert found["effective_rank"] == pytest.approx(sum(ranks) / len(ranks), rel=1e-3)


def test_tiny_cells_are_resumed(tmp_path, monkeypatch):
    from lora_kit.studies import specialists_tiny
    from lora_kit.studies.records import read_record

    made = []

    def cell(rank, scaling, rate, seed, steps):
        made.append((rank, scaling, rate, seed))
        told = {"rank": rank, "scaling": scaling, "rate": rate, "seed": seed, "scale": 1.0}
        return told | {"loss": 1.0, "accuracy": 0.0, "trainable": 1, "seconds": 0.1}

    monkeypatch.setattr(specialists_tiny, "tiny_cell", cell)
    settings = [(2, "fixed", 1e-2), (8, "fixed", 1e-2)]
    path = tmp_path / "tiny.json"
    assert specialists_tiny.run_tiny(path, (0,), settings[:1], say=lambda line: None) == 0
    assert specialists_tiny.run_tiny(path, (0, 1), settings, say=lambda line: None) == 0
    assert sorted(made) == sorted((*s, seed) for s in settings for seed in (0, 1))
    assert len(read_record(path).tables["cells"]) == 4
    names = [(r, s) for r, s, rate in specialists_tiny.tiny_settings(rates=(1e-2,))]
    assert len(names) == 10
    assert names.count((16, "fixed")) == 1


def test_the_cipher_is_what_it_says():
    from lora_kit.studies.specialists_tiny import cipher_batch, cipher_rows
    from lora_kit.tinylm import ALPHABET

    batch = cipher_batch([(12, 34)])
    assert "".join(ALPHABET[i] for i in batch.ids[0].tolist()) == "12+34=973."
    assert (batch.labels[0, :6] == -100).all()
    assert (batch.labels[0, 6:] != -100).all()
    learnt, held = cipher_rows()
    asked = {tuple(row) for row in held.ids[:, :6].tolist()}
    assert not asked & {tuple(row) for row in learnt.ids[:, :6].tolist()}
    assert len(asked) == 500


@pytest.mark.parametrize(
    ("optimizer", "rule", "factor"),
    [
        *(("SGD", "fixed", 1 / 32), ("SGD", "constant", 32), ("SGD", "stabilised", 1)),
        *(("AdamW", "fixed", 1), ("AdamW", "constant", 32), ("AdamW", "stabilised", 32**0.5)),
    ],
)
def test_first_step_of_a_real_adapter_is_as_predicted(optimizer, rule, factor):
    """Independent directions, rank 64 over rank 2, to first order: s²·r and s·r."""
    from lora_kit.studies.specialists_tiny import first_step

    low, high = (sum(first_step(r, rule, optimizer, s) for s in range(2)) for r in (2, 64))
    assert high / low == pytest.approx(factor, rel=0.15)
