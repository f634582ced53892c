"""Result records: one JSON file a run, with everything needed to repeat or doubt it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_kit import store
from lora_kit.errors import BadInputError, CorruptFileError

SCHEMA = 1
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "bitsandbytes",
    "datasets",
    "lm_eval",
    "unsloth",
    "lora-kit",
)


class Metric(BaseModel):
    """A measured quantity. stderr, low, high (95 %) and n where it was sampled."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    value: float
    stderr: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None


class Record(BaseModel):
    """One run: what was asked, what came out, on what. Times in seconds, memory in bytes.

    `model` has name, source, revision, fingerprint; `data` name, rows, fingerprint. Either is None
    for a run without a model or data of its own.
    """

    # pydantic reserves names that start with "model_"; `model` itself is the field's own word.
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())

    schema_version: int = Field(SCHEMA, alias="schema", ge=1, le=SCHEMA)
    study: str
    command: str
    parameters: dict[str, Any]
    metrics: dict[str, Metric | float]
    tables: dict[str, list[dict[str, Any]]] = {}
    seed: int | None = None
    seconds: float
    peak_memory_bytes: int | None = None
    hardware: dict[str, Any]
    versions: dict[str, str]
    model: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    created: str


def new_record(study: str, command: str, **fields: Any) -> Record:
    """A record of this moment on this machine, with the versions installed.

    Args:
        study: the study's or notebook's name.
        command: what a reader types to make the same run.
        fields: the rest of `Record`'s fields; hardware, versions and created are filled in.
    """
    from lora_kit.hardware import detect

    filled = {
        "hardware": detect().to_dict(),
        "versions": versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return Record(study=study, command=command, **{**filled, **fields})


def versions() -> dict[str, str]:
    """The versions of the packages a result depends on, those that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    from lora_kit import __version__

    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {**found, "lora-kit": __version__}  # of a checkout that was never installed too


def write_record(record: Record, path: Path) -> Path:
    """Write a record atomically.

    Raises:
        BadInputError: NaN or infinity, or a value that JSON cannot hold, in it.
    """
    try:
        # Not pydantic's own JSON, which turns NaN into null without a word.
        return store.write_json(path, record.model_dump(by_alias=True))
    except (TypeError, ValueError) as e:
        raise BadInputError(f"The record of {record.study} cannot be written: {e}.") from e


def read_record(path: Path) -> Record:
    """Read a record.

    Raises:
        CorruptFileError: not JSON, or not a record; the first fault is named.
    """
    try:
        return Record.model_validate(store.read_json(path))
    except ValidationError as e:
        fault = e.errors()[0]
        where = ".".join(str(x) for x in fault["loc"])
        raise CorruptFileError(f"{path} is not a result record: {where}: {fault['msg']}.") from e


def read_records(study: str, folder: Path | None = None) -> list[Record]:
    """All committed records of a study, by file name; [] where there are none.

    Args:
        folder: where records lie; the checkout's `data/results/` by default.
    """
    folder = folder or store.repository() / "data" / "results"
    return [read_record(p) for p in sorted((folder / study).glob("*.json"))]
