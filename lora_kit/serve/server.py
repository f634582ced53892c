"""The HTTP server: OpenAI-style completions over an engine, one base and many adapters.

    GET  /v1/models                  the base and its adapters
    POST /v1/completions             `model` names the base, an adapter, or "auto" (a router picks)
    POST /v1/chat/completions
    POST /v1/load_lora_adapter       {"lora_name", "lora_path"}, as vLLM names them
    POST /v1/unload_lora_adapter     {"lora_name"}
    GET  /health, /metrics

Everything a client can do wrong is answered with OpenAI's error object. A full queue answers 429
with Retry-After; a client that goes away frees its place.
"""

from __future__ import annotations

import hmac
import logging
from contextlib import asynccontextmanager
from functools import partial

import anyio
from anyio import to_thread
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from lora_kit.errors import LoraKitError, unknown_name
from lora_kit.prompts import chat_prompt
from lora_kit.serve import protocol
from lora_kit.serve.completions import complete
from lora_kit.serve.metrics import CONTENT_TYPE
from lora_kit.serve.protocol import Refusal
from lora_kit.serve.service import (
    AUTO,
    Limits,
    Service,
    load_adapter,
    model_card,
    refusal_of,
    unload_adapter,
)


def create_app(service: Service) -> FastAPI:
    """The application; it starts and stops the engine with itself."""

    @asynccontextmanager
    async def lifespan(_app):
        service.engine.start()
        # A waiting completion holds a thread that sleeps; the engine bounds how many there are.
        service.threads = anyio.CapacityLimiter(2048)
        try:
            yield
        finally:
            await to_thread.run_sync(service.engine.stop)

    app = FastAPI(
        title="lora-kit", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan
    )
    app.state.service = service
    app.add_middleware(_Guard, service=service)
    app.add_exception_handler(Refusal, _answer_refusal)
    app.add_exception_handler(LoraKitError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http)

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok", "model": service.base})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/v1/models")
    async def models() -> Response:
        served = [model_card(service, n) for n in (service.base, *service.names())]
        if service.route:
            served.append(model_card(service, AUTO))
        return JSONResponse({"object": "list", "data": served})

    @app.get("/v1/models/{name}")
    async def model(name: str) -> Response:
        if name not in (service.base, *service.names(), *([AUTO] if service.route else [])):
            known = [service.base, *service.names()]
            raise Refusal(404, str(unknown_name("model", name, known)), "model_not_found", "model")
        return JSONResponse(model_card(service, name))

    @app.post("/v1/load_lora_adapter")
    async def load(request: Request) -> Response:
        asked = protocol.parse(await _body(request, service), protocol.AdapterRequest)
        await to_thread.run_sync(partial(load_adapter, service, asked.lora_name, asked.lora_path))
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload(request: Request) -> Response:
        asked = protocol.parse(await _body(request, service), protocol.AdapterRequest)
        await to_thread.run_sync(unload_adapter, service, asked.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = protocol.parse(await _body(request, service), protocol.CompletionRequest)
        return await complete(service, request, asked, asked.prompts, asked.max_tokens, False)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = protocol.parse(await _body(request, service), protocol.ChatRequest)
        messages = [m.to_dict() for m in asked.messages]
        prompt = await to_thread.run_sync(chat_prompt, service.tokenizer, messages)
        # The router knows prompts as users write them, not the template around them.
        said = next((m["content"] for m in reversed(messages) if m["role"] == "user"), prompt)
        return await complete(service, request, asked, [prompt], asked.most_tokens, True, said)

    return app


async def _body(request: Request, service: Service) -> bytes:
    """The body, if it is not too large and does not take too long."""
    limits, parts, size = service.limits, [], 0
    try:
        with anyio.fail_after(limits.body_seconds):
            async for part in request.stream():
                size += len(part)
                if size > limits.body_bytes:
                    raise _too_large(limits)
                parts.append(part)
    except TimeoutError:
        raise Refusal(
            408, f"The body did not arrive within {limits.body_seconds:g} s.", "timeout"
        ) from None
    return b"".join(parts)


def _too_large(limits: Limits) -> Refusal:
    return Refusal(413, f"The body is larger than {limits.body_bytes:,} bytes.", "too_large")


class _Guard:
    """What is checked before a handler sees a request: host, key, size, kind of body. Counts the
    answers. Plain ASGI, so that a stream passes through as it comes."""

    def __init__(self, app, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        begun = False

        async def counted(message):
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                route = scope.get("route")
                path = getattr(route, "path", "other")
                self.service.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        refusal = self.check(Request(scope))
        app = self.app if refusal is None else _response(refusal)
        try:
            await app(scope, receive, counted)
        except Exception:  # answered here, so that the connection outlives it
            logging.getLogger(__name__).exception("%s failed", scope["path"])
            if not begun:
                unforeseen = Refusal(
                    500, "Something failed inside; the server's log says what.", "bug"
                )
                await _response(unforeseen)(scope, receive, counted)

    def check(self, request: Request) -> Refusal | None:
        service, headers = self.service, request.headers
        # A web page can make a browser ask any local port; it cannot choose these two headers.
        host = headers.get("host", "").rpartition(":")[0] or headers.get("host", "")
        if service.hosts and host.strip("[]") not in service.hosts:
            return Refusal(403, "This host name is not served here.", "wrong_host")
        if request.method == "POST":
            if headers.get("content-type", "").split(";")[0].strip() != "application/json":
                return Refusal(415, "Send Content-Type: application/json.", "wrong_type")
            length = headers.get("content-length", "")
            if length.isdigit() and int(length) > service.limits.body_bytes:
                return _too_large(service.limits)
        if service.api_key and request.url.path.startswith("/v1"):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.encode(), service.api_key.encode())
            if scheme.lower() != "bearer" or not right:
                return Refusal(
                    401, "Send the API key: Authorization: Bearer KEY.", "invalid_api_key"
                )
        return None


def _response(refusal: Refusal) -> JSONResponse:
    return JSONResponse(refusal.body, refusal.status, headers=refusal.headers)


async def _answer_refusal(_request, error: Refusal) -> Response:
    return _response(error)


async def _answer_error(request, error: LoraKitError) -> Response:
    service = request.app.state.service
    return _response(refusal_of(service, error))


async def _answer_http(_request, error: HTTPException) -> Response:
    codes = {404: "not_found", 405: "method_not_allowed"}
    return _response(
        Refusal(error.status_code, f"{error.detail}.", codes.get(error.status_code, "http"))
    )
