"""Results of an evaluation: every item's score, and two results compared item by item."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_kit import store
from lora_kit.errors import BadInputError, CorruptFileError, UnknownNameError, unknown_name
from lora_kit.evaluate.statistics import (
    Estimate,
    McNemar,
    estimate,
    holm,
    mcnemar,
    paired_difference,
    ratio,
)

SCHEMA = 1


@dataclass(frozen=True)
class ItemScore:
    """One item. `fingerprint` is a hash of the row and of the prompt as the model saw it.

    loglikelihoods: natural logarithms, one for each answer offered; empty where text was
    generated. answer: the generated text; None where likelihoods were scored. scores: by metric,
    as in "acc,none" (metric, filter).
    """

    id: int
    fingerprint: str
    prompt: str
    target: str
    scores: Mapping[str, float]
    loglikelihoods: tuple[float, ...] = ()
    answer: str | None = None


@dataclass(frozen=True)
class TaskScore:
    """One task: what was asked, how, and the score with its uncertainty.

    `available` counts the set's rows; `limit` is the number asked for, None for all. `template`
    names the prompt's wrapping: "none", or the hash of the chat template. `data` says where the
    rows came from.
    """

    task: str
    version: str
    num_fewshot: int
    limit: int | None
    available: int
    template: str
    data: Mapping[str, Any]
    metrics: Mapping[str, Estimate]
    items: tuple[ItemScore, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, metric: str) -> Estimate:
        return self.metrics[self.metric_name(metric)]

    def metric_name(self, metric: str) -> str:
        """The full name of a metric; "acc" suffices for "acc,none" where only one filter has it.

        Raises:
            UnknownNameError: the task has no such metric, or has it under several filters.
        """
        if metric in self.metrics:
            return metric
        short = [m for m in self.metrics if m.split(",")[0] == metric]
        if len(short) != 1:
            raise unknown_name(f"metric of {self.task}", metric, self.metrics)
        return short[0]

    def scores(self, metric: str) -> list[float]:
        """The per-item scores of a metric, in the order of the items."""
        name = self.metric_name(metric)
        return [item.scores[name] for item in self.items]


@dataclass(frozen=True)
class EvalResult:
    """An evaluation of one model on one or more tasks.

    `harness` is lm-eval's version; `truncated` counts prompts that were cut on the left because
    they exceed the model's context (0, or the scores are of other questions than the task's).
    `model_kind`: "fast" (`fast_model`) or "lm-eval" (its own class); the numbers are the same.
    `groups` names tasks that are one benchmark together ("mmlu": its subjects); a group is read
    like a task. `about` says what else a record needs: model, adapter, machine, versions.
    """

    tasks: Mapping[str, TaskScore]
    model: str
    harness: str
    seed: int
    seconds: float
    truncated: int = 0
    model_kind: str = "lm-eval"
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, task: str) -> TaskScore:
        if task in self.groups:
            return pool(task, [self.tasks[name] for name in self.groups[task]], self.seed)
        if task not in self.tasks:
            raise unknown_name("task in this result", task, [*self.tasks, *self.groups])
        return self.tasks[task]

    def all_scores(self) -> dict[str, TaskScore]:
        """Groups, then tasks, by name."""
        return {name: self[name] for name in [*self.groups, *self.tasks]}

    def rows(self) -> list[dict]:
        """A line for each metric, for `record_table` or a data frame."""
        return [
            {
                "task": f"{task.task} v{task.version}",
                "shots": task.num_fewshot,
                "metric": metric,
                "value": round(found.value, 4),
                "stderr": None if found.stderr is None else round(found.stderr, 4),
                "low": round(found.low, 4),
                "high": round(found.high, 4),
                "n": found.n,
            }
            for task in self.all_scores().values()
            for metric, found in task.metrics.items()
        ]

    def save(self, path: Path) -> Path:
        """Write everything, items included, as JSON."""
        return store.write_json(path, {"schema": SCHEMA, **asdict(self)})

    @classmethod
    def load(cls, path: Path) -> EvalResult:
        """Read what `save` wrote.

        Raises:
            CorruptFileError: not a result of this schema.
        """
        content = store.read_json(path)
        try:
            if content.pop("schema") != SCHEMA:
                raise KeyError("schema")
            content["tasks"] = {name: _task(t) for name, t in content["tasks"].items()}
            groups = content.get("groups", {})
            content["groups"] = {name: tuple(members) for name, members in groups.items()}
            return cls(**content)
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise CorruptFileError(f"{path} is not an evaluation result ({e}).") from e


@dataclass(frozen=True)
class Comparison:
    """tuned against base on the same items, for one metric of one task.

    `difference` is tuned − base with the paired bootstrap's interval; `mcnemar` is None for a
    metric that is not right or wrong. `p_holm` is McNemar's p corrected for all the tests that
    were made together: those of tasks and groups; those of a group's members among themselves.
    """

    task: str
    metric: str
    base: Estimate
    tuned: Estimate
    difference: Estimate
    mcnemar: McNemar | None
    p_holm: float | None = None

    @property
    def p(self) -> float | None:
        """McNemar's exact p value."""
        return None if self.mcnemar is None else self.mcnemar.p

    @property
    def disagreement(self) -> float | None:
        """The share of items on which exactly one of the two is right."""
        if self.mcnemar is None:
            return None
        return (self.mcnemar.only_base + self.mcnemar.only_tuned) / self.base.n

    def row(self) -> dict:
        """One line of a table."""
        pairs = self.mcnemar
        return {
            "task": self.task,
            "metric": self.metric,
            "base": round(self.base.value, 4),
            "tuned": round(self.tuned.value, 4),
            "difference": round(self.difference.value, 4),
            "low": round(self.difference.low, 4),
            "high": round(self.difference.high, 4),
            "only base right": None if pairs is None else pairs.only_base,
            "only tuned right": None if pairs is None else pairs.only_tuned,
            "McNemar p": None if pairs is None else float(f"{pairs.p:.3g}"),
            "Holm p": None if self.p_holm is None else float(f"{self.p_holm:.3g}"),
            "n": self.base.n,
        }


def compare(
    base: EvalResult, tuned: EvalResult, metric: str | None = None, seed: int = 0
) -> list[Comparison]:
    """Compare two results item by item.

    Args:
        base, tuned: results on the same tasks, items, shots, template and harness version.
        metric: one metric ("acc"), of the tasks that have it; all by default.
        seed: of the bootstrap.

    Raises:
        BadInputError: the two differ in anything but the model; the sentence names the difference.
        UnknownNameError: no task has the metric.
    """
    _same("harness version", base.harness, tuned.harness)
    _same("tasks", sorted(base.tasks), sorted(tuned.tasks))
    _same("groups", dict(base.groups), dict(tuned.groups))
    for name in base.tasks:
        _check_same_questions(base.tasks[name], tuned.tasks[name])
    theirs, found, unknown = tuned.all_scores(), [], None
    for name, a in base.all_scores().items():
        try:
            wanted = list(a.metrics) if metric is None else [a.metric_name(metric)]
        except UnknownNameError as e:
            unknown = e
            continue
        found += [c for m in wanted if (c := _compared(a, theirs[name], m, seed))]
    if not found and unknown is not None:
        raise unknown
    if not found:
        raise BadInputError("Neither result has a per-item metric to compare.")
    inside = {name for members in base.groups.values() for name in members}
    return _corrected(found, inside)


def _compared(a: TaskScore, b: TaskScore, metric: str, seed: int) -> Comparison | None:
    """One metric compared, or None for a metric of the whole set (corpus BLEU), without pairs."""
    if all(metric in item.scores for item in a.items):
        x, y = a.scores(metric), b.scores(metric)
        binary = set(x) | set(y) <= {0.0, 1.0}
        difference = paired_difference(x, y, seed=seed)
        pairs = mcnemar(x, y) if binary else None
    elif metric.startswith("bits_per_byte,"):
        gains = [
            (i.scores["loglikelihood"] - j.scores["loglikelihood"]) / math.log(2)
            for i, j in zip(a.items, b.items, strict=True)
        ]
        difference = ratio(gains, [i.scores["bytes"] for i in a.items], seed=seed)
        pairs = None
    else:
        return None
    return Comparison(a.task, metric, a[metric], b[metric], difference, pairs)


def _corrected(found: list[Comparison], inside: set[str]) -> list[Comparison]:
    """Holm's correction over the tests of each of the two families."""
    corrected = {}
    for family in (True, False):
        tests = [c for c in found if c.mcnemar and (c.task in inside) == family]
        if tests:
            ps = holm([c.mcnemar.p for c in tests])
            corrected |= {(c.task, c.metric): p for c, p in zip(tests, ps, strict=True)}
    return [replace(c, p_holm=corrected.get((c.task, c.metric))) for c in found]


def pool(name: str, tasks: Sequence[TaskScore], seed: int = 0) -> TaskScore:
    """Several tasks as one: their items side by side, so that each weighs as many as it has.

    lm-eval's groups are weighted so too (`weight_by_size`).

    Raises:
        BadInputError: no tasks, or tasks asked in different ways.
    """
    if not tasks:
        raise BadInputError(f"There are no tasks to pool as {name}.")
    first = tasks[0]
    for task in tasks[1:]:
        _same(f"task version of {first.task} and {task.task}", first.version, task.version)
        _same(f"shots of {first.task} and {task.task}", first.num_fewshot, task.num_fewshot)
        _same(f"template of {first.task} and {task.task}", first.template, task.template)
    rows = [item for task in tasks for item in task.items]
    items = tuple(replace(item, id=i) for i, item in enumerate(rows))
    shared = [m for m in first.metrics if all(m in item.scores for item in items)]
    return TaskScore(
        task=name,
        version=first.version,
        num_fewshot=first.num_fewshot,
        limit=first.limit,
        available=sum(task.available for task in tasks),
        template=first.template,
        data={"name": name, "tasks": [task.task for task in tasks], "rows": len(items)},
        metrics={m: estimate([i.scores[m] for i in items], seed=seed) for m in shared},
        items=items,
    )


def _check_same_questions(a: TaskScore, b: TaskScore) -> None:
    of = f" of {a.task}"
    _same(f"task version{of}", a.version, b.version)
    _same(f"number of shots{of}", a.num_fewshot, b.num_fewshot)
    _same(f"prompt template{of}", a.template, b.template)
    _same(f"number of items{of}", len(a), len(b))
    _same(f"metrics{of}", sorted(a.metrics), sorted(b.metrics))
    _same(f"source of the rows{of}", a.data.get("source"), b.data.get("source"))
    for x, y in zip(a.items, b.items, strict=True):
        if (x.id, x.fingerprint) != (y.id, y.fingerprint):
            raise BadInputError(
                f"These results cannot be paired: item {x.id}{of} is another question in the "
                f"second result (item {y.id}; {x.prompt[-40:]!r} against {y.prompt[-40:]!r})."
            )


def _same(what: str, a, b) -> None:
    if a != b:
        raise BadInputError(
            f"These results cannot be paired: {what}, {a} against {b}. "
            "Evaluate both in the same way."
        )


def _task(content: dict) -> TaskScore:
    items = tuple(
        ItemScore(**{**item, "loglikelihoods": tuple(item["loglikelihoods"])})
        for item in content["items"]
    )
    metrics = {name: Estimate(**m) for name, m in content["metrics"].items()}
    return TaskScore(**{**content, "items": items, "metrics": metrics})
