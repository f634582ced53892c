import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from train_fixtures import adapted, some_rows, tiny_spec, trained

from lora_kit.train import native
from lora_kit.train.checkpoints import Checkpoints, random_states

STEPS = 5


def spec():
    return tiny_spec(dropout=0.2, steps=STEPS)


def keep_all(folder, said=None):
    return Checkpoints(folder, "run-1", keep=100, say=(said if said is not None else []).append)


def train(folder, steps=STEPS, stop_after=None, said=None):
    """A run with a checkpoint each step; `stop_after`: break off there, as a crash would."""

    class Stop(Exception):
        pass

    def on_step(step, _):
        if stop_after is not None and step > stop_after:
            raise Stop

    model = adapted(spec())
    try:
        keep = keep_all(folder, said)
        native.train(model, some_rows(10), spec(), steps, 0, keep, 1, on_step, lambda *_: None)
    except Stop:
        pass
    return model


def same(one, other, path=""):
    """Every tensor and value equal, bit for bit; the run's clock is its own."""
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, path
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one.keys() - {"seconds"}:
            same(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            same(a, b, f"{path}/{i}")
    else:
        assert one == other, path


def states(folder):
    return {
        path.name: torch.load(path / "state.pt", weights_only=True)
        for path in sorted(folder.glob("step-*"))
    }


def test_a_run_broken_off_anywhere_repeats_the_unbroken_one_bit_for_bit(tmp_path):
    """Adapter, optimiser, random state and losses, at every checkpoint, dropout on."""
    whole = train(tmp_path / "whole")
    expected = states(tmp_path / "whole")
    assert len(expected) == STEPS
    for stop in (1, 4):
        folder = tmp_path / f"broken-{stop}"
        train(folder, stop_after=stop)
        assert len(states(folder)) == stop
        model = train(folder)
        same(states(folder), expected)
        same(
            {n: p.detach() for n, p in trained(model).items()},
            {n: p.detach() for n, p in trained(whole).items()},
        )


def test_a_checkpoint_holds_what_the_next_step_depends_on(tmp_path):
    train(tmp_path)
    state = states(tmp_path)["step-00000003"]
    assert set(state) == {"adapter", "optimizer", "scaler", "random", "progress"}
    moments = state["optimizer"]["state"][0]
    assert {"exp_avg", "exp_avg_sq", "step"} <= set(moments)
    assert float(moments["step"]) == 3
    assert len(state["progress"]["losses"]) == 3


def test_the_loss_scale_is_kept_under_fp16(tmp_path):
    def half():
        model = adapted(spec()).half()
        for parameter in trained(model).values():
            parameter.data = parameter.data.float()
        return model

    for name, steps in (("whole", (STEPS,)), ("broken", (3, STEPS))):
        for until in steps:
            keep = Checkpoints(tmp_path / name, "x", keep=100, say=lambda s: None)
            seen = []
            full = tiny_spec(dropout=0.2, steps=STEPS, schedule="constant")
            native.train(
                half(), some_rows(10), full, until, 0, keep, 1, lambda *_: None, seen.append
            )
    same(states(tmp_path / "broken"), states(tmp_path / "whole"))


def test_8_bit_and_plain_adamw_states_survive_the_disk(tmp_path):
    """bitsandbytes' optimisers need a GPU; their kind of state (bytes, tables) does not."""
    keep = keep_all(tmp_path)
    state = {"state1": torch.arange(9, dtype=torch.uint8), "qmap": torch.rand(256), "step": 4}
    keep.save(1, {"optimizer": {"state": {0: state}}})
    same(keep.newest(), {"optimizer": {"state": {0: state}}})


# ------------------------------------------------------------------ real processes, really killed

CHILD = """
import sys
sys.path[:0] = {paths!r}
import time
from test_train_checkpoints import keep_all, spec, STEPS
from train_fixtures import adapted, some_rows
from lora_kit.train import native
from pathlib import Path
def on_step(step, loss):
    print(step, flush=True)
    time.sleep(0.05)
keep = keep_all(Path({folder!r}))
native.train(adapted(spec()), some_rows(10), spec(), STEPS, 0, keep, 1, on_step, lambda *_: None)
print("done", flush=True)
"""


def start(folder):
    here = os.path.dirname(__file__)
    code = CHILD.format(paths=[os.path.dirname(here), here], folder=str(folder))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_killed_processes_carry_on_bit_for_bit(tmp_path):
    """SIGKILL at random moments, again and again, until a process reaches the end."""
    train(tmp_path / "whole")
    draw = random.Random(time.time_ns())
    folder, kills = tmp_path / "killed", 0
    for _ in range(4):
        child = start(folder)
        wait = draw.randint(1, 3)  # steps of this life
        seen = 0
        for line in child.stdout:
            if line.strip() == "done":
                break
            seen += 1
            if seen == wait and kills < 3:
                time.sleep(draw.random() * 0.06)  # in a step, or while a checkpoint is written
                child.send_signal(signal.SIGKILL)
                break
        child.stdout.close()
        if child.wait() == -signal.SIGKILL:
            kills += 1
        else:
            break
    assert kills >= 1
    assert child.returncode == 0, "the last process should have reached the end"
    same(states(folder), states(tmp_path / "whole"))


# ------------------------------------------------------------------ damage


def damaged(folder, how):
    last = sorted(folder.glob("step-*"))[-1]
    state = last / "state.pt"
    if how == "truncated":
        state.write_bytes(state.read_bytes()[:-100])
    elif how == "flipped bit":
        data = bytearray(state.read_bytes())
        data[len(data) // 2] ^= 1
        state.write_bytes(bytes(data))
    elif how == "no state":
        state.unlink()
    else:
        (last / "checkpoint.json").write_text('{"identity": ')


@pytest.mark.parametrize("how", ["truncated", "flipped bit", "no state", "half a record"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path, how):
    train(tmp_path / "whole")
    train(tmp_path / "broken", stop_after=4)
    damaged(tmp_path / "broken", how)
    said = []
    assert keep_all(tmp_path / "broken", said).newest()["progress"]["step"] == 3
    assert "Falling back to the checkpoint before" in said[0]
    train(tmp_path / "broken", said=said)
    same(states(tmp_path / "broken"), states(tmp_path / "whole"))


def test_all_damaged_means_from_the_start(tmp_path):
    train(tmp_path, stop_after=2)
    for folder in tmp_path.glob("step-*"):
        (folder / "state.pt").write_bytes(b"")
    assert keep_all(tmp_path).newest() is None


def test_checkpoints_of_another_run_are_passed_over(tmp_path):
    train(tmp_path, stop_after=2)
    assert Checkpoints(tmp_path, "another run").newest() is None
    assert keep_all(tmp_path).newest()["progress"]["step"] == 2


def test_a_full_disk_stops_nothing_and_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    said = []
    train(tmp_path, stop_after=3)
    monkeypatch.setattr(
        os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    model = train(tmp_path, said=said)
    assert all(bool(p.isfinite().all()) for p in trained(model).values())
    assert "Checkpoint at step 4 not written (No space left on device)" in said[0]
    assert len(said) == STEPS - 3
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-0000000{i}" for i in (1, 2, 3)]
    assert keep_all(tmp_path).newest()["progress"]["step"] == 3


def test_only_the_newest_two_stay(tmp_path):
    keep = Checkpoints(tmp_path, "x")
    for step in range(1, 6):
        keep.save(step, {"progress": {"step": step}})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]


def test_what_a_killed_save_left_is_removed(tmp_path):
    keep = keep_all(tmp_path)
    keep.save(1, {"step": 1})
    left = tmp_path / ".step-00000002.abcdefgh.part"
    left.mkdir()
    (left / "state.pt").write_bytes(b"half")
    assert keep.newest() == {"step": 1}
    assert not left.exists()


def test_a_checkpoint_is_no_program(tmp_path):
    """weights_only: a pickle that would run code is refused."""
    import hashlib
    import pickle

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    folder = tmp_path / "step-00000001"
    folder.mkdir()
    data = pickle.dumps(Evil(), protocol=2)
    (folder / "state.pt").write_bytes(data)
    facts = {"identity": "run-1", "step": 1, "bytes": len(data)}
    facts["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "checkpoint.json").write_text(json.dumps(facts))
    with pytest.raises(pickle.UnpicklingError):
        keep_all(tmp_path).newest()
    assert not (tmp_path / "ran").exists()


def test_random_states_are_those_of_torch():
    torch.manual_seed(5)
    assert torch.equal(random_states()[0], torch.get_rng_state())
