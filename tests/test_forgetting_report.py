"""The forgetting study's records read again, mai2025's table, and the verdicts on its claims."""

import importlib.util
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lora_kit.errors import BadInputError, CorruptFileError
from lora_kit.studies.forgetting import CENTRE, STUDY, Cell, cells, change, settings, to_bits
from lora_kit.studies.forgetting_claims import (
    AT_OUR_SCALE,
    NOT,
    NOT_AT_OURS,
    UNDECIDED,
    judge_claims,
    printed_scores,
    published,
)
from lora_kit.studies.forgetting_report import (
    NO_RECORD,
    along,
    difference_from,
    read_benchmarks,
    read_settings,
    read_shifts,
    read_study,
    three_states,
)
from lora_kit.studies.records import new_record, write_record

N = 100


def bits(right, seed=0):
    rng = np.random.default_rng(seed)
    scores = np.zeros(N)
    scores[rng.permutation(N)[:right]] = 1
    return scores.tolist()


def cell_record(cell, kept):
    """A cell whose skills go from 90 right of 100 to `kept` of those."""
    metrics, items = {"alpaca_loss_after": 2.0 - cell.replay}, []
    first = [1.0] * 90 + [0.0] * 10
    second = [1.0] * kept + [0.0] * (N - kept)
    for skill in cell.skills:
        for judge in ("strict", "flexible"):
            found, key = change(first, second), f"{skill}_{judge}"
            metrics[f"{key}_before"] = found.before.to_metric()
            metrics[f"{key}_after"] = found.after.to_metric()
            metrics[f"{key}_forgetting"] = found.rate.to_metric()
            items.append({"skill": skill, "before": to_bits(first), "after": to_bits(second)})
    parameters = {"part": "map", **cell.to_dict()}
    return new_record(
        STUDY, "c", parameters=parameters, metrics=metrics, seed=cell.seed, seconds=1.0
    )


def taught_record(seed, taught=0.9, nf4=0.6):
    """A base whose sums are right at `taught`, and at `nf4` through NF4."""
    metrics = {
        f"addition_strict_{which}": {"value": v, "stderr": 0.0, "low": v, "high": v, "n": N}
        for which, v in (("taught", taught), ("nf4", nf4))
    }
    parameters = {"part": "teach"}
    return new_record(STUDY, "c", parameters=parameters, metrics=metrics, seed=seed, seconds=1.0)


def task_record(task, which, scores, parts=None):
    metrics = {"gsm8k": ("exact_match,strict-match", "exact_match,flexible-extract")}
    metrics |= {"hellaswag": ("acc,none", "acc_norm,none"), "mmlu": ("acc,none",)}
    items = [
        {"task": name, "metric": metric, "n": len(s), "items": name, "scores": to_bits(s)}
        for metric in metrics[task]
        for name, s in (parts or {task: scores}).items()
    ]
    asked = {"version": "1", "shots": 0, "limit": None, "template": "none", "harness": "0.4.13"}
    parameters = {"part": "standard", "which": which, "task": task, **asked}
    return new_record(
        STUDY, "c", parameters=parameters, metrics={}, tables={"items": items}, seed=0, seconds=1.0
    )


def write(folder, *records):
    for i, record in enumerate(records):
        write_record(record, folder / STUDY / f"{i}.json")
    return read_study(folder)


def test_an_empty_study_says_so(tmp_path):
    study = read_study(tmp_path)
    assert read_settings(study, "addition") == []
    assert read_benchmarks(study) == []
    claims = judge_claims(study)
    assert len(claims) == 6
    assert sum(c.ours == NO_RECORD for c in claims) == 5
    assert {c.verdict for c in claims} == {NO_RECORD, NOT}


def test_settings_come_in_order_with_their_seeds(tmp_path):
    made = [replace(CENTRE, seed=s) for s in (0, 1, 2)] + [replace(CENTRE, replay=0.2)]
    study = write(tmp_path, *(cell_record(c, 30 + 10 * c.seed) for c in reversed(made)))
    found = read_settings(study, "addition")
    assert [s.cell.replay for s in found] == [0.0, 0.2]
    assert sorted(found[0].rates) == pytest.approx([1 - 50 / 90, 1 - 40 / 90, 1 - 30 / 90])
    mean, low, high = found[0].rate
    assert low < mean < high
    assert found[1].rate[0] == found[1].rate[1]  # one seed has no spread
    assert found[0].row()["seeds"] == 3
    assert found[0].row()["after"] == "0.400"


def test_along_takes_one_variable_at_a_time(tmp_path):
    study = write(tmp_path, *(cell_record(c, 50) for c in settings()))
    found = read_settings(study, "word_problems")
    assert len(found) == 10
    assert [s.cell.replay for s in along(found, "replay")] == [0.0, 0.01, 0.05, 0.2]
    assert [s.cell.rank for s in along(found, "rank")] == [4, 16, 64]
    assert [s.cell.rows for s in along(found, "rows")] == [500, 2000, 4800]


@pytest.mark.parametrize(
    ("kept", "replayed", "verdicts"),
    [
        (9, 85, (AT_OUR_SCALE, AT_OUR_SCALE)),
        (80, 70, (NOT_AT_OURS, NOT_AT_OURS)),
        (44, 44, (UNDECIDED, UNDECIDED)),
    ],
)
def test_verdicts_follow_the_records(tmp_path, kept, replayed, verdicts):
    made = [cell_record(replace(CENTRE, seed=s), kept + s) for s in range(3)]
    made += [cell_record(replace(CENTRE, seed=s, replay=0.2), replayed + s) for s in range(3)]
    claims = judge_claims(write(tmp_path, *made))
    assert (claims[0].verdict, claims[-1].verdict) == verdicts


def test_preserved_is_judged_on_the_paired_interval(tmp_path):
    base = bits(50)
    # With 100 items even no change at all leaves ±3.7 points: too few to call it preserved.
    for change_of, verdict in ((0, UNDECIDED), (20, NOT_AT_OURS)):
        tuned = [0.0 if sum(base[: i + 1]) <= change_of else s for i, s in enumerate(base)]
        made = [task_record("hellaswag", w, s) for w, s in (("base", base), ("seed0", tuned))]
        claims = judge_claims(write(tmp_path / str(change_of), *made))
        assert claims[1].verdict == verdict
        assert claims[2].verdict == NOT


def test_benchmarks_are_paired_over_items_and_parts(tmp_path):
    base = {"mmlu_anatomy": bits(30), "mmlu_college_computer_science": bits(40, 1)}
    tuned = [
        {"mmlu_anatomy": bits(35, s), "mmlu_college_computer_science": bits(40, 1)} for s in (2, 3)
    ]
    made = [task_record("mmlu", "base", None, base), task_record("mmlu", "nf4", None, base)]
    made += [task_record("mmlu", f"seed{i}", None, t) for i, t in enumerate(tuned)]
    whole, science = read_benchmarks(write(tmp_path, *made))
    assert (whole.task, whole.base.n, science.base.n) == ("mmlu", 200, 100)
    assert whole.base.value == whole.nf4 == 0.35
    assert whole.tuned == (0.375, 0.375)
    assert whole.difference.value == pytest.approx(0.025)
    assert science.difference.value == 0
    assert science.p == (1.0, 1.0)
    assert whole.row()["n"] == 200


def test_other_items_cannot_be_paired(tmp_path):
    made = [task_record("mmlu", w, None, {f"mmlu_{w}": bits(30)}) for w in ("base", "seed0")]
    with pytest.raises(BadInputError, match="items of mmlu_"):
        read_benchmarks(write(tmp_path, *made))


def test_a_record_of_no_known_part_is_refused(tmp_path):
    stray = new_record(STUDY, "c", parameters={"part": "else"}, metrics={}, seconds=1.0)
    with pytest.raises(CorruptFileError, match="'else'"):
        write(tmp_path, stray)


def test_a_run_of_the_notebook_is_passed_over(tmp_path):
    run = new_record(STUDY, "c", parameters={"MODEL": "m"}, metrics={}, seconds=1.0)
    assert str(write(tmp_path, run)).startswith("0 taught")


def test_the_printed_scores_are_those_of_the_table():
    printed = printed_scores()
    assert len(printed) == 15
    assert {(s.task, s.n) for s in printed} == {
        ("GSM8K", 1319),
        ("HellaSwag", 10_042),
        ("MMLU CS", 100),
    }
    assert published("MMLU CS", "Accuracy").base_right == 47
    assert published("GSM8K", "Flexible").p_most < 1e-50
    assert published("HellaSwag", "Normalized").p > 0.5


# ------------------------------------------------------------------ the script that makes records


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "forgetting.py"
    spec = importlib.util.spec_from_file_location("forgetting_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(tmp_path, **changes):
    made = dict(part="teach,map,standard", seeds="0,1,2", tasks="gsm8k,mmlu,hellaswag")
    made |= dict(settings=None, out=tmp_path / "out", work=tmp_path / "work")
    return Namespace(**made | changes)


def test_the_plan_is_whole_and_in_order(script, tmp_path):
    jobs = script.plan(options(tmp_path))
    names = [job["name"] for job in jobs]
    assert len(names) == len(set(names)) == 3 + 4 + 15 + 30
    assert names[:3] == ["teach_seed0", "teach_seed1", "teach_seed2"]
    maps = [name for name in names if name.startswith("map_")]
    assert maps == [f"map_{cell.name}" for cell in cells((0, 1, 2))]
    assert all(job["needs"] is None or job["needs"] in names for job in jobs)
    assert not any(job["done"] for job in jobs)


def test_what_has_its_record_is_not_made_again(script, tmp_path):
    given = options(tmp_path, part="standard", seeds="0", tasks="gsm8k")
    given.out.mkdir()
    for which in ("base", "seed0"):
        (given.out / f"standard_{which}_gsm8k.json").write_text("{}")
    left = [job["name"] for job in script.plan(given) if not job["done"]]
    assert left == ["standard_nf4_model", "standard_nf4_gsm8k"]  # nobody needs seed 0's model


def test_a_taught_base_is_made_again_only_for_cells_that_are_missing(script, tmp_path):
    given = options(tmp_path, part="map", seeds="0", settings=1)
    assert [j["name"] for j in script.plan(given) if not j["done"]] == [
        "teach_seed0",
        f"map_{Cell().name}",
    ]
    given.out.mkdir()
    (given.out / f"map_{Cell().name}.json").write_text("{}")
    assert all(job["done"] for job in script.plan(given))


def test_three_states_pair_the_taught_base_with_the_centre_of_its_seed(tmp_path):
    tuned = cell_record(CENTRE, 45)
    assert three_states(write(tmp_path, tuned), "addition") == {}  # no taught base of that seed
    found = three_states(write(tmp_path, tuned, taught_record(CENTRE.seed)), "addition")
    assert found == {CENTRE.seed: (0.9, 0.6, 0.45)}


def test_shifts_are_paired_by_seed(tmp_path):
    made = [taught_record(seed, nf4=0.5 + seed / 10) for seed in range(3)]
    made += [cell_record(replace(CENTRE, seed=s), 40 + 10 * s) for s in range(3)]
    made += [cell_record(replace(CENTRE, replay=0.2, seed=s), 50 + 10 * s) for s in range(2)]
    centre, replayed = read_shifts(write(tmp_path, *made), "addition")
    assert centre.from_centre == centre.loss == (0, 0, 0)
    # Both rise by ten points a seed: the seeds differ, their differences do not.
    assert centre.from_nf4 == pytest.approx((-0.1, -0.1, -0.1))
    assert centre.from_taught[0] == pytest.approx(-0.4)
    assert centre.from_taught[1] < -0.6
    assert replayed.seeds == (0, 1)  # the third seed has no record with replay
    assert replayed.from_centre == pytest.approx((0.1, 0.1, 0.1))
    assert replayed.loss == pytest.approx((-0.2, -0.2, -0.2))
    assert replayed.row()["less the centre"] == "+10.0 [+10.0, +10.0]"
    assert read_shifts(read_study(tmp_path / "empty"), "addition") == []


def test_a_setting_is_named_by_what_the_centre_has_not():
    told = [difference_from(s) for s in settings()]
    assert told[:3] == ["centre", "5% replay", "1% replay"]
    assert {"rate 1e-03", "rank 64", "4,800 rows"} < set(told)
    assert difference_from(replace(CENTRE, rank=4, replay=0.2)) == "rank 4, 20% replay"


def test_the_claim_on_forgetting_names_the_setting_that_forgets_most(tmp_path):
    made = [cell_record(replace(CENTRE, seed=s), 80 + s) for s in range(3)]
    made += [cell_record(replace(CENTRE, learning_rate=1e-3, seed=s), 9 + s) for s in range(3)]
    claim = judge_claims(write(tmp_path, *made))[0]
    assert claim.verdict == NOT_AT_OURS  # judged at the centre
    assert "most on the map: addition 0.89" in claim.ours
    assert claim.ours.endswith("at rate 1e-03")
