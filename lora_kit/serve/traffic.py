"""Users who ask again as soon as they are answered: the load of Zhao et al. (2024), section 6.2.

Each of `users` sends a prompt of random tokens, waits for the whole answer, and sends the next; the
adapter of each request is drawn from a list. Of every answer three times are kept, as in the paper:

    total request time = time to first token + token streaming time

They are the engine's own (`handle.clock`), from the moment a request is handed in: no network lies
between.
"""

from __future__ import annotations

import itertools
import random
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from lora_kit.errors import BadInputError, RunFailedError
from lora_kit.serve import handle as handle_module
from lora_kit.serve.engine import Engine
from lora_kit.serve.handle import Request

QUANTITIES = {
    "Total request time": "total_ms",
    "Time to first token, TTFT": "first_ms",
    "Token streaming time": "streaming_ms",
}


@dataclass(frozen=True)
class Traffic:
    """What is asked. adapters: drawn from for each request, None is the base. tokens_in and
    tokens_out: lowest and highest length of prompt and answer; every answer is as long as it was
    drawn. The same seed gives the same requests, whatever answers them.

    Raises:
        BadInputError: nobody asks, or nothing is asked.
    """

    users: int
    requests: int
    adapters: tuple[str | None, ...] = (None,)
    tokens_in: tuple[int, int] = (30, 500)
    tokens_out: tuple[int, int] = (1, 120)
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.users, self.requests, *self.tokens_in, *self.tokens_out) < 1:
            raise BadInputError("users, requests and numbers of tokens must be at least 1.")
        if not self.adapters:
            raise BadInputError("Name at least one adapter; None is the base.")

    def request(self, number: int, vocabulary: int) -> Request:
        """The request of this number."""
        rng = random.Random(self.seed * 1_000_003 + number)
        length, most = rng.randint(*self.tokens_in), rng.randint(*self.tokens_out)
        ids = [rng.randrange(vocabulary) for _ in range(length)]
        adapter = rng.choice(self.adapters)
        return Request(prompt_ids=ids, adapter=adapter, max_tokens=most, ignore_eos=True)


@dataclass(frozen=True)
class Answered:
    """One request: its number, adapter and lengths, when it was handed in (seconds since the
    start), and its times in milliseconds, of which waited_ms until it had a row."""

    number: int
    adapter: str | None
    tokens_in: int
    tokens_out: int
    submitted_s: float
    waited_ms: float
    first_ms: float
    total_ms: float

    @property
    def streaming_ms(self) -> float:
        return self.total_ms - self.first_ms


@dataclass(frozen=True)
class Load:
    """What came of it. seconds: from the first request to the last answer; cpu_seconds: of the
    whole process in that time, which other work on the machine does not lengthen."""

    answered: list[Answered] = field(repr=False)
    seconds: float
    cpu_seconds: float

    @property
    def tokens_a_second(self) -> float:
        """Tokens written, of all users together."""
        return sum(a.tokens_out for a in self.answered) / self.seconds

    def average(self, quantity: str) -> float:
        """Mean milliseconds of a quantity of QUANTITIES."""
        return statistics.fmean(self._values(quantity))

    def p90(self, quantity: str) -> float:
        """Nine in ten take no longer, in milliseconds."""
        values = sorted(self._values(quantity))
        return values[max(0, -(-9 * len(values) // 10) - 1)]

    def row(self) -> dict[str, float]:
        """Average and p90 of each quantity, in milliseconds, and tokens a second."""
        found = {}
        for name in QUANTITIES:
            found[f"{name} / average"] = round(self.average(name), 2)
            found[f"{name} / p90"] = round(self.p90(name), 2)
        return found | {"tokens a second": round(self.tokens_a_second, 2)}

    def _values(self, quantity: str) -> list[float]:
        return [getattr(a, QUANTITIES[quantity]) for a in self.answered]


def drive(engine: Engine | Sequence[Engine], traffic: Traffic, patience: float = 600.0) -> Load:
    """Let the users ask until all requests are answered.

    Args:
        engine: running; of several each gets the next request in turn.
        patience: seconds one answer may take.

    Raises:
        RunFailedError: a request that did not end well. What `submit` raises: a queue too short for
            the users, requests too long for the model.
    """
    engines = [engine] if isinstance(engine, Engine) else list(engine)
    vocabulary = engines[0].model.get_input_embeddings().weight.shape[0]
    numbers, lock = itertools.count(), threading.Lock()
    answered: list[Answered] = []
    failed: list[BaseException] = []

    def user() -> None:
        try:
            while not failed:
                with lock:
                    number = next(numbers)
                if number >= traffic.requests:
                    return
                request = traffic.request(number, vocabulary)
                handle = engines[number % len(engines)].submit(request)
                done = handle.result(patience)
                if done.reason != "length":
                    raise RunFailedError(f"Request {number} ended with {done.reason}: {done.error}")
                times = [1000 * s for s in (done.waited_s, done.first_token_s, done.total_s)]
                lengths = len(request.prompt_ids), len(done.tokens)
                at = handle.submitted - started
                answered.append(Answered(number, request.adapter, *lengths, at, *times))
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=user, daemon=True) for _ in range(traffic.users)]
    started, cpu = handle_module.clock(), time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    answered.sort(key=lambda a: a.number)
    return Load(answered, handle_module.clock() - started, time.process_time() - cpu)
