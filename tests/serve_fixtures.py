"""A stand-in for the engine, whose every step a test decides, and a server on a free port."""

import queue
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass

from lora_kit.errors import LoraKitError, unknown_name


class BusyError(LoraKitError):
    """As the engine's own: no place is left."""


@dataclass
class Finished:
    text: str
    tokens: list
    reason: str
    first_token_s: float | None = 0.01
    total_s: float = 0.02
    error: str | None = None


class Handle:
    """Pieces a test puts into a queue; None ends them."""

    def __init__(self, request):
        self.request, self.pieces, self.said = request, queue.Queue(), []
        self.reason, self.cancelled, self.over = "stop", threading.Event(), threading.Event()
        self.error = None

    def say(self, *pieces):
        for piece in pieces:
            self.pieces.put(piece)
        return self

    def end(self, reason="stop", error=None):
        self.reason, self.error = reason, error
        self.pieces.put(None)

    def __iter__(self):
        while not self.over.is_set():
            piece = self.pieces.get()
            if piece is None:
                self.over.set()
                return
            self.said.append(piece)
            yield piece

    def cancel(self):
        if not self.over.is_set():
            self.cancelled.set()
            self.end("cancelled")

    def result(self):
        for _ in self:
            pass
        return Finished("".join(self.said), self.said, self.reason, error=self.error)


class ScriptedEngine:
    """`answer(handle)` decides what is said; by default each request is answered at once.

    places: how many requests may be under way.
    """

    def __init__(self, places=10_000):
        self.places, self.handles, self.started = places, [], 0
        self.answer = lambda handle: handle.say("4", "6").end()
        self.lock = threading.Lock()

    def start(self):
        self.started += 1

    def stop(self):
        self.started -= 1
        for handle in self.handles:
            handle.cancel()

    def submit(self, request):
        with self.lock:
            busy = sum(not h.over.is_set() for h in self.handles)
            if busy >= self.places:
                raise BusyError(f"All {self.places} places are taken: try again in a moment.")
            handle = Handle(request)
            self.handles.append(handle)
        self.answer(handle)
        return handle

    def stats(self):
        return {"waiting": 0, "running": sum(not h.over.is_set() for h in self.handles)}


class ScriptedPool:
    def __init__(self, *names):
        self.known = dict.fromkeys(names)

    def names(self):
        return list(self.known)

    def add(self, name, path=None):
        self.known[name] = path

    def load(self, name):
        if name not in self.known:
            raise unknown_name("adapter", name, self.known)

    def remove(self, name):
        del self.known[name]


@contextmanager
def listening(service):
    """Serve in a thread on a free port of this machine; gives the address."""
    import uvicorn

    from lora_kit.serve.command import listen
    from lora_kit.serve.server import create_app

    made = listen("127.0.0.1", 0)
    config = uvicorn.Config(
        create_app(service), log_level="error", timeout_graceful_shutdown=2, backlog=2048
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [made]}, daemon=True)
    thread.start()
    until = time.monotonic() + 20
    while not server.started and time.monotonic() < until:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{made.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        made.close()


def eventually(check, seconds=5.0):
    """Whether `check()` becomes true within some seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if check():
            return True
        time.sleep(0.01)
    return bool(check())
