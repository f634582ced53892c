"""Generated tasks of LoRA Land's kinds: seeded, disjoint, and with answers that are right."""

import json
import re

import pytest

from lora_kit.errors import BadInputError, UnknownNameError
from lora_kit.skills_land import LAND_SKILLS, TABLES, TOPICS, draw_land_skill


@pytest.mark.parametrize("name", sorted(LAND_SKILLS))
def test_rows_are_seeded_distinct_and_disjoint(name):
    train, test = draw_land_skill(name, 300, 60, 3)
    assert (len(train), len(test)) == (300, 60)
    prompts = [row["prompt"] for row in (*train, *test)]
    assert len(set(prompts)) == 360
    assert all(row["completion"].startswith(" ") for row in train)
    assert not any(row["prompt"][-1].isspace() for row in train)
    again = draw_land_skill(name, 300, 60, 3)
    assert again[0].fingerprint == train.fingerprint
    assert draw_land_skill(name, 300, 60, 4)[0].fingerprint != train.fingerprint


def test_entities_stand_in_their_sentence():
    for row in draw_land_skill("entities", 200, 1, 0)[0]:
        sentence = re.findall(r'Input: "(.*)"', row["prompt"])[-1]
        found = json.loads(row["completion"])
        assert set(found) == {"person", "firm", "place"}
        assert found["person"]
        for kind in found.values():
            for name in kind:
                assert name in sentence


def test_meaning_says_all_that_was_given():
    for row in draw_land_skill("meaning", 200, 1, 0)[0]:
        said = row["completion"]
        for key, value in re.findall(r"(\w+)\[([^\]]*)\]", row["prompt"]):
            if key == "children":
                assert ("welcome" in said) == (value == "yes")
            else:
                assert value in said


def test_sql_runs_over_its_table():
    import sqlite3

    made = sqlite3.connect(":memory:")
    for table, columns in TABLES.items():
        made.execute(f"CREATE TABLE {table} ({', '.join(columns)})")
    for row in draw_land_skill("sql", 200, 1, 0)[0]:
        made.execute(row["completion"])


def test_topics_follow_from_the_words():
    for row in draw_land_skill("topic", 200, 1, 0)[0]:
        topic = row["completion"].strip()
        line = row["prompt"].split("Headline: ")[1]
        assert sum(word in line for word in TOPICS[topic]) >= 2
    assert {r["completion"] for r in draw_land_skill("topic", 200, 1, 0)[0]} == {
        f" {topic}" for topic in TOPICS
    }


def test_claims_follow_or_do_not():
    answers = set()
    for row in draw_land_skill("entail", 300, 1, 0)[0]:
        said, claim = re.match(r"Statement: (.*)\nClaim: (.*)\n", row["prompt"]).groups()
        place = said.removesuffix(".").split(" in ")[1]
        answer = row["completion"].strip()
        answers.add(answer)
        if " was in " in claim:
            assert (place in claim) == (answer == "yes")
        if "nothing" in claim:
            assert answer == "no"
        if "owns" in claim or "also" in claim:
            assert answer == "unknown"
        assert not re.search(r"\ba [aeiou]", claim)
    assert answers == {"yes", "no", "unknown"}


def test_what_cannot_be_drawn():
    with pytest.raises(UnknownNameError, match="Did you mean 'topic'"):
        draw_land_skill("topics", 5, 5, 0)
    with pytest.raises(BadInputError, match="at least 1"):
        draw_land_skill("topic", 5, 0, 0)
    with pytest.raises(BadInputError, match="hardly more than"):
        draw_land_skill("topic", 6_000, 5, 0)
