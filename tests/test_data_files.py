import gzip
import json

import pytest

from lora_kit.data_files import load_training_rows, to_jsonl, why_not
from lora_kit.errors import (
    BadInputError,
    CorruptFileError,
    NotAvailableError,
    UnknownNameError,
)

GOOD = {"prompt": "two plus two?", "completion": "four"}


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    "row",
    [
        GOOD,
        {"instruction": "Add.", "input": "2 and 2", "output": "4"},
        {"instruction": "Add.", "output": "4", "source": "mine"},
        {"instruction": "Add.", "input": None, "output": "4"},
        {
            "messages": [
                {"role": "user", "content": "hello"},
                {"role": "assistant", "content": "hi"},
            ]
        },
    ],
)
def test_the_three_shapes_are_taken(row):
    assert why_not(row) is None


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "not an object but a list"),
        ({"text": "all in one"}, "its fields (text) are not instruction"),
        ({}, "its fields (none)"),
        ({"prompt": "a", "completion": 4}, "prompt or answer is not text"),
        ({"prompt": "a", "completion": None}, "prompt or answer is not text"),
        ({"prompt": " ", "completion": "b"}, "the prompt is empty"),
        ({"instruction": "a", "output": "\n"}, "the answer is empty"),
        ({"instruction": "a", "input": 3, "output": "b"}, "input is not text"),
        ({"messages": "hello"}, "not a list of at least two turns"),
        ({"messages": [{"role": "user", "content": "a"}]}, "at least two turns"),
        ({"messages": [{"role": "user"}, {"role": "assistant"}]}, "lacks role or content"),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, "do not end with the assistant's"),
        ({"prompt": "a", "completion": "b", None: ["c"]}, "more cells than the header"),
    ],
)
def test_every_other_row_has_its_reason(row, reason):
    assert reason in why_not(row)


def test_jsonl_keeps_and_drops_and_says_which(tmp_path):
    bad = {"prompt": "x", "completion": ""}
    path = write(tmp_path / "mine.jsonl", lines(GOOD, bad, {"text": "t"}, bad, GOOD))
    loaded = load_training_rows(path)
    assert list(loaded.kept) == [GOOD, GOOD]
    assert loaded.found == 5
    assert loaded.reasons()[0] == ("the answer is empty", 2, 2)
    assert loaded.reasons()[1][1:] == (1, 3)
    assert (loaded.kept.name, loaded.kept.source) == ("mine", "file")


def test_the_other_kinds_of_file_hold_the_same_rows(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(GOOD).encode()))
    write(tmp_path / "a.json", json.dumps([GOOD]))
    write(tmp_path / "a.csv", "prompt,completion\ntwo plus two?,four\n")
    write(tmp_path / "b.csv", "\ufeffprompt;completion\r\ntwo plus two?;four\r\n")
    write(tmp_path / "a.tsv", "prompt\tcompletion\ntwo plus two?\tfour\n")
    for name in ("a.jsonl.gz", "a.json", "a.csv", "b.csv", "a.tsv"):
        assert list(load_training_rows(str(tmp_path / name)).kept) == [GOOD], name


def test_csv_cells_may_hold_separators_and_line_ends(tmp_path):
    text = 'prompt,completion\n"a, b","c\nd\u2028e"\nshort\nfull,of,cells\n'
    loaded = load_training_rows(write(tmp_path / "a.csv", text))
    assert list(loaded.kept) == [{"prompt": "a, b", "completion": "c\nd\u2028e"}]
    assert [(d.row, d.reason.split(" (")[0]) for d in loaded.dropped] == [
        (2, "prompt or answer is not text"),
        (3, "more cells than the header"),
    ]


def test_fields_can_be_renamed_and_rows_limited(tmp_path):
    rows = [{"question": str(i), "answer": "yes"} for i in range(5)]
    path = write(tmp_path / "q.jsonl", lines(*rows))
    loaded = load_training_rows(
        path, limit=2, fields={"question": "prompt", "answer": "completion"}
    )
    assert list(loaded.kept) == [{"prompt": str(i), "completion": "yes"} for i in (0, 1)]


def test_a_file_without_a_usable_row_is_refused_with_the_reasons(tmp_path):
    path = write(tmp_path / "a.jsonl", lines({"text": "a"}, {"text": "b"}))
    with pytest.raises(BadInputError, match=r"No row.*its fields \(text\).*\(2 rows\)"):
        load_training_rows(path)
    with pytest.raises(BadInputError, match="it is empty"):
        load_training_rows(write(tmp_path / "e.jsonl", ""))


def test_broken_files_are_named_with_the_line(tmp_path):
    with pytest.raises(CorruptFileError, match="line 2"):
        load_training_rows(write(tmp_path / "a.jsonl", lines(GOOD) + '{"prompt": "x'))
    with pytest.raises(CorruptFileError, match="no list of rows but a dict"):
        load_training_rows(write(tmp_path / "a.json", "{}"))
    with pytest.raises(CorruptFileError, match="row 2 is not CSV"):
        load_training_rows(write(tmp_path / "a.csv", 'prompt,completion\na,b\nc,"d" e"\n'))
    (tmp_path / "latin.csv").write_bytes("prompt,completion\ncafé,x\n".encode("latin-1"))
    with pytest.raises(CorruptFileError, match="not UTF-8"):
        load_training_rows(str(tmp_path / "latin.csv"))


def test_what_is_no_file_and_no_name(tmp_path):
    with pytest.raises(NotAvailableError, match="no file"):
        load_training_rows(str(tmp_path / "missing.jsonl"))
    with pytest.raises(UnknownNameError, match="alpaca"):
        load_training_rows("alpaka")
    with pytest.raises(BadInputError, match=r"none of \.jsonl"):
        load_training_rows(write(tmp_path / "a.parquet", "x"))
    with pytest.raises(NotAvailableError, match="hub"):
        load_training_rows("someone/something")


def test_a_registry_name_reads_the_local_folder(tmp_path, monkeypatch):
    (tmp_path / "alpaca").mkdir()
    row = {"instruction": "a", "input": "", "output": "b"}
    write(tmp_path / "alpaca" / "train.jsonl", lines(row, {**row, "output": ""}))
    monkeypatch.setenv("LORA_KIT_DATA", str(tmp_path))
    loaded = load_training_rows("alpaca")
    assert list(loaded.kept) == [row]
    assert loaded.reasons() == [("the answer is empty", 1, 2)]


def test_rows_can_be_kept_beside_an_adapter(tmp_path):
    path = write(tmp_path / "a.jsonl", lines(GOOD, {"prompt": "é", "completion": "ü"}))
    loaded = load_training_rows(path)
    again = load_training_rows(str(to_jsonl(loaded.kept, tmp_path / "b.jsonl")))
    assert again.kept.fingerprint == loaded.kept.fingerprint
