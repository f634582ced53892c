"""The adapter folder of a server: which adapters lie in it, and nothing outside it.

An adapter's name is a word, and its path, resolved with every symbolic link, stays inside.
"""

from __future__ import annotations

import re
from pathlib import Path

from lora_kit.errors import BadInputError, NotAvailableError

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MOST_BYTES = 512 * 2**20


def check_name(name: str) -> str:
    """The name itself, where it is a word that cannot be a path.

    Raises:
        BadInputError: anything but letters, digits, "_" and "-", 64 at most.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise BadInputError(
            f"Adapter name {name!r} must be letters, digits, '_' or '-', at most 64 of them."
        )
    return name


def adapter_folder(
    root: Path, name: str, path: str | None = None, most_bytes: int = MOST_BYTES
) -> Path:
    """The folder of an adapter, checked before anything of it is opened.

    Args:
        root: the adapter folder of the server.
        path: relative to `root`, or absolute inside it; by default the name.

    Returns:
        The resolved path: no symbolic link is left in it.

    Raises:
        BadInputError: a name that is no name, a path that leads outside, or files larger than
            `most_bytes` together.
        NotAvailableError: there is no adapter.
    """
    check_name(name)
    root = Path(root).resolve()
    outside = BadInputError(
        f"The path of adapter {name!r} leads outside the adapter folder, or is no path."
    )
    try:
        found = (root / (path or name)).resolve()
        # A file may be a link as well as the folder.
        files = {file: (found / file).resolve() for file in (CONFIG, WEIGHTS)}
        sizes = {file: at.stat().st_size for file, at in files.items() if at.is_file()}
    except (ValueError, OSError, RuntimeError):  # a NUL, a name too long, a loop of links
        raise outside from None
    if any(root not in at.parents for at in (found, *files.values())):
        raise outside
    for file in files:
        if file not in sizes:
            raise NotAvailableError(
                f"There is no adapter {name!r}: {file} is missing in {path or name} of the adapter "
                "folder."
            )
    if sum(sizes.values()) > most_bytes:
        raise BadInputError(
            f"Adapter {name!r} has {sum(sizes.values()) / 2**20:,.0f} MiB; this server takes "
            f"{most_bytes / 2**20:,.0f} MiB at most."
        )
    return found


def adapters_in(root: Path, most_bytes: int = MOST_BYTES) -> tuple[dict[str, Path], list[str]]:
    """The adapters lying directly in a folder, {name: path} in the order of names, and one sentence
    for each sub-folder that looks like an adapter and is left out.

    Raises:
        NotAvailableError: there is no such folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise NotAvailableError(f"There is no adapter folder {root}: make it, or name another.")
    found, left_out = {}, []
    for folder in sorted(root.iterdir()):
        if folder.name.startswith(".") or not (folder / CONFIG).exists():
            continue
        try:
            found[folder.name] = adapter_folder(root, folder.name, most_bytes=most_bytes)
        except (BadInputError, NotAvailableError) as e:
            left_out.append(str(e))
    return found, left_out
