"""ECInstruct's ten tasks on a small copy of its layout: rows, prompts, answers, scores, faults."""

import json

import pytest

from lora_kit.data import DATASETS
from lora_kit.errors import BadInputError, CorruptFileError, NotAvailableError, UnknownNameError
from lora_kit.evaluate import shop_tasks
from lora_kit.evaluate.shop_metrics import UNREAD
from lora_kit.evaluate.shop_tasks import (
    SHOP_TASKS,
    as_instruction,
    check_row,
    load_ecinstruct,
    score,
    select,
    shop_task,
)
from lora_kit.studies.papers import read_table


def row(key, output, options=None, given="a product", **changes):
    made = {
        "task": SHOP_TASKS[key].spelt,
        "split": "test",
        "setting": "IND_Diverse_Instruction",
        "instruction": "Answer the question.",
        "input": given,
        "options": json.dumps(options) if options else None,
        "output": output,
    }
    return {**made, **changes}


MOODS = ["A: very positive", "B: positive", "C: neutral", "D: negative", "E: very negative"]
GAUGE = [{"attribute": "gauge", "value": "light", "source": "title"}]
ROWS = [
    row("AVE", json.dumps(GAUGE)),
    row("AVE", json.dumps([{"attribute": "colour", "value": "None", "source": "None"}])),
    row("PRP", "B", ["A: buy", "B: view", "C: similar"], task="Product_Relation_Predicition"),
    row("PM", "yes"),
    row("PM", "no"),
    row("SA", "A: very positive", MOODS),
    row("SA", "E: very negative", MOODS),
    row("SR", "T", [f"{chr(65 + i)}: thing {i}" for i in range(20)]),
    row("MPC", "B: somewhat relevant", [f"{x}: …" for x in "ABCD"]),
    row("PSI", "no", task="Product_Substitue_Identification"),
    row("QPR", "B,A"),
    row("AP", "yes"),
    row("AG", "It fits a 15 inch laptop."),
    row("PM", "yes", split="train", setting="IND_Single_Instruction"),
    row("SR", "A", [f"{chr(65 + i)}: x" for i in range(20)], setting="OOD_Diverse_Instruction"),
]


@pytest.fixture
def ecinstruct(tmp_path, monkeypatch, write_rows):
    """A local folder in ECInstruct's layout."""
    write_rows(tmp_path / "ecinstruct/train.jsonl.gz", ROWS)
    monkeypatch.setenv("LORA_KIT_DATA", str(tmp_path))
    return load_ecinstruct()


def test_the_ten_tasks_are_the_papers_columns():
    printed = [c for c in read_table("oswal2025", "table_02")["column"].drop_duplicates()]
    ours = [f"{t.key} / {t.metric}" for t in SHOP_TASKS.values()]
    spelt = {"macro F1": "Macro F1", "accuracy": "Accuracy"}
    assert printed == [next((o.replace(k, v) for k, v in spelt.items() if k in o), o) for o in ours]
    assert DATASETS["ecinstruct"].licence == "CC BY 4.0"
    assert len(DATASETS["ecinstruct"].commit) == 40


def test_every_task_loads_and_its_own_output_scores_full(ecinstruct):
    assert {check_row(r, "row").key for r in ecinstruct} == set(SHOP_TASKS)
    for task in SHOP_TASKS.values():
        if task.kind == "text":
            continue
        rows = select(ecinstruct, task.key)
        more = {"labels": [["S", "E"]]} if task.key == "QPR" else {}
        found = score(task.key, rows, [r["output"] for r in rows], **more)
        # Macro-F1 counts labels that are never due as 0, and PSI's one row is a no.
        best = {"PRP": 1 / 3, "SA": 2 / 5, "PSI": 0}.get(task.key, 1)
        assert found.score.value == pytest.approx(best), task.key
        assert (found.metric, found.unread) == (task.metric, 0)
        nothing = score(task.key, rows, ["…"] * len(rows), **more)
        assert (nothing.score.value, nothing.unread) == (0, len(rows)), task.key
        assert nothing.row()["unread"] == len(rows)


def test_rows_are_chosen_by_domain_and_instruction(ecinstruct):
    assert len(select(ecinstruct, "PM")) == 2
    assert len(select(ecinstruct, "Product_Matching", "train", instructions="Single")) == 1
    assert len(select(ecinstruct, "SR", domain="OOD")) == 1
    with pytest.raises(BadInputError, match=r"PM has no rows test OOD_Diverse.*train IND_Single"):
        select(ecinstruct, "PM", domain="OOD")
    with pytest.raises(UnknownNameError, match=r"PMM.*Did you mean"):
        select(ecinstruct, "PMM")
    assert shop_task("Query_Product_Rank").key == "QPR"


def test_options_stand_in_the_prompt(ecinstruct):
    made = as_instruction(select(ecinstruct, "SA")[0])
    assert made["input"].endswith("Options:\n" + "\n".join(MOODS))
    assert made["output"] == "A: very positive"
    from lora_kit.prompts import to_example

    assert to_example(made, "alpaca").prompt.count("E: very negative") == 1


def test_a_letter_beyond_the_rows_options_is_unread():
    three = row("SR", "B", ["A: x", "B: y", "C: z"])
    assert shop_tasks.read(SHOP_TASKS["SR"], "C", three) == "C"
    assert shop_tasks.read(SHOP_TASKS["SR"], "D", three) == UNREAD


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task": "Product_Juggling"}, "row 3: unknown task 'Product_Juggling'. Known: Attribute"),
        ({"output": "perhaps"}, "row 3: 'perhaps' is no label of Product_Matching .yes, no."),
        ({"output": " "}, "row 3: its output is empty"),
        ({"instruction": ""}, "row 3: its instruction is empty"),
        ({"split": "dev"}, "row 3: split 'dev' is none of train, val, test"),
    ],
)
def test_faulty_rows_are_named(tmp_path, monkeypatch, write_rows, changes, says):
    write_rows(tmp_path / "ecinstruct/train.jsonl.gz", [ROWS[3], ROWS[4], {**ROWS[3], **changes}])
    monkeypatch.setenv("LORA_KIT_DATA", str(tmp_path))
    with pytest.raises(CorruptFileError, match=says):
        load_ecinstruct()


def test_other_faults(tmp_path, monkeypatch, write_rows):
    for task, changes, says in (
        ("AVE", {"output": "gauge is light"}, "no JSON list of attributes"),
        ("SA", {"options": "A or B"}, "options are no JSON list"),
        ("SA", {"options": '{"A": 1}'}, "options are no JSON list"),
        ("SA", {"output": "F: elated"}, "no label of Sentiment_Analysis"),
    ):
        with pytest.raises(CorruptFileError, match=f"row 9: .*{says}"):
            check_row({**row(task, "A", MOODS), **changes}, "row 9")
    lacking = {k: v for k, v in ROWS[0].items() if k != "setting"}
    write_rows(tmp_path / "ecinstruct/train.jsonl.gz", [ROWS[0], lacking])
    monkeypatch.setenv("LORA_KIT_DATA", str(tmp_path))
    with pytest.raises(CorruptFileError, match="row 2 lacks setting"):
        load_ecinstruct()
    with pytest.raises(BadInputError, match="pass labels"):
        score("QPR", [ROWS[10]], ["A,B"])
    with pytest.raises(BadInputError, match="1 answers for 2 rows of PM"):
        score("PM", ROWS[3:5], ["yes"])
    with pytest.raises(UnknownNameError, match="scorer"):
        score("AG", [ROWS[12]], ["yes"], scorer="bleu")


def test_a_scorer_out_of_reach_says_what_to_do():
    with pytest.raises(NotAvailableError, match="pass scorer='all-minilm-l6-v2'"):
        score("AG", [ROWS[12]], ["It fits."])


def test_ranking_with_labels():
    rows, labels = [row("QPR", "B,A,C")] * 2, [["S", "E", "I"], ["S", "E", "I"]]
    full = score("QPR", rows, ["B,A,C", "B"], labels)
    assert full.unread == 0
    assert full.score.value < 1  # the second leaves out a substitute
    assert score("QPR", rows[:1], ["B,A"], labels[:1]).score.value == 1


def test_the_papers_protocol_on_a_tiny_model(ecinstruct, tiny_folder, tmp_path, monkeypatch):
    from lora_kit.data import Dataset
    from lora_kit.studies.shop_ecinstruct import training_set, tune_and_score
    from lora_kit.train import recipe

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    learnt = [{**r, "split": "train"} for r in ROWS if r["setting"].startswith("IND_D")]
    data = Dataset("ecinstruct", "train", tuple(ROWS + learnt), "folder", "x")
    chosen = training_set(data, ["PM", "SA"], rows=1)
    assert len(chosen) == 2
    assert chosen.name == "ecinstruct-pm-sa"
    spec = recipe("oswal", steps=2, batch_size=2, quantization="none", max_length=200)
    tasks, said = ["PM", "SR", "QPR"], []
    lines = tune_and_score(
        str(tiny_folder), data, tasks, spec, output=tmp_path / "a", say=said.append
    )
    assert [(x["task"], x["domain"], x["n"]) for x in lines] == [
        *(("PM", "IND", 2), ("SR", "IND", 1), ("SR", "OOD", 1))
    ]
    assert any("QPR is left out" in line for line in said)
    with_labels = tune_and_score(
        str(tiny_folder), data, ["QPR"], spec, labels=[["S", "E"]], output=tmp_path / "b"
    )
    assert with_labels[0]["metric"] == "NDCG"
    with pytest.raises(UnknownNameError):
        training_set(data, ["XX"])


def test_the_committed_examples_are_rows_of_the_ten_tasks():
    from lora_kit.data import read_jsonl
    from lora_kit.store import repository

    rows = read_jsonl(repository() / "data" / "shop" / "examples.jsonl")
    assert [check_row(r, f"row {i}").key for i, r in enumerate(rows, 1)] == list(SHOP_TASKS)
