"""Running a notebook: checked parameters in; executed copy and record out, or which cell failed."""

import base64
import io
import json

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image as Picture

from lora_kit import store
from lora_kit.errors import (
    BadInputError,
    CorruptFileError,
    DiskSpaceError,
    RunFailedError,
    UnknownNameError,
)
from lora_kit.notebook import MIME
from lora_kit.studies import runner
from lora_kit.studies.records import read_record

PARAMETERS = 'STEPS = 3\nRATE = 0.5  # a comment\nQUANTIZATION = "none"\nSEED = 7'


@pytest.fixture
def make(tmp_path):
    """Write a notebook of code cells, the first one tagged `parameters`."""

    def write(*cells, name="09_tiny", parameters=PARAMETERS):
        first = new_code_cell(parameters, metadata={"tags": ["parameters"]})
        notebook = new_notebook(cells=[new_markdown_cell("# 09 · Tiny"), first])
        notebook.cells += [new_code_cell(c) for c in cells]
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
        path = tmp_path / "source" / f"{name}.ipynb"
        path.parent.mkdir(exist_ok=True)
        nbformat.write(notebook, path)
        return path

    return write


RECORDS = """
from lora_kit.notebook import record, record_table, record_facts
record(total=STEPS * RATE, share={"value": 0.5, "low": 0.4, "high": 0.6, "n": 9})
record_table("rows", [{"z": 1, "a": QUANTIZATION}])
record_facts(model={"name": "m"}, peak_memory_bytes=12)
"""


def test_a_run_from_start_to_record(make, tmp_path):
    path = make(RECORDS, "import os\nprint(os.getcwd(), os.environ['LORA_KIT_FIGURES'])")
    before = path.read_bytes()
    out = tmp_path / "out"
    done = runner.run_notebook(str(path), {"STEPS": 4}, output=out)
    assert path.read_bytes() == before
    assert (done.notebook, done.record_path) == (out / path.name, out / "09_tiny.json")
    record = read_record(done.record_path)
    assert record == done.record
    assert record.parameters == {"STEPS": 4, "RATE": 0.5, "QUANTIZATION": "none", "SEED": 7}
    assert record.metrics["total"] == 2.0
    assert record.metrics["share"].n == 9
    assert record.tables == {"rows": [{"z": 1, "a": "none"}]}
    assert list(record.tables["rows"][0]) == ["z", "a"]
    assert (record.seed, record.model, record.peak_memory_bytes) == (7, {"name": "m"}, 12)
    assert record.command == "lora-kit run 09_tiny -p STEPS 4"
    assert 0 < record.seconds < 60
    printed = nbformat.read(done.notebook, 4).cells[-1].outputs[0].text.split()
    assert printed == [str(path.parent), str(out / "figures")]


def test_a_failing_cell_is_named_and_the_rest_kept(make, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "09_tiny.json").write_text("the record of an earlier run")
    path = make("print('before')", "raise ValueError('too much\\nof it')", "print('after')")
    with pytest.raises(RunFailedError) as found:
        runner.run_notebook(str(path), output=out)
    message = str(found.value)
    assert "09_tiny failed in cell 3: ValueError: too much" in message
    assert str(out / path.name) in message
    kept = nbformat.read(out / path.name, 4)
    assert any("before" in o.get("text", "") for c in kept.cells for o in c.get("outputs", []))
    assert not (out / "09_tiny.json").exists()


def test_a_kernel_that_dies_is_said(make, tmp_path):
    path = make("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(RunFailedError, match=r"09_tiny failed: its kernel died.*memory"):
        runner.run_notebook(str(path), output=tmp_path / "out")
    assert (tmp_path / "out" / "09_tiny.ipynb").exists()


def test_bad_parameters_run_nothing(make, tmp_path):
    path = make("open('ran', 'w')")
    out = tmp_path / "out"
    for given, error, says in (
        ({"STEP": 1}, UnknownNameError, r"'STEP'\. Did you mean 'STEPS'.*Known: QUANT"),
        ({"STEPS": "many"}, BadInputError, "STEPS must be a whole number"),
    ):
        with pytest.raises(error, match=says):
            runner.run_notebook(str(path), given, output=out)
    (tmp_path / "p.yaml").write_text("STEPZ: 1\n")
    with pytest.raises(UnknownNameError, match=r"'STEPZ'\. Did you mean 'STEPS'"):
        runner.run_notebook(str(path), parameter_file=str(tmp_path / "p.yaml"), output=out)
    assert not out.exists()
    assert not (path.parent / "ran").exists()


def test_the_callers_parameters_win_over_the_files(make, tmp_path, monkeypatch):
    (tmp_path / "p.yaml").write_text("STEPS: 1\nRATE: 2\n")
    seen = {}
    monkeypatch.setattr(
        runner, "_execute", lambda path, target, given: seen.update(given) or _copy(path, target)
    )
    runner.run_notebook(str(make()), {"STEPS": 9}, str(tmp_path / "p.yaml"), tmp_path / "out")
    assert seen == {"STEPS": 9, "RATE": 2.0}


def _copy(path, target):
    target.write_bytes(path.read_bytes())


def test_the_environment_of_a_run_is_its_own(make, tmp_path, monkeypatch):
    import os

    monkeypatch.setenv("LORA_KIT_PARAMS", "smoke")
    monkeypatch.setenv("LORA_KIT_FIGURES", "before")
    seen = {}

    def execute(path, target, given):
        seen.update({k: v for k, v in os.environ.items() if k.startswith("LORA_KIT_")})
        raise RunFailedError("stopped")

    monkeypatch.setattr(runner, "_execute", execute)
    with pytest.raises(RunFailedError):
        runner.run_notebook(str(make()), output=tmp_path / "out")
    assert "LORA_KIT_PARAMS" not in seen
    assert seen["LORA_KIT_FIGURES"] == str(tmp_path / "out" / "figures")
    assert (os.environ["LORA_KIT_PARAMS"], os.environ["LORA_KIT_FIGURES"]) == ("smoke", "before")


def test_a_run_does_not_overwrite_its_notebook(make):
    path = make()
    with pytest.raises(BadInputError, match="holds the notebook itself"):
        runner.run_notebook(str(path), output=path.parent)


def test_a_full_disk(make, tmp_path, monkeypatch):
    import types

    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1))
    with pytest.raises(DiskSpaceError, match=r"Running 09_tiny.*with -o"):
        runner.run_notebook(str(make()), output=tmp_path / "out")


def test_in_place(make, monkeypatch):
    path = make("print(STEPS)")
    assert runner.run_in_place(str(path)) == path
    text = path.read_text()
    held = nbformat.reads(text, 4)
    assert held.cells[-1].outputs[0].text == "3\n"
    assert "papermill" not in text
    assert len(held.cells) == 3  # no injected cell
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_in_place_with_a_set_says_so_in_the_outputs(make, tmp_path):
    opening = "from lora_kit.notebook import begin\nglobals().update(begin('09_tiny', globals()))"
    path = make(f"{opening}\nprint(STEPS)")
    given = tmp_path / "given.yaml"
    given.write_text("STEPS: 7\n")
    runner.run_in_place(str(path), str(given))
    held = nbformat.reads(path.read_text(), 4)
    assert "STEPS = 7" in held.cells[-1].outputs[0].text
    assert held.cells[-1].outputs[0].text.endswith("7\n")


def test_in_place_failing_changes_nothing(make):
    path = make("1 / 0")
    before = path.read_bytes()
    with pytest.raises(RunFailedError, match="ZeroDivisionError"):
        runner.run_in_place(str(path))
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_notebooks_by_path_name_and_number(make):
    known = runner.list_notebooks()
    assert "03_qlora_finetuning" in known
    assert runner.find_notebook("03") == runner.find_notebook("03_qlora_finetuning")
    path = make()
    assert runner.find_notebook(str(path)) == path
    with pytest.raises(UnknownNameError, match="Did you mean '03_qlora_finetuning'"):
        runner.find_notebook("03_qlora_finetunning")
    with pytest.raises(UnknownNameError, match="Unknown notebook '77'"):
        runner.find_notebook("77")
    with pytest.raises(BadInputError, match=r"no notebook nowhere\.ipynb"):
        runner.find_notebook("nowhere.ipynb")


def test_parameters_are_read_with_their_types(make):
    text = 'A = 1\nB = -0.5\nC = "x"\nD = True\nE = [1, 2]\nF = None\n# a comment'
    assert runner.notebook_parameters(make(parameters=text)) == {
        "A": 1,
        "B": -0.5,
        "C": "x",
        "D": True,
        "E": [1, 2],
        "F": None,
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("A = 1 + x", "A in the parameters cell of 09_tiny.ipynb is not a plain value"),
        ("A = B", "is not a plain value"),
        ("print(1)", "NAME = value lines only"),
        ("A, B = 1, 2", "NAME = value lines only"),
        ("A = ", "is not Python"),
    ],
)
def test_cells_that_hold_more_than_parameters(make, text, says):
    with pytest.raises(BadInputError, match=says):
        runner.notebook_parameters(make(parameters=text))


def test_a_notebook_needs_one_parameters_cell(make):
    path = make()
    notebook = nbformat.read(path, 4)
    notebook.cells[1].metadata["tags"] = []
    nbformat.write(notebook, path)
    with pytest.raises(BadInputError, match="has 0 cells tagged 'parameters'"):
        runner.notebook_parameters(path)


@pytest.mark.parametrize("content", ["", "not json", "[]", '{"cells": 1}'])
def test_a_file_that_is_no_notebook(tmp_path, content):
    path = tmp_path / "x.ipynb"
    path.write_text(content)
    with pytest.raises(CorruptFileError, match=r"x\.ipynb is not a notebook"):
        runner.notebook_parameters(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-3", -3),
        ("1e-4", 1e-4),
        ("True", True),
        ("false", False),
        ("none", None),
        ("None", None),
        ("[1, 2]", [1, 2]),
        ('"3"', "3"),
        ("smollm2-135m", "smollm2-135m"),
        ("", ""),
        ("a b", "a b"),
        ("1+1x", "1+1x"),
        ("{[]: 1}", "{[]: 1}"),
        ("[" * 500, "[" * 500),
        ("nan", "nan"),
    ],
)
def test_command_line_values(text, value):
    found = runner.parse_value(text)
    assert found == value
    assert type(found) is type(value)


def test_texts_stay_texts_where_the_notebook_wants_one(make):
    given = {"QUANTIZATION": "none", "STEPS": "5", "RATE": "-1e-3", "UNKNOWN": "3"}
    assert runner.parse_parameters(str(make()), given) == {
        "QUANTIZATION": "none",
        "STEPS": 5,
        "RATE": -1e-3,
        "UNKNOWN": 3,
    }


def test_notes_are_collected_and_later_ones_win():
    def cell(**note):
        return new_code_cell("", outputs=[new_output("display_data", {MIME: note})])

    table = {"columns": ["b", "a"], "rows": [[1, 2], [3, 4]]}
    executed = new_notebook(
        cells=[
            new_markdown_cell("x"),
            new_code_cell("", outputs=[new_output("stream", text="hello")]),
            cell(metrics={"a": 1, "b": 2}, facts={"model": {"name": "m"}}),
            cell(metrics={"a": 3}, tables={"t": table}),
        ]
    )
    executed = nbformat.reads(json.dumps(executed), 4)
    metrics, tables, facts = runner.collect_notes(executed)
    assert metrics == {"a": 3, "b": 2}
    assert tables == {"t": [{"b": 1, "a": 2}, {"b": 3, "a": 4}]}
    assert facts == {"model": {"name": "m"}}


def test_in_place_pictures_take_fewer_colours_where_the_notebook_is_too_large(make, monkeypatch):
    drawn = (
        "import base64, io\nimport numpy as np\nfrom IPython.display import Image, display\n"
        "from PIL import Image as Picture\n"
        "x = np.linspace(0, 255, 200)\n"
        "pixels = np.stack([*np.meshgrid(x, x), np.outer(x, x) / 255], -1)\n"
        "made = io.BytesIO()\n"
        "Picture.fromarray(pixels.astype('uint8')).save(made, 'PNG')\n"
        "display(Image(made.getvalue()))"
    )
    path = make(drawn)

    def picture():
        runner.run_in_place(str(path))
        held = nbformat.reads(path.read_text(), 4).cells[-1].outputs[0].data["image/png"]
        with Picture.open(io.BytesIO(base64.b64decode(held))) as image:
            return len(image.convert("RGB").getcolors(1 << 20)), path.stat().st_size

    colours, size = picture()
    assert colours > 10_000
    monkeypatch.setattr(runner, "MOST_BYTES", size // 2)
    fewer, smaller = picture()
    assert fewer <= 256
    assert smaller < size // 2
