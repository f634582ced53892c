"""Product data of a shop: pairs of listings from two catalogues, divided and turned into questions.

A pair is {"left": {title, manufacturer, price}, "right": {…}, "label": 0 or 1}; 1 means the same
product. `divide` keeps whole manufacturers out of training, so that a method can be asked about
products of a house it has never seen; every pair of one left product stands in one part only.

Four tasks are made from them (`TASKS`): `match` (blocked candidates, as a shop meets them),
`match_random` (as many random pairs as matches, which is how ECInstruct built its product
matching), `extract` (manufacturer and price as JSON), `rank` (the match among four candidates).
"""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_kit.errors import BadInputError, unknown_name

TASKS = ("match", "match_random", "extract", "rank")
PARTS = ("train", "validation", "inside", "outside")
ATTRIBUTES = ("manufacturer", "price")
CANDIDATES = 4
COLUMNS = ("left_title", "right_title", "label")
OPTIONAL = ("left_manufacturer", "left_price", "right_manufacturer", "right_price")
_YES_NO = {"0": 0, "1": 1, "no": 0, "yes": 1}


@dataclass(frozen=True)
class Shop:
    """Pairs in four parts. inside: new products of manufacturers met in training; outside: of the
    `held_out` ones, by key. `dropped`: why pairs were left out, and how many."""

    train: tuple[dict, ...]
    validation: tuple[dict, ...]
    inside: tuple[dict, ...]
    outside: tuple[dict, ...]
    held_out: tuple[str, ...]
    dropped: Mapping[str, int]

    def part(self, name: str) -> tuple[dict, ...]:
        if name not in PARTS:
            raise unknown_name("part", name, PARTS)
        return getattr(self, name)


# ------------------------------------------------------------------ reading and checking


def check_pair(row: Mapping, where: str) -> dict:
    """A pair as it must be, prices as numbers or None.

    Raises:
        BadInputError: a missing field, an empty title, a label outside 0/1/yes/no, or a price that
            is no number above 0; `where` names the row.
    """
    sides = {}
    for side in ("left", "right"):
        listing = row.get(side)
        if not isinstance(listing, Mapping):
            raise BadInputError(f"{where} has no {side} product (title, manufacturer, price).")
        title = listing.get("title")
        if not isinstance(title, str) or not title.strip():
            raise BadInputError(f"{where}: the {side} title is empty; give it one or leave it out.")
        price = check_price(listing.get("price"), f"{where}, {side} price")
        maker = str(listing.get("manufacturer") or "").strip()
        sides[side] = {"title": title.strip(), "manufacturer": maker, "price": price}
    label = str(row.get("label", "")).strip().lower()
    if label not in _YES_NO:
        raise BadInputError(
            f"{where}: the label must be one of {', '.join(_YES_NO)}, not {row.get('label')!r}."
        )
    return {**sides, "label": _YES_NO[label]}


def check_price(price, where: str) -> float | None:
    """The price as a number; None where there is none ("" or null).

    Raises:
        BadInputError: neither a number above 0 nor nothing.
    """
    if price is None or (isinstance(price, str) and not price.strip()):
        return None
    try:
        value = float(price)
    except (TypeError, ValueError):
        value = math.nan
    if isinstance(price, bool) or not math.isfinite(value) or value < 0:
        raise BadInputError(f"{where} {price!r} is no number; write 19.99, or leave it empty.")
    return value


def read_pairs(path: Path) -> list[dict]:
    """Pairs from a CSV, TSV or JSONL file of one's own.

    A table has the columns left_title, right_title, label (yes/no or 1/0) and, where known,
    left_manufacturer, left_price, right_manufacturer, right_price; JSON lines may also hold `left`
    and `right` as objects.

    Raises:
        BadInputError: missing columns (all named), or what `check_pair` finds; the row is named.
        CorruptFileError: the file cannot be read.
    """
    from lora_kit.data_files import read_file

    path = Path(path)
    rows = read_file(path)
    if not rows:
        raise BadInputError(f"{path.name} has no rows.")
    made = []
    for number, row in enumerate(rows, 1):
        where = f"{path.name} row {number}"
        if not isinstance(row, Mapping):
            raise BadInputError(f"{where} is a {type(row).__name__}, not an object.")
        if "left" not in row:
            missing = [c for c in COLUMNS if row.get(c) is None]
            if missing:
                raise BadInputError(
                    f"{where} lacks {', '.join(missing)}; the columns are {', '.join(COLUMNS)} "
                    f"and, where known, {', '.join(OPTIONAL)}."
                )
            sides = {
                side: {k: row.get(f"{side}_{k}") for k in ("title", "manufacturer", "price")}
                for side in ("left", "right")
            }
            row = {**sides, "label": row["label"]}
        made.append(check_pair(row, where))
    return made


def load_pairs(source: str = "amazon_google") -> list[dict]:
    """Pairs by name or file: "amazon_google" (all splits of LORA_KIT_DATA's copy), "generated", or
    a file that `read_pairs` takes.

    Raises:
        NotAvailableError: amazon_google is not at hand; and what `read_pairs` raises.
    """
    if source == "generated":
        return generated_pairs()
    if source == "amazon_google":
        from lora_kit.data import load_rows

        rows = [r for s in ("train", "validation", "test") for r in load_rows(source, s)]
        return [check_pair(row, f"{source} row {i}") for i, row in enumerate(rows, 1)]
    return read_pairs(Path(source).expanduser())


# ------------------------------------------------------------------ dividing


def words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case."""
    return re.findall(r"[a-z0-9]+", text.lower())


def maker_key(manufacturer: str) -> str:
    """What two spellings of a manufacturer share: its first word that says something ("microsoft
    software" and "microsoft licenses" are one)."""
    said = [w for w in words(manufacturer) if w not in ("the", "inc", "software")]
    return said[0] if said else ""


def divide(
    pairs: Sequence[Mapping], seed: int, outside: float = 0.2, parts=(0.6, 0.2, 0.2)
) -> Shop:
    """Divide pairs by manufacturer and by left product; a function of the pairs and the seed.

    Manufacturers are drawn until about `outside` of the pairs belong to them. A pair of the other
    manufacturers whose titles name a drawn one is left out altogether. What remains is divided by
    left product: `parts` for train, validation and inside. Pairs that stand twice with both labels
    are left out, those that stand twice with one label count once.

    Raises:
        BadInputError: a part would be empty.
    """
    dropped: Counter[str] = Counter()
    labels = defaultdict(set)
    for pair in pairs:
        labels[_titles(pair)].add(pair["label"])
    kept, seen = [], set()
    for pair in pairs:
        titles = _titles(pair)
        if len(labels[titles]) > 1:
            dropped["both labels"] += 1
        elif titles in seen:
            dropped["stands twice"] += 1
        else:
            seen.add(titles)
            kept.append(dict(pair))
    rng = random.Random(f"divide/{seed}")
    sizes = Counter(maker_key(p["left"]["manufacturer"]) for p in kept)
    keys = sorted(k for k in sizes if k)
    rng.shuffle(keys)
    held: list[str] = []
    total, limit = 0, outside * len(kept)
    for key in keys:
        if total < limit and total + sizes[key] <= 1.25 * limit:
            held.append(key)
            total += sizes[key]
    away, home = [], []
    for pair in kept:
        side = away if maker_key(pair["left"]["manufacturer"]) in held else home
        side.append(pair)
    theirs = {p["left"]["title"] for p in away}
    known, home = home, []
    for pair in known:
        if names_any(pair, held):
            dropped["names a held-out manufacturer"] += 1
        elif pair["left"]["title"] in theirs:
            dropped["has the title of a held-out product"] += 1
        else:
            home.append(pair)
    products = sorted({p["left"]["title"] for p in home})
    rng.shuffle(products)
    edges = [round(sum(parts[:i]) * len(products)) for i in range(4)]
    where = {t: i for i in range(3) for t in products[edges[i] : edges[i + 1]]}
    sides = [[p for p in home if where[p["left"]["title"]] == i] for i in range(3)]
    for name, side in zip(PARTS, (*sides, away), strict=True):
        if not any(p["label"] for p in side) or all(p["label"] for p in side):
            raise BadInputError(
                f"The part {name} would hold no {'match' if side else 'pair'}: "
                f"{len(pairs)} pairs of {len(sizes)} manufacturers are too few to divide."
            )
    return Shop(*(tuple(s) for s in (*sides, away)), tuple(sorted(held)), dict(dropped))


def names_any(pair: Mapping, keys: Sequence[str]) -> bool:
    """Whether a pair names one of the manufacturers, in a title or as either manufacturer."""
    said = {w for s in ("left", "right") for w in words(pair[s]["title"])}
    said |= {maker_key(pair[s]["manufacturer"]) for s in ("left", "right")}
    return bool(said & set(keys))


def _titles(pair: Mapping) -> tuple[str, str]:
    return pair["left"]["title"], pair["right"]["title"]


# ------------------------------------------------------------------ questions


def questions(task: str, pairs: Sequence[Mapping], seed: int = 0, most: int = 0) -> list[dict]:
    """The questions of a task over a part's pairs: {prompt, completion} and what scoring needs.

    match, match_random: `pair` and `truth` 0/1. extract: `listing` and `truth` {attribute: value or
    None}. rank: `pairs`, one for each candidate, and `truth`, the right one's place.

    Args:
        task: one of TASKS.
        pairs: of one part.
        seed: draws random pairs, the candidates' order, and which questions where `most` cuts.
        most: at most so many; 0 for all.

    Raises:
        UnknownNameError: no such task; BadInputError: the pairs make no question.
    """
    makers = {
        "match": lambda p, r: [_match(pair) for pair in p],
        "match_random": _random_pairs,
        "extract": _extract,
        "rank": _rank,
    }
    if task not in makers:
        raise unknown_name("shop task", task, TASKS)
    rng = random.Random(f"{task}/{seed}")
    made = makers[task](pairs, rng)
    if not made:
        raise BadInputError(f"{len(pairs)} pairs make no question of the task {task}.")
    rng.shuffle(made)
    return made[:most] if most else made


def listing_text(listing: Mapping) -> str:
    """A listing in one line: its title and, where known, its price."""
    price = listing["price"]
    return listing["title"] if price is None else f"{listing['title']}, {price:.2f} USD"


def _match(pair: Mapping) -> dict:
    prompt = (
        f"First: {listing_text(pair['left'])}\nSecond: {listing_text(pair['right'])}\n"
        "Are the two the same product? Answer yes or no.\nAnswer:"
    )
    answer = " yes" if pair["label"] else " no"
    return {"prompt": prompt, "completion": answer, "pair": dict(pair), "truth": pair["label"]}


def _random_pairs(pairs, rng) -> list[dict]:
    matches = [p for p in pairs if p["label"]]
    same = {_titles(p) for p in matches}
    rights = [p["right"] for p in pairs]
    made = list(matches)
    for pair in matches:
        other = rng.choice(rights)
        while (pair["left"]["title"], other["title"]) in same:
            other = rng.choice(rights)
        made.append({"left": pair["left"], "right": other, "label": 0})
    return [_match(pair) for pair in made]


def maker_in_title(title: str, manufacturer: str) -> str | None:
    """The longest beginning of the manufacturer's name that stands in the title, word by word."""
    said, name = words(title), words(manufacturer)
    for n in range(len(name), 0, -1):
        if any(said[i : i + n] == name[:n] for i in range(len(said) - n + 1)):
            return " ".join(name[:n])
    return None


def _extract(pairs, rng) -> list[dict]:
    made = {}
    for pair in pairs:
        left = pair["left"]
        truth = {
            "manufacturer": maker_in_title(left["title"], left["manufacturer"]),
            "price": left["price"],
        }
        text = listing_text(left)
        prompt = (
            f"Listing: {text}\nGive the manufacturer and the price that it names as JSON, null for "
            "what it does not name.\nJSON:"
        )
        answer = f" {json.dumps(truth)}"
        made[text] = {"prompt": prompt, "completion": answer, "listing": text, "truth": truth}
    return [made[text] for text in sorted(made)]


def _rank(pairs, rng) -> list[dict]:
    groups = defaultdict(list)
    for pair in pairs:
        groups[pair["left"]["title"]].append(pair)
    made = []
    for title in sorted(groups):
        right = [p for p in groups[title] if p["label"]]
        wrong = [p for p in groups[title] if not p["label"]]
        if not right or len(wrong) < CANDIDATES - 1:
            continue
        chosen = [rng.choice(right), *rng.sample(wrong, CANDIDATES - 1)]
        rng.shuffle(chosen)
        letters = [chr(ord("A") + i) for i in range(CANDIDATES)]
        lines = [f"{x}: {listing_text(p['right'])}" for x, p in zip(letters, chosen, strict=True)]
        truth = next(i for i, p in enumerate(chosen) if p["label"])
        prompt = (
            f"Wanted: {listing_text(chosen[0]['left'])}\n" + "\n".join(lines) + "\n"
            "Which one is the wanted product? Answer with its letter.\nAnswer:"
        )
        facts = {"pairs": [dict(p) for p in chosen], "truth": truth}
        made.append({"prompt": prompt, "completion": f" {letters[truth]}", **facts})
    return made


# ------------------------------------------------------------------ a small table for anybody

_HOUSES = (
    *("brightleaf", "corvane", "dunmore", "ellipta", "fenwick", "grovetech", "halden", "ironbay"),
    *("juniperus", "kestrel", "lumen", "marlow", "northgate", "orbita", "pinecrest", "quillon"),
    *("rosewell", "silverton", "tamarind", "umbrella", "veridian", "wexford", "yarrow", "zephyra"),
)
_KINDS = (
    *("photo editor", "tax planner", "typing tutor", "garden designer", "chess trainer"),
    *("backup suite", "label maker", "map atlas", "music studio", "recipe book"),
)
_EDITIONS = ("standard", "deluxe", "professional", "student")


def generated_pairs(houses: int = 24, products: int = 8, seed: int = 0) -> list[dict]:
    """A made-up catalogue in the layout of Amazon-Google, for a machine without data: easier than
    real listings, and only there to show the road."""
    rng = random.Random(f"generated/{seed}")
    made = []
    for house in _HOUSES[:houses]:
        kinds = rng.sample(_KINDS, products)
        range_of = [
            (k, rng.choice(_EDITIONS), rng.randint(1, 9), rng.randint(9, 250) + 0.99) for k in kinds
        ]
        for kind, edition, version, price in range_of:
            named = f"{house} " if rng.random() < 0.5 else ""
            left = {
                "title": f"{named}{kind} {edition} {version}.0",
                "manufacturer": f"{house} software",
                "price": price if rng.random() < 0.8 else None,
            }
            near = [
                (kind, edition, version, 1),
                (kind, rng.choice([e for e in _EDITIONS if e != edition]), version, 0),
                (kind, edition, version + rng.randint(1, 3), 0),
                *((k, e, v, 0) for k, e, v, _ in rng.sample(range_of, 2) if k != kind),
            ]
            for k, e, v, label in near:
                end = rng.choice((" for windows", " cd rom", "", " download"))
                title = f"{house} {k} {e if rng.random() < 0.8 else e[:3]} v{v}{end}"
                cost = round(price * rng.uniform(0.8, 1.1), 2)
                right = {"title": title, "manufacturer": "", "price": cost}
                made.append({"left": left, "right": right, "label": label})
    return made
