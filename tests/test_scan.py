"""The scan finds what is planted, and what the published tables hold."""

import shutil

import pytest

from lora_kit import store
from lora_kit.errors import UnknownNameError
from lora_kit.studies import papers, scan
from lora_kit.studies.papers import write_table


@pytest.fixture
def spoilt(tmp_path, monkeypatch):
    """A copy of the tables, to be spoilt."""
    shutil.copytree(papers.folder(), tmp_path / "data" / "papers")
    monkeypatch.setattr(store, "repository", lambda: tmp_path)
    scan.rows_of.cache_clear()
    yield tmp_path / "data" / "papers"
    scan.rows_of.cache_clear()


def places(kind, paper):
    return [f.place for f in scan.scan(paper) if f.kind == kind]


def write(paper, table, rows):
    names = [f"c{i}" for i in range(len(rows[0]) - 1)]
    cells = [
        {"row": row, "column": c, "printed": text, "value": text.rstrip("%")}
        | ({"unit": "%"} if text.endswith("%") else {})
        for row, *texts in rows
        for c, text in zip(names, texts, strict=True)
    ]
    write_table(paper, table, cells)


def test_known_findings():
    found = {(f.paper, f.kind): [] for f in scan.scan()}
    for f in scan.scan():
        found[f.paper, f.kind].append(f"{f.place} | {f.what}")
    copies = found["saha2024", "repeated"]
    assert any("0.0023, 0.0765 in both rows" in c for c in copies)
    assert any("0.449, 0.5991 in both rows" in c for c in copies)
    assert len(copies) == 4
    impossible = found["saha2024", "impossible"]
    assert len(impossible) == 6
    assert sum("ten draws" in f for f in impossible) == 3
    assert len(found["zhao2024", "no share"]) == 4
    assert any("gemma-2b 0.657 is not the lowest" in f for f in found["zhao2024", "false best"])
    wnli = [f for f in found["zhao2024", "one answer"] if "table_12 glue_wnli" in f]
    assert "0.563" in wnli[0]
    assert not [key for key in found if key[0] in ("mai2025", "alwadhi2024")]


def test_a_copied_pair_is_found(spoilt):
    write(
        "alwadhi2024",
        "table_09",
        [
            ("a", "0.1234", "0.5678", "0.1"),
            ("b", "0.3", "0.1234", "0.5678"),
            ("c", "0.5", "0.6", "1"),
        ],
    )
    assert places("repeated", "alwadhi2024") == ["table_09 a; table_09 b"]


def test_a_number_twice_in_a_column_is_found(spoilt):
    write("alwadhi2024", "table_09", [("a", "0.1234"), ("b", "0.1234"), ("c", "0.12")])
    assert places("repeated", "alwadhi2024") == ["table_09 c0: a; b"]


def test_short_numbers_are_no_copy(spoilt):
    write("alwadhi2024", "table_09", [("a", "0.1", "0.50"), ("b", "0.1", "0.50")])
    assert places("repeated", "alwadhi2024") == []


def test_values_out_of_range_are_found(spoilt):
    cells = [
        {"row": "a", "column": "c", "printed": "101%", "value": "101", "unit": "%"},
        {"row": "b", "column": "c", "printed": "50% ± -1%", "value": "50", "plus_minus": "-1"},
        {"row": "c", "column": "c", "printed": "99%", "value": "99", "unit": "%"},
    ]
    write_table("mai2025", "table_09", cells)
    assert places("impossible", "mai2025") == ["table_09 a, c", "table_09 b, c"]
    path = spoilt / "alwadhi2024" / "table_02.csv"
    path.write_text(path.read_text().replace("0.78,0.78", "1.78,1.78"))
    assert places("impossible", "alwadhi2024") == ["table_02 GPT-4o, Accuracy"]


def test_a_broken_law_is_found(spoilt):
    path = spoilt / "saha2024" / "table_04.csv"
    text = path.read_text()
    assert text.count("0.6429,0.6429") == 1
    path.write_text(text.replace("0.6429,0.6429", "0.6529,0.6529"))
    found = [f for f in scan.scan("saha2024") if f.kind == "impossible"]
    assert "a strict match is flexible" in [f.what.split(": ")[-1] for f in found]


def test_what_is_no_count_is_found(spoilt):
    path = spoilt / "mai2025" / "table_02.csv"
    path.write_text(path.read_text().replace("34.00% ± 4.76%,34.00", "34.50% ± 4.76%,34.50"))
    (found,) = [f for f in scan.scan("mai2025") if f.kind == "no count"]
    assert found.what == "34.50 would be 34.50 of 100"


def test_a_false_best_is_found(spoilt):
    path = spoilt / "alwadhi2024" / "table_02.csv"
    path.write_text(path.read_text().replace("0.31,0.31", "0.37,0.37"))
    (found,) = [f for f in scan.scan("alwadhi2024") if f.kind == "false best"]
    assert "LLaMA (ML FT) 0.36 is not the best: LLaMA (General FT) 0.37" in found.what


@pytest.mark.parametrize(
    ("text", "digits"), [("0.0793", 3), ("33.51", 4), ("1,319", 4), ("0.30", 2), ("0.000", 0)]
)
def test_significant_digits(text, digits):
    assert scan.significant(text) == digits


def test_an_unknown_paper():
    with pytest.raises(UnknownNameError, match="Unknown paper"):
        scan.scan("zhao")


def test_every_finding_is_of_a_known_kind():
    assert {f.kind for f in scan.scan()} <= set(scan.KINDS)
