"""Rows a person brings: a JSONL, JSON, CSV or TSV file, or a data set of the hub.

Every row becomes one of the three shapes that `prompts.to_example` knows; one that cannot is
dropped with its reason and its number, never in silence.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_kit import store
from lora_kit.data import DATASETS, Dataset, load_rows, read_jsonl
from lora_kit.errors import BadInputError, CorruptFileError, NotAvailableError, unknown_name

ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv")
SHAPES = "instruction/input/output, prompt/completion or messages"


@dataclass(frozen=True)
class Dropped:
    """A row that was left out: its number in the file, counted from 1, and why."""

    row: int
    reason: str


@dataclass(frozen=True)
class LoadedRows:
    """The rows that can be used, and those that cannot. `found`: all that the source had."""

    kept: Dataset
    dropped: tuple[Dropped, ...]

    @property
    def found(self) -> int:
        return len(self.kept) + len(self.dropped)

    def reasons(self) -> list[tuple[str, int, int]]:
        """(reason, how many rows, number of the first), the most frequent first."""
        counts = Counter(d.reason for d in self.dropped)
        first = {d.reason: d.row for d in reversed(self.dropped)}
        return [(reason, count, first[reason]) for reason, count in counts.most_common()]


def load_training_rows(
    source: str,
    split: str = "train",
    limit: int | None = None,
    fields: Mapping[str, str] | None = None,
) -> LoadedRows:
    """Rows to train on, from wherever `source` points.

    Args:
        source: a file (.jsonl, .jsonl.gz, .json, .csv, .tsv), a registry name ("alpaca"), or a
            hub id ("owner/name").
        split: of a registry name or hub id.
        limit: keep the first so many usable rows.
        fields: new names of fields, {"question": "prompt", "answer": "completion"}.

    Raises:
        NotAvailableError: no such file, or the hub cannot be reached.
        UnknownNameError: neither a file nor a name.
        CorruptFileError: a file that breaks off or is not what its name says.
        BadInputError: no row of it can be used; the reasons are listed.
    """
    path = Path(source).expanduser()
    if path.is_file():
        raw, origin, revision = read_file(path), "file", store.sha256_file(path)[:12]
        name = path.name.split(".")[0]
    elif source in DATASETS:
        loaded = load_rows(source, split)
        raw, origin, revision, name = list(loaded), loaded.source, loaded.revision, source
    elif path.suffix or source.startswith((".", "/", "~")):
        raise NotAvailableError(f"There is no file {source}.")
    elif source.count("/") == 1:
        from lora_kit.data import DatasetSpec, _from_hub

        spec = DatasetSpec(source, source, None, "see the set's own page", {split: split}, ())
        raw, revision = _from_hub(spec, split)
        origin, name = "hub", source.replace("/", "-")
    else:
        raise unknown_name("data set", source, DATASETS, "Or name a file.")
    kept, dropped = [], []
    for number, row in enumerate(raw, 1):
        if isinstance(row, Mapping) and fields:
            row = {fields.get(k, k): v for k, v in row.items()}
        reason = why_not(row)
        if reason:
            dropped.append(Dropped(number, reason))
        else:
            kept.append(dict(row))
    result = LoadedRows(Dataset(name, split, tuple(kept[:limit]), origin, revision), tuple(dropped))
    if not kept:
        reasons = "; ".join(f"{r} ({n} rows)" for r, n, _ in result.reasons()[:3])
        raise BadInputError(
            f"No row of {source} can be used: {reasons or 'it is empty'}. A row needs {SHAPES}."
        )
    return result


def why_not(row) -> str | None:
    """Why a row cannot be trained on, in a few words; None where it can."""
    if not isinstance(row, Mapping):
        return f"not an object but a {type(row).__name__}"
    if None in row:
        return "more cells than the header (quote texts that hold the separator)"
    if "messages" in row:
        turns = row["messages"]
        if not isinstance(turns, Sequence) or isinstance(turns, str) or len(turns) < 2:
            return "messages is not a list of at least two turns"
        for turn in turns:
            if not isinstance(turn, Mapping) or not {"role", "content"} <= turn.keys():
                return "a turn of messages lacks role or content"
            if not isinstance(turn["content"], str):
                return "a turn's content is not text"
        if turns[-1]["role"] != "assistant":
            return "messages do not end with the assistant's turn"
        asked, answer = turns[0]["content"], turns[-1]["content"]
    elif "instruction" in row and "output" in row:
        asked, answer = row["instruction"], row["output"]
        if not isinstance(row.get("input") or "", str):
            return "input is not text"
    elif "prompt" in row and "completion" in row:
        asked, answer = row["prompt"], row["completion"]
    else:
        return f"its fields ({', '.join(map(str, row)) or 'none'}) are not {SHAPES}"
    if not isinstance(asked, str) or not isinstance(answer, str):
        return "prompt or answer is not text"
    if not asked.strip():
        return "the prompt is empty"
    return None if answer.strip() else "the answer is empty"


def read_file(path: Path) -> list:
    """The rows of a file as they stand in it.

    Raises:
        BadInputError: an ending that is not known; CorruptFileError: names the line.
    """
    name = path.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz")):
        return read_jsonl(path)
    if name.endswith(".json"):
        rows = store.read_json(path)
        if not isinstance(rows, list):
            raise CorruptFileError(f"{path} holds no list of rows but a {type(rows).__name__}.")
        return rows
    if name.endswith((".csv", ".tsv")):
        return _read_table(path, "\t" if name.endswith(".tsv") else None)
    raise BadInputError(f"{path.name} is none of {', '.join(ENDINGS)}; save it as one of them.")


def _read_table(path: Path, delimiter: str | None) -> list[dict]:
    try:
        # utf-8-sig: spreadsheets write a mark at the start that would become part of a field name.
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise CorruptFileError(f"{path} is not UTF-8 ({e}); save it as UTF-8.") from e
    header = text.split("\n", 1)[0]
    if delimiter is None:  # where the comma is the decimal sign, spreadsheets write semicolons
        delimiter = ";" if header.count(";") > header.count(",") else ","
    rows: list[dict] = []
    try:
        # Cells too many stand under None, missing ones are None: why_not says so of the row.
        for row in csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True):
            rows.append(row)
    except csv.Error as e:
        raise CorruptFileError(f"{path} row {len(rows) + 1} is not CSV: {e}.") from e
    return rows


def to_jsonl(rows: Dataset, path: Path) -> Path:
    """Write rows as JSON lines, so that a held-out part can be kept beside its adapter."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return store.write_text(path, text)
