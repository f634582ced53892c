"""Protocols, cards and the rows of printed beside measured: whole, filled, and open about gaps."""

import pytest

from lora_kit import store
from lora_kit.errors import UnknownNameError
from lora_kit.studies import records, reproduction, shop_report
from lora_kit.studies.checks import measured
from lora_kit.studies.papers import PAPERS
from lora_kit.studies.protocols import CARDS, PROTOCOLS, RERUNS, card_needed
from lora_kit.studies.reproduction import NO_RECORD, beside


def test_every_paper_has_its_protocol_and_reruns():
    assert set(PROTOCOLS) == set(RERUNS) == set(PAPERS)
    for paper in PAPERS:
        assert all(vars(PROTOCOLS[paper]).values())
        assert RERUNS[paper]
        for rerun in RERUNS[paper]:
            assert rerun.laptop or rerun.t4 or rerun.more
            for word in rerun.how.replace(";", " ").split():
                if word.startswith("benchmarks/"):
                    assert (store.repository() / word.rstrip(",")).exists(), word


@pytest.mark.parametrize("paper", PAPERS)
def test_cards_are_planned(paper):
    rows = card_needed(paper)
    assert rows
    for row in rows:
        assert row["card"] in (*CARDS, "more")
        assert 0.5 < row["GiB"] < 80
    longer = card_needed(paper, batch=64, seq=2048)
    assert all(a["GiB"] < b["GiB"] for a, b in zip(rows, longer, strict=True))


@pytest.mark.parametrize("paper", PAPERS)
def test_rows_name_their_record_or_say_there_is_none(paper):
    rows = beside(paper)
    assert rows
    for row in rows:
        assert row.what
        assert row.printed
        if row.ours == NO_RECORD:
            assert not row.record
            assert not row.where
        else:
            assert row.where
            found = list((store.repository() / "data" / "results").glob(row.record))
            assert found, row.record


def test_without_records_every_row_says_so(monkeypatch):
    monkeypatch.setattr(records, "read_records", lambda study, folder=None: [])
    monkeypatch.setattr(shop_report, "read_records", lambda study, folder=None: [])
    monkeypatch.setattr(measured, "_judged", lambda: measured_claims())
    for paper in PAPERS:
        rows = beside(paper)
        assert rows
        assert {row.ours for row in rows} == {NO_RECORD}, paper


def measured_claims():
    """What the forgetting study's judge says where it has no record."""
    from lora_kit.studies.forgetting_claims import judge_claims
    from lora_kit.studies.forgetting_report import Study

    return tuple(judge_claims(Study({}, {}, {})))


def test_printed_values_come_from_the_tables():
    first = beside("saha2024")[0]
    assert first.what == "attention, r 32"
    assert first.printed == "HellaSwag 0.4447, ROUGE-1 0.3139"
    ndcg = {row.what: row.printed for row in beside("oswal2025")}
    assert ndcg["NDCG, Llama3.2-1B-EC"] == "0.874"
    assert ndcg["NDCG, Llama3.2-3B-EC"] == "not printed"
    assert ndcg["product matching, random pairs"] == "360M-EC 0.720"
    ours = {row.what: row.ours for row in beside("oswal2025")}
    assert ours["the same, pairs that look alike"].startswith("QLoRA, 300 steps: F1 0.7")


def test_a_record_of_serving_fills_its_row(monkeypatch):
    made = records.new_record(
        "05_adapter_swapping",
        "c",
        parameters={},
        metrics={"adapters_over_base": 1.2},
        seconds=1,
        model={"name": "m"},
    )
    monkeypatch.setattr(
        records, "read_records", lambda study, folder=None: [made] if study.startswith("05") else []
    )
    (row,) = [r for r in beside("zhao2024") if "25 adapters" in r.what]
    assert (row.printed, row.ours) == ("1.12 times", "1.20 times")


def test_unknown_papers_are_refused():
    for call in (beside, card_needed):
        with pytest.raises(UnknownNameError, match="Did you mean 'zhao2024'"):
            call("zhao")
    assert reproduction.NO_RECORD == measured.NO_RECORD
