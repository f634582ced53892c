"""One run of a sweep: made in a worker, kept as a record, known again later."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_kit import store
from lora_kit.errors import BadInputError, CorruptFileError
from lora_kit.studies.calls import load_function
from lora_kit.studies.jobs import Outcome
from lora_kit.studies.records import Record, read_record, write_record
from lora_kit.studies.sweep_grid import Cell
from lora_kit.studies.sweep_targets import Target

IDENTITY = "cell.json"
FAILED = "failed"


@dataclass(frozen=True)
class Failure:
    """A run that failed: with what, why, the end of its traceback or log, how often tried."""

    name: str
    parameters: dict[str, Any]
    seed: int
    error: str
    traceback: str
    attempts: int


def run_one(
    function: str,
    parameters: dict[str, Any],
    seed: int,
    folder: str,
    fixed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run a cell in `folder` and return its record's JSON; called in a worker.

    A folder left by a run of the same setting is taken up again; one of another setting is cleared.

    Raises:
        BadInputError: the function returned something else than a record.
    """
    place = Path(folder)
    identity = {"function": Path(function).name, "parameters": parameters, "seed": seed}
    if place.is_dir() and any(place.iterdir()):
        try:
            same = store.read_json(place / IDENTITY) == identity
        except (OSError, CorruptFileError):
            same = False
        if not same:
            shutil.rmtree(place)
    store.write_json(place / IDENTITY, identity)
    record = load_function(function)(dict(parameters), seed, place, **(fixed or {}))
    if not isinstance(record, Record):
        raise BadInputError(
            f"{function} returned {type(record).__name__}, not a lora_kit.studies.records.Record."
        )
    return record.model_dump(mode="json", by_alias=True)


def record_path(output: Path, cell: Cell) -> Path:
    return output / f"{cell.name}.json"


def keep(output: Path, cell: Cell, value: Mapping[str, Any]) -> Record:
    """Write the record a worker sent, with what was asked among its parameters.

    Raises:
        BadInputError: it cannot be written.
    """
    record = Record.model_validate(value)
    record.parameters = {**record.parameters, **cell.parameters}
    record.seed = cell.seed
    write_record(record, record_path(output, cell))
    failure_path(output, cell).unlink(missing_ok=True)
    return record


def find(output: Path, cell: Cell, target: Target, say=print) -> Record | None:
    """The record of a finished run; None where there is none, or one that cannot be read.

    A parameter the record does not know counts as the default: the target got it later.

    Raises:
        BadInputError: the record is of other parameters.
    """
    path = record_path(output, cell)
    if not path.exists():
        return None
    try:
        record = read_record(path)
    except CorruptFileError as e:
        say(f"run again: {e}")
        return None
    held = json.loads(json.dumps(record.parameters))
    missing = object()
    for name, asked in cell.parameters.items():
        default = json.loads(json.dumps((target.defaults or {}).get(name)))
        had = held.get(name, missing)
        if had != asked and not (had is missing and asked == default):
            was = "nothing" if had is missing else repr(had)
            raise BadInputError(
                f"{path} is of another run: {name} is {was} there, {asked!r} here. Choose another "
                "folder with -o, or delete the file."
            )
    if record.seed != cell.seed:
        raise BadInputError(f"{path} is of another run: its seed is {record.seed}.")
    return record


def failure_path(output: Path, cell: Cell) -> Path:
    return output / FAILED / f"{cell.name}.json"


def note_failure(output: Path, cell: Cell, outcome: Outcome, attempts: int) -> Failure:
    """Write down how a run failed, beside the records."""
    failure = Failure(
        cell.name,
        dict(cell.parameters),
        cell.seed,
        outcome.error or "",
        outcome.traceback,
        attempts,
    )
    when = datetime.now(UTC).isoformat(timespec="seconds")
    store.write_json(failure_path(output, cell), {**failure.__dict__, "when": when})
    return failure
