"""`lora-kit eval` and `lora-kit compare`: what they print, write, take up again and refuse."""

import json

import pytest

from lora_kit.cli import main
from lora_kit.evaluate import EvalResult
from lora_kit.evaluate.fast_model import FastLM
from lora_kit.evaluate.kept_answers import AnswerFile


@pytest.fixture
def model(tiny_folder, home, tmp_path, monkeypatch):
    """The folder of the tiny model; the working folder is a fresh one."""
    monkeypatch.chdir(tmp_path)
    return str(tiny_folder)


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stopped:
        main([*words])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def run(*words):
    with pytest.raises(SystemExit) as ended:
        main([*words])
    assert ended.value.code in (0, None)


def evaluate(model, *words):
    run("eval", model, "--tasks", "addition", "--limit", "6", *words)


def test_a_table_with_intervals_and_a_file_with_every_item(model, capsys, tmp_path, home):
    evaluate(model)
    printed = capsys.readouterr().out
    line = next(x for x in printed.splitlines() if "strict-match" in x)
    assert line.split()[:4] == ["addition", "v1.0", "0", "exact_match,strict-match"]
    assert "–" in line
    file = tmp_path / "runs" / "eval" / "tiny-llama-addition.json"
    result = EvalResult.load(file)
    assert len(result["addition"].items) == 6
    assert result.model_kind == "fast"
    assert result.about["model"]["name"] == "tiny-llama"
    assert result.about["versions"]["lm_eval"] == result.harness
    assert result.about["peak_memory_bytes"] > 0
    assert list((home / "evaluations").glob("*.jsonl")) == []
    evaluate(model)
    assert EvalResult.load(file.with_name("tiny-llama-addition-2.json"))["addition"].items == (
        result["addition"].items
    )
    evaluate(model, "--slow", "--out", "slow.json")
    slow = EvalResult.load(tmp_path / "slow.json")
    assert slow.model_kind == "lm-eval"
    assert slow["addition"].items == result["addition"].items


def adapter(tiny_folder, folder, seed=0):
    import torch

    from lora_kit.lora import LoraSpec, add_lora, save_lora
    from lora_kit.models import load_model

    model = load_model(str(tiny_folder), "float32").model
    add_lora(model, LoraSpec(rank=2, alpha=64), seed=seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(seed))
    return save_lora(model, folder)


def test_an_adapter_is_compared_with_its_base(model, tiny_folder, tmp_path, capsys):
    adapter(tiny_folder, tmp_path / "tuned")
    text = tmp_path / "texts.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in ("the cat", "a dog ran", "no")))
    words = ("eval", model, "--text", str(text), "--tasks", "addition", "--limit", "3")
    run(*words, "--out", "base.json")
    run(*words, "--out", "tuned.json", "--adapter", "tuned", "--against", "base.json")
    printed = capsys.readouterr().out
    assert "tuned  tiny-llama + tuned" in printed
    assert "McNemar p" in printed
    base, tuned = EvalResult.load(tmp_path / "base.json"), EvalResult.load(tmp_path / "tuned.json")
    bits = [r["perplexity"]["bits_per_byte"].value for r in (base, tuned)]
    assert bits[0] != bits[1]
    assert tuned.about["adapter"]["name"] == "tuned"
    assert base.about["adapter"] is None
    run("compare", "base.json", "tuned.json", "--metric", "bits_per_byte")
    printed = capsys.readouterr().out
    line = next(x for x in printed.splitlines() if x.startswith("perplexity"))
    assert f"{bits[1] - bits[0]:+.4f}" in line
    assert "addition" not in printed


def test_a_killed_evaluation_is_taken_up_again(model, tmp_path, capsys, monkeypatch, home):
    text = tmp_path / "texts.jsonl"
    rows = [f"text number {i} {'and more ' * i}" for i in range(12)]
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in rows))
    words = ("eval", model, "--text", str(text), "--tasks", "addition", "--limit", "12")
    run(*words, "--out", "whole.json")
    asked = []
    answers = FastLM.generate_until

    def dies(self, requests, disable_tqdm=False):
        answers(self, requests[:5])
        raise KeyboardInterrupt

    def watches(self, requests, disable_tqdm=False):
        asked.append(len(requests))
        return answers(self, requests)

    monkeypatch.setattr(FastLM, "generate_until", dies)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main([*words, "--out", "again.json"])
    assert not (tmp_path / "again.json").exists()
    (kept,) = (home / "evaluations").glob("*.jsonl")
    before = len(kept.read_text().splitlines())
    with open(kept, "a") as file:
        file.write('["torn')
    monkeypatch.setattr(FastLM, "generate_until", watches)
    capsys.readouterr()
    run(*words, "--out", "again.json")
    assert "taken up again" in capsys.readouterr().out
    assert asked == [12 - 5]
    assert before >= 5
    whole, again = (EvalResult.load(tmp_path / f"{n}.json") for n in ("whole", "again"))
    assert again["addition"].items == whole["addition"].items
    assert again["perplexity"].items == whole["perplexity"].items
    assert not kept.exists()


def test_answers_on_file_are_those_that_were_given(tmp_path):
    path = tmp_path / "answers.jsonl"
    told = []
    first = AnswerFile(path, told.append)
    first["a"] = (-1.5, True)
    first["b"] = "text\nof two lines"
    first["a"] = (-9.0, False)  # an answer once given stays
    first.commit()
    assert told == [1, 2]
    with open(path, "a") as file:
        file.write('["c", "to')
    second = AnswerFile(path)
    assert (dict(second), second.found) == ({"a": (-1.5, True), "b": "text\nof two lines"}, 2)
    second["d"] = -2.0
    second.commit()
    assert AnswerFile(path) == {**second}


def test_another_model_has_other_answers(model, tiny_folder, tmp_path):
    from lora_kit.evaluate.command import EvalSpec, _about, _kept_answers

    adapter(tiny_folder, tmp_path / "one")
    record = {"name": "m", "fingerprint": "1"}
    spec = EvalSpec(model, ("addition",))
    files = {
        _kept_answers(s, _about(s, r, a))
        for s in (spec, EvalSpec(model, ("addition",), slow=True))
        for r in (record, record | {"fingerprint": "2"}, record | {"dtype": "float16"})
        for a in (None, {"sha256": "1"}, {"sha256": "2"})
    }
    assert len(files) == 18


def test_what_is_refused_and_how(model, tmp_path, capsys):
    (tmp_path / "odd.jsonl").write_text('{"words": "a"}\n')
    (tmp_path / "odd.json").write_text('{"schema": 7}')
    for words, says in (
        ((), "No task given"),
        (("--tasks", "perplexity"), "needs --text FILE"),
        (("--text", "none.txt"), "There is no file 'none.txt'"),
        (("--text", "odd.jsonl"), "row 1 has no text"),
        (("--tasks", "addition", "--limit", "0"), "--limit must be at least 1"),
        (("--tasks", "addition", "--shots", "2"), "without shots"),
        (("--tasks", "addition:x"), "names no digits"),
        (("--tasks", "addition,addition"), "given twice"),
        (("--tasks", "addition", "--adapter", "none"), "no adapter folder 'none'"),
        (("--tasks", "addition", "--against", "none.json"), "There is no result 'none.json'"),
        (("--tasks", "addition", "--against", "odd.json"), "not an evaluation result"),
        (("--tasks", "addition", "--out", "."), "is a folder"),
    ):
        error = refused(capsys, "eval", model, *words)
        assert says in error, (words, error)
        assert error.count("\n") == 1
    assert "schema" in refused(capsys, "compare", "odd.json", "odd.json")


def test_results_of_other_questions_are_refused_with_the_difference(model, capsys):
    evaluate(model, "--out", "six.json")
    run("eval", model, "--tasks", "addition", "--limit", "5", "--out", "five.json")
    run("eval", model, "--tasks", "reversal", "--limit", "6", "--out", "other.json")
    run("eval", model, "--tasks", "addition", "--limit", "6", "--chat-template", "-o", "chat.json")
    capsys.readouterr()
    assert "number of items of addition, 6 against 5" in refused(
        capsys, "compare", "six.json", "five.json"
    )
    assert "tasks, ['addition'] against ['reversal']" in refused(
        capsys, "compare", "six.json", "other.json"
    )
    assert "prompt template of addition, none against chat" in refused(
        capsys, "compare", "six.json", "chat.json"
    )
