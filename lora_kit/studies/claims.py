"""The ledger: every claim of the five papers, what stands behind it, and the verdict.

`data/papers/claims.yaml` holds, under each paper's name, entries of

    id       the paper's name and a number
    place    section, table or figure
    claim    the claim in our words
    printed  the printed value, if any
    kind     arithmetic (its own numbers or formula decide); derivable from printed tables;
             experimental (only a run decides); about other work
    verdict  holds; holds to rounding; contradicted by its own table; overstated; not checkable;
             reproduced here at small scale; not reproduced here
    check    the function of `studies.checks` that decides
    record   file or folder under data/results/ that the check reads, or would
    note     why, where the check's own words are not enough

A verdict is never a matter of taste: `problems` runs every check and compares. "Not reproduced
here" covers runs that came out otherwise and runs that were not made; the check's words say which.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_kit import __version__, store
from lora_kit.errors import CorruptFileError
from lora_kit.studies.checks import VERDICTS, Outcome, registered
from lora_kit.studies.checks.outcome import NOT_CHECKABLE, NOT_REPRODUCED, REPRODUCED
from lora_kit.studies.papers import PAPERS, folder

KINDS = ("arithmetic", "derivable from printed tables", "experimental", "about other work")
DECIDED = ("arithmetic", "derivable from printed tables")


class Claim(BaseModel):
    """One line of the ledger; the module's text has the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    id: str = Field(pattern=r"^[a-z]+\d{4}-\d{3}$")
    paper: str
    place: str = Field(min_length=1)
    claim: str = Field(min_length=10)
    printed: str = ""
    kind: Literal[KINDS]
    verdict: Literal[VERDICTS]
    check: str = ""
    record: str = ""
    note: str = ""


@dataclass(frozen=True)
class Judged:
    """A claim and what its check said; None where it has none."""

    claim: Claim
    outcome: Outcome | None

    @property
    def found(self) -> str:
        return self.outcome.found if self.outcome else ""


def read_claims(path: Path | None = None) -> list[Claim]:
    """Read the ledger in its order.

    Raises:
        CorruptFileError: not YAML, an entry that is none (named, with its first fault), an unknown
            paper, or an id twice.
    """
    import yaml

    path = path or folder() / "claims.yaml"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        papers = yaml.load(path.read_text(encoding="utf-8"), loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise CorruptFileError(f"{path} cannot be read: {' '.join(str(e).split())}.") from e
    if not isinstance(papers, dict):
        raise CorruptFileError(f"{path} must hold a list of claims under each paper's name.")
    found: list[Claim] = []
    for paper, entries in papers.items():
        if paper not in PAPERS:
            raise CorruptFileError(f"{path}: there is no paper {paper!r}.")
        for number, entry in enumerate(entries or [], start=1):
            found.append(_claim(paper, number, entry, path))
    seen: set[str] = set()
    for claim in found:
        if claim.id in seen:
            raise CorruptFileError(f"{path}: {claim.id} stands twice.")
        seen.add(claim.id)
    return found


def _claim(paper: str, number: int, entry, path: Path) -> Claim:
    name = entry.get("id") if isinstance(entry, dict) else None
    where = f"{path}: {name or f'entry {number} of {paper}'}"
    if not isinstance(entry, dict):
        raise CorruptFileError(f"{where} is no mapping of fields.")
    try:
        claim = Claim(paper=paper, **entry)
    except (ValidationError, TypeError) as e:
        fault = e.errors()[0] if isinstance(e, ValidationError) else {"loc": (), "msg": str(e)}
        field = ".".join(str(x) for x in fault["loc"])
        value = f" ({entry[field]!r})" if field in entry else ""
        raise CorruptFileError(f"{where}: {field}{value}: {fault['msg']}.") from e
    if not claim.id.startswith(paper):
        raise CorruptFileError(f"{where} stands under {paper}.")
    return claim


def judge(claims: Iterable[Claim]) -> list[Judged]:
    """Run each claim's check; about a second for the whole ledger.

    Raises:
        CorruptFileError: a claim whose check does not exist, by name.
    """
    known = registered()
    found = []
    for claim in claims:
        if claim.check and claim.check not in known:
            raise CorruptFileError(f"{claim.id}: there is no check {claim.check!r}.")
        found.append(Judged(claim, known[claim.check]() if claim.check else None))
    return found


def problems(claims: list[Claim]) -> list[str]:
    """Everything that is wrong with the ledger, each a sentence that names the entry.

    A check that does not exist, that no entry uses, or whose outcome is not the verdict; a claim
    that could be decided and has no check; a verdict without what it needs (a note, a record); a
    record that is missing, cannot be read, or is of another version of the kit (one that notes
    no version, as those of a checkout that was not installed, passes).
    """
    known, found = registered(), []
    for claim in claims:
        if claim.check and claim.check not in known:
            found.append(f"{claim.id}: there is no check {claim.check!r}")
            continue
        found += [f"{claim.id}: {fault}" for fault in _needs(claim)]
        found += [f"{claim.id}: {fault}" for fault in _record_faults(claim)]
        if claim.check:
            outcome = known[claim.check]()
            if outcome.verdict != claim.verdict:
                found.append(
                    f"{claim.id}: the verdict is {claim.verdict!r}, but {claim.check} says "
                    f"{outcome.verdict!r}: {outcome.found}"
                )
    used = {claim.check for claim in claims}
    return found + [f"the check {name} belongs to no claim" for name in sorted(known.keys() - used)]


def _needs(claim: Claim) -> list[str]:
    found = []
    if claim.kind in DECIDED and not claim.check:
        found.append(f"a claim that is {claim.kind} needs a check")
    if not claim.check and claim.verdict not in (NOT_CHECKABLE, NOT_REPRODUCED):
        found.append(f"the verdict {claim.verdict!r} needs a check")
    if not claim.check and not claim.note:
        found.append("without a check it needs a note that says why")
    if claim.verdict == REPRODUCED and not claim.record:
        found.append("reproduced, but no record is named")
    return found


def _record_faults(claim: Claim) -> list[str]:
    """Faults of the records a claim names. A study that has no record yet is none: the claim then
    says "not reproduced here"."""
    from lora_kit.studies.records import read_record

    if not claim.record:
        return []
    path = store.repository() / "data" / "results" / claim.record
    files = [path] if path.is_file() else sorted(path.glob("*.json"))
    if not files:
        if claim.verdict == NOT_REPRODUCED and not path.suffix:
            return []
        return [f"the record data/results/{claim.record} is missing"]
    found = []
    for file in files:
        try:
            record = read_record(file)
        except CorruptFileError as e:
            found.append(str(e))
            continue
        version = record.versions.get("lora-kit", __version__)
        if version != __version__:
            found.append(
                f"the record {claim.record}{'' if path.is_file() else '/' + file.name} is of "
                f"lora-kit {version}, not {__version__}; measure it again"
            )
    return found
