"""A teacher: something that answers a prompt with a text, and a log of its answers that lasts.

Two kinds: an endpoint that speaks OpenAI's protocol (any of them: a company's, a server of your
own, `lora-kit serve`), and a file of answers that were got elsewhere. What a teacher said is
appended to a log, one line an answer, before anything else is done with it, so that a run that was
cut off asks for nothing twice. What asking would cost is estimated before the first call.

The key of an endpoint is read from the environment when a call is made. It is kept in no object,
file or message.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lora_kit.errors import BadInputError, CorruptFileError, NotAvailableError, RunFailedError
from lora_kit.store import sha256_json

CHARACTERS_A_TOKEN = 3.5  # of English under the tokenizers in use, rather too few than too many
KEY = "OPENAI_API_KEY"


@dataclass(frozen=True)
class Reply:
    """What a teacher said. Tokens as the endpoint counted them; 0 where nobody counts."""

    text: str
    prompt_tokens: int = 0
    answer_tokens: int = 0


class Teacher(Protocol):
    """name: for records. ask: one prompt, one reply."""

    name: str

    def ask(self, prompt: str) -> Reply: ...


@dataclass(frozen=True)
class EndpointTeacher:
    """A model behind OpenAI's protocol.

    model: as the endpoint calls it. base_url: "http://127.0.0.1:8000/v1" for instance; None for
    OpenAI's own. key_variable: the environment variable that holds the key. temperature,
    most_tokens: of an answer. retries: after a refusal or a broken line, with growing pauses.
    """

    model: str
    base_url: str | None = None
    key_variable: str = KEY
    temperature: float = 0.7
    most_tokens: int = 400
    timeout: float = 60.0
    retries: int = 4

    @property
    def name(self) -> str:
        return self.model

    def ask(self, prompt: str) -> Reply:
        """One answer.

        Raises:
            NotAvailableError: no key in the environment, or the endpoint cannot be reached.
            RunFailedError: it refused, or said nothing.
        """
        import openai

        key = os.environ.get(self.key_variable, "")
        if not key:
            raise NotAvailableError(
                f"No teacher: the environment variable {self.key_variable} is not set. An endpoint "
                "that asks for no key takes any value."
            )
        client = openai.OpenAI(
            api_key=key, base_url=self.base_url, timeout=self.timeout, max_retries=self.retries
        )
        where = self.base_url or "OpenAI's endpoint"
        try:
            with client:
                said = client.chat.completions.create(
                    model=self.model,
                    messages=[{"role": "user", "content": prompt}],
                    temperature=self.temperature,
                    max_tokens=self.most_tokens,
                )
        except openai.APIConnectionError:
            raise NotAvailableError(f"The teacher at {where} cannot be reached.") from None
        except openai.APIError as error:
            # Some endpoints repeat the key in their refusal.
            told = str(error).replace(key, "…")[:300]
            raise RunFailedError(f"The teacher at {where} refused: {told}") from None
        text = said.choices[0].message.content if said.choices else None
        if not text:
            raise RunFailedError(f"The teacher at {where} answered with nothing.")
        used = said.usage
        return Reply(text, used.prompt_tokens if used else 0, used.completion_tokens if used else 0)


class FileTeacher:
    """Answers from a file: JSON lines {"prompt": …, "answer": …}, as `AnswerLog` writes them.

    The n-th time a prompt is asked, its n-th answer comes; the last one again when there are no
    more.
    """

    def __init__(self, path: Path | str, name: str = ""):
        self.path = Path(path)
        self.name = name or self.path.stem
        self._answers: dict[str, list[str]] = {}
        self._asked: dict[str, int] = {}
        if not self.path.is_file():
            raise NotAvailableError(f"There is no file of answers {self.path}.")
        for line in _lines(self.path):
            self._answers.setdefault(line["prompt"], []).append(line["answer"])

    def ask(self, prompt: str) -> Reply:
        """The file's answer.

        Raises:
            NotAvailableError: it has none.
        """
        if prompt not in self._answers:
            raise NotAvailableError(
                f"{self.path} holds no answer to the prompt that begins {prompt[:60]!r}; ask a "
                "teacher for it and add the line."
            )
        n = self._asked.get(prompt, 0)
        self._asked[prompt] = n + 1
        known = self._answers[prompt]
        return Reply(known[min(n, len(known) - 1)])


# ------------------------------------------------------------------ a log that lasts


class AnswerLog:
    """A file of answers, one JSON line each: {"key", "prompt", "answer", "teacher", …}.

    A line is written in one go at the file's end. One that a crash cut short is dropped at the next
    opening: nothing after it can have been written.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.answers: dict[str, dict] = {}
        if not self.path.exists():
            return
        whole, cut = _whole_lines(self.path)
        if cut:
            with open(self.path, "r+b") as f:
                f.truncate(whole)
        for line in _lines(self.path):
            self.answers[line.get("key", "")] = line

    def __len__(self) -> int:
        return len(self.answers)

    def get(self, prompt: str, teacher: str, number: int = 0) -> str | None:
        """The answer to the `number`-th asking of a prompt, if it was given."""
        found = self.answers.get(_key(prompt, teacher, number))
        return None if found is None else found["answer"]

    def add(self, prompt: str, teacher: str, reply: Reply, number: int = 0) -> None:
        """Append an answer; it is on the disk when this returns."""
        line = {
            "key": _key(prompt, teacher, number),
            "prompt": prompt,
            "answer": reply.text,
            "teacher": teacher,
            "prompt_tokens": reply.prompt_tokens,
            "answer_tokens": reply.answer_tokens,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = (json.dumps(line, ensure_ascii=False) + "\n").encode()
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, data)
            os.fsync(handle)
        finally:
            os.close(handle)
        self.answers[line["key"]] = line


def _key(prompt: str, teacher: str, number: int) -> str:
    return sha256_json([prompt, teacher, number])[:20]


def _whole_lines(path: Path) -> tuple[int, bool]:
    """(bytes up to the last whole line, whether something stands behind it)."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    return end, end < len(data)


def _lines(path: Path) -> Iterable[dict]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            found = json.loads(line)
            if not isinstance(found["prompt"], str) or not isinstance(found["answer"], str):
                raise TypeError
        except (json.JSONDecodeError, KeyError, TypeError):
            raise CorruptFileError(
                f"{path}, line {number}, is no answer: it needs the texts prompt and answer."
            ) from None
        yield found


def ask_all(
    teacher: Teacher,
    prompts: Sequence[str],
    log: AnswerLog,
    say: Callable[[str], None] = print,
) -> list[str]:
    """A teacher's answer to each prompt, in order; what the log has is not asked again.

    A prompt that stands there twice is asked twice.
    """
    seen: dict[str, int] = {}
    said, new = [], 0
    for prompt in prompts:
        number = seen.get(prompt, 0)
        seen[prompt] = number + 1
        found = log.get(prompt, teacher.name, number)
        if found is None:
            reply = teacher.ask(prompt)
            log.add(prompt, teacher.name, reply, number)
            found, new = reply.text, new + 1
        said.append(found)
    say(f"{len(prompts)} prompts: {new} asked, {len(prompts) - new} known from {log.path.name}")
    return said


# ------------------------------------------------------------------ what it costs


@dataclass(frozen=True)
class Cost:
    """An estimate: calls still to be made, their tokens, and money in the prices' currency."""

    calls: int
    prompt_tokens: int
    answer_tokens: int
    money: float

    def __str__(self) -> str:
        return (
            f"{self.calls:,} calls, {self.prompt_tokens:,} tokens to read and at most "
            f"{self.answer_tokens:,} to write: {self.money:.2f}"
        )


def estimate_cost(
    teacher: Teacher,
    prompts: Sequence[str],
    log: AnswerLog,
    price_in: float,
    price_out: float,
    most_tokens: int = 400,
) -> Cost:
    """What asking the prompts that the log does not have would cost at most.

    Args:
        price_in, price_out: for a million tokens read and written.
        most_tokens: of an answer.

    Raises:
        BadInputError: a price below 0.
    """
    if min(price_in, price_out) < 0:
        raise BadInputError("Prices are 0 or more.")
    seen: dict[str, int] = {}
    calls = read = 0
    for prompt in prompts:
        number = seen.get(prompt, 0)
        seen[prompt] = number + 1
        if log.get(prompt, teacher.name, number) is None:
            calls += 1
            read += round(len(prompt) / CHARACTERS_A_TOKEN) + 8  # the chat template's own
    written = calls * most_tokens
    return Cost(calls, read, written, (read * price_in + written * price_out) / 1e6)


def check_budget(cost: Cost, most: float) -> None:
    """Refuse, before any call, what would cost more than `most`.

    Raises:
        BadInputError: says the estimate and the limit.
    """
    if cost.money > most:
        raise BadInputError(
            f"Not asked: {cost} is above the limit of {most:.2f}. Raise the limit, or ask less."
        )
