"""The ledger: every check runs and says what its entry says; faulty entries are named."""

import re
import time

import pytest
import yaml

from lora_kit import store
from lora_kit.cli import main
from lora_kit.errors import CorruptFileError, UnknownNameError
from lora_kit.studies import claims as ledger
from lora_kit.studies.checks import MODULES, VERDICTS, Outcome, measured, registered, run_check
from lora_kit.studies.claims import DECIDED, KINDS, Claim, judge, problems, read_claims
from lora_kit.studies.claims_report import (
    format_claims,
    format_tally,
    full_verdict,
    select,
    tally,
)
from lora_kit.studies.papers import PAPERS
from lora_kit.studies.records import new_record, write_record

ALL = read_claims()
GOOD = {
    "id": "saha2024-001",
    "place": "section 5",
    "claim": "A claim of some length.",
    "kind": "derivable from printed tables",
    "verdict": "holds",
    "check": "saha2024.hellaswag_after",
}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty folder of records in place of the checkout's; the tables are read beforehand."""
    run_check(GOOD["check"])
    measured.records.cache_clear()
    monkeypatch.setattr(store, "repository", lambda: tmp_path)
    yield tmp_path / "data" / "results"
    measured.records.cache_clear()


def entry(**changes):
    return {k: v for k, v in {**GOOD, **changes}.items() if v is not None}


def claim(**changes):
    return Claim(paper="saha2024", **entry(**changes))


def faults_of(*claims):
    """Problems of these entries alone: checks that belong to no claim are left out."""
    return [p for p in problems(list(claims)) if not p.startswith("the check ")]


# ------------------------------------------------------------------ the ledger as it stands


def test_the_ledger_has_no_problem():
    assert problems(ALL) == []


def test_the_ledger_covers_the_papers():
    assert len(ALL) >= 200
    counts = {paper: sum(c.paper == paper for c in ALL) for paper in PAPERS}
    assert min(counts.values()) >= 40, counts
    assert {c.kind for c in ALL} == set(KINDS)
    assert {c.verdict for c in ALL} == set(VERDICTS)
    for paper in PAPERS:
        ids = [c.id for c in ALL if c.paper == paper]
        assert ids == [f"{paper}-{n:03}" for n in range(1, len(ids) + 1)]


def test_every_decidable_claim_has_a_check_of_its_own_paper():
    for c in ALL:
        if c.kind in DECIDED:
            assert c.check, c.id
        if c.check and not c.check.startswith(("measured.", "counted.")):
            assert c.check.startswith(c.paper), c.id
    used = [c.check for c in ALL if c.check]
    assert len(used) == len(set(used))  # one function a claim


@pytest.mark.parametrize("name", sorted(registered()))
def test_every_check_states_its_outcome(name):
    outcome = run_check(name)
    assert isinstance(outcome, Outcome)
    assert outcome.verdict in VERDICTS
    assert outcome.found
    assert outcome.tolerance
    assert "nan" not in outcome.found


def test_all_checks_take_about_a_second():
    registered()
    started = time.process_time()
    judge(ALL)
    assert time.process_time() - started < 4  # about 1 s; slack for a busy machine


def test_modules_are_small():
    for module in MODULES:
        path = store.repository() / "lora_kit" / "studies" / "checks" / f"{module}.py"
        assert len(path.read_text().splitlines()) <= 400, module


# ------------------------------------------------------------------ faulty ledgers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": "plausible"}, r"saha2024-001: verdict \('plausible'\)"),
        ({"kind": "derivable"}, r"saha2024-001: kind \('derivable'\)"),
        ({"claim": None}, r"saha2024-001: claim: Field required"),
        ({"colour": "red"}, r"saha2024-001: colour \('red'\)"),
        ({"id": "saha2024_1"}, r"saha2024_1: id"),
        ({"id": "mai2025-001"}, "mai2025-001 stands under saha2024"),
        ({"printed": 0.5}, r"saha2024-001: printed \(0.5\)"),
    ],
)
def test_a_faulty_entry_is_named(tmp_path, change, message):
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump({"saha2024": [entry(**change)]}))
    with pytest.raises(CorruptFileError, match=message):
        read_claims(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("saha2024: [1", "cannot be read"),
        ("- a\n", "under each paper's name"),
        ("saha2023: []\n", "there is no paper 'saha2023'"),
        ("saha2024: [text]\n", "entry 1 of saha2024 is no mapping"),
    ],
)
def test_a_faulty_file_is_named(tmp_path, text, message):
    path = tmp_path / "claims.yaml"
    path.write_text(text)
    with pytest.raises(CorruptFileError, match=message):
        read_claims(path)


def test_an_id_twice_is_named(tmp_path):
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump({"saha2024": [GOOD, GOOD]}))
    with pytest.raises(CorruptFileError, match="saha2024-001 stands twice"):
        read_claims(path)


def test_a_missing_ledger_is_one_sentence(tmp_path):
    with pytest.raises(CorruptFileError, match="cannot be read"):
        read_claims(tmp_path / "none.yaml")


def test_an_unknown_check_is_named():
    wrong = claim(check="saha2024.no_such")
    assert faults_of(wrong) == ["saha2024-001: there is no check 'saha2024.no_such'"]
    with pytest.raises(CorruptFileError, match=r"saha2024-001.*saha2024\.no_such"):
        judge([wrong])
    with pytest.raises(UnknownNameError, match=r"check 'saha2024\.hellaswag_aftr'"):
        run_check("saha2024.hellaswag_aftr")


def test_a_wrong_verdict_is_named():
    (fault,) = faults_of(claim(verdict="overstated"))
    assert re.search(r"saha2024-001: the verdict is 'overstated'.*says 'holds'", fault)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"check": None}, "needs a check"),
        ({"kind": "experimental", "check": None, "note": "no run"}, "'holds' needs a check"),
        (
            {"kind": "experimental", "check": None, "verdict": "not checkable"},
            "needs a note that says why",
        ),
    ],
)
def test_missing_evidence_is_named(change, message):
    assert any(message in fault for fault in faults_of(claim(**change)))


def test_a_check_without_a_claim_is_named():
    assert "the check saha2024.gsm8k_after belongs to no claim" in problems([claim()])


# ------------------------------------------------------------------ records


def put(results, name, **versions):
    record = new_record("lora_placement", "c", parameters={}, metrics={}, seconds=1)
    record.versions.update(versions)
    return write_record(record, results / name)


def test_a_missing_record_is_named(results):
    wrong = claim(record="lora_placement/gone.json")
    assert faults_of(wrong) == [
        "saha2024-001: the record data/results/lora_placement/gone.json is missing"
    ]
    put(results, "lora_placement/gone.json")
    assert faults_of(wrong) == []


def test_a_record_of_another_version_is_named(results):
    put(results, "lora_placement/old.json", **{"lora-kit": "0.0.1"})
    for record in ("lora_placement/old.json", "lora_placement"):
        (fault,) = faults_of(claim(record=record))
        assert fault.startswith("saha2024-001: the record lora_placement/old.json is of lora-kit")
        assert "0.0.1, not" in fault


def test_a_record_that_is_none_is_named(results):
    store.write_text(results / "lora_placement" / "a.json", "{}")
    (fault,) = faults_of(claim(record="lora_placement"))
    assert fault.startswith("saha2024-001: ")
    assert "is not a result record" in fault


def test_a_study_without_records_waits_but_is_never_reproduced(results):
    waiting = claim(
        kind="experimental",
        verdict="not reproduced here",
        check="measured.tuning_lifts_most_tasks",
        record="09_lora_land",
    )
    assert faults_of(waiting) == []
    claimed = waiting.model_copy(update={"verdict": "reproduced here at small scale"})
    assert any("data/results/09_lora_land is missing" in f for f in faults_of(claimed))


# ------------------------------------------------------------------ selecting and printing


def test_claims_are_chosen_by_paper_and_verdict():
    chosen = select(ALL, "mai2025", "overstated")
    assert chosen
    assert {(c.paper, c.verdict) for c in chosen} == {("mai2025", "overstated")}
    assert len(select(ALL)) == len(ALL)
    assert full_verdict("Contradicted") == "contradicted by its own table"
    assert full_verdict("holds") == "holds"
    assert full_verdict("not-repro") == "not reproduced here"
    for words in ("not", "", "true"):  # two verdicts begin so; none does
        with pytest.raises(UnknownNameError, match="verdict"):
            full_verdict(words)


def test_the_tally_adds_up():
    frame = tally(ALL)
    assert frame.loc["all", "all"] == len(ALL)
    assert (frame.drop(columns="all").sum(axis=1) == frame["all"]).all()
    assert sum(int(n) for n in re.findall(r"(\d+) [a-z]", format_tally(ALL))[1:]) == len(ALL)


def test_printed_claims_fit_the_page():
    text = format_claims(judge(select(ALL, "zhao2024")))
    assert max(len(line) for line in text.splitlines()) <= 100
    assert text.count("[") >= 100


def test_the_command(capsys):
    def call(*words):
        with pytest.raises(SystemExit) as stop:
            main(["claims", *words])
        return (stop.value.code or 0, *capsys.readouterr())

    code, out, err = call("--paper", "alwadhi2024", "--verdict", "contradicted")
    assert (code, err) == (0, "")
    assert "alwadhi2024-007" in out
    assert re.search(r"^\d+ claims: \d+ contradicted by its own table$", out, re.M)
    code, out, _ = call("--paper", "saha2024", "--scan")
    assert code == 0
    assert "0.0023, 0.0765 in both rows" in out
    for words, message in (
        (("--paper", "zhao"), "Did you mean 'zhao2024'"),
        (("--verdict", "not"), "Unknown verdict 'not'"),
        (("--scan", "--paper", "x2024"), "Unknown paper"),
    ):
        code, out, err = call(*words)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err


def test_a_faulty_ledger_stops_the_command_in_one_line(capsys, monkeypatch, tmp_path):
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump({"mai2025": [{"id": "mai2025-001"}]}))
    monkeypatch.setattr(ledger, "folder", lambda: tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["claims"])
    assert stop.value.code == 2
    assert "mai2025-001" in capsys.readouterr().err
