"""Half an hour's traffic in a few seconds, while adapters come, go and break: nothing is lost,
nothing mixed up, and memory stays flat."""

import gc
import os
import random
import shutil
import threading
import time
from pathlib import Path

import psutil
import pytest
from serve_models import answers_alone, engine_over, make_adapter, talking

from lora_kit.errors import BadInputError, BusyError, LoraKitError, UnknownNameError
from lora_kit.serve.engine import Request
from lora_kit.serve.pool import AdapterPool

REQUESTS = 1800  # one a second for half an hour
USERS, TOKENS = 12, 6
STEADY = {"s1": (4, "all"), "s2": (8, "attention"), "s3": (1, "mlp"), "s4": (3, "q_proj")}
LOOSE = ("u1", "u2", "u3")  # added, removed and damaged meanwhile; each is one of two versions
PROMPTS = ("reverse 417=", "12+34=", "x", "a longer prompt than those", "sort 52=", "hello there")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer):
    """(the served folder, where whole copies lie, {(version, prompt): tokens})."""
    served, kept = tmp_path_factory.mktemp("served"), tmp_path_factory.mktemp("kept")
    for i, (name, (rank, targets)) in enumerate(STEADY.items()):
        make_adapter(served / name, rank, targets, i, model=talking)
    for i, version in enumerate(("v1", "v2")):
        make_adapter(kept / version, 4, "all", 20 + i, model=talking)
    places = {None: None, **{n: served / n for n in STEADY}, **{v: kept / v for v in ("v1", "v2")}}
    truth = {
        (name, prompt): ids
        for name, place in places.items()
        for prompt, ids in zip(
            PROMPTS, answers_alone(tokenizer, place, PROMPTS, TOKENS), strict=True
        )
    }
    return served, kept, truth


class Mischief(threading.Thread):
    """Puts loose adapters into the folder and the pool, damages files, takes adapters away."""

    def __init__(self, pool, served: Path, kept: Path):
        super().__init__(daemon=True)
        self.pool, self.served, self.kept = pool, served, kept
        self.over, self.rng = threading.Event(), random.Random(0)
        self.done = dict.fromkeys(("added", "removed", "damaged"), 0)
        self.failed: list[BaseException] = []

    def run(self):
        try:
            while not self.over.is_set():
                self.act(self.rng.choice(LOOSE))
                time.sleep(0.004)
        except BaseException as e:
            self.failed.append(e)

    def act(self, name):
        folder, act = self.served / name, self.rng.random()
        if name in self.pool.names() and act < 0.5:
            self.pool.remove(name)
            self.done["removed"] += 1
        elif folder.exists() and act < 0.75:
            whole = (folder / WEIGHTS).read_bytes()
            (folder / WEIGHTS).write_bytes(whole[: self.rng.randrange(len(whole) + 1)])
            self.done["damaged"] += 1
        elif name not in self.pool.names():
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(self.kept / self.rng.choice(("v1", "v2")), folder)
            self.pool.add(name)
            self.done["added"] += 1


def user(engine, numbers, truth, ends, failed):
    """Asks one request after another, as clients do: refused, it waits and asks again."""
    try:
        while True:
            try:
                number = next(numbers)
            except StopIteration:
                return
            rng = random.Random(number)
            name = rng.choice([None, *STEADY, *STEADY, *LOOSE])
            prompt = rng.choice(PROMPTS)
            while True:
                try:
                    handle = engine.submit(Request(prompt, adapter=name, max_tokens=TOKENS))
                except BusyError:
                    time.sleep(0.002)
                except UnknownNameError:
                    assert name in LOOSE
                    ends.append((number, "unknown"))
                    break
                else:
                    if rng.random() < 0.05:
                        handle.cancel()
                    ends.append((number, judge(name, prompt, handle.result(60), truth)))
                    break
    except BaseException as e:
        failed.append(e)


def judge(name, prompt, done, truth):
    """How it ended; an answer that is not this adapter's own is an error of the engine."""
    if done.reason == "error":
        assert name in LOOSE, done.error
        return "told why"
    versions = ("v1", "v2") if name in LOOSE else (name,)
    whole = [truth[v, prompt] for v in versions]
    if done.reason == "cancelled":
        assert any(ids[: len(done.tokens)] == done.tokens for ids in whole)
        return "cancelled"
    assert done.tokens in whole, (name, prompt, done.tokens, whole)
    return "answered"


class Numbers:
    """0, 1, 2 … for many threads; memory is read on the way."""

    def __init__(self, count):
        self.count, self.next, self.lock = count, 0, threading.Lock()
        self.memory, self.process = [], psutil.Process()

    def __iter__(self):
        return self

    def __next__(self):
        with self.lock:
            if self.next >= self.count:
                raise StopIteration
            self.next += 1
            if self.next % (self.count // 20) == 0:
                self.memory.append(self.process.memory_info().rss)
            return self.next - 1


def test_soak(world, tokenizer):
    served, kept, truth = world
    sizes = AdapterPool(talking(), served)
    sizes.load("s1")
    device = int(2.2 * sizes.stats()["device_bytes"])  # of seven adapters, about a third
    options = {"device_bytes": device, "host_bytes": device}
    with engine_over(tokenizer, served, options, max_rows=8, max_waiting=8) as engine:
        mischief = Mischief(engine.pool, served, kept)
        ends, failed, numbers = [], [], Numbers(REQUESTS)
        arguments = (engine, numbers, truth, ends, failed)
        users = [threading.Thread(target=user, args=arguments) for _ in range(USERS)]
        for thread in (mischief, *users):
            thread.start()
        for thread in users:
            thread.join(120)
        mischief.over.set()
        mischief.join(10)
        stats = engine.stats()
    assert not failed, failed[0]
    assert not mischief.failed, mischief.failed[0]
    # Nothing lost: every number has one end.
    assert sorted(number for number, _ in ends) == list(range(REQUESTS))
    found = {kind: sum(end == kind for _, end in ends) for kind in {end for _, end in ends}}
    assert found["answered"] > 0.6 * REQUESTS
    assert found["told why"] + found["unknown"] > 0.02 * REQUESTS  # the mischief was felt
    assert min(mischief.done.values()) > 20, mischief.done
    # Nothing left behind.
    assert (stats["running"], stats["waiting"], stats["adapters_in_use"]) == (0, 0, 0)
    assert stats["cache_bytes"] == 0
    assert max(stats["device_bytes"], stats["host_bytes"]) <= device
    assert stats["evictions"] > 10
    # Memory flat: from a quarter of the way on less than 16 MiB, whatever was going on.
    late = numbers.memory[len(numbers.memory) // 4 :]
    assert max(late) - late[0] < 16 * 2**20, [m >> 20 for m in numbers.memory]


def test_adapters_that_come_and_go_leave_no_memory(world, tokenizer):
    """120 adapters put on and taken off: the pages are given back, nothing of them stays."""
    served, _, _ = world
    with engine_over(tokenizer, served) as engine:
        process, memory = psutil.Process(os.getpid()), []
        for i in range(120):
            name = f"n{i}"
            engine.pool.add(name, served / "s1")
            engine.submit(Request("x", adapter=name, max_tokens=1)).result(20)
            engine.pool.remove(name)
            if i % 20 == 19:
                gc.collect()
                memory.append(process.memory_info().rss)
        assert engine.pool.mixed.names == []
        assert engine.pool.mixed.slots.pages.get((4, ()), []) == []
        assert sum(len(p) for p in engine.pool.mixed.slots.pages.values()) == 0
        assert not engine.pool.mixed._plans
        assert max(memory[1:]) - memory[1] < 8 * 2**20, [m >> 20 for m in memory]


def test_two_loads_of_one_adapter_at_once(world, tokenizer):
    """By name, from many threads: one is told it came second, the adapter serves."""
    served, _, truth = world
    with engine_over(tokenizer, None) as engine:
        told, gate = [], threading.Barrier(8)

        def load():
            gate.wait()
            try:
                engine.pool.add("s1", served / "s1")
                engine.pool.load("s1")
            except LoraKitError as e:
                told.append(e)

        threads = [threading.Thread(target=load) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len(told) == 7
        assert all(isinstance(e, BadInputError) and "there already" in str(e) for e in told)
        assert engine.stats()["reads"] == 1
        done = engine.submit(Request(PROMPTS[0], adapter="s1", max_tokens=TOKENS)).result(20)
        assert done.tokens == truth["s1", PROMPTS[0]]
