"""Rows from a local folder or the hub, checked; and what is said when they are not as expected."""

import gzip
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_kit import data, store
from lora_kit.data import DATASETS, Dataset, is_local, load_rows, read_jsonl
from lora_kit.errors import BadInputError, CorruptFileError, NotAvailableError, UnknownNameError

ROWS = [{"question": f"{i}?", "answer": str(i)} for i in range(6)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_KIT_DATA", str(tmp_path))
    return tmp_path


def made(rows):
    return Dataset("x", "train", tuple(rows), "generated", "seed 0")


@pytest.mark.parametrize("name", ["test.jsonl", "test.jsonl.gz", "test_6.jsonl.gz", "test_6.jsonl"])
def test_local_layouts(folder, write_rows, name):
    path = write_rows(folder / "gsm8k" / name, ROWS)
    found = load_rows("gsm8k", "test")
    assert list(found) == ROWS
    assert (found.source, found.revision) == ("folder", store.sha256_file(path)[:12])
    assert is_local("gsm8k", "test")
    assert not is_local("gsm8k", "train")
    assert not is_local("mmlu", "test")
    assert list(load_rows("gsm8k", "test", limit=2)) == ROWS[:2]


def test_the_whole_split_before_a_part_and_the_largest_part_first(folder, write_rows):
    for name in ("test_10", "test_9", "test_x", "test_extra_11"):
        write_rows(folder / "gsm8k" / f"{name}.jsonl.gz", [{"question": name, "answer": ""}])
    write_rows(folder / "gsm8k" / "test_99.jsonl.gz.bak", ROWS)
    assert load_rows("gsm8k", "test")[0]["question"] == "test_10"
    write_rows(folder / "gsm8k" / "test.jsonl.gz", ROWS)
    assert load_rows("gsm8k", "test")[0] == ROWS[0]


def test_blank_lines_are_no_rows(folder):
    path = folder / "gsm8k" / "test.jsonl"
    path.parent.mkdir()
    path.write_text(f"\n{json.dumps(ROWS[0])}\n\n")
    assert list(load_rows("gsm8k", "test")) == ROWS[:1]


def test_unknown_names_offer_the_nearest():
    with pytest.raises(
        UnknownNameError, match=r"dataset 'gsm8'\. Did you mean 'gsm8k'.*Known: alp"
    ):
        load_rows("gsm8", "test")
    with pytest.raises(UnknownNameError, match=r"split of gsm8k 'tests'\. Did you mean 'test'"):
        load_rows("gsm8k", "tests")
    with pytest.raises(BadInputError, match="limit must be at least 1, not 0"):
        load_rows("gsm8k", "test", limit=0)


def test_a_line_that_is_not_json(folder, write_rows):
    path = write_rows(folder / "gsm8k" / "test.jsonl", ROWS[:2])
    path.write_text(path.read_text() + "{'question': 1}\n")
    with pytest.raises(CorruptFileError, match=r"test\.jsonl line 3 is not JSON"):
        load_rows("gsm8k", "test")
    path.write_bytes(b'{"question": "\xff", "answer": ""}\n')
    with pytest.raises(CorruptFileError, match="is not JSON"):
        load_rows("gsm8k", "test")


def test_a_truncated_gz(folder, write_rows):
    path = write_rows(folder / "gsm8k" / "test.jsonl.gz", ROWS)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(CorruptFileError, match=r"test\.jsonl\.gz breaks off after line \d+"):
        load_rows("gsm8k", "test")


@pytest.mark.parametrize("place", [0, 12, 200, -6])
def test_an_altered_gz(folder, write_rows, place):
    source = random.Random(0)
    rows = [{"question": source.randbytes(20).hex(), "answer": ""} for _ in range(20)]
    path = write_rows(folder / "gsm8k" / "test.jsonl.gz", rows)
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"test\.jsonl\.gz"):
        load_rows("gsm8k", "test")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([*ROWS, {"question": "x", "response": "y"}], "row 7 lacks answer; it has question, resp"),
        ([{"a": 1}], "gsm8k/test row 1 lacks question, answer; it has a"),
        ([ROWS[0], [1, 2]], "row 2 is a list, not an object"),
        ([], "gsm8k/test has no rows"),
    ],
)
def test_rows_are_held_to_their_fields(folder, write_rows, rows, says):
    write_rows(folder / "gsm8k" / "test.jsonl", rows)
    with pytest.raises(CorruptFileError, match=says):
        load_rows("gsm8k", "test")


def test_a_misspelt_data_folder_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_KIT_DATA", str(tmp_path / "dta"))
    with pytest.raises(NotAvailableError, match=r"LORA_KIT_DATA names .*dta, which is no folder"):
        load_rows("gsm8k", "test")


def hub(monkeypatch, rows=None, error=None, sha="abc123", info_error=None):
    """Replace the two doors to the hub; returns what load_dataset was called with."""
    import types

    calls = []

    def info(hub_id, timeout):
        if info_error:
            raise info_error
        return types.SimpleNamespace(sha=sha)

    def load(*arguments, **options):
        calls.append((arguments, options))
        if error:
            raise error
        return rows

    monkeypatch.setattr("huggingface_hub.dataset_info", info)
    monkeypatch.setattr("datasets.load_dataset", load)
    return calls


def test_the_hub_with_its_commit(monkeypatch):
    calls = hub(monkeypatch, ROWS)
    found = load_rows("gsm8k", "test")
    assert calls == [(("openai/gsm8k", "main"), {"split": "test", "revision": "abc123"})]
    assert (found.source, found.revision, len(found)) == ("hub", "abc123", 6)


def test_hub_names_become_ours(monkeypatch):
    calls = hub(monkeypatch, [{"id": "t1", "dialogue": "d", "topic": "t", "summary": "s"}])
    found = load_rows("dialogsum", "dev")
    assert calls[0][1]["split"] == "validation"
    assert found[0] == {"fname": "t1", "dialogue": "d", "topic": "t", "summary": "s"}


def test_hub_rows_are_checked_too(monkeypatch):
    hub(monkeypatch, [{"question": "x"}])
    with pytest.raises(CorruptFileError, match="gsm8k/test row 1 lacks answer"):
        load_rows("gsm8k", "test")


def test_offline_with_the_librarys_own_copy(monkeypatch):
    import httpx

    hub(monkeypatch, ROWS, info_error=httpx.ConnectError("no name service"))
    assert load_rows("gsm8k", "test").revision == "cached"


@pytest.mark.parametrize("kind", ["connection", "http", "value"])
def test_no_network(monkeypatch, folder, kind):
    import httpx

    error = {
        "connection": ConnectionError("Couldn't reach the hub"),
        "http": httpx.ConnectError("no name service"),
        "value": ValueError("Couldn't find cache"),
    }[kind]
    hub(monkeypatch, error=error, info_error=httpx.ConnectTimeout("slow"))
    with pytest.raises(NotAvailableError) as found:
        load_rows("gsm8k", "test")
    message = str(found.value)
    assert f"gsm8k/test is neither in the folder LORA_KIT_DATA names ({folder})" in message
    assert "nor can the hub be reached" in message


def test_really_offline():
    """The libraries themselves, which conftest holds offline, raise nothing else."""
    with pytest.raises(NotAvailableError, match=r"not set. nor can the hub be reached"):
        load_rows("gsm8k", "test")


def test_a_local_only_set_needs_its_folder():
    with pytest.raises(NotAvailableError, match=r"amazon_google/test is neither .* put it into"):
        load_rows("amazon_google", "test")


def test_a_part_keeps_its_origin():
    whole = made(ROWS)
    part = whole.take(2)
    assert (len(part), part[1], part.source) == (2, ROWS[1], "generated")
    assert len(whole.take(100)) == 6
    for n in (0, -1):
        with pytest.raises(BadInputError, match="at least 1"):
            whole.take(n)


def test_the_fingerprint_is_the_rows():
    assert made(ROWS).fingerprint == made([dict(r) for r in ROWS]).fingerprint
    assert made(ROWS).fingerprint != made(ROWS[::-1]).fingerprint
    assert made(ROWS).fingerprint != made(ROWS[:-1]).fingerprint
    record = made(ROWS).record()
    assert record["rows"] == 6
    assert json.loads(json.dumps(record)) == record


@given(
    values=st.lists(st.integers(0, 15), min_size=2, max_size=40),
    held=st.integers(1, 20),
    seed=st.integers(0, 5),
)
def test_split_is_a_partition_whose_sides_share_no_row(values, held, seed):
    whole = made({"v": v} for v in values)
    try:
        rest, test = whole.split(held, seed)
    except BadInputError:
        sizes = [values.count(v) for v in set(values)]
        assert held >= len(values) - min(sizes) + 1 or min(sizes) > held or len(sizes) == 1
        return
    assert 1 <= len(test) <= held
    assert len(rest) >= 1
    assert not {r["v"] for r in rest} & {r["v"] for r in test}
    assert sorted(r["v"] for r in [*rest, *test]) == sorted(values)


def test_split_is_seeded_and_exact_where_rows_differ():
    whole = made({"v": v} for v in range(50))
    rest, test = whole.split(20, seed=1)
    assert (len(rest), len(test)) == (30, 20)
    assert whole.split(20, seed=1)[1].rows == test.rows
    assert whole.split(20, seed=2)[1].rows != test.rows
    assert (rest.split_name, test.split_name) == ("train-rest", "train-held")


@pytest.mark.parametrize(
    ("values", "held"), [(range(5), 0), (range(5), 5), (range(5), 9), ([1, 1, 1], 1)]
)
def test_a_split_that_leaves_nothing(values, held):
    with pytest.raises(BadInputError, match="leave nothing to train on or to test on"):
        made({"v": v} for v in values).split(held, 0)


def test_read_jsonl_of_a_missing_file(tmp_path):
    with pytest.raises(CorruptFileError, match="after line 0"):
        read_jsonl(tmp_path / "nowhere.jsonl")


def test_a_large_gz_member_is_read_whole(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    with gzip.open(path, "wt") as f:
        f.writelines(json.dumps({"i": i}) + "\n" for i in range(20_000))
    assert [r["i"] for r in read_jsonl(path)] == list(range(20_000))


REAL = {
    ("alpaca", "train"): 5000,
    ("code_alpaca", "train"): 6552,
    ("gsm8k", "train"): 7473,
    ("gsm8k", "test"): 1319,
    ("hellaswag", "validation"): 10_042,
    ("mmlu", "test"): 14_042,
    ("mmlu", "dev"): 285,
    ("dialogsum", "dev"): 500,
    ("dialogsum", "test"): 500,
    ("amazon_google", "train"): 6874,
    ("amazon_google", "validation"): 2293,
    ("amazon_google", "test"): 2293,
}


@pytest.mark.data
@pytest.mark.parametrize(("name", "split"), REAL)
def test_real_rows(name, split):
    if not is_local(name, split):
        pytest.skip(f"LORA_KIT_DATA has no {name}/{split}")
    found = load_rows(name, split)
    assert found.source == "folder"
    if data.local_file(name, split).name.startswith(f"{split}.") or name == "alpaca":
        assert len(found) == REAL[name, split]


# Out of reach so far; the tests of their studies read small copies of their layout.
UNSEEN = {"math", "dolly", "cnn_dailymail", "ecinstruct"}


def test_every_registered_split_is_tested_on_real_rows():
    known = {(s.name, split) for s in DATASETS.values() for split in s.splits}
    assert {(name, split) for name, split in known if name not in UNSEEN} == set(REAL)
