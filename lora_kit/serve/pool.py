"""The adapters a server holds, in three tiers: on the device, in the CPU's memory, on disk.

    disk  --read, verified-->  memory (as stored)  --placed-->  device (in the model's dtype)

Each tier but the disk has a budget in bytes; what was used least recently leaves first, and never
what a running row uses. Reading happens outside the lock, in threads of its own: nobody who wants
another adapter waits for it, and two who want the same one read it once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lora_kit.errors import (
    BadInputError,
    BusyError,
    LoraKitError,
    NotAvailableError,
    unknown_name,
)
from lora_kit.lora_files import WEIGHTS, AdapterFiles, read_adapter
from lora_kit.serve.folder import adapters_in, check_name
from lora_kit.serve.mixed import Factors, MixedLora

MIB = 2**20
READERS = 2  # threads that read adapters


@dataclass
class _Entry:
    """One adapter. key: what it is called on the device, never given twice, so that a name taken
    anew does not meet rows of the old one. files: as read, while in memory, of `host` bytes; ready:
    placed next; device: bytes on the device, 0 while not there. pins: rows that use it. used: when
    last, by the pool's own count. reading: under way."""

    name: str
    key: str
    path: Path
    files: AdapterFiles | None = field(default=None, repr=False)
    ready: Factors | None = field(default=None, repr=False)
    host: int = 0
    device: int = 0
    pins: int = 0
    used: int = 0
    reading: Future | None = field(default=None, repr=False)
    gone: bool = False


class AdapterPool:
    """Adapters by name, for one base.

    Args:
        model: the bare base; it is given hooks (`MixedLora`), and answers as before without them.
        folder: where adapters lie that are added by name alone; those that lie there now are added.
        device_bytes: for adapters on the model's device. host_bytes: for those waiting in memory.

    Raises:
        NotAvailableError: no such folder; BadInputError: a budget of nothing, or a model that
            carries adapters already.
    """

    def __init__(
        self,
        model,
        folder: str | Path | None = None,
        device_bytes: int = 256 * MIB,
        host_bytes: int = 1024 * MIB,
    ):
        if device_bytes < 1 or host_bytes < 0:
            raise BadInputError("device_bytes must be at least 1, and host_bytes 0 or more.")
        found = adapters_in(Path(folder))[0] if folder is not None else {}
        self.mixed = MixedLora(model)
        self.folder = None if folder is None else Path(folder)
        self.device_bytes, self.host_bytes = device_bytes, host_bytes
        self._entries: dict[str, _Entry] = {}
        self._placed: dict[str, _Entry] = {}  # by key; also those that are gone but still in use
        self._lock = threading.RLock()
        self._clock = self._serial = 0
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="adapter-reader")
        self._counts = dict.fromkeys(("reads", "placements", "evictions", "failed_reads"), 0)
        for name, path in found.items():
            self.add(name, path)

    # ------------------------------------------------------------------ names
    def add(self, name: str, path: str | Path | None = None) -> None:
        """Make an adapter known; it is read when it is first wanted.

        path: its folder; by default the one of its name in the pool's folder.

        Raises:
            BadInputError: a name that is none or is taken, or neither path nor folder.
        """
        check_name(name)
        if path is None:
            if self.folder is None:
                raise BadInputError(f"Say where adapter {name!r} lies: give a path.")
            path = self.folder / name
        with self._lock:
            if name in self._entries:
                raise BadInputError(f"An adapter named {name!r} is there already: remove it first.")
            self._serial += 1
            self._entries[name] = _Entry(name, f"{name}#{self._serial}", Path(path))

    def remove(self, name: str) -> None:
        """Forget an adapter. Rows that use it end with it; nobody can ask for it any more.

        Raises:
            UnknownNameError: it is not here.
        """
        with self._lock:
            entry = self._known(name)
            del self._entries[name]
            entry.gone, entry.files, entry.ready, entry.host = True, None, None, 0
            if entry.device and not entry.pins:
                self._leave_device(entry)

    def names(self) -> list[str]:
        with self._lock:
            return list(self._entries)

    def close(self) -> None:
        """Take everything off the model."""
        self._readers.shutdown(cancel_futures=True)
        with self._lock:
            self.mixed.close()
            self._entries, self._placed = {}, {}

    # ------------------------------------------------------------------ use
    def load(self, name: str) -> None:
        """Bring an adapter onto the device, verified, and wait for it.

        Raises:
            UnknownNameError: it is not here; BusyError: adapters in use fill the device; and what
            `read_adapter` and `MixedLora.factors` raise: a broken file, another base.
        """
        self.release(self.acquire(name, wait=True))

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Within the block, row i of a batch this thread runs uses adapter names[i], or none.

        Raises:
            as `load`.
        """
        keys: dict[str, str] = {}
        try:
            for name in {n for n in names if n is not None}:
                keys[name] = self.acquire(name, wait=True)
            with self.mixed.rows([None if n is None else keys[n] for n in names]):
                yield
        finally:
            for key in keys.values():
                self.release(key)

    def acquire(self, name: str, wait: bool = False) -> str | None:
        """Pin an adapter on the device; give it back with `release`.

        Returns:
            Its key for `MixedLora.rows`; None while it is being read (never with `wait`).

        Raises:
            as `load`. A reading that failed is told once; who asks again has the file read again.
        """
        while True:
            with self._lock:
                entry = self._known(name)
                self._clock += 1
                entry.used = self._clock
                if entry.reading is not None and entry.reading.done():
                    done, entry.reading = entry.reading, None
                    done.result()
                if not entry.device and entry.files is not None:
                    self._place(entry)
                if entry.device:
                    entry.pins += 1
                    return entry.key
                if entry.reading is None:
                    entry.reading = self._readers.submit(self._read, entry)
                reading = entry.reading
            if not wait:
                return None
            reading.exception()  # waits; what it is gets raised at the top, for whoever comes first

    def release(self, key: str) -> None:
        """Give back what `acquire` gave."""
        with self._lock:
            entry = self._placed[key]
            entry.pins -= 1
            if entry.gone and not entry.pins:
                self._leave_device(entry)

    def stats(self) -> dict[str, int]:
        """Adapters and bytes in each tier, and what has been moved so far."""
        with self._lock:
            placed, held = self._placed.values(), [e for e in self._entries.values() if e.files]
            return {
                "adapters": len(self._entries),
                "adapters_on_device": len(placed),
                "adapters_in_use": sum(e.pins > 0 for e in placed),
                "device_bytes": sum(e.device for e in placed),
                "adapters_in_memory": len(held),
                "host_bytes": sum(e.host for e in held),
                **self._counts,
            }

    # ------------------------------------------------------------------ moving
    def _known(self, name: str) -> _Entry:
        if name not in self._entries:
            raise unknown_name("adapter", name, self._entries)
        return self._entries[name]

    def _read(self, entry: _Entry) -> None:
        """Disk to memory, in a reader's thread; everything is verified here."""
        try:
            try:
                files = read_adapter(entry.path)
            except OSError as e:
                raise NotAvailableError(f"Adapter {entry.name!r} cannot be read: {e}.") from e
            factors = self.mixed.factors(files)
            if factors.bytes > self.device_bytes:
                raise BadInputError(
                    f"Adapter {entry.name!r} takes {factors.bytes / MIB:,.1f} MiB, more than the "
                    f"{self.device_bytes / MIB:,.1f} MiB there are for adapters on the device."
                )
        except LoraKitError:
            with self._lock:
                self._counts["failed_reads"] += 1
            raise
        with self._lock:
            self._counts["reads"] += 1
            if entry.gone:
                return
            entry.files, entry.ready = files, factors
            entry.host = (files.folder / WEIGHTS).stat().st_size if files else 0
            self._shrink_memory(keep=entry)

    def _place(self, entry: _Entry) -> None:
        """Memory to device; the lock is held."""
        factors = entry.ready or self.mixed.factors(entry.files)
        entry.ready = None
        free = self.device_bytes - sum(e.device for e in self._placed.values())
        idle = sorted((e for e in self._placed.values() if not e.pins), key=lambda e: e.used)
        if free + sum(e.device for e in idle) < factors.bytes:
            raise BusyError(
                f"Adapters in use fill the device's {self.device_bytes / MIB:,.1f} MiB: "
                f"{entry.name!r} must wait."
            )
        while free < factors.bytes:
            free += idle[0].device
            self._counts["evictions"] += 1
            self._leave_device(idle.pop(0))
        self.mixed.put(entry.key, factors)
        entry.device = factors.bytes
        self._placed[entry.key] = entry
        self._counts["placements"] += 1
        self._shrink_memory(keep=None)

    def _leave_device(self, entry: _Entry) -> None:
        self.mixed.drop(entry.key)
        del self._placed[entry.key]
        entry.device = 0

    def _shrink_memory(self, keep: _Entry | None) -> None:
        """Memory to disk: what is on disk anyway is let go, oldest first."""
        held = sorted((e for e in self._entries.values() if e.files), key=lambda e: e.used)
        size = sum(e.host for e in held)
        for entry in held:
            if size <= self.host_bytes:
                break
            if entry is not keep:
                size -= entry.host
                entry.files, entry.ready, entry.host = None, None, 0
