"""A scan over all published tables for cells that cannot be, or that stand where others stand.

A finding is no verdict on a paper: it says which printed numbers call for a second look, and why.
Six kinds are looked for:

    repeated     two or more neighbouring numbers of one row again in another, or one of four
                 decimals twice in a column: a copy, or a rare coincidence
    impossible   outside a score's range, or against a law that metrics keep on the same answers
    no count     a share that no number of right answers out of n gives
    one answer   three or more models with the very same accuracy on a task: one constant answer
                 of all of them, or a coincidence
    no share     a percentage that is not the count beside it, rounded
    false best   a row said to be the best of its column (or the worst), and is not
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations

from lora_kit.studies.checks.oswal2025 import OUTSIDE, TASKS
from lora_kit.studies.papers import PAPERS, known_paper, read_table, tables, wide

KINDS = ("repeated", "impossible", "no count", "one answer", "no share", "false best")


@dataclass(frozen=True)
class Finding:
    """kind: one of `KINDS`; place: table and cells; what: the numbers, and what is odd."""

    kind: str
    paper: str
    place: str
    what: str


@dataclass(frozen=True)
class Row:
    """A printed row: its numbers in order, by column, with their texts."""

    paper: str
    table: str
    name: str
    columns: tuple[str, ...]
    values: tuple[float, ...]
    texts: tuple[str, ...]

    def of(self, column: str) -> float | None:
        return dict(zip(self.columns, self.values, strict=True)).get(column)


@cache
def rows_of(paper: str, table: str) -> tuple[Row, ...]:
    """The rows of one table with the numbers they print, without lifts and counts in brackets."""
    found: dict[str, list[tuple[str, float, str]]] = {}
    frame = read_table(paper, table)
    sizes = frame["unit"].str.endswith("parameters")  # of models, which share them
    kept = frame[(frame["part"] == "") & frame["value"].notna() & ~sizes]
    cells = zip(kept["row"], kept["column"], kept["value"], kept["printed"], strict=True)
    for row, column, value, printed in cells:
        numeral = re.search(r"\d[\d,]*\.?\d*", printed)
        found.setdefault(row, []).append((column, value, numeral.group() if numeral else printed))
    return tuple(
        Row(paper, table, name, *(tuple(x) for x in zip(*cells, strict=True)))
        for name, cells in found.items()
    )


def _tables(paper: str) -> list[str]:
    return [t for t in tables(paper) if t.startswith("table")]


def significant(text: str) -> int:
    """Significant digits of a numeral: 3 for 0.0793, 4 for 33.51."""
    return len(text.replace(",", "").replace(".", "").lstrip("0"))


# ------------------------------------------------------------------ repeated


def repeated(paper: str) -> Iterator[Finding]:
    """Runs of at least two neighbouring numbers, of five significant digits together, in two rows
    of different names; and numbers of three digits and four decimals twice in one column.

    Tables that restate others under the same row names are not held against each other.
    """
    rows = [row for table in _tables(paper) for row in rows_of(paper, table)]
    paired = set()
    for one, two in combinations(rows, 2):
        if one.name != two.name:
            for run in _runs(one, two):
                paired |= {(one.table, one.name, two.name, text) for text in run}
                place = f"{one.table} {one.name}; {two.table} {two.name}"
                yield Finding("repeated", paper, place, f"{', '.join(run)} in both rows")
    for table in _tables(paper):
        seen: dict[tuple[str, str], str] = {}
        for row in rows_of(paper, table):
            for column, text in zip(row.columns, row.texts, strict=True):
                if significant(text) >= 3 and len(text.partition(".")[2]) >= 4:
                    first = seen.setdefault((column, text), row.name)
                    if first != row.name and (table, first, row.name, text) not in paired:
                        place = f"{table} {column}: {first}; {row.name}"
                        yield Finding("repeated", paper, place, f"{text} in both rows")


def _runs(one: Row, two: Row) -> Iterator[list[str]]:
    for i in range(len(one.texts) - 1):
        for j in range(len(two.texts) - 1):
            before = i and j and one.texts[i - 1] == two.texts[j - 1]
            run = []
            while (
                i + len(run) < len(one.texts)
                and j + len(run) < len(two.texts)
                and one.texts[i + len(run)] == two.texts[j + len(run)]
            ):
                run.append(one.texts[i + len(run)])
            digits = [significant(text) for text in dict.fromkeys(run)]
            if not before and len(digits) >= 2 and min(digits) >= 2 and sum(digits) >= 5:
                yield run


# ------------------------------------------------------------------ impossible


@dataclass(frozen=True)
class Law:
    """In every row of a table, column `low` is at most `factor` times column `high`."""

    paper: str
    table: str
    low: str
    high: str
    why: str
    factor: float = 1.0


LAWS = (
    Law("saha2024", "table_01", "pass@1", "pass@10", "ten draws solve no less than one"),
    Law("saha2024", "table_01", "pass@10", "pass@1", "ten draws solve at most ten times one", 10),
    Law("saha2024", "table_02", "ROUGE-2", "ROUGE-1", "common pairs are made of common words"),
    Law("saha2024", "table_02", "ROUGE-L", "ROUGE-1", "a common subsequence is of common words"),
    Law("saha2024", "table_04", "Strict Match", "Flexible Extract", "a strict match is flexible"),
    Law("zhao2024", "table_03", "Best BM", "Best FT", "the best of ten starts no lower"),
    Law("zhao2024", "table_13", "Average Base Model Score", "Best Base Model Score", "a mean"),
    Law("zhao2024", "table_13", "Average Fine-Tuned Score", "Best Fine-tuned Score", "a mean"),
    Law("zhao2024", "table_13", "Input length µ", "Example length µ", "an input is part of it"),
)
SCORES = {  # tables whose plain numbers are scores between 0 and 1
    "saha2024": ("table_01", "table_02", "table_03", "table_04"),
    "oswal2025": ("table_02", "table_03"),
    "alwadhi2024": ("table_02", "table_03"),
    "zhao2024": ("table_11", "table_12"),
}


def impossible(paper: str) -> Iterator[Finding]:
    """Scores outside 0 to 1, per cents outside ±100, a negative ±, and broken laws."""
    for table in _tables(paper):
        frame = read_table(paper, table)
        top = 1.0 if table in SCORES.get(paper, ()) else math.inf
        for cell in frame[frame["value"].notna()].to_dict("records"):
            value, percent = cell["value"], cell["unit"] == "%"
            scored = top == 1.0 and not cell["part"]
            bad = (scored and not 0 <= value <= 1) or (percent and abs(value) > 100)
            if bad or cell["plus_minus"] < 0:
                place = f"{table} {cell['row']}, {cell['column']}"
                yield Finding("impossible", paper, place, f"{cell['printed']} is out of range")
    for law in LAWS:
        if law.paper == paper:
            for row in rows_of(paper, law.table):
                low, high = row.of(law.low), row.of(law.high)
                if low is not None and high is not None and low > law.factor * high + 1e-9:
                    times = f"{law.factor:g} times " if law.factor != 1 else ""
                    what = f"{law.low} {low:g} above {times}{law.high} {high:g}: {law.why}"
                    yield Finding("impossible", paper, f"{law.table} {row.name}", what)


# ------------------------------------------------------------------ no count


@dataclass(frozen=True)
class Count:
    """Numbers of a table that should be shares of n answers: rows or columns that match."""

    paper: str
    table: str
    n: int
    rows: str = ".*"
    columns: str = ".*"


COUNTS = (
    Count("saha2024", "table_01", 164),
    Count("saha2024", "table_04", 1319),
    Count("mai2025", "table_02", 1319, "GSM8K / .* Accuracy"),
    Count("mai2025", "table_02", 10_042, "HellaSwag / .*Accuracy"),
    Count("mai2025", "table_02", 100, "MMLU CS / Accuracy"),
    Count("alwadhi2024", "table_02", 112),
    Count("alwadhi2024", "table_03", 612),
    *(
        Count("zhao2024", table, n, task)
        for table in ("table_11", "table_12")
        for task, n in (("magicoder", 164), ("glue_wnli", 71), ("customer_support", 391))
    ),
)


def no_count(paper: str) -> Iterator[Finding]:
    """Shares that are k/n, rounded, for no whole k. They must rest on more answers than n, on
    several for each question, or on another n: a hint, and no proof of an error."""
    for count in COUNTS:
        if count.paper != paper:
            continue
        for row in rows_of(paper, count.table):
            if not re.fullmatch(count.rows, row.name):
                continue
            for column, value, text in zip(row.columns, row.values, row.texts, strict=True):
                if re.fullmatch(count.columns, column) and not _fits(value, text, count.n):
                    share = value / 100 if value > 1 else value
                    place = f"{count.table} {row.name}, {column}"
                    what = f"{text} would be {share * count.n:.2f} of {count.n:,}"
                    yield Finding("no count", paper, place, what)


def _fits(value: float, text: str, n: int) -> bool:
    scale = 100 if value > 1 else 1
    half = 0.5 * 10.0 ** -len(text.partition(".")[2]) / scale
    k = round(value / scale * n)
    return abs(k / n - value / scale) <= half + 1e-12


# ------------------------------------------------------------------ one answer, no share


def one_answer(paper: str, least: int = 3) -> Iterator[Finding]:
    """Tasks on which several models have the same accuracy to three digits; 1.000 aside."""
    if paper != "zhao2024":  # the only paper with many models on a task
        return
    metric = wide(read_table(paper, "table_12"), what="printed")["Metric"]
    for table in ("table_11", "table_12"):
        for row in rows_of(paper, table):
            if metric[row.name] != "accuracy":
                continue
            for text in dict.fromkeys(row.texts):
                same = [
                    c for c, t in zip(row.columns, row.texts, strict=True) if t == text != "1.000"
                ]
                if len(same) >= least:
                    place = f"{table} {row.name}"
                    yield Finding("one answer", paper, place, f"{text} of {', '.join(same)}")


def no_share(paper: str) -> Iterator[Finding]:
    """Table 4 of zhao2024 prints each share beside its count of 31 tasks (or 310 models)."""
    if paper != "zhao2024":
        return
    frame = read_table(paper, "table_04")
    counts = frame[frame["part"] == "count"]
    for cell in counts.to_dict("records"):
        same = (frame["row"] == cell["row"]) & (frame["column"] == cell["column"])
        share = frame[same & (frame["part"] == "")]["value"].iloc[0]
        exact = 100 * cell["value"] / (310 if cell["row"] == "Average" else 31)
        if abs(share - exact) > 0.05 + 1e-9:
            place = f"table_04 {cell['row']}, {cell['column']}"
            yield Finding("no share", paper, place, f"{share:g} %, but the count gives {exact:.2f}")


# ------------------------------------------------------------------ false best


@dataclass(frozen=True)
class Best:
    """A row that text or bold print calls the best of a column, among the rows that match."""

    paper: str
    table: str
    column: str
    row: str
    among: str
    place: str
    lowest: bool = False


ROUGES = ("ROUGE-1", "ROUGE-2", "ROUGE-L")
OSWAL = r"GPT-4 Turbo|Gemini Pro|SmolLM2-1.7B-EC"
BESTS = (
    *(
        Best("saha2024", "table_02", c, f"Llama-1B-LoRA-ALL-R{r}", f"LoRA.*R{r}$", "section 5.2")
        for r in (32, 128)
        for c in ROUGES
    ),
    *(
        Best("saha2024", "table_03", c, "Llama-1B-LoRA-All-R128", "LoRA", "section 5.2")
        for c in ("Accuracy", "Acc - Norm")
    ),
    *(
        Best("saha2024", "table_04", c, "Llama-1B-Math-R128", "Math", "section 5.3")
        for c in ("Flexible Extract", "Strict Match")
    ),
    *(
        Best("saha2024", "table_01", c, "Llama-3B-Code-r128", "Code", "section 5.1")
        for c in ("pass@1", "pass@10")
    ),
    *(
        Best("oswal2025", table, c, "SmolLM2-1.7B-EC", OSWAL, "abstract")
        for table, columns in (("table_02", TASKS), ("table_03", OUTSIDE))
        for c in columns
    ),
    Best("alwadhi2024", "table_02", "Accuracy", "LLaMA (ML FT)", "LLaMA", "section 5.2"),
    Best("alwadhi2024", "table_02", "Accuracy", "GPT-4o", "", "section 5.2"),
    Best("alwadhi2024", "table_03", "Accuracy", "GPT-4o", "", "section 5.2"),
    Best("zhao2024", "table_04", "With FT", "zephyr-7b-beta", "", "section 5.1"),
    Best("zhao2024", "table_04", "With FT", "gemma-2b", r"^(?!Average)", "section 4", True),
    Best("zhao2024", "table_04", "Average lift from FT", "gemma-2b", r"^(?!Average)", "section 4"),
    Best("zhao2024", "table_04", "Frequency FT = max(task)", "mistral-7b", "", "section 5.1"),
)


def false_best(paper: str) -> Iterator[Finding]:
    """Statements of `BESTS` that the column does not bear out; a tie bears it out."""
    for best in BESTS:
        if best.paper != paper:
            continue
        scores = {
            row.name: row.of(best.column)
            for row in rows_of(paper, best.table)
            if re.search(best.among, row.name) and row.of(best.column) is not None
        }
        rival = (min if best.lowest else max)(scores, key=scores.get)
        if scores[rival] != scores[best.row]:
            word = "lowest" if best.lowest else "best"
            what = f"{best.row} {scores[best.row]:g} is not the {word}: {rival} {scores[rival]:g}"
            yield Finding("false best", paper, f"{best.table} {best.column} ({best.place})", what)


SCANS = (repeated, impossible, no_count, one_answer, no_share, false_best)


def scan(paper: str | None = None) -> list[Finding]:
    """Everything found in one paper's tables, or in all; about a second.

    Raises:
        UnknownNameError: no such paper.
    """
    names = [known_paper(paper)] if paper else list(PAPERS)
    return [finding for name in names for look in SCANS for finding in look(name)]
