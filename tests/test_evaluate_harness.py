"""The harness on a tiny model: scores by hand, prompts as packaged, results that pair or refuse."""

import gzip
import json
import logging
import random

import datasets
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lora_kit.evaluate.local_tasks as local_tasks
import lora_kit.evaluate.tasks as tasks_module
from lora_kit.data import Dataset, load_rows
from lora_kit.errors import BadInputError, CorruptFileError, NotAvailableError, UnknownNameError
from lora_kit.evaluate import EvalResult, compare, evaluate, everyday_items
from lora_kit.evaluate.tasks import packaged_definition, plan_tasks
from lora_kit.generation import exact_match, generate
from lora_kit.skills import draw_skill

CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
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


def byte_tokenizer(extra=()):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(["<eos>", "<pad>", *alphabet, *extra])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>")


def tiny(seed=0, **options):
    torch.manual_seed(seed)
    settings = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=258)
    settings |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048)
    settings |= dict(eos_token_id=0, pad_token_id=1, bos_token_id=0, initializer_range=0.2)
    return LlamaForCausalLM(LlamaConfig(**settings | options)).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def everyday(model, tokenizer):
    return evaluate(model, tokenizer, everyday_items())


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


def loglikelihood(model, tokenizer, context, ending):
    """Σ log p(token | before it) over the ending's tokens."""
    start = tokenizer(context)["input_ids"]
    whole = tokenizer(f"{context} {ending}")["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0]
    logp = logits.log_softmax(-1)
    return sum(logp[i - 1, whole[i]].item() for i in range(len(start), len(whole)))


# Scores


def test_likelihoods_and_accuracies_are_those_worked_by_hand(model, tokenizer, everyday):
    acc, norm = [], []
    for row, item in zip(everyday_items(), everyday["everyday"].items, strict=True):
        context = f"{row['activity_label']}: {row['ctx_a']}"
        ours = [loglikelihood(model, tokenizer, context, e) for e in row["endings"]]
        assert item.loglikelihoods == pytest.approx(ours, abs=1e-3)
        acc.append(float(np.argmax(ours) == int(row["label"])))
        per_character = [x / len(e) for x, e in zip(ours, row["endings"], strict=True)]
        norm.append(float(np.argmax(per_character) == int(row["label"])))
    task = everyday["everyday"]
    assert task.scores("acc") == acc
    assert task.scores("acc_norm") == norm
    assert acc != norm  # or the two would not be told apart here
    assert task["acc"].value == np.mean(acc)
    assert task["acc"].stderr == pytest.approx(np.std(acc, ddof=1) / 4)


def test_a_result_says_what_was_asked_and_of_whom(everyday):
    import importlib.metadata

    task = everyday["everyday"]
    assert everyday.harness == importlib.metadata.version("lm_eval")
    assert (task.version, task.num_fewshot, task.limit, task.available) == ("1.0", 0, None, 16)
    assert task.template == "none"
    assert task.data == everyday_items().record()
    assert task.items[1].prompt.startswith("Changing a tyre: A man jacks up")
    assert task.items[1].target == "1"
    assert everyday.truncated == 0
    assert [row["metric"] for row in everyday.rows()] == ["acc,none", "acc_norm,none"]


def test_strict_and_flexible_part_on_the_same_answers(model, tokenizer, monkeypatch):
    from lora_kit.evaluate.fast_model import FastLM

    answers = ["96", " 96\n", "96 and so on", "is it 96?", "", "69", "960"]
    monkeypatch.setattr(FastLM, "generate_until", lambda *_, **__: answers)
    row = {"prompt": "59+37=", "completion": "96", "digits": 2}
    found = evaluate(model, tokenizer, Dataset("addition", "test", (row,) * 7, "generated", "-"))
    assert found["addition"].scores("exact_match,strict-match") == [1, 1, 0, 0, 0, 0, 0]
    assert found["addition"].scores("exact_match,flexible-extract") == [1, 1, 1, 1, 0, 0, 0]
    assert [item.answer for item in found["addition"].items] == answers
    with pytest.raises(UnknownNameError, match="exact_match,strict-match"):
        found["addition"]["exact_match"]


def test_generated_answers_are_those_of_greedy_generation(model, tokenizer):
    rows = draw_skill("addition", (1, 2), 5, seed=1)
    found = evaluate(model, tokenizer, rows, batch_size=3)["addition"]
    ours = generate(model, tokenizer, [r["prompt"] for r in rows], max_new_tokens=5)
    assert [item.answer for item in found.items] == ours
    expected = exact_match(ours, [r["completion"] for r in rows])
    assert found.scores("exact_match,strict-match") == [float(e) for e in expected]


def test_limit_takes_the_first_items(model, tokenizer, everyday):
    found = evaluate(model, tokenizer, everyday_items(), limit=3)["everyday"]
    assert (len(found), found.limit, found.available, found["acc"].n) == (3, 3, 16, 3)
    for few, all_ in zip(found.items, everyday["everyday"].items, strict=False):
        assert few.fingerprint == all_.fingerprint
        assert few.loglikelihoods == pytest.approx(all_.loglikelihoods, abs=1e-3)


def test_prompts_cut_to_the_models_context_are_counted(tokenizer):
    short = tiny(max_position_embeddings=64)
    found = evaluate(short, tokenizer, everyday_items(), limit=2)
    assert found.truncated == 8


def test_chat_template_changes_the_prompt_and_is_named(model):
    chatty = byte_tokenizer()
    chatty.chat_template = CHAT
    found = evaluate(model, chatty, everyday_items(), limit=1, chat_template=True)["everyday"]
    assert found.template.startswith("chat ")
    assert found.items[0].prompt.startswith("<user>Making tea: A woman")
    assert found.items[0].prompt.endswith("<assistant>")


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


# Two results


def adapted(model, seed=1):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, config)


def test_a_peft_model_is_compared_with_its_own_base(model, tokenizer, everyday):
    peft_model = adapted(tiny())
    base = evaluate(peft_model, tokenizer, everyday_items(), adapter=False)
    tuned = evaluate(peft_model, tokenizer, everyday_items())
    assert peft_model.active_adapters == ["default"]
    plain = [i.loglikelihoods for i in everyday["everyday"].items]
    assert [i.loglikelihoods for i in base["everyday"].items] == plain
    assert [i.loglikelihoods for i in tuned["everyday"].items] != plain
    assert tuned.model.endswith("+ default")
    assert not base.model.endswith("+ default")
    again = evaluate(peft_model, tokenizer, everyday_items(), limit=2)
    assert again["everyday"].items[1].scores == tuned["everyday"].items[1].scores
    (acc, norm) = compare(base, tuned)
    x, y = base["everyday"].scores("acc"), tuned["everyday"].scores("acc")
    assert (acc.task, acc.metric, norm.metric) == ("everyday", "acc,none", "acc_norm,none")
    assert acc.difference.value == pytest.approx(np.mean(y) - np.mean(x))
    assert acc.mcnemar.only_base == sum(a > b for a, b in zip(x, y, strict=True))
    assert acc.mcnemar.only_tuned == sum(a < b for a, b in zip(x, y, strict=True))
    assert acc.disagreement == sum(a != b for a, b in zip(x, y, strict=True)) / 16
    assert compare(base, tuned, metric="acc")[0] == acc
    assert acc.row()["McNemar p"] == pytest.approx(acc.p, rel=1e-2)


def altered(result, **changes):
    """A copy of a result with one task's fields changed."""
    from dataclasses import replace

    (name, task), *_ = result.tasks.items()
    return replace(result, tasks={name: replace(task, **changes)})


def test_results_of_other_questions_are_not_compared(model, tokenizer, everyday):
    from dataclasses import replace

    task = everyday["everyday"]
    other = replace(task.items[2], fingerprint="0" * 16)
    for changed, says in (
        (replace(everyday, harness="0.4.9"), r"harness version.* 0\.4\.13 against 0\.4\.9"),
        (replace(everyday, tasks={"hellaswag": task}), r"tasks.*everyday.*hellaswag"),
        (altered(everyday, num_fewshot=5), "number of shots of everyday.* 0 against 5"),
        (altered(everyday, version="2.0"), "task version"),
        (altered(everyday, template="chat abc"), "template"),
        (altered(everyday, items=task.items[:9]), "number of items.* 16 against 9"),
        (altered(everyday, metrics={"acc,none": task["acc"]}), "metrics"),
        (altered(everyday, items=(*task.items[:2], other, *task.items[3:])), "item 2"),
    ):
        with pytest.raises(BadInputError, match=says):
            compare(everyday, changed)
    with pytest.raises(UnknownNameError, match="acc_norm"):
        compare(everyday, everyday, metric="acc_nom")


def test_a_result_is_saved_and_read_back(everyday, tmp_path):
    path = everyday.save(tmp_path / "everyday.json")
    assert EvalResult.load(path) == everyday
    assert compare(everyday, EvalResult.load(path))[0].p == 1.0
    path.write_text('{"schema": 1, "tasks": {}}')
    with pytest.raises(CorruptFileError):
        EvalResult.load(path)
    path.write_text('{"schema": 0}')
    with pytest.raises(CorruptFileError):
        EvalResult.load(path)


# Manners


def test_evaluation_is_silent_and_leaves_everything_as_it_was(tokenizer, capfd):
    model = tiny()
    model.train()
    logger = logging.getLogger("lm_eval")
    before = logger.level, logger.propagate, list(logger.handlers)
    tokenizer.padding_side = "right"
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    evaluate(model, tokenizer, [everyday_items(), draw_skill("addition", 1, 3, 0)], limit=2)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    assert model.training
    assert tokenizer.padding_side == "right"
    assert (logger.level, logger.propagate, list(logger.handlers)) == before
    written = capfd.readouterr()
    assert (written.out, written.err) == ("", "")


def test_the_everyday_items_are_balanced_and_sound():
    rows = everyday_items().rows
    assert [r["label"] for r in rows] == ["0", "1", "2", "3"] * 4
    assert all(len(set(r["endings"])) == 4 for r in rows)


def test_the_packaged_definition_is_read_not_copied():
    assert packaged_definition("hellaswag")["doc_to_text"] == "{{query}}"
    assert callable(packaged_definition("hellaswag")["process_docs"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"limit": 0}, "limit must be a whole number from 1"),
        ({"limit": 0.5}, "limit"),
        ({"num_fewshot": -1}, "num_fewshot"),
        ({"num_fewshot": 2}, "without shots"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": None}, "batch_size"),
        ({"adapter": False}, "no adapter to disable"),
        ({"chat_template": True}, "no chat template"),
        ({"tasks": []}, "No task given"),
        ({"tasks": [everyday_items(), everyday_items()]}, "everyday is given twice"),
        ({"tasks": [3]}, "a name or a Dataset, not a int"),
        ({"tasks": Dataset("none", "test", (), "generated", "-")}, "has no rows"),
        ({"tasks": Dataset("odd", "test", ({"words": "a"},), "generated", "-")}, "fields words"),
    ],
)
def test_bad_input_is_refused(model, tokenizer, options, says):
    with pytest.raises(BadInputError, match=says):
        evaluate(model, tokenizer, **{"tasks": everyday_items(), **options})


def test_rows_without_their_fields_are_refused(model, tokenizer):
    rows = (*everyday_items().rows[:2], {"activity_label": "Making tea"})
    with pytest.raises(CorruptFileError, match="row 3 lacks"):
        evaluate(model, tokenizer, Dataset("broken", "test", rows, "generated", "-"))


def test_a_tokenizer_of_another_model_is_refused(model):
    with pytest.raises(BadInputError, match="do not belong together"):
        evaluate(model, byte_tokenizer(extra=[f"w{i}" for i in range(20)]), everyday_items())


def test_shots_that_the_folder_cannot_give_are_refused(folder, model, tokenizer):
    with pytest.raises(BadInputError, match="no training rows of hellaswag"):
        evaluate(model, tokenizer, "hellaswag", num_fewshot=5)
