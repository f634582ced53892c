import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from lora_kit import store
from lora_kit.errors import BadInputError, BusyError, NotAvailableError, UnknownNameError
from lora_kit.studies.jobs import Clock, Job, Outcome, run_jobs
from lora_kit.studies.records import read_record, read_records
from lora_kit.studies.sweep import sweep
from lora_kit.studies.sweep_targets import TARGETS, find_target

CELLS = Path(__file__).with_name("sweep_cells.py")
TARGET = f"{CELLS}:run_cell"
GRID = {"RANK": [4, 8, 16], "RATE": [0.1, 0.2]}


@pytest.fixture
def run(tmp_path):
    def go(grid=None, seeds=2, target=TARGET, **options):
        said = []
        options = {"output": tmp_path / "out", "jobs": 1, "say": said.append} | options
        done = sweep(target, GRID if grid is None else grid, seeds, **options)
        return done, said

    return go


def tries(done, name):
    return len(list((done.output / "cells" / name).glob("try*")))


# What comes out --------------------------------------------------------------------------------


def test_a_record_a_run_and_a_table_of_settings(run):
    done, said = run({"RANK": [4, 8]}, seeds=3, fixed={"RATE": 0.5})
    names = sorted(p.stem for p in done.output.glob("*.json"))
    assert names == [f"RANK-{r}_seed{s}" for r in (4, 8) for s in range(3)]
    record = read_record(done.output / "RANK-8_seed2.json")
    assert record.seed == 2
    assert record.parameters["RANK"] == 8
    assert record.parameters["RATE"] == 0.5  # fixed
    assert record.parameters["LAYERS"] == [1, 2]  # by default
    assert record.parameters["note"] == "the cell's own"
    assert list(done.summary.columns) == ["RANK", "metric", "mean", "low", "high", "n"]
    row = done.summary.query("RANK == 8 and metric == 'score'").iloc[0]
    assert row["mean"] == pytest.approx(5)  # of 4, 5 and 6
    assert row["high"] - row["mean"] == pytest.approx(4.302653 / 3**0.5, rel=1e-5)  # t(2)·s/√3
    assert row["n"] == 3
    kept = pd.read_csv(done.output / "summary.csv")
    assert kept["mean"].tolist() == pytest.approx(done.summary["mean"].tolist())
    assert done.figure == done.output / "figures" / "sweep_sweep_cells.png"
    assert done.figure.stat().st_size > 1000
    assert (done.failures, done.left) == ((), ())
    assert [r.parameters["RANK"] for r in done.records] == [4, 4, 4, 8, 8, 8]
    # The folder holds records and nothing else that reads as one.
    assert len(read_records("out", done.output.parent)) == 6
    assert said[0].endswith("6 runs, 0 of them finished already")
    assert said[1].startswith("1 of 6  RANK-4_seed0: ")
    assert "to go" in said[1]
    assert (done.output / "cells" / "logs" / "RANK-4_seed0.log").read_text() == "try 0\n"


def test_one_process_takes_one_cell_after_another(run):
    done, _ = run({"RANK": [1, 2, 3]}, seeds=1)
    pids = {p.read_text() for p in done.output.glob("cells/*/try0")}
    assert len(pids) == 1
    assert pids != {str(os.getpid())}


def test_a_list_of_settings(run):
    done, _ = run([{"RANK": 8, "LAYERS": [3]}, {"RATE": 1.0}], seeds=[5])
    assert sorted(p.name for p in done.output.glob("*.json")) == [
        "RANK-8_LAYERS-3_seed5.json",
        "RATE-1.0_seed5.json",
    ]
    # The default stands where a setting is silent.
    table = done.summary.query("metric == 'score'")
    assert table[["RANK", "LAYERS", "RATE"]].values.tolist() == [[8, "3", 0.1], [4, "1+2", 1.0]]
    assert table["low"].isna().all()  # of one run there is no interval


# Again ------------------------------------------------------------------------------------------


def test_finished_runs_are_not_repeated_and_a_longer_grid_goes_on(run):
    first, _ = run({"RANK": [4]}, seeds=1)
    done, said = run({"RANK": [4, 8]}, seeds=2)
    assert said[0].endswith("4 runs, 1 of them finished already")
    assert tries(done, "RANK-4_seed0") == 1
    assert len(done.records) == 4
    assert done.records[0] == first.records[0]
    _, said = run({"RANK": [4, 8]}, seeds=2)
    assert len(said) == 1


def test_a_damaged_record_is_made_again(run):
    done, _ = run({"RANK": [4, 8]}, seeds=1)
    path = done.output / "RANK-4_seed0.json"
    whole = path.read_text()
    for damage in (whole[:100], "", '{"schema": 1}'):
        path.write_text(damage)
        done, said = run({"RANK": [4, 8]}, seeds=1)
        assert any(line.startswith("run again: ") and "RANK-4_seed0" in line for line in said)
        assert path.read_text() == whole
        assert not done.failures


def test_a_record_of_another_run_is_refused_before_any_work(run):
    done, _ = run({"RANK": [4]}, seeds=1)
    with pytest.raises(BadInputError, match=r"RANK-4_seed0.json is of another run: RATE is 0.1 "):
        run({"RANK": [2, 4]}, seeds=1, fixed={"RATE": 0.3})
    assert not (done.output / "RANK-2_seed0.json").exists()
    path = done.output / "RANK-4_seed0.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "seed": 7}))
    with pytest.raises(BadInputError, match="its seed is 7"):
        run({"RANK": [4]}, seeds=1)


def test_a_parameter_the_target_got_later_counts_as_its_default(run):
    done, _ = run({"RANK": [4]}, seeds=1)
    path = done.output / "RANK-4_seed0.json"
    facts = json.loads(path.read_text())
    del facts["parameters"]["RATE"]
    path.write_text(json.dumps(facts))
    assert len(run({"RANK": [4]}, seeds=1)[1]) == 1
    with pytest.raises(BadInputError, match=r"RATE is nothing there, 0\.3 here"):
        run({"RANK": [4]}, seeds=1, fixed={"RATE": 0.3})


def test_scratch_of_another_setting_is_cleared(run, tmp_path):
    """Same name, other fixed parameters: what the first left must not be taken up."""
    first, _ = run({"RANK": [4]}, seeds=1, work=tmp_path / "work")
    (first.output / "RANK-4_seed0.json").unlink()
    run({"RANK": [4]}, seeds=1, work=tmp_path / "work")
    cell = tmp_path / "work" / "RANK-4_seed0"
    assert len(list(cell.glob("try*"))) == 2  # taken up
    (first.output / "RANK-4_seed0.json").unlink()
    run({"RANK": [4]}, seeds=1, work=tmp_path / "work", fixed={"RATE": 0.3})
    assert len(list(cell.glob("try*"))) == 1  # anew


# Failures ---------------------------------------------------------------------------------------


def test_a_failing_run_is_tried_once_more_and_the_others_go_on(run):
    done, said = run({"KIND": ["always", "once", "other", "plain"]}, seeds=1)
    assert [f.name for f in done.failures] == ["KIND-always_seed0", "KIND-other_seed0"]
    assert [r.parameters["KIND"] for r in done.records] == ["once", "plain"]
    assert tries(done, "KIND-always_seed0") == tries(done, "KIND-once_seed0") == 2
    failure = json.loads((done.output / "failed" / "KIND-always_seed0.json").read_text())
    assert failure["error"] == "ValueError: no good at try 1"
    assert failure["attempts"] == 2
    assert "sweep_cells.py" in failure["traceback"]
    assert failure["parameters"]["KIND"] == "always"
    assert "returned dict, not a lora_kit" in done.failures[1].error
    assert not (done.output / "failed" / "KIND-once_seed0.json").exists()  # it ended well
    assert "KIND-once_seed0 tried again: ValueError: no good at try 0" in said
    assert not (done.output / "KIND-always_seed0.json").exists()
    # The next call tries again.
    again, _ = run({"KIND": ["always", "once", "other", "plain"]}, seeds=1)
    assert tries(again, "KIND-always_seed0") == 4
    assert tries(again, "KIND-plain_seed0") == 1


def test_a_killed_worker_is_replaced_and_its_run_done_again(run):
    done, said = run({"KIND": ["killed", "plain"]}, seeds=2)
    assert len(done.records) == 4
    assert not done.failures
    lost = "KIND-killed_seed0 tried again: its process was killed by SIGKILL"
    assert lost in said


def test_a_run_that_kills_every_worker_is_given_up(run):
    done, _ = run({"KIND": ["doomed", "plain"]}, seeds=1)
    assert [f.attempts for f in done.failures] == [3]
    assert "killed by SIGKILL" in done.failures[0].error
    assert done.failures[0].traceback == "try 0\ntry 1\ntry 2"  # the log's end
    assert len(done.records) == 1


PROGRAM = """
import sys
from pathlib import Path
from lora_kit.studies.sweep import sweep
sweep({target!r}, {grid!r}, 2, Path(sys.argv[1]), fixed={{"SECONDS": 0.15}}, jobs=1)
"""


def test_a_sweep_killed_at_any_moment_resumes_to_the_same_table(run, tmp_path):
    whole, _ = run(fixed={"SECONDS": 0.15}, output=tmp_path / "whole")
    output = tmp_path / "broken"
    program = PROGRAM.format(target=TARGET, grid=GRID)
    environment = {**os.environ, "PYTHONPATH": str(CELLS.parents[1])}
    wait = random.Random(time.time_ns()).uniform(0, 1.2)
    process = subprocess.Popen([sys.executable, "-c", program, str(output)], env=environment)
    try:
        begun = time.monotonic()
        # Counted from the first cell on, so that something is interrupted.
        while not list(output.glob("cells/*/try0")) and time.monotonic() - begun < 60:
            time.sleep(0.01)
        time.sleep(wait)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    pids = {int(p.read_text()) for p in output.glob("cells/*/try*") if p.read_text()}
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(alive(pid) for pid in pids), "a worker outlived its sweep"
    assert len(list(output.glob("*.json"))) < 12, wait
    done, _ = run(fixed={"SECONDS": 0.15}, output=output)
    pd.testing.assert_frame_equal(done.summary, whole.summary)
    assert (output / "summary.csv").read_text() == (whole.output / "summary.csv").read_text()
    assert not done.failures
    for cell in whole.output.glob("*.json"):
        assert json.loads((output / cell.name).read_text()) == json.loads(cell.read_text()), wait


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_two_sweeps_into_one_folder_do_not_meet(run, tmp_path):
    with (
        store.lock(tmp_path / "out"),
        pytest.raises(BusyError, match="Another process is at work in"),
    ):
        run()
    assert len(run({"RANK": [4]}, seeds=1)[0].records) == 1


# Time -------------------------------------------------------------------------------------------


class Scripted(Clock):
    """An engine whose jobs take ten seconds of its own clock, each as long as it runs."""

    passed = 0.0

    def __init__(self, budget, slots, fails=()):
        super().__init__(budget)
        self.slots, self.fails, self.running, self.order = slots, set(fails), [], []

    def start(self, job):
        assert len(self.running) < self.slots
        self.running.append((self.passed + 10, job))
        self.order.append(job.name)

    def wait(self, seconds):
        ends, job = self.running.pop(0)
        self.passed = ends
        error = "no" if job.name in self.fails else None
        return [(job, Outcome(error=error, seconds=10))]

    def close(self):
        self.closed = True


@pytest.mark.parametrize(
    ("slots", "budget", "settings"), [(1, 45, 2), (1, 35, 1), (2, 35, 3), (4, 35, 6), (3, None, 8)]
)
def test_a_budget_leaves_whole_settings(slots, budget, settings):
    """Of eight settings of two seeds: none is begun that would not end in time as a whole."""
    jobs = [Job(f"{group}{seed}", "", group=str(group)) for group in range(8) for seed in "ab"]
    scripted = Scripted(budget, slots)
    ended = run_jobs(jobs, scripted, scripted, say=pytest.fail)
    assert scripted.order == [job.name for job in jobs[: 2 * settings]]
    assert list(ended.done) == scripted.order
    assert ended.left == [job.name for job in jobs[2 * settings :]]
    assert scripted.closed


def test_a_setting_that_was_begun_before_is_finished_seed_by_seed():
    scripted = Scripted(25, 1)
    scripted.note(Job("x", ""), 10)
    ended = run_jobs([Job("0b", "", group="0")], scripted, scripted, begun=["0"])
    assert list(ended.done) == ["0b"]
    late = Scripted(9, 1)
    late.note(Job("x", ""), 10)
    assert run_jobs([Job("0b", "", group="0")], late, late, begun=["0"]).left == ["0b"]


def test_jobs_wait_for_what_they_need():
    jobs = [Job("b", "", needs=("a",)), Job("a", ""), Job("d", "", needs=("c",)), Job("c", "")]
    scripted = Scripted(None, 1, fails=["c"])
    ended = run_jobs(jobs, scripted, scripted)
    assert scripted.order == ["a", "b", "c", "c"]
    assert (list(ended.failed), ended.left, ended.attempts["c"]) == (["c"], ["d"], 2)


def test_what_outlasts_the_budget_is_cut_off_and_taken_up(run, monkeypatch):
    monkeypatch.setattr("lora_kit.studies.jobs.GRACE", 0.2)
    fixed = {"SECONDS": 30.0}
    begun = time.monotonic()
    done, said = run({"RANK": [1]}, seeds=1, fixed=fixed, budget=3)
    assert time.monotonic() - begun < 20
    assert done.left == ("RANK-1_seed0",)
    assert said[-1] == "the budget is spent: 1 job(s) that still run are cut off"
    assert not done.failures


# Refused before any work ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "error", "words"),
    [
        ({"RNAK": [4]}, UnknownNameError, "Did you mean 'RANK'"),
        ({"RANK": []}, BadInputError, "RANK is an empty list"),
        ({"RANK": 4}, BadInputError, "RANK must be a list of values, not 4"),
        ({"KIND": "plain"}, BadInputError, r"KIND must be a list of values, not 'plain'"),
        ({"RATE": [float("nan")]}, BadInputError, "RATE must be a finite number"),
        ({"LAYERS": [[1, float("inf")]]}, BadInputError, "LAYERS must be a finite number"),
        ({"RANK": [4, "8"]}, BadInputError, "RANK must be a whole number"),
        ({"RANK": [4, 8, 4]}, BadInputError, "one setting twice: RANK 4 and RANK 4"),
        ([{"RANK": 8}, {"RANK": 8, "RATE": 0.1}], BadInputError, "are the same run"),
        ([], BadInputError, "empty list"),
        ([4], BadInputError, "holds settings"),
        (None, BadInputError, "this one is empty"),
        ("RANK", BadInputError, "'RANK'"),
        ({"RANK": [1000]}, BadInputError, "RANK must be 512 at most"),
        ({"RATE": [object()]}, BadInputError, "plain value"),
        ({"KIND": ["a b", "a/b"]}, None, ""),
        ({"KIND": ["Plain", "plain"]}, BadInputError, "share the name"),
    ],
)
def test_bad_grids(run, tmp_path, grid, error, words):
    if error is None:
        assert len(run(grid, seeds=1)[0].records) == 2
        return
    with pytest.raises(error, match=words):
        sweep(TARGET, grid, 1, tmp_path / "out", jobs=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"seeds": 0}, BadInputError, "at least one seed"),
        ({"seeds": [1, 1]}, BadInputError, "listed twice"),
        ({"seeds": [-1]}, BadInputError, "from 0 up"),
        ({"jobs": 0}, BadInputError, "jobs must be at least 1"),
        ({"jobs": 10_000}, BadInputError, "more than this machine's"),
        ({"budget": 0}, BadInputError, "above 0"),
        ({"engine": "rya"}, UnknownNameError, "Did you mean 'ray'"),
        ({"address": "host:1"}, BadInputError, "add --engine ray"),
        ({"fixed": {"RANK": 8}}, BadInputError, "in the grid and fixed as well"),
        ({"fixed": {"RNAK": 8}}, UnknownNameError, "Did you mean 'RANK'"),
        ({"target": f"{CELLS}:run_cel"}, NotAvailableError, "has no function run_cel"),
        ({"target": "nowhere.py:run_cell"}, NotAvailableError, "There is no file"),
        ({"target": "no.such.module:run_cell"}, NotAvailableError, "There is no module"),
        ({"target": "alpacca"}, UnknownNameError, "Did you mean 'alpaca'"),
    ],
)
def test_bad_options(run, options, error, words):
    with pytest.raises(error, match=words):
        run({"RANK": [4]}, **options)


def test_the_metric_of_a_figure_must_exist(run):
    run({"RANK": [4, 8]}, seeds=1)
    with pytest.raises(UnknownNameError, match="Did you mean 'score'"):
        run({"RANK": [4, 8]}, seeds=1, metrics=["scores"])


# Targets ----------------------------------------------------------------------------------------


def test_studies_are_found_by_name_or_named_as_missing():
    assert {"arithmetic", "specialists", "shop"} <= TARGETS.keys()
    for name, place in TARGETS.items():
        module = store.repository() / (place.split(":")[0].replace(".", "/") + ".py")
        if module.exists():
            found = find_target(name)
            assert found.defaults, f"{place} has no DEFAULTS: its parameters cannot be checked"
        else:
            with pytest.raises(NotAvailableError, match="There is no module"):
                find_target(name)
