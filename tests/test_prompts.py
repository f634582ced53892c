"""What the model sees and which tokens it learns, to the exact token."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kit.errors import BadInputError
from lora_kit.prompts import (
    ALPACA,
    ALPACA_WITH_INPUT,
    IGNORE,
    Example,
    alpaca_prompt,
    chat_prompt,
    encode,
    prompt_ids,
    show_mask,
    to_example,
)


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("12+34=", "46"), ("reverse 417=", "714"), ("a", ""), ("naïve ", " 𝛼 b\n"), ("x ", "  y")],
)
def test_the_masks_edge(tokenizer, prompt, completion):
    encoded = encode(tokenizer, Example(prompt, completion))
    before = tokenizer(prompt)["input_ids"]
    after = tokenizer(completion)["input_ids"] + [tokenizer.eos_token_id]
    assert encoded["input_ids"] == before + after
    assert encoded["labels"] == [IGNORE] * len(before) + after
    assert tokenizer.decode(after[:-1]) == completion


@settings(deadline=None, max_examples=50)
@given(prompt=st.text(min_size=1), completion=st.text(), max_length=st.integers(1, 40))
def test_any_text_keeps_its_edge_and_its_length(tokenizer, prompt, completion, max_length):
    whole = encode(tokenizer, Example(prompt, completion), 10_000)
    learnt = [t for t in whole["labels"] if t != IGNORE]
    assert learnt == whole["input_ids"][-len(learnt) :]
    assert learnt[-1] == tokenizer.eos_token_id
    cut = encode(tokenizer, Example(prompt, completion), max_length)
    assert cut["input_ids"] == whole["input_ids"][:max_length]
    assert cut["labels"] == whole["labels"][:max_length]


def test_a_row_cut_within_its_prompt_teaches_nothing(tokenizer):
    encoded = encode(tokenizer, Example("0123456789", "5"), max_length=10)
    assert set(encoded["labels"]) == {IGNORE}
    assert set(encode(tokenizer, Example("0123456789", "5"), max_length=11)["labels"]) != {IGNORE}


def test_eos_is_learnt_also_where_it_pads(tokenizer):
    import copy

    same = copy.deepcopy(tokenizer)
    same.pad_token = same.eos_token
    assert encode(same, Example("a", "b"))["labels"][-1] == same.eos_token_id


def test_show_mask_brackets_what_is_learnt(tokenizer):
    shown = show_mask(tokenizer, encode(tokenizer, Example("1+2=", "3")))
    assert shown == "1+2=⟦3⟧⟦<|im_end|>⟧"


def test_one_bos_on_a_bare_prompt_and_one_on_a_templated_one(llama_tokenizer):
    bos = llama_tokenizer.bos_token_id
    templated = chat_prompt(llama_tokenizer, [{"role": "user", "content": "hi"}])
    assert templated.startswith("<s>")
    assert llama_tokenizer(templated)["input_ids"][:2] == [bos, bos]  # the trap
    for prompt in (templated, "hi", ""):
        assert prompt_ids(llama_tokenizer, prompt).count(bos) == 1
        assert encode(llama_tokenizer, Example(prompt, "x"))["input_ids"].count(bos) == 1


def test_a_tokenizer_without_bos_adds_none(tokenizer):
    assert prompt_ids(tokenizer, "hi") == tokenizer("hi", add_special_tokens=False)["input_ids"]


def test_prompt_completion_rows(tokenizer):
    row = {"prompt": "1+1=", "completion": "2", "digits": 1}
    assert to_example(row) == Example("1+1=", "2")
    assert to_example(row, "alpaca") == Example(ALPACA.format(instruction="1+1="), "2")
    chat = to_example(row, "chat", tokenizer)
    assert chat.prompt == "<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n"
    assert chat.completion == "2"


@pytest.mark.parametrize("given", ["", None, "some input"])
def test_alpaca_rows(tokenizer, given):
    row = {"instruction": "Say {x}", "input": given, "output": "done"}
    template = ALPACA_WITH_INPUT if given else ALPACA
    assert to_example(row, "alpaca") == Example(
        template.replace("{instruction}", "Say {x}").replace("{input}", given or ""), "done"
    )
    bare = f"Say {{x}}\n\n{given}" if given else "Say {x}"
    assert to_example(row) == Example(bare, "done")
    assert f"user\n{bare}<|im_end|>" in to_example(row, "chat", tokenizer).prompt


def test_alpaca_prompts_end_where_the_answer_starts():
    for prompt in (alpaca_prompt("a"), alpaca_prompt("a", "b")):
        assert prompt.endswith("### Response:\n")
    assert "### Input:\nb\n" in alpaca_prompt("a", "b")
    assert "### Input" not in alpaca_prompt("a")


def test_a_row_without_the_input_field():
    assert to_example({"instruction": "a", "output": "b"}, "alpaca").prompt == alpaca_prompt("a")


def test_messages(tokenizer):
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]
    example = to_example({"messages": turns}, "chat", tokenizer)
    assert example.completion == "a"
    assert example.prompt == chat_prompt(tokenizer, turns[:2])
    assert example.prompt.endswith("u<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": []}, "end with the assistant's"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "end with the assistant's"),
        ({"messages": [{"role": "user", "content": "u"}] * 2}, "end with the assistant's"),
        ({"question": "q", "answer": "a"}, r"fields \['answer', 'question'\] is neither prompt"),
        ({"prompt": "p"}, "is neither prompt"),
        ({}, "is neither prompt"),
        ({"prompt": "1+1=", "completion": 2}, "must be texts, not 2"),
        ({"prompt": None, "completion": "2"}, "must be texts, not None"),
    ],
)
def test_rows_of_no_known_shape(tokenizer, row, says):
    with pytest.raises(BadInputError, match=says):
        to_example(row, "bare", tokenizer)


def test_an_unknown_style():
    with pytest.raises(BadInputError, match="one of bare, alpaca, chat, not 'chatml'"):
        to_example({"prompt": "a", "completion": "b"}, "chatml")


def test_chat_without_a_template(tokenizer):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    for lacking in (bare, None):
        with pytest.raises(BadInputError, match="no chat template; use style='alpaca'"):
            to_example({"prompt": "a", "completion": "b"}, "chat", lacking)
