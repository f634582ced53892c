import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_fixtures import adapted, some_rows, tiny_spec, trained
from train_together import SPEC, rows_of

from lora_kit.errors import BadInputError
from lora_kit.train import TrainSpec, finetune, native
from lora_kit.train import finetune as finetune_module
from lora_kit.train.graphs import Steps
from lora_kit.train.processes import Processes, processes

SCRIPT = Path(__file__).with_name("train_together.py")


def test_one_process_alone_is_the_whole_crew():
    crew = processes()
    assert (crew.count, crew.index, crew.main) == (1, 0, True)
    assert crew.share([1, 2, 3]) == [1, 2, 3]
    assert crew.sum_up("the loss as it is", []) == "the loss as it is"


def test_every_row_of_a_step_goes_to_one_process():
    rows = list(range(7))
    shares = [Processes(3, i).share(rows) for i in range(3)]
    assert sorted(row for share in shares for row in share) == rows
    assert [Processes(3, i).share([8]) for i in range(3)] == [[8], [], []]


def test_shares_of_unequal_labels_add_up_to_the_gradient_of_the_whole_step(monkeypatch):
    """Run one after the other here, with the message replaced by a plain sum."""
    rows, spec = some_rows(7), tiny_spec(batch_size=7)

    def gradients(count):
        found = []
        for index in range(count):
            crew = Processes(count, index)
            crew.sum_up = lambda loss, _: loss
            monkeypatch.setattr(native, "processes", lambda crew=crew: crew)
            model = adapted()
            once = native.partial(
                native.forward_backward, model, torch.float32, torch.amp.GradScaler(enabled=False)
            )
            progress = native.Progress(at_once=7)
            steps = Steps(once, trained(model).values())
            loss = native.backward(steps, rows, spec, progress, 0, print)
            assert progress.tokens == sum(len(r["input_ids"]) for r in rows)  # of the whole step
            found.append([loss, *(p.grad for p in trained(model).values())])
        return [sum(parts) for parts in zip(*found, strict=True)]

    for one, other in zip(gradients(1), gradients(3), strict=True):
        torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-4)


def test_other_engines_refuse_to_be_shared(monkeypatch, tiny_folder, tmp_path):
    monkeypatch.setattr(
        sys.modules[finetune_module.__module__], "processes", lambda: Processes(2, 0)
    )
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": "1+1=", "completion": "2"}]))
    with pytest.raises(BadInputError, match="engine native, not with trl"):
        finetune(str(tiny_folder), rows_of(path), TrainSpec(**SPEC), tmp_path / "a", engine="trl")


def test_two_processes_make_the_adapter_of_one(tiny_folder, tmp_path):
    """Two real ones under torchrun, over gloo: rows of very different lengths, 10 a step of 23, so
    that an epoch's last step has an odd number of them."""
    made = [{"prompt": f"{i}+{i * 3}=", "completion": "7" * (1 + i * i % 9)} for i in range(23)]
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(made))
    together = tmp_path / "together"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(SCRIPT.parents[1]))
    told = subprocess.run(
        [*command, str(SCRIPT), str(tiny_folder), str(rows), str(together)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert told.returncode == 0, told.stderr[-2000:]
    assert told.stdout.count("step    5 of 5") == 1  # one of them speaks
    alone = finetune(
        str(tiny_folder), rows_of(rows), TrainSpec(**SPEC), tmp_path / "alone", engine="native"
    )
    facts = [json.loads((tmp_path / f"together.{i}.json").read_text()) for i in range(2)]
    assert facts[0]["count"] == 2
    assert facts[0] == facts[1]
    assert facts[0]["tokens"] == alone.tokens
    assert facts[0]["trained"] == alone.trained_tokens
    for (step, loss), (_, wanted) in zip(facts[0]["losses"], alone.losses, strict=True):
        assert loss == pytest.approx(wanted, abs=1e-5), step
    one = load_file(alone.adapter / "adapter_model.safetensors")
    two = load_file(together / "adapter_model.safetensors")
    assert one.keys() == two.keys()
    moved = 0.0
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-5, rtol=1e-3)
        moved = max(moved, float(tensor.abs().max()) if "lora_B" in name else 0.0)
    assert moved > 1e-2  # B starts at zero: it was trained at all
    assert not list(tmp_path.glob(".together.checkpoints*"))
