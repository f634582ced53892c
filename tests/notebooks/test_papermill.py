"""Every notebook runs from start to end with the small parameters and leaves a sound record; and
what goes wrong is refused early, or leaves its trace.

Solutions run under nbmake (`make test`), not here.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import nbformat
import pytest
import sheets
import style
from nbformat.v4 import new_code_cell, new_notebook
from sheets import Sheet

from lora_kit.errors import BadInputError, RunFailedError, UnknownNameError
from lora_kit.models import DEFAULT_MODEL, fetch_model
from lora_kit.notebook import parameter_set
from lora_kit.studies import runner
from lora_kit.studies.records import Metric, read_record

ROOT = Path(__file__).resolve().parents[2]
COURSE = [p.stem for p in sheets.notebooks(ROOT)]


def checksums(folder: Path, names: list[str]) -> dict[str, str]:
    """The SHA-256 of each named figure that is there."""
    paths = [folder / f"{name}.png" for name in names]
    return {p.stem: hashlib.sha256(p.read_bytes()).hexdigest() for p in paths if p.exists()}


def forget_adapters(folder: Path, monkeypatch) -> None:
    """A cache with the default model and nothing else, so that a notebook has to train."""
    models = fetch_model(DEFAULT_MODEL).path.parent
    folder.mkdir()
    (folder / models.name).symlink_to(models)
    monkeypatch.setenv("LORA_KIT_HOME", str(folder))


@pytest.mark.notebook
@pytest.mark.model
@pytest.mark.parametrize("name", COURSE)
def test_notebook_runs(name, tmp_path, monkeypatch):
    if name == "03_qlora_finetuning":
        forget_adapters(tmp_path / "home", monkeypatch)
    # The set comes from the call: one left in the environment must not win over it.
    monkeypatch.setenv("LORA_KIT_PARAMS", "no-such-set")
    sheet = Sheet(ROOT / "notebooks" / f"{name}.ipynb", ROOT)
    figures = sheets.saved_figures(sheet)
    source, committed = sheet.path.read_bytes(), checksums(ROOT / "figures", figures)

    done = runner.run_notebook(name, parameter_file="smoke", output=tmp_path / "out")

    assert sheet.path.read_bytes() == source, "the run changed the notebook itself"
    assert checksums(ROOT / "figures", figures) == committed, "the run wrote into figures/"
    written = {p.stem for p in (tmp_path / "out" / "figures").glob("*.png")}
    assert written == set(figures)

    assert done.notebook == tmp_path / "out" / f"{name}.ipynb"
    ran = Sheet(done.notebook, ROOT)
    assert style.outputs_clean(ran) == []
    assert ran.tagged("injected-parameters") or not parameter_set("smoke", name)
    check_record(done, name)


def check_record(done: runner.RunResult, name: str) -> None:
    """The record says what ran, with which parameters, and what came out, in finite numbers."""
    record = read_record(done.record_path)
    assert record == done.record
    assert record.study == name
    assert record.parameters == {
        **runner.notebook_parameters(runner.find_notebook(name)),
        **parameter_set("smoke", name),
    }
    assert record.command.startswith(f"lora-kit run {name}")
    for parameter in parameter_set("smoke", name):
        assert f"-p {parameter} " in record.command
    assert record.seed == record.parameters["SEED"]
    assert record.metrics, "the notebook noted no metric"
    for metric, value in record.metrics.items():
        numbers = value.model_dump(exclude_none=True) if isinstance(value, Metric) else {"": value}
        assert all(math.isfinite(x) for x in numbers.values()), metric
        if isinstance(value, Metric) and value.low is not None:
            assert value.low <= value.value <= value.high, metric
    if "MODEL" in record.parameters:
        # A study may go on from there: "smollm2-135m-instruct, taught addition".
        assert record.model["name"].startswith(record.parameters["MODEL"])
        assert record.model["revision"]
        assert len(record.model["fingerprint"]) == 12
        int(record.model["fingerprint"], 16)
    assert 0 < record.seconds < 600
    assert {"torch", "transformers", "peft", "lora-kit"} <= set(record.versions)


def test_the_course_uses_one_model():
    """Notebooks with MODEL name the same default, so that one fetch serves the whole course."""
    defaults = [runner.notebook_parameters(runner.find_notebook(n)).get("MODEL") for n in COURSE]
    assert len({d for d in defaults if d}) == 1


# What goes wrong -------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    """A notebook without models: `build(*cells)` writes it, its parameters are STEPS and RATE."""

    def build(*cells: str) -> Path:
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nb = new_notebook(metadata={"kernelspec": kernel})
        parameters = "STEPS = 3  # any\nRATE = 0.5  # any\nNAME = 'a'  # any"
        nb.cells = [new_code_cell(parameters, metadata={"tags": ["parameters"]})]
        nb.cells += [new_code_cell(source) for source in cells]
        path = tmp_path / "99_small.ipynb"
        nbformat.write(nb, path)
        return path

    return build


@pytest.mark.notebook
def test_a_failing_notebook_keeps_what_ran_and_names_the_cell(small, tmp_path):
    path = small("print('steps', STEPS)", "raise ValueError('it broke')", "print('never')")
    out = tmp_path / "out"
    with pytest.raises(RunFailedError) as caught:
        runner.run_notebook(str(path), {"STEPS": 5}, output=out)

    kept = nbformat.read(out / path.name, as_version=4)
    code = [c for c in kept.cells if c.cell_type == "code"]
    (failed,) = [c for c in code if any(o.output_type == "error" for o in c.outputs)]
    assert failed.source == "raise ValueError('it broke')"
    message = str(caught.value)
    assert f"failed in cell {failed.execution_count}: ValueError: it broke" in message
    assert str(out / path.name) in message
    assert "\n" not in message
    before = code[code.index(failed) - 1]
    assert before.outputs[0].text == "steps 5\n"
    assert code[-1].execution_count is None
    assert not (out / "99_small.json").exists(), "a failed run left a record"


@pytest.mark.notebook
def test_a_run_works_in_the_notebooks_folder_and_takes_given_values(small, tmp_path):
    (tmp_path / "set.yaml").write_text("STEPS: 7\nRATE: 1\n")
    path = small(
        "import json, os",
        "from lora_kit.notebook import record\n\nrecord(steps=STEPS, rate=RATE)",
        "print(json.dumps([os.getcwd(), os.environ['LORA_KIT_FIGURES'], STEPS, RATE]))",
    )
    out = tmp_path / "out"
    given = {"STEPS": 9}  # wins over the file's
    done = runner.run_notebook(str(path), given, str(tmp_path / "set.yaml"), out)
    printed = json.loads(nbformat.read(done.notebook, as_version=4).cells[-1].outputs[0].text)
    assert printed == [str(tmp_path), str(out / "figures"), 9, 1.0]
    assert done.record.parameters == {"STEPS": 9, "RATE": 1.0, "NAME": "a"}
    assert done.record.metrics == {"steps": 9.0, "rate": 1.0}


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"STEP": 2}, UnknownNameError, ["'STEP'", "Did you mean 'STEPS'", "RATE, STEPS"]),
        ({"STEPS": "many"}, BadInputError, ["STEPS must be a whole number", "'many'"]),
        ({"STEPS": 2.5}, BadInputError, ["STEPS must be a whole number", "2.5"]),
        ({"STEPS": True}, BadInputError, ["STEPS must be a whole number", "True"]),
        ({"NAME": 3}, BadInputError, ["NAME must be a text", "3"]),
    ],
)
def test_bad_parameters_are_refused_before_anything_runs(small, tmp_path, given, error, words):
    path = small(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    with pytest.raises(error) as caught:
        runner.run_notebook(str(path), given, output=tmp_path / "out")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("STEP: 2\n", UnknownNameError, "Did you mean 'STEPS'"),
        ("99_small:\n  STEP: 2\n", UnknownNameError, "Did you mean 'STEPS'"),
        ("03_qlora_finetunin:\n  STEPS: 2\n", UnknownNameError, "'03_qlora_finetuning'"),
        ("- STEPS\n", BadInputError, "NAME: value lines"),
        ("STEPS: [1\n", BadInputError, "is not YAML"),
    ],
)
def test_bad_parameter_files_are_refused(small, tmp_path, text, error, words):
    path, file = small(), tmp_path / "set.yaml"
    file.write_text(text)
    with pytest.raises(error, match=words):
        runner.run_notebook(str(path), parameter_file=str(file), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "parameter_file", "error", "words"),
    [
        ("03", "smok", UnknownNameError, "Did you mean 'smoke'"),
        ("03", "missing.yaml", BadInputError, "no parameters file"),
        ("03_qlora", None, UnknownNameError, "'03_qlora_finetuning'"),
        ("97", None, UnknownNameError, "03_qlora_finetuning"),
        ("gone.ipynb", None, BadInputError, "no notebook gone.ipynb"),
    ],
)
def test_unknown_names_are_refused(tmp_path, name, parameter_file, error, words):
    with pytest.raises(error, match=words):
        runner.run_notebook(name, parameter_file=parameter_file, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tags", "source", "words"),
    [
        ([], "STEPS = 1", "0 cells tagged"),
        (["parameters"], "STEPS = 2 * 3", "STEPS .* is not a plain value"),
        (["parameters"], "import os", "NAME = value lines only"),
    ],
)
def test_a_notebook_without_plain_parameters_is_refused(tmp_path, tags, source, words):
    nb = new_notebook(cells=[new_code_cell(source, metadata={"tags": tags})])
    nbformat.write(nb, tmp_path / "99_odd.ipynb")
    with pytest.raises(BadInputError, match=words):
        runner.run_notebook(str(tmp_path / "99_odd.ipynb"), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.notebook
def test_a_failed_run_in_place_changes_nothing(small, tmp_path):
    path = small("1/0")
    before = path.read_bytes()
    with pytest.raises(RunFailedError, match="ZeroDivisionError"):
        runner.run_in_place(str(path))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.notebook
def test_a_run_in_place_stores_outputs_and_no_trace_of_papermill(small):
    path = small("print(STEPS)")
    runner.run_in_place(str(path))
    sheet = Sheet(path, ROOT)
    assert style.executed(sheet) == []
    assert style.metadata_clean(sheet) == []
    assert style.no_machine_paths(sheet) == []
    assert sheet.nb.cells[-1].outputs[0].text == "3\n"
