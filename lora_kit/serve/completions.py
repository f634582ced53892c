"""From a checked request to an answer: submit, wait or stream, cancel when the client has gone."""

from __future__ import annotations

from functools import partial

import anyio
from anyio import to_thread
from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from lora_kit.errors import BadInputError
from lora_kit.prompts import prompt_ids
from lora_kit.serve import protocol
from lora_kit.serve.protocol import Refusal
from lora_kit.serve.service import AUTO, Service

DEFAULT_TOKENS = 64


async def complete(service, request, asked, prompts, most, chat, said=None) -> Response:
    handles, counts, adapters = [], [], []
    try:
        for prompt in prompts:
            chosen = await to_thread.run_sync(service.adapter_of, asked.model, said or prompt)
            made = partial(_submit, service, asked, prompt, most, chosen)
            handle, count = await to_thread.run_sync(made)
            handles.append(handle)
            counts.append(count)
            adapters.append(chosen or service.base)
    except BaseException:
        _cancel(handles)
        raise
    finish = partial(_count, service, adapters, counts)
    # "auto" is answered in the name of whoever answered.
    name = adapters[0] if asked.model == AUTO else asked.model
    head = (chat, asked.stream, name, protocol.new_id(chat), protocol.now())
    if asked.stream:
        pieces = _stream(service, handles, counts, head, asked.with_usage, finish)
        quiet = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(pieces, media_type="text/event-stream", headers=quiet)
    ended = await _results(service, request, handles)
    for i, one in enumerate(ended):
        finish(i, one)
    for one in ended:
        if one.reason not in protocol.REASONS:
            raise _ended_badly(service, one)
    choices = [
        protocol.choice(chat, i, one.text, protocol.REASONS[one.reason])
        for i, one in enumerate(ended)
    ]
    used = protocol.usage(sum(counts), sum(_written(one) for one in ended))
    return JSONResponse({**protocol.envelope(*head), "choices": choices, "usage": used})


def _submit(service: Service, asked, prompt, most, adapter):
    """Hand one prompt to the engine; returns its handle and how many tokens the prompt has."""
    from lora_kit.serve.engine import Request as EngineRequest

    ids = prompt if isinstance(prompt, list) else prompt_ids(service.tokenizer, prompt)
    if not ids:
        raise BadInputError("The prompt is empty: say something.")
    vocabulary = len(service.tokenizer)
    if max(ids) >= vocabulary:
        raise BadInputError(f"Token {max(ids)} is not in the vocabulary of {vocabulary:,}.")
    wanted = EngineRequest(
        prompt_ids=ids,
        adapter=adapter,
        max_tokens=DEFAULT_TOKENS if most is None else most,
        stop=asked.stops,
        deadline_s=service.limits.seconds,
        seed=asked.seed,
        temperature=asked.temperature,
    )
    return service.engine.submit(wanted), len(ids)


async def _results(service: Service, request: Request, handles) -> list:
    """What each handle ends with; cancelled as soon as the client has gone."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        _cancel(handles)

    try:
        async with anyio.create_task_group() as group:
            group.start_soon(watch)
            ended = [
                await to_thread.run_sync(h.result, limiter=service.threads, abandon_on_cancel=True)
                for h in handles
            ]
            group.cancel_scope.cancel()
    except BaseException:
        _cancel(handles)
        raise
    return ended


async def _stream(service: Service, handles, counts, head, with_usage, finish):
    """Server-sent events: pieces of text as they come, a reason for each choice, [DONE]."""
    chat, *_ = head
    frame = protocol.envelope(*head) | ({"usage": None} if with_usage else {})
    written, done = 0, 0
    try:
        for i, handle in enumerate(handles):
            if chat:
                yield protocol.event(
                    {**frame, "choices": [protocol.piece(chat, i, "", None, first=True)]}
                )
            pieces = iter(handle)
            step = partial(next, pieces, None)
            while True:
                text = await to_thread.run_sync(
                    step, limiter=service.threads, abandon_on_cancel=True
                )
                if text is None:
                    break
                if text:
                    yield protocol.event(
                        {**frame, "choices": [protocol.piece(chat, i, text, None)]}
                    )
            one = await to_thread.run_sync(handle.result, limiter=service.threads)
            done += 1
            finish(i, one)
            written += _written(one)
            if one.reason not in protocol.REASONS:
                yield protocol.event(_ended_badly(service, one).body)
                return
            last = protocol.piece(chat, i, None, protocol.REASONS[one.reason])
            yield protocol.event({**frame, "choices": [last]})
        if with_usage:
            used = protocol.usage(sum(counts), written)
            yield protocol.event({**frame, "choices": [], "usage": used})
        yield protocol.event("[DONE]")
    finally:
        _cancel(handles[done:])


def _count(service: Service, adapters, counts, i: int, one) -> None:
    service.metrics.completion(adapters[i], counts[i], _written(one), one)


def _written(one) -> int:
    return one.tokens if isinstance(one.tokens, int) else len(one.tokens)


def _cancel(handles) -> None:
    for handle in handles:
        handle.cancel()


def _ended_badly(service: Service, one) -> Refusal:
    if one.reason == "deadline":
        return Refusal(504, "The completion took longer than this server allows.", "deadline")
    if one.reason == "cancelled":
        return Refusal(499, "The request was cancelled.", "cancelled")
    said = getattr(one, "error", None)
    told = service.without_folder(str(said or "The completion failed; others were not harmed."))
    return Refusal(500, told, "failed")
