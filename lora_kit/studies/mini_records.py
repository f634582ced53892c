"""From the answers of a miniature LoRA Land to records, and from those to its findings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_kit.errors import BadInputError, CorruptFileError
from lora_kit.evaluate.statistics import estimate, paired_difference
from lora_kit.studies.complexity import measure_complexity, token_counter
from lora_kit.studies.mini_land import MINI_TASKS, mini_rows, score_answers
from lora_kit.studies.records import Record, new_record

if TYPE_CHECKING:
    import pandas as pd

STUDY = "09_lora_land"


def score_unit(facts: dict, model: str | None = None) -> Record:
    """The record of one task and seed.

    The rows are drawn again from the seed and compared with the fingerprints of those that were
    answered. Metrics: base, tuned (mean scores with 95 % intervals), lift (paired over the test
    rows), the heuristics of the training rows, and how training went.

    Args:
        facts: what `benchmarks/lora_land_mini.py` keeps.
        model: folder or name of the model whose tokenizer counts lengths; the default model's.

    Raises:
        CorruptFileError: the rows drawn now are not those that were answered.
    """
    task = MINI_TASKS[facts["task"]]
    train, test = mini_rows(
        task.name, facts["spec"]["steps"] * 16, facts["test_rows"], facts["seed"]
    )
    for side, rows in (("train", train), ("test", test)):
        if rows.fingerprint != facts[f"{side}_fingerprint"]:
            raise CorruptFileError(
                f"The {side} rows of {task.name} are no longer those that were answered (the data "
                "set or the generator changed); delete its answers and run it again."
            )
    expected = [row["completion"] for row in test]
    base = score_answers(task, facts["base_answers"], expected)
    tuned = score_answers(task, facts["tuned_answers"], expected)
    count, counter = token_counter(model)
    heuristics = measure_complexity(train, count, counter)
    losses = [loss for _, loss in facts["losses"]]
    metrics = {
        "base": estimate(base).to_metric(),
        "tuned": estimate(tuned).to_metric(),
        "lift": paired_difference(base, tuned).to_metric(),
        **{f"heuristic_{name}": value for name, value in heuristics.values.items()},
        "training_seconds": facts["training_seconds"],
        "first_loss": losses[0],
        "last_loss": sum(losses[-10:]) / len(losses[-10:]),
        "skipped_steps": float(facts["skipped"]),
    }
    answers = zip(test, facts["base_answers"], facts["tuned_answers"], strict=True)
    return new_record(
        STUDY,
        facts["command"],
        parameters={
            "task": task.name,
            "category": task.category,
            "metric": task.metric,
            "generated": task.needs is None,
            "token_counter": counter,
            **facts["spec"],
        },
        metrics=metrics,
        tables={
            "answers": [
                {"prompt": row["prompt"][-200:], "expected": row["completion"].strip()[:200]}
                | {"base": before.strip()[:200], "tuned": after.strip()[:200]}
                for row, before, after in list(answers)[:3]
            ],
            "losses": [{"step": step, "loss": loss} for step, loss in facts["losses"][::10]],
        },
        seed=facts["seed"],
        seconds=facts["seconds"],
        peak_memory_bytes=facts["peak_memory_bytes"],
        model=facts["model"],
        data={
            "name": task.name,
            "rows": len(train),
            "test_rows": len(test),
            "fingerprint": train.fingerprint,
            "test_fingerprint": test.fingerprint,
            "source": train.source,
        },
        hardware=facts["hardware"],
        versions=facts["versions"],
    )


def alike(records: list[Record]) -> tuple[list[Record], list[Record]]:
    """The records that can stand in one table, and the others: runs of the same number of steps
    on weights of the same kind (a GPU's 4-bit ones, a CPU's dense ones). The larger set is taken,
    of two as large the longer runs."""
    kinds: dict[tuple, list[Record]] = {}
    for record in records:
        key = record.parameters["steps"], record.parameters["quantization"]
        kinds.setdefault(key, []).append(record)
    if not kinds:
        return [], []
    best = max(kinds, key=lambda key: (len(kinds[key]), *key))
    return kinds.pop(best), [record for rest in kinds.values() for record in rest]


def mini_table(records: list[Record]) -> pd.DataFrame:
    """One row a task, from the records of all its seeds; see `alike`.

    Returns:
        A frame by task: category, metric, generated, seeds, base, tuned, lift (means over seeds),
        lift_low and lift_high (the widest of the seeds' 95 % intervals), and the 14 heuristics.
    """
    import pandas as pd

    from lora_kit.studies.complexity import HEURISTICS

    rows: dict[str, list[Record]] = {}
    for record in records:
        rows.setdefault(record.parameters["task"], []).append(record)
    made = {}
    for task, seeds in rows.items():
        lifts = [r.metrics["lift"] for r in seeds]
        made[task] = {
            **{k: seeds[0].parameters[k] for k in ("category", "metric", "generated")},
            "seeds": len(seeds),
            **{k: _mean(r.metrics[k].value for r in seeds) for k in ("base", "tuned", "lift")},
            "lift_low": min(lift.low for lift in lifts),
            "lift_high": max(lift.high for lift in lifts),
            **{k: _mean(r.metrics[f"heuristic_{k}"] for r in seeds) for k in HEURISTICS},
        }
    return pd.DataFrame(made).T.infer_objects()


def same_heuristics(table: pd.DataFrame) -> pd.DataFrame:
    """Does lift go with the same heuristics here as in LoRA Land? Spearman's ρ in both.

    Args:
        table: what `mini_table` returns, at least five tasks.

    Returns:
        A frame by heuristic: paper (ρ with the average lift over 31 tasks), mini, p, p_holm (of
        the miniature's, corrected for the number of heuristics). One that is the same for all
        tasks has no ρ and is left out.

    Raises:
        BadInputError: fewer than five tasks.
    """
    import pandas as pd
    from scipy.stats import spearmanr
    from statsmodels.stats.multitest import multipletests

    from lora_kit.studies.complexity import HEURISTICS
    from lora_kit.studies.lora_land import printed_heuristics, quality_measures

    if len(table) < 5:
        raise BadInputError(f"{len(table)} tasks are too few to correlate; run more of them.")
    printed, lift = printed_heuristics(), quality_measures()["Average Base Model Lift"]
    rows = {}
    for name in HEURISTICS:
        values = table[name].astype(float)
        if values.nunique() > 1:
            r, p = spearmanr(values, table["lift"].astype(float))
            rows[name] = {"paper": spearmanr(printed[name], lift)[0], "mini": r, "p": p}
    out = pd.DataFrame(rows).T
    out["p_holm"] = multipletests(out["p"], method="holm")[1]
    return out


def transfer(table: pd.DataFrame) -> pd.DataFrame:
    """Lifts of the miniature as foretold from the 31 tasks alone, beside the measured ones.

    Two forecasts, chosen beforehand: the average of the 31 lifts, and ridge over the heuristics
    (`land_models`, "log ridge"). Lifts of a model of 135M parameters need not be those of 2 to 8
    billion: what can be compared is the order (Spearman) and the error.

    Returns:
        A frame by task: lift, mean, ridge.
    """
    import numpy as np
    import pandas as pd

    from lora_kit.studies import land_models
    from lora_kit.studies.complexity import HEURISTICS
    from lora_kit.studies.lora_land import quality_measures

    lift = quality_measures()["Average Base Model Lift"]
    x = land_models.features_of("log ridge")
    model = land_models.make_model("log ridge").fit(x.to_numpy(), lift)
    given = land_models.logged(table[list(HEURISTICS)].astype(float))
    return pd.DataFrame(
        {
            "lift": table["lift"].astype(float),
            "mean": float(lift.mean()),
            "ridge": np.clip(model.predict(given.to_numpy()), -1, 1),
        }
    )


def _mean(values) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
