"""The harness on a tiny model: scores by hand, prompts as packaged, results that pair or refuse."""

import logging
import random

import numpy as np
import pytest
import torch
from evaluate_fixtures import byte_tokenizer, tiny

from lora_kit.data import Dataset
from lora_kit.errors import BadInputError, CorruptFileError, UnknownNameError
from lora_kit.evaluate import EvalResult, compare, evaluate, everyday_items
from lora_kit.generation import exact_match, generate
from lora_kit.skills import draw_skill

CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def everyday(model, tokenizer):
    return evaluate(model, tokenizer, everyday_items())


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
