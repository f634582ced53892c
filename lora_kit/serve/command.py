"""`lora-kit serve`: from a model's name and a folder of adapters to a listening server."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass, replace
from pathlib import Path

from lora_kit.errors import BadInputError
from lora_kit.serve.folder import NAME, adapters_in
from lora_kit.serve.service import AUTO, Limits, Service

GRACE_SECONDS = 10


@dataclass(frozen=True)
class ServeSpec:
    """What to serve, and how widely.

    model: a registry name or a folder. adapters: the adapter folder. host: 127.0.0.1 unless told.
    port: 0 takes a free one. router: a folder `save_router` wrote; the model "auto" asks it.
    max_rows: sequences generated side by side; max_waiting: how many more may wait.
    """

    model: str
    adapters: Path
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    router: Path | None = None
    max_rows: int = 32
    max_waiting: int = 256
    seconds: float = 120.0
    dtype: str = "auto"
    quantization: str = "none"

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise BadInputError(f"port must lie in 0 to 65535, not {self.port}.")
        for name in ("max_rows", "max_waiting", "seconds"):
            if not getattr(self, name) > 0:
                raise BadInputError(f"{name} must be above 0, not {getattr(self, name)}.")
        if self.api_key is not None and len(self.api_key) < 8:
            raise BadInputError("The API key is shorter than 8 characters: choose a longer one.")


def serve(spec: ServeSpec) -> None:
    """Serve until interrupted.

    Raises:
        NotAvailableError: no such adapter folder, model or router; BadInputError: a port that is
            taken or a router of another base.
    """
    found, left_out = adapters_in(spec.adapters)
    listening = listen(spec.host, spec.port)  # before minutes of loading
    with listening:
        service = open_service(spec, found)
        for sentence in left_out:
            print(f"left out: {sentence}")
        host, port = listening.getsockname()[:2]
        if not _is_loopback(spec.host) and not spec.api_key:
            print(f"{host} can be reached from other machines, and no API key is set.")
        names = ", ".join(service.names()) or "no adapter yet"
        print(f"{service.base} with {names}", flush=True)
        print(f"http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)
        run(service, listening)


def run(service: Service, listening: socket.socket) -> None:
    """Serve on a bound socket until interrupted."""
    import uvicorn

    from lora_kit.serve.server import create_app

    config = uvicorn.Config(
        create_app(service),
        log_level="warning",
        access_log=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=GRACE_SECONDS,
        backlog=2048,
        server_header=False,
    )
    uvicorn.Server(config).run(sockets=[listening])


def open_service(spec: ServeSpec, adapters: dict[str, Path]) -> Service:
    """Load the model, put its adapters into a pool, and an engine on top."""
    from lora_kit.models import load_model
    from lora_kit.serve.engine import Engine
    from lora_kit.serve.metrics import Metrics
    from lora_kit.serve.pool import AdapterPool

    loaded = load_model(spec.model, spec.dtype, spec.quantization)
    base = loaded.name if NAME.fullmatch(loaded.name) else "base"
    taken = {base, AUTO} & set(adapters)
    if taken:
        raise BadInputError(
            f"An adapter is called {taken.pop()!r}, which is what the base or the router answers "
            "to: rename its folder."
        )
    pool = AdapterPool(loaded.model, spec.adapters)
    for name, path in adapters.items():
        if name not in pool.names():
            pool.add(name, path)
    engine = Engine(
        loaded.model,
        loaded.tokenizer,
        pool,
        max_rows=spec.max_rows,
        max_waiting=spec.max_waiting,
    )
    service = Service(
        engine=engine,
        pool=pool,
        tokenizer=loaded.tokenizer,
        base=base,
        folder=Path(spec.adapters).resolve(),
        limits=replace(Limits(), seconds=spec.seconds),
        metrics=Metrics(engine.stats),
        api_key=spec.api_key,
        hosts=("127.0.0.1", "localhost", "::1") if _is_loopback(spec.host) else (),
    )
    if spec.router is not None:
        service.route = _router(spec.router, loaded, service)
    return service


def _router(folder: Path, loaded, service: Service):
    """A function from a prompt to an adapter's name or None, checked against base and pool."""
    from lora_kit.serve.router import load_router

    router = load_router(folder, loaded.model)

    def route(prompt: str) -> str | None:
        name = router.route(loaded.model, loaded.tokenizer, [prompt])[0].adapter
        return name if name in service.pool.names() else None

    return route


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to a host and port.

    Raises:
        BadInputError: it is taken, or not this machine's.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as e:
        raise BadInputError(
            f"Cannot listen on {host}:{port} ({e.strerror or e}): name another with --port."
        ) from None
    return made


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
