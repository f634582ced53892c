"""Skills: small tasks generated from a seed, with exact control of their size.

A skill of k digits is a numbered list of all its rows: row i of k-digit addition is one pair of
operands. Drawing rows is then drawing distinct numbers, which is exact for every k, and a test set
is disjoint from a training set because it is drawn first and left out.

    addition     12+34=              46             k: digits of either number
    subtraction  46-12=              34             (the larger number stands first)
    reversal     reverse 417=        714            k: digits
    sorting      sort 417=           147
    largest      largest 417=        7
    spelling     spell 417=          four one seven
    case         upper red hat=      RED HAT        k: words
    dates        date 2024-03-15=    15 March 2024  k: digits of the year
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lora_kit.data import Dataset
from lora_kit.errors import BadInputError, unknown_name

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
MONTH_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)  # 29 February is left out
WORDS = (
    *("apple", "bird", "black", "blue", "boat", "book", "box", "bread", "bridge", "car"),
    *("cat", "chair", "city", "clock", "cloud", "cold", "cow", "dark", "dog", "door"),
    *("egg", "field", "fire", "fish", "flower", "forest", "glass", "gold", "grass", "green"),
    *("hand", "hat", "hill", "horse", "house", "ice", "island", "king", "lake", "lamp"),
    *("leaf", "light", "milk", "moon", "mountain", "night", "ocean", "old", "paper", "queen"),
    *("rain", "red", "river", "road", "salt", "sand", "ship", "small", "snow", "star"),
    *("stone", "sun", "table", "tree"),
)


@dataclass(frozen=True)
class Skill:
    """`space(k)`: how many k-digit rows there are; `row(k, i)`: prompt and completion of row i."""

    name: str
    space: Callable[[int], int]
    row: Callable[[int, int], tuple[str, str]]


def _operands(k: int) -> tuple[int, int]:
    """The lowest k-digit number and how many there are: 0 and 10, then 10^(k-1) and 9·10^(k-1)."""
    return (0, 10) if k == 1 else (10 ** (k - 1), 9 * 10 ** (k - 1))


def _addition_row(k: int, i: int) -> tuple[str, str]:
    low, count = _operands(k)
    a, b = divmod(i, count)
    return f"{low + a}+{low + b}=", str(2 * low + a + b)


def _reversal_row(k: int, i: int) -> tuple[str, str]:
    text = f"{i:0{k}d}"
    return f"reverse {text}=", text[::-1]


def _subtraction_row(k: int, i: int) -> tuple[str, str]:
    # Pairs a ≥ b in the order (0,0) (1,0) (1,1) (2,0) …: a is the triangular root of i.
    low, _ = _operands(k)
    a = (math.isqrt(8 * i + 1) - 1) // 2
    b = i - a * (a + 1) // 2
    return f"{low + a}-{low + b}=", str(a - b)


def _sorting_row(k: int, i: int) -> tuple[str, str]:
    text = f"{i:0{k}d}"
    return f"sort {text}=", "".join(sorted(text))


def _largest_row(k: int, i: int) -> tuple[str, str]:
    text = f"{i:0{k}d}"
    return f"largest {text}=", max(text)


def _spelling_row(k: int, i: int) -> tuple[str, str]:
    text = f"{i:0{k}d}"
    return f"spell {text}=", " ".join(DIGITS[int(c)] for c in text)


def _case_row(k: int, i: int) -> tuple[str, str]:
    words = []
    for _ in range(k):
        i, word = divmod(i, len(WORDS))
        words.append(WORDS[word])
    text = " ".join(words)
    return f"upper {text}=", text.upper()


def _dates_row(k: int, i: int) -> tuple[str, str]:
    year, day = divmod(i, sum(MONTH_DAYS))
    year, month = year + _operands(k)[0], 0
    while day >= MONTH_DAYS[month]:
        day -= MONTH_DAYS[month]
        month += 1
    return f"date {year}-{month + 1:02d}-{day + 1:02d}=", f"{day + 1} {MONTHS[month]} {year}"


def _pairs_in_order(k: int) -> int:
    count = _operands(k)[1]
    return count * (count + 1) // 2


SKILLS: dict[str, Skill] = {
    skill.name: skill
    for skill in (
        Skill("addition", lambda k: _operands(k)[1] ** 2, _addition_row),
        Skill("subtraction", _pairs_in_order, _subtraction_row),
        Skill("reversal", lambda k: 10**k, _reversal_row),
        Skill("sorting", lambda k: 10**k, _sorting_row),
        Skill("largest", lambda k: 10**k, _largest_row),
        Skill("spelling", lambda k: 10**k, _spelling_row),
        Skill("case", lambda k: len(WORDS) ** k, _case_row),
        Skill("dates", lambda k: sum(MONTH_DAYS) * _operands(k)[1], _dates_row),
    )
}


def draw_skill(
    name: str, digits: int | Iterable[int], n: int, seed: int, exclude: Iterable[str] = ()
) -> Dataset:
    """n distinct rows of a skill for each number of digits k.

    `addition` is `"12+34=" → "46"`: both operands have exactly k digits, no leading zeros (k = 1
    draws from 0…9, k ≥ 2 from 10^(k−1)…10^k − 1). `reversal` is `"reverse 417=" → "714"`: copying
    where addition needs carrying; the others stand at the top of this module. Rows carry `digits`
    (k), so that accuracy can be read by length.

    Args:
        name: a name of SKILLS.
        digits: k, or several.
        n: rows for each k.
        seed: the same seed gives the same rows.
        exclude: prompts that must not occur (the test set's, when this is the training set).

    Raises:
        UnknownNameError: no such skill.
        BadInputError: k < 1, n < 1, or fewer than n distinct rows are left.
    """
    if name not in SKILLS:
        raise unknown_name("skill", name, SKILLS)
    if n < 1:
        raise BadInputError(f"n must be at least 1, not {n}.")
    skill, excluded = SKILLS[name], set(exclude)
    rows: list[dict] = []
    for k in _lengths(digits):
        rng = random.Random(f"{name}/{k}/{seed}")
        space = skill.space(k)
        drawn = _draw_distinct(rng, space, min(space, n + len(excluded)))
        pairs = (skill.row(k, i) for i in drawn)
        kept = [(p, c) for p, c in pairs if p not in excluded][:n]
        if len(kept) < n:
            raise BadInputError(
                f"Only {len(kept):,} of the {space:,} {k}-digit rows of {name} are not excluded, "
                f"and {n:,} were asked for; ask for fewer, or for more digits."
            )
        rows += [{"prompt": p, "completion": c, "digits": k} for p, c in kept]
    return Dataset(name, "all", tuple(rows), "generated", f"seed {seed}")


def train_and_test(
    name: str, digits: int | Iterable[int], train: int, test: int, seed: int
) -> tuple[Dataset, Dataset]:
    """Disjoint training and test rows of a skill, both shuffled.

    The test rows, `test` for each k, are drawn first; the training rows are drawn from what is
    left: `train` for each k, or all that is left where a length has fewer (1-digit sums: 100).

    Raises:
        as `draw_skill`; BadInputError also when the test rows leave nothing to train on.
    """
    lengths = _lengths(digits)
    held_out = draw_skill(name, lengths, test, seed)
    prompts = {row["prompt"] for row in held_out}
    rows: list[dict] = []
    for k in lengths:
        left = SKILLS[name].space(k) - test
        if left < 1:
            raise BadInputError(
                f"{test:,} test rows take all {k}-digit rows of {name}; ask for fewer."
            )
        rows += draw_skill(name, k, min(train, left), seed, exclude=prompts).rows
    asked = list(held_out)
    random.Random(seed).shuffle(rows)
    random.Random(seed).shuffle(asked)  # so that the first n test rows are a fair sample
    return (
        Dataset(name, "train", tuple(rows), "generated", f"seed {seed}"),
        Dataset(name, "test", tuple(asked), "generated", f"seed {seed}"),
    )


def _lengths(digits: int | Iterable[int]) -> list[int]:
    lengths = [digits] if isinstance(digits, int) else list(digits)
    for k in lengths:
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise BadInputError(f"The number of digits k must be a whole number from 1, not {k!r}.")
    if not lengths or len(set(lengths)) != len(lengths):
        raise BadInputError(f"The numbers of digits must be one or more, each once, not {lengths}.")
    return lengths


def _draw_distinct(rng: random.Random, space: int, n: int) -> list[int]:
    """n distinct numbers below `space`, in random order."""
    if space < 2**62:
        return rng.sample(range(space), n)
    drawn: dict[int, None] = {}  # beyond what range() can count a repeat is all but impossible
    while len(drawn) < n:
        drawn[rng.randrange(space)] = None
    return list(drawn)
