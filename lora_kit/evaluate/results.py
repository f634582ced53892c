"""Results of an evaluation: every item's score, and two results compared item by item."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lora_kit import store
from lora_kit.errors import BadInputError, CorruptFileError, unknown_name
from lora_kit.evaluate.statistics import Estimate, McNemar, mcnemar, paired_difference

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
    """

    tasks: Mapping[str, TaskScore]
    model: str
    harness: str
    seed: int
    seconds: float
    truncated: int = 0

    def __getitem__(self, task: str) -> TaskScore:
        if task not in self.tasks:
            raise unknown_name("task in this result", task, self.tasks)
        return self.tasks[task]

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
            for task in self.tasks.values()
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
            return cls(**content)
        except (AttributeError, KeyError, TypeError) as e:
            raise CorruptFileError(f"{path} is not an evaluation result ({e}).") from e


@dataclass(frozen=True)
class Comparison:
    """tuned against base on the same items, for one metric of one task.

    `difference` is tuned − base with the paired bootstrap's interval; `mcnemar` is None for a
    metric that is not right or wrong.
    """

    task: str
    metric: str
    base: Estimate
    tuned: Estimate
    difference: Estimate
    mcnemar: McNemar | None

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
            "n": self.base.n,
        }


def compare(
    base: EvalResult, tuned: EvalResult, metric: str | None = None, seed: int = 0
) -> list[Comparison]:
    """Compare two results item by item.

    Args:
        base, tuned: results on the same tasks, items, shots, template and harness version.
        metric: one metric ("acc"); all by default.
        seed: of the bootstrap.

    Raises:
        BadInputError: the two differ in anything but the model; the sentence names the difference.
        UnknownNameError: no such metric.
    """
    _same("harness version", base.harness, tuned.harness)
    _same("tasks", sorted(base.tasks), sorted(tuned.tasks))
    found = []
    for name, a in base.tasks.items():
        b = tuned.tasks[name]
        _check_same_questions(a, b)
        wanted = list(a.metrics) if metric is None else [a.metric_name(metric)]
        for m in wanted:
            if any(m not in item.scores for item in a.items):
                continue  # a metric of the whole set (corpus BLEU, perplexity) has no pairs
            x, y = a.scores(m), b.scores(m)
            binary = set(x) | set(y) <= {0.0, 1.0}
            found.append(
                Comparison(
                    name,
                    m,
                    a[m],
                    b[m],
                    paired_difference(x, y, seed=seed),
                    mcnemar(x, y) if binary else None,
                )
            )
    if not found:
        raise BadInputError("Neither result has a per-item metric to compare.")
    return found


def _check_same_questions(a: TaskScore, b: TaskScore) -> None:
    of = f" of {a.task}"
    _same(f"task version{of}", a.version, b.version)
    _same(f"number of shots{of}", a.num_fewshot, b.num_fewshot)
    _same(f"prompt template{of}", a.template, b.template)
    _same(f"number of items{of}", len(a), len(b))
    _same(f"metrics{of}", sorted(a.metrics), sorted(b.metrics))
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
