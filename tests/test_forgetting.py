"""The forgetting study: mai2025's quantities, the intervals, the cells, and a tiny run of each."""

import math

import numpy as np
import pytest
from scipy import stats

from lora_kit.data import Dataset
from lora_kit.errors import BadInputError
from lora_kit.evaluate.statistics import mcnemar
from lora_kit.studies.forgetting import (
    CENTRE,
    Cell,
    ability_augmentation,
    cells,
    change,
    forgetting_rate,
    from_bits,
    knowledge_loss,
    printed_error,
    published_change,
    seed_interval,
    settings,
    to_bits,
)


def test_printed_quantities():
    assert forgetting_rate(0.3351, 0.0371) == pytest.approx(0.8893, abs=5e-5)
    assert ability_augmentation(60.77, 61.20) == pytest.approx(0.43)
    loss, around = knowledge_loss(47.0, 34.0, 5.02, 4.76)
    assert loss == pytest.approx(13.0)
    assert around == pytest.approx(6.918, abs=1e-3)
    with pytest.raises(BadInputError, match="above 0"):
        forgetting_rate(0.0, 0.0)


def test_printed_errors_are_standard_errors():
    assert printed_error(0.47, 0.0502, 100) == pytest.approx(1, abs=0.01)
    assert printed_error(0.3351, 0.0130, 1319) == pytest.approx(1, abs=0.01)


def coins(n, seed, lost=0.4, won=0.05):
    rng = np.random.default_rng(seed)
    before = rng.random(n) < 0.7
    after = np.where(before, rng.random(n) >= lost, rng.random(n) < won)
    return before.astype(float).tolist(), after.astype(float).tolist()


def test_change_agrees_with_its_parts():
    before, after = coins(500, 0)
    found = change(before, after)
    assert found.rate.value == pytest.approx(1 - np.mean(after) / np.mean(before))
    assert found.test == mcnemar(before, after)
    assert found.difference.value == pytest.approx(np.mean(after) - np.mean(before))
    assert found.rate.low < found.rate.value < found.rate.high


def test_rate_interval_is_scipys_paired_bootstrap():
    before, after = coins(400, 1)
    found = change(before, after).rate
    reference = stats.bootstrap(
        (np.array(before), np.array(after)),
        lambda b, a, axis: 1 - a.mean(axis) / b.mean(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=9999,
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert found.low == pytest.approx(reference.low, abs=0.01)
    assert found.high == pytest.approx(reference.high, abs=0.01)


def test_rate_interval_covers_the_truth():
    """0.4 of what is known is lost and 0.05 of the rest won: FR = 1 − (0.7·0.6 + 0.3·0.05)/0.7."""
    truth = 1 - (0.7 * 0.6 + 0.3 * 0.05) / 0.7
    caught = 0
    for seed in range(200):
        rate = change(*coins(300, seed)).rate
        caught += rate.low <= truth <= rate.high
    assert 0.90 <= caught / 200 <= 0.99


def test_everything_or_nothing_lost():
    gone = change([1.0] * 50 + [0.0] * 50, [0.0] * 100).rate
    assert gone.value == gone.high == 1
    assert 0.85 < gone.low < 1
    kept = change([1.0, 0.0] * 50, [1.0, 0.0] * 50).rate
    assert kept.value == 0
    assert change([0.0] * 20, [0.0] * 20).rate is None


def test_published_change_of_mmlu_depends_on_the_pairs():
    found = published_change(0.47, 0.34, 100)
    assert (found.base_right, found.tuned_right) == (47, 34)
    assert found.difference.low < 0
    assert found.difference.high > 0
    assert found.p > 0.05
    assert found.p_least < 0.05 < found.p_most
    # The ends of the range, by hand: 13 disagreements all one way; and 47 against 34.
    assert found.p_least == pytest.approx(2 * 0.5**13)
    assert found.p_most == pytest.approx(stats.binomtest(47, 81).pvalue)
    b = round((found.disagreement * 100 + 13) / 2)
    assert stats.binomtest(b, round(found.disagreement * 100)).pvalue < 0.05
    assert stats.binomtest(b + 1, round(found.disagreement * 100) + 2).pvalue >= 0.05


def test_published_change_bad_input():
    for base, tuned, n in ((1.2, 0.5, 10), (0.5, -0.1, 10), (0.5, 0.5, 0)):
        with pytest.raises(BadInputError):
            published_change(base, tuned, n)


def test_cells_one_variable_at_a_time_and_seeds_together():
    made = list(settings())
    assert made[0] == CENTRE
    assert len(set(made)) == len(made) == 10
    for cell in made[1:]:
        differing = [k for k, v in cell.to_dict().items() if v != CENTRE.to_dict()[k]]
        assert len(differing) == 1
    all_cells = cells((0, 1, 2))
    assert len({c.name for c in all_cells}) == 30
    for start in range(0, 30, 3):
        assert len({c.setting for c in all_cells[start : start + 3]}) == 1
    assert {c.replay for c in made} == {0.0, 0.01, 0.05, 0.2}


@pytest.mark.parametrize(
    "wrong", [{"skills": ("chess",)}, {"replay": 2}, {"rank": 0}, {"rows": 0}, {"learning_rate": 0}]
)
def test_bad_cells_are_refused(wrong):
    with pytest.raises(BadInputError):
        Cell(**wrong)


def test_bits_round_trip_and_refusals():
    scores = [1.0, 0.0, 0.0, 1.0]
    assert to_bits(scores) == "1001"
    assert from_bits("1001") == scores
    assert to_bits([True, False]) == "10"
    with pytest.raises(BadInputError, match="item 1"):
        to_bits([1.0, 0.5])
    with pytest.raises(BadInputError):
        from_bits("10x")


def test_seed_interval_is_students():
    values = [0.2, 0.25, 0.4]
    mean, low, high = seed_interval(values)
    wanted = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert (mean, low, high) == pytest.approx((np.mean(values), *wanted))
    assert seed_interval([0.3]) == (0.3, 0.3, 0.3)


# ------------------------------------------------------------------ runs of a tiny model


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    """A tiny random Llama wide enough for the ranks of the study."""
    from lora_fixtures import tiny_llama

    folder = tmp_path_factory.mktemp("forgetting") / "tiny"
    tiny_llama(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=2,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        initializer_range=0.1,
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def material():
    from lora_kit.studies.forgetting_cells import skill_material, with_alpaca

    rows = tuple(
        {"instruction": f"Name thing {i}.", "input": "", "output": f"Thing {i} it is."}
        for i in range(40)
    )
    made = skill_material(("addition", "word_problems"), 30, 6, seed=0)
    return with_alpaca(made, Dataset("alpaca", "train", rows, "generated", "1"), held_out=8)


def test_mixed_rows_are_what_the_cell_says(material):
    from lora_kit.studies.forgetting_cells import mixed_rows

    plain = mixed_rows(material, Cell(rows=20))
    assert len(plain) == 20
    assert all("### Instruction" in r["prompt"] for r in plain)
    replayed = mixed_rows(material, Cell(rows=20, replay=0.2))
    assert len(replayed) == 20 + 2 * 6
    taught = {r["prompt"] for rows in material.train.values() for r in rows}
    asked = {r["prompt"] for rows in material.test.values() for r in rows}
    extra = [r for r in replayed if "### Instruction" not in r["prompt"]]
    assert len(extra) == 12
    assert {r["prompt"] for r in extra} <= taught
    assert not {r["prompt"] for r in replayed} & asked
    held = {r["output"] for r in material.held_out}
    assert not held & {r["completion"] for r in replayed}
    assert mixed_rows(material, Cell(rows=20, seed=1)).rows != plain.rows
    with pytest.raises(BadInputError, match="32"):
        mixed_rows(material, Cell(rows=33))


def test_tuning_spec_is_the_papers_recipe_with_the_cells_values():
    from lora_kit.studies.forgetting_cells import tuning_spec
    from lora_kit.train import recipe

    spec, paper = tuning_spec(Cell(rank=64, learning_rate=1e-3, seed=2)), recipe("mai")
    assert (spec.rank, spec.alpha, spec.learning_rate, spec.seed) == (64, 64, 1e-3, 2)
    for name in ("batch_size", "schedule", "warmup", "quantization", "targets", "optimizer"):
        assert getattr(spec, name) == getattr(paper, name)


def test_tune_merges_what_was_trained(base, material):
    """The plain model's held-out loss is that of base and adapter side by side."""
    import torch

    from lora_kit.lora import lora_layers
    from lora_kit.models import fetch_model
    from lora_kit.studies.forgetting_cells import alpaca_loss, mixed_rows, tune, tuning_spec
    from lora_kit.train import engines
    from lora_kit.train.finetune import encode_rows

    cell = Cell(rows=16, learning_rate=1e-2, rank=4)
    spec, rows = tuning_spec(cell, dtype="float32", quantization="none"), mixed_rows(material, cell)
    done = tune(base, rows, spec, say=lambda text: None)
    assert not lora_layers(done.model)
    assert len(done.losses) == done.steps == 2
    model, tokenizer = engines.load_for_training(fetch_model(str(base)), spec, "native")
    engines.train_native(model, tokenizer, encode_rows(rows, tokenizer, spec), spec, 2)
    beside = alpaca_loss(model, tokenizer, material.held_out, spec)
    merged = alpaca_loss(done.model, done.tokenizer, material.held_out, spec)
    assert merged == pytest.approx(beside, abs=1e-5)
    with torch.no_grad():
        assert all(p.isfinite().all() for p in done.model.parameters())


def test_quantised_is_nf4_there_and_back(base):
    """bitsandbytes' own way there and back gives the same weights; norms and embeddings stay."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from lora_kit.models import load_model
    from lora_kit.studies.forgetting_cells import quantised

    model, _ = quantised(base)
    plain = load_model(str(base), "float32").model
    name = "model.layers.0.self_attn.q_proj"
    packed, state = quantize_4bit(
        plain.get_submodule(name).weight.data, quant_type="nf4", compress_statistics=True
    )
    wanted = dequantize_4bit(packed, state)
    torch.testing.assert_close(model.get_submodule(name).weight.data, wanted, atol=1e-6, rtol=1e-5)
    assert torch.equal(model.get_input_embeddings().weight, plain.get_input_embeddings().weight)


def test_teaching_leaves_a_model_that_loads(base, material, tmp_path):
    from dataclasses import replace

    from lora_kit.models import load_model
    from lora_kit.studies.forgetting_cells import TEACHING, score_skill, teach

    spec = replace(TEACHING, steps=2, batch_size=4, rank=8, alpha=8, dtype="float32")
    said = []
    told = teach(base, tmp_path / "taught", material, spec, rounds=2, checks=3, say=said.append)
    assert [r["steps"] for r in told["rounds"]] == [2, 2]
    assert len(said) == 4
    loaded = load_model(str(tmp_path / "taught"), "float32")
    strict, flexible, answers = score_skill(
        loaded.model, loaded.tokenizer, "addition", material.test["addition"]
    )
    assert len(strict) == len(flexible) == len(answers) == 6
    assert all(f or not s for s, f in zip(strict, flexible, strict=True))  # strict implies flexible
    assert [p.name for p in tmp_path.iterdir()] == ["taught"]


def test_run_cell_makes_a_whole_record(base, material, tmp_path):
    from lora_kit.studies.forgetting_cells import quantised, run_cell, score_all, tuning_spec
    from lora_kit.studies.records import read_record, write_record

    cell = Cell(rows=8, rank=4, replay=0.1)
    before = score_all(*quantised(base), material)
    spec = tuning_spec(cell, dtype="float32")
    record = run_cell(base, cell, material, before, "a command", 5.0, spec, say=lambda text: None)
    kept = read_record(write_record(record, tmp_path / "cell.json"))
    assert kept.parameters["replay"] == 0.1
    assert kept.parameters["steps"] == 2
    assert math.isfinite(kept.metrics["alpaca_loss_after"])
    for row in kept.tables["items"]:
        again = change(from_bits(row["before"]), from_bits(row["after"]))
        key = f"{row['skill']}_{row['judge']}"
        assert kept.metrics[f"{key}_after"].value == again.after.value
        assert kept.metrics[f"{key}_p"] == again.test.p
    assert len(kept.tables["answers"]) == 10


def everyday(model, tokenizer, rows):
    from lora_kit.evaluate import evaluate

    return evaluate(model, tokenizer, rows, batch_size=4)


def test_task_records_pair_and_refuse(tiny):
    from dataclasses import replace

    from lora_kit.evaluate import everyday_items
    from lora_kit.studies.forgetting_tasks import pair_records, task_record

    found = everyday(tiny.model, tiny.tokenizer, everyday_items().take(6))
    one = task_record(found, "hellaswag", "base", "c", {}, tiny.record())
    two = task_record(found, "hellaswag", "seed0", "c", {"steps": 2}, tiny.record())
    pairs = pair_records(one, two)
    assert [p.metric for p in pairs] == ["acc,none", "acc_norm,none"]
    assert all(p.change.difference.value == 0 and p.change.test.p == 1 for p in pairs)
    assert one.metrics["hellaswag,acc,none"].value == found["everyday"]["acc"].value
    others = everyday(tiny.model, tiny.tokenizer, everyday_items().take(5))
    with pytest.raises(BadInputError, match="items of everyday"):
        pair_records(one, task_record(others, "hellaswag", "seed0", "c", {}, tiny.record()))
    older = replace(found, harness="0.4.0")
    with pytest.raises(BadInputError, match=r"harness is .* and 0\.4\.0"):
        pair_records(one, task_record(older, "hellaswag", "seed0", "c", {}, tiny.record()))
    with pytest.raises(BadInputError, match="not one of this study"):
        task_record(found, "chess", "base", "c", {}, tiny.record())
