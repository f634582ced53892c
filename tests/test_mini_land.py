"""The miniature LoRA Land: its rows, its scores, and its script from model to record."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from lora_kit.data import DATASETS
from lora_kit.errors import BadInputError, CorruptFileError, NotAvailableError, UnknownNameError
from lora_kit.studies.mini_land import MINI_TASKS, mini_rows, missing_data, score_answers
from lora_kit.studies.mini_records import score_unit
from lora_kit.studies.records import read_record, write_record

GENERATED = [name for name, task in MINI_TASKS.items() if task.needs is None]
REAL = [name for name, task in MINI_TASKS.items() if task.needs is not None]


def test_enough_tasks_of_every_kind():
    assert len(MINI_TASKS) >= 12
    assert {task.category for task in MINI_TASKS.values()} == {
        *("Classic NLP", "Coding", "Knowledge", "Reasoning", "Math"),
    }
    for name in REAL:
        known, *splits = MINI_TASKS[name].needs
        assert set(splits) <= set(DATASETS[known].splits)


@pytest.mark.parametrize("name", GENERATED)
def test_generated_rows(name):
    train, test = mini_rows(name, 50, 20, 1)
    assert (len(train), len(test)) == (50, 20)
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in test}
    assert train.fingerprint == mini_rows(name, 50, 20, 1)[0].fingerprint
    check_own_answers(name, test)


@pytest.mark.data
@pytest.mark.parametrize("name", REAL)
def test_rows_of_real_sets(name):
    if missing := missing_data(MINI_TASKS[name]):
        pytest.skip(f"LORA_KIT_DATA has no {missing}")
    train, test = mini_rows(name, 60, 40, 0)
    assert (len(train), len(test)) == (60, 40)
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in test}
    assert {tuple(r) for r in train} == {("prompt", "completion")}
    check_own_answers(name, test)
    if name == "amazon_google":  # balanced: always "no" is worth a half
        answers = [r["completion"] for r in test]
        assert answers.count(" yes") == answers.count(" no") == 20


def check_own_answers(name, rows):
    """Every expected answer earns a full score, also with chatter behind it, where labels are."""
    task, wanted = MINI_TASKS[name], [r["completion"] for r in rows]
    assert score_answers(task, wanted, wanted) == pytest.approx([1] * len(wanted))
    assert max(score_answers(task, [""] * len(wanted), wanted)) == 0
    if task.metric == "accuracy":
        assert {w.strip() for w in wanted} <= set(task.labels)
        assert score_answers(task, [f"{w}. I am sure." for w in wanted], wanted) == [1] * len(
            wanted
        )


def test_absent_data_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_KIT_DATA", str(tmp_path))
    with pytest.raises(NotAvailableError, match="mmlu needs mmlu/test; point LORA_KIT_DATA"):
        mini_rows("mmlu", 5, 5, 0)
    with pytest.raises(UnknownNameError, match="Did you mean 'topic'"):
        mini_rows("topics", 5, 5, 0)
    with pytest.raises(BadInputError, match="at least 1"):
        mini_rows("topic", 0, 5, 0)


@pytest.mark.parametrize(
    ("task", "answer", "expected", "score"),
    [
        ("entail", " Unknown, I think; yes is wrong", " unknown", 1),  # the first label counts
        ("entail", " The answer: no", " yes", 0),
        ("entail", " nothing", " no", 0),  # a label is a word, not a part of one
        ("mmlu", " 10 or 3", " 3", 1),
        ("mmlu", " I do not know", " 1", 0),
        ("addition", " 46\n47", "46", 1),
        ("addition", "46 apples", "46", 0),
        ("gsm8k", " so 3 + 4 = 7\n#### 1,234", " x\n#### 1234", 1),
        ("gsm8k", " 5 cars cost $1,234.50 each", " #### 1234.5", 1),  # else the last number
        ("gsm8k", " many", " #### 3", 0),
        ("gsm8k", " #### 7 and then 9", " #### 7", 1),
    ],
)
def test_scores_of_labels_and_numbers(task, answer, expected, score):
    assert score_answers(MINI_TASKS[task], [answer], [expected]) == [score]


def test_rouge_is_rouge_scores():
    task = MINI_TASKS["dialogsum"]
    assert score_answers(task, ["the cat sat"], ["the cat stood"]) == pytest.approx([2 / 3])
    with pytest.raises(BadInputError, match="1 answers for 2"):
        score_answers(task, ["a"], ["a", "b"])


# ---------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "lora_land_mini.py"
    spec = importlib.util.spec_from_file_location("lora_land_mini", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def arguments(script, tiny_folder, tmp_path, monkeypatch):
    def make(*words):
        given = ["--model", str(tiny_folder), "--tasks", "topic,meaning", "--seeds", "2"]
        given += ["--steps", "2", "--test-rows", "3", "--answers", str(tmp_path / "answers")]
        given += ["--records", str(tmp_path / "records"), *words]
        monkeypatch.setattr(sys, "argv", ["lora_land_mini.py", *given])
        return script.arguments()

    return make


def test_from_model_to_record(script, arguments, tmp_path, capsys):
    args = arguments()
    script.one_unit(args, "topic", 0)
    kept = tmp_path / "answers" / "topic_s0.json"
    facts = json.loads(kept.read_text())
    assert len(facts["base_answers"]) == len(facts["tuned_answers"]) == 3
    assert [step for step, _ in facts["losses"]] == [1, 2]
    assert facts["spec"]["rank"] == 8
    assert facts["spec"]["learning_rate"] == 2e-3
    assert facts["train_rows"] == 32
    script.score_all(args)
    record = read_record(tmp_path / "records" / "topic_s0.json")
    assert record.study == "09_lora_land"
    assert record.parameters["task"] == "topic"
    assert record.metrics["lift"].n == 3
    assert record.metrics["lift"].value == pytest.approx(
        record.metrics["tuned"].value - record.metrics["base"].value
    )
    assert record.metrics["heuristic_examples"] == 32
    assert "topic" in capsys.readouterr().out
    assert script.units(args) == [("meaning", 0), ("topic", 0), ("meaning", 1), ("topic", 1)]


def test_a_task_is_taken_once(script, tmp_path):
    assert script.claim(tmp_path / "topic_s0")
    assert not script.claim(tmp_path / "topic_s0")


def test_what_is_kept_is_not_run_again(script, arguments, tmp_path, capsys):
    args = arguments("--seeds", "1", "--tasks", "topic")
    script.one_unit(args, "topic", 0)
    assert script.answer_all(args, 0.0) == 0
    assert "1 of 1 are there already" in capsys.readouterr().out


def test_scores_know_their_rows(script, arguments, tmp_path):
    script.one_unit(arguments(), "topic", 0)
    facts = json.loads((tmp_path / "answers" / "topic_s0.json").read_text())
    facts["base_answers"] = [r["completion"] for r in mini_rows("topic", 32, 3, 0)[1]]
    facts["tuned_answers"] = ["sport"] * 3
    record = score_unit(facts)
    assert record.metrics["base"].value == 1
    assert record.metrics["lift"].value <= 0
    assert write_record(record, tmp_path / "r.json").exists()
    with pytest.raises(CorruptFileError, match="test rows of topic are no longer those"):
        score_unit({**facts, "test_fingerprint": "0" * 16})


def test_unknown_tasks_are_refused_before_any_work(arguments, capsys):
    with pytest.raises(SystemExit):
        arguments("--tasks", "topic,topics")
    assert "no such task: topics" in capsys.readouterr().err


# ---------------------------------------------------------------- what the records say


def made_records(tasks=8, seeds=2):
    """Records of a study in which lift is exactly the output's length over 100."""
    from lora_kit.studies.complexity import HEURISTICS
    from lora_kit.studies.records import new_record

    records = []
    for i in range(tasks):
        for seed in range(seeds):
            values = {f"heuristic_{name}": float((i * 7) % tasks + 1) for name in HEURISTICS}
            values["heuristic_output_mean"] = float(i + 1)
            values["heuristic_output_std"] = 0.0
            lift = (i + 1 + 0.1 * seed) / 100
            metric = {"value": lift, "low": lift - 0.05, "high": lift + 0.05, "n": 20}
            records.append(
                new_record(
                    "09_lora_land",
                    "made",
                    parameters={"task": f"t{i}", "category": "Math", "metric": "exact"}
                    | {"generated": True, "steps": 80, "quantization": "nf4"},
                    metrics={
                        "base": {"value": 0.1},
                        "tuned": {"value": 0.1 + lift},
                        "lift": metric,
                        **values,
                    },
                    seed=seed,
                    seconds=1.0,
                    hardware={},
                )
            )
    return records


def test_table_of_tasks_and_its_correlations():
    from lora_kit.studies.mini_records import mini_table, same_heuristics, transfer

    table = mini_table(made_records())
    assert table["seeds"].tolist() == [2] * 8
    assert table.loc["t3", "lift"] == pytest.approx(0.0405)
    assert table.loc["t3", "lift_low"] == pytest.approx(-0.01)
    assert table.loc["t3", "lift_high"] == pytest.approx(0.091)
    found = same_heuristics(table)
    assert found.loc["output_mean", "mini"] == pytest.approx(1)
    assert found["p_holm"].min() < 0.05
    assert "output_std" not in found.index  # the same for every task: no correlation
    assert found.loc["examples", "paper"] == pytest.approx(0.38, abs=0.3)
    told = transfer(table)
    assert told["mean"].nunique() == 1
    assert told["ridge"].between(-1, 1).all()
    with pytest.raises(BadInputError, match="2 tasks are too few"):
        same_heuristics(mini_table(made_records(2)))


def test_runs_of_other_lengths_stand_in_no_table_together():
    from lora_kit.studies.mini_records import alike

    long, short = made_records(3), made_records(4)
    for record in short:
        record.parameters["steps"] = 32
    assert alike(long + short) == (short, long)
    assert alike(long + short[:6]) == (long, short[:6])  # of two as large the longer runs
    for record in short:
        record.parameters |= {"steps": 80, "quantization": "none"}
    assert alike(long + short) == (short, long)
    assert alike([]) == ([], [])
