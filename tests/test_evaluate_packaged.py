"""Local rows under lm-eval's packaged definitions: its requests, its prompts, its results."""

import gzip
import json

import datasets
import pytest
from evaluate_fixtures import byte_tokenizer, tiny

import lora_kit.evaluate.local_tasks as local_tasks
import lora_kit.evaluate.tasks as tasks_module
from lora_kit.data import load_rows
from lora_kit.errors import BadInputError, NotAvailableError, UnknownNameError
from lora_kit.evaluate import evaluate
from lora_kit.evaluate.tasks import packaged_definition, plan_tasks

HELLASWAG = [
    {
        "ind": i,
        "activity_label": "Roof shingle removal",
        "ctx_a": f"A man is sitting on a roof [header] number {i}.",
        "ctx_b": "he",
        "ctx": f"A man is sitting on a roof. number {i}. he",
        "endings": ["is  using wrap. [title] Then", "is ripping tiles off.", "holds a cube.", "x."],
        "label": str(i % 4),
    }
    for i in range(6)
]
GSM8K = [
    {"question": f"Tom has {i} eggs and buys 3. How many?", "answer": f"{i}+3\n#### {i + 3:,}"}
    for i in range(12)
]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A local data folder with a few rows in HellaSwag's and GSM8K's shape."""
    for path, rows in (
        ("hellaswag/validation.jsonl.gz", HELLASWAG),
        ("gsm8k/train.jsonl.gz", GSM8K[:8]),
        ("gsm8k/test.jsonl.gz", GSM8K[8:]),
    ):
        file = tmp_path / path
        file.parent.mkdir(exist_ok=True)
        with gzip.open(file, "wt") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
    monkeypatch.setenv("LORA_KIT_DATA", str(tmp_path))
    monkeypatch.setattr(local_tasks, "PUBLISHED", {})
    return tmp_path


def packaged_index():
    """lm-eval's own manager over the two packaged folders only (the full index takes seconds)."""
    from pathlib import Path

    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    root = Path(lm_eval.tasks.__file__).parent
    return TaskManager(include_path=[root / "hellaswag", root / "gsm8k"], include_defaults=False)


def hub_rows(splits):
    """What `datasets.load_dataset` would return for these rows."""
    return lambda *_, **__: datasets.DatasetDict(
        {k: datasets.Dataset.from_list([dict(r) for r in rows]) for k, rows in splits.items()}
    )


def requests(task, shots, seed=3):
    """Everything a task asks of a model: (kind, arguments) for each request."""
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(seed)
    task.build_all_requests(limit=None)
    return [(r.request_type, r.arguments, r.doc_id, r.idx) for r in task.instances]


def test_results_are_those_of_simple_evaluate(folder, model, tokenizer):
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    names = ["hellaswag", "gsm8k"]
    ours = evaluate(model, tokenizer, names, limit=3, seed=5)
    theirs = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
        tasks=[plan.task for plan in plan_tasks(names, limit=3)],
        task_manager=packaged_index(),
        limit=3,
        fewshot_random_seed=5,
    )
    for name in names:
        assert ours[name].num_fewshot == theirs["n-shot"][name]
        assert ours[name].version == str(theirs["versions"][name])
        for metric, found in ours[name].metrics.items():
            kind, kept = metric.split(",")
            assert found.value == theirs["results"][name][metric]
            assert found.stderr == pytest.approx(theirs["results"][name][f"{kind}_stderr,{kept}"])
        logged = [s["arguments"][0][0] for s in theirs["samples"][name]][:3]
        assert [item.prompt for item in ours[name].items] == logged


# The same questions as the packaged definitions ask


@pytest.mark.parametrize(("name", "shots"), [("hellaswag", 0), ("gsm8k", 5), ("gsm8k", 0)])
def test_local_rows_give_the_packaged_requests(folder, monkeypatch, name, shots):
    (plan,) = plan_tasks(name, num_fewshot=shots)
    ours = requests(plan.task, shots)
    splits = {
        "hellaswag": {"train": HELLASWAG[:1], "validation": HELLASWAG},
        "gsm8k": {"train": GSM8K[:8], "test": GSM8K[8:]},
    }
    monkeypatch.setattr(datasets, "load_dataset", hub_rows(splits[name]))
    packaged = packaged_index().load([name])["tasks"][name]
    assert ours == requests(packaged, shots)
    assert plan.task.VERSION == packaged.VERSION
    assert plan.task.aggregation() == packaged.aggregation()
    assert [f.name for f in plan.task._filters] == [f.name for f in packaged._filters]
    assert plan.data["source"] == "folder"


def test_packaged_prompts_are_the_templates_written_out(folder):
    (plan,) = plan_tasks("hellaswag")
    kind, (context, ending), _, _ = requests(plan.task, 0)[0]
    assert kind == "loglikelihood"
    assert context == "Roof shingle removal: A man is sitting on a roof number 0. He"
    assert ending == " is using wrap.. Then"
    (plan,) = plan_tasks("gsm8k", num_fewshot=2)
    kind, (context, options), _, _ = requests(plan.task, 2)[0]
    assert kind == "generate_until"
    assert context.endswith("Question: Tom has 8 eggs and buys 3. How many?\nAnswer:")
    assert context.count("Question: ") == 3
    assert context.count("#### ") == 2
    assert options["until"] == ["Question:", "</s>", "<|im_end|>"]


def test_gsm8k_is_scored_strictly_and_flexibly(folder, model, tokenizer, monkeypatch):
    from lora_kit.evaluate.fast_model import FastLM

    answers = ["8+3\n#### 11", "It makes 12.", "#### 12 no, 99", "none"]
    monkeypatch.setattr(FastLM, "generate_until", lambda *_, **__: answers)
    found = evaluate(model, tokenizer, "gsm8k")["gsm8k"]
    assert found.num_fewshot == 5
    assert found.scores("exact_match,strict-match") == [1, 0, 0, 0]
    assert found.scores("exact_match,flexible-extract") == [1, 1, 0, 0]
    assert evaluate(model, tokenizer, "gsm8k", num_fewshot=0)["gsm8k"].num_fewshot == 0


@pytest.mark.data
@pytest.mark.parametrize(("name", "splits"), [("hellaswag", ["validation"])])
def test_real_rows_give_the_packaged_requests(name, splits, monkeypatch):
    rows = {split: load_rows(name, split, limit=100).rows for split in splits}
    (plan,) = plan_tasks(name, limit=100)
    monkeypatch.setattr(datasets, "load_dataset", hub_rows({"train": rows[splits[0]], **rows}))
    packaged = packaged_index().load([name])["tasks"][name]
    assert requests(plan.task, 0) == requests(packaged, 0)
    assert plan.available == 10_042


def test_without_local_rows_the_packaged_task_reads_the_hub(monkeypatch, model, tokenizer):
    monkeypatch.delenv("LORA_KIT_DATA", raising=False)
    monkeypatch.setattr(tasks_module, "_hub_index", packaged_index)
    rows = {"train": HELLASWAG[:2], "validation": HELLASWAG}
    monkeypatch.setattr(datasets, "load_dataset", hub_rows(rows))
    found = evaluate(model, tokenizer, "hellaswag", limit=2)["hellaswag"]
    assert (len(found), found.available) == (2, 6)
    assert found.data["source"] == "hub"
    assert found.data["path"] == "Rowan/hellaswag"


def test_an_unreachable_hub_and_an_unknown_name(monkeypatch, model, tokenizer):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.delenv("LORA_KIT_DATA", raising=False)
    monkeypatch.setattr(tasks_module, "_hub_index", packaged_index)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(NotAvailableError, match="LORA_KIT_DATA"):
        evaluate(model, tokenizer, "hellaswag")
    with pytest.raises(UnknownNameError, match="Did you mean 'hellaswag'"):
        evaluate(model, tokenizer, "helaswag")


def test_the_packaged_definition_is_read_not_copied():
    assert packaged_definition("hellaswag")["doc_to_text"] == "{{query}}"
    assert callable(packaged_definition("hellaswag")["process_docs"])


def test_shots_that_the_folder_cannot_give_are_refused(folder, model, tokenizer):
    with pytest.raises(BadInputError, match="no training rows of hellaswag"):
        evaluate(model, tokenizer, "hellaswag", num_fewshot=5)
