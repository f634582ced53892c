"""Running notebooks: papermill underneath, with parameters checked and one record a run."""

from __future__ import annotations

import ast
import base64
import io
import logging
import os
import shlex
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_kit import store
from lora_kit.errors import BadInputError, CorruptFileError, RunFailedError, unknown_name
from lora_kit.hardware import ChildrenMemory
from lora_kit.notebook import MIME, SET_SWITCH, match_parameters, parameter_set
from lora_kit.studies.records import Record, new_record, write_record

MOST_BYTES = 300_000  # of a committed notebook
COLOURS_TRIED = (256, 128, 64, 24)


@dataclass(frozen=True)
class RunResult:
    """An executed notebook, its record, and where both lie."""

    notebook: Path
    record_path: Path
    record: Record


def list_notebooks() -> list[str]:
    """The course's notebooks, by name, in order."""
    # A name that starts with a letter or digit: not the half-made file of a run in place.
    return sorted(p.stem for p in (store.repository() / "notebooks").glob("[!.]*.ipynb"))


def find_notebook(name: str) -> Path:
    """A notebook's path from a path, its name, or its number ("03").

    Raises:
        UnknownNameError: nothing answers to the name.
    """
    path = Path(name)
    if path.suffix == ".ipynb":
        if path.exists():
            return path.resolve()
        raise BadInputError(f"There is no notebook {path}.")
    known = list_notebooks()
    matches = [k for k in known if k == name or k.split("_")[0] == name]
    if len(matches) != 1:
        raise unknown_name("notebook", name, known)
    return store.repository() / "notebooks" / f"{matches[0]}.ipynb"


def notebook_parameters(path: Path) -> dict[str, Any]:
    """The parameters of a notebook and their defaults, from its one cell tagged `parameters`.

    Raises:
        BadInputError: no such cell, more than one, or a default that is not a plain value.
        CorruptFileError: the file is no notebook.
    """
    import nbformat

    try:
        notebook = nbformat.read(path, as_version=4)
    except Exception as e:  # nbformat raises a dozen kinds for what is no notebook
        raise CorruptFileError(f"{path} is not a notebook ({type(e).__name__}).") from e
    cells = [
        c
        for c in notebook.cells
        if c.cell_type == "code" and "parameters" in c.metadata.get("tags", [])
    ]
    if len(cells) != 1:
        raise BadInputError(
            f"{path.name} has {len(cells)} cells tagged 'parameters'; it needs one."
        )
    try:
        lines = ast.parse(cells[0].source).body
    except SyntaxError as e:
        raise BadInputError(f"The parameters cell of {path.name} is not Python: {e}.") from e
    found = {}
    for node in lines:
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
            raise BadInputError(
                f"The parameters cell of {path.name} may hold NAME = value lines only."
            )
        try:
            found[node.targets[0].id] = ast.literal_eval(node.value)
        except ValueError as e:
            raise BadInputError(
                f"{node.targets[0].id} in the parameters cell of {path.name} is not a plain value."
            ) from e
    return found


def check_parameters(path: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Hold given parameters to the notebook's own: see `notebook.match_parameters`."""
    return match_parameters(path.stem, notebook_parameters(path), given)


def parse_parameters(name: str, texts: dict[str, str]) -> dict[str, Any]:
    """Command-line texts as values for a notebook: `none` stays a text where the default is one."""
    defaults = notebook_parameters(find_notebook(name))
    return {
        key: text if isinstance(defaults.get(key), str) else parse_value(text)
        for key, text in texts.items()
    }


def parse_value(text: str) -> Any:
    """A command-line value: a Python literal where it reads as one (3, 1e-4, True, [1, 2]), else
    the text itself."""
    named = {"true": True, "false": False, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def run_notebook(
    name: str,
    parameters: dict[str, Any] | None = None,
    parameter_file: str | None = None,
    output: Path | None = None,
    command: str | None = None,
) -> RunResult:
    """Execute a notebook and write the executed copy, its figures and its result record.

    Args:
        name: path, name or number of the notebook.
        parameters: overrides; they win over the file's.
        parameter_file: a named set ("smoke", "cpu", "t4") or a YAML file.
        output: a folder; `runs/<notebook>/` by default. Gets `<notebook>.ipynb`,
            `<notebook>.json` and `figures/`.
        command: what the record names as its command.

    Raises:
        UnknownNameError, BadInputError: before anything runs.
        RunFailedError: a cell failed; the partial notebook is kept and the cell named.
    """
    path = find_notebook(name)
    given = parameter_set(parameter_file, path.stem) if parameter_file else {}
    given = check_parameters(path, {**given, **(parameters or {})})
    output = Path(output or store.repository() / "runs" / path.stem).resolve()
    store.check_disk(output, 50_000_000, f"Running {path.stem}", "choose another folder with -o")
    output.mkdir(parents=True, exist_ok=True)
    target = output / path.name
    if target == path:
        raise BadInputError(f"{output} holds the notebook itself; choose another folder with -o.")
    record_path = output / f"{path.stem}.json"
    record_path.unlink(missing_ok=True)  # an earlier run's record must not stand beside this one
    command = command or _command(path, given)
    started = time.perf_counter()
    with _environment(output), ChildrenMemory() as memory:
        _execute(path, target, given)
    seconds = time.perf_counter() - started
    given = {**notebook_parameters(path), **given}
    record = _record(path, target, given, command, seconds, memory.peak)
    return RunResult(target, write_record(record, record_path), record)


def run_in_place(name: str, file: str | None = None) -> Path:
    """Execute a notebook with its default parameters, or with those of a parameter set (its outputs
    then say so), and store the outputs in the notebook itself, figures in `figures/`: how the
    committed notebooks are made, pictures in fewer colours where one would pass 300 KB. A failed
    run changes nothing.

    Raises:
        RunFailedError: names the cell.
    """
    import nbformat

    path = find_notebook(name)
    part = path.parent / f".{path.stem}.part.ipynb"
    try:
        with _environment(None, file):
            _execute(path, part, {})
        executed = nbformat.read(part, as_version=4)
    finally:
        part.unlink(missing_ok=True)
    executed.metadata.pop("papermill", None)
    for cell in executed.cells:
        for passing in ("papermill", "execution"):
            cell.metadata.pop(passing, None)
    store.write_text(path, _fitted(executed) + "\n")
    return path


def _fitted(executed) -> str:
    """The notebook as text, its pictures in fewer colours where it would be larger than a page of
    the repository may be; `figures/` keeps them whole."""
    import nbformat

    text = nbformat.writes(executed)
    outputs = [out for cell in executed.cells for out in cell.get("outputs", [])]
    drawn = [out["data"] for out in outputs if "image/png" in out.get("data", {})]
    whole = [data["image/png"] for data in drawn]
    for colours in COLOURS_TRIED:
        if len(text.encode()) < MOST_BYTES:
            break
        for data, picture in zip(drawn, whole, strict=True):
            data["image/png"] = _in_fewer_colours(picture, colours)
        text = nbformat.writes(executed)
    return text


def _in_fewer_colours(picture: str, colours: int) -> str:
    """A PNG in base64 with a palette of so many colours, where that makes it smaller."""
    from PIL import Image

    raw, made = base64.b64decode(picture), io.BytesIO()
    with Image.open(io.BytesIO(raw)) as image:
        flat = image.convert("RGB").quantize(colours, dither=Image.Dither.NONE)
        flat.save(made, "PNG", optimize=True)
    smaller = made.getvalue()
    return base64.b64encode(smaller).decode() if len(smaller) < len(raw) else picture


def collect_notes(executed) -> tuple[dict, dict, dict]:
    """The metrics, tables and facts (model, data, seed …) that an executed notebook noted."""
    metrics, tables, facts = {}, {}, {}
    for cell in executed.cells:
        for out in cell.get("outputs", []):
            note = out.get("data", {}).get(MIME)
            if note:
                metrics.update(note.get("metrics", {}))
                for name, table in note.get("tables", {}).items():
                    rows = [dict(zip(table["columns"], r, strict=True)) for r in table["rows"]]
                    tables[name] = rows
                facts.update(note.get("facts", {}))
    return metrics, tables, facts


def _execute(path: Path, target: Path, given: dict[str, Any]) -> None:
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    # papermill guesses at the parameters cell and complains where a text holds "="; we have read
    # and checked it ourselves. The kernel's own log would only say that it is a kernel.
    logging.getLogger("papermill").setLevel(logging.ERROR)
    try:
        papermill.execute_notebook(
            str(path),
            str(target),
            parameters=given,
            cwd=str(path.parent),
            kernel_name="python3",
            language="python",
            progress_bar=False,
            log_output=False,
            extra_arguments=["--log-level=CRITICAL"],
        )
    except PapermillExecutionError as e:
        raise RunFailedError(
            f"{path.stem} failed in cell {e.exec_count}: {e.ename}: {e.evalue}. "
            f"What ran is kept in {target}."
        ) from None
    except DeadKernelError:
        raise RunFailedError(
            f"{path.stem} failed: its kernel died, most often for want of memory. "
            f"What ran is kept in {target}."
        ) from None


@contextmanager
def _environment(output: Path | None, file: str | None = None):
    """Figures beside the run's output, and no parameter set but the one given."""
    old = {k: os.environ.get(k) for k in ("LORA_KIT_FIGURES", SET_SWITCH)}
    os.environ.pop(SET_SWITCH, None)
    if file is not None:
        os.environ[SET_SWITCH] = file
    if output is not None:
        os.environ["LORA_KIT_FIGURES"] = str(output / "figures")
    try:
        yield
    finally:
        for key, value in old.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value


def _record(
    path: Path, target: Path, parameters, command: str, seconds: float, kernel_bytes: int
) -> Record:
    import nbformat

    metrics, tables, facts = collect_notes(nbformat.read(target, as_version=4))
    seed = parameters.get("SEED")
    return new_record(
        path.stem,
        command,
        parameters=parameters,
        metrics=metrics,
        tables=tables,
        seed=seed if isinstance(seed, int) else None,
        seconds=round(seconds, 2),
        # What the notebook measured around its own work, else what its kernel held.
        peak_memory_bytes=facts.get("peak_memory_bytes") or kernel_bytes or None,
        model=facts.get("model"),
        data=facts.get("data"),
    )


def _command(path: Path, given: dict[str, Any]) -> str:
    words = ["lora-kit", "run", path.stem]
    for name, value in given.items():
        words += ["-p", name, str(value)]
    return shlex.join(words)
