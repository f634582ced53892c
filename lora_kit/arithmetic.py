"""Sums as text: forms to write them in, prompts to ask with, and measures of an answer.

A form says how a sum is asked and how its answer is written and read; the sum is the same in all.

    plain          57+68=          125
    reversed       57+68=          521                      units first: carries come before use
    both_reversed  75+86=          521                      the numbers too
    scratchpad     57+68=          7+8+0=15;5+6+1=12;1      digits, carry, result; then what is left
    hinted         d5c7+d6c8=      c5d2e1                   a letter for each place, units first

"hinted" are the index hints of Zhou et al. 2023 (arXiv 2310.16028, section 4): equal letters stand
at digits that belong together. The units' letter is drawn for each sum, so that every letter is met
although the numbers are short.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lora_kit.errors import BadInputError, unknown_name

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PROMPTS = ("bare", "instruct")
# Alwadhi 2024, listing 4, in other words: a role, the task, nothing but the sum, examples.
INSTRUCTION = (
    "You are good at arithmetic. Add the two numbers and write their sum, nothing else.\n\n"
)


@dataclass(frozen=True)
class Form:
    """ask(a, b), write(a, b): the texts around the "="; read(text): the sum's digits, "" where
    there are none; tokens(k): digits, signs and letters that an answer to k digits takes at most;
    most_digits: the longest numbers it can write (0: any)."""

    name: str
    ask: Callable[[str, str], str]
    write: Callable[[str, str], str]
    read: Callable[[str], str]
    tokens: Callable[[int], int]
    most_digits: int = 0


def _plain(a: str, b: str) -> str:
    return f"{a}+{b}="


def _sum(a: str, b: str) -> str:
    return str(int(a) + int(b))


def _digits_of(text: str) -> str:
    found = re.search(r"\d+", text)
    return found.group() if found else ""


def _steps(a: str, b: str) -> str:
    carry, steps = 0, []
    for x, y in zip(reversed(a), reversed(b), strict=True):
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}+{carry}={total};")
        carry = total // 10
    return "".join(steps) + (str(carry) if carry else "")


def _read_steps(text: str) -> str:
    line = text.strip().splitlines()[0] if text.strip() else ""
    *steps, rest = line.split(";")
    results = [re.fullmatch(r"\d\+\d\+\d=(\d{1,2})", step.strip()) for step in steps]
    if not results or not all(results) or not re.fullmatch(r"1?", rest.strip()):
        return ""
    return (rest.strip() + "".join(m.group(1)[-1] for m in reversed(results))) or ""


def _first_letter(a: str, b: str) -> int:
    return random.Random(f"hints/{a}+{b}").randrange(len(LETTERS) - len(a))


def _marked(digits_units_first: str, start: int) -> list[str]:
    return [LETTERS[start + i] + d for i, d in enumerate(digits_units_first)]


def _hinted_prompt(a: str, b: str) -> str:
    start = _first_letter(a, b)
    both = ("".join(reversed(_marked(n[::-1], start))) for n in (a, b))
    return "+".join(both) + "="


def _hinted_answer(a: str, b: str) -> str:
    return "".join(_marked(_sum(a, b)[::-1], _first_letter(a, b)))


def _read_hinted(text: str) -> str:
    found = re.match(r"\s*((?:[a-z]\d)+)", text)
    return re.sub(r"[a-z]", "", found.group(1))[::-1] if found else ""


FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        Form("plain", _plain, _sum, _digits_of, lambda k: k + 1),
        Form(
            "reversed",
            _plain,
            lambda a, b: _sum(a, b)[::-1],
            lambda text: _digits_of(text)[::-1],
            lambda k: k + 1,
        ),
        Form(
            "both_reversed",
            lambda a, b: f"{a[::-1]}+{b[::-1]}=",
            lambda a, b: _sum(a, b)[::-1],
            lambda text: _digits_of(text)[::-1],
            lambda k: k + 1,
        ),
        Form("scratchpad", _plain, _steps, _read_steps, lambda k: 9 * k + 1),
        Form("hinted", _hinted_prompt, _hinted_answer, _read_hinted, lambda k: 2 * k + 2, 25),
    )
}


def find_form(name: str) -> Form:
    """A form by its name.

    Raises:
        UnknownNameError: no such form.
    """
    if name not in FORMS:
        raise unknown_name("form", name, FORMS)
    return FORMS[name]


def operands(row: Mapping) -> tuple[str, str]:
    """The two numbers, as text, of a row of `skills.draw_skill("addition", …)`."""
    a, b = row["prompt"].rstrip("=").split("+")
    return a, b


def in_form(
    rows: Sequence[Mapping],
    form: str,
    prompt: str = "bare",
    examples: Mapping[int, Sequence[Mapping]] | None = None,
) -> list[dict]:
    """Rows {prompt, completion, digits, sum} of plain sums, written in a form and a prompt.

    Args:
        rows: of `skills.draw_skill("addition", …)`.
        form: a name of FORMS.
        prompt: "bare", the sum's own text, or "instruct", an instruction before it.
        examples: for k digits, solved sums to stand before a question of that length.

    Raises:
        UnknownNameError: no such form; BadInputError: no such prompt, or numbers too long.
    """
    made, how = [], find_form(form)
    if prompt not in PROMPTS:
        raise BadInputError(f"prompt must be one of {', '.join(PROMPTS)}, not {prompt!r}.")
    longest = max((row["digits"] for row in rows), default=0)
    if how.most_digits and longest > how.most_digits:
        raise BadInputError(
            f"The form {form} writes at most {how.most_digits} digits, not {longest}: it has no "
            "more letters."
        )
    for row in rows:
        a, b = operands(row)
        shown = [operands(e) for e in (examples or {}).get(row["digits"], ())]
        question, answer = how.ask(a, b), how.write(a, b)
        if prompt == "bare":
            before = "".join(f"{how.ask(*e)}{how.write(*e)}\n" for e in shown)
            text = before + question
        else:
            before = "".join(_answered(how.ask(*e)) + f" {how.write(*e)}\n\n" for e in shown)
            text, answer = INSTRUCTION + before + _answered(question), f" {answer}"
        made.append(
            {
                "prompt": text,
                "completion": answer,
                "digits": row["digits"],
                "sum": row["completion"],
            }
        )
    return made


def _answered(question: str) -> str:
    return f"Question: {question}\nAnswer:"


# ------------------------------------------------------------------ measures


def digit_accuracy(answer: str, expected: str) -> float:
    """The share of places that hold the right digit, counted from the right, where addition starts.

    Over the longer of the two, so that digits too many count as wrong: 1 only for the sum itself.
    """
    longest = max(len(answer), len(expected), 1)
    pairs = zip(reversed(answer), reversed(expected), strict=False)
    return sum(a == b for a, b in pairs) / longest


def edit_distance(answer: str, expected: str) -> int:
    """Levenshtein's distance: insertions, deletions and replacements from one to the other."""
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.distance(answer, expected)


def carries(a: str, b: str) -> tuple[int, int]:
    """(how many columns of a sum carry, the longest run of them next to each other)."""
    carry = count = run = longest = 0
    width = max(len(a), len(b))
    for x, y in zip(reversed(a.zfill(width)), reversed(b.zfill(width)), strict=True):
        carry = int(int(x) + int(y) + carry > 9)
        count += carry
        run = run + 1 if carry else 0
        longest = max(longest, run)
    return count, longest


KINDS = ("right", "unreadable", "length", "carry", "other")


def error_kind(answer: str, expected: str) -> str:
    """What is wrong with an answer, a name of KINDS.

    "length": too few or too many digits. "carry": every wrong digit is one too high or too low
    (9 and 0 are neighbours), as when a carry was forgotten or invented. "other": the rest.
    """
    if answer == expected:
        return "right"
    if not answer:
        return "unreadable"
    if len(answer) != len(expected):
        return "length"
    apart = {(int(a) - int(b)) % 10 for a, b in zip(answer, expected, strict=True)}
    return "carry" if apart <= {0, 1, 9} else "other"
