"""The whole road: a folder of adapters, the real engine, HTTP, the real openai client."""

import asyncio
import json
import socket
import threading
from pathlib import Path

import httpx
import openai
import pytest
from serve_fixtures import eventually, listening
from serve_models import answers_alone, make_adapter

from lora_kit.errors import BadInputError, NotAvailableError
from lora_kit.serve.command import ServeSpec, open_service
from lora_kit.serve.folder import adapters_in

KINDS = {"sorting": (4, "all"), "spelling": (8, "attention"), "dates": (2, "q_proj")}
PROMPTS = ("sort 417=", "spell 52=", "date 2024-03-15=", "x")
TOKENS = 8


@pytest.fixture(scope="module")
def base(tiny_folder):
    from lora_kit.models import load_model

    return lambda *_: load_model(str(tiny_folder), "float32").model


@pytest.fixture(scope="module")
def folder(tmp_path_factory, base):
    root = tmp_path_factory.mktemp("adapters")
    for i, (name, (rank, targets)) in enumerate(KINDS.items()):
        make_adapter(root / name, rank, targets, i, model=base)
    return root


@pytest.fixture(scope="module")
def texts(folder, base, tokenizer):
    """{(adapter, prompt): the answer of transformers' generate with this adapter alone}."""
    return {
        (name, prompt): tokenizer.decode(ids, skip_special_tokens=True)
        for name in (None, *KINDS)
        for prompt, ids in zip(
            PROMPTS,
            answers_alone(tokenizer, name and folder / name, PROMPTS, TOKENS, model=base),
            strict=True,
        )
    }


@pytest.fixture(scope="module")
def served(folder, tiny_folder):
    spec = ServeSpec(str(tiny_folder), folder, max_rows=6, max_waiting=60, dtype="float32")
    service = open_service(spec, adapters_in(folder)[0])
    with listening(service) as address:
        yield service, address
    service.pool.close()


@pytest.fixture
def client(served):
    options = {"base_url": f"{served[1]}/v1", "api_key": "none", "max_retries": 0}
    with openai.OpenAI(timeout=60, **options) as made:
        yield made


def idle(served):
    stats = served[0].engine.stats
    assert eventually(lambda: not stats()["running"] and not stats()["waiting"], 20)
    return stats()["adapters_in_use"], stats()["cache_bytes"]


def test_forty_clients_at_once_get_each_their_own_adapters_answer(served, texts):
    base = served[0].base

    async def ask_all():
        address = f"{served[1]}/v1"
        async with openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0) as made:

            async def ask(name, prompt, stream):
                made_of = {"model": name or base, "prompt": prompt, "max_tokens": TOKENS}
                answer = await made.completions.create(stream=stream, **made_of)
                if not stream:
                    return answer.choices[0].text
                return "".join([part.choices[0].text async for part in answer])

            pairs = list(texts) * 3
            asked = [ask(*pair, stream=i % 2 == 0) for i, pair in enumerate(pairs)]
            return list(zip(pairs, await asyncio.gather(*asked), strict=True))

    answers = asyncio.run(ask_all())
    assert len({text for _, text in answers}) > 8
    for pair, text in answers:
        assert text == texts[pair], pair
    assert idle(served) == (0, 0)


def test_a_chat_goes_through_the_template(client, served, tokenizer, folder, base):
    messages = [{"role": "user", "content": "hello"}]
    done = client.chat.completions.create(model="sorting", messages=messages, max_tokens=TOKENS)
    prompt = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    alone = answers_alone(tokenizer, folder / "sorting", [prompt], TOKENS, model=base)[0]
    assert done.choices[0].message.content == tokenizer.decode(alone, skip_special_tokens=True)
    assert done.usage.prompt_tokens == len(tokenizer(prompt)["input_ids"])


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ({"model": "sortign"}, openai.NotFoundError, "Did you mean 'sorting'"),
        ({"model": "../sorting"}, openai.NotFoundError, "Unknown model"),
        ({"max_tokens": -1}, openai.BadRequestError, "max_tokens"),
        ({"max_tokens": 10**30}, openai.BadRequestError, "together they may be"),
        ({"prompt": "x" * 9000}, openai.BadRequestError, "together they may be"),
        ({"prompt": "\ud800"}, openai.BadRequestError, "surrogate"),
        ({"prompt": [300]}, openai.BadRequestError, "vocabulary"),
        ({"temperature": 9}, openai.BadRequestError, "temperature"),
    ],
    ids=str,
)
def test_bad_requests_are_the_clients_own_errors_and_harm_nobody(
    client, served, texts, fields, kind, words
):
    running, found = threading.Event(), {}

    def beside():
        running.set()
        done = client.completions.create(model="dates", prompt=PROMPTS[2], max_tokens=TOKENS)
        found["text"] = done.choices[0].text

    thread = threading.Thread(target=beside)
    thread.start()
    running.wait(5)
    asked = {"model": "sorting", "prompt": "x", "max_tokens": TOKENS} | fields
    if fields.get("prompt") == "\ud800":  # the client itself cannot encode it; JSON can
        response = httpx.post(f"{served[1]}/v1/completions", content=json.dumps(asked), timeout=30,
                              headers={"Content-Type": "application/json"})  # fmt: skip
        assert response.status_code == 400
        assert words in response.json()["error"]["message"]
    else:
        with pytest.raises(kind, match=words):
            client.completions.create(**asked)
    thread.join(30)
    assert found["text"] == texts["dates", PROMPTS[2]]


def test_bytes_that_are_no_utf8(served):
    body = b'{"model": "sorting", "prompt": "\xff\xfe"}'
    json_type = {"Content-Type": "application/json"}
    response = httpx.post(f"{served[1]}/v1/completions", content=body, headers=json_type)
    assert response.status_code == 400
    assert "not UTF-8" in response.json()["error"]["message"]


def test_a_client_gone_mid_stream_frees_its_row(client, served, texts):
    options = {"model": "sorting", "stream": True, "max_tokens": 1500}
    stream = client.completions.create(prompt=PROMPTS[0], **options)
    next(iter(stream))
    cancelled = served[0].engine.stats()["ended_cancelled"]
    stream.close()
    if served[0].engine.stats()["running"]:  # it had not come to its own end before
        assert eventually(lambda: served[0].engine.stats()["ended_cancelled"] > cancelled, 20)
    host, port = served[1].removeprefix("http://").split(":")
    body = json.dumps({"model": "sorting", "prompt": "x", "max_tokens": 1500}).encode()
    with socket.create_connection((host, int(port))) as raw:  # and one that never reads
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
            b"\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        eventually(lambda: served[0].engine.stats()["running"], 2)
    assert idle(served) == (0, 0)
    done = client.completions.create(model="dates", prompt=PROMPTS[0], max_tokens=TOKENS)
    assert done.choices[0].text == texts["dates", PROMPTS[0]]


def test_adapters_come_and_go_and_broken_ones_are_told(client, served, folder, base, tmp_path):
    def call(verb, **fields):
        return httpx.post(f"{served[1]}/v1/{verb}_lora_adapter", json=fields, timeout=30)

    names = lambda: [m.id for m in client.models.list()]  # noqa: E731
    make_adapter(folder / "late", 3, "mlp", 7, model=base)
    assert call("load", lora_name="late").status_code == 200
    assert "late" in names()
    assert client.completions.create(model="late", prompt="x", max_tokens=2).model == "late"
    assert call("load", lora_name="late").status_code == 400
    weights = folder / "late" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])  # on the device it serves on
    assert client.completions.create(model="late", prompt="x", max_tokens=2).model == "late"
    assert call("unload", lora_name="late").status_code == 200
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="late", prompt="x")
    broken = call("load", lora_name="late")
    assert broken.status_code >= 400
    told = broken.json()["error"]["message"]
    assert told.startswith("late/adapter_model.safetensors is not a whole safetensors file")
    assert str(folder) not in told
    weights.write_bytes(whole)
    other = make_adapter(tmp_path / "other", 2, "attention", 1)  # of another model
    other.rename(folder / "other")
    refused = call("load", lora_name="other")
    assert refused.status_code == 400
    assert "another base" in refused.json()["error"]["message"]
    for path in ("../outside", "/etc", "late/../../x", "late\0"):
        assert call("load", lora_name="trick", lora_path=path).status_code == 400
    assert not {"late", "other", "trick"} & set(names())


def test_two_loads_of_one_adapter_at_once(served, folder, base):
    make_adapter(folder / "twice", 2, "all", 8, model=base)

    async def load_all():
        async with httpx.AsyncClient(base_url=served[1], timeout=30) as http:
            tasks = [
                http.post("/v1/load_lora_adapter", json={"lora_name": "twice"}) for _ in range(6)
            ]
            return [r.status_code for r in await asyncio.gather(*tasks)]

    assert sorted(asyncio.run(load_all())) == [200] + [400] * 5
    assert "twice" in served[0].pool.names()
    served[0].pool.remove("twice")


def test_three_times_as_many_as_there_are_places(served, texts):
    """66 have a place; the others are answered in their turn or told 429; none is lost. (1,000 at
    once: test_serve_server over HTTP, test_serve_engine on the engine.)"""

    async def ask_all():
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=served[1], limits=limits, timeout=120) as http:

            async def ask(number):
                name = list(KINDS)[number % 3]
                fields = {"model": name, "prompt": PROMPTS[0], "max_tokens": TOKENS}
                response = await http.post("/v1/completions", json=fields)
                text = response.json()["choices"][0]["text"] if response.is_success else None
                return response.status_code, name, text

            return await asyncio.gather(*(ask(i) for i in range(200)))

    answers = asyncio.run(ask_all())
    assert {status for status, _, _ in answers} == {200, 429}
    for status, name, text in answers:
        if status == 200:
            assert text == texts[name, PROMPTS[0]]
    assert idle(served) == (0, 0)


def test_what_cannot_be_served_is_told_before_anything_listens(tiny_folder, folder, base, tmp_path):
    with pytest.raises(NotAvailableError, match="no adapter folder"):
        adapters_in(tmp_path / "none")
    clash = tmp_path / "clash"
    make_adapter(clash / Path(tiny_folder).name, 2, "attention", 0, model=base)
    spec = ServeSpec(str(tiny_folder), clash, dtype="float32")
    with pytest.raises(BadInputError, match="what the base or the router answers to"):
        open_service(spec, adapters_in(clash)[0])
