"""Tasks: what a model is asked, how its answers are scored, and where the rows come from.

lm-eval ships the definitions (prompt template, shots, metrics, answer filters); the rows of a task
normally come from the hub. Here the same definitions run over local rows: only the source of the
rows is replaced, so prompts, shots and scoring are the packaged ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from lora_kit.data import Dataset, check_rows
from lora_kit.errors import (
    BadInputError,
    NotAvailableError,
    UnknownNameError,
    nearest,
    unknown_name,
)
from lora_kit.evaluate.local_tasks import (
    LOCAL_NAMES,
    check_folder,
    has_local_rows,
    known_tasks,
    local_rows,
    local_task,
    members,
    packaged_definition,
)
from lora_kit.skills import SKILLS, draw_skill

CHOICE_FIELDS = ("activity_label", "ctx_a", "ctx_b", "endings", "label")
SKILL_FIELDS = ("prompt", "completion")
TEXT_FIELDS = ("text",)
SKILL_DIGITS, SKILL_ROWS = (1, 2, 3), 100  # of a skill that is asked for by its name alone
__all__ = ["TaskPlan", "generated_task", "has_local_rows", "plan_tasks", "skill_task", "text_task"]


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
    read from the hub. "mmlu" and its areas stand for their subjects. A skill's name ("addition",
    "addition:2", "addition:1-3") draws rows (`generated_task`). A Dataset of prompt/completion rows
    is generated and matched (`skill_task`); one of HellaSwag-shaped rows is scored by likelihood
    under HellaSwag's definition; one of texts by its perplexity (`text_task`).

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
        elif task.split(":")[0] in SKILLS:
            plans.append(_dataset_task(generated_task(task), limit))
        elif all(_is_at_hand(member, num_fewshot) for member in members(task)):
            plans += [_local_task(member, limit, num_fewshot) for member in members(task)]
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


def generated_task(name: str) -> Dataset:
    """The rows of a skill named as a task: always the same 100 of each number of digits, in turns.

    "addition" has 1, 2 and 3 digits, "addition:2" two, "addition:2-4" two to four; 1-digit skills
    may have fewer than 100 rows.

    Raises:
        UnknownNameError: no such skill; BadInputError: digits that are none.
    """
    skill, _, digits = name.partition(":")
    if skill not in SKILLS:
        raise unknown_name("skill", skill, SKILLS)
    lengths: Sequence[int] = SKILL_DIGITS
    if digits:
        low, _, high = digits.partition("-")
        if not (
            low.isdecimal() and (high or low).isdecimal() and 1 <= int(low) <= int(high or low)
        ):
            raise BadInputError(f"{name!r} names no digits; write {skill}:2 or {skill}:1-3.")
        lengths = range(int(low), int(high or low) + 1)
    drawn = [draw_skill(skill, k, min(SKILL_ROWS, SKILLS[skill].space(k)), 0) for k in lengths]
    turns = itertools.zip_longest(*(d.rows for d in drawn))
    rows = tuple(row for turn in turns for row in turn if row is not None)
    return replace(drawn[0], name=name.replace(":", "_"), rows=rows)


def text_task(dataset: Dataset, limit: int | None = None):
    """An lm-eval task that measures the perplexity of texts, as its `wikitext` does.

    With ℓ the log-likelihood of all texts: word_perplexity exp(−ℓ/words), byte_perplexity
    exp(−ℓ/bytes), bits_per_byte −ℓ/(bytes · ln 2). A text longer than the model's context is read
    in windows of that length.
    """
    rows = dataset.take(limit) if limit else dataset
    config = {
        "task": dataset.name,
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "text",
        "num_fewshot": 0,
        "metric_list": [
            {"metric": "word_perplexity"},
            {"metric": "byte_perplexity"},
            {"metric": "bits_per_byte"},
        ],
        "metadata": {"version": 1.0},
    }
    return _build({**config, "custom_dataset": _rows_source({"test": rows.rows})})


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


def _is_at_hand(name: str, num_fewshot: int | None) -> bool:
    spec = local_task(name)
    if spec is None:
        return False
    packaged = packaged_definition(name).get("num_fewshot") or 0
    return check_folder(name, packaged if num_fewshot is None else num_fewshot)


def _local_task(name: str, limit: int | None, num_fewshot: int | None) -> TaskPlan:
    spec, config = local_task(name), packaged_definition(name)
    shots = config.get("num_fewshot", 0) if num_fewshot is None else num_fewshot
    if shots and spec.shots is None:
        raise BadInputError(
            f"The local folder has no training rows of {name} to take {shots} shot(s) from; "
            "use num_fewshot=0, or the hub."
        )
    scored = local_rows(spec, spec.scored)
    used = scored.take(limit) if limit else scored
    # A split the definition names but nothing reads (HellaSwag's training rows, zero-shot) is
    # there and empty.
    named = {config.get(k) for k in ("training_split", "fewshot_split")} - {None, spec.scored}
    rows: dict[str, Sequence[dict]] = {split: () for split in named}
    rows[spec.scored] = used.rows
    if shots:
        examples = rows[spec.shots] = local_rows(spec, spec.shots).rows
        if shots > len(examples):
            raise BadInputError(
                f"There are not {shots} worked examples of {name}; {spec.data}/{spec.shots} has "
                f"{len(examples)}."
            )
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
    elif all(f in first for f in TEXT_FIELDS):
        check_rows(dataset, TEXT_FIELDS, dataset.name)
        if not all(isinstance(r["text"], str) and r["text"].strip() for r in dataset):
            raise BadInputError(f"Dataset {dataset.name!r} has an empty text; leave it out.")
        task = text_task(dataset, limit)
    else:
        raise BadInputError(
            f"Rows with the fields {', '.join(sorted(first))} cannot be scored: a Dataset needs "
            f"{', '.join(SKILL_FIELDS)}, or text, or HellaSwag's {', '.join(CHOICE_FIELDS)}."
        )
    return TaskPlan(task, len(dataset), used.record())


def _hub_tasks(name: str) -> list[TaskPlan]:
    manager = _hub_index()
    if name not in manager.task_index:
        close = nearest(name, [*known_tasks(), "humaneval", *SKILLS, *manager.all_tasks])
        offer = f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
        raise UnknownNameError(
            f"Unknown task {name!r}.{offer} lm-eval has {len(manager.all_tasks):,}; from a local "
            f"folder: {', '.join(LOCAL_NAMES)}; generated here: {', '.join(SKILLS)}."
        )
    try:
        loaded = manager.load([name])["tasks"].values()
    except OSError as e:  # what the datasets library raises for an unreachable hub
        where = f"; it can also be read from the folder LORA_KIT_DATA names ({name}/)"
        raise NotAvailableError(
            f"The rows of {name} are not at hand: the hub cannot be reached and the cache has no "
            f"copy{where if local_task(name) or members(name) != [name] else ''}."
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
