"""The skills' questions in other words, as people might put them.

No adapter of this kit is trained on these: they try a router, which has to find the adapter from
the prompt alone. Addition and subtraction are asked in nearly the same words, on purpose.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lora_kit.errors import BadInputError, unknown_name
from lora_kit.skills import SKILLS

REWORDINGS: dict[str, tuple[str, ...]] = {
    "addition": (
        "What is {x}?",
        "Please work out {x}.",
        "Add up {x}",
        "My bill says {x}. The total?",
    ),
    "subtraction": (
        "What is {x}?",
        "Please work out {x}.",
        "Take away {x}",
        "I had, then paid: {x}. What is left?",
    ),
    "reversal": (
        "Write {x} backwards.",
        "What is {x} read from right to left?",
        "Turn {x} around",
        "Mirror the digits of {x}.",
    ),
    "sorting": (
        "Put the digits of {x} in order.",
        "Arrange {x} from smallest to largest digit.",
        "Order {x} ascending",
        "Rank the digits {x}, low to high.",
    ),
    "largest": (
        "Which digit of {x} is the biggest?",
        "What is the maximum digit in {x}?",
        "Find the highest digit: {x}",
        "Of the digits {x}, which is greatest?",
    ),
    "spelling": (
        "Write the digits of {x} as words.",
        "How do you say {x}, digit by digit?",
        "Put {x} into words",
        "Read {x} out loud.",
    ),
    "case": (
        "Write {x} in capital letters.",
        "Make this all caps: {x}",
        "Shout: {x}",
        "Change '{x}' to uppercase.",
    ),
    "dates": (
        "Write the date {x} in words.",
        "Which day is {x}, with the month's name?",
        "Reformat {x} as day month year",
        "My passport says {x}. When is that?",
    ),
}


def reworded(skill: str, prompt: str, way: int) -> str:
    """A skill's prompt in other words: `reworded("reversal", "reverse 417=", 0)` is
    `"Write 417 backwards."`.

    Args:
        way: which of the skill's `REWORDINGS`, from 0.

    Raises:
        UnknownNameError: no such skill; BadInputError: no such way, or no prompt of that skill.
    """
    if skill not in REWORDINGS:
        raise unknown_name("skill", skill, REWORDINGS)
    ways = REWORDINGS[skill]
    if not 0 <= way < len(ways):
        raise BadInputError(f"{skill} has {len(ways)} other ways of asking, counted from 0.")
    pattern = SKILLS[skill].row(2, 5)[0]
    word, space, _ = pattern.partition(" ")
    lead = word + space if space else ""
    if not (prompt.startswith(lead) and prompt.endswith("=")):
        raise BadInputError(f"{prompt!r} is no prompt of {skill}: those look like {pattern!r}.")
    return ways[way].format(x=prompt[len(lead) : -1])


def phrased(skill: str, rows: Iterable[Mapping], ways: Sequence[int | None]) -> list[str]:
    """The prompts of rows, put in these ways by turns; None is the skill's own form.

    Raises:
        as `reworded`.
    """
    prompts = [row["prompt"] for row in rows]
    turns = [ways[i % len(ways)] for i in range(len(prompts))]
    return [
        prompt if way is None else reworded(skill, prompt, way)
        for prompt, way in zip(prompts, turns, strict=True)
    ]
