"""The tasks of the specialists study: what each trains on, and the tests that are asked of it.

At hand through LORA_KIT_DATA: "code" (the Python part of Code Alpaca), "gsm8k", "dialogue"
(DialogSum). Generated: "words" and "sums" (word problems of several steps, and of one). Of the
paper, from the hub: "python" (the Python part of Alpaca), "math" (MATH, tested on GSM8K) and "text"
(Dolly's closed questions and information extraction, tested on CNN/DailyMail).

Every task has three parts that share no row: training rows, rows whose loss is measured (and by
which learning rates are chosen), and the rows of its tests.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lora_kit.data import Dataset, is_local, load_rows
from lora_kit.errors import BadInputError, NotAvailableError, unknown_name
from lora_kit.prompts import alpaca_prompt

MOST_CHARACTERS = 1800  # of a training row: prompt and completion stay within 512 tokens
HELD = 300  # rows of a training split kept for the loss, the same for every seed
SHINGLE = 16  # words in a row that two programs share by copying: ten are one `for` line
ARTICLE_CHARACTERS = 6000  # of a CNN/DailyMail article: what a context of 2,048 tokens takes


@dataclass(frozen=True)
class Task:
    """One task. `needs`: (set, split) pairs of its rows, none for a generated one. `tests`: names
    of `TESTS`. `draw()` gives all training rows and those of the held-out loss."""

    name: str
    needs: tuple[tuple[str, str], ...]
    tests: tuple[str, ...]
    draw: Callable[[], tuple[list[dict], list[dict]]]


@dataclass(frozen=True)
class Test:
    """One test. judge: "code", "number", "summary" or "choice". tokens: an answer's most.
    `items()` gives rows of prompt and what the judge needs."""

    name: str
    judge: str
    tokens: int
    needs: tuple[tuple[str, str], ...]
    items: Callable[[], list[dict]]
    version: str = "1"


def task_rows(name: str, rows: int, heldout: int, seed: int) -> tuple[Dataset, Dataset]:
    """Training rows, drawn by the seed, and the rows of the held-out loss, which are always the
    same; both {"prompt", "completion"}, and disjoint.

    Args:
        name: a task, or "all": the three at hand in equal parts, small ones repeated.
        rows: most training rows; heldout: most rows for the loss.

    Raises:
        UnknownNameError: no such task; NotAvailableError: its set is not at hand, by name.
    """
    from lora_kit.studies.specialists import GENERALIST, TASKS_AT_HAND

    if name == GENERALIST:
        each = -(-rows // len(TASKS_AT_HAND))
        parts = [task_rows(t, each, -(-heldout // 3), seed) for t in TASKS_AT_HAND]
        # Small sets are repeated, so that each task is met as often as its specialist meets it.
        made = [[p[0][i % len(p[0])] for p in parts for i in range(each)]]
        made += [[row for p in parts for row in p[1]]]
        source, revision = parts[0][0].source, " ".join(p[0].revision for p in parts)
    else:
        task = known_task(name)
        require_data(name, task.needs)
        pool, held = task.draw()
        made = [random.Random(f"{name}/{seed}").sample(pool, min(rows, len(pool))), held[:heldout]]
        loaded = [load_rows(*need) for need in task.needs]
        source = loaded[0].source if loaded else "generated"
        revision = " ".join(d.revision for d in loaded) or "1"
    return tuple(
        Dataset(name, split, tuple(side), source, revision)
        for split, side in zip(("train", "heldout"), made, strict=True)
    )


def known_task(name: str) -> Task:
    if name not in TASKS:
        raise unknown_name("task of specialists", name, [*TASKS, "all"])
    return TASKS[name]


def missing_data(needs: Iterable[tuple[str, str]]) -> list[str]:
    """The sets among `needs` that no local folder holds: "code_alpaca/train", …"""
    return [f"{name}/{split}" for name, split in needs if not is_local(name, split)]


def require_data(what: str, needs: Iterable[tuple[str, str]]) -> None:
    """Refuse a task or test whose sets are neither local nor on the hub, before anything is loaded.

    Raises:
        NotAvailableError: names the task and the set.
    """
    for name, split in needs:
        if is_local(name, split):
            continue
        try:
            load_rows(name, split, 1)
        except NotAvailableError as e:
            raise NotAvailableError(
                f"The task {what} has no data here: {name}/{split} is needed. {e}"
            ) from e


def tests_of(task: str, which: str) -> list[str]:
    """The tests a cell asks: none ("loss"), the task's own, or all those of the tasks at hand.

    Of all, those whose data is missing are left out, except the task's own: these are refused.
    """
    if which == "loss":
        return []
    from lora_kit.studies.specialists import GENERALIST

    own = [] if task == GENERALIST else list(known_task(task).tests)
    if which == "own":
        return own or list(AT_HAND)
    return list(dict.fromkeys([*own, *(t for t in AT_HAND if not missing_data(TESTS[t].needs))]))


# ------------------------------------------------------------------ code


def is_python(row: dict) -> bool:
    """Whether a code instruction asks for Python: it names the language, or its answer is Python by
    its look and names no other."""
    asked = f"{row['instruction']} {row.get('input', '')}".lower()
    if "python" in asked:
        return True
    if re.search(r"\b(java|javascript|c\+\+|c#|sql|html|css|php|ruby|swift|bash|react)\b", asked):
        return False
    return bool(
        re.search(r"^\s*(def \w+\(.*\):|from \w+ import |import \w+$)", row["output"], re.M)
    )


def words_of(text: str) -> tuple[str, ...]:
    """A program's names, numbers and signs, white space left out."""
    return tuple(re.findall(r"\w+|[^\w\s]", text.lower()))


def shingles(text: str, n: int = SHINGLE) -> set[tuple[str, ...]]:
    """Every n words in a row of a text."""
    words = words_of(text)
    return {words[i : i + n] for i in range(len(words) - n + 1)}


@dataclass(frozen=True)
class Cleaned:
    """Python rows after cleaning, and how many fell: of another language, repeated, or with a
    passage of HumanEval's (`overlapping`, the problems they overlap with)."""

    rows: tuple[dict, ...]
    other_language: int
    repeated: int
    overlapping: tuple[str, ...]


def clean_python(rows: Iterable[dict], problems: Sequence) -> Cleaned:
    """The Python rows of a code set, each once, without any that shares a passage with HumanEval.

    A row falls when its answer has 16 words or signs in a row (`SHINGLE`) in common with the code
    of a problem's prompt or solution, docstrings left out, or defines a function of a problem's
    name with the same arguments. Repeated: the same instruction and input, or the same answer of
    more than 16 words, however spaced.
    """
    passages: dict[tuple[str, ...], str] = {}
    heads: dict[str, str] = {}
    for problem in problems:
        code = re.sub(r'("""|\'\'\').*?\1', "", problem.prompt, flags=re.S) + problem.solution
        for passage in shingles(code):
            passages.setdefault(passage, problem.task_id)
        if head := re.search(rf"def {re.escape(problem.entry_point)}\(([^)]*)\)", problem.prompt):
            names = re.sub(r":[^,]*|\s", "", head[1])
            heads[f"{problem.entry_point}({names})"] = problem.task_id
    kept, seen, other, repeated, overlapping = [], set(), 0, 0, []
    for row in rows:
        if not row["output"].strip() or not is_python(row):
            other += 1
            continue
        answer = words_of(row["output"])
        marks = {words_of(f"{row['instruction']}\n{row.get('input', '')}")}
        marks |= {("answer", *answer)} if len(answer) > SHINGLE else set()
        if marks & seen:
            repeated += 1
            continue
        seen |= marks
        hit = next((passages[s] for s in shingles(row["output"]) if s in passages), None)
        defined = re.findall(r"def (\w+)\(([^)]*)\)", row["output"])
        named = [f"{name}({re.sub(r':[^,]*|[ ]', '', given)})" for name, given in defined]
        hit = hit or next((heads[head] for head in named if head in heads), None)
        if hit:
            overlapping.append(hit)
            continue
        kept.append(row)
    return Cleaned(tuple(kept), other, repeated, tuple(overlapping))


def _python_rows(name: str) -> Callable[[], tuple[list[dict], list[dict]]]:
    def draw() -> tuple[list[dict], list[dict]]:
        from lora_kit.evaluate.humaneval import load_problems

        rows = [
            {
                "prompt": alpaca_prompt(r["instruction"], r.get("input") or ""),
                "completion": r["output"],
            }
            for r in clean_python(load_rows(name, "train"), load_problems()).rows
        ]
        return _halves(rows)

    return draw


def _humaneval() -> list[dict]:
    from lora_kit.evaluate.humaneval import load_problems

    return [{"id": p.task_id, "prompt": p.prompt, "problem": p} for p in load_problems()]


# ------------------------------------------------------------------ mathematics


def _question(row: dict) -> dict:
    return {"prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {row['answer']}"}


def _gsm8k() -> tuple[list[dict], list[dict]]:
    return _halves([_question(row) for row in load_rows("gsm8k", "train")])


def _gsm8k_test() -> list[dict]:
    rows = load_rows("gsm8k", "test")
    return [{"id": f"gsm8k/{i}", **_question(row)} for i, row in enumerate(rows)]


def boxed(solution: str) -> str | None:
    """What stands in the last \\boxed{…} of a solution of MATH, braces within it matched."""
    start = solution.rfind("\\boxed{")
    if start < 0:
        return None
    depth, at = 1, start + len("\\boxed{")
    for i in range(at, len(solution)):
        depth += {"{": 1, "}": -1}.get(solution[i], 0)
        if depth == 0:
            return solution[at:i].strip()
    return None


def _math() -> tuple[list[dict], list[dict]]:
    """MATH in GSM8K's form, so that one judge reads both: the boxed answer behind `####`."""
    rows = []
    for row in load_rows("math", "train"):
        if answer := boxed(row["solution"]):
            text = f"{row['solution']}\n#### {answer}"
            rows.append(_question({"question": row["problem"], "answer": text}))
    return _halves(rows)


def _words(steps: str) -> Callable[[], tuple[list[dict], list[dict]]]:
    def draw() -> tuple[list[dict], list[dict]]:
        pool, held = (draw_words(steps, n, seed) for n, seed in ((2000, 1), (HELD, 2)))
        asked = {r["prompt"] for r in (*held, *draw_words(steps, 200, 0))}
        return [row for row in pool if row["prompt"] not in asked], held

    return draw


def draw_words(steps: str, n: int, seed: int) -> list[dict]:
    """Word problems of one step ("sums") or several ("words"). One-step problems run out: 1,000
    are drawn at most."""
    from lora_kit.word_problems import ONE_STEP, STORIES, draw_word_problems

    stories = ONE_STEP if steps == "sums" else STORIES
    rows = draw_word_problems(min(n, 1000) if steps == "sums" else n, seed, stories=stories)
    return [{"prompt": r["prompt"], "completion": r["completion"]} for r in rows]


def _word_test(steps: str) -> Callable[[], list[dict]]:
    return lambda: [
        {"id": f"{steps}/{i}", **row} for i, row in enumerate(draw_words(steps, 200, 0))
    ]


# ------------------------------------------------------------------ text


def _dialogue_prompt(text: str) -> str:
    return f"Summarise the dialogue.\n\n{text}\n\nSummary:"


def _dialogues() -> tuple[list[dict], list[dict]]:
    rows = [
        {"prompt": _dialogue_prompt(r["dialogue"]), "completion": f" {r['summary']}"}
        for r in load_rows("dialogsum", "dev")
    ]
    return _halves(rows, 50)


def _dialogue_test() -> list[dict]:
    found = []
    for row in load_rows("dialogsum", "test"):
        texts = [row[k] for k in ("summary", "summary1", "summary2", "summary3") if row.get(k)]
        found.append(
            {
                "id": row["fname"],
                "prompt": _dialogue_prompt(row["dialogue"]),
                "article": row["dialogue"],
                "references": texts,
            }
        )
    return found


DOLLY_KINDS = ("closed_qa", "information_extraction")  # saha2024, section 3.3


def _dolly() -> tuple[list[dict], list[dict]]:
    rows = [
        {
            "prompt": alpaca_prompt(r["instruction"], r["context"]),
            "completion": r["response"],
        }
        for r in load_rows("dolly", "train")
        if r["category"] in DOLLY_KINDS and r["response"].strip()
    ]
    return _halves(rows)


def _news_test() -> list[dict]:
    asked = "Summarise the article in a few sentences."
    return [
        {
            "id": row["id"],
            "prompt": alpaca_prompt(asked, row["article"][:ARTICLE_CHARACTERS]),
            "article": row["article"],
            "references": [row["highlights"]],
        }
        for row in load_rows("cnn_dailymail", "validation")
    ]


def _halves(rows: list[dict], held: int = HELD) -> tuple[list[dict], list[dict]]:
    """Training rows and rows for the loss: each prompt once, on one side; long rows left out."""
    once = list({r["prompt"]: r for r in rows}.values())
    fitting = [r for r in once if len(r["prompt"]) + len(r["completion"]) <= MOST_CHARACTERS]
    if len(fitting) < 2:
        raise BadInputError(
            f"Of {len(rows)} rows {len(fitting)} have at most {MOST_CHARACTERS} characters and a "
            "prompt of their own; two at least are needed."
        )
    random.Random("held out").shuffle(fitting)
    held = min(held, len(fitting) // 2)
    return fitting[held:], fitting[:held]


TASKS = {
    task.name: task
    for task in (
        Task("gsm8k", (("gsm8k", "train"),), ("gsm8k", "words"), _gsm8k),
        Task("code", (("code_alpaca", "train"),), ("humaneval",), _python_rows("code_alpaca")),
        Task("dialogue", (("dialogsum", "dev"),), ("dialogue", "hellaswag"), _dialogues),
        Task("words", (), ("words",), _words("words")),
        Task("sums", (), ("sums",), _words("sums")),
        Task("python", (("alpaca", "train"),), ("humaneval",), _python_rows("alpaca")),
        Task("math", (("math", "train"),), ("gsm8k",), _math),
        Task("text", (("dolly", "train"),), ("news", "hellaswag"), _dolly),
    )
}
TESTS = {
    test.name: test
    for test in (
        Test("humaneval", "code", 256, (), _humaneval),
        Test("gsm8k", "number", 256, (("gsm8k", "test"),), _gsm8k_test),
        Test("words", "number", 120, (), _word_test("words")),
        Test("sums", "number", 60, (), _word_test("sums")),
        Test("dialogue", "summary", 80, (("dialogsum", "test"),), _dialogue_test),
        Test("news", "summary", 160, (("cnn_dailymail", "validation"),), _news_test),
        Test("hellaswag", "choice", 0, (("hellaswag", "validation"),), lambda: []),
    )
}
AT_HAND = ("gsm8k", "words", "humaneval", "dialogue", "hellaswag")
