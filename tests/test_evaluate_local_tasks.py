"""Tasks over local rows, generated rows and texts: asked and scored as lm-eval would."""

import gzip
import itertools
import json
import math
import re

import datasets
import numpy as np
import pytest
import torch
from lora_fixtures import tiny_llama

from lora_kit.data import Dataset, load_rows
from lora_kit.errors import BadInputError, CorruptFileError, NotAvailableError, UnknownNameError
from lora_kit.evaluate import compare, evaluate, local_tasks
from lora_kit.evaluate.local_tasks import PUBLISHED, known_tasks, local_task, members
from lora_kit.evaluate.tasks import generated_task, plan_tasks

SUBJECTS = ("anatomy", "astronomy")


def question(subject, i):
    return {
        "subject": subject,
        "question": f" Which of these is {subject} {i}? ",
        "choices": [f"choice {c}{i}" for c in "wxyz"],
        "answer": i % 4,
    }


DEV = [question(s, i) for s in ("virology", *SUBJECTS) for i in range(6)]
TEST = [question(s, i) for s in SUBJECTS for i in range(10, 10 + (5 if s == "anatomy" else 3))]


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    ids = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return tiny_llama(
        vocab_size=300,
        max_position_embeddings=2048,
        initializer_range=0.2,
        bos_token_id=None,
        **ids,
    ).eval()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A local folder with a few questions of two MMLU subjects, which passes for published."""
    (tmp_path / "mmlu").mkdir()
    for split, rows in (("dev", DEV), ("test", TEST)):
        write(tmp_path / "mmlu" / f"{split}.jsonl.gz", rows)
    monkeypatch.setenv("LORA_KIT_DATA", str(tmp_path))
    monkeypatch.setattr(local_tasks, "PUBLISHED", {})
    monkeypatch.setattr(local_tasks, "_subjects", lambda: dict.fromkeys(SUBJECTS, "stem"))
    return tmp_path


def write(path, rows):
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def packaged(name, splits, monkeypatch):
    """lm-eval's own task object, its loader given these rows."""
    from pathlib import Path

    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    folder = Path(lm_eval.tasks.__file__).parent / local_task(name).definition
    made = {k: datasets.Dataset.from_list([dict(r) for r in rows]) for k, rows in splits.items()}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(made))
    manager = TaskManager(include_path=folder.parent, include_defaults=False)
    return manager.load([name])["tasks"][name]


def asked(task, shots, chat=None):
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(3)
    options = {}
    if chat:
        options = dict(apply_chat_template=True, fewshot_as_multiturn=True, chat_template=chat)
    task.build_all_requests(limit=None, **options)
    return [(r.request_type, r.arguments, r.doc_id, r.idx) for r in task.instances]


def written_chat(turns, **_):
    return "".join(f"<{t['role']}>{t['content']}" for t in turns)


# MMLU


@pytest.mark.parametrize(("shots", "chat"), [(5, None), (0, None), (2, written_chat)])
def test_mmlu_asks_what_the_packaged_subject_asks(folder, monkeypatch, shots, chat):
    (plan,) = plan_tasks("mmlu_anatomy", num_fewshot=shots)
    ours = asked(plan.task, shots, chat)
    own = {"dev": DEV, "test": TEST}
    rows = {k: [r for r in v if r["subject"] == "anatomy"] for k, v in own.items()}
    theirs = packaged("mmlu_anatomy", rows, monkeypatch)
    assert ours == asked(theirs, shots, chat)
    assert (plan.task.VERSION, plan.available) == (theirs.VERSION, 5)
    assert plan.task.aggregation() == theirs.aggregation()


def test_mmlu_prompts_are_the_template_written_out(folder):
    (plan,) = plan_tasks("mmlu_anatomy", num_fewshot=1)
    kind, (context, ending), _, _ = asked(plan.task, 1)[1]
    assert (kind, ending) == ("loglikelihood", " B")
    assert context == (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        "Which of these is anatomy 0?\nA. choice w0\nB. choice x0\nC. choice y0\nD. choice z0\n"
        "Answer: A\n\n"
        "Which of these is anatomy 10?\nA. choice w10\nB. choice x10\nC. choice y10\n"
        "D. choice z10\nAnswer:"
    )


@pytest.mark.data
def test_real_mmlu_rows_ask_what_the_packaged_subject_asks(monkeypatch):
    name = "mmlu_college_computer_science"
    (plan,) = plan_tasks(name, num_fewshot=5)
    ours = asked(plan.task, 5)
    subject = "college_computer_science"
    rows = {
        s: [r for r in load_rows("mmlu", s) if r["subject"] == subject] for s in ("dev", "test")
    }
    assert ours == asked(packaged(name, rows, monkeypatch), 5)
    assert plan.available == 100


@pytest.mark.data
@pytest.mark.parametrize(("name", "split"), PUBLISHED)
def test_the_real_folder_holds_the_published_rows(name, split):
    spec = next(t for t in map(local_task, known_tasks()) if t and t.data == name)
    assert len(local_tasks.local_rows(spec, split)) > 0


def test_mmlu_stands_for_its_subjects(folder, model, tokenizer):
    both = evaluate(model, tokenizer, "mmlu", num_fewshot=2)
    assert both.groups == {"mmlu": ("mmlu_anatomy", "mmlu_astronomy")}
    assert [len(both[f"mmlu_{s}"]) for s in SUBJECTS] == [5, 3]
    whole = both["mmlu"]
    right = [s for t in both.groups["mmlu"] for s in both[t].scores("acc")]
    assert whole.scores("acc") == right
    assert whole["acc"].value == np.mean(right)  # by items, not the mean of the subjects' means
    assert (whole.num_fewshot, whole.available, len(whole)) == (2, 8, 8)
    assert [item.id for item in whole.items] == list(range(8))
    rows = both.rows()
    assert [r["task"] for r in rows] == ["mmlu v1.0", "mmlu_anatomy v1.0", "mmlu_astronomy v1.0"]
    found = compare(both, both)
    assert [c.task for c in found] == ["mmlu", "mmlu_anatomy", "mmlu_astronomy"]
    one = evaluate(model, tokenizer, "mmlu_anatomy", num_fewshot=2)
    assert one.groups == {}
    alone, together = (
        [x for item in result["mmlu_anatomy"].items for x in item.loglikelihoods]
        for result in (one, both)
    )
    assert alone == pytest.approx(together, abs=1e-4)


def test_the_packaged_subjects_are_all_known():
    assert len(members("mmlu")) == 57
    areas = [members(f"mmlu_{a}") for a in local_tasks.MMLU_AREAS]
    assert sorted(itertools.chain(*areas)) == sorted(members("mmlu"))
    assert [len(a) for a in areas] == [19, 13, 12, 13]
    assert members("mmlu_anatomy") == ["mmlu_anatomy"]
    assert local_task("mmlu_alchemy") is None


# Folders that are not what they must be


def test_a_missing_file_is_named(folder, model, tokenizer):
    (folder / "mmlu" / "dev.jsonl.gz").unlink()
    with pytest.raises(NotAvailableError, match=r"lacks mmlu/dev\.jsonl\.gz.*5 worked example"):
        evaluate(model, tokenizer, "mmlu_anatomy", num_fewshot=5)
    assert len(evaluate(model, tokenizer, "mmlu_anatomy", num_fewshot=0)["mmlu_anatomy"]) == 5
    write(folder / "mmlu" / "dev.jsonl.gz", DEV)
    (folder / "mmlu" / "test.jsonl.gz").unlink()
    with pytest.raises(NotAvailableError, match=r"lacks mmlu/test\.jsonl\.gz.*questions"):
        evaluate(model, tokenizer, "mmlu_anatomy", num_fewshot=0)


def test_more_shots_than_there_are_examples_are_refused(folder):
    with pytest.raises(BadInputError, match="7 worked examples of mmlu_anatomy; mmlu/dev has 6"):
        plan_tasks("mmlu_anatomy", num_fewshot=7)


@pytest.mark.parametrize("change", ["fewer", "order", "answer", "text"])
def test_other_rows_than_the_published_ones_are_refused(
    folder, model, tokenizer, monkeypatch, change
):
    from lora_kit.store import sha256_json

    content = [[r["subject"], r["question"], r["choices"], r["answer"]] for r in TEST]
    published = {("mmlu", "test"): (len(TEST), sha256_json(content)[:16])}
    monkeypatch.setattr(local_tasks, "PUBLISHED", published)
    evaluate(model, tokenizer, "mmlu_anatomy", num_fewshot=0)
    rows = [dict(r, note="more than is asked of it") for r in TEST]
    write(folder / "mmlu" / "test.jsonl.gz", rows)
    evaluate(model, tokenizer, "mmlu_anatomy", num_fewshot=0)
    if change == "fewer":
        rows = rows[:-1]
    elif change == "order":
        rows = rows[::-1]
    elif change == "answer":
        rows[3]["answer"] = (rows[3]["answer"] + 1) % 4
    else:
        rows[-1]["question"] += "?"
    write(folder / "mmlu" / "test.jsonl.gz", rows)
    with pytest.raises(CorruptFileError, match=r"mmlu/test\.jsonl\.gz does not hold the published"):
        evaluate(model, tokenizer, "mmlu_anatomy", num_fewshot=0)


# Generated rows


def test_a_skills_name_draws_rows(model, tokenizer):
    rows = generated_task("addition")
    assert len(rows) == 300
    assert [r["digits"] for r in rows][:6] == [1, 2, 3, 1, 2, 3]
    assert rows == generated_task("addition")
    assert all(eval(r["prompt"].rstrip("=")) == int(r["completion"]) for r in rows)
    assert {r["digits"] for r in generated_task("addition:2-4")} == {2, 3, 4}
    assert len(generated_task("largest:1")) == 10
    found = evaluate(model, tokenizer, ["addition", "reversal:2"], limit=6)
    assert list(found.tasks) == ["addition", "reversal_2"]
    assert (len(found["addition"]), found["addition"].available) == (6, 300)
    assert found["addition"].data["source"] == "generated"
    for odd in ("addition:", "addition:0", "addition:x", "addition:3-1"):
        if odd != "addition:":
            with pytest.raises(BadInputError, match="names no digits"):
                generated_task(odd)
    with pytest.raises(UnknownNameError, match="addition"):
        generated_task("adition")


# Texts


def texts(*rows, name="perplexity"):
    return Dataset(name, "test", tuple({"text": r} for r in rows), "file", "-")


def rolling(model, tokenizer, text):
    """log p of all tokens but the first's prefix, which is the end token, as lm-eval has it."""
    ids = tokenizer(text)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([[tokenizer.eos_token_id, *ids]])).logits[0]
    logp = logits.log_softmax(-1)
    return sum(logp[i, token].item() for i, token in enumerate(ids))


def test_perplexity_is_that_worked_by_hand(model, tokenizer):
    rows = ["the cat sat on a mat", "dogs ran far away {{ from }} here\n", "Éa 12"]
    found = evaluate(model, tokenizer, texts(*rows))["perplexity"]
    each = [rolling(model, tokenizer, row) for row in rows]
    assert [i.scores["loglikelihood"] for i in found.items] == pytest.approx(each, abs=1e-3)
    size = sum(len(row.encode()) for row in rows)
    words = sum(len(re.split(r"\s+", row)) for row in rows)
    bits = found["bits_per_byte"]
    assert bits.value == pytest.approx(-sum(each) / size / math.log(2), rel=1e-4)
    assert bits.low < bits.value < bits.high
    assert found["byte_perplexity"].value == pytest.approx(math.exp(-sum(each) / size), rel=1e-4)
    assert found["word_perplexity"].value == pytest.approx(math.exp(-sum(each) / words), rel=1e-3)
    assert found["byte_perplexity"].low == pytest.approx(2**bits.low)
    assert found["byte_perplexity"].high == pytest.approx(2**bits.high)
    single = evaluate(model, tokenizer, texts(rows[0]))["perplexity"]["bits_per_byte"]
    assert (single.stderr, single.low, single.high) == (None, single.value, single.value)


def test_perplexities_are_compared_by_text(model, tokenizer):
    from dataclasses import replace

    rows = ["the cat sat on a mat", "dogs ran", "far away", "yes and no"]
    base = evaluate(model, tokenizer, texts(*rows))
    task = base["perplexity"]
    better = tuple(
        replace(i, scores=i.scores | {"loglikelihood": i.scores["loglikelihood"] + k})
        for k, i in enumerate(task.items)
    )
    tuned = replace(base, tasks={"perplexity": replace(task, items=better)})
    (found,) = compare(base, tuned)
    size = sum(len(r) for r in rows)
    assert found.metric == "bits_per_byte,none"
    assert found.difference.value == pytest.approx(-(0 + 1 + 2 + 3) / size / math.log(2))
    assert found.difference.high <= 0
    assert (found.p, found.p_holm) == (None, None)


def test_texts_that_are_none_are_refused(model, tokenizer):
    with pytest.raises(BadInputError, match="empty text"):
        evaluate(model, tokenizer, texts("one", " \n"))


# HumanEval


def test_humaneval_is_asked_as_packaged_and_scored_in_the_sandbox(model, tokenizer, monkeypatch):
    from lora_kit.evaluate import load_problems
    from lora_kit.evaluate.fast_model import FastLM

    problems = load_problems(3)
    seen = []

    def solve(self, requests, *_, **__):
        seen.extend(request.args for request in requests)
        return [problems[0].solution, "    pass\n", problems[2].solution]

    monkeypatch.setattr(FastLM, "generate_until", solve)
    found = evaluate(model, tokenizer, "humaneval", limit=3, unsafe_code=True)
    assert found["humaneval"].scores("pass@1") == [1.0, 0.0, 1.0]
    assert [prompt for prompt, _ in seen] == [p.prompt for p in problems]
    from pathlib import Path

    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    file = Path(lm_eval.tasks.__file__).parent / "humaneval" / "humaneval.yaml"
    theirs = load_yaml(file, resolve_func=False)["generation_kwargs"]
    assert seen[0][1] == {**theirs, "max_gen_toks": 1024}
    with pytest.raises(BadInputError, match="without shots"):
        evaluate(model, tokenizer, ["humaneval"], num_fewshot=1)
