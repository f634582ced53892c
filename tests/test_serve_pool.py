"""The pool: three tiers with budgets, reading beside the others' work, broken files."""

import threading
import time

import pytest
import torch
from serve_models import llama, make_adapter

from lora_kit.errors import (
    BadInputError,
    BusyError,
    CorruptFileError,
    NotAvailableError,
    UnknownNameError,
)
from lora_kit.serve import pool as pool_module
from lora_kit.serve.pool import AdapterPool

NAMES = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for i, name in enumerate(NAMES):
        make_adapter(root / name, 4, "all", i)
    return root


@pytest.fixture(scope="module")
def each(folder):
    """Bytes of one of these adapters on the device, and of its file."""
    pool = AdapterPool(llama(), folder)
    pool.load("a")
    stats = pool.stats()
    return stats["device_bytes"], stats["host_bytes"]


@pytest.fixture
def open_pool(folder):
    made = []

    def make(**options):
        made.append(AdapterPool(llama(), options.pop("folder", folder), **options))
        return made[-1]

    yield make
    for pool in made:
        pool.close()


def on_device(pool):
    return sorted(e.name for e in pool._placed.values())


def test_those_in_the_folder_are_known_and_read_when_wanted(open_pool):
    pool = open_pool()
    assert pool.names() == list(NAMES)
    assert pool.stats()["reads"] == 0
    with pool.rows(["a", None, "b"]):
        assert on_device(pool) == ["a", "b"]
        assert pool.stats()["adapters_in_use"] == 2
    assert pool.stats()["adapters_in_use"] == 0
    assert pool.stats()["reads"] == 2


def test_least_recently_used_leaves_the_device_first(open_pool, each):
    pool = open_pool(device_bytes=2 * each[0])
    for name in ("a", "b", "a", "c"):
        pool.load(name)
    assert on_device(pool) == ["a", "c"]
    stats = pool.stats()
    assert (stats["evictions"], stats["device_bytes"]) == (1, 2 * each[0])
    pool.load("b")  # from memory: nothing is read again
    assert pool.stats()["reads"] == 3
    assert on_device(pool) == ["b", "c"]


def test_memory_has_a_budget_too(open_pool, each):
    pool = open_pool(device_bytes=each[0], host_bytes=2 * each[1])
    for name in ("a", "b", "c"):
        pool.load(name)
    stats = pool.stats()
    assert (stats["adapters_in_memory"], stats["host_bytes"]) == (2, 2 * each[1])
    pool.load("a")  # it had to leave memory, and is read again
    assert pool.stats()["reads"] == 4
    nothing = open_pool(device_bytes=each[0], host_bytes=0)
    for name in ("a", "b", "a"):
        nothing.load(name)
    assert nothing.stats()["reads"] == 3


def test_what_a_row_uses_stays(open_pool, each):
    pool = open_pool(device_bytes=2 * each[0])
    with pool.rows(["a"]), pool.rows(["b"]):
        with pytest.raises(BusyError, match="'c' must wait"):
            pool.load("c")
        assert on_device(pool) == ["a", "b"]
    pool.load("c")
    assert on_device(pool) == ["b", "c"]


def test_one_that_never_fits_is_refused(open_pool, each):
    pool = open_pool(device_bytes=each[0] - 1)
    with pytest.raises(BadInputError, match="more than the"):
        pool.load("a")


class Slow:
    """`read_adapter` that waits for a word where the folder is the one named."""

    def __init__(self, monkeypatch, name):
        self.go, self.began, self.reads = threading.Event(), threading.Event(), 0
        plain = pool_module.read_adapter

        def read(path):
            if path.name == name:
                self.reads += 1
                self.began.set()
                assert self.go.wait(10)
            return plain(path)

        monkeypatch.setattr(pool_module, "read_adapter", read)


def test_two_who_want_one_read_it_once_and_nobody_else_waits(open_pool, monkeypatch):
    pool, slow = open_pool(), Slow(monkeypatch, "a")
    failed = []

    def want():
        try:
            pool.load("a")
        except Exception as e:
            failed.append(e)

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert slow.began.wait(5)
    assert pool.acquire("a") is None  # not there yet, and told so at once
    started = time.monotonic()
    pool.load("b")
    assert time.monotonic() - started < 5
    assert all(t.is_alive() for t in threads)
    slow.go.set()
    for thread in threads:
        thread.join(10)
    assert not failed
    assert slow.reads == 1
    assert on_device(pool) == ["a", "b"]


def test_removed_while_being_read_it_does_not_come_back(open_pool, monkeypatch):
    pool, slow = open_pool(), Slow(monkeypatch, "a")
    assert pool.acquire("a") is None
    assert slow.began.wait(5)
    pool.remove("a")
    slow.go.set()
    pool.load("b")
    with pytest.raises(UnknownNameError, match="Unknown adapter 'a'"):
        pool.load("a")
    assert pool.stats()["adapters_in_memory"] == 1
    assert on_device(pool) == ["b"]


def test_a_failed_read_is_told_once_and_a_mended_file_is_read(open_pool, tmp_path):
    made = make_adapter(tmp_path / "x", 2, "attention", 9)
    pool = open_pool(folder=tmp_path)
    weights = made / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", whole[:8] + b"x" * 40):
        weights.write_bytes(broken)
        with pytest.raises(CorruptFileError):
            pool.load("x")
    weights.write_bytes(whole)
    pool.load("x")
    assert pool.stats()["failed_reads"] == 3
    # On the device it no longer matters what becomes of the file.
    weights.write_bytes(b"")
    with torch.inference_mode(), pool.rows(["x"]):
        pool.mixed.model(torch.tensor([[1, 2]]))


def test_another_base_and_a_folder_that_is_gone(open_pool, tmp_path):
    make_adapter(tmp_path / "other", 2, "attention", 0, base=5)
    pool = open_pool(folder=tmp_path)
    with pytest.raises(BadInputError, match="trained on another base"):
        pool.load("other")
    pool.add("gone", tmp_path / "nowhere")
    with pytest.raises(NotAvailableError):
        pool.load("gone")


def test_removed_in_use_it_serves_its_rows_to_the_end(open_pool):
    pool = open_pool()
    batch = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        with pool.rows(["a"]):
            before = pool.mixed.model(batch).logits
            pool.remove("a")
            pool.add("a", pool.folder / "b")  # the name is free at once, and means another
            with pool.rows(["a"]):
                other = pool.mixed.model(batch).logits
            assert torch.equal(pool.mixed.model(batch).logits, before)
        with pool.rows(["b"]):
            assert torch.equal(pool.mixed.model(batch).logits, other)
    assert not torch.equal(before, other)
    assert len(pool._placed) == 2  # the old "a" has left the device


def test_names(open_pool):
    pool = open_pool()
    for name in ("../a", "", "a/b", "a" * 65, "a\n", None):
        with pytest.raises(BadInputError, match="letters, digits"):
            pool.add(name)
    with pytest.raises(BadInputError, match="there already"):
        pool.add("a")
    with pytest.raises(UnknownNameError, match="Unknown adapter 'z'"):
        pool.remove("z")
    with pytest.raises(UnknownNameError), pool.rows(["a", "z"]):
        pass
    assert pool.stats()["adapters_in_use"] == 0  # "a" was given back
    with pytest.raises(BadInputError, match="give a path"):
        AdapterPool(llama()).add("a")
    with pytest.raises(NotAvailableError):
        AdapterPool(llama(), "/nowhere/at/all")


def test_budgets_hold_while_many_come_and_go(open_pool, each):
    """Eight threads, four adapters, room for two: every row is served, no budget is passed."""
    pool = open_pool(device_bytes=2 * each[0], host_bytes=3 * each[1])
    seen, failed = [], []

    def work(start):
        for i in range(30):
            name = NAMES[(start + i) % 4]
            try:
                with pool.rows([name]):
                    seen.append(pool.stats()["device_bytes"])
            except BusyError:
                time.sleep(0.001)
            except Exception as e:
                failed.append(e)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not failed
    assert len(seen) > 20
    assert max(seen) <= 2 * each[0]
    stats = pool.stats()
    assert stats["adapters_in_use"] == 0
    assert stats["host_bytes"] <= 3 * each[1]


def test_closing_takes_everything_off(folder):
    model = llama()
    pool = AdapterPool(model, folder)
    pool.load("a")
    pool.close()
    assert not any(m._forward_hooks for m in model.modules())
    AdapterPool(model, folder).load("a")  # and another pool may follow
