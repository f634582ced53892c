"""The shop study: floors by hand, baselines, cells of every method on a tiny model, the report."""

import json

import numpy as np
import pytest

from lora_kit.errors import BadInputError, UnknownNameError
from lora_kit.evaluate import shop_metrics
from lora_kit.shop_products import divide, generated_pairs, questions
from lora_kit.studies import shop_cells, shop_floors, shop_report
from lora_kit.studies.records import read_records, write_record
from lora_kit.studies.shop_baselines import best_f1, best_threshold, fuzzy, rules, tfidf
from lora_kit.studies.shop_cells import DEFAULTS, METHODS, check_setting, run_cell
from lora_kit.studies.shop_model import training_rows, word_scores

# ------------------------------------------------------------------ floors


def test_formulas_by_hand():
    assert shop_floors.always_yes(0.25) == pytest.approx(0.4)  # P 1/4, R 1
    assert shop_floors.random_yes(0.25) == pytest.approx(1 / 3)  # P 1/4, R 1/2
    assert shop_floors.random_yes(0.25, 1) == shop_floors.always_yes(0.25)
    assert shop_floors.share_of_yes(0.7, 0.5, 0.8) == pytest.approx(1 / 3)
    assert shop_floors.null_star(0.5) == pytest.approx(2 / 3)
    with pytest.raises(BadInputError, match="say nothing"):
        shop_floors.share_of_yes(0.5, 0.5, 0.5)


def test_floors_are_what_the_metrics_give():
    """Each formula against the metric itself, on answers that ignore the question."""
    truth = ["yes"] * 230 + ["no"] * 770
    always = shop_metrics.f1(truth, ["yes"] * 1000).value
    assert always == pytest.approx(shop_floors.always_yes(0.23))
    rng = np.random.default_rng(0)
    coin = np.mean(
        [
            float(
                shop_metrics.f1_of(
                    shop_metrics.binary_counts(truth, rng.choice(["yes", "no"], 1000)).sum(0)
                )
            )
            for _ in range(40)
        ]
    )
    assert coin == pytest.approx(shop_floors.random_yes(0.23), abs=0.01)
    labels, shares = list("ABC"), (0.7, 0.2, 0.1)
    due = rng.choice(labels, 3000, p=shares).tolist()
    for rates in ((1, 0, 0), (1 / 3, 1 / 3, 1 / 3), shares):
        said = rng.choice(labels, 3000, p=rates).tolist()
        found = shop_metrics.macro_f1(due, said, labels).value
        assert found == pytest.approx(shop_floors.blind_macro(shares, rates), abs=0.03)
        assert shop_floors.blind_macro(shares, rates) <= shop_floors.macro_bound(3) + 1e-12


def test_published_rows_agree_on_the_share_of_yes():
    shares = shop_floors.published_shares()
    low, high, n = shares["PM", "IND"]
    assert (round(low * n), round(high * n), n) == (111, 111, 253)
    low, high, n = shares["PSI", "IND"]
    assert (round(low * n), round(high * n)) == (230, 230)
    for domain in ("IND", "OOD"):
        low, high, n = shares["AP", domain]
        assert 0 < low <= high < 1
        assert (high - low) * n <= 5


def test_every_task_has_a_floor_and_stands_beside_it():
    ranking = {"given order": 0.78, "random order": 0.79, "worst order": 0.6}
    found = shop_floors.floors(ranking)
    best = shop_floors.best_floors(found)
    assert {t for t, domain in best if domain == "IND"} == set(shop_floors.SHOP_TASKS)
    assert best["QPR", "IND"].score == 0.79
    assert best["AVE", "IND"].score == pytest.approx(0.3734, abs=1e-4)
    table = shop_floors.beside_floors("IND", found).set_index(["model", "task"])
    line = table.loc[("SmolLM2-1.7B-EC", "PSI")]
    assert line["score"] == 0.373
    assert line["above"] == pytest.approx(0.373 - 0.46 / 1.23)  # at "always yes", to a thousandth
    assert line["room"] == pytest.approx(line["above"] / (1 - 0.46 / 1.23))
    outside = shop_floors.beside_floors("OOD", found)
    assert set(outside["task"]) == {"AVE", "PRP", "SA", "SR", "AP", "AG"}
    assert not outside["floor"].isna().any()


def test_ranking_floors_by_hand():
    found = shop_floors.ranking_floors([["E", "I"], ["I", "E"]])
    late = 1 / np.log2(3)
    assert found["given order"] == pytest.approx((1 + late) / 2)
    assert found["reversed"] == pytest.approx((1 + late) / 2)
    assert found["random order"] == pytest.approx((1 + late) / 2)
    assert found["worst order"] == pytest.approx(late)


@pytest.mark.data
def test_the_record_of_ranking_floors_follows_from_the_rows():
    recorded = shop_floors.recorded_ranking()
    assert recorded == pytest.approx(shop_floors.ranking_floors(shop_floors.ranking_labels()))


# ------------------------------------------------------------------ baselines

SHOP = divide(generated_pairs(), 0)


def test_the_threshold_is_the_best_by_trying_all():
    rng = np.random.default_rng(0)
    scores, truth = rng.integers(0, 8, 60) / 8, rng.random(60) < 0.3
    tried = {}
    for cut in np.unique(scores):
        said = scores >= cut
        tried[cut] = 2 * (said & truth).sum() / (said.sum() + truth.sum())
    assert best_f1(scores, truth) == pytest.approx(max(tried.values()))
    assert tried[best_threshold(scores, truth)] == pytest.approx(max(tried.values()))
    assert best_threshold([1, 1, 1], [1, 0, 0]) == 1
    with pytest.raises(BadInputError, match="with a match among them"):
        best_threshold([1.0], [0])


@pytest.mark.parametrize("make", [fuzzy, tfidf])
def test_baselines_tell_random_pairs_apart(make):
    parts = [[q["pair"] for q in questions("match_random", SHOP.part(n))] for n in
             ("train", "validation", "inside")]  # fmt: skip
    scorer = make(*parts[:2])
    truth = [p["label"] for p in parts[2]]
    assert best_f1(scorer.score(parts[2]), truth) > 0.9
    assert len(scorer.score(parts[2][:3])) == 3


def test_rules_name_what_they_have_seen():
    extract = rules(SHOP.train)
    seen = next(q for q in questions("extract", SHOP.inside) if q["truth"]["manufacturer"])
    assert extract(seen["listing"])["manufacturer"] == seen["truth"]["manufacturer"]
    assert extract("unheard tool 2.0, 1,200.50 USD") == {"manufacturer": None, "price": 1200.5}
    new = next(q for q in questions("extract", SHOP.outside) if q["truth"]["manufacturer"])
    assert extract(new["listing"])["manufacturer"] is None


# ------------------------------------------------------------------ the model, and cells


def test_word_scores_are_the_models_own(tiny):
    import torch

    prompts = ["the first question:", "another, longer question than that:"]
    found = word_scores(tiny.model, tiny.tokenizer, prompts, [" yes", " no"], batch_size=2)
    for prompt, scores in zip(prompts, found, strict=True):
        ids = tiny.tokenizer(prompt + " ", return_tensors="pt")["input_ids"]
        logits = tiny.model(input_ids=ids).logits[0, -1].log_softmax(-1)
        first = [tiny.tokenizer(c)["input_ids"][0] for c in ("y", "n")]
        assert torch.allclose(torch.tensor(scores).float(), logits[first], atol=1e-4)
    with pytest.raises(BadInputError, match="cannot be told"):
        word_scores(tiny.model, tiny.tokenizer, prompts, ["a", "ab"])


def test_training_rows_are_balanced():
    rows = training_rows(questions("match", SHOP.train), 0)
    yes = sum(r["completion"] == " yes" for r in rows)
    assert yes == len(rows) - yes
    assert set(rows[0]) == {"prompt", "completion"}


SMALL = {"data": "generated", "test_rows": 12, "validation_rows": 40, "timed_rows": 4}


@pytest.mark.parametrize("method", ["majority", "fuzzy", "tfidf"])
def test_classical_cells(tmp_path, method):
    record = run_cell({**SMALL, "task": "all", "method": method}, 1, tmp_path, print)
    assert record.seed == 1
    for key in ("match_inside", "match_random_outside", "rank_inside"):
        assert 0 <= record.metrics[key].value <= 1
    assert ("extract_inside" in record.metrics) == (method != "fuzzy")
    assert record.metrics["seconds_per_1000"] > 0
    truth = next(t for t in record.tables["items"] if t["task"] == "match")["truth"]
    assert set(truth) <= {"0", "1"}
    if method == "majority":  # yes to all: F1 2p/(1 + p) of the questions asked
        p = truth.count("1") / len(truth)
        assert record.metrics["match_inside"].value == pytest.approx(shop_floors.always_yes(p))


@pytest.mark.parametrize("method", ["zero-shot", "one-shot", "tuned"])
def test_model_cells(tmp_path, tiny_folder, method, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    setting = {**SMALL, "task": "all", "method": method, "model": str(tiny_folder)}
    setting |= {"train_rows": 16, "steps": 2, "batch_size": 4}
    record = run_cell(setting, 0, tmp_path, lambda _: None)
    n = {t: record.metrics[f"{t}_inside"].n for t in ("match", "match_random", "rank", "extract")}
    assert max(n.values()) == 12
    assert "match_inside_uncut" in record.metrics
    assert record.model["fingerprint"]
    assert ("training_steps" in record.metrics) == (method == "tuned")
    assert record.parameters["rows"]["match"]["train"] == 16
    assert json.dumps(record.model_dump(by_alias=True))


def test_the_papers_settings_reach_the_trainer():
    spec = shop_cells.training_spec({**DEFAULTS, "recipe": "oswal", "steps": 0}, 3)
    assert (spec.targets, spec.batch_size, spec.seed) == ("all,lm_head", 64, 3)
    assert shop_cells.training_spec(DEFAULTS, 0).steps == DEFAULTS["steps"]


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"task": "matching"}, UnknownNameError, "shop task 'matching'.*Did you mean 'match'"),
        ({"method": "gpt"}, UnknownNameError, "Unknown shop method"),
        ({"recipe": "mai"}, UnknownNameError, "Unknown shop recipe"),
        ({"test_rows": -1}, BadInputError, "test_rows must be 0 or more"),
        ({"task": "extract", "method": "fuzzy"}, BadInputError, "extracts nothing"),
    ],
)
def test_settings_are_checked(change, error, says):
    with pytest.raises(error, match=says):
        check_setting({**DEFAULTS, **change})


def test_an_unknown_parameter_is_named(tmp_path):
    with pytest.raises(UnknownNameError, match="parameter of the shop study"):
        run_cell({"colour": 1}, 0, tmp_path)


# ------------------------------------------------------------------ the report


def test_report_says_what_there_is_and_what_is_missing(tmp_path):
    quiet = lambda _: None  # noqa: E731
    for seed in (0, 1):
        record = run_cell({**SMALL, "task": "match", "method": "fuzzy"}, seed, tmp_path, quiet)
        write_record(record, tmp_path / "08_small_shops" / f"f{seed}.json")
    few = run_cell(
        {**SMALL, "task": "match", "method": "fuzzy", "train_rows": 5}, 0, tmp_path, quiet
    )
    write_record(few, tmp_path / "08_small_shops" / "few.json")
    records = shop_report.read_study(tmp_path)
    lines = {line["method"]: line for line in shop_report.quality(records, "match")}
    assert set(lines) == set(METHODS)
    assert lines["fuzzy"]["seeds"] == "2"
    whole = [r for r in records if r.parameters["train_rows"] == 0]
    mean = np.mean([r.metrics["match_inside"].value for r in whole])
    assert lines["fuzzy"]["inside"].startswith(f"{mean:.3f} [")
    assert lines["tuned"]["inside"] == shop_report.NO_RECORD
    asked = shop_report.missing(records)
    assert any(x.startswith("match, tuned: lora-kit sweep shop") for x in asked)
    assert not any(x.startswith("match, fuzzy") for x in asked)
    (cost,) = shop_report.costs(records, "match")
    assert float(cost["1,000 answers (CPU s)"]) > 0
    line = shop_report.curve(records, "match", "fuzzy")["inside"]
    assert 5 in [rows for rows, _ in line]
    write_record(few, tmp_path / "08_small_shops" / "again.json")
    with pytest.raises(BadInputError, match="have the seed 0"):
        shop_report.quality(shop_report.read_study(tmp_path), "match")


def test_committed_records_are_of_the_study():
    for record in read_records(shop_cells.STUDY):
        assert set(DEFAULTS) <= set(record.parameters)
        assert record.seed is not None


def test_a_trial_gives_way_to_the_whole_and_tuned_runs_are_told_apart():
    records = shop_report.read_study()
    shown = {s.parameters["steps"] for s in shop_report.standing(records, "match_random", "tuned")}
    names = [line["method"] for line in shop_report.quality(records, "match_random")]
    assert len(names) == len(set(names))
    assert shown >= {120, 500}
    (zero_shot,) = shop_report.standing(records, "match_random", "zero-shot")
    assert zero_shot.records[0].metrics["match_random_inside"].n > 60
    asked, rate = (records, "match", "inside", "tfidf", "tuned"), {"learning_rate": 1e-3}
    with pytest.raises(BadInputError, match="Several runs of tuned have the seed 0"):
        shop_report.paired(*asked, 0, steps=300)  # there are three rates
    found = shop_report.paired(*asked, 0, steps=300, **rate)
    wanted = {"task": "match", "steps": 300, "train_rows": 0, **rate}
    (tuned,) = [r for r in records if r.seed == 0 and wanted.items() <= r.parameters.items()]
    free = [r for r in records if r.seed == 0 and r.parameters["method"] == "tfidf"]
    (free,) = [r for r in free if r.parameters["train_rows"] == 0 and "match_inside" in r.metrics]
    apart = tuned.metrics["match_inside"].value - free.metrics["match_inside"].value
    assert found.value == pytest.approx(apart, abs=0.02)  # the interval's centre is bootstrapped
    assert shop_report.paired(*asked, 0, steps=7) is None
    names = [line["method"] for line in shop_report.quality(records, "match")]
    assert len(names) == len(set(names)), "a rate of its own is named"


def test_gains_are_paired_by_division_and_by_labels_learnt_from():
    records = shop_report.read_study()
    of = {"train_rows": 1000, "task": "match"}
    kept = [r for r in records if of.items() <= r.parameters.items()]
    (row,) = shop_report.gains(kept, "match", "tfidf", "tuned", steps=200)
    scores = {
        m: {r.seed: r.metrics["match_inside"].value for r in kept if r.parameters["method"] == m}
        for m in ("tfidf", "tuned")
    }
    apart = [score - scores["tfidf"][seed] for seed, score in scores["tuned"].items()]
    assert row["pairs"] == "1,000"
    assert row["inside"].startswith(f"{np.mean(apart):+.3f} [")
    assert row["inside: above, below 0"].endswith(f"of {len(apart)}")
    assert shop_report.gains(kept, "match", "tfidf", "tuned", steps=7) == []
