"""Leakage, on purpose: fine-tune on test questions themselves, and see what that does.

Every number of this study is from a model that saw test questions. It is no benchmark score and
must not be read as one: what is measured is how much of the leaked questions is learnt by heart,
and whether anything is left for questions that were not leaked. It needs no teacher.

Half of a subject's test questions (drawn by the seed) are leaked, word for word. Then are asked

    leaked           the same questions again                        learnt by heart, or known
    leaked, turned   the same, their choices in another order        the answer, or its letter?
    unseen           the subject's other half                        did the subject get easier?
    other subject    questions of another subject                    did anything else?
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_kit.errors import BadInputError
from lora_kit.evaluate.question_filter import OPTIONS, Question
from lora_kit.studies.records import Record, new_record

DEFAULTS: dict[str, Any] = {
    "model": "smollm2-135m-instruct",
    "subject": "machine_learning",  # whose test questions are leaked
    "other": "professional_psychology",
    "leaked_share": 0.5,
    "most_questions": 0,  # of a subject; 0 for all
    "epochs": 10.0,
    "rows_a_step": 8,
    "learning_rate": 5e-4,
    "rank": 32,
    "dropout": 0.1,
    "quantization": "nf4",  # nf4 or none
}


def check_setting(values: Mapping[str, Any]) -> None:
    """Raises BadInputError where a value is out of range."""
    if not 0 < values["leaked_share"] <= 1 or values["most_questions"] < 0:
        raise BadInputError("leaked_share must be above 0 and at most 1, most_questions 0 or more.")
    if values["subject"] == values["other"]:
        raise BadInputError("other must be another subject.")


def turned(question: Question) -> Question:
    """The question with its choices turned by one place (A becomes B, … D becomes A)."""
    choices = (question.choices[-1], *question.choices[:-1])
    return Question(question.subject, question.question, choices, (question.answer + 1) % 4)


def halves(
    questions: Sequence[Question], share: float, seed: int
) -> tuple[list[Question], list[Question]]:
    """(leaked, unseen): a seeded draw. Questions with the same text stay on one side."""
    groups: dict[str, list[Question]] = {}
    for q in questions:
        groups.setdefault(q.question, []).append(q)
    order = list(groups.values())
    random.Random(f"leak/{seed}").shuffle(order)
    leaked, unseen, wanted = [], [], max(1, round(share * len(questions)))
    for some in order:
        (leaked if len(leaked) < wanted else unseen).extend(some)
    return leaked, unseen


def paired_scores(
    test: Mapping[str, Sequence[Question]],
    before: Mapping[str, Sequence[str]],
    after: Mapping[str, Sequence[str]],
) -> tuple[dict[str, Any], list[dict]]:
    """(metrics, items) of letters before and after on the same questions: accuracies with Wilson's
    interval, their paired difference, McNemar's exact p; each item's 0 and 1."""
    from lora_kit.evaluate.statistics import mcnemar, paired_difference, proportion

    metrics: dict[str, Any] = {}
    items = []
    for name, questions in test.items():
        if not questions:
            continue
        key = name.replace(" ", "_").replace(",", "")
        sides = [
            [int(letter == q.letter) for letter, q in zip(letters[name], questions, strict=True)]
            for letters in (before, after)
        ]
        for when, scores in zip(("before", "after"), sides, strict=True):
            metrics[f"{key}_{when}"] = proportion(sum(scores), len(scores)).to_metric()
        metrics[f"{key}_difference"] = paired_difference(*sides).to_metric()
        metrics[f"{key}_p"] = mcnemar(*sides).p
        texts = ["".join(map(str, scores)) for scores in sides]
        items.append({"questions": name, "before": texts[0], "after": texts[1]})
    return metrics, items


def run_cell(parameters: dict[str, Any], seed: int, folder: Path) -> Record:
    """Run one setting with one seed; see `arithmetic_cells.run_cell`.

    Raises:
        BadInputError: a value out of range; and what reading MMLU's rows raises.
    """
    from lora_kit.lora import load_lora
    from lora_kit.models import load_model
    from lora_kit.studies.knowledge_transfer import (
        STUDY,
        mmlu_questions,
        student_letters,
        training_rows,
    )
    from lora_kit.train.finetune import finetune
    from lora_kit.train.recipes import recipe

    values = {**DEFAULTS, **parameters}
    check_setting(values)
    started = time.perf_counter()
    most = values["most_questions"] or None
    leaked, unseen = halves(
        mmlu_questions(values["subject"], "test")[:most], values["leaked_share"], seed
    )
    test = {
        "leaked": leaked,
        "leaked, turned": [turned(q) for q in leaked],
        "unseen": unseen,
        "other subject": mmlu_questions(values["other"], "test")[:most],
    }
    rows = training_rows(leaked, f"leaked-{values['subject']}")
    spec = recipe(
        "alwadhi",
        seed=seed,
        epochs=values["epochs"],
        batch_size=values["rows_a_step"],
        learning_rate=values["learning_rate"],
        rank=values["rank"],
        alpha=values["rank"],
        dropout=values["dropout"],
        quantization=values["quantization"],
        max_length=1024,
        checkpointing=False if "135m" in values["model"] else "auto",
    )
    made = finetune(values["model"], rows, spec, output=Path(folder) / "adapter", engine="native")
    loaded = load_model(values["model"], quantization=values["quantization"])
    before = {n: student_letters(loaded.model, loaded.tokenizer, qs) for n, qs in test.items()}
    load_lora(loaded.model, made.adapter)
    after = {n: student_letters(loaded.model, loaded.tokenizer, qs) for n, qs in test.items()}
    metrics, items = paired_scores(test, before, after)
    letters = {
        f"letter_{o}": sum(letter == o for some in after.values() for letter in some)
        / sum(len(some) for some in after.values())
        for o in OPTIONS
    }
    return new_record(
        STUDY,
        f"lora-kit sweep leakage --grid benchmarks/grids/leakage{'-cpu' * bool(most)}.yaml",
        parameters={"part": "leakage", **values},
        metrics=metrics
        | letters
        | {"last_loss": sum(loss for _, loss in made.losses[-10:]) / len(made.losses[-10:])},
        tables={"items": items},
        seed=seed,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=made.peak_memory,
        model=loaded.record(),
        data=rows.record(),
    )
