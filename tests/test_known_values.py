"""A benchmark's parts pooled and held to its known value."""

import gzip
import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

from lora_kit.errors import BadInputError
from lora_kit.evaluate import everyday_items, local_tasks
from lora_kit.evaluate.statistics import wilson
from lora_kit.studies.forgetting import to_bits
from lora_kit.studies.known_values import HELLASWAG, PARTS, ROWS, pooled
from lora_kit.studies.records import new_record, read_records

ASKED = {"task": "hellaswag", "version": 1.0, "shots": 0, "template": "none", "harness": "0.4.13"}


def part(number, right, n, **other):
    scores = [1.0] * right + [0.0] * (n - right)
    rows = f"{number}::{PARTS}"
    return new_record(
        "known_values",
        "python benchmarks/known_values.py",
        parameters={**ASKED, "rows": rows, "dtype": "float32", **other},
        metrics={},
        tables={"items": [{"metric": m, "scores": to_bits(scores)} for m in HELLASWAG]},
        seconds=1.0,
    )


def test_parts_are_one_sample_without_replacement():
    acc, norm = pooled([part(0, 170, 500), part(1, 160, 500)])
    assert (acc["metric"], acc["n"], acc["value"]) == ("acc", 1000, 0.33)
    low, high = wilson(330, 1000)
    drawn_in = math.sqrt(1 - 1000 / ROWS)
    assert acc["low"] == pytest.approx(0.33 - (0.33 - low) * drawn_in)
    assert acc["high"] == pytest.approx(0.33 + (high - 0.33) * drawn_in)
    assert acc["inside"]  # 0.3363
    assert not norm["inside"]  # 0.4084


@pytest.mark.parametrize(("right", "inside"), [(3377, True), (3385, True), (3400, False)])
def test_of_all_rows_only_near_ties_may_differ(right, inside):
    assert round(0.3363 * ROWS) == 3377
    acc = pooled([part(0, right, ROWS)])[0]
    assert acc["low"] == acc["high"] == acc["value"]
    assert acc["inside"] is inside


@pytest.mark.parametrize(
    ("records", "says"),
    [
        ([], "no part"),
        ([part(0, 1, 2), part(0, 1, 2)], "0::20 is there twice"),
        ([part(0, 1, 2), part(1, 1, 2, dtype="float16")], "another dtype"),
    ],
)
def test_what_cannot_be_pooled(records, says):
    with pytest.raises(BadInputError, match=says):
        pooled(records)


def test_the_committed_parts_cover_the_known_value():
    records = read_records("known_values")
    if not records:
        pytest.skip("no part of HellaSwag is committed yet")
    for row in pooled(records):
        assert row["n"] == sum(len(r.tables["items"][0]["scores"]) for r in records)
        assert row["low"] <= row["value"] <= row["high"]
        assert row["inside"], row


def test_the_script_asks_each_part_once(tmp_path, tiny_folder, monkeypatch, capsys):
    (tmp_path / "hellaswag").mkdir()
    with gzip.open(tmp_path / "hellaswag" / "validation.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in everyday_items().rows * 2)
    monkeypatch.setenv("LORA_KIT_DATA", str(tmp_path))
    monkeypatch.setenv("LORA_KIT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(local_tasks, "PUBLISHED", {})
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "known_values.py"
    spec = importlib.util.spec_from_file_location("known_values_benchmark", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    out = tmp_path / "known_values"
    words = ["--model", str(tiny_folder), "--out", str(out), "--parts"]
    for parts in ("0,3", "0-1,3"):
        monkeypatch.setattr(sys, "argv", ["known_values.py", *words, parts])
        script.main()
    said = capsys.readouterr().out
    lines = [line.split(",")[0] for line in said.splitlines() if line.startswith("part ")]
    assert lines == ["part 0: 2 rows", "part 3: 2 rows", "part 1: 2 rows"]
    records = read_records("known_values", tmp_path)
    assert [record.parameters["rows"] for record in records] == ["0::20", "1::20", "3::20"]
    assert pooled(records)[0]["n"] == 6
    assert not list((tmp_path / "home" / "evaluations").iterdir())
    with pytest.raises(SystemExit, match="from 0 to 19"):
        script.numbers("3-20")
