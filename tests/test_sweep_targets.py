"""Notebooks and recipes as targets of a sweep, the command, the summary's figure."""

import json

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from lora_kit import cli
from lora_kit.errors import BadInputError, NotAvailableError, UnknownNameError
from lora_kit.studies import sweep_recipes, sweep_summary
from lora_kit.studies.records import Record, read_record
from lora_kit.studies.sweep import sweep
from lora_kit.studies.sweep_grid import cells_of, name_of, read_grid
from lora_kit.studies.sweep_targets import find_target, fixed_parameters


@pytest.fixture
def notebook(tmp_path):
    def make(parameters):
        first = new_code_cell(parameters, metadata={"tags": ["parameters"]})
        work = "from lora_kit.notebook import record\nrecord(total=RANK * 10 + SEED)"
        made = new_notebook(cells=[first, new_code_cell(work)])
        made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
        path = tmp_path / "09_tiny.ipynb"
        nbformat.write(made, path)
        return str(path)

    return make


def test_a_notebook_runs_with_the_settings_and_the_seeds(notebook, tmp_path):
    path = notebook("RANK = 4\nSEED = 3")
    done = sweep(path, {"RANK": [1]}, 2, tmp_path / "out", jobs=1, say=lambda _: None)
    assert [r.metrics["total"] for r in done.records] == [10, 11]
    record = read_record(done.output / "RANK-1_seed1.json")
    assert record.study == "09_tiny"
    assert (record.seed, record.parameters) == (1, {"RANK": 1, "SEED": 1})
    assert (done.output / "cells" / "RANK-1_seed1" / "09_tiny.ipynb").exists()


def test_a_notebooks_seed_is_the_sweeps_own(notebook):
    path = notebook("RANK = 4\nSEED = 3")
    with pytest.raises(UnknownNameError, match="Did you mean 'RANK'"):
        sweep(path, {"RANKS": [1]})
    with pytest.raises(BadInputError, match="SEED is the sweep's own"):
        sweep(path, {"SEED": [1]})
    with pytest.raises(BadInputError, match="no parameter SEED, so its runs would be copies"):
        sweep(notebook("RANK = 4"), {"RANK": [1]}, seeds=2)


def test_the_courses_notebooks_are_targets_by_number_with_their_sets():
    target = find_target("03")
    assert (target.name, target.kind) == ("03_qlora_finetuning", "notebook")
    assert target.fixed == {"notebook": "03_qlora_finetuning"}  # wherever another machine has it
    fixed = fixed_parameters(target, {"MODEL": "x"}, "smoke", varied=["STEPS"])
    assert fixed["MODEL"] == "x"
    assert {"STEPS", "SEED"}.isdisjoint(fixed)
    with pytest.raises(BadInputError, match="-f is for notebooks"):
        fixed_parameters(find_target("alpaca"), {}, "smoke")


def test_a_recipe_trains_and_measures(tiny_folder, tmp_path):
    """In this process: what a worker would do."""
    rows = tmp_path / "mine.jsonl"
    lines = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(30)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = {"model": str(tiny_folder), "data": str(rows), "held_out": 6, "steps": 3}
    given |= {"quantization": "none", "style": "bare", "max_length": 64}
    [cell] = cells_of(find_target("alpaca"), {"rank": [2]}, [1], given)
    assert cell.name == "rank-2_seed1"
    record = sweep_recipes.run_cell(dict(cell.parameters), 1, tmp_path / "cell", "alpaca")
    assert record.seed == 1
    assert record.metrics["heldout_loss"] != record.metrics["heldout_loss_of_base"]
    assert len(record.tables["loss"]) == 3
    assert (tmp_path / "cell" / "adapter" / "adapter_model.safetensors").exists()
    assert record.data["rows"] == 24
    assert "exact" not in record.metrics


def test_a_skills_recipe_makes_its_rows_and_counts_exact_answers(tiny_folder, tmp_path):
    given = {"model": str(tiny_folder), "steps": 1, "batch_size": 4}
    [cell] = cells_of(find_target("reversal"), {}, [0], given)
    assert cell.name == "seed0"
    record = sweep_recipes.run_cell(dict(cell.parameters), 0, tmp_path / "cell", "reversal")
    assert record.metrics["exact"].n == 100  # two lengths, fifty of each


@pytest.mark.parametrize(
    ("name", "setting", "error", "words"),
    [
        ("alpaca", {}, BadInputError, "no rows of its own"),
        ("addition", {"data": "x.jsonl"}, BadInputError, "makes its own rows"),
        ("alpaca", {"data": "no/such.jsonl"}, NotAvailableError, "no file no/such.jsonl"),
        ("addition", {"rnk": 4}, UnknownNameError, "Did you mean 'rank'"),
        ("addition", {"rank": 0}, BadInputError, "rank must be at least 1"),
        ("addition", {"rank": 2.5}, BadInputError, "rank must be a whole number"),
        ("addition", {"checkpointing": "maybe"}, BadInputError, "checkpointing must be one of"),
        ("addition", {"seed": 3}, UnknownNameError, "Unknown parameter"),
        ("addition", {"held_out": 0}, BadInputError, "held_out must be at least 1"),
    ],
)
def test_a_recipes_settings_are_checked_before_anything_runs(name, setting, error, words):
    with pytest.raises(error, match=words):
        cells_of(find_target(name), [setting], [0])


def test_checkpointing_takes_a_word_or_a_truth_value():
    cells = cells_of(find_target("addition"), {"checkpointing": [True, False, "auto"]}, [0])
    assert [c.parameters["checkpointing"] for c in cells] == [True, False, "auto"]


# Names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ({"RANK": 8, "RATE": 0.001}, "RANK-8_RATE-0.001"),
        ({"RATE": 1e-05, "N": -1}, "RATE-1e-05_N--1"),
        ({"NF4": True, "NOTE": None}, "NF4-true_NOTE-none"),
        ({"LAYERS": [1, 2], "TARGETS": "all"}, "LAYERS-1+2_TARGETS-all"),
        ({}, ""),
    ],
)
def test_a_name_says_the_setting(setting, name):
    assert name_of(setting) == name


def test_what_a_name_cannot_say_gets_a_hash():
    names = [name_of({"A": v}) for v in ("8", "a b", "a/b", "true", {"x": 1}, [], "x" * 300)]
    names += [name_of({"A": 8}), name_of({"A": True})]
    assert len({n.lower() for n in names}) == len(names)
    assert all(len(n) <= 120 and "/" not in n and " " not in n for n in names)
    long = {f"PARAMETER_{i}": i * 1000 for i in range(12)}
    assert len(name_of(long)) <= 120
    assert name_of(long) != name_of({**long, "PARAMETER_11": 1})
    assert name_of(long) == name_of(dict(long))


def test_a_name_does_not_depend_on_the_order_of_the_grid():
    target = find_target("addition")
    one = cells_of(target, {"rank": [4], "steps": [5]}, [0])
    other = cells_of(target, {"steps": [5], "rank": [4]}, [0])
    assert one[0].name == other[0].name == "rank-4_steps-5_seed0"


# The command ------------------------------------------------------------------------------------


def test_the_command_runs_a_grid_file(tmp_path, capsys):
    from test_sweep import TARGET

    grid = tmp_path / "grid.yaml"
    grid.write_text("RANK: [4, 8]\nKIND: [plain]\n")
    words = ["sweep", TARGET, "--grid", str(grid), "--seeds", "0,4", "-p", "RATE", "1"]
    words += ["--jobs", "1", "-o", str(tmp_path / "out"), "--metric", "score"]
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert not ended.value.code
    out = capsys.readouterr().out
    assert "RANK-8_KIND-plain_seed4" in out
    assert "records and summary.csv in" in out
    assert len(list((tmp_path / "out").glob("*.json"))) == 4
    grid.write_text("RANK: [4]\nKIND: [always]\n")
    with pytest.raises(SystemExit) as ended:
        cli.main([*words[:-2]])
    assert ended.value.code == 2
    assert "2 run(s) failed, the first is RANK-4_KIND-always_seed0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("RANK: [4", "is not YAML"),
        ("", "this one is empty"),
        ("4", "is a mapping"),
        (None, "no gr"),
    ],
)
def test_a_grid_file_that_is_none(tmp_path, capsys, text, words):
    path = tmp_path / "grid.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit):
        cli.main(["sweep", "addition", "--grid", str(path)])
    assert words in capsys.readouterr().err


def test_seeds_are_a_number_or_a_list(tmp_path, capsys):
    path = tmp_path / "grid.yaml"
    path.write_text("rank: [4]")
    assert read_grid(path) == {"rank": [4]}
    with pytest.raises(SystemExit):
        cli.main(["sweep", "addition", "--grid", str(path), "--seeds", "few"])
    assert "--seeds takes a number" in capsys.readouterr().err


# The summary ------------------------------------------------------------------------------------


def records(settings, seeds=3, metrics=("score",)):
    return [
        Record(
            study="made",
            command="none",
            parameters=setting,
            metrics={name: float(sum(f"{setting}".encode())) + 0.1 * s for name in metrics},
            seed=s,
            seconds=1.0,
            hardware={},
            versions={},
            created="",
        )
        for setting in settings
        for s in range(seeds)
    ]


def test_a_metric_some_runs_lack_has_its_own_n():
    made = records([{"A": 1}, {"A": 2}])
    made[0].metrics["rare"] = 0.5
    table = sweep_summary.summarise(made, ["A"])
    assert table.query("metric == 'rare'")["n"].tolist() == [1]
    assert table.query("metric == 'score'")["n"].tolist() == [3, 3]
    only = sweep_summary.summarise(made, ["A"], ["rare"])
    assert only["metric"].tolist() == ["rare"]
    with pytest.raises(UnknownNameError, match="Did you mean 'rare'"):
        sweep_summary.summarise(made, ["A"], ["rar"])
    with pytest.raises(BadInputError, match="no parameter B"):
        sweep_summary.summarise(made, ["B"])
    assert sweep_summary.summarise([], ["A"]).empty


def test_the_figure_fits_the_grid():
    ranks = [{"rank": r, "kind": k} for r in (1, 4, 16) for k in ("a", "b")]
    table = sweep_summary.summarise(records(ranks), ["rank", "kind"])
    figure = sweep_summary.draw_summary(table)
    [panel] = figure.axes
    assert panel.get_xlabel() == "rank"
    assert panel.get_xscale() == "log"
    assert [t.get_text() for t in panel.get_legend().get_texts()] == ["kind a", "kind b"]
    words = sweep_summary.summarise(records([{"kind": k} for k in "abc"]), ["kind"])
    [panel] = sweep_summary.draw_summary(words).axes
    assert [t.get_text() for t in panel.get_yticklabels()] == ["kind a", "kind b", "kind c"]
    same = words.assign(mean=1.0)
    assert sweep_summary.draw_summary(same) is None
    many = sweep_summary.summarise(
        records([{"kind": k} for k in "ab"], metrics=[f"m{i}" for i in range(9)]), ["kind"]
    )
    assert len(sweep_summary.draw_summary(many).axes) == 4
    assert isinstance(many, pd.DataFrame)


@pytest.mark.parametrize(("text", "seeds"), [("3", 3), ("0,1,5", [0, 1, 5]), ("5,", [5])])
def test_seeds_are_a_number_of_them_or_which(text, seeds):
    from lora_kit.studies.sweep_command import _seeds

    assert _seeds(text) == seeds
