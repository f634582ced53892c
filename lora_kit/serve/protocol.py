"""OpenAI's completion protocol as far as this server speaks it: requests checked, answers shaped.

A body becomes a pydantic model or a `Refusal`, which is an HTTP status and OpenAI's error object.
Fields of the protocol that this server does not do are refused by name when they ask for something;
fields it does not know are left alone, as OpenAI's own clients add some.
"""

from __future__ import annotations

import json
import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

MOST_PROMPTS = 64
MOST_STOPS = 4
MOST_STOP_CHARACTERS = 256

# Asking for one of these with another value than the one here would be answered wrongly in silence.
NOT_DONE = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "suffix": (None, ""),
    "top_p": (None, 1, 1.0),
    "presence_penalty": (None, 0, 0.0),
    "frequency_penalty": (None, 0, 0.0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
}


class Refusal(Exception):
    """A request that is answered with an error. retry_after: seconds, for a server that is full."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.param, self.retry_after = param, retry_after

    @property
    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


TokenIds = Annotated[list[Annotated[int, Field(strict=True, ge=0)]], Field(min_length=1)]


class _Asked(BaseModel):
    """What both kinds of completion share. temperature 0 is greedy, and the default here."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    model: str = Field(min_length=1, max_length=256)
    max_tokens: int | None = Field(None, ge=1, strict=True)
    temperature: float = Field(0.0, ge=0, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    stop: str | list[str] | None = None

    @model_validator(mode="after")
    def _check(self):
        for name, fine in NOT_DONE.items():
            if (self.model_extra or {}).get(name) not in fine:
                raise ValueError(f"{name} is not supported here: leave it out")
        if len(self.stops) > MOST_STOPS or any(
            not 0 < len(s) <= MOST_STOP_CHARACTERS for s in self.stops
        ):
            raise ValueError(
                f"stop takes up to {MOST_STOPS} texts of 1 to {MOST_STOP_CHARACTERS} characters"
            )
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def with_usage(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage"))


class CompletionRequest(_Asked):
    """POST /v1/completions: one or several prompts, as texts or as token ids."""

    prompt: str | list[str] | TokenIds | list[TokenIds]

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        flat = self.prompt and isinstance(self.prompt[0], int)
        return [self.prompt] if flat else list(self.prompt)

    @model_validator(mode="after")
    def _count(self):
        if not 1 <= len(self.prompts) <= MOST_PROMPTS:
            raise ValueError(f"prompt takes 1 to {MOST_PROMPTS} prompts")
        return self


class Part(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def to_dict(self) -> dict[str, str]:
        text = self.content
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_Asked):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=1024)
    max_completion_tokens: int | None = Field(None, ge=1, strict=True)

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class AdapterRequest(BaseModel):
    """POST /v1/load_lora_adapter and /v1/unload_lora_adapter, named as in vLLM."""

    lora_name: str = Field(min_length=1, max_length=256)
    lora_path: str | None = Field(None, max_length=4096)


def parse(body: bytes, kind: type[BaseModel]):
    """The request in a body.

    Raises:
        Refusal: 400; not UTF-8, not JSON, a value out of range or of the wrong type.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as e:
        raise Refusal(
            400, f"The body is not UTF-8 (byte {e.start}): encode it so.", "invalid_encoding"
        ) from None
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise Refusal(400, f"The body is not JSON: {e}.", "invalid_json") from None
    if not isinstance(given, dict):
        raise Refusal(400, "The body must be a JSON object.", "invalid_json")
    try:
        # A lone half of a surrogate pair is legal JSON and no text: no tokenizer takes it.
        json.dumps(given, ensure_ascii=False).encode("utf-8")
    except (UnicodeEncodeError, RecursionError, ValueError):
        raise Refusal(
            400, "The body holds a text that is not Unicode (a lone surrogate).", "invalid_encoding"
        ) from None
    try:
        return kind.model_validate(given)
    except ValidationError as e:
        fault = e.errors()[0]
        where = next((str(x) for x in fault["loc"]), None)
        message = fault["msg"].removeprefix("Value error, ")
        lead = f"{where}: " if where else ""
        raise Refusal(400, f"{lead}{message}.", "invalid_value", where) from None


# ---------------------------------------------------------------------- answers

REASONS = {"stop": "stop", "length": "length"}


def new_id(chat: bool) -> str:
    return f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def envelope(chat: bool, chunk: bool, model: str, number: str, created: int) -> dict[str, Any]:
    """What every answer and every streamed piece of one carries around its choices."""
    kind = "text_completion"
    if chat:
        kind = "chat.completion.chunk" if chunk else "chat.completion"
    return {"id": number, "object": kind, "created": created, "model": model}


def choice(chat: bool, index: int, text: str, reason: str | None) -> dict[str, Any]:
    """A whole answer."""
    said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    return {"index": index, **said, "logprobs": None, "finish_reason": reason}


def piece(
    chat: bool, index: int, text: str | None, reason: str | None, first: bool = False
) -> dict[str, Any]:
    """A part of a streamed answer; `text` None where only the reason is told."""
    if not chat:
        return {"index": index, "text": text or "", "logprobs": None, "finish_reason": reason}
    delta: dict[str, Any] = {"role": "assistant"} if first else {}
    if text is not None:
        delta["content"] = text
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


def event(value: dict[str, Any] | str) -> str:
    """One server-sent event."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"data: {text}\n\n"


def now() -> int:
    return int(time.time())
