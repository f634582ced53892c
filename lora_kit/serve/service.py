"""What a server serves: an engine, its adapters, the names they answer to, and its limits."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lora_kit.errors import (
    BadInputError,
    LoraKitError,
    NotAvailableError,
    UnknownNameError,
    unknown_name,
)
from lora_kit.serve.folder import MOST_BYTES, adapter_folder, check_name
from lora_kit.serve.metrics import Metrics
from lora_kit.serve.protocol import Refusal

AUTO = "auto"  # the model name that asks the router


@dataclass(frozen=True)
class Limits:
    """What a server allows. body_bytes: of one request; adapter_bytes: of one adapter's files;
    seconds: of one completion; body_seconds: for a body to arrive; retry_seconds: what a full
    server tells its clients to wait."""

    body_bytes: int = 1 << 20
    adapter_bytes: int = MOST_BYTES
    seconds: float = 120.0
    body_seconds: float = 10.0
    retry_seconds: int = 1


@dataclass
class Service:
    """What the handlers need: the engine and what stands around it.

    base: the name under which the bare base is served. folder: the adapter folder. route: picks an
    adapter's name, or None for the base, from a prompt; None where there is no router.
    """

    engine: object
    pool: object
    tokenizer: object
    base: str
    folder: Path
    limits: Limits
    metrics: Metrics
    api_key: str | None = None
    route: Callable[[str], str | None] | None = None
    hosts: tuple[str, ...] = ()
    started: int = field(default_factory=lambda: int(time.time()))

    def names(self) -> list[str]:
        return sorted(self.pool.names())

    def without_folder(self, text: str) -> str:
        """A message with the adapter folder's own path left out: it is no client's business."""
        for folder in (self.folder.resolve(), self.folder):
            text = text.replace(f"{folder}/", "")
        return text

    def adapter_of(self, model: str, prompt) -> str | None:
        """The adapter that `model` names; None for the base.

        Raises:
            Refusal: 404, nothing of that name; 400, "auto" where it cannot be.
        """
        if model == self.base:
            return None
        if model in self.pool.names():
            return model
        if model == AUTO and self.route is not None:
            if not isinstance(prompt, str):
                raise Refusal(400, "The router reads texts, not token ids.", "invalid_value")
            return self.route(prompt)
        known = [self.base, *self.names(), *([AUTO] if self.route else [])]
        raise Refusal(404, str(unknown_name("model", model, known)), "model_not_found", "model")


def model_card(service: Service, name: str) -> dict:
    parent = None if name == service.base else service.base
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "lora-kit",
        "root": name,
        "parent": parent,
    }


def load_adapter(service: Service, name: str, path: str | None = None) -> None:
    """Add an adapter of the adapter folder to the pool and read it, so that a broken one is
    refused now.

    Raises:
        BadInputError: a name or path that is none, a name that is taken, another base;
        NotAvailableError: no such adapter; CorruptFileError: files that are not one.
    """
    if name in (service.base, AUTO):
        raise BadInputError(f"{name!r} is what the base or the router answers to: take another.")
    if name in service.pool.names():
        raise BadInputError(f"Adapter {name!r} is loaded already: unload it first.")
    folder = adapter_folder(service.folder, name, path, service.limits.adapter_bytes)
    service.pool.add(name, folder)
    try:
        service.pool.load(name)
    except BaseException:
        service.pool.remove(name)
        raise


def unload_adapter(service: Service, name: str) -> None:
    """Take an adapter out of the pool; its files stay.

    Raises:
        BadInputError: a name that is none; UnknownNameError: nothing of that name is loaded.
    """
    if check_name(name) not in service.pool.names():
        raise unknown_name("adapter", name, service.names())
    service.pool.remove(name)


def refusal_of(service: Service, error: LoraKitError) -> Refusal:
    """The HTTP answer to one of the kit's own errors."""
    message = service.without_folder(" ".join(str(error).split()))
    if isinstance(error, UnknownNameError):
        return Refusal(404, message, "not_found")
    if type(error).__name__ == "BusyError":
        return Refusal(429, message, "server_full", retry_after=service.limits.retry_seconds)
    if isinstance(error, NotAvailableError):
        return Refusal(404, message, "not_found")
    if isinstance(error, BadInputError):
        return Refusal(400, message, "invalid_value")
    return Refusal(500, message, "failed")
