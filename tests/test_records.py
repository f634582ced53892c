"""One JSON file a run: it comes back as it was, or is refused with the fault named."""

import json

import pytest

from lora_kit.errors import BadInputError, CorruptFileError
from lora_kit.studies.records import (
    Metric,
    Record,
    new_record,
    read_record,
    read_records,
    versions,
    write_record,
)

FIELDS = dict(
    parameters={"STEPS": 2, "MODEL": "m", "RATE": 1e-3, "FLAG": True},
    metrics={"accuracy": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 50}, "count": 20000},
    tables={"t": [{"a": "x", "b": 1}]},
    seed=0,
    seconds=1.5,
    peak_memory_bytes=10,
    model={"name": "m", "revision": "r"},
    data={"name": "d", "rows": 3, "fingerprint": "f"},
)


@pytest.fixture
def record():
    return new_record("study", "lora-kit run study", **FIELDS)


def test_round_trip(record, tmp_path):
    path = write_record(record, tmp_path / "r.json")
    assert read_record(path) == record
    held = json.loads(path.read_text())
    assert held["schema"] == 1
    assert held["metrics"]["accuracy"] == {
        "value": 0.5,
        "stderr": None,
        "low": 0.4,
        "high": 0.6,
        "n": 50,
    }
    assert held["metrics"]["count"] == 20000
    assert held["parameters"] == FIELDS["parameters"]
    assert type(held["parameters"]["FLAG"]) is bool


def test_the_moment_and_the_machine_are_filled_in(record):
    assert record.created.endswith("+00:00")
    assert record.hardware["kind"] in ("cpu", "t4", "gpu", "gpu-t4-rules")
    assert {"torch", "transformers", "peft"} <= set(record.versions)
    assert record.versions == versions()
    assert "unsloth" not in record.versions or record.versions["unsloth"]


def test_a_run_without_model_or_data(tmp_path):
    plain = new_record("s", "c", parameters={}, metrics={}, seconds=0)
    assert (plain.model, plain.data, plain.seed) == (None, None, None)
    assert read_record(write_record(plain, tmp_path / "r.json")) == plain


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "place",
    [
        lambda x: {"metrics": {"m": x}},
        lambda x: {"metrics": {"m": {"value": x}}},
        lambda x: {"metrics": {"m": {"value": 1, "stderr": x}}},
        lambda x: {"seconds": x},
    ],
)
def test_nan_is_refused_in_what_was_measured(place, bad):
    with pytest.raises(ValueError, match="finite"):
        new_record("s", "c", **{**FIELDS, **place(bad)})


@pytest.mark.parametrize(
    "place",
    [
        {"tables": {"t": [{"a": float("nan")}]}},
        {"parameters": {"X": float("inf")}},
        {"parameters": {"X": object()}},
    ],
)
def test_nan_is_never_written_as_null(tmp_path, place):
    path = tmp_path / "r.json"
    path.write_text("old")
    with pytest.raises(BadInputError, match="record of s cannot be written"):
        write_record(new_record("s", "c", **{**FIELDS, **place}), path)
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: r.pop("study"), "study: Field required"),
        (lambda r: r.update(extra=1), "extra: Extra inputs"),
        (lambda r: r.update(schema=2), "schema: Input should be less"),
        (lambda r: r.update(seconds="long"), "seconds: "),
        (lambda r: r["metrics"].update(m={"mean": 1}), "metrics.m"),
        (lambda r: r["metrics"].update(m="high"), "metrics.m"),
    ],
)
def test_what_is_no_record_is_refused(record, tmp_path, change, says):
    path = write_record(record, tmp_path / "r.json")
    held = json.loads(path.read_text())
    change(held)
    path.write_text(json.dumps(held))
    with pytest.raises(CorruptFileError, match=rf"r\.json is not a result record: {says}"):
        read_record(path)


def test_a_damaged_file(tmp_path):
    (tmp_path / "r.json").write_text('{"schema": 1')
    with pytest.raises(CorruptFileError, match="is not a JSON file"):
        read_record(tmp_path / "r.json")


def test_records_of_a_study_by_name(record, tmp_path):
    for name in ("b", "a"):
        write_record(record.model_copy(update={"study": name}), tmp_path / "s" / f"{name}.json")
    assert [r.study for r in read_records("s", tmp_path)] == ["a", "b"]
    assert read_records("none", tmp_path) == []
    assert read_records("no such study") == []


def test_a_metric_knows_its_keys():
    assert Metric(value=1).n is None
    with pytest.raises(ValueError, match="mean"):
        Metric(value=1, mean=2)
    other = dict(study="s", command="c", hardware={}, versions={}, created="")
    assert isinstance(Record(**FIELDS, **other).metrics["count"], float)
