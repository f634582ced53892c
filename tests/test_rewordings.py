"""Other ways of asking: every skill has some, and each says what the prompt was about."""

import pytest

from lora_kit.errors import BadInputError, UnknownNameError
from lora_kit.rewordings import REWORDINGS, phrased, reworded
from lora_kit.skills import SKILLS, draw_skill


def test_every_skill_has_four_ways_and_none_is_the_skills_own():
    assert set(REWORDINGS) == set(SKILLS)
    for name, ways in REWORDINGS.items():
        row = draw_skill(name, 2, 1, 0)[0]
        about = row["prompt"].removesuffix("=").split(" ", 1)[-1]
        said = [reworded(name, row["prompt"], way) for way in range(len(ways))]
        assert len(set(said)) == len(ways) == 4
        for text in said:
            assert about in text
            assert "{" not in text
            assert text != row["prompt"]


def test_examples():
    assert reworded("reversal", "reverse 417=", 0) == "Write 417 backwards."
    assert reworded("case", "upper red hat=", 2) == "Shout: red hat"
    assert reworded("addition", "12+34=", 0) == "What is 12+34?"


def test_what_cannot_be_reworded():
    with pytest.raises(UnknownNameError, match="Did you mean 'reversal'"):
        reworded("reversl", "reverse 417=", 0)
    with pytest.raises(BadInputError, match="4 other ways of asking, counted from 0"):
        reworded("reversal", "reverse 417=", 4)
    with pytest.raises(BadInputError, match="no prompt of reversal: those look like 'reverse 05='"):
        reworded("reversal", "sort 417=", 0)


def test_rows_are_put_in_these_ways_by_turns():
    rows = [{"prompt": f"reverse 41{i}="} for i in range(4)]
    assert phrased("reversal", rows, [None, 2]) == [
        *("reverse 410=", "Turn 411 around", "reverse 412=", "Turn 413 around")
    ]
    assert phrased("reversal", rows[:1], [0]) == ["Write 410 backwards."]
