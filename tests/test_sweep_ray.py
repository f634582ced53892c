"""Sweeps through Ray: a real one on this machine, with two workers."""

import os
import sys
from pathlib import Path

import pandas as pd
import pytest

from lora_kit.errors import BadInputError, NotAvailableError
from lora_kit.studies.calls import call
from lora_kit.studies.sweep import sweep
from lora_kit.studies.sweep_ray import GRAMMAR, ray_pool

CELLS = Path(__file__).with_name("sweep_cells.py")


def test_a_sweep_on_two_workers_one_of_which_is_killed(tmp_path, monkeypatch):
    """The same table as from processes of this machine: killed, failing and plain runs."""
    monkeypatch.setenv("TMPDIR", "/tmp")  # Ray's sockets have names of 107 characters at most
    before = dict(os.environ)
    grid = {"RANK": [4, 8], "KIND": ["plain", "killed", "always"]}
    target = f"{CELLS}:run_cell"
    said: list[str] = []
    through_ray = sweep(target, grid, 2, tmp_path / "ray", engine="ray", jobs=2, say=said.append)
    here = sweep(target, grid, 2, tmp_path / "local", jobs=1, say=lambda _: None)
    pd.testing.assert_frame_equal(through_ray.summary, here.summary)
    names = sorted(p.name for p in through_ray.output.glob("*.json"))
    assert names == sorted(p.name for p in here.output.glob("*.json"))
    assert len(names) == 8
    assert sorted(f.name for f in through_ray.failures) == sorted(f.name for f in here.failures)
    assert {f.error for f in through_ray.failures} == {"ValueError: no good at try 1"}
    lost = [line for line in said if "killed" in line and "its worker was lost" in line]
    assert len(lost) == 4  # each killed run once
    runs = {p.parent.name: p.read_text() for p in through_ray.output.glob("cells/*/try0")}
    again = {p.parent.name: p.read_text() for p in through_ray.output.glob("cells/*/try1")}
    assert len(set(runs.values())) > 1
    for name in (n for n in runs if "killed" in n):
        assert again[name] != runs[name]  # in another process
    assert str(os.getpid()) not in runs.values()
    # What Ray was told by the environment is gone again, and Ray too.
    changed = {k for k in before | os.environ if before.get(k) != os.environ.get(k)}
    assert not {k for k in changed if k.startswith("RAY_USAGE") or k == "PYTHONPATH"}
    assert sys.modules.get(GRAMMAR, "never imported") is not None
    import ray

    assert not ray.is_initialized()


def test_a_cluster_that_does_not_answer_is_named(monkeypatch):
    import ray

    def refuse(address, **_):
        raise ConnectionError(f"cannot reach {address}\nand much more")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(NotAvailableError, match="No Ray cluster answers at nowhere:1: cannot"):
        ray_pool(address="nowhere:1")
    with pytest.raises(BadInputError, match="at least 1"):
        ray_pool(jobs=0)


def test_cells_of_a_file_travel_with_the_task(tmp_path, home):
    """A machine that lacks the file writes it to its own cache and runs it from there."""
    from lora_kit.studies.sweep_ray import _task

    text = "import pathlib\ndef where(extra, function):\n    return [__file__, extra, function]\n"
    path = "/no/such/folder/far_cells.py"
    said = _task(f"{path}:where", {"extra": 3, "function": f"{path}:where"}, {path: text})
    here, extra, function = said["value"]
    assert extra == 3
    assert Path(here).is_relative_to(home)
    assert function == f"{here}:where"
    assert said["seconds"] >= 0
    assert "There is no file" in call(f"{path}:where", {})["error"]
