"""Paired answers of the specialists study: known differences come out, holes are left out."""

import itertools

import numpy as np
import pandas as pd
import pytest

from lora_kit.architectures import architecture
from lora_kit.errors import BadInputError
from lora_kit.evaluate.statistics import estimate
from lora_kit.studies.records import new_record, write_record
from lora_kit.studies.specialists import SCALINGS, cell_from, scale_of
from lora_kit.studies.specialists_compare import (
    adapter,
    by_step,
    gains_over_base,
    paper_steps,
    route_rows,
    rule_slopes,
    score_step,
    serving_rows,
    whole_models,
)
from lora_kit.studies.specialists_generations import pack
from lora_kit.studies.specialists_measures import first_paragraph
from lora_kit.studies.specialists_report import Study, read_study
from lora_kit.studies.specialists_sizes import (
    at_equal_size,
    loss_by_size,
    matched_sizes,
    pick_at_size,
)
from lora_kit.studies.specialists_tuned import (
    FREE,
    equal_steps,
    loss_and_scores,
    map_of,
    tuned_slopes,
    two_ways,
)


def record(seed=0, scores=None, metrics=None, tables=None, **parameters):
    """A record; scores: {(test, metric): each item's score}."""
    cell = cell_from(parameters, seed)
    items = [
        {"test": t, "metric": m, "n": len(v), "items": "x", "version": "1", "scores": pack(v)}
        for (t, m), v in (scores or {}).items()
    ]
    told = {f"{t} {m}": estimate(v).to_metric() for (t, m), v in (scores or {}).items()}
    return new_record(
        "07_specialists",
        "a test",
        parameters=cell.to_dict() | {"scale": cell.scale},
        metrics=told | (metrics or {}),
        seed=seed,
        seconds=1.0,
        tables={"items": items} | (tables or {}),
    )


def study_of(*records):
    return Study(list(records), [], pd.DataFrame(), {})


def losses(truth, seeds=3, **fixed):
    rng = np.random.default_rng(0)
    return [
        record(
            s,
            metrics={"loss": truth(r, rule) + 0.1 * s + rng.normal(0, 1e-4)},
            task="gsm8k",
            rank=r,
            scaling=rule,
            **fixed,
        )
        for r in (8, 16, 32)
        for rule in (("fixed",) if r == 16 else ("fixed", "constant"))
        for s in range(seeds)
    ]


# ------------------------------------------------------------------ scores, item by item


def test_steps_are_paired_by_item_and_by_seed():
    rng, test = np.random.default_rng(0), ("gsm8k", "flexible")
    low = [rng.integers(0, 2, 200).astype(float).tolist() for _ in range(3)]
    high = [[max(x, float(i < 40)) for i, x in enumerate(some)] for some in low]
    made = [record(s, {test: low[s]}, task="gsm8k", rank=32) for s in range(3)]
    made += [record(s, {test: high[s]}, task="gsm8k", rank=128) for s in range(2)]
    step = score_step(study_of(*made), *test, adapter("gsm8k", 128), adapter("gsm8k", 32))
    assert len(step.seeds) == 2  # the third seed has no partner
    each = [np.mean(high[s]) - np.mean(low[s]) for s in range(2)]
    assert step.seeds == pytest.approx(each)
    assert step.difference.value == pytest.approx(np.mean(each))
    assert step.up
    assert str(step).startswith(f"{np.mean(each):+.4f} [+")


def test_one_seed_is_no_step_unless_asked_for():
    test = ("gsm8k", "flexible")
    made = [record(0, {test: [0.0, 1.0]}, task="gsm8k", rank=r) for r in (32, 128)]
    of, against = adapter("gsm8k", 128), adapter("gsm8k", 32)
    assert score_step(study_of(*made), *test, of, against) is None
    assert score_step(study_of(*made), *test, of, against, least=1).difference.value == 0
    made[1] = record(0, {test: [0.0, 1.0, 1.0]}, task="gsm8k", rank=128)
    with pytest.raises(BadInputError, match="different items"):
        score_step(study_of(*made), *test, of, against, least=1)


def test_papers_steps_stand_beside_ours():
    test = ("gsm8k", "strict")
    made = [
        record(s, {test: [0.0] * 50 + [float(r == 128)] * 50}, task="gsm8k", rank=r)
        for r in (32, 128)
        for s in range(3)
    ]
    ((line, step),) = paper_steps(study_of(*made))
    assert line["score"] == "mathematics, Strict Match"
    assert line["paper"] == "+0.4015"  # 0.6403 - 0.2388
    assert step.difference.value == pytest.approx(0.5)
    assert paper_steps(study_of()) == []


def test_gains_over_the_base():
    test = ("gsm8k", "strict")
    made = [record(s, {test: [0.0, 0.0, 0.0, 0.0]}, part="base") for s in range(3)]
    made += [record(s, {test: [1.0, 0.0, 0.0, 0.0]}, task="gsm8k") for s in range(3)]
    (row,) = gains_over_base(study_of(*made))
    assert row["specialist"].startswith("0.2500 [0.0")
    assert row["base"].startswith("0.0000 [0.0000, 0.")
    assert row["difference, paired"].startswith("+0.2500")


# ------------------------------------------------------------------ losses, over seeds


def test_slopes_of_rules_leave_holes_out():
    def truth(r, rule):
        return 2 - 0.05 * np.log2(r) * (rule == "constant") - 0.2 * (rule == "fixed")

    made = losses(truth)
    rows = {r["rule"]: r for r in rule_slopes(study_of(*made))}
    assert float(rows["fixed"]["a doubling"].split()[0]) == pytest.approx(0, abs=0.001)
    assert "stabilised" not in rows  # rank 16 alone
    assert rows["constant"]["ranks"] == "8 to 32"
    cut = [r for r in made if (r.parameters["rank"], r.seed) != (32, 2)]
    assert {r["ranks"] for r in rule_slopes(study_of(*cut))} == {"8 to 16"}
    assert rule_slopes(study_of()) == []


def test_runs_at_other_rates_are_other_settings():
    test = ("gsm8k", "strict")
    made = [
        record(s, {test: [0.0] * 50 + [float(r == 128)] * 50}, task="gsm8k", rank=r)
        for r in (32, 128)
        for s in range(3)
    ]
    untested = [
        record(s, task="gsm8k", rank=r, learning_rate=3e-3) for r in (32, 128) for s in range(3)
    ]
    ((_, step),) = paper_steps(study_of(*made, *untested))
    assert step.difference.value == pytest.approx(0.5)


def test_step_is_rate_times_scale_times_rank():
    frame = by_step(study_of(*losses(lambda r, rule: 1.0)), "gsm8k")
    assert set(frame[frame["scaling"] == "fixed"]["alpha"]) == {16}
    assert set(frame[frame["scaling"] == "constant"]["alpha"]) == {8, 32}
    assert frame["step"].tolist() == pytest.approx((1e-3 * frame["alpha"]).tolist())
    assert by_step(study_of(), "gsm8k").empty


def grid(truth, ranks=(8, 16, 32, 64, 128), rates=(3e-4, 1e-3, 3e-3), places=("all",)):
    """A loss for each rank, rule and rate, three seeds: truth(rank, α, rate) + little noise."""
    rng, made = np.random.default_rng(0), []
    for r, rate, place in itertools.product(ranks, rates, places):
        for rule in ("fixed",) if r == 16 else SCALINGS:
            alpha = scale_of(r, rule) * r
            for seed in range(3):
                loss = {"loss": truth(r, alpha, rate) + 0.1 * seed + rng.normal(0, 1e-4)}
                told = {"rank": r, "scaling": rule, "learning_rate": rate, "placement": place}
                made.append(
                    record(seed, metrics=loss | {"training_loss": 1.0}, task="gsm8k", **told)
                )
    return study_of(*made)


def value(text):
    return float(text.split()[0])


def test_what_only_the_step_does_is_gone_at_equal_steps_and_when_tuned():
    def truth(rank, alpha, rate):  # the best step is 0.016: α = 16 at 0.001
        return 1 + 0.1 * np.log(alpha * rate / 0.016) ** 2

    study = grid(truth)
    rows = {row["rule"]: row for row in tuned_slopes(study)}
    assert abs(value(rows[FREE]["a doubling"])) < 2e-4
    one_rate = {row["rule"]: row for row in rule_slopes(study)}
    assert value(one_rate["constant"]["a doubling"]) > 0.05
    assert rows["fixed"]["best, 8"] == rows["fixed"]["best, 128"] == "0.001"
    assert rows[FREE]["best, 128"] == "fixed 0.001"
    (row,) = equal_steps(study)
    assert all(abs(value(v)) < 1e-3 for k, v in row.items() if k != "task")
    assert tuned_slopes(study_of()) == equal_steps(study_of()) == []


def test_what_the_rank_does_remains_and_an_edge_is_marked():
    study = grid(lambda rank, alpha, rate: 2 - 0.02 * np.log2(rank) - 10 * rate)
    for row in tuned_slopes(study):
        assert value(row["a doubling"]) == pytest.approx(-0.02, abs=1e-3)
        assert row["best, 8"].endswith("0.003 ↑")


def test_rank_and_placement_under_each_rule():
    places = ("attention", "mlp", "all")
    study = grid(lambda rank, alpha, rate: 1 - 0.01 * np.log2(alpha), rates=(1e-3,), places=places)
    rows = {row["rule"]: row for row in two_ways(study)}
    assert float(rows["constant"]["rank, nats apart"]) == pytest.approx(0.04, abs=1e-3)
    assert float(rows["fixed"]["rank, nats apart"]) < 1e-3
    assert float(rows["constant"]["placement, nats apart"]) < 1e-3
    assert len(map_of(study, "gsm8k", "constant")[1]) == 12
    assert two_ways(study_of()) == []


def test_losses_stand_beside_scores():
    scores = {("gsm8k", "strict"): [0.0, 1.0]}
    made = [
        record(s, scores, {"loss": 1 + 0.1 * s - 0.01 * (r == 128)}, task="gsm8k", rank=r)
        for r in (8, 128)
        for s in range(3)
    ]
    (row,) = loss_and_scores(study_of(*made))
    assert row["loss"].startswith("-0.0100 [-0.0100")
    assert (row["score"], row["change"][:7]) == ("gsm8k strict", "+0.0000")
    assert loss_and_scores(study_of()) == []


def test_whole_models_against_the_adapter():
    test = ("gsm8k", "strict")
    made = [record(s, {test: [0.0, 1.0]}, {"loss": 1.0 + 0.1 * s}, task="gsm8k") for s in range(3)]
    made += [
        record(s, {test: [1.0, 1.0]}, {"loss": 0.9 + 0.1 * s}, task="gsm8k", part="full")
        for s in range(3)
    ]
    for some in made[3:]:
        some.parameters["learning_rate"] = 5e-5
    for some in made:
        some.peak_memory_bytes = 2_000_000_000
    (row,) = whole_models(study_of(*made))
    assert row["minus the adapter's"].startswith("-0.1000")
    assert row["own test"].startswith("+0.5000")
    assert row["HellaSwag"] == "not run"
    assert whole_models(study_of()) == []


# ------------------------------------------------------------------ sizes


SHAPE = architecture("smollm2-135m")


def test_sizes_are_matched_and_compared():
    sizes = matched_sizes(SHAPE)
    assert sizes[0] == {"attention": 4, "mlp": 2, "all": 1}
    assert sizes[2] == {"attention": 42, "mlp": 26, "all": 16}
    made = [
        record(
            s,
            metrics={"loss": 1 + 0.1 * s + 0.05 * (place == "mlp") + rng.normal(0, 1e-4)},
            task="gsm8k",
            rank=rank,
            placement=place,
            scaling="stabilised",
        )
        for rng in [np.random.default_rng(0)]
        for place, rank in sizes[0].items()
        for s in range(3)
    ]
    rows = {row["placement"]: row["gsm8k"] for row in at_equal_size(study_of(*made), SHAPE)}
    assert rows["mlp"].endswith("*")
    assert not rows["attention"].endswith("*")
    assert float(rows["all"]) == pytest.approx(1.1, abs=1e-3)
    assert at_equal_size(study_of(), SHAPE) == []


def test_the_pick_is_the_lowest_loss_within_the_budget():
    study = grid(lambda rank, alpha, rate: 2 - 0.02 * np.log2(rank) - 10 * rate)
    rows = {row["MB allowed"]: row for row in pick_at_size(study, SHAPE)}
    assert 1.0 not in rows  # nothing so small was run
    assert rows[5.0]["lowest loss"].startswith("all, rank 8, ")
    assert rows[20.0]["lowest loss"].startswith("all, rank 32, ")
    assert rows[20.0]["lowest loss"].endswith("rate 0.003")
    assert value(rows[20.0]["less than within the budget above"]) == pytest.approx(0.04, abs=1e-3)
    assert pick_at_size(study_of(), SHAPE) == []
    sizes = loss_by_size(study, SHAPE)
    assert sizes[sizes["rank"] == 32]["MB"].iloc[0] == pytest.approx(19.54, abs=0.01)


# ------------------------------------------------------------------ serving and routes


def test_serving_and_routes_are_told_with_their_spread():
    seconds = ("three models", "three adapters", "routed", "one adapter for all")
    held = {"bytes base": 2e8, "bytes three adapters": 3e7, "bytes one adapter": 1e7}
    held["bytes three models"] = 6e8
    made = [
        record(s, metrics=held | {f"seconds {n}": float(s + 1) for n in seconds}, part="serve")
        for s in range(3)
    ]
    routes = {"routes": [{"test": "gsm8k", "n": 4, "items": "x", "routes": "ggd-"}]}
    made.append(record(part="route", tables=routes))
    rows = {r["way"]: r for r in serving_rows(study_of(*made))}
    assert rows["three models"]["MB held"] == "600"
    assert rows["base + three adapters"]["MB held"] == "230"
    assert rows["base + one adapter for all"]["MB held"] == "210"
    assert rows["three models"]["seconds, 24 prompts"] == "2.00 (1.00 to 3.00)"
    (row,) = route_rows(study_of(*made))
    assert [row[k].split()[0] for k in ("its own", "another's", "the base")] == [
        "0.500",
        "0.250",
        "0.250",
    ]
    assert serving_rows(study_of()) == route_rows(study_of()) == []


def test_the_base_without_a_stop_is_kept_apart(tmp_path):
    folder = tmp_path / "07_specialists"
    folder.mkdir()
    made = record(part="base")
    made.parameters["part"] = "unstopped"
    write_record(made, folder / "unstopped_dialogue.json")
    study = read_study(tmp_path)
    assert study.unstopped is not None
    assert study.grid == study.small == []
    assert first_paragraph("\n\n A text.\nMore.\n\nNo.") == "A text.\nMore."
