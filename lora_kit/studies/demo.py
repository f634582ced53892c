"""The demo: the course's first notebooks in order, then one page about what happened."""

from __future__ import annotations

import time
from pathlib import Path

from lora_kit import store
from lora_kit.errors import CorruptFileError
from lora_kit.notebook import parameter_set
from lora_kit.studies.page import write_page
from lora_kit.studies.records import Record, read_record
from lora_kit.studies.runner import find_notebook, list_notebooks, run_notebook

COURSE = ("00", "01", "02", "03", "04", "05")


def run_demo(output: Path, parameter_file: str | None = None) -> Path:
    """Run notebooks 00-05 with their default parameters and write `index.html` and `metrics.json`.

    A notebook whose source, parameters and package are those of an earlier run in `output` is not
    run again.

    Args:
        output: the folder for executed notebooks, figures, records and the page.
        parameter_file: a named set or YAML file instead of the defaults.

    Returns:
        The path of `index.html`.

    Raises:
        RunFailedError: a notebook failed; those before it are kept and reused by the next run.
    """
    output = Path(output).resolve()
    started = time.perf_counter()
    records: list[Record] = []
    names = [n for n in list_notebooks() if n.split("_")[0] in COURSE]
    for i, name in enumerate(names, 1):
        identity = _identity(name, parameter_file)
        record = _finished(output, name, identity)
        reused = record is not None
        if record is None:
            print(f"[{i}/{len(names)}] {name} ...", flush=True)
            done = run_notebook(name, parameter_file=parameter_file, output=output)
            record = done.record
            store.write_text(output / ".done" / name, identity)
        print(
            f"[{i}/{len(names)}] {name}: {record.seconds / 60:.1f} minutes"
            f"{' (of an earlier run, reused)' if reused else ''}",
            flush=True,
        )
        records.append(record)
    store.write_json(
        output / "metrics.json",
        {
            r.study: {"seconds": r.seconds, "metrics": r.model_dump(mode="json")["metrics"]}
            for r in records
        },
    )
    page = write_page(output, records)
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes in all")
    return page


def _identity(name: str, parameter_file: str | None) -> str:
    """What a notebook's results depend on, as one hash: its code, its parameters, the package."""
    import nbformat

    cells = nbformat.read(find_notebook(name), as_version=4).cells
    package = sorted((Path(__file__).resolve().parent.parent).rglob("*.py"))
    return store.sha256_json(
        {
            "code": [c.source for c in cells],
            "parameters": parameter_set(parameter_file, name) if parameter_file else {},
            "package": [store.sha256_file(p) for p in package],
        }
    )


def _finished(output: Path, name: str, identity: str) -> Record | None:
    mark = output / ".done" / name
    if not (mark.exists() and mark.read_text() == identity and (output / f"{name}.ipynb").exists()):
        return None
    try:
        return read_record(output / f"{name}.json")
    except (CorruptFileError, OSError):
        return None
