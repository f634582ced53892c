"""Word problems: generated sums of two or three steps, in the form of GSM8K's rows.

    Question: Mia has 14 apples. She buys 3 bags with 6 apples each and gives 9 apples to her
    brother. How many apples does she have now?
    Answer: She buys 3 * 6 = 18 apples. She then has 14 + 18 = 32 apples. 32 - 9 = 23 apples are
    left.
    #### 23

A skill that takes reading and several steps, that no benchmark holds, and of which as many rows as
wanted can be drawn from a seed. The prompt is the one lm-eval gives for GSM8K, and the answer ends
in GSM8K's mark, so that both of its judges can read it: strict (the number behind `####`) and
flexible (the last number). Numbers stay small: what is asked for is the road to them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from lora_kit.data import Dataset
from lora_kit.errors import BadInputError

PROMPT = "Question: {question}\nAnswer:"
STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")  # lm-eval's two filters for GSM8K
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")

_PEOPLE = (
    *(("Mia", "she", "her"), ("Tom", "he", "his"), ("Ada", "she", "her"), ("Ben", "he", "his")),
    *(("Zoe", "she", "her"), ("Max", "he", "his"), ("Eva", "she", "her"), ("Sam", "he", "his")),
)
_THINGS = (
    *("apples", "books", "cards", "coins", "eggs", "flowers", "marbles", "nuts", "pens", "shells"),
    *("stamps", "stones"),
)
_PACKS = ("bags", "boxes", "packs", "baskets")
_KIN = ("brother", "sister", "friend", "cousin")

Story = tuple[str, str, int]  # question, steps in words, answer


def _buys_and_gives(rng: random.Random) -> Story:
    name, he, his = rng.choice(_PEOPLE)
    thing, pack, kin = rng.choice(_THINGS), rng.choice(_PACKS), rng.choice(_KIN)
    a, n, m = rng.randint(3, 20), rng.randint(2, 6), rng.randint(2, 9)
    got = a + n * m
    b = rng.randint(2, got - 1)
    return (
        f"{name} has {a} {thing}. {he.capitalize()} buys {n} {pack} with {m} {thing} each and "
        f"gives {b} {thing} to {his} {kin}. How many {thing} does {he} have now?",
        f"{he.capitalize()} buys {n} * {m} = {n * m} {thing}. {he.capitalize()} then has "
        f"{a} + {n * m} = {got} {thing}. {got} - {b} = {got - b} {thing} are left.",
        got - b,
    )


def _shares(rng: random.Random) -> Story:
    name, he, _ = rng.choice(_PEOPLE)
    thing, kin = rng.choice(_THINGS), rng.choice(_KIN)
    people, each, kept = rng.randint(2, 6), rng.randint(2, 9), rng.randint(2, 15)
    have = people * each + kept
    return (
        f"{name} has {have} {thing}. {he.capitalize()} keeps {kept} of them and shares the rest "
        f"equally between {people} {kin}s. How many {thing} does each {kin} get?",
        f"There are {have} - {kept} = {people * each} {thing} to share. Each gets "
        f"{people * each} / {people} = {each} {thing}.",
        each,
    )


def _two_days(rng: random.Random) -> Story:
    name, he, _ = rng.choice(_PEOPLE)
    thing = rng.choice(_THINGS)
    first, more, lost = rng.randint(4, 25), rng.randint(2, 15), rng.randint(2, 9)
    second = first + more
    both = first + second
    lost = min(lost, both - 1)
    return (
        f"On Monday {name} finds {first} {thing}. On Tuesday {he} finds {more} more than on "
        f"Monday, but then loses {lost}. How many {thing} does {he} have?",
        f"On Tuesday {he} finds {first} + {more} = {second} {thing}. Together that makes "
        f"{first} + {second} = {both} {thing}. After the loss {he} has {both} - {lost} = "
        f"{both - lost} {thing}.",
        both - lost,
    )


def _price(rng: random.Random) -> Story:
    name, he, _ = rng.choice(_PEOPLE)
    thing = rng.choice(_THINGS)
    n, each = rng.randint(2, 9), rng.randint(2, 9)
    paid = n * each + rng.randint(1, 20)
    return (
        f"{name} buys {n} {thing} for {each} dollars each and pays with {paid} dollars. How many "
        f"dollars does {he} get back?",
        f"The {thing} cost {n} * {each} = {n * each} dollars. {he.capitalize()} gets "
        f"{paid} - {n * each} = {paid - n * each} dollars back.",
        paid - n * each,
    )


def _two_kinds(rng: random.Random) -> Story:
    name, he, _ = rng.choice(_PEOPLE)
    one, two = rng.sample(_THINGS, 2)
    a, times, b = rng.randint(2, 9), rng.randint(2, 5), rng.randint(2, 20)
    return (
        f"{name} has {a} {one} and {times} times as many {two}. Then {he} finds {b} more {two}. "
        f"How many {one} and {two} does {he} have together?",
        f"{he.capitalize()} starts with {times} * {a} = {times * a} {two}. Then {he} has "
        f"{times * a} + {b} = {times * a + b} {two}. Together that makes {a} + {times * a + b} = "
        f"{a + times * a + b}.",
        a + times * a + b,
    )


STORIES: dict[str, Callable[[random.Random], Story]] = {
    "buys and gives": _buys_and_gives,
    "shares": _shares,
    "two days": _two_days,
    "price": _price,
    "two kinds": _two_kinds,
}


def _gets_more(rng: random.Random) -> Story:
    name, he, _ = rng.choice(_PEOPLE)
    thing, a, b = rng.choice(_THINGS), rng.randint(2, 9), rng.randint(2, 9)
    return (
        f"{name} has {a} {thing} and gets {b} more. How many {thing} does {he} have now?",
        f"{he.capitalize()} has {a} + {b} = {a + b} {thing}.",
        a + b,
    )


def _gives_away(rng: random.Random) -> Story:
    name, he, his = rng.choice(_PEOPLE)
    thing, kin, b, left = (
        rng.choice(_THINGS),
        rng.choice(_KIN),
        rng.randint(2, 9),
        rng.randint(1, 9),
    )
    return (
        f"{name} has {left + b} {thing} and gives {b} of them to {his} {kin}. How many {thing} "
        f"does {he} have left?",
        f"{he.capitalize()} has {left + b} - {b} = {left} {thing} left.",
        left,
    )


ONE_STEP: dict[str, Callable[[random.Random], Story]] = {
    "gets more": _gets_more,
    "gives away": _gives_away,
}


def draw_word_problems(
    n: int,
    seed: int,
    exclude: Iterable[str] = (),
    stories: Mapping[str, Callable[[random.Random], Story]] | None = None,
) -> Dataset:
    """n distinct problems, the kinds of `stories` in turn.

    Args:
        n: how many.
        seed: the same seed gives the same rows.
        exclude: prompts that must not occur (the test set's, when this is the training set).
        stories: `STORIES` by default; `ONE_STEP` for a single sum of small numbers each.

    Returns:
        Rows {"prompt", "completion", "kind"}; the completion ends in `#### <answer>`.

    Raises:
        BadInputError: n < 1, or more than can be drawn.
    """
    if n < 1:
        raise BadInputError(f"n must be at least 1, not {n}.")
    stories = STORIES if stories is None else stories
    rng, kinds = random.Random(f"word problems/{seed}"), list(stories)
    taken, rows, tries = set(exclude), [], 0
    while len(rows) < n:
        tries += 1
        if tries > 20 * n + 1000:
            raise BadInputError(f"Only {len(rows):,} of {n:,} word problems could be drawn.")
        kind = kinds[len(rows) % len(kinds)]
        question, steps, answer = stories[kind](rng)
        prompt = PROMPT.format(question=question)
        if prompt not in taken:
            taken.add(prompt)
            completion = f" {steps}\n#### {answer}"
            rows.append({"prompt": prompt, "completion": completion, "kind": kind})
    rng.shuffle(rows)
    return Dataset("word_problems", "all", tuple(rows), "generated", f"seed {seed}")


def word_problems(train: int, test: int, seed: int) -> tuple[Dataset, Dataset]:
    """Disjoint training and test rows; the test rows are drawn first."""
    held = draw_word_problems(test, seed)
    rows = draw_word_problems(train, seed + 1_000_003, exclude=[r["prompt"] for r in held])
    return (
        Dataset("word_problems", "train", rows.rows, "generated", f"seed {seed}"),
        Dataset("word_problems", "test", held.rows, "generated", f"seed {seed}"),
    )


def last_number(text: str) -> str:
    """What GSM8K's flexible filter takes: the last number in a text, "" where there is none."""
    found = FLEXIBLE.findall(text)
    return _plain("".join(found[-1])) if found else ""


def marked_number(text: str) -> str:
    """What GSM8K's strict filter takes: the first number behind `####`, "" where there is none."""
    found = STRICT.findall(text)
    return _plain(found[0]) if found else ""


def _plain(number: str) -> str:
    # lm-eval ignores commas, dollar signs, and a full stop at the end of both texts.
    return re.sub(r"\.$", "", number.replace(",", "").replace("$", ""))


def judge_numbers(answers: Sequence[str], expected: Sequence[str]) -> tuple[list[bool], list[bool]]:
    """(strict, flexible) for each answer, as lm-eval judges GSM8K."""
    wanted = [marked_number(text) for text in expected]
    strict = [marked_number(a) == w for a, w in zip(answers, wanted, strict=True)]
    flexible = [last_number(a) == w for a, w in zip(answers, wanted, strict=True)]
    return strict, flexible
