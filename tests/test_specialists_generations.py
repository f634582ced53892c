"""Stored generations: the paper's formats, judged again without a model, refused when of another
test; code rows cleaned of HumanEval; tasks whose parts share no row."""

import json

import pytest

from lora_kit import store
from lora_kit.errors import BadInputError, CorruptFileError, NotAvailableError, UnknownNameError
from lora_kit.evaluate.humaneval import load_problems
from lora_kit.studies import specialists_generations as generations
from lora_kit.studies.specialists_generations import (
    FORMATS,
    judge,
    pack,
    read_generations,
    score_generations,
    unpack,
    write_generations,
)
from lora_kit.studies.specialists_tasks import (
    AT_HAND,
    TASKS,
    TESTS,
    boxed,
    clean_python,
    is_python,
    missing_data,
    task_rows,
)
from lora_kit.studies.specialists_tasks import tests_of as asked_tests

NUMBERS = TESTS["sums"]


def sums(n=3):
    return NUMBERS.items()[:n]


def write_sums(folder, answers=None):
    items = sums()
    answers = answers or [[row["completion"]] for row in items]
    return write_generations(folder, NUMBERS, items, answers, model="tiny", seed=0)


# ------------------------------------------------------------------ formats and round trips


def test_numbers_round_trip(tmp_path):
    answers = [[sums()[0]["completion"], " #### 1"], [" No idea.", " 3"], [" #### 7", " #### 7"]]
    path = write_sums(tmp_path, answers)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 6
    assert set(lines[0]) == set(FORMATS["number"])
    direct = judge(NUMBERS, sums(), answers)
    assert score_generations(path) == direct
    assert direct.values["strict"][0] == 0.5
    assert direct.values["strict any"][0] == 1.0
    test, _, again, facts = read_generations(path)
    assert (test, again, facts["about"]) == (NUMBERS, answers, {"model": "tiny", "seed": 0})


def test_majority_is_the_most_frequent_number():
    (item,) = sums(1)
    right = item["completion"]
    judged = judge(NUMBERS, [item], [[" #### 999", right, right]])
    assert judged.values["strict majority"] == [1.0]
    assert judged.values["strict"] == [pytest.approx(2 / 3)]
    judged = judge(NUMBERS, [item], [[" #### 999", " #### 999", right]])
    assert judged.values["strict majority"] == [0.0]
    assert judged.values["strict any"] == [1.0]


def test_summaries_keep_the_papers_fields(tmp_path):
    test = TESTS["dialogue"]
    items = [
        {"id": f"d{i}", "article": "A: hi", "references": [f"they greet {i}", "a greeting"]}
        for i in range(3)
    ]
    answers = [["they greet 0"], ["a greeting"], ["nothing of it"]]
    path = write_generations(tmp_path, test, items, answers)
    line = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    assert list(line)[:4] == ["article_id", "article", "generated_summary", "reference_summary"]
    judged = score_generations(path)
    assert judged.values["rouge1"] == [1.0, 1.0, 0.0]  # the best of the references counts


def test_code_is_judged_in_the_sandbox_and_a_program_that_hangs_is_ended(tmp_path):
    problems = load_problems(2)
    items = [{"id": p.task_id, "prompt": p.prompt, "problem": p} for p in problems]
    answers = [[problems[0].solution], ["    import time\n    time.sleep(600)\n"]]
    path = write_generations(tmp_path, TESTS["humaneval"], items, answers)
    assert set(json.loads(path.read_text().splitlines()[0])) == {"task_id", "completion"}
    judged = score_generations(path)
    if judged.note:  # no sandbox on this machine: nothing was run, and that is said
        assert judged.values == {}
        assert "not judged on this machine" in judged.note
    else:
        assert judged.values == {"pass@1": [1.0, 0.0]}


# ------------------------------------------------------------------ refusals


def test_another_version_is_refused(tmp_path, monkeypatch):
    path = write_sums(tmp_path)
    newer = generations.TESTS["sums"].__class__(**{**vars(NUMBERS), "version": "2"})
    monkeypatch.setitem(generations.TESTS, "sums", newer)
    with pytest.raises(
        BadInputError, match="answers version 1 of sums, and this kit has version 2"
    ):
        score_generations(path)


def test_other_items_are_refused(tmp_path):
    path = write_sums(tmp_path)
    lines = path.read_text(encoding="utf-8").splitlines()
    changed = json.loads(lines[1]) | {"answer": " #### 5000"}
    store.write_text(path, "\n".join([lines[0], json.dumps(changed), lines[2]]) + "\n")
    with pytest.raises(BadInputError, match="answers other items"):
        score_generations(path)


def test_torn_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(NotAvailableError, match="beside it are both needed"):
        score_generations(tmp_path / "nothing.jsonl")
    path = write_sums(tmp_path)
    whole = path.read_text(encoding="utf-8").splitlines()
    store.write_text(path, "\n".join(whole[:2]) + "\n")
    with pytest.raises(CorruptFileError, match="2 lines, not 3 items × 1 answers"):
        score_generations(path)
    store.write_text(path, "\n".join([whole[0], '{"task_id": 1}', whole[2]]) + "\n")
    with pytest.raises(CorruptFileError, match="line 2 lacks problem_id"):
        score_generations(path)
    facts = store.read_json(path.with_suffix(".json"))
    store.write_json(path.with_suffix(".json"), {**facts, "test": "smus"})
    with pytest.raises(UnknownNameError, match="sums"):
        score_generations(path)
    with pytest.raises(BadInputError, match="has 3 items"):
        judge(NUMBERS, sums(), [["a"], ["b", "c"], ["d"]])


def test_rescoring_names_what_it_refuses(tmp_path, monkeypatch, capsys):
    import types

    benchmark = load_benchmark()
    write_sums(tmp_path / "good")
    bad = write_sums(tmp_path / "bad")
    facts = store.read_json(bad.with_suffix(".json"))
    store.write_json(bad.with_suffix(".json"), {**facts, "version": "0"})
    with pytest.raises(SystemExit, match="1 of 2 files were refused"):
        benchmark.rescore(types.SimpleNamespace(rescore=tmp_path, into=None))
    told = capsys.readouterr().out
    assert "strict 1.000" in told
    assert "refused: " in told


def test_what_could_not_be_judged_is_judged_later(tmp_path):
    """A machine without a sandbox keeps the answers; the record gets its scores elsewhere."""
    import types

    from lora_kit.studies.records import new_record, read_record, write_record

    work, records = tmp_path / "work", tmp_path / "records"
    write_sums(work / "cell_seed0" / "generations")
    write_sums(work / "judged_seed0" / "generations")
    about = {"parameters": {"unjudged": {"sums": "no sandbox"}}, "metrics": {}, "seconds": 1.0}
    write_record(new_record("07_specialists", "a test", **about), records / "cell_seed0.json")
    whole = new_record("07_specialists", "a test", parameters={}, metrics={"x": 1.0}, seconds=1.0)
    write_record(whole, records / "judged_seed0.json")
    benchmark = load_benchmark()
    benchmark.rescore(types.SimpleNamespace(rescore=work, into=records))
    found = read_record(records / "cell_seed0.json")
    assert found.metrics["sums strict"].value == 1.0
    assert "unjudged" not in found.parameters
    assert unpack(found.tables["items"][0]["scores"]) == [1.0, 1.0, 1.0]
    assert read_record(records / "judged_seed0.json") == whole
    with pytest.raises(SystemExit, match="no stored generations"):
        benchmark.rescore(types.SimpleNamespace(rescore=work, into=records))


def load_benchmark():
    import importlib.util
    from pathlib import Path

    place = Path(__file__).parent.parent / "benchmarks" / "specialists.py"
    spec = importlib.util.spec_from_file_location("benchmark_specialists", place)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    return benchmark


def test_packed_scores():
    for values in ([1.0, 0.0, 1.0], [0.125, 1.0, 0.0], [0.1], [1.0]):
        assert unpack(pack(values)) == pytest.approx(values)
    with pytest.raises(BadInputError, match="no packed scores"):
        unpack("1, 2")


# ------------------------------------------------------------------ rows


def code_row(instruction, output, given=""):
    return {"instruction": instruction, "input": given, "output": output}


def test_python_is_told_from_other_languages():
    assert is_python(code_row("Write a Python loop", "for i in x: pass"))
    assert is_python(code_row("Add two numbers", "def add(a, b):\n    return a + b"))
    assert not is_python(code_row("Write a JavaScript function", "def x(): pass"))
    assert not is_python(code_row("List the users", "SELECT * FROM users"))


def test_cleaning_drops_repeats_and_what_overlaps_with_humaneval():
    problem = load_problems(1)[0]
    long = "def f(a, b):\n    total = a * b + a - b\n    return [total, total + 1, a]"
    rows = [
        code_row("Python: multiply", long),
        code_row("Python: multiply", "def g(): return 1"),  # the same instruction
        code_row("Another Python task", long.replace("    ", "\t")),  # the same answer, respaced
        code_row("Python: close elements", problem.prompt + problem.solution),
        code_row("A Python helper", "def has_close_elements(numbers, threshold):\n    return 0"),
        code_row("Python for loop", "for i in range(len(x)):\n    print(i)"),
        code_row("Sort in Java", "class A {}"),
    ]
    cleaned = clean_python(rows, load_problems())
    assert [r["instruction"] for r in cleaned.rows] == ["Python: multiply", "Python for loop"]
    assert (cleaned.repeated, cleaned.other_language) == (2, 1)
    assert cleaned.overlapping == ("HumanEval/0", "HumanEval/0")


def test_boxed_answers():
    assert boxed(r"so \boxed{4} or rather $\boxed{\frac{1}{2}}$.") == r"\frac{1}{2}"
    assert boxed("no box") is None
    assert boxed(r"\boxed{open") is None


def test_generated_tasks_share_no_row():
    for name in ("words", "sums"):
        learnt, held = task_rows(name, 500, 100, 0)
        asked = {row["prompt"] for row in TESTS[name].items()}
        prompts = {row["prompt"] for row in learnt}
        assert not prompts & {row["prompt"] for row in held}
        assert not prompts & asked
        other, same = task_rows(name, 500, 100, 1)
        assert [r["prompt"] for r in other] != [r["prompt"] for r in learnt]
        assert same.fingerprint == held.fingerprint
    with pytest.raises(UnknownNameError, match="gsm8k"):
        task_rows("gsmk8", 10, 10, 0)


@pytest.mark.data
def test_tasks_at_hand_share_no_row():
    for name in ("gsm8k", "code", "dialogue"):
        assert not missing_data(TASKS[name].needs)
        learnt, held = task_rows(name, 10_000, 300, 0)
        prompts = {row["prompt"] for row in learnt}
        assert not prompts & {row["prompt"] for row in held}
        for test in TASKS[name].tests:
            assert not prompts & {row["prompt"] for row in TESTS[test].items()}
    whole, _ = task_rows("all", 900, 90, 0)
    starts = [sum(r["prompt"].startswith(s) for r in whole) for s in ("Question", "Below", "Summ")]
    assert starts == [300, 300, 300]
    code = task_rows("code", 10_000, 300, 0)[0].rows
    assert (
        clean_python(
            [code_row("python", r["completion"]) for r in code[:300]], load_problems()
        ).overlapping
        == ()
    )


def test_tests_of_a_cell():
    assert asked_tests("gsm8k", "loss") == []
    assert asked_tests("gsm8k", "own") == ["gsm8k", "words"]
    assert asked_tests("all", "own") == list(AT_HAND)
    assert asked_tests("sums", "all") == [
        "sums",
        "words",
        "humaneval",
    ]  # the others have no data here


def test_the_papers_sets_are_read_as_the_hub_has_them(tmp_path, monkeypatch, write_rows):
    """Small copies of MATH's, Dolly's and CNN/DailyMail's layout: rows, prompts, references."""
    monkeypatch.setenv("LORA_KIT_DATA", str(tmp_path))
    problem = {"level": "Level 1", "type": "Algebra"}
    write_rows(
        tmp_path / "math" / "train.jsonl.gz",
        [
            problem | {"problem": f"Find {n}.", "solution": rf"It is $\boxed{{{n}}}$."}
            for n in range(6)
        ]
        + [problem | {"problem": "Prove it.", "solution": "Clear."}],
    )
    learnt, held = task_rows("math", 100, 100, 0)
    assert len(learnt) + len(held) == 6  # a proof has no answer to match
    assert all(r["prompt"].startswith("Question: Find") for r in learnt)
    assert all("\n#### " in r["completion"] for r in learnt)
    dolly = {"instruction": "Who?", "response": "She."}
    kinds = ["closed_qa", "information_extraction", "brainstorming", "closed_qa"]
    write_rows(
        tmp_path / "dolly" / "train.jsonl.gz",
        [dolly | {"context": f"Text {i}.", "category": k} for i, k in enumerate(kinds)],
    )
    learnt, held = task_rows("text", 100, 100, 0)
    assert len(learnt) + len(held) == 3
    assert "### Input:\nText" in learnt[0]["prompt"]
    news = {"id": "a1", "article": "word " * 5000, "highlights": "Short."}
    write_rows(tmp_path / "cnn_dailymail" / "validation.jsonl.gz", [news])
    (item,) = TESTS["news"].items()
    assert item["references"] == ["Short."]
    assert len(item["prompt"]) < 6500 < len(item["article"])
