"""Paired answers of the specialists study: known differences come out, holes are left out."""

import numpy as np
import pandas as pd
import pytest

from lora_kit.architectures import architecture
from lora_kit.errors import BadInputError
from lora_kit.evaluate.statistics import estimate
from lora_kit.studies.records import new_record, write_record
from lora_kit.studies.specialists import cell_from
from lora_kit.studies.specialists_compare import (
    adapter,
    by_alpha,
    gains_over_base,
    loss_by_size,
    paper_steps,
    pick_at_size,
    route_rows,
    rule_slopes,
    score_step,
    serving_rows,
)
from lora_kit.studies.specialists_generations import pack
from lora_kit.studies.specialists_measures import first_paragraph
from lora_kit.studies.specialists_report import Study, read_study


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


def test_alpha_is_scale_times_rank():
    frame = by_alpha(study_of(*losses(lambda r, rule: 1.0)), "gsm8k")
    assert set(frame[frame["scaling"] == "fixed"]["alpha"]) == {16}
    assert set(frame[frame["scaling"] == "constant"]["alpha"]) == {8, 32}
    assert by_alpha(study_of(), "gsm8k").empty


def test_what_fits_is_the_largest_that_was_run():
    study = study_of(*losses(lambda r, rule: 1.0))
    rows = {(r["MB allowed"], r["placement"]): r for r in pick_at_size(study)}
    assert rows[1.0, "all"]["rank run"] == "none so small"
    assert rows[5.0, "all"]["rank run"] == 8
    assert rows[20.0, "all"]["rank run"] == 32
    assert rows[20.0, "all"]["loss, code"] == "not run"
    assert rows[20.0, "mlp"]["rank run"] == "none so small"
    assert {r["rank run"] for r in pick_at_size(study_of())} == {"none so small"}
    sizes = loss_by_size(study, architecture("smollm2-135m"))
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
