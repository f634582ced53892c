"""Answers in the order asked, the same in any batch, with the adapter each prompt names."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lora_kit.errors import BadInputError
from lora_kit.generation import exact_match, generate
from lora_kit.prompts import prompt_ids

PROMPTS = ["12+34=", "reverse 417=", "a", "Below is an instruction", "7+8=", "user 5 assistant"]


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    from lora_kit.models import load_model

    return load_model(str(tiny_folder), "float32")


def by_hand(model, tokenizer, prompt, steps):
    """Greedy decoding by one full forward pass a token."""
    ids = prompt_ids(tokenizer, prompt)
    start = len(ids)
    for _ in range(steps):
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
        if token == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_greedy_answers_in_order(loaded):
    answers = generate(loaded.model, loaded.tokenizer, PROMPTS, max_new_tokens=6)
    wanted = [by_hand(loaded.model, loaded.tokenizer, p, 6) for p in PROMPTS]
    assert answers == wanted
    assert len(set(answers)) > 3  # a model that says one thing only would prove nothing


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_any_batch_size_gives_the_same(loaded, batch_size):
    alone = [generate(loaded.model, loaded.tokenizer, [p], 8)[0] for p in PROMPTS]
    assert generate(loaded.model, loaded.tokenizer, PROMPTS, 8, batch_size) == alone


def test_the_tokenizer_stays_as_it_was(loaded):
    side = loaded.tokenizer.padding_side
    generate(loaded.model, loaded.tokenizer, PROMPTS[:2], 1)
    assert loaded.tokenizer.padding_side == side


def test_answers_end_at_eos(loaded, monkeypatch):
    """With a later token of an answer called EOS, the model stops there."""
    heard = []

    def listen(tokenizer):
        decode = tokenizer.batch_decode

        def heard_decode(new, **options):
            heard.append((new[0].tolist(), options))
            return decode(new, **options)

        monkeypatch.setattr(tokenizer, "batch_decode", heard_decode)

    ended = copy.deepcopy(loaded.tokenizer)
    listen(loaded.tokenizer)
    generate(loaded.model, loaded.tokenizer, ["12+34="], 8)
    tokens = heard[0][0]
    place = next(i for i in range(2, 8) if tokens[i] not in tokens[:i])
    ended.eos_token = ended.convert_ids_to_tokens(tokens[place])
    listen(ended)
    generate(loaded.model, ended, ["12+34="], 8)
    assert heard[1] == (tokens[: place + 1], {"skip_special_tokens": True})


@pytest.fixture(scope="module")
def two_adapters(tiny_folder):
    from lora_kit.models import load_model

    model = load_model(str(tiny_folder), "float32").model
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "up_proj"])
    torch.manual_seed(0)
    model = get_peft_model(model, config, adapter_name="one")
    model.add_adapter("two", config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def test_each_prompt_has_its_adapter(loaded, two_adapters):
    tokenizer = loaded.tokenizer
    names = ["one", "two", "__base__"] * 2
    mixed = generate(two_adapters, tokenizer, PROMPTS, 6, 4, adapter_names=names)
    for name in ("one", "two"):
        two_adapters.set_adapter(name)
        alone = generate(two_adapters, tokenizer, PROMPTS, 6)
        assert [a for a, n in zip(mixed, names, strict=True) if n == name] == [
            a for a, n in zip(alone, names, strict=True) if n == name
        ]
    base = generate(loaded.model, tokenizer, PROMPTS, 6)
    assert [mixed[2], mixed[5]] == [base[2], base[5]]
    assert mixed != base


def test_nothing_to_ask(loaded):
    assert generate(loaded.model, loaded.tokenizer, []) == []


@pytest.mark.parametrize(
    ("prompts", "options", "says"),
    [
        ("12+34=", {}, "prompts must be a list of texts"),
        (["a", ""], {}, "Prompt 1 is empty"),
        (["a"], {"max_new_tokens": 0}, "must be at least 1"),
        (["a"], {"batch_size": 0}, "must be at least 1"),
        (["a", "b"], {"adapter_names": ["one"]}, "1 adapter names for 2 prompts"),
    ],
)
def test_bad_input(loaded, prompts, options, says):
    with pytest.raises(BadInputError, match=says):
        generate(loaded.model, loaded.tokenizer, prompts, **options)


def test_exact_match():
    assert exact_match([" 46\n", "46.", "", "4 6"], ["46", "46", "", "46"]) == [
        True,
        False,
        True,
        False,
    ]
    with pytest.raises(ValueError, match="zip"):
        exact_match(["1"], ["1", "2"])
