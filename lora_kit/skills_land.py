"""Generated tasks of the kinds LoRA Land measures, small enough for a model of 135M parameters.

    entities  a sentence  →  its people, places and firms as JSON      (as conllpp and bc5cdr)
    meaning   name[Blue Cat], food[Thai], price[low]  →  a sentence    (as e2e_nlg and viggo)
    sql       a question about a table  →  the query                   (as wikisql)
    topic     a headline  →  one of four topics                        (as dbpedia and reuters)
    entail    two statements  →  yes, no or unknown                    (as glue_mnli)

Rows are drawn from a seed. Test rows are drawn first; no training row has a test row's prompt.
(Zhao et al. 2024, section 3.1 and figure 2, for the kinds.)
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from lora_kit.data import Dataset
from lora_kit.errors import BadInputError, unknown_name

FIRST = ("Ada", "Bruno", "Chloe", "David", "Elena", "Farid", "Grace", "Hugo", "Ines", "Jonas")
LAST = ("Adler", "Brook", "Costa", "Dahl", "Evans", "Fischer", "Gupta", "Hale", "Ito", "Jansen")
PLACES = ("Lisbon", "Oslo", "Quito", "Perth", "Cairo", "Leeds", "Turin", "Osaka", "Lima", "Ghent")
FIRM_HEADS = ("North", "Blue", "Silver", "Quick", "Green", "Iron", "Open", "Star")
FIRM_TAILS = ("Foods", "Motors", "Bank", "Labs", "Shipping", "Energy", "Press", "Systems")
FOODS = ("Thai", "French", "Indian", "Greek", "Mexican", "Korean", "Italian", "Turkish")
SPOTS = ("the river", "the station", "the old town", "the harbour", "the park", "the market")
TABLES = {
    "players": ("name", "team", "goals", "age"),
    "films": ("title", "director", "year", "rating"),
    "books": ("title", "author", "pages", "year"),
    "flights": ("number", "origin", "minutes", "price"),
    "lakes": ("name", "country", "area", "depth"),
}
TOPICS = {
    "sport": ("striker", "final", "coach", "league", "penalty", "marathon", "stadium", "medal"),
    "business": ("profit", "shares", "merger", "bank", "exports", "retailer", "loan", "sales"),
    "science": ("telescope", "vaccine", "fossil", "genome", "comet", "battery", "enzyme", "laser"),
    "politics": ("minister", "vote", "treaty", "senate", "ballot", "mayor", "reform", "embassy"),
}
HEADLINES = (
    "{a} and {b} in the news again",
    "What the {a} means for the {b}",
    "After the {a}, all eyes on the {b}",
    "New {a} raises questions about {b}",
    "{place}: {a} overshadows {b}",
    "Inside {place}'s {a} and its {b}",
)
KINDS = (
    *(("dog", "animal"), ("rose", "plant"), ("hammer", "tool"), ("violin", "instrument")),
    *(("apple", "fruit"), ("van", "vehicle"), ("sofa", "piece of furniture"), ("eagle", "bird")),
)


def _entities(rng: random.Random) -> tuple[str, str]:
    people = [f"{rng.choice(FIRST)} {rng.choice(LAST)}" for _ in range(rng.randint(1, 2))]
    firm = f"{rng.choice(FIRM_HEADS)} {rng.choice(FIRM_TAILS)}"
    place = rng.choice(PLACES)
    who = " and ".join(people)
    form = rng.choice(
        (
            "{who} left {firm} and moved to {place} .",
            "In {place} , {firm} hired {who} .",
            "{firm} said on Monday that {who} would open its office in {place} .",
            "{who} of {firm} did not comment .",
        )
    )
    text = form.format(who=who, firm=firm, place=place)
    found = {"person": people, "firm": [firm], "place": [place] if "{place}" in form else []}
    prompt = (
        "Find the people, firms and places of the sentence and answer in JSON.\n\n"
        'Input: "Bruno Ito joined Star Labs ."\n'
        'Output: {"person": ["Bruno Ito"], "firm": ["Star Labs"], "place": []}\n\n'
        f'Input: "{text}"\nOutput:'
    )
    return prompt, " " + json.dumps(found)


def _meaning(rng: random.Random) -> tuple[str, str]:
    name = f"The {rng.choice(FIRM_HEADS)} {rng.choice(('Cat', 'Fox', 'Table', 'Lamp', 'Door'))}"
    food, price, spot = rng.choice(FOODS), rng.choice(("low", "fair", "high")), rng.choice(SPOTS)
    given, said = [f"name[{name}]", f"food[{food}]"], f"{name} serves {food} food"
    if rng.random() < 0.7:
        given.append(f"price[{price}]")
        said += f" at {price} prices"
    if rng.random() < 0.7:
        given.append(f"near[{spot}]")
        said += f" near {spot}"
    if rng.random() < 0.5:
        children = rng.choice(("yes", "no"))
        given.append(f"children[{children}]")
        said += ", and children are " + ("welcome" if children == "yes" else "not allowed")
    prompt = f"Write one sentence that says all of this.\n\n{', '.join(given)}\n\nSentence:"
    return prompt, f" {said}."


def _sql(rng: random.Random) -> tuple[str, str]:
    table = rng.choice(sorted(TABLES))
    name, word, *numbers = TABLES[table]
    number, other = rng.sample(numbers, 2)
    n, value = rng.randint(2, 300), rng.choice(PLACES)
    question, query = rng.choice(
        (
            (
                f"Which {table} have a {number} above {n}?",
                f"{name} FROM {table} WHERE {number} > {n}",
            ),
            (
                f"What is the highest {number} where the {word} is {value}?",
                f"MAX({number}) FROM {table} WHERE {word} = '{value}'",
            ),
            (
                f"How many {table} with {other} below {n} are there?",
                f"COUNT(*) FROM {table} WHERE {other} < {n}",
            ),
            (
                f"What is the average {number} of {table} whose {other} is {n}?",
                f"AVG({number}) FROM {table} WHERE {other} = {n}",
            ),
        )
    )
    columns = ", ".join(TABLES[table])
    prompt = f"Table: {table} ({columns})\nQuestion: {question}\nSQL:"
    return prompt, f" SELECT {query}"


def _topic(rng: random.Random) -> tuple[str, str]:
    topic = rng.choice(sorted(TOPICS))
    a, b = rng.sample(TOPICS[topic], 2)
    line = rng.choice(HEADLINES).format(a=a, b=b, place=rng.choice(PLACES))
    prompt = (
        "Which topic does the headline belong to? The topics are "
        f"{', '.join(sorted(TOPICS))}.\n\nHeadline: {line}\nTopic:"
    )
    return prompt, f" {topic}"


def _entail(rng: random.Random) -> tuple[str, str]:
    who, (thing, kind) = rng.choice(FIRST), rng.choice(KINDS)
    other = rng.choice([k for _, k in KINDS if k != kind])
    place, elsewhere = rng.sample(PLACES, 2)
    said = f"{who} saw {_a(thing)} in {place}."
    answer = rng.choice(("yes", "no", "unknown"))
    then = {
        "yes": rng.choice((f"{who} saw {_a(kind)}.", f"{who} was in {place}.")),
        "no": rng.choice((f"The {thing} was in {elsewhere}.", f"{who} saw nothing in {place}.")),
        "unknown": rng.choice((f"{who} owns {_a(thing)}.", f"{who} also saw {_a(other)}.")),
    }[answer]
    prompt = (
        f"Statement: {said}\nClaim: {then}\n"
        "Does the claim follow from the statement? Answer yes, no or unknown.\nAnswer:"
    )
    return prompt, f" {answer}"


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


LAND_SKILLS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "entities": _entities,
    "meaning": _meaning,
    "sql": _sql,
    "topic": _topic,
    "entail": _entail,
}


def draw_land_skill(name: str, train: int, test: int, seed: int) -> tuple[Dataset, Dataset]:
    """Training and test rows of a generated task, all prompts different.

    Args:
        name: a name of LAND_SKILLS.
        train, test: rows of either side.
        seed: the same seed gives the same rows.

    Raises:
        UnknownNameError: no such task.
        BadInputError: fewer than one row asked for, or more than the generator has.
    """
    if name not in LAND_SKILLS:
        raise unknown_name("generated task", name, LAND_SKILLS)
    if train < 1 or test < 1:
        raise BadInputError(f"train and test must be at least 1, not {train} and {test}.")
    rng, rows = random.Random(f"{name}/{seed}"), {}
    for _ in range(20 * (train + test)):
        prompt, completion = LAND_SKILLS[name](rng)
        rows.setdefault(prompt, {"prompt": prompt, "completion": completion})
        if len(rows) == train + test:
            break
    else:
        raise BadInputError(
            f"{name} has hardly more than {len(rows):,} distinct rows; {train + test:,} were asked "
            "for. Ask for fewer."
        )
    drawn = list(rows.values())
    return (
        Dataset(name, "train", tuple(drawn[test:]), "generated", f"seed {seed}"),
        Dataset(name, "test", tuple(drawn[:test]), "generated", f"seed {seed}"),
    )
