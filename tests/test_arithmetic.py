"""Sums as text: forms, prompts, measures."""

import pytest

from lora_kit.arithmetic import (
    FORMS,
    carries,
    edit_distance,
    error_kind,
    find_form,
    in_form,
    operands,
)
from lora_kit.errors import BadInputError, UnknownNameError
from lora_kit.skills import draw_skill

SUMS = draw_skill("addition", (1, 2, 5, 14), 40, 0).rows


@pytest.mark.parametrize("name", FORMS)
def test_what_a_form_writes_it_reads(name):
    for row in in_form(SUMS, name):
        assert FORMS[name].read(row["completion"]) == row["sum"]
        assert FORMS[name].read(row["completion"] + "\n7") == row["sum"]
        assert len(row["completion"]) <= FORMS[name].tokens(row["digits"])


def test_forms_as_the_module_shows_them():
    row = [{"prompt": "57+68=", "completion": "125", "digits": 2}]
    written = {name: in_form(row, name)[0] for name in FORMS}
    assert written["plain"]["completion"] == "125"
    assert written["reversed"]["completion"] == "521"
    assert written["both_reversed"]["prompt"] == "75+86="
    assert written["scratchpad"]["completion"] == "7+8+0=15;5+6+1=12;1"
    question, answer = written["hinted"]["prompt"], written["hinted"]["completion"]
    # 57+68: one letter for both units and the sum's, the next one for the tens.
    units, tens = question[2], question[0]
    assert question == f"{tens}5{units}7+{tens}6{units}8="
    assert answer == f"{units}5{tens}2{chr(ord(tens) + 1)}1"
    assert ord(tens) == ord(units) + 1


def test_a_scratchpad_that_slips_is_read_as_it_slipped():
    read = FORMS["scratchpad"].read
    assert read("7+8+0=15;5+6+0=11;1") == "115"
    assert read("7+8+0=15;5+6+1=12") == "", "unfinished"
    assert read("7+8=15;5+6+1=12;1") == "", "another form"
    assert read("") == read(";") == ""


def test_hints_meet_every_letter_and_have_an_end():
    letters = {c for row in in_form(SUMS, "hinted") for c in row["completion"] if c.isalpha()}
    assert len(letters) > 20
    long = draw_skill("addition", 26, 1, 0).rows
    with pytest.raises(BadInputError, match="at most 25 digits"):
        in_form(long, "hinted")


def test_prompts_and_examples():
    row = {"prompt": "12+34=", "completion": "46", "digits": 2}
    shown = {2: [{"prompt": "10+11=", "completion": "21", "digits": 2}]}
    bare = in_form([row], "reversed", "bare", shown)[0]
    assert bare["prompt"] == "10+11=12\n12+34="
    assert bare["completion"] == "64"
    told = in_form([row], "plain", "instruct", shown)[0]
    assert told["prompt"].endswith("Question: 10+11=\nAnswer: 21\n\nQuestion: 12+34=\nAnswer:")
    assert told["completion"] == " 46"
    assert FORMS["plain"].read(told["completion"]) == "46"
    with pytest.raises(BadInputError, match="bare, instruct"):
        in_form([row], "plain", "polite")
    with pytest.raises(UnknownNameError, match="reversed"):
        find_form("reverse")


def test_carries_are_counted_in_the_operands():
    assert carries("57", "68") == (2, 2)
    assert carries("999", "1") == (3, 3)
    assert carries("905", "105") == (2, 1), "units and hundreds, not next to each other"
    assert carries("12", "34") == (0, 0)
    for row in SUMS:
        a, b = operands(row)
        # Kummer: the digit sums tell the number of carries.
        digit_sum = sum(map(int, a + b)) - sum(map(int, row["completion"]))
        assert carries(a, b)[0] == digit_sum // 9


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("1000", "right"),
        ("", "unreadable"),
        ("100", "length"),
        ("1001", "carry"),
        ("1900", "carry"),
        ("1020", "other"),
    ],
)
def test_kinds_of_error(answer, kind):
    assert error_kind(answer, "1000") == kind


def test_edit_distance_is_rapidfuzz_and_by_hand():
    assert edit_distance("125", "125") == 0
    assert edit_distance("15", "125") == 1
    assert edit_distance("521", "125") == 2


def test_reversed_sums_are_what_another_model_of_the_kit_learnt():
    """The shipped models of `tinylm` write sums units first and were trained through other code: if
    a form wrote, asked or read reversed sums wrongly, their answers would be wrong here."""
    import torch

    from lora_kit.tinylm import ALPHABET, STOP, encode_text, load_addition_model

    model, form = load_addition_model(), find_form("reversed")
    rows = in_form(list(draw_skill("addition", 2, 40, seed=1)), "reversed")
    right = 0
    for row in rows:
        ids = encode_text(row["prompt"])
        with torch.no_grad():
            for _ in range(form.tokens(2)):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == STOP:
                    break
        text = "".join(ALPHABET[i] for i in ids[len(row["prompt"]) :])
        right += form.read(text) == row["sum"]
    assert right >= 36
