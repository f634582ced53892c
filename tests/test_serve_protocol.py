"""Requests: what is understood, and one clear sentence for each thing that is not."""

import json

import pytest

from lora_kit.serve.protocol import (
    AdapterRequest,
    ChatRequest,
    CompletionRequest,
    Refusal,
    choice,
    envelope,
    event,
    parse,
    piece,
)


def body(**fields):
    return json.dumps({"model": "m", "prompt": "p"} | fields).encode()


def refused(raw, kind=CompletionRequest):
    with pytest.raises(Refusal) as caught:
        parse(raw, kind)
    error = caught.value
    assert error.status == 400
    assert error.body["error"]["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("one", ["one"]),
        (["one", "two"], ["one", "two"]),
        ([5, 6], [[5, 6]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ],
)
def test_a_prompt_in_its_four_forms(prompt, wanted):
    assert parse(body(prompt=prompt), CompletionRequest).prompts == wanted


def test_defaults_and_values():
    asked = parse(body(), CompletionRequest)
    assert (asked.max_tokens, asked.temperature, asked.stream, asked.stops) == (
        None,
        0.0,
        False,
        (),
    )
    asked = parse(
        body(max_tokens=5, stop="\n", seed=3, stream=True, stream_options={"include_usage": True}),
        CompletionRequest,
    )
    assert (asked.max_tokens, asked.stops, asked.seed, asked.with_usage) == (5, ("\n",), 3, True)
    chat = {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "max_completion_tokens": 7,
    }
    assert parse(json.dumps(chat).encode(), ChatRequest).most_tokens == 7


def test_message_parts_become_one_text():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    chat = {"model": "m", "messages": [{"role": "developer", "content": parts}]}
    asked = parse(json.dumps(chat).encode(), ChatRequest)
    assert asked.messages[0].to_dict() == {"role": "system", "content": "ab"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"seed": 2**64}, "seed"),
        ({"model": ""}, "model"),
        ({"model": None}, "model"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"stream": "perhaps"}, "stream"),
    ],
)
def test_values_out_of_range_are_named(fields, param):
    error = refused(body(**fields))
    assert error.param == param
    assert error.message.startswith(f"{param}: ")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": []}, "prompt takes 1 to 64 prompts"),
        ({"prompt": ["p"] * 65}, "prompt takes 1 to 64 prompts"),
        ({"stop": ["a"] * 5}, "stop takes up to 4 texts"),
        ({"stop": ""}, "stop takes up to 4 texts"),
        ({"n": 2}, "n is not supported here"),
        ({"logprobs": 3}, "logprobs is not supported here"),
        ({"echo": True}, "echo is not supported here"),
        ({"top_p": 0.5}, "top_p is not supported here"),
    ],
)
def test_what_is_not_done_is_said(fields, message):
    assert message in refused(body(**fields)).message


def test_harmless_values_and_unknown_fields_pass():
    parse(body(n=1, top_p=1, echo=False, logprobs=None, user="me", metadata={}), CompletionRequest)


def test_bodies_that_are_none():
    error = refused(b'{"model": "m", "prompt": "\xff\xfe"}')
    assert (error.code, error.message) == (
        "invalid_encoding",
        "The body is not UTF-8 (byte 26): encode it so.",
    )
    assert refused(b"{").code == "invalid_json"
    assert refused(b"[1]").code == "invalid_json"
    assert refused(b"").code == "invalid_json"
    assert refused(b"[" * 100_000).code == "invalid_json"
    assert refused(b'{"max_tokens": ' + b"9" * 5000 + b"}").code == "invalid_json"
    assert refused(b'{"model": "m", "prompt": "\\ud800"}').code == "invalid_encoding"
    assert refused(b'{"model": "m", "prompt": "p", "temperature": NaN}').param == "temperature"


def test_adapter_requests():
    assert parse(b'{"lora_name": "a"}', AdapterRequest).lora_path is None
    refused(b'{"lora_path": "a"}', AdapterRequest)
    refused(b'{"lora_name": 5}', AdapterRequest)


def test_shapes_of_answers():
    head = envelope(True, True, "m", "chatcmpl-1", 5)
    assert head == {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 5,
        "model": "m",
    }
    assert choice(False, 0, "hi", "stop") == {
        "index": 0,
        "text": "hi",
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert choice(True, 0, "hi", "stop")["message"] == {"role": "assistant", "content": "hi"}
    assert piece(True, 0, "", None, first=True)["delta"] == {"role": "assistant", "content": ""}
    assert piece(True, 0, None, "stop")["delta"] == {}
    assert event({"a": "é"}) == 'data: {"a": "é"}\n\n'
    assert event("[DONE]") == "data: [DONE]\n\n"
    full = Refusal(429, "Full.", "server_full", retry_after=2)
    assert full.headers == {"Retry-After": "2"}
    assert full.body["error"]["type"] == "rate_limit_error"
