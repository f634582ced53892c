"""Tasks: what a model is asked, how its answers are scored, and where the rows come from.

lm-eval ships the definitions (prompt template, shots, metrics, answer filters); the rows of a task
normally come from the hub. Here the same definitions run over local rows: only the source of the
rows is replaced, so prompts, shots and scoring are the packaged ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from lora_kit.data import Dataset, check_rows, is_local, load_rows
from lora_kit.errors import BadInputError, NotAvailableError, UnknownNameError, nearest

CHOICE_FIELDS = ("activity_label", "ctx_a", "ctx_b", "endings", "label")
SKILL_FIELDS = ("prompt", "completion")


@dataclass(frozen=True)
class LocalTask:
    """A packaged task whose rows a local folder can hold.

    `definition` is relative to lm-eval's task folder; `splits` are the splits it reads, ours and
    the definition's names being the same; shots come from `shots` (None: the folder has none).
    """

    definition: str
    splits: tuple[str, ...]
    scored: str
    shots: str | None


LOCAL_TASKS: dict[str, LocalTask] = {
    "hellaswag": LocalTask("hellaswag/hellaswag.yaml", ("validation",), "validation", None),
    "gsm8k": LocalTask("gsm8k/gsm8k.yaml", ("train", "test"), "test", "train"),
}


@dataclass(frozen=True)
class TaskPlan:
    """A task ready to run: lm-eval's object, the rows there are, and where they come from."""

    task: Any
    available: int
    data: Mapping[str, Any]


def plan_tasks(
    tasks: str | Dataset | Sequence[str | Dataset],
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> list[TaskPlan]:
    """Turn names and datasets into tasks.

    A name that LORA_KIT_DATA has rows for is read from there; any other is lm-eval's own task and
    read from the hub. A Dataset of prompt/completion rows is generated and matched (see
    `skill_task`); one of HellaSwag-shaped rows is scored by likelihood under HellaSwag's
    definition.

    Raises:
        UnknownNameError: no such task; nearest names are offered.
        NotAvailableError: neither in the local folder nor within reach on the hub.
        BadInputError: nothing to run, two tasks of one name, or shots that cannot be had.
        CorruptFileError: rows without the expected fields.
    """
    wanted = [tasks] if isinstance(tasks, (str, Dataset)) else list(tasks)
    if not wanted:
        raise BadInputError("No task given; pass a name such as 'hellaswag', or a Dataset.")
    plans: list[TaskPlan] = []
    for task in wanted:
        if isinstance(task, Dataset):
            plans.append(_dataset_task(task, limit))
        elif not isinstance(task, str):
            raise BadInputError(f"A task is a name or a Dataset, not a {type(task).__name__}.")
        elif has_local_rows(task):
            plans.append(_local_task(task, limit, num_fewshot))
        else:
            plans += _hub_tasks(task)
    names = [plan.task.task_name for plan in plans]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise BadInputError(f"Task {', '.join(twice)} is given twice; give each once.")
    if num_fewshot:
        for plan in plans:
            if plan.task.get_config("num_fewshot") == 0:
                raise BadInputError(
                    f"Task {plan.task.task_name} is defined without shots; leave num_fewshot out."
                )
    return plans


def has_local_rows(name: str) -> bool:
    """Whether LORA_KIT_DATA holds every split this task reads, so that no network is needed."""
    spec = LOCAL_TASKS.get(name)
    return spec is not None and all(is_local(name, split) for split in spec.splits)


def skill_task(dataset: Dataset, limit: int | None = None):
    """An lm-eval task that generates an answer to each bare prompt and matches it.

    Two scores on the same output: `strict-match`, the whole text is the completion (so the model
    must also have stopped there), and `flexible-extract`, the first number in the text is. Both
    are exact matches after surrounding white space is dropped; generation is greedy and two tokens
    longer than the longest completion has characters, so that stopping can be seen.
    """
    longest = max(len(row["completion"]) for row in dataset)
    config = {
        "task": dataset.name,
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{completion}}",
        "target_delimiter": "",
        "num_fewshot": 0,
        # No stop text but the model's own end of sequence: to stop is part of the skill.
        "generation_kwargs": {
            "until": [],
            "do_sample": False,
            "max_gen_toks": min(256, longest + 2),
        },
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [
            {
                "name": "strict-match",
                "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}],
            },
            {
                "name": "flexible-extract",
                "filter": [
                    {"function": "regex", "regex_pattern": r"(-?[0-9]+)", "group_select": 0},
                    {"function": "take_first"},
                ],
            },
        ],
        "metadata": {"version": 1.0},
    }
    rows = dataset.take(limit) if limit else dataset
    return _build({**config, "custom_dataset": _rows_source({"test": rows.rows})})


def packaged_definition(name: str) -> dict[str, Any]:
    """lm-eval's own definition of a local task, its functions resolved."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(lm_eval.tasks.__file__).parent / LOCAL_TASKS[name].definition)
    config.pop("tag", None)  # groups tasks in lm-eval's index; a task does not take it
    return config


def _local_task(name: str, limit: int | None, num_fewshot: int | None) -> TaskPlan:
    spec, config = LOCAL_TASKS[name], packaged_definition(name)
    shots = config.get("num_fewshot", 0) if num_fewshot is None else num_fewshot
    if shots and spec.shots is None:
        raise BadInputError(
            f"The local folder has no training rows of {name} to take {shots} shot(s) from; "
            "use num_fewshot=0, or the hub."
        )
    scored = load_rows(name, spec.scored)
    used = scored.take(limit) if limit else scored
    # A split the definition names but nothing reads (HellaSwag's training rows, zero-shot) is
    # there and empty.
    rows: dict[str, Sequence[dict]] = {config[k]: () for k in ("training_split",) if config.get(k)}
    rows[spec.scored] = used.rows
    if shots:
        rows[spec.shots] = load_rows(name, spec.shots).rows
    task = _build({**config, "custom_dataset": _rows_source(rows)})
    return TaskPlan(task, len(scored), used.record())


def _dataset_task(dataset: Dataset, limit: int | None) -> TaskPlan:
    if len(dataset) == 0:
        raise BadInputError(f"Dataset {dataset.name!r} has no rows.")
    used = dataset.take(limit) if limit else dataset
    first = dataset[0]
    if all(f in first for f in CHOICE_FIELDS):
        check_rows(dataset, CHOICE_FIELDS, dataset.name)
        config = {
            **packaged_definition("hellaswag"),
            "task": dataset.name,
            "num_fewshot": 0,
            "training_split": None,
            "custom_dataset": _rows_source({"validation": used.rows}),
        }
        task = _build(config)
    elif all(f in first for f in SKILL_FIELDS):
        check_rows(dataset, SKILL_FIELDS, dataset.name)
        task = skill_task(dataset, limit)
    else:
        raise BadInputError(
            f"Rows with the fields {', '.join(sorted(first))} cannot be scored: a Dataset needs "
            f"{', '.join(SKILL_FIELDS)}, or HellaSwag's {', '.join(CHOICE_FIELDS)}."
        )
    return TaskPlan(task, len(dataset), used.record())


def _hub_tasks(name: str) -> list[TaskPlan]:
    manager = _hub_index()
    if name not in manager.task_index:
        close = nearest(name, [*LOCAL_TASKS, *manager.all_tasks])
        offer = f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
        raise UnknownNameError(
            f"Unknown task {name!r}.{offer} lm-eval has {len(manager.all_tasks):,}; from a local "
            f"folder: {', '.join(LOCAL_TASKS)}."
        )
    try:
        loaded = manager.load([name])["tasks"].values()
    except OSError as e:  # what the datasets library raises for an unreachable hub
        where = f"; it can also be read from the folder LORA_KIT_DATA names ({name}/)"
        raise NotAvailableError(
            f"The rows of {name} are not at hand: the hub cannot be reached and the cache has no "
            f"copy{where if name in LOCAL_TASKS else ''}."
        ) from e
    return [
        TaskPlan(
            task,
            len(task.eval_docs),
            {
                "name": task.task_name,
                "source": "hub",
                "path": task.config.dataset_path,
                "config": task.config.dataset_name,
                "revision": _hub_revision(task),
            },
        )
        for task in loaded
    ]


@lru_cache(maxsize=1)
def _hub_index():
    """lm-eval's index of all its tasks: thousands of files, about ten seconds, once."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _hub_revision(task) -> str:
    """The hub commit in the addresses the rows were downloaded from, or "unknown"."""
    for split in getattr(task, "dataset", {}).values():
        for address in split.info.download_checksums or {}:
            if "@" in address:
                return address.split("@", 1)[1].split("/", 1)[0]
    return "unknown"


def _build(config: dict[str, Any]):
    from lm_eval.api.task import ConfigurableTask

    return ConfigurableTask(config=config)


def _rows_source(splits: Mapping[str, Sequence[dict]]):
    """A function for lm-eval's `custom_dataset`: the rows as the datasets library holds them."""
    import datasets

    columns = next(rows for rows in splits.values() if rows)
    made = {}
    for split, rows in splits.items():
        full = datasets.Dataset.from_list([dict(r) for r in (rows or columns[:1])])
        made[split] = full if rows else full.select([])
    found = datasets.DatasetDict(made)

    def rows_at_hand(**_):
        return found

    return rows_at_hand
