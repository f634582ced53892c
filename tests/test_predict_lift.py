"""`lora-kit predict-lift`: the forecast, its interval, and what it says about itself."""

import json

import numpy as np
import pytest

from lora_kit.cli import main
from lora_kit.errors import BadInputError
from lora_kit.studies import predict_lift as study
from lora_kit.studies.complexity import Complexity
from lora_kit.studies.lora_land import printed_heuristics, quality_measures

ROWS = [
    {
        "prompt": f"Is {i} an even number? Answer yes or no. " * 3,
        "completion": "yes no".split()[i % 2],
    }
    for i in range(60)
]


def complexity_of(task):
    return Complexity(dict(printed_heuristics().loc[task]), 100, "words")


@pytest.mark.parametrize("task", ["gsm8k", "wikisql", "boolq"])
def test_a_task_of_the_31_is_its_own_nearest(task):
    first, second, _ = study.nearest_tasks(complexity_of(task))
    assert first.task == task
    assert first.distance == pytest.approx(0)
    assert second.distance > 0
    assert first.lift == pytest.approx(first.tuned - first.base)
    assert first.tuned == pytest.approx(quality_measures().loc[task, study.TUNED])


def test_distance_by_hand():
    from lora_kit.studies.land_models import logged

    z = logged(printed_heuristics())
    z = (z - z.mean()) / z.std(ddof=0)
    found = {n.task: n.distance for n in study.nearest_tasks(complexity_of("mmlu"), 31)}
    assert found["drop"] == pytest.approx(np.linalg.norm(z.loc["mmlu"] - z.loc["drop"]))


def test_reach_is_the_jackknifes():
    errors = np.arange(1, 32) / 100 * np.where(np.arange(31) % 2, 1, -1)
    assert study.reach(errors, 0.9) == pytest.approx(0.29)  # ⌈0.9·32⌉ = 29th of 31
    assert study.reach(errors, 0.999) == pytest.approx(0.31)


@pytest.mark.parametrize("measure", [study.BASE, study.TUNED])
def test_intervals_cover_what_they_promise_on_left_out_tasks(measure):
    kind = "log ridge" if measure == study.BASE else "mean"
    errors = study.errors_left_out(measure, kind)
    covered = (np.abs(errors) <= study.reach(errors)).mean()
    assert 0.9 <= covered <= 0.97


def test_forecast_without_and_with_a_base_score():
    plain = study.predict_lift(ROWS)
    assert plain.base.kind == "log ridge"
    assert plain.base.over_mean < 0.8
    assert plain.tuned.kind == plain.lift.kind == "mean"
    assert plain.lift.over_mean == 1
    assert plain.tuned.value == pytest.approx(quality_measures()[study.TUNED].mean())
    for f in (plain.base, plain.tuned, plain.lift):
        assert f.low <= f.value <= f.high
    known = study.predict_lift(ROWS, base_score=0.2)
    assert known.tuned.kind == "base score"
    assert known.tuned.over_mean < 0.9
    assert known.base.value == known.base.low == known.base.high == 0.2
    assert known.lift.kind == "difference"
    assert known.lift.value == pytest.approx(known.tuned.value - 0.2)
    assert known.tuned.high - known.tuned.low < plain.tuned.high - plain.tuned.low


def test_a_better_base_is_expected_to_stay_better_and_to_gain_less():
    found = [study.predict_lift(ROWS, base_score=s) for s in (0.1, 0.4, 0.7)]
    tuned, lift = [f.tuned.value for f in found], [f.lift.value for f in found]
    assert tuned == sorted(tuned)
    assert lift == sorted(lift, reverse=True)


def test_what_lies_outside_is_named():
    short = study.predict_lift([{"prompt": "a b", "completion": "c"}] * 20)
    names = [name for name, *_ in short.outside]
    assert "examples" in names
    assert "input_mean" in names
    assert "output_mean" not in names
    text = study.format_forecast(short)
    assert "# training examples (20) lies outside the 31 tasks (635 to 5.6e+05)" in text
    assert "do not foretell the lift" in text


def test_base_score_out_of_range():
    for wrong in (-0.1, 34, float("nan")):
        with pytest.raises(BadInputError, match="between 0 and 1"):
            study.predict_lift(ROWS, base_score=wrong)


def test_command_line(tmp_path, capsys):
    path = tmp_path / "mine.jsonl"
    rows = [{"question": r["prompt"], "answer": r["completion"]} for r in ROWS] + [
        {"question": "?"}
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    words = [
        "predict-lift",
        str(path),
        "--field",
        "question=prompt",
        "--field",
        "answer=completion",
    ]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--base-score", "0.4"])
    out = capsys.readouterr().out
    assert ended.value.code in (0, None)
    assert "left out: 1 row(s), the first is 61" in out
    assert "60 rows, 60 of them read; lengths in words and signs" in out
    assert "you measured it" in out
    assert "a line over the base score" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.jsonl"], "There is no file nowhere.jsonl"),
        (["gsm8"], "Did you mean 'gsm8k'"),
    ],
)
def test_command_line_errors_are_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["predict-lift", *words])
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
