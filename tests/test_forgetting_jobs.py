"""The forgetting study's jobs, all five kinds, on a tiny model and tiny numbers."""

import gzip
import json

import pytest
from lora_fixtures import tiny_llama

from lora_kit.evaluate import everyday_items, local_tasks
from lora_kit.studies.forgetting import Cell
from lora_kit.studies.forgetting_jobs import QUICK, Scale, Setting, run_job
from lora_kit.studies.forgetting_report import read_benchmarks, read_study

MAP = Cell(seed=1, rows=400, rank=4, replay=0.05)


@pytest.fixture(scope="module")
def setting(tmp_path_factory, tokenizer):
    """Every job once, each after what it needs."""
    home = tmp_path_factory.mktemp("forgetting")
    base = home / "tiny-llama"
    tiny_llama(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=2,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        initializer_range=0.1,
    ).save_pretrained(base)
    tokenizer.save_pretrained(base)
    alpaca = [
        {"instruction": f"Name thing {i}.", "input": "", "output": f"Thing {i} it is."}
        for i in range(60)
    ]
    for name, rows in (
        ("alpaca/train.jsonl.gz", alpaca),
        ("hellaswag/validation.jsonl.gz", everyday_items().rows),
    ):
        path = home / "data" / name
        path.parent.mkdir(parents=True)
        with gzip.open(path, "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    (home / "out").mkdir()
    made = Setting(str(base), home / "out" / "06_forgetting", home / "work", "cpu", QUICK)
    made.out.mkdir()
    made.work.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_KIT_DATA", str(home / "data"))
        patch.setattr(local_tasks, "PUBLISHED", {})
        for job in jobs():
            assert run_job(job, made)
    return made


def jobs():
    teach = {"name": "teach_seed1", "kind": "teach", "needs": None, "seed": 1}
    yield teach
    yield {"name": f"map_{MAP.name}", "kind": "cell", "needs": "teach_seed1", "cell": MAP.to_dict()}
    yield {"name": "standard_seed1_model", "kind": "tune", "needs": None, "seed": 1}
    yield {"name": "standard_nf4_model", "kind": "quantise", "needs": None}
    for which in ("base", "nf4", "seed1"):
        needs = None if which == "base" else f"standard_{which}_model"
        name = f"standard_{which}_hellaswag"
        yield {"name": name, "kind": "evaluate", "needs": needs, "task": "hellaswag"} | {
            "which": which
        }


def test_the_report_reads_what_the_jobs_wrote(setting):
    study = read_study(setting.out.parent)
    assert str(study) == "1 taught bases, 1 cells of the map, 3 benchmark records"
    (cell,) = study.cells
    assert (cell.rank, cell.replay, cell.rows) == (4, 0.05, 4)  # a hundredth of 400 rows
    first = read_benchmarks(study)[0]
    assert (first.task, first.metric, first.base.n) == ("hellaswag", "acc", 2)
    assert len(first.tuned) == 1


def test_records_say_how_they_were_made(setting):
    from lora_kit.studies.records import read_record

    record = read_record(setting.out / "standard_seed1_hellaswag.json")
    assert record.command.split() == [
        *("python", "benchmarks/forgetting.py", "--device", "cpu", "--part", "standard"),
        *("--tasks", "hellaswag", "--quick"),
    ]
    assert record.parameters["training"]["steps"] >= 1
    assert record.parameters["limit"] == 2
    taught = read_record(setting.out / "teach_seed1.json")
    assert taught.parameters["rows"] == 64
    assert [len(row["scores"]) for row in taught.tables["items"]] == [8] * 8


def test_the_whole_study_is_the_default():
    whole = Scale()
    assert whole.of(MAP) == MAP
    assert whole.limit is None
    command = Setting("m", None, None, "cuda", whole).command("map", seeds=2)
    assert command.endswith("--device cuda --part map --seeds 2")
