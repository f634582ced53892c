"""Rankings scored again, and benchmark sizes: by hand, against scikit-learn, and on the rows."""

import gzip
import itertools
import json
import math

import pytest

from lora_kit.errors import CorruptFileError, NotAvailableError
from lora_kit.studies.checks import alwadhi2024, saha2024
from lora_kit.studies.published_data import (
    GAINS,
    SUBJECTS,
    Ranking,
    count_rows,
    measure,
    ndcg,
    read_rankings,
)
from lora_kit.studies.records import read_records


def write(folder, answers, labels, model="M_1.7B"):
    folder.mkdir(exist_ok=True)
    row = {"model": model, "setting": "IND_Single_Instruction", "predictions": answers}
    with gzip.open(folder / "predictions.jsonl.gz", "wt") as f:
        f.write(json.dumps(row) + "\n")
    with gzip.open(folder / "labels.jsonl.gz", "wt") as f:
        f.writelines(json.dumps({"item": i, "labels": x}) + "\n" for i, x in enumerate(labels))
    return folder


def test_ndcg_by_hand():
    assert ndcg([0, 1], ["E", "S"]) == 1
    gain = 2**0.1 - 1
    best = 1 + gain / math.log2(3)
    assert ndcg([1, 0], ["E", "S"]) == pytest.approx((gain + 1 / math.log2(3)) / best)
    assert ndcg([1], ["I", "E"]) == 1  # what is left out after the only gain costs nothing
    assert ndcg([], ["E", "S"]) == 0
    assert ndcg([0], ["I", "I"]) == 0  # nothing to gain
    assert ndcg([0, 0, 7, 1], ["E", "S"]) == 1  # twice and unknown options are left out


def test_ndcg_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    labels = ["S", "I", "E", "C"]
    truth = [2 ** GAINS[x] - 1 for x in labels]
    for order in itertools.permutations(range(4)):
        scores = [len(order) - order.index(i) for i in range(4)]
        assert ndcg(order, labels) == pytest.approx(metrics.ndcg_score([truth], [scores]))


def test_rankings_are_read(tmp_path):
    folder = write(
        tmp_path / "qpr", ["A,B", " B , A", "AB,?"], [["E", "S"], ["I", "E"], ["E", "S"]]
    )
    (found,) = read_rankings(folder)
    assert (found.model, found.setting, found.key) == ("M_1.7B", "single", "m_1p7b_single")
    assert found.scores == (1, 1, 0)  # no letter can be read in the last one
    assert Ranking("SmolLM-1.7B", "diverse", ()).key == "smollm_1p7b_diverse"


def test_faulty_rankings_are_named(tmp_path, monkeypatch):
    with pytest.raises(CorruptFileError, match="answered 1 questions, but labels"):
        read_rankings(write(tmp_path / "a", ["A"], [["E"], ["S"]]))
    with pytest.raises(CorruptFileError, match="unknown labels: X"):
        read_rankings(write(tmp_path / "b", ["A"], [["X"]]))
    with pytest.raises(NotAvailableError, match="There is no file"):
        read_rankings(tmp_path)
    monkeypatch.delenv("LORA_KIT_DATA", raising=False)
    with pytest.raises(NotAvailableError, match="LORA_KIT_DATA"):
        read_rankings()


def test_the_record_has_what_the_checks_take_for_granted():
    (record,) = read_records("published_data")
    m = record.metrics
    assert m["humaneval_problems"] == saha2024.PROBLEMS
    assert m["gsm8k_test"] == saha2024.GSM8K
    assert round(m["hellaswag_validation"] * 50 / m["hellaswag_activities"]) == saha2024.HELLASWAG
    assert m["mmlu_machine_learning"] == alwadhi2024.TABLES["ML"][1]
    assert m["mmlu_professional_psychology"] == alwadhi2024.TABLES["psychology"][1]
    for subject in SUBJECTS[:2]:
        assert m[f"mmlu_{subject}"] == 100
    assert len(record.tables["differences"]) == 7


@pytest.mark.data
def test_the_record_follows_from_the_rows():
    (record,) = read_records("published_data")
    for name, count in count_rows().items():
        assert record.metrics[name] == count
    (model,) = [r for r in read_rankings() if r.key == "llama_1b_diverse"]
    mean = sum(model.scores) / len(model.scores)
    assert record.metrics["ndcg_llama_1b_diverse"].value == pytest.approx(mean)
    assert measure.__doc__
