"""A miniature LoRA Land: small tasks, each with its rows and its score, for one small model.

The tasks follow the five kinds of Zhao et al. 2024, section 3.1, with completion-style prompts
(section 3.2) and the metrics of section 3.5: accuracy after the first valid label is taken out of
the answer, ROUGE-L for free text, and the last number for GSM8K. Kinds of which no data set is at
hand are generated (`skills`, `skills_land`), and say so.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lora_kit.data import Dataset, is_local, load_rows
from lora_kit.errors import BadInputError, NotAvailableError, unknown_name

# Of prompt and completion together: below 512 tokens for the default model, whatever the task.
MOST_CHARACTERS = 1400


@dataclass(frozen=True)
class MiniTask:
    """One task: `metric` is accuracy, rouge, number or exact; `labels` what an answer may be.

    `needs`: (data set, splits) at hand, None for a generated one. max_new_tokens: what an answer
    may take; a longer one is cut, before and after tuning alike.
    """

    name: str
    category: str
    metric: str
    draw: Callable[[int, int, int], tuple[list[dict], list[dict]]]
    max_new_tokens: int
    labels: tuple[str, ...] = ()
    needs: tuple[str, ...] | None = None


def mini_rows(name: str, train: int, test: int, seed: int) -> tuple[Dataset, Dataset]:
    """Training and test rows of a task; at most so many, fewer where the set has fewer.

    Args:
        name: a name of MINI_TASKS.
        train, test: most rows of either side.
        seed: draws the rows.

    Raises:
        UnknownNameError: no such task; NotAvailableError: its data set is not at hand.
        BadInputError: train or test below 1.
    """
    if name not in MINI_TASKS:
        raise unknown_name("task", name, MINI_TASKS)
    if train < 1 or test < 1:
        raise BadInputError(f"train and test must be at least 1, not {train} and {test}.")
    task = MINI_TASKS[name]
    if missing := missing_data(task):
        raise NotAvailableError(f"{name} needs {missing}; point LORA_KIT_DATA at a folder of it.")
    learnt, asked = task.draw(train, test, seed)
    source = task.needs[0] if task.needs else "generated"
    return (
        Dataset(name, "train", tuple(learnt[:train]), source, f"seed {seed}"),
        Dataset(name, "test", tuple(asked[:test]), source, f"seed {seed}"),
    )


def missing_data(task: MiniTask) -> str | None:
    """The first split of a task's data set that is not in the local folder; None if all are."""
    if not task.needs:
        return None
    name, *splits = task.needs
    return next((f"{name}/{split}" for split in splits if not is_local(name, split)), None)


def score_answers(task: MiniTask, answers: Sequence[str], expected: Sequence[str]) -> list[float]:
    """The score of each answer, 0 to 1.

    accuracy: the first of the task's labels that stands in the answer as a word, in any case, is
    the expected one (Zhao et al. 2024, section 3.5). exact: the first line is the expected text.
    number: the number behind `####`, else the last one, is that of the expected text. rouge:
    ROUGE-L's F1 with stemming off.
    """
    if len(answers) != len(expected):
        raise BadInputError(f"{len(answers)} answers for {len(expected)} expected texts.")
    if task.metric == "rouge":
        from rouge_score import rouge_scorer

        scorer = rouge_scorer.RougeScorer(["rougeL"])
        return [
            scorer.score(e, a)["rougeL"].fmeasure for a, e in zip(answers, expected, strict=True)
        ]
    read = {
        "accuracy": lambda text: _first_label(text, task.labels),
        "exact": lambda text: text.strip().splitlines()[0].strip() if text.strip() else "",
        "number": _number,
    }[task.metric]
    return [
        float(read(a) is not None and read(a) == read(e))
        for a, e in zip(answers, expected, strict=True)
    ]


def _first_label(text: str, labels: Sequence[str]) -> str | None:
    words = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
    found = re.search(rf"(?<!\w)(?:{words})(?!\w)", text, re.IGNORECASE)
    return found[0].lower() if found else None


def _number(text: str) -> float | None:
    marked = re.findall(r"####\s*\$?(-?[\d,]*\.?\d+)", text)
    found = marked[:1] or re.findall(r"-?\d[\d,]*\.?\d*", text)[-1:]
    return float(found[0].replace(",", "")) if found else None


# ------------------------------------------------------------------ where rows come from


def _skill(name: str, digits: int):
    def draw(train: int, test: int, seed: int):
        from lora_kit.skills import train_and_test

        rows = train_and_test(name, digits, train, test, seed)
        return tuple([_bare(r["prompt"], r["completion"]) for r in side] for side in rows)

    return draw


def _land(name: str):
    def draw(train: int, test: int, seed: int):
        from lora_kit.skills_land import draw_land_skill

        return tuple(list(side) for side in draw_land_skill(name, train, test, seed))

    return draw


def _from_set(name: str, train_split: str, test_split: str, shape: Callable[[dict], dict | None]):
    """Rows of a set at hand. One split for both sides is divided by the seed; prompts that stand on
    both sides are left out of the training side."""

    def draw(train: int, test: int, seed: int):
        rng = random.Random(f"{name}/{seed}")
        sides = []
        for split in dict.fromkeys((train_split, test_split)):
            rows = [row for row in map(shape, load_rows(name, split)) if row]
            rows = [r for r in rows if len(r["prompt"] + r["completion"]) <= MOST_CHARACTERS]
            rng.shuffle(rows)
            sides.append(rows)
        asked = _balanced(sides[-1], test)
        seen = {row["prompt"] for row in asked}
        learnt = _balanced([row for row in sides[0] if row["prompt"] not in seen], train)
        return learnt, asked

    return draw


def _balanced(rows: list[dict], n: int) -> list[dict]:
    """n rows, in their order; where rows carry `of_label`, as many of each label as of any other:
    an accuracy of 0.9 by always saying "no" would leave nothing to learn."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row.get("of_label", ""), []).append(row)
    each = min(-(-n // len(groups)), min(map(len, groups.values())))
    kept = {id(row) for group in groups.values() for row in group[:each]}
    chosen = [row for row in rows if id(row) in kept][:n]
    return [_bare(row["prompt"], row["completion"]) for row in chosen]


def _bare(prompt: str, completion: str) -> dict:
    return {"prompt": prompt, "completion": completion}


def _gsm8k(row: dict) -> dict:
    return _bare(f"Question: {row['question']}\nAnswer:", f" {row['answer']}")


def _dialogue(row: dict) -> dict:
    summary = row.get("summary") or row["summary1"]
    return _bare(f"Summarise the dialogue.\n\n{row['dialogue']}\n\nSummary:", f" {summary}")


def _title(row: dict) -> dict:
    topic = row.get("topic") or row["topic1"]
    return _bare(
        f"Give the dialogue a title of a few words.\n\n{row['dialogue']}\n\nTitle:", f" {topic}"
    )


def _code(row: dict) -> dict | None:
    if not row["output"].strip():
        return None
    given = f"\n\nInput: {row['input']}" if row["input"] else ""
    return _bare(f"{row['instruction']}{given}\n\nAnswer:", f" {row['output']}")


def _match(row: dict) -> dict:
    sides = [
        f"{side['title']}" + (f" by {side['manufacturer']}" if side["manufacturer"] else "")
        for side in (row["left"], row["right"])
    ]
    answer = "yes" if int(row["label"]) else "no"
    prompt = (
        f"First: {sides[0]}\nSecond: {sides[1]}\n"
        "Are the two the same product? Answer yes or no.\nAnswer:"
    )
    return {"prompt": prompt, "completion": f" {answer}", "of_label": answer}


def _choices(question: str, options: Sequence[str], answer: int) -> dict:
    lines = "\n".join(f"{i}: {text}" for i, text in enumerate(options, 1))
    prompt = (
        f'Given the following question:\n"{question}"\n{lines}\n'
        "What is your answer? Please respond with 1, 2, 3, or 4.\nAnswer:"
    )
    return _bare(prompt, f" {answer + 1}")


def _mmlu(row: dict) -> dict:
    return _choices(row["question"], row["choices"], int(row["answer"]))


def _hellaswag(row: dict) -> dict:
    return _choices(f"{row['ctx']} ...", row["endings"], int(row["label"]))


def _ending(row: dict) -> dict:
    return _bare(
        f"Complete the sentence.\n\n{row['activity_label']}: {row['ctx']}",
        f" {row['endings'][int(row['label'])]}",
    )


FOUR = ("1", "2", "3", "4")
YES_NO = ("yes", "no")

MINI_TASKS: dict[str, MiniTask] = {
    task.name: task
    for task in (
        MiniTask("addition", "Math", "exact", _skill("addition", 2), 6),
        MiniTask("reversal", "Coding", "exact", _skill("reversal", 4), 8),
        MiniTask("sorting", "Coding", "exact", _skill("sorting", 4), 8),
        MiniTask("dates", "Classic NLP", "exact", _skill("dates", 4), 12),
        MiniTask("entities", "Classic NLP", "rouge", _land("entities"), 48),
        MiniTask("meaning", "Classic NLP", "rouge", _land("meaning"), 40),
        MiniTask("sql", "Coding", "rouge", _land("sql"), 32),
        MiniTask("topic", "Knowledge", "accuracy", _land("topic"), 6, tuple(
            ("business", "politics", "science", "sport"))),
        MiniTask("entail", "Reasoning", "accuracy", _land("entail"), 6, (*YES_NO, "unknown")),
        MiniTask("gsm8k", "Math", "number", _from_set("gsm8k", "train", "test", _gsm8k), 128,
                 needs=("gsm8k", "train", "test")),
        MiniTask("dialogsum", "Classic NLP", "rouge",
                 _from_set("dialogsum", "dev", "test", _dialogue), 48,
                 needs=("dialogsum", "dev", "test")),
        MiniTask("dialogsum_title", "Classic NLP", "rouge",
                 _from_set("dialogsum", "dev", "test", _title), 12,
                 needs=("dialogsum", "dev", "test")),
        MiniTask("code_alpaca", "Coding", "rouge",
                 _from_set("code_alpaca", "train", "train", _code), 96,
                 needs=("code_alpaca", "train")),
        MiniTask("amazon_google", "Reasoning", "accuracy",
                 _from_set("amazon_google", "train", "test", _match), 6, YES_NO,
                 needs=("amazon_google", "train", "test")),
        MiniTask("mmlu", "Knowledge", "accuracy", _from_set("mmlu", "test", "test", _mmlu), 6, FOUR,
                 needs=("mmlu", "test")),
        MiniTask("hellaswag", "Reasoning", "accuracy",
                 _from_set("hellaswag", "validation", "validation", _hellaswag), 6, FOUR,
                 needs=("hellaswag", "validation")),
        MiniTask("hellaswag_processed", "Reasoning", "rouge",
                 _from_set("hellaswag", "validation", "validation", _ending), 40,
                 needs=("hellaswag", "validation")),
    )
}  # fmt: skip
