"""The HTTP surface, asked by the real openai client and by clients that mean ill."""

import asyncio
import json
import socket
from dataclasses import replace

import httpx
import openai
import pytest
from serve_fixtures import ScriptedEngine, ScriptedPool, eventually, listening

from lora_kit.serve.metrics import Metrics
from lora_kit.serve.service import Limits, Service

FILES = ("adapter_config.json", "adapter_model.safetensors")


def make_service(tokenizer, folder, engine=None, **options):
    engine = engine or ScriptedEngine()
    return Service(
        engine=engine,
        pool=ScriptedPool("addition", "reversal"),
        tokenizer=tokenizer,
        base="tiny",
        folder=folder,
        limits=options.pop("limits", Limits()),
        metrics=Metrics(engine.stats),
        **options,
    )


@pytest.fixture(scope="module")
def served(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    service = make_service(tokenizer, folder, hosts=("127.0.0.1", "localhost"))
    with listening(service) as address:
        yield service, address


@pytest.fixture
def engine(served):
    engine = served[0].engine
    engine.handles.clear()
    engine.answer = lambda handle: handle.say("4", "6").end()
    engine.places = 10_000
    return engine


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served[1]}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def http(served):
    with httpx.Client(base_url=served[1], timeout=10) as made:
        yield made


def post(http, path="/v1/completions", **fields):
    return http.post(path, json={"model": "addition", "prompt": "12+34="} | fields)


def error(response, status):
    assert response.status_code == status, response.text
    found = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert "\n" not in found["message"]
    return found


# ---- what the openai client sees


def test_a_completion(client, engine, tokenizer):
    done = client.completions.create(model="addition", prompt="12+34=", max_tokens=5, stop="\n")
    assert (done.choices[0].text, done.choices[0].finish_reason) == ("46", "stop")
    assert done.usage.prompt_tokens == len(tokenizer("12+34=")["input_ids"])
    assert (done.usage.completion_tokens, done.model) == (2, "addition")
    asked = engine.handles[0].request
    assert (asked.adapter, asked.max_tokens, asked.stop) == ("addition", 5, ("\n",))
    assert tokenizer.decode(asked.prompt_ids) == "12+34="
    assert asked.temperature == 0.0


def test_a_chat(client, engine, tokenizer):
    messages = [{"role": "user", "content": "hello"}]
    done = client.chat.completions.create(model="tiny", messages=messages, temperature=0.5, seed=7)
    assert done.choices[0].message.content == "46"
    asked = engine.handles[0].request
    assert asked.adapter is None  # the base
    assert "hello" in tokenizer.decode(asked.prompt_ids)
    assert tokenizer.decode(asked.prompt_ids).startswith("<|im_start|>user")
    assert (asked.temperature, asked.seed) == (0.5, 7)


def test_streams(client, engine):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    parts = list(client.completions.create(model="reversal", prompt="x", **options))
    assert "".join(p.choices[0].text for p in parts if p.choices) == "46"
    assert [p.choices[0].finish_reason for p in parts if p.choices] == [None, None, "stop"]
    assert parts[-1].usage.completion_tokens == 2
    messages = [{"role": "user", "content": "hello"}]
    parts = list(client.chat.completions.create(model="tiny", messages=messages, **options))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == "46"


def test_pieces_arrive_when_they_are_said(client, engine):
    engine.answer = lambda handle: handle.say("first")
    with client.completions.create(model="addition", prompt="x", stream=True) as stream:
        assert next(iter(stream)).choices[0].text == "first"  # the answer has not ended
        assert not engine.handles[0].over.is_set()
        engine.handles[0].say(" second").end("length")
        rest = list(stream)
    assert [p.choices[0].text for p in rest] == [" second", ""]
    assert rest[-1].choices[0].finish_reason == "length"


def test_several_prompts_and_token_ids(client, engine):
    done = client.completions.create(model="addition", prompt=["a", "b", "c"])
    assert [c.index for c in done.choices] == [0, 1, 2]
    assert done.usage.completion_tokens == 6
    client.completions.create(model="addition", prompt=[5, 6, 7])
    assert engine.handles[-1].request.prompt_ids == [5, 6, 7]


def test_models(client):
    assert [m.id for m in client.models.list()] == ["tiny", "addition", "reversal"]
    assert client.models.retrieve("addition").parent == "tiny"
    with pytest.raises(openai.NotFoundError, match="Did you mean 'addition'"):
        client.models.retrieve("additon")


def test_clients_errors_are_the_clients_own_classes(client, engine):
    with pytest.raises(openai.NotFoundError, match=r"Unknown model 'additon'\. Did you mean"):
        client.completions.create(model="additon", prompt="x")
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model="addition", prompt="x", max_tokens=-5)
    engine.places = 0
    with pytest.raises(openai.RateLimitError, match="0 places are taken") as caught:
        client.completions.create(model="addition", prompt="x")
    assert caught.value.response.headers["retry-after"] == "1"


# ---- bad input


@pytest.mark.parametrize("body", [b"", b"{", b'"x"', b'{"model": "\xff"}', b"[" * 50_000])
def test_bodies_that_are_no_request(http, body):
    json_type = {"Content-Type": "application/json"}
    error(http.post("/v1/completions", content=body, headers=json_type), 400)


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"max_tokens": 10**30}, None, ""),  # the engine's to refuse: this one takes it
        ({"prompt": ""}, 400, "prompt is empty"),
        ({"prompt": [10**9]}, 400, "not in the vocabulary"),
        ({"model": "../addition"}, 404, "Unknown model"),
        ({"model": "auto"}, 404, "Unknown model"),
        ({"n": 3}, 400, "n is not supported"),
    ],
)
def test_bad_fields(http, engine, fields, status, words):
    response = post(http, **fields)
    if status is None:
        assert response.status_code == 200
    else:
        assert words in error(response, status)["message"]


def test_wrong_ways_of_asking(http):
    assert "application/json" in error(http.post("/v1/completions", content=b"{}"), 415)["message"]
    error(http.get("/v1/completions"), 405)
    error(http.get("/nothing/here"), 404)
    error(http.get("/v1/models", headers={"Host": "evil.example"}), 403)
    assert http.get("/v1/models", headers={"Host": "localhost:1"}).status_code == 200


def test_chat_without_a_template(http, engine, served):
    service = served[0]
    template, service.tokenizer.chat_template = service.tokenizer.chat_template, None
    try:
        response = post(http, "/v1/chat/completions", messages=[{"role": "user", "content": "x"}])
        assert "no chat template" in error(response, 400)["message"]
    finally:
        service.tokenizer.chat_template = template


def test_a_failure_inside_says_no_more_than_it_must(http, engine, served):
    engine.answer = lambda handle: 1 / 0
    found = error(post(http), 500)
    assert "ZeroDivision" not in found["message"]
    engine.answer = lambda handle: handle.say("4").end("error", "Adapter 'addition' is broken.")
    assert "is broken" in error(post(http), 500)["message"]
    engine.answer = lambda handle: handle.say("4").end("deadline")
    assert error(post(http), 504)["code"] == "deadline"
    text = post(http, stream=True).text
    assert '"code": "deadline"' in text
    assert "[DONE]" not in text


# ---- clients that go away, and too many of them


def test_a_client_gone_mid_stream_frees_its_row(client, engine):
    engine.answer = lambda handle: handle.say("first")
    stream = client.completions.create(model="addition", prompt="x", stream=True)
    next(iter(stream))
    stream.close()
    assert eventually(engine.handles[0].cancelled.is_set)


def test_a_client_gone_while_waiting_frees_its_row(served, engine):
    engine.answer = lambda handle: None
    host, port = served[1].removeprefix("http://").split(":")
    body = json.dumps({"model": "addition", "prompt": "x"}).encode()
    with socket.create_connection((host, int(port))) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        assert eventually(lambda: engine.handles)
        assert not engine.handles[0].cancelled.is_set()
    assert eventually(engine.handles[0].cancelled.is_set)


def test_one_of_several_prompts_refused_frees_the_others(http, engine):
    engine.answer = lambda handle: None
    engine.places = 2
    error(post(http, prompt=["a", "b", "c"]), 429)
    assert [h.cancelled.is_set() for h in engine.handles] == [True, True]


def test_a_thousand_at_once(served, engine):
    """As many as there are places are answered, the others told to come again; nobody is lost."""
    engine.places, held = 50, []
    engine.answer = held.append

    async def ask(http):
        response = await http.post("/v1/completions", json={"model": "addition", "prompt": "x"})
        return response.status_code, response.headers.get("retry-after")

    async def ask_all():
        limits = httpx.Limits(max_connections=1000)
        async with httpx.AsyncClient(base_url=served[1], limits=limits, timeout=60) as http:
            tasks = [asyncio.create_task(ask(http)) for _ in range(1000)]
            while sum(t.done() for t in tasks) < 950:
                await asyncio.sleep(0.05)
            for handle in held:
                handle.say("46").end()
            return await asyncio.gather(*tasks)

    answers = asyncio.run(ask_all())
    assert answers.count((200, None)) == 50
    assert answers.count((429, "1")) == 950


# ---- limits, keys, adapters: servers of their own


def test_large_and_slow_bodies(tokenizer, tmp_path):
    limits = Limits(body_bytes=1000, body_seconds=0.3)
    with (
        listening(make_service(tokenizer, tmp_path, limits=limits)) as address,
        httpx.Client(base_url=address) as http,
    ):
        assert "1,000 bytes" in error(post(http, prompt="x" * 2000), 413)["message"]

        def chunks():
            for _ in range(20):
                yield b"x" * 100

        json_type = {"Content-Type": "application/json"}
        error(http.post("/v1/completions", content=chunks(), headers=json_type), 413)
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
            )
            raw.settimeout(5)
            assert b"408" in raw.recv(100)
        assert post(http).status_code == 200


def test_the_api_key(tokenizer, tmp_path):
    with (
        listening(make_service(tokenizer, tmp_path, api_key="a-long-secret")) as address,
        httpx.Client(base_url=address) as http,
    ):
        for given in ("", "Bearer wrong", "a-long-secret", "Basic a-long-secret", "Bearer \u00e9"):
            headers = {"Authorization": given.encode()}
            error(http.get("/v1/models", headers=headers), 401)
            response = http.post("/v1/load_lora_adapter", json={}, headers=headers)
            error(response, 401)
        assert http.get("/health").status_code == 200
        with openai.OpenAI(base_url=f"{address}/v1", api_key="a-long-secret") as client:
            assert client.completions.create(model="addition", prompt="x").choices[0].text == "46"


def test_loading_and_unloading(tokenizer, tmp_path):
    for name in ("sorting", "large"):
        (tmp_path / name).mkdir()
        for file in FILES:
            (tmp_path / name / file).write_bytes(b"x" * (3000 if name == "large" else 10))
    service = make_service(tokenizer, tmp_path, limits=replace(Limits(), adapter_bytes=1000))
    with listening(service) as address, httpx.Client(base_url=address) as http:

        def load(verb="load", **fields):
            return http.post(f"/v1/{verb}_lora_adapter", json=fields)

        assert "added successfully" in load(lora_name="sorting").text
        assert post(http, model="sorting").status_code == 200
        assert "loaded already" in error(load(lora_name="sorting"), 400)["message"]
        assert load(lora_name="again", lora_path="sorting").status_code == 200
        error(load(lora_name="other", lora_path="../outside"), 400)
        error(load(lora_name="../sorting"), 400)
        error(load(lora_name="none"), 404)
        assert "at most" in error(load(lora_name="large"), 400)["message"]
        for taken in ("tiny", "auto"):
            assert "take another" in error(load(lora_name=taken), 400)["message"]
        assert "removed" in load("unload", lora_name="sorting").text
        error(load("unload", lora_name="sorting"), 404)
        error(load("unload", lora_name="a/b"), 400)
        error(post(http, model="sorting"), 404)


def test_an_adapter_that_cannot_be_read_is_not_kept(tokenizer, tmp_path, monkeypatch):
    from lora_kit.errors import CorruptFileError

    (tmp_path / "broken").mkdir()
    for file in FILES:
        (tmp_path / "broken" / file).write_bytes(b"x")
    service = make_service(tokenizer, tmp_path)

    def fail(name):
        raise CorruptFileError(f"{name} is not a whole file.")

    monkeypatch.setattr(service.pool, "load", fail)
    with listening(service) as address, httpx.Client(base_url=address) as http:
        response = http.post("/v1/load_lora_adapter", json={"lora_name": "broken"})
        assert "not a whole file" in error(response, 500)["message"]
        assert service.pool.names() == ["addition", "reversal"]


def test_auto_asks_the_router(tokenizer, tmp_path):
    asked = []

    def route(prompt):
        asked.append(prompt)
        return "reversal" if "reverse" in prompt else None

    service = make_service(tokenizer, tmp_path, route=route)
    with (
        listening(service) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="x") as client,
    ):
        assert "auto" in [m.id for m in client.models.list()]
        assert client.completions.create(model="auto", prompt="reverse 1=").model == "reversal"
        assert client.completions.create(model="auto", prompt="hello").model == "tiny"
        messages = [{"role": "user", "content": "reverse 2="}]
        assert client.chat.completions.create(model="auto", messages=messages).model == "reversal"
        with pytest.raises(openai.BadRequestError, match="reads texts, not token ids"):
            client.completions.create(model="auto", prompt=[1, 2])
    assert asked == ["reverse 1=", "hello", "reverse 2="]  # not the template around it


def test_health_and_metrics(tokenizer, tmp_path):
    service = make_service(tokenizer, tmp_path)
    with listening(service) as address, httpx.Client(base_url=address) as http:
        assert service.engine.started == 1
        assert http.get("/health").json() == {"status": "ok", "model": "tiny"}
        post(http)
        post(http, model="tiny", stream=True)
        post(http, model="none")
        text = http.get("/metrics").text
        for line in (
            'lora_kit_http_requests_total{path="/v1/completions",status="200"} 2.0',
            'lora_kit_http_requests_total{path="/v1/completions",status="404"} 1.0',
            'lora_kit_completions_total{adapter="addition",reason="stop"} 1.0',
            'lora_kit_tokens_total{adapter="tiny",kind="completion"} 2.0',
            "lora_kit_first_token_seconds_count 2.0",
            "lora_kit_engine_running 0.0",
        ):
            assert line in text, line
    assert service.engine.started == 0  # stopped with the server
