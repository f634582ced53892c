"""The Trainer's engines after a kill: whole checkpoints are taken up, damaged ones passed over."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from train_fixtures import tiny_spec

from lora_kit.errors import RunFailedError
from lora_kit.train import finetune
from lora_kit.train.finetune import smaller
from lora_kit.train.trainer_checkpoints import SEAL, newest_whole, seal

SCRIPT = textwrap.dedent("""
    import os, signal, sys
    from pathlib import Path
    from lora_kit.data import Dataset
    from lora_kit.train import TrainSpec, finetune
    model, output, stop = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    rows = tuple({"prompt": f"{i} +", "completion": f" {i} {i + 1}"} for i in range(12))
    spec = TrainSpec(rank=4, alpha=8, batch_size=4, steps=9, learning_rate=1e-2, dropout=0.1,
                     dtype="float32", warmup=0.0)

    def step(number, loss):
        if number == stop:
            os.kill(os.getpid(), signal.SIGKILL)

    done = finetune(model, Dataset("sums", "train", rows, "test", "0"), spec, output, "trl",
                    checkpoint_every=2, on_step=step)
    print("resumed at", done.resumed_at, "losses", len(done.losses))
""")


def start(folder, output, stop):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(output), str(stop)],
        capture_output=True,
        text=True,
        env=environment,
    )


def test_a_killed_trl_run_carries_on_and_ends_where_an_unbroken_one_does(tiny_folder, tmp_path):
    from safetensors.torch import load_file

    whole = start(tiny_folder, tmp_path / "whole", 0)
    assert "resumed at 0 losses 9" in whole.stdout, whole.stderr
    killed = start(tiny_folder, tmp_path / "killed", 7)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    again = start(tiny_folder, tmp_path / "killed", 0)
    assert "resumed at 6 losses 9" in again.stdout, again.stderr
    assert not (tmp_path / ".killed.checkpoints").exists()
    one, two = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "killed")
    )
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], atol=1e-6, rtol=1e-5)


def test_only_whole_checkpoints_of_the_same_run_count(tmp_path):
    for step in (2, 4, 6):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "state.bin").write_bytes(bytes(100))
        seal(folder, "this run")
    said = []
    assert newest_whole(tmp_path, "this run", said.append).name == "checkpoint-6"
    assert newest_whole(tmp_path, "another run", said.append) is None
    (tmp_path / "checkpoint-6" / "state.bin").write_bytes(bytes(50))
    (tmp_path / "checkpoint-4" / SEAL).unlink()
    assert newest_whole(tmp_path, "this run", said.append).name == "checkpoint-2"
    assert "checkpoint-6 is not whole (state.bin)" in said[0]
    assert "checkpoint-4 is not whole (whole.json)" in said[1]
    assert json.loads((tmp_path / "checkpoint-2" / SEAL).read_text())["identity"] == "this run"


def test_out_of_memory_makes_the_parts_smaller_and_keeps_the_step(capsys):
    spec = tiny_spec(batch_size=6, accumulation=2, checkpointing=False)
    sizes = []
    while True:
        spec = smaller(spec)
        sizes.append((spec.batch_size, spec.accumulation, spec.checkpointing))
        if spec.checkpointing:
            break
    assert sizes == [(4, 3, False), (3, 4, False), (2, 6, False), (1, 12, False), (1, 12, True)]
    assert "still 12 a step" in capsys.readouterr().out
    with pytest.raises(RunFailedError, match=r"single row.*max_length.*nf4"):
        smaller(spec)


def test_a_run_out_of_memory_is_begun_again_smaller(tiny_folder, tmp_path, monkeypatch):
    from lora_kit.data import Dataset
    from lora_kit.train import engines

    real, seen = engines.train, []

    def tight(model, tokenizer, rows, spec, *rest):
        seen.append(spec.batch_size)
        if spec.batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        return real(model, tokenizer, rows, spec, *rest)

    monkeypatch.setattr(engines, "train", tight)
    rows = tuple({"prompt": f"{i} +", "completion": f" {i}"} for i in range(8))
    data = Dataset("sums", "train", rows, "test", "0")
    spec = replace(tiny_spec(batch_size=4, steps=2), warmup=0.0)
    done = finetune(str(tiny_folder), data, spec, tmp_path / "a", "trl")
    assert seen == [4, 2]
    assert len(done.losses) == 2
