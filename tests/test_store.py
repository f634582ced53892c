"""Files appear whole or not at all, whatever happens to the process that writes them."""

import hashlib
import shutil
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest

from lora_kit import store
from lora_kit.errors import CorruptFileError, DiskSpaceError, NotAvailableError


def run_child(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], timeout=60)


def test_home_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_KIT_HOME", str(tmp_path / "a" / ".." / "b"))
    assert store.home() == tmp_path / "b"
    monkeypatch.delenv("LORA_KIT_HOME")
    assert store.home().name == "lora_kit"


def test_repository_needs_notebooks(monkeypatch, tmp_path):
    assert (store.repository() / "pyproject.toml").exists()
    monkeypatch.setattr(store, "__file__", str(tmp_path / "lora_kit" / "store.py"))
    with pytest.raises(NotAvailableError, match="checkout"):
        store.repository()


def test_written_json_reads_back_and_is_readable_by_all(tmp_path):
    path = store.write_json(tmp_path / "deep" / "x.json", {"b": [1, "ü"], "a": None})
    assert store.read_json(path) == {"b": [1, "ü"], "a": None}
    assert path.stat().st_mode & 0o777 == 0o644
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


@pytest.mark.parametrize("value", [{"a": float("nan")}, {"a": object()}])
def test_what_json_cannot_hold_leaves_the_old_file(tmp_path, value):
    path = store.write_json(tmp_path / "x.json", {"old": 1})
    with pytest.raises((TypeError, ValueError)):
        store.write_json(path, value)
    assert store.read_json(path) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = store.write_text(tmp_path / "x.txt", "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        store.write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = store.write_json(tmp_path / "x.json", {"old": 1})
    other = tmp_path / ".x.json.bak.abcdefgh.part"  # the part of a file named x.json.bak
    other.write_text("")
    child = """
import os, signal, sys
from lora_kit import store
store.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
store.write_json(sys.argv[1], {"new": 2})
"""
    assert run_child(child, path).returncode == -signal.SIGKILL
    assert store.read_json(path) == {"old": 1}
    assert len(list(tmp_path.iterdir())) == 3  # what the dead process was writing
    store.sweep(path)
    assert sorted(tmp_path.iterdir()) == sorted([path, other])


@pytest.mark.parametrize("content", [b'{"a": 1', b"\xff\xfe", b""])
def test_a_damaged_json_file_is_named(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"x\.json is not a JSON file"):
        store.read_json(path)


def test_new_folder_appears_when_its_block_ends(tmp_path):
    target = tmp_path / "new"
    with store.new_folder(target) as part:
        (part / "file").write_text("1")
        assert not target.exists()
        assert part.parent == tmp_path  # one file system, so that the rename is atomic
    assert (target / "file").read_text() == "1"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("stop", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failing_block_leaves_what_was_there(tmp_path, stop, existing):
    target = tmp_path / "new"
    if existing:
        target.mkdir()
        (target / "file").write_text("old")

    def build():
        with store.new_folder(target) as part:
            (part / "file").write_text("new")
            raise stop

    with pytest.raises(stop):
        build()
    assert [p.name for p in tmp_path.iterdir()] == (["new"] if existing else [])
    assert not existing or (target / "file").read_text() == "old"


def test_an_existing_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "new"
    target.mkdir()
    (target / "stale").write_text("")
    with store.new_folder(target) as part:
        (part / "file").write_text("1")
    assert [p.name for p in target.iterdir()] == ["file"]
    assert list(tmp_path.iterdir()) == [target]


def test_sweep_takes_no_neighbour_and_no_pattern(tmp_path):
    own = tmp_path / ".a[1].abcdefgh.part"
    kept = [tmp_path / ".a1.abcdefgh.part", tmp_path / ".a[1].json.abcdefgh.part"]
    for path in (own, *kept):
        path.mkdir()
    store.sweep(tmp_path / "a[1]")
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_one_at_a_time(tmp_path):
    inside, most = [], []

    def work():
        for _ in range(5):
            with store.lock(tmp_path / "x"):
                inside.append(1)
                most.append(len(inside))
                threading.Event().wait(0.001)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(most), max(most)) == (20, 1)


def test_a_dead_process_holds_no_lock(tmp_path):
    child = """
import os, signal, sys
from pathlib import Path
from lora_kit import store
with store.lock(Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert run_child(child, tmp_path / "x").returncode == -signal.SIGKILL
    done = threading.Event()

    def take():
        with store.lock(tmp_path / "x"):
            done.set()

    threading.Thread(target=take, daemon=True).start()
    assert done.wait(10)


def test_disk_too_small_is_said_before_any_work(tmp_path, monkeypatch):
    free = types.SimpleNamespace(free=2**30)
    seen = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: seen.append(path) or free)
    target = tmp_path / "not" / "there" / "yet"
    store.check_disk(target, 2**30, "Fetching")
    with pytest.raises(DiskSpaceError) as found:
        store.check_disk(target, 3 * 2**30, "Fetching x")
    assert seen == [tmp_path, tmp_path]
    message = str(found.value)
    for part in ("Fetching x needs 3.00 GiB", str(target), "1.00 GiB are free", "LORA_KIT_HOME"):
        assert part in message
    with pytest.raises(DiskSpaceError, match="choose another folder"):
        store.check_disk(Path("relative"), 2**40, "x", "choose another folder")


def test_checksums(tmp_path):
    data = bytes(range(256)) * 5000  # more than one block
    (tmp_path / "x").write_bytes(data)
    assert store.sha256_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()
    assert store.sha256_json({"b": 1, "a": "ü"}) == store.sha256_json({"a": "ü", "b": 1})
    assert store.sha256_json([1, 2]) != store.sha256_json([2, 1])
