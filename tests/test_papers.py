"""Published tables as data: the layout, the fingerprints, and zhao2024's counts and ranges."""

import re
import shutil

import pytest

from lora_kit import store
from lora_kit.errors import CorruptFileError, UnknownNameError
from lora_kit.studies import papers
from lora_kit.studies.papers import (
    COLUMNS,
    PAPERS,
    check_fingerprints,
    fingerprints,
    read_table,
    read_tables,
    tables,
    wide,
    write_fingerprints,
    write_table,
)

HEAD = ",".join(COLUMNS)
ALL = [(p, t) for p in PAPERS for t in tables(p)]
NUMBERED = [f"table_{n:02}" for n in range(1, 14)]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A copy of the tables, to be spoilt."""
    monkeypatch.setattr(store, "repository", lambda: tmp_path)
    real = papers.Path(papers.__file__).resolve().parents[2] / "data" / "papers"
    shutil.copytree(real / "zhao2024", tmp_path / "data" / "papers" / "zhao2024")
    write_fingerprints("zhao2024")
    return tmp_path / "data" / "papers"


@pytest.mark.parametrize(("paper", "table"), ALL, ids=[f"{p}-{t}" for p, t in ALL])
def test_every_table_is_tidy(paper, table):
    frame = read_table(paper, table)
    assert list(frame.columns) == ["paper", "table", *COLUMNS]
    assert len(frame) > 0
    assert not frame.duplicated(["row", "column", "part"]).any()
    lost = frame["printed"] == ""
    assert frame.loc[lost, "note"].str.startswith("lost").all()
    assert frame.loc[lost, "value"].isna().all()  # what was lost is not guessed
    plain = frame[(frame["note"] == "") & frame["value"].notna()]
    for printed, value in zip(plain["printed"], plain["value"], strict=True):
        numerals = re.findall(r"\d*\.?\d+", printed.replace(",", ""))
        assert abs(value) in [float(n) for n in numerals], (printed, value)
    assert (frame["plus_minus"].dropna() >= 0).all()


def test_files_have_the_noted_fingerprints():
    check_fingerprints()


def test_a_changed_cell_is_found_by_the_name_of_its_file(elsewhere):
    check_fingerprints()
    path = elsewhere / "zhao2024" / "table_11.csv"
    text = path.read_text()
    assert text.count(",0.703,0.703,") == 1
    path.write_text(text.replace(",0.703,0.703,", ",0.730,0.730,"))
    with pytest.raises(CorruptFileError, match=r"data/papers/zhao2024/table_11\.csv changed"):
        check_fingerprints()
    write_fingerprints("zhao2024")
    check_fingerprints()


def test_new_and_missing_files_are_named(elsewhere):
    write_table("zhao2024", "table_99", [{"row": "a", "column": "b", "printed": "1"}])
    with pytest.raises(CorruptFileError, match=r"table_99\.csv is new"):
        check_fingerprints()
    (elsewhere / "zhao2024" / "table_99.csv").unlink()
    (elsewhere / "zhao2024" / "table_03.csv").unlink()
    with pytest.raises(CorruptFileError, match=r"table_03\.csv is gone"):
        check_fingerprints()


def test_fingerprints_of_one_paper_leave_the_others_alone(elsewhere):
    noted = store.read_json(elsewhere / "fingerprints.json")
    store.write_json(elsewhere / "fingerprints.json", {**noted, "mai2025/table_01.csv": "x"})
    write_fingerprints("zhao2024")
    assert store.read_json(elsewhere / "fingerprints.json")["mai2025/table_01.csv"] == "x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("row,column\n", "must begin with the columns row,column,part"),
        (f"{HEAD}\na,b,,1,1\n", "line 2: 5 fields instead of 8"),
        (f"{HEAD}\na,b,,1,one,,,\n", "line 2: value 'one' is no number"),
        (f"{HEAD}\na,b,,1,1,,,\na,b,,2,2,,,\n", "line 3: the cell .* stands twice"),
        (f"{HEAD}\na,b,,,1,,,\n", "line 2: nothing printed"),
    ],
)
def test_spoilt_files_name_the_line(elsewhere, text, message):
    (elsewhere / "zhao2024" / "table_03.csv").write_text(text)
    with pytest.raises(CorruptFileError, match=message):
        read_table("zhao2024", "table_03")


def test_a_table_that_would_not_be_read_is_not_written(elsewhere):
    path = elsewhere / "zhao2024" / "table_03.csv"
    before = path.read_bytes()
    with pytest.raises(CorruptFileError, match="is no number"):
        write_table(
            "zhao2024", "table_03", [{"row": "a", "column": "b", "printed": "1", "value": "x"}]
        )
    assert path.read_bytes() == before


def test_unknown_names():
    with pytest.raises(UnknownNameError, match="Did you mean 'zhao2024'"):
        tables("zhao2023")
    with pytest.raises(UnknownNameError, match="table of zhao2024 'table_3'"):
        read_table("zhao2024", "table_3")


def test_written_tables_are_read_back(elsewhere):
    rows = [
        {"row": "a", "column": "x", "printed": "1.5 ± 0.2 %", "value": "1.5", "plus_minus": "0.2"},
        {"row": "a", "column": "y", "printed": '„quoted, with "comma"“', "unit": "%"},
        {"row": "b", "column": "x", "printed": "", "note": "lost in the copy at hand"},
    ]
    write_table("zhao2024", "table_99", rows)
    frame = read_table("zhao2024", "table_99")
    assert frame["printed"].tolist() == [r["printed"] for r in rows]
    assert frame["value"].tolist()[0] == 1.5
    assert frame["plus_minus"].tolist()[0] == 0.2
    shape = wide(frame)
    assert list(shape.index) == ["a", "b"]
    assert list(shape.columns) == ["x", "y"]
    assert len(read_tables("zhao2024")) == sum(
        len(read_table("zhao2024", t)) for t in tables("zhao2024")
    )
    assert len(fingerprints("zhao2024")) == len(tables("zhao2024"))


# ---------------------------------------------------------------- zhao2024


def test_zhao2024_is_whole():
    found = tables("zhao2024")
    assert set(NUMBERED) <= set(found)
    assert {"figure_01", "figure_02", "figure_05", "figure_06", "figure_07"} <= set(found)
    shapes = {t: wide(read_table("zhao2024", t), what="printed").shape for t in NUMBERED}
    assert shapes == {
        "table_01": (3, 1),
        "table_02": (10, 3),
        "table_03": (32, 6),
        "table_04": (13, 7),
        "table_05": (20, 3),
        "table_06": (7, 2),
        "table_07": (3, 4),
        "table_08": (6, 5),
        "table_09": (6, 5),
        "table_10": (6, 2),
        "table_11": (31, 14),
        "table_12": (31, 14),
        "table_13": (31, 20),
    }
    assert wide(read_table("zhao2024", "figure_02"), what="printed").shape[0] == 31


def test_zhao2024_prints_310_scores_twice_with_their_lifts():
    before, after = read_table("zhao2024", "table_11"), read_table("zhao2024", "table_12")
    base = before[~before["column"].isin(["Category", "Metric"])]["value"]
    tuned = after[(after["part"] == "") & ~after["column"].isin(["Category", "Metric"])]["value"]
    lift = after[after["part"] == "lift"]["value"]
    assert (len(base), len(tuned), len(lift)) == (372, 372, 310)  # GPT-3.5 and GPT-4 twice
    for scores in (base, tuned):
        assert scores.notna().all()
        assert scores.between(0, 1).all()
    assert lift.between(-1, 1).all()


def test_zhao2024_ranges():
    t13 = wide(read_table("zhao2024", "table_13"))
    below = {}
    for what in ("Input length", "Output length", "Example length"):
        below[what] = list(t13.index[t13[f"{what} p95"] < t13[f"{what} µ"]])
        assert (t13[f"{what} σ"] >= 0).all()
    # Nearly all answers take one token, and a few take two: then the mean exceeds the p95.
    assert below.pop("Output length") == ["glue_qnli", "glue_sst2"]
    assert not any(below.values())
    assert t13["Compr. µ"].between(0.3, 0.8).all()
    assert t13["I/O rougeL similarity µ"].between(0, 1).all()
    examples = wide(read_table("zhao2024", "figure_02"))["# examples / train"]
    assert (t13["# training examples"] == examples.loc[t13.index]).all()
    for table in ("table_07", "table_08", "table_09", "table_10"):
        frame = read_table("zhao2024", table)
        assert (frame["unit"] == "ms").all()
        assert frame["value"].between(50, 6000).all()
