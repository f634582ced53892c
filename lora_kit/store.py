"""Where files live, and how they are written: whole or not at all.

Every path, checksum, lock and free-space question of the kit is answered here.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_kit.errors import BusyError, CorruptFileError, DiskSpaceError, NotAvailableError

GIB = 2**30


def home() -> Path:
    """The kit's cache: LORA_KIT_HOME if set, else `lora_kit` in the user's cache folder."""
    given = os.environ.get("LORA_KIT_HOME")
    if given:
        return Path(given).expanduser().resolve()
    from platformdirs import user_cache_path

    return user_cache_path("lora_kit")


def repository() -> Path:
    """The checkout this package runs from, with its notebooks and data.

    Raises:
        NotAvailableError: the package was installed without its checkout.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / "notebooks").is_dir():
        raise NotAvailableError(
            "The notebooks are not beside the package; install it from a checkout with "
            "'pip install -e .'."
        )
    return root


def local_data() -> Path | None:
    """The folder of local datasets named by LORA_KIT_DATA, or None when it is not set."""
    given = os.environ.get("LORA_KIT_DATA")
    return Path(given).expanduser().resolve() if given else None


def check_disk(
    folder: Path,
    need_bytes: int,
    what: str,
    instead: str = "point LORA_KIT_HOME at a larger disk",
) -> None:
    """Refuse, before any work, when the disk of `folder` has less than `need_bytes` free.

    `instead` is what else a user can do beside freeing space.

    Raises:
        DiskSpaceError: names what was to be written, what is free and what is needed.
    """
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < need_bytes:
        raise DiskSpaceError(
            f"{what} needs {need_bytes / GIB:.2f} GiB in {folder}, where {free / GIB:.2f} GiB are "
            f"free; free some space or {instead}."
        )


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with open(path, "rb") as f:
        digest = hashlib.sha256()
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_json(value) -> str:
    """The SHA-256 of a JSON value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_text(path: Path, text: str) -> Path:
    """Write `text` to `path` atomically: readers see the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(part, 0o644)  # mkstemp's 0600 would keep other users from reading results
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
    return path


def write_json(path: Path, value) -> Path:
    """Write a JSON value atomically, indented, keys in the order given.

    Raises:
        ValueError: NaN or infinity, which JSON cannot hold; the old file stays.
    """
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path):
    """Read a JSON file.

    Raises:
        CorruptFileError: the file is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise CorruptFileError(f"{path} is not a JSON file ({e}); delete it and run again.") from e


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Build a folder under a temporary name and rename it to `path` when the block ends well.

    A block that raises leaves no `path`; where `path` exists already it is replaced whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        yield part
        os.chmod(part, 0o755)
        if path.exists():
            old = part.with_suffix(".old.part")
            path.rename(old)
            part.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            part.rename(path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def sweep(path: Path) -> None:
    """Remove what a killed `new_folder` or `write_text` left for `path`; hold its lock then."""
    # tempfile's random part has 8 characters; a looser pattern would take those of `x.json` for
    # those of `x`.
    name = glob.escape(path.name)
    for pattern in (f".{name}.????????.part", f".{name}.????????.old.part"):
        for left in path.parent.glob(pattern):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()


@contextmanager
def lock(path: Path, wait: bool = True) -> Iterator[None]:
    """One process at a time for `path`; the operating system frees the lock of a dead process.

    Raises:
        BusyError: another process holds it, and wait is False.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(path.parent / f".{path.name}.lock", timeout=-1 if wait else 0)
    try:
        held.acquire()
    except Timeout:
        raise BusyError(
            f"Another process is at work in {path}; wait until it has ended, or name another "
            "folder."
        ) from None
    try:
        yield
    finally:
        held.release()
