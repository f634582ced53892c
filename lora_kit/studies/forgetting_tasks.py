"""The forgetting study's benchmarks: one record a model and task, and records paired again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from lora_kit.errors import BadInputError
from lora_kit.evaluate.results import EvalResult
from lora_kit.evaluate.statistics import estimate
from lora_kit.studies.forgetting import STUDY, Change, change, from_bits, to_bits
from lora_kit.studies.records import Record, new_record

# The metrics of a task that are kept item by item, as lm-eval names them.
METRICS = {
    "hellaswag": ("acc,none", "acc_norm,none"),
    "gsm8k": ("exact_match,strict-match", "exact_match,flexible-extract"),
    "mmlu": ("acc,none",),
}
# "MMLU CS" of the paper has 100 items, as each of these two subjects has: it does not say which.
COMPUTER_SCIENCE = ("mmlu_college_computer_science", "mmlu_high_school_computer_science")


def task_record(
    found: EvalResult,
    task: str,
    which: str,
    command: str,
    training: Mapping,
    model: Mapping,
) -> Record:
    """The record of one model on one task, every item's 0 or 1 in it.

    Args:
        found: what `evaluate` returned for the task; a group's parts are kept apart.
        task: "hellaswag", "gsm8k" or "mmlu".
        which: the model's part in the study: "base", "nf4", "seed0", …
        command: what makes the record again.
        training: facts of the fine-tuning, empty for a base.
        model: the `model` part of the record.

    Raises:
        BadInputError: the task is none of those kept.
    """
    if task not in METRICS:
        raise BadInputError(f"Task {task} is not one of this study: {', '.join(METRICS)}.")
    metrics, items = {}, []
    for metric in METRICS[task]:
        together: list[float] = []
        for name, part in found.tasks.items():
            scores = part.scores(metric)
            together += scores
            marks = "".join(item.fingerprint for item in part.items)
            items.append(
                {
                    "task": name,
                    "metric": metric,
                    "n": len(scores),
                    "items": hashlib.sha256(marks.encode()).hexdigest()[:16],
                    "scores": to_bits(scores),
                }
            )
            if name in COMPUTER_SCIENCE:
                metrics[f"{name},{metric}"] = estimate(scores).to_metric()
        metrics = {f"{task},{metric}": estimate(together).to_metric()} | metrics
    first = next(iter(found.tasks.values()))
    answers = [
        {"prompt": item.prompt[-400:], "target": item.target, "answer": item.answer}
        for item in first.items[:5]
        if item.answer is not None
    ]
    asked = {"version": first.version, "shots": first.num_fewshot, "limit": first.limit}
    return new_record(
        STUDY,
        command,
        parameters={
            "part": "standard",
            "which": which,
            "task": task,
            **asked,
            "template": first.template,
            "harness": found.harness,
            "truncated": found.truncated,
            "training": dict(training),
        },
        metrics=metrics,
        tables={"items": items, **({"answers": answers} if answers else {})},
        seed=found.seed,
        seconds=found.seconds,
        model=dict(model),
        data=dict(first.data),
    )


@dataclass(frozen=True)
class Paired:
    """A metric of a task before and after, on the same items; `seed` of the fine-tuning."""

    task: str
    metric: str
    after: str
    change: Change


def pair_records(before: Record, after: Record) -> list[Paired]:
    """Compare two records of one task, for the whole task and for computer science apart.

    Raises:
        BadInputError: another harness, version, number of shots, template or other items; the
            sentence names the difference.
    """
    for key in ("task", "harness", "version", "shots", "template", "limit"):
        a, b = before.parameters[key], after.parameters[key]
        if a != b:
            raise BadInputError(f"These records cannot be paired: {key} is {a} and {b}.")
    one = {(r["task"], r["metric"]): r for r in before.tables["items"]}
    two = {(r["task"], r["metric"]): r for r in after.tables["items"]}
    for key in one.keys() | two.keys():
        if key not in one or key not in two or one[key]["items"] != two[key]["items"]:
            raise BadInputError(f"These records cannot be paired: the items of {key[0]} differ.")
    task, which = before.parameters["task"], str(after.parameters["which"])
    found = []
    for metric in METRICS[task]:
        keys = [key for key in one if key[1] == metric]
        groups = {task: keys, **{k[0]: [k] for k in keys if k[0] in COMPUTER_SCIENCE}}
        for name, chosen in groups.items():
            sides = [[s for k in chosen for s in from_bits(r[k]["scores"])] for r in (one, two)]
            found.append(Paired(name, metric, which, change(*sides)))
    return found
