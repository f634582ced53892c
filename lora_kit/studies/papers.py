"""Published tables as data: every cell as printed, with paper, table, row and column.

One CSV a table or figure, `data/papers/<paper>/<table>.csv` (`table_03`, `figure_08`, `text`), in
one tidy layout with the columns of `COLUMNS`, one line a printed number or word:

    row         the row's heading; several levels are joined by " / "
    column      the column's heading; several levels are joined by " / "
    part        empty; for a cell that prints several numbers, which of them (`lift`, `count`)
    printed     the cell as printed, character by character
    value       its number, in `unit`; empty for words and dashes
    plus_minus  the number after a printed ±, in `unit`
    unit        "%", "ms", "tokens", …; empty for plain numbers and scores
    note        ours: a slip of the print, how a number was read, or why there is none

A cell that the text at hand lost has an empty `printed` and a note that begins with "lost".
`fingerprints.json` holds each file's SHA-256: a cell changed by accident is found by name.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_kit import store
from lora_kit.errors import CorruptFileError, unknown_name

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("row", "column", "part", "printed", "value", "plus_minus", "unit", "note")
KEY = ["row", "column", "part"]


@dataclass(frozen=True)
class Paper:
    """One of the papers this kit checks: short name, authors, title, year, arXiv number if any."""

    name: str
    authors: str
    title: str
    year: int
    arxiv: str | None = None


PAPERS = {
    paper.name: paper
    for paper in (
        Paper(
            "saha2024",
            "Saha et al.",
            "Optimizing Small Language Models with Task-Specific LoRA Adapters",
            2024,
        ),
        Paper("mai2025", "Mai", "Slimming Down LLMs Without Losing Their Minds", 2025),
        Paper(
            "oswal2025",
            "Oswal et al.",
            "Small language models for e-commerce, fine-tuned with QLoRA",
            2025,
        ),
        Paper(
            "zhao2024",
            "Zhao et al.",
            "LoRA Land: 310 Fine-tuned LLMs that Rival GPT-4, A Technical Report",
            2024,
            "2405.00732",
        ),
        Paper(
            "alwadhi2024",
            "Alwadhi",
            "From Generalist to Specialist: Evaluating QLoRA's Practicality",
            2024,
        ),
    )
}


def folder(paper: str | None = None) -> Path:
    """Where the published tables lie: `data/papers/`, or one paper's folder in it.

    Raises:
        UnknownNameError: no such paper.
        NotAvailableError: the package was installed without its checkout.
    """
    base = store.repository() / "data" / "papers"
    return base if paper is None else base / known_paper(paper)


def known_paper(name: str) -> str:
    """The name, if it is a key of `PAPERS`.

    Raises:
        UnknownNameError: it is not.
    """
    if name not in PAPERS:
        raise unknown_name("paper", name, PAPERS)
    return name


def tables(paper: str) -> list[str]:
    """The names of a paper's tables and figures that stand as data, sorted."""
    return sorted(path.stem for path in folder(paper).glob("*.csv"))


def read_table(paper: str, table: str) -> pd.DataFrame:
    """One published table as a tidy frame, rows in the printed order.

    Args:
        paper: a key of `PAPERS`.
        table: a name of `tables(paper)`, such as `table_11`.

    Returns:
        A frame with columns paper, table and `COLUMNS`; value and plus_minus are floats (NaN where
        nothing numeric was printed), all others strings.

    Raises:
        UnknownNameError: no such paper or table.
        CorruptFileError: another layout, a number that is none, a cell twice; line named.
    """
    import pandas as pd

    path = folder(paper) / f"{table}.csv"
    if not path.exists():
        raise unknown_name(f"table of {paper}", table, tables(paper))
    rows = _read_csv(path)
    frame = pd.DataFrame(rows, columns=list(COLUMNS), dtype=object)
    for name in ("value", "plus_minus"):
        frame[name] = [float(x) if x else float("nan") for x in frame[name]]
    frame.insert(0, "paper", paper)
    frame.insert(1, "table", table)
    return frame


def read_tables(paper: str | None = None) -> pd.DataFrame:
    """All tables of one paper, or of all papers, below each other in one tidy frame."""
    import pandas as pd

    names = [paper] if paper else list(PAPERS)
    frames = [read_table(p, t) for p in names for t in tables(p)]
    if not frames:
        return pd.DataFrame(columns=["paper", "table", *COLUMNS])
    return pd.concat(frames, ignore_index=True)


def wide(frame: pd.DataFrame, part: str = "", what: str = "value") -> pd.DataFrame:
    """A tidy table as it was printed: rows × columns, in the printed order.

    Args:
        frame: what `read_table` returns.
        part: which number of cells that print several.
        what: `value`, `printed`, `plus_minus` or `note`.
    """
    chosen = frame[frame["part"] == part]
    shape = chosen.pivot(index="row", columns="column", values=what)
    return shape.loc[chosen["row"].drop_duplicates(), chosen["column"].drop_duplicates()]


def write_table(paper: str, table: str, rows: list[dict[str, str]]) -> Path:
    """Write a table in the layout of `COLUMNS`; missing keys stay empty. Checked by reading back.

    Raises:
        CorruptFileError: a cell twice, or a value that is no number; nothing is written.
    """
    import io

    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path = folder(paper) / f"{table}.csv"
    _check(text.getvalue(), path)
    return store.write_text(path, text.getvalue())


def fingerprints(paper: str | None = None) -> dict[str, str]:
    """The SHA-256 of each CSV as it lies on disk, by `<paper>/<table>.csv`."""
    names = [paper] if paper else list(PAPERS)
    return {
        f"{p}/{t}.csv": store.sha256_file(folder(p) / f"{t}.csv") for p in names for t in tables(p)
    }


def write_fingerprints(paper: str) -> Path:
    """Note the fingerprints of one paper's files, after its tables were read again by eye."""
    path = folder() / "fingerprints.json"
    with store.lock(path):
        noted = store.read_json(path) if path.exists() else {}
        kept = {name: mark for name, mark in noted.items() if not name.startswith(f"{paper}/")}
        return store.write_json(path, dict(sorted({**kept, **fingerprints(paper)}.items())))


def check_fingerprints() -> None:
    """Compare every CSV with the fingerprint noted for it.

    Raises:
        CorruptFileError: names the first file that changed, is new, or is gone.
    """
    noted, found = store.read_json(folder() / "fingerprints.json"), fingerprints()
    for name in sorted(noted.keys() | found.keys()):
        if noted.get(name) != found.get(name):
            what = "is gone" if name not in found else "is new" if name not in noted else "changed"
            raise CorruptFileError(
                f"data/papers/{name} {what} since its fingerprint was noted; restore it with git, "
                f"or compare it with the paper and run write_fingerprints('{name.split('/')[0]}')."
            )


def _read_csv(path: Path) -> list[list[str]]:
    return _check(path.read_text(encoding="utf-8"), path)


def _check(text: str, path: Path) -> list[list[str]]:
    """The lines of a table's CSV; CorruptFileError names the first line that is not as it must."""
    lines = list(csv.reader(text.splitlines()))
    if not lines or tuple(lines[0]) != COLUMNS:
        raise CorruptFileError(f"{path} must begin with the columns {','.join(COLUMNS)}.")
    seen = set()
    for number, line in enumerate(lines[1:], start=2):
        where = f"{path}, line {number}"
        if len(line) != len(COLUMNS):
            raise CorruptFileError(f"{where}: {len(line)} fields instead of {len(COLUMNS)}.")
        cell = dict(zip(COLUMNS, line, strict=True))
        for name in ("value", "plus_minus"):
            try:
                float(cell[name] or 0)
            except ValueError:
                raise CorruptFileError(f"{where}: {name} {cell[name]!r} is no number.") from None
        key = tuple(cell[k] for k in KEY)
        if key in seen:
            raise CorruptFileError(f"{where}: the cell {key} stands twice.")
        if not cell["printed"] and not cell["note"].startswith("lost"):
            raise CorruptFileError(f"{where}: nothing printed, and no note that begins 'lost'.")
        seen.add(key)
    return lines[1:]
