"""What a check of a claim returns, and the few rules by which it decides.

The rules are the same for all papers, so that a verdict says the same thing everywhere:

    equals     a printed number beside the recomputed one: holds; holds to rounding (half a unit of
               the last printed digit, or what the rounding of the inputs explains); contradicted
    holds_if   a statement that is true of the printed numbers or is not
    all_of     "consistently", "all", "in every …": one exception contradicts
    some_of    wording without "all": every case holds; some: overstated; none: contradicted
    apart      a difference from which something is concluded: it holds beyond 1.96 standard errors,
               is overstated within them, contradicted with the other sign
    level      "comparable", "on a par": holds where the difference lies within 1.96 standard errors
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from lora_kit.errors import unknown_name
from lora_kit.studies.papers import read_table

HOLDS = "holds"
ROUNDING = "holds to rounding"
CONTRADICTED = "contradicted by its own table"
OVERSTATED = "overstated"
NOT_CHECKABLE = "not checkable"
REPRODUCED = "reproduced here at small scale"
NOT_REPRODUCED = "not reproduced here"
VERDICTS = (
    HOLDS,
    ROUNDING,
    CONTRADICTED,
    OVERSTATED,
    NOT_CHECKABLE,
    REPRODUCED,
    NOT_REPRODUCED,
)
Z95 = 1.959964  # two-sided 95 % of the normal distribution


@dataclass(frozen=True)
class Outcome:
    """verdict: one of `VERDICTS`; found: what was recomputed, in words; tolerance: what was let
    pass."""

    verdict: str
    found: str
    tolerance: str = "none"


@dataclass(frozen=True)
class Cell:
    """One printed number: its value, the ± printed after it, and its text."""

    value: float
    plus_minus: float
    printed: str

    @property
    def half(self) -> float:
        """Half a unit of the last digit of the first printed numeral."""
        return half_unit(self.printed)


CHECKS: dict[str, Callable[[], Outcome]] = {}


def check(function: Callable[[], Outcome]) -> Callable[[], Outcome]:
    """Register a check as `<module>.<function>`: `saha2024.rank_128_is_best_in_table_1`.

    Raises:
        ValueError: the name is taken.
    """
    name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
    if name in CHECKS:
        raise ValueError(f"Two checks are called {name}.")
    CHECKS[name] = function
    return function


@cache
def cells_of(paper: str, table: str) -> dict[tuple[str, str, str], Cell]:
    """Every cell of a table by (row, column, part); read once."""
    frame = read_table(paper, table)
    keys = zip(frame["row"], frame["column"], frame["part"], strict=True)
    numbers = zip(frame["value"], frame["plus_minus"], frame["printed"], strict=True)
    return {key: Cell(*number) for key, number in zip(keys, numbers, strict=True)}


def cell(paper: str, table: str, row: str, column: str, part: str = "") -> Cell:
    """One printed cell.

    Raises:
        UnknownNameError: no such table, row or column.
    """
    cells = cells_of(paper, table)
    if (row, column, part) not in cells:
        raise unknown_name(f"cell of {paper} {table}", f"{row} | {column}", _names(cells))
    return cells[row, column, part]


def column(paper: str, table: str, name: str) -> dict[str, float]:
    """One column of numbers by row; cells without a number are left out."""
    cells = cells_of(paper, table)
    found = {r: c.value for (r, col, part), c in cells.items() if col == name and not part}
    if not found:
        raise unknown_name(f"column of {paper} {table}", name, sorted({k[1] for k in cells}))
    return {r: v for r, v in found.items() if not math.isnan(v)}


def text(paper: str, place: str, what: str) -> Cell:
    """A number printed in a paper's text: a row of its `text.csv`."""
    return cell(paper, "text", place, what)


def _names(cells) -> list[str]:
    return [f"{row} | {col}" for row, col, _ in cells]


def half_unit(printed: str) -> float:
    """Half a unit of the last digit of the first numeral in a text: "21.6%" gives 0.05."""
    import re

    numeral = re.search(r"\d[\d,]*\.?\d*|\.\d+", printed)
    digits = numeral.group().partition(".")[2] if numeral else ""
    return 0.5 * 10.0 ** -len(digits)


def equals(
    printed: Cell | str,
    value: float,
    low: float | None = None,
    high: float | None = None,
    unit: str = "",
) -> Outcome:
    """A printed number beside the recomputed one.

    Args:
        printed: the printed cell, or its text.
        value: recomputed from the numbers as printed.
        low, high: where the recomputed number can lie, given that its inputs were rounded.
        unit: shown behind the number.
    """
    shown = printed.printed if isinstance(printed, Cell) else printed
    number = printed.value if isinstance(printed, Cell) else number_in(shown)
    half = half_unit(shown)
    near = abs(value - number) <= half * (1 + 1e-9)
    within = low is not None and low - half * (1 + 1e-9) <= number <= high + half * (1 + 1e-9)
    digits = 0 if value == int(value) else max(0, -math.floor(math.log10(half))) + 1
    found = f"{value:,.{digits}f}{unit}"
    if abs(value - number) <= 1e-9 * max(1.0, abs(number)):
        return Outcome(HOLDS, f"{shown.strip('*')}", "exact")
    if near:
        return Outcome(ROUNDING, found, f"half a unit, {half:g}{unit}")
    if within:
        digits = max(digits, 1)
        reach = f"{low:,.{digits}f} to {high:,.{digits}f}{unit}"
        return Outcome(ROUNDING, found, f"rounding of the inputs: {reach}")
    return Outcome(CONTRADICTED, found, f"half a unit, {half:g}{unit}")


def number_in(printed: str) -> float:
    """The first numeral of a text, with its sign."""
    import re

    numeral = re.search(r"[-−]?(?:\d[\d,]*\.?\d*|\.\d+)", printed)
    if numeral is None:
        raise ValueError(f"There is no number in {printed!r}.")
    return float(numeral.group().replace(",", "").replace("−", "-"))


def holds_if(true: bool, found: str, tolerance: str = "none") -> Outcome:
    """A statement about printed numbers that is true, or is contradicted by them."""
    return Outcome(HOLDS if true else CONTRADICTED, found, tolerance)


def all_of(cases: Mapping[str, bool], what: str = "cases") -> Outcome:
    """A statement about all cases; the exceptions are named."""
    wrong = [name for name, true in cases.items() if not true]
    found = f"{len(cases) - len(wrong)} of {len(cases)} {what}"
    return Outcome(
        CONTRADICTED if wrong else HOLDS,
        found + (f"; not {', '.join(wrong)}" if wrong else ""),
    )


def some_of(cases: Mapping[str, bool], what: str = "cases") -> Outcome:
    """A statement worded without "all": overstated where some cases hold and others do not."""
    strict = all_of(cases, what)
    partly = strict.verdict == CONTRADICTED and any(cases.values())
    return Outcome(OVERSTATED, strict.found) if partly else strict


def binomial_error(p: float, n: int) -> float:
    """Standard error of a share p of n items as lm-eval prints it: √(p(1 − p)/(n − 1))."""
    return math.sqrt(p * (1 - p) / (n - 1))


def apart(difference: float, stderr: float, unit: str = "") -> Outcome:
    """A difference that is said to be there, in the sign it is said to have."""
    z = difference / stderr
    verdict = HOLDS if z >= Z95 else OVERSTATED if z > 0 else CONTRADICTED
    found = f"{difference:+.4g}{unit}, z = {z:.2f}, p = {two_sided(z):.2g}"
    return Outcome(verdict, found, f"1.96 standard errors of {stderr:.3g}{unit}, unpaired")


def level(difference: float, stderr: float, unit: str = "") -> Outcome:
    """A difference that is said not to matter; a larger one overstates the likeness."""
    z = difference / stderr
    verdict = HOLDS if abs(z) < Z95 else OVERSTATED
    found = f"{difference:+.4g}{unit}, z = {z:.2f}"
    return Outcome(verdict, found, f"1.96 standard errors of {stderr:.3g}{unit}, unpaired")


def two_sided(z: float) -> float:
    """The two-sided p value of a standard normal z."""
    return math.erfc(abs(z) / math.sqrt(2))
