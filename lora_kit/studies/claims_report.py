"""The ledger and the scan as texts and tables: `lora-kit claims` and notebook 11 show them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_kit.errors import unknown_name
from lora_kit.studies.checks import VERDICTS
from lora_kit.studies.claims import Claim, Judged, judge, read_claims
from lora_kit.studies.papers import known_paper

if TYPE_CHECKING:
    import pandas as pd

    from lora_kit.studies.scan import Finding

WIDTH = 96


def select(
    claims: Sequence[Claim], paper: str | None = None, verdict: str | None = None
) -> list[Claim]:
    """The claims of one paper, of one verdict, or both; the first words of a verdict are enough.

    Raises:
        UnknownNameError: no such paper or verdict, or the first words of several.
    """
    if paper is not None:
        known_paper(paper)
    wanted = full_verdict(verdict) if verdict is not None else None
    return [
        c
        for c in claims
        if (paper is None or c.paper == paper) and (wanted is None or c.verdict == wanted)
    ]


def full_verdict(words: str) -> str:
    """The verdict that `words` is or begins: "contradicted", "reproduced".

    Raises:
        UnknownNameError: none, or several.
    """
    asked = " ".join(words.lower().replace("-", " ").split())
    if asked in VERDICTS:
        return asked
    found = [v for v in VERDICTS if asked and v.startswith(asked)]
    if len(found) != 1:
        raise unknown_name("verdict", words, VERDICTS)
    return found[0]


def tally(claims: Sequence[Claim]) -> pd.DataFrame:
    """How many claims of each paper have each verdict, with totals."""
    import pandas as pd

    papers = list(dict.fromkeys(c.paper for c in claims))
    counts = {
        paper: {v: sum(c.paper == paper and c.verdict == v for c in claims) for v in VERDICTS}
        for paper in papers
    }
    frame = pd.DataFrame(counts, index=list(VERDICTS)).fillna(0).astype(int).T
    frame["all"] = frame.sum(axis=1)
    frame.loc["all"] = frame.sum()
    return frame


def format_claims(judged: Sequence[Judged]) -> str:
    """The claims as text: id, place and verdict; the claim; printed, found, why."""
    blocks = []
    for item in judged:
        c = item.claim
        lines = [f"{c.id}  {c.place}  [{c.verdict}]", c.claim]
        if c.printed:
            lines.append(f"printed: {c.printed}")
        if item.found:
            lines.append(f"found:   {item.found}")
            if item.outcome.tolerance != "none":
                lines[-1] += f" (tolerance: {item.outcome.tolerance})"
        if c.note:
            lines.append(f"note:    {c.note}")
        evidence = [f"check {c.check}" if c.check else "", f"record {c.record}" if c.record else ""]
        if any(evidence):
            lines.append("by:      " + "; ".join(e for e in evidence if e))
        blocks.append("\n".join(_wrapped(line, i) for i, line in enumerate(lines)))
    return "\n\n".join(blocks)


def _wrapped(line: str, number: int) -> str:
    if number == 0:
        return line
    hang = "           " if number > 1 else "  "
    return textwrap.fill(line, WIDTH, initial_indent="  ", subsequent_indent=hang)


def format_tally(claims: Sequence[Claim]) -> str:
    """One line: how many claims, and how many of each verdict."""
    counts = {v: sum(c.verdict == v for c in claims) for v in VERDICTS}
    parts = [f"{n} {verdict}" for verdict, n in counts.items() if n]
    return f"{len(claims)} claims: " + ", ".join(parts)


def format_scan(findings: Sequence[Finding]) -> str:
    """The scan's findings, one line each, under their kinds."""
    lines = []
    for kind in dict.fromkeys(f.kind for f in findings):
        some = [f for f in findings if f.kind == kind]
        lines.append(f"{kind} ({len(some)})")
        lines += [f"  {f.paper} {f.place}: {f.what}" for f in some]
    return "\n".join(lines) or "Nothing was found."


def print_claims(paper: str | None, verdict: str | None, scanned: bool) -> str:
    """What `lora-kit claims` prints.

    Raises:
        UnknownNameError: no such paper or verdict.
        CorruptFileError: a faulty ledger; the entry is named.
    """
    if scanned:
        from lora_kit.studies.scan import scan

        return format_scan(scan(paper))
    chosen = select(read_claims(), paper, verdict)
    text = format_claims(judge(chosen))
    return f"{text}\n\n{format_tally(chosen)}" if chosen else "No claim has that verdict there."
