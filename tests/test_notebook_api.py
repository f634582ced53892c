"""What a notebook calls: parameters in, metrics out."""

import json
import os
import random
import warnings

import numpy as np
import pytest
import torch

from lora_kit import notebook, store
from lora_kit.errors import BadInputError, UnknownNameError
from lora_kit.notebook import (
    MIME,
    begin,
    describe,
    match_parameters,
    parameter_set,
    parameter_sets,
    record,
    record_facts,
    record_table,
)

DEFAULTS = {"STEPS": 80, "RATE": 1e-3, "MODEL": "m", "FAST": True, "LENGTHS": [1, 2], "SEED": 0}


@pytest.fixture(autouse=True)
def _put_back(monkeypatch):
    """`begin` quiets libraries for a whole process: not for the other tests'."""
    import logging

    import matplotlib as mpl

    levels = {n: logging.getLogger(n).level for n in ("transformers", "datasets", "httpx")}
    held = dict(os.environ)
    with warnings.catch_warnings(), mpl.rc_context():
        yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    for name in set(os.environ) - set(held):
        del os.environ[name]


@pytest.fixture
def shown(monkeypatch):
    """What was shown: (note, text, html)."""
    found = []

    def publish(data):
        data = json.loads(json.dumps(data))  # it must survive the notebook file
        found.append((data[MIME], data["text/plain"], data.get("text/html")))

    monkeypatch.setattr("IPython.display.publish_display_data", publish)
    return found


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """A checkout with one notebook, `03_x`, and parameter sets written by the test."""
    (tmp_path / "notebooks" / "params").mkdir(parents=True)
    (tmp_path / "notebooks" / "03_x.ipynb").write_text("{}")
    monkeypatch.setattr(store, "repository", lambda: tmp_path)

    def write(text, name="small"):
        path = tmp_path / "notebooks" / "params" / f"{name}.yaml"
        path.write_text(text)
        return path

    return write


def test_without_a_set_nothing_changes(capsys):
    assert begin("03_x", DEFAULTS) == {}
    assert capsys.readouterr().out == ""


def test_the_named_set_overrides_and_says_so(sets, monkeypatch, capsys):
    sets("03_x:\n  STEPS: 2\n  RATE: 1\nother: ~\n".replace("other: ~\n", ""))
    monkeypatch.setenv("LORA_KIT_PARAMS", "small")
    overrides = begin("03_x", DEFAULTS)
    assert overrides == {"STEPS": 2, "RATE": 1.0}
    assert type(overrides["RATE"]) is float
    assert "LORA_KIT_PARAMS=small: STEPS = 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        (
            "03_x:\n  STEP: 2\n",
            UnknownNameError,
            r"parameter of 03_x 'STEP'\. Did you mean 'STEPS'",
        ),
        (
            "03_x:\n  STEPS: two\n",
            BadInputError,
            "STEPS must be a whole number like its default 80",
        ),
        ("03_x:\n  RATE: 1e-3\n", BadInputError, r"write 1\.0e-3"),
        ("03_x:\n  RATE: .nan\n", BadInputError, "RATE must be a finite number"),
        ("03_y:\n  STEPS: 2\n", UnknownNameError, r"notebook in small\.yaml '03_y'.*mean '03_x'"),
        ("lower: 1\n", UnknownNameError, "parameter of 03_x 'lower'"),
    ],
)
def test_a_bad_set_is_refused_when_the_notebook_opens(sets, monkeypatch, text, error, says):
    sets(text)
    monkeypatch.setenv("LORA_KIT_PARAMS", "small")
    with pytest.raises(error, match=says):
        begin("03_x", DEFAULTS)


def test_begin_seeds_everything(sets, monkeypatch):
    def draws(seed):
        begin("03_x", {**DEFAULTS, "SEED": seed})
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    first = draws(1)
    assert draws(1) == first
    assert all(a != b for a, b in zip(draws(2), first, strict=True))
    sets("SEED: 1\n")
    monkeypatch.setenv("LORA_KIT_PARAMS", "small")
    assert draws(2) == first  # the set's seed wins


def test_begin_sets_the_figures_style():
    import matplotlib.pyplot as plt

    plt.rcParams["axes.grid"] = False
    begin("03_x", {})
    assert plt.rcParams["axes.grid"]


def test_sets_by_name_and_by_path(sets, tmp_path):
    path = sets("STEPS: 3\n03_x:\n  RATE: 0.5\n")
    sets("{}", "cpu")
    assert parameter_sets() == ["cpu", "small"]
    assert parameter_set("small", "03_x") == {"STEPS": 3, "RATE": 0.5}
    assert parameter_set(str(path), "elsewhere") == {"STEPS": 3}
    assert parameter_set("cpu", "03_x") == {}
    for nothing in ("", "# only a comment\n", "03_x:\n  # STEPS: 2\n"):
        sets(nothing)
        assert parameter_set("small", "03_x") == {}


def test_a_notebook_outside_the_course_may_have_its_section(sets):
    assert parameter_set(str(sets("mine:\n  A: 1\n")), "mine") == {"A": 1}


def test_a_notebooks_own_value_wins_over_the_shared_one(sets):
    sets("STEPS: 3\n03_x:\n  STEPS: 5\n")
    assert parameter_set("small", "03_x") == {"STEPS": 5}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a: [1", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"- 1\n- 2\n", "must hold NAME: value lines, not a list"),
        (b"just words", "must hold NAME: value lines, not a str"),
    ],
)
def test_files_that_are_no_parameters(sets, content, says):
    path = sets("")
    path.write_bytes(content)
    with pytest.raises(BadInputError, match=says) as found:
        parameter_set("small", "03_x")
    assert "\n" not in str(found.value)


def test_sets_that_are_not_there(sets, tmp_path):
    sets("", "smoke")
    with pytest.raises(UnknownNameError, match=r"parameter set 'smok'.*Did you mean 'smoke'"):
        parameter_set("smok", "03_x")
    with pytest.raises(BadInputError, match=r"no parameters file .*nowhere\.yaml"):
        parameter_set(str(tmp_path / "nowhere.yaml"), "03_x")


def test_the_course_has_its_three_sets():
    assert {"smoke", "cpu", "t4"} <= set(parameter_sets())


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({"RATE": 1}, {"RATE": 1.0}),
        ({"MODEL": ""}, {"MODEL": ""}),
        ({"FAST": False, "LENGTHS": []}, {"FAST": False, "LENGTHS": []}),
        ({}, {}),
    ],
)
def test_values_that_fit(given, taken):
    found = match_parameters("n", DEFAULTS, given)
    assert found == taken
    assert {k: type(v) for k, v in found.items()} == {k: type(DEFAULTS[k]) for k in taken}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"STEPS": True}, "STEPS must be a whole number like its default 80, not True"),
        ({"STEPS": 2.0}, "STEPS must be a whole number"),
        ({"STEPS": None}, "not None"),
        ({"FAST": 1}, "FAST must be True or False like its default True, not 1"),
        ({"MODEL": 3}, "MODEL must be a text"),
        ({"RATE": "fast"}, "RATE must be a number"),
        ({"RATE": True}, "RATE must be a number"),
        ({"RATE": float("inf")}, "RATE must be a finite number"),
        ({"LENGTHS": "12"}, "LENGTHS must be a list"),
    ],
)
def test_values_that_do_not_fit(given, says):
    with pytest.raises(BadInputError, match=says):
        match_parameters("n", DEFAULTS, given)


def test_a_default_of_none_takes_anything():
    assert match_parameters("n", {"X": None}, {"X": "a"}) == {"X": "a"}


def test_record_notes_plain_numbers(shown):
    record(
        a=0.5,
        b=3,
        c=np.float32(0.25),
        d=torch.tensor(2.0),
        e={"value": 0.84, "stderr": 0.05, "low": None, "n": np.int64(50)},
    )
    note, text, html = shown[0]
    assert note == {
        "metrics": {
            "a": 0.5,
            "b": 3,
            "c": 0.25,
            "d": 2.0,
            "e": {"value": 0.84, "stderr": 0.05, "n": 50},
        }
    }
    assert text.splitlines()[0] == "a = 0.5"
    assert "e = 0.84 ± 0.05 (n = 50)" in text
    assert html is None


@pytest.mark.parametrize(
    "bad",
    [
        float("nan"),
        float("inf"),
        np.float32("nan"),
        None,
        "0.5",
        True,
        [1.0],
        torch.tensor([1.0, 2.0]),
        {"value": float("nan")},
        {"value": None},
        {"value": {"value": 1}},
        {"stderr": 1},
        {"value": 1, "mean": 2},
        {"value": 1, "stderr": float("inf")},
    ],
)
def test_record_refuses_what_is_no_measurement(shown, bad):
    with pytest.raises(BadInputError, match="Metric 'm"):
        record(good=1, m=bad)
    assert shown == []


def test_record_table_keeps_the_order_of_columns(shown):
    record_table("t", [{"z": np.int64(1), "a": "x<y"}, {"z": 2, "a": None}])
    note, text, html = shown[0]
    assert note["tables"]["t"] == {"columns": ["z", "a"], "rows": [[1, "x<y"], [2, None]]}
    assert "x<y" in text
    assert "x&lt;y" in html


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "needs rows"),
        ([{"a": 1}, {"b": 1}], "same columns"),
        ([{"a": 1, "b": 2}, {"b": 2, "a": 1}], "same columns"),
        ([{"a": float("nan")}], "column 'a': nan is not a finite"),
        ([{"a": np.float64("inf")}], "column 'a': inf is not a finite"),
    ],
)
def test_record_table_refuses(shown, rows, says):
    with pytest.raises(BadInputError, match=says):
        record_table("t", rows)
    assert shown == []


def test_facts(shown):
    record_facts(model={"name": "m"}, peak_memory_bytes=5)
    assert shown[0][0] == {"facts": {"model": {"name": "m"}, "peak_memory_bytes": 5}}
    with pytest.raises(BadInputError, match="facts are model, data and peak_memory_bytes"):
        record_facts(modle={})


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (0.84123, "0.8412"),
        (3, "3"),
        ({"value": 0.5, "low": 0.4, "high": 0.6, "n": 50}, "0.5 [0.4, 0.6] (n = 50)"),
        ({"value": 0.5, "stderr": 0.01}, "0.5 ± 0.01"),
        ({"value": 0.5, "low": 0.4, "stderr": 0.01}, "0.5 ± 0.01"),
        ({"value": 0.5}, "0.5"),
    ],
)
def test_metrics_in_words(metric, words):
    assert describe(metric) == words


def test_quiet_leaves_what_the_user_set(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    notebook._quiet()
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
    assert os.environ["TQDM_DISABLE"] == "1"
