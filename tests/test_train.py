"""From rows to an adapter that peft loads, twice the same; and nothing where training fails."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from lora_kit import store, train
from lora_kit.data import Dataset
from lora_kit.errors import BadInputError, CorruptFileError, RunFailedError, UnknownNameError
from lora_kit.models import load_model
from lora_kit.prompts import IGNORE, Example, encode
from lora_kit.skills import draw_skill
from lora_kit.train import (
    RECIPES,
    TrainSpec,
    choose_engine,
    engines,
    finetune,
    heldout_loss,
    recipe,
    skill_adapter,
)
from lora_kit.train.finetune import encode_rows

SPEC = TrainSpec(rank=4, alpha=8, steps=3, batch_size=4, learning_rate=1e-2, max_length=64)
ROWS = draw_skill("addition", 2, 10, seed=0)


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture(scope="module")
def trained(tiny_folder, tmp_path_factory):
    """One finished run that several tests look at."""
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    return finetune(str(tiny_folder), ROWS, SPEC, folder, engine="trl")


def weights(result):
    return load_file(result.adapter / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rank": 0}, "rank must be at least 1, not 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"accumulation": -1}, "accumulation must be at least 1"),
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"alpha": 0}, "alpha must be above 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0, not nan"),
        ({"learning_rate": float("inf")}, "learning_rate must be above 0, not inf"),
        ({"max_grad_norm": -1}, "max_grad_norm must be above 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), not 1\.0"),
        ({"warmup": -0.1}, r"warmup must be in \[0, 1\)"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or more"),
        ({"steps": -1}, r"steps must be 0 \(one epoch\) or more, not -1"),
        ({"style": "chatml"}, "style must be one of bare, alpaca, chat, not 'chatml'"),
        ({"quantization": "int4"}, "quantization must be one of none, nf4, not 'int4'"),
        ({"dtype": "fp16"}, "dtype must be one of auto, float32"),
    ],
)
def test_a_spec_is_checked_when_it_is_made(change, says):
    with pytest.raises(BadInputError, match=says):
        replace(SPEC, **change)


def test_a_spec_names_its_targets():
    with pytest.raises(UnknownNameError, match="Did you mean 'q_proj'"):
        TrainSpec(targets="q_prj")
    with pytest.raises(UnknownNameError, match="Known: all, all-linear, attention"):
        TrainSpec(targets="")
    assert TrainSpec(**SPEC.to_dict()) == SPEC
    assert json.loads(json.dumps(SPEC.to_dict())) == SPEC.to_dict()


def test_recipes():
    for name, made in RECIPES.items():
        assert recipe(name) == made.spec
        assert made.source
        assert recipe(name, steps=7).steps == 7
    with pytest.raises(UnknownNameError, match=r"recipe 'additon'\. Did you mean 'addition'"):
        recipe("additon")
    with pytest.raises(UnknownNameError, match="skill recipe 'alpaca'"):
        skill_adapter("alpaca", "any")
    with pytest.raises(BadInputError, match="rank must be at least 1"):
        recipe("addition", rank=0)


def test_engines_fall_back_on_a_cpu_and_say_so():
    assert choose_engine("trl") == ("trl", "trl was asked for.")
    engine, why = choose_engine("unsloth")
    assert engine == "trl"
    assert why.startswith("Unsloth was asked for, but this machine has no GPU")
    assert choose_engine()[0] == "native"
    assert choose_engine("auto", {"final_logit_softcapping": 30.0})[0] == "trl"
    with pytest.raises(UnknownNameError, match=r"engine 'unslot'\. Did you mean 'unsloth'"):
        choose_engine("unslot")


def test_a_gpu_without_unsloth_falls_back_too(fake_gpu, monkeypatch):
    fake_gpu("Tesla T4", (7, 5), 15 * 2**30)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    engine, why = choose_engine("unsloth")
    assert engine == "trl"
    assert "Unsloth is not installed" in why


def test_the_adapter_is_peft_s(trained, tiny_folder, tiny):
    config = json.loads((trained.adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8, "LORA")
    ids = torch.arange(10)[None]
    with torch.no_grad():
        base = tiny.model(ids).logits
        adapted = PeftModel.from_pretrained(tiny.model, trained.adapter).eval()
        assert not torch.equal(adapted(ids).logits, base)
        with adapted.disable_adapter():
            assert torch.equal(adapted(ids).logits, base)


def test_a_run_says_what_it_did(trained, tiny_folder, tiny):
    held = weights(trained)
    assert trained.trainable == sum(w.numel() for w in held.values())
    assert trained.total == tiny.model.num_parameters() + trained.trainable
    assert [step for step, _ in trained.losses] == [1, 2, 3]
    assert trained.bytes_on_disk == (trained.adapter / "adapter_model.safetensors").stat().st_size
    assert trained.tokens_per_second == trained.tokens / trained.seconds
    assert trained.peak_memory >= trained.memory_before > 0
    assert not trained.reused
    assert trained.base == {
        "name": "tiny-llama",
        "source": "folder",
        "revision": tiny.revision,
        "fingerprint": tiny.fingerprint,
    }
    assert trained.data == ROWS.record()
    assert {p.name for p in trained.adapter.iterdir()} >= {"training.json", "adapter_config.json"}


def test_tokens_are_counted_by_epochs(trained, tokenizer):
    """10 rows in batches of 4 are 3 steps: each row is seen once, not 12/10 times."""
    encoded = encode_rows(ROWS, tokenizer, SPEC)
    assert trained.tokens == sum(len(e["input_ids"]) for e in encoded)
    assert trained.trained_tokens == sum(x != IGNORE for e in encoded for x in e["labels"])


def test_steps_0_is_one_epoch(tiny_folder, tmp_path):
    result = finetune(str(tiny_folder), ROWS, replace(SPEC, steps=0), tmp_path / "a", "trl")
    assert len(result.losses) == 3


def test_the_loss_trained_on_is_the_masked_loss(tiny_folder, tiny, tmp_path):
    """The first step, before anything has moved, over all rows at once."""
    spec = replace(SPEC, steps=1, batch_size=len(ROWS))
    result = finetune(str(tiny_folder), ROWS, spec, tmp_path / "a", "trl")
    encoded = encode_rows(ROWS, tiny.tokenizer, spec)
    expected = heldout_loss(tiny.model, tiny.tokenizer, encoded)
    assert result.losses[0][1] == pytest.approx(expected, rel=1e-4)


def test_training_lowers_the_loss_on_its_rows(tiny_folder, tiny, tmp_path):
    spec = replace(SPEC, steps=30, rank=8, batch_size=10)
    result = finetune(str(tiny_folder), ROWS, spec, tmp_path / "a", "trl")
    encoded = encode_rows(ROWS, tiny.tokenizer, spec)
    before = heldout_loss(tiny.model, tiny.tokenizer, encoded)
    adapted = PeftModel.from_pretrained(tiny.model, result.adapter).eval()
    assert heldout_loss(adapted, tiny.tokenizer, encoded) < 0.7 * before


def test_the_same_seed_gives_the_same_adapter_and_another_does_not(trained, tiny_folder, tmp_path):
    again = finetune(str(tiny_folder), ROWS, SPEC, tmp_path / "a", "trl")
    assert not again.reused
    assert again.losses == trained.losses
    one, two = weights(trained), weights(again)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)
    other = finetune(str(tiny_folder), ROWS, replace(SPEC, seed=1), tmp_path / "b", "trl")
    assert any(not torch.equal(one[k], w) for k, w in weights(other).items())


@pytest.fixture
def finished(trained, tmp_path):
    """A copy of the finished run, to be found by a second call."""
    return Path(shutil.copytree(trained.adapter, tmp_path / "adapter"))


@pytest.fixture
def no_training(monkeypatch):
    class Trained(Exception):
        pass

    def refuse(*_):
        raise Trained

    monkeypatch.setattr(engines, "load_for_training", refuse)
    return Trained


def test_a_finished_run_is_reused(trained, tiny_folder, finished, no_training):
    again = finetune(str(tiny_folder), ROWS, SPEC, finished, "trl")
    assert again == replace(trained, adapter=finished, reused=True)


def test_without_a_folder_the_adapter_lies_in_the_cache(tiny_folder, home):
    spec = replace(SPEC, steps=1)
    first, second = (finetune(str(tiny_folder), ROWS, spec, engine="trl") for _ in range(2))
    assert first.adapter == second.adapter
    assert first.adapter.parent == home / "adapters"
    assert first.adapter.name.startswith("tiny-llama-addition-")
    assert (first.reused, second.reused) == (False, True)


@pytest.mark.parametrize("change", ["rows", "spec", "not asked", "record", "weights", "missing"])
def test_another_run_is_not_reused(tiny_folder, finished, no_training, change):
    rows, spec, reuse = ROWS, SPEC, True
    if change == "rows":
        rows = draw_skill("addition", 2, 10, seed=1)
    elif change == "spec":
        spec = replace(SPEC, alpha=9.0)
    elif change == "not asked":
        reuse = False
    elif change == "record":
        (finished / "training.json").write_text('{"half')
    elif change == "weights":
        (finished / "adapter_model.safetensors").unlink()
    else:
        held = json.loads((finished / "training.json").read_text())
        del held["losses"]
        (finished / "training.json").write_text(json.dumps(held))
    with pytest.raises(no_training):
        finetune(str(tiny_folder), rows, spec, finished, "trl", reuse=reuse)


def test_other_weights_under_the_same_name_are_another_base(
    tiny_folder, finished, no_training, tmp_path
):
    """A folder trained anew keeps its name and its config: its adapter is not the old one's."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "tiny-llama"))
    assert finetune(str(folder), ROWS, SPEC, finished, "trl").reused
    model = load_model(str(folder), "float32").model
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    model.save_pretrained(folder)
    with pytest.raises(no_training):
        finetune(str(folder), ROWS, SPEC, finished, "trl")


def test_a_folder_of_something_else_is_left_alone(tiny_folder, tmp_path, no_training):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BadInputError, match="holds something else than an adapter"):
        finetune(str(tiny_folder), ROWS, SPEC, tmp_path, "trl")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_run_that_ends_in_nan_leaves_nothing(tiny_folder, tmp_path):
    spec = replace(SPEC, learning_rate=1e30, steps=4, max_grad_norm=1e30)
    output = tmp_path / "out" / "adapter"
    with pytest.raises(RunFailedError, match=r"nothing was saved. Lower the learning rate"):
        finetune(str(tiny_folder), ROWS, spec, output, "trl")
    assert not output.exists()
    assert [p.name for p in output.parent.iterdir() if not p.name.endswith(".lock")] == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_is_seen_in_losses_and_in_weights(tiny, bad):
    with pytest.raises(RunFailedError, match="loss became NaN or infinite at step 2"):
        engines._check_finite(tiny.model, [(1, 0.5), (2, bad), (3, bad)])
    engines._check_finite(tiny.model, [(1, 0.5)])
    with torch.no_grad():
        tiny.model.lm_head.weight[3, 4] = bad
    with pytest.raises(RunFailedError, match=r"adapter weight lm_head\.weight holds NaN"):
        engines._check_finite(tiny.model, [(1, 0.5)])


def test_a_save_that_fails_keeps_the_old_adapter(tiny_folder, finished, monkeypatch):
    before = store.sha256_file(finished / "adapter_model.safetensors")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(engines, "save_adapter", fail)
    with pytest.raises(OSError, match="No space"):
        finetune(str(tiny_folder), ROWS, replace(SPEC, steps=1), finished, "trl")
    assert store.sha256_file(finished / "adapter_model.safetensors") == before
    assert [p.name for p in finished.parent.iterdir() if p.name.endswith(".part")] == []


def test_rows_without_a_token_to_learn(tokenizer, capsys):
    with pytest.raises(BadInputError, match="No row of addition has a token to train on within"):
        encode_rows(ROWS, tokenizer, replace(SPEC, max_length=6))
    assert len(encode_rows(ROWS, tokenizer, replace(SPEC, max_length=7))) == len(ROWS)
    assert capsys.readouterr().out == ""
    mixed = Dataset(
        "mixed",
        "train",
        ({"prompt": "1" * 20, "completion": "2"}, {"prompt": "1", "completion": "2"}),
        "generated",
        "",
    )
    (kept,) = encode_rows(mixed, tokenizer, replace(SPEC, max_length=10))
    assert len(kept["input_ids"]) == 3
    assert "1 of 2 rows left out" in capsys.readouterr().out


def test_bad_rows_and_bad_folders_are_said_before_training(tiny_folder, tmp_path):
    rows = Dataset("x", "train", ({"question": "a"},), "generated", "")
    with pytest.raises(BadInputError, match="is neither prompt/completion"):
        finetune(str(tiny_folder), rows, SPEC, tmp_path / "a", "trl")
    (tmp_path / "model").mkdir()
    shutil.copy(tiny_folder / "config.json", tmp_path / "model")
    with pytest.raises(CorruptFileError, match="lacks"):
        finetune(str(tmp_path / "model"), ROWS, SPEC, tmp_path / "a", "trl")
    assert not (tmp_path / "a").exists()


def test_qlora_on_a_cpu(tiny_folder, tiny, tmp_path):
    spec = replace(SPEC, quantization="nf4", steps=2)
    result = finetune(str(tiny_folder), ROWS, spec, tmp_path / "a", "trl")
    assert all(math.isfinite(loss) for _, loss in result.losses)
    # A 4-bit weight holds two parameters in a byte: the count stays the model's.
    assert result.total == tiny.model.num_parameters() + result.trainable
    assert all(w.dtype == torch.float32 for w in weights(result).values())


def test_accumulation_is_a_larger_batch(tiny_folder, tmp_path):
    eight = Dataset("x", "train", ROWS.rows[:8], "generated", "")
    spec = replace(SPEC, steps=1, batch_size=8)
    whole = finetune(str(tiny_folder), eight, spec, tmp_path / "a", "trl")
    spec = replace(spec, batch_size=2, accumulation=4)
    parts = finetune(str(tiny_folder), eight, spec, tmp_path / "b", "trl")
    assert parts.losses[0][1] == pytest.approx(whole.losses[0][1], rel=1e-4)
    assert parts.tokens == whole.tokens


def test_skill_adapter_keeps_train_and_test_apart(tiny_folder, home, monkeypatch):
    seen = {}

    def remember(model, rows, spec, engine):
        seen.update(model=model, rows=rows, spec=spec, engine=engine)
        return RESULT

    monkeypatch.setattr(train.recipes, "finetune", remember)
    result = skill_adapter("addition", "m", steps=5, seed=3, engine="trl")
    made = RECIPES["addition"]
    assert seen["spec"] == replace(made.spec, steps=5, seed=3)
    assert seen["rows"].rows == result.train.rows
    assert not {r["prompt"] for r in result.train} & {r["prompt"] for r in result.test}
    # One-digit sums are 100 in all: a fifth of them are asked, the rest are repeated in training,
    # so that both lengths are equally frequent there.
    asked = [r["digits"] for r in result.test]
    assert (asked.count(1), asked.count(2)) == (20, made.test)
    lengths = [r["digits"] for r in result.train]
    assert lengths.count(1) == lengths.count(2) == made.train


RESULT = train.TrainResult(
    Path("a"), "trl", "", ((1, 1.0),), 1.0, 1, 1, 1, 1, 1, 1, SPEC, {}, {}, "cpu"
)


# ---- held-out loss


def one_by_one(model, encoded):
    """The mean negative log-likelihood, a row and a token at a time."""
    total, count = 0.0, 0
    for row in encoded:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0].double()
        for place, label in enumerate(row["labels"]):
            if label != IGNORE:
                before = logits[place - 1]
                total -= float(before[label] - before.logsumexp(-1))
                count += 1
    return total / count


@pytest.fixture
def encoded(tokenizer):
    """Rows of very different lengths, so that padding and weighting by row would show."""
    pairs = [("1+1=", "2"), ("a" * 30, "xyz" * 9), ("reverse 12=", "21"), ("b", "c" * 20)]
    return [encode(tokenizer, Example(p, c)) for p, c in pairs]


def test_heldout_loss_counts_every_token_once(tiny, encoded):
    expected = one_by_one(tiny.model, encoded)
    assert heldout_loss(tiny.model, tiny.tokenizer, encoded) == pytest.approx(expected, rel=1e-5)
    by_row = sum(one_by_one(tiny.model, [e]) for e in encoded) / len(encoded)
    assert abs(by_row - expected) > 0.01  # the two means differ here, so the test can tell


def test_heldout_loss_does_not_depend_on_batches_or_order(tiny, encoded):
    losses = [heldout_loss(tiny.model, tiny.tokenizer, encoded, n) for n in (1, 2, 3, 16)]
    losses.append(heldout_loss(tiny.model, tiny.tokenizer, encoded[::-1], 2))
    assert losses == pytest.approx([losses[0]] * 5, rel=1e-5)


def test_heldout_loss_needs_a_label(tiny):
    masked = {"input_ids": [5, 6, 7], "labels": [IGNORE] * 3}
    for rows in ([], [masked]):
        with pytest.raises(BadInputError, match="No held-out row"):
            heldout_loss(tiny.model, tiny.tokenizer, rows)
