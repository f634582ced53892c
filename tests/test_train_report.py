import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from train_fixtures import tiny_spec

from lora_kit.architectures import Architecture
from lora_kit.cli import main
from lora_kit.data import Dataset
from lora_kit.data_files import Dropped, LoadedRows
from lora_kit.errors import BadInputError, RunFailedError, UnknownNameError
from lora_kit.hardware import detect
from lora_kit.prompts import IGNORE
from lora_kit.train import TrainSpec, finetune
from lora_kit.train.from_data import finetune_from
from lora_kit.train.papers import PAPER_RECIPES
from lora_kit.train.recipes import RECIPES, changed_recipe, describe_recipes
from lora_kit.train.report import data_report, estimate, format_report, matmul_speed


def dataset(*rows):
    return Dataset("mine", "train", tuple(rows), "file", "0")


def words(n, answer="yes"):
    return {"prompt": "x" * n, "completion": answer}


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"say {i}", "completion": str(i)} for i in range(24)]
    rows.insert(3, {"prompt": "say", "completion": ""})
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_the_report_counts_what_training_will_see(tokenizer):
    rows = LoadedRows(
        dataset(words(5), words(300), words(20, "y" * 90)), (Dropped(2, "the answer is empty"),)
    )
    report = data_report(rows, tokenizer, tiny_spec(max_length=64))
    assert (report.found, report.kept, report.truncated) == (4, 2, 1)
    assert [d.reason for d in report.dropped] == [
        "the answer is empty",
        "the prompt alone fills max_length=64",
    ]
    assert report.tokens == sum(len(e["input_ids"]) for e in report.encoded)
    labels = [x for e in report.encoded for x in e["labels"]]
    assert report.trained_tokens == sum(x != IGNORE for x in labels)
    assert report.trained_share == report.trained_tokens / report.tokens
    assert max(report.lengths) == 64
    assert sum(count for *_, count in report.histogram()) == 2


def test_the_report_as_text_shows_the_mask(tokenizer):
    text = format_report(data_report(dataset(words(5, "yes")), tokenizer, tiny_spec()))
    assert "mine: 1 rows, 1 to train on, 0 held out" in text
    assert "xxxxx⟦yes<|im_end|>⟧" in text
    assert "dropped" not in text


def test_rows_whose_every_label_is_masked_are_refused(tokenizer):
    with pytest.raises(BadInputError, match=r"Every label.*max_length=8.*at least \d+"):
        data_report(dataset(words(50), words(60)), tokenizer, tiny_spec(max_length=8))


def test_the_length_that_is_advised_is_enough(tokenizer):
    rows = dataset(words(50))
    with pytest.raises(BadInputError) as refused:
        data_report(rows, tokenizer, tiny_spec(max_length=8))
    advised = int(str(refused.value).rstrip(".").split()[-1])
    assert data_report(rows, tokenizer, tiny_spec(max_length=advised)).kept == 1


def test_minutes_and_memory_grow_with_the_work(tokenizer):
    shape = Architecture("tiny", 32, 64, 2, 4, 2, 8, 300)
    report = data_report(dataset(*[words(9)] * 40), tokenizer, tiny_spec())
    hardware = detect()
    short = estimate(report, tiny_spec(steps=10), shape, hardware, 1e9)
    long = estimate(report, tiny_spec(steps=20), shape, hardware, 1e9)
    assert long.minutes == pytest.approx(2 * short.minutes)
    again = estimate(report, tiny_spec(steps=10, checkpointing=True), shape, hardware, 1e9)
    assert again.minutes == pytest.approx(1.5 * short.minutes)
    wide = estimate(report, tiny_spec(batch_size=40, steps=10), shape, hardware, 1e9)
    assert wide.memory > short.memory
    epochs = estimate(report, tiny_spec(steps=0, epochs=3), shape, hardware, 1e9)
    assert epochs.steps == 30
    assert "MORE THAN IS FREE" in format_report(report, replace(short, free=1))
    assert matmul_speed(hardware) > 1e8


# ------------------------------------------------------------------ recipes


@pytest.mark.parametrize("name", PAPER_RECIPES)
def test_every_value_of_a_papers_recipe_has_its_source(name):
    made = PAPER_RECIPES[name]
    default, values = TrainSpec().to_dict(), made.spec.to_dict()
    unnamed = set(values) - {"seed", "dtype", "weight_decay", "max_grad_norm", "packing", "compile"}
    told = set(made.printed) | set(made.chosen)
    changed = {k for k, v in values.items() if v != default[k]}
    assert changed - told - {"steps"} == set()
    assert told <= unnamed
    assert not set(made.printed) & set(made.chosen)


def test_recipes_say_what_the_papers_print():
    land = RECIPES["lora-land"].spec
    assert (land.rank, land.batch_size, land.accumulation) == (8, 1, 16)
    assert (land.learning_rate, land.schedule, land.warmup) == (0.002, "cosine", 0.03)
    assert land.steps * land.accumulation == 40_000
    alwadhi = RECIPES["alwadhi"].spec
    assert (alwadhi.rank, alwadhi.dropout, alwadhi.quantization) == (32, 0.1, "nf4")
    assert (RECIPES["saha"].spec.alpha, RECIPES["mai"].spec.quantization) == (16, "nf4")
    assert "section 3.4: 0.002" in describe_recipes()


def test_values_given_as_words():
    changes = {"rank": "4", "learning_rate": "1e-3", "checkpointing": "false", "compile": "true"}
    spec = changed_recipe("mai", {**changes, "targets": "mlp"})
    assert (spec.rank, spec.learning_rate, spec.checkpointing) == (4, 0.001, False)
    assert (spec.targets, spec.compile) == ("mlp", True)
    with pytest.raises(UnknownNameError, match="rank"):
        changed_recipe("mai", {"rnak": "4"})
    with pytest.raises(BadInputError, match="rank takes a int, not 'four'"):
        changed_recipe("mai", {"rank": "four"})
    with pytest.raises(BadInputError, match="checkpointing"):
        changed_recipe("mai", {"checkpointing": "maybe"})


# ------------------------------------------------------------------ the whole road


def test_from_a_file_to_an_adapter_with_card(tiny_folder, mine, home, capsys):
    spec = tiny_spec(steps=12, learning_rate=5e-2)
    result = finetune_from(str(tiny_folder), mine, spec, "native", held_out=4)
    said = capsys.readouterr().out
    assert "mine: 25 rows, 20 to train on, 4 held out" in said
    assert "dropped 1: the answer is empty (first: row 4)" in said
    assert "held-out loss" in said
    assert "vllm serve" in said
    shown = {json.dumps(r) for r in result.train} & {json.dumps(r) for r in result.test}
    assert not shown
    card = (result.adapter / "README.md").read_text()
    assert result.base["fingerprint"] in card
    assert f"{result.tokens_per_second:,.0f} (padding not counted)" in card
    assert "--max-lora-rank 8" in card


def test_native_adapters_load_in_peft_with_the_same_logits(tiny_folder, mine, home, tiny):
    from peft import PeftModel

    from lora_kit.data_files import load_training_rows
    from lora_kit.lora import load_lora
    from lora_kit.models import load_model

    rows = load_training_rows(mine).kept
    result = finetune(str(tiny_folder), rows, tiny_spec(), engine="native")
    assert result.engine == "native"
    encoded = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        ours = load_lora(tiny.model, result.adapter)(input_ids=encoded).logits
        base = load_model(str(tiny_folder), "float32").model
        theirs = PeftModel.from_pretrained(base, result.adapter)(input_ids=encoded).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    per_epoch = sum(len(r["input_ids"]) for r in data_report_rows(rows, tiny))
    assert result.tokens == per_epoch  # 24 rows, 6 steps of 4: each row once


def data_report_rows(rows, loaded):
    return data_report(rows, loaded.tokenizer, tiny_spec()).encoded


def test_an_adapter_that_reads_back_otherwise_is_not_done(tiny_folder, mine, home, monkeypatch):
    from lora_kit import lora_files
    from lora_kit.data_files import load_training_rows

    original = lora_files.save_file

    def careless(tensors, path, metadata=None):
        name = next(iter(tensors))
        original({**tensors, name: tensors[name] + 1e-3}, path, metadata)

    monkeypatch.setattr(lora_files, "save_file", careless)
    rows = load_training_rows(mine).kept
    with pytest.raises(RunFailedError, match="not the one that was trained"):
        finetune(str(tiny_folder), rows, tiny_spec(steps=1), engine="native")
    assert not list(home.glob("adapters/tiny*"))


COMMAND = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch
from safetensors import safe_open
torch.set_num_threads(1)
from lora_kit.data_files import load_training_rows
from lora_kit.train import TrainSpec, finetune
from lora_kit.train.checkpoints import Checkpoints
die_at, original = int(sys.argv[1]), Checkpoints.save
def save(self, step, state):
    original(self, step, state)
    if step == die_at:
        os.kill(os.getpid(), signal.SIGKILL)
Checkpoints.save = save
spec = TrainSpec(rank=4, alpha=8, batch_size=4, steps=6, dropout=0.1, dtype="float32")
rows = load_training_rows({mine!r}).kept
done = finetune({model!r}, rows, spec, engine="native", checkpoint_every=1)
print(done.resumed_at, done.adapter)
"""


def contents(folder):
    """All tensors of an adapter and what is noted beside them."""
    with safe_open(f"{folder}/adapter_model.safetensors", "pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, file.metadata()


def test_the_same_command_after_kill_9_ends_with_the_same_adapter(tiny_folder, mine, tmp_path):
    root = os.path.dirname(os.path.dirname(__file__))
    code = COMMAND.format(root=root, mine=mine, model=str(tiny_folder))

    def run(home, die_at):
        environment = {**os.environ, "LORA_KIT_HOME": str(tmp_path / home)}
        return subprocess.run(
            [sys.executable, "-c", code, str(die_at)],
            env=environment,
            capture_output=True,
            text=True,
        )

    whole = run("whole", 0)
    assert whole.returncode == 0, whole.stderr
    assert run("killed", 4).returncode == -signal.SIGKILL
    again = run("killed", 0)
    assert again.returncode == 0, again.stderr
    (at_whole, whole_folder), (at_again, again_folder) = (
        d.stdout.split()[-2:] for d in (whole, again)
    )
    assert (at_whole, at_again) == ("0", "4")
    # Tensors and notes, not the file's bytes: safetensors writes its notes in a random order.
    (tensors, notes), (tensors_again, notes_again) = map(contents, (whole_folder, again_folder))
    assert notes == notes_again
    assert tensors.keys() == tensors_again.keys()
    assert all(torch.equal(tensors[k], tensors_again[k]) for k in tensors)
    assert not list((tmp_path / "killed" / "adapters").glob("*checkpoints*"))


def test_the_command_line(tiny_folder, mine, home, capsys):
    words = ["finetune", "--model", str(tiny_folder), "--data", mine, "--recipe", "addition"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--engine", "native", "--set", "steps=2", "--report-only"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "mine: 25 rows, 23 to train on, 1 held out" in said
    assert "for 2 steps" in said
    assert not (home / "adapters").exists()
    with pytest.raises(SystemExit) as ended:
        main([*words, "--set", "rank"])
    assert ended.value.code == 2
    assert "--set rank lacks its value" in capsys.readouterr().err
