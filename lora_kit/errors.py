"""Errors a user can act on: one sentence that names what was wrong and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LoraKitError(Exception):
    """Base of every error this kit raises on purpose. The command line prints it as one line."""


class UnknownNameError(LoraKitError, KeyError):
    """A model, dataset, task, parameter or adapter name that nothing answers to."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


class BadInputError(LoraKitError, ValueError):
    """A value outside what the function can work with."""


class CorruptFileError(LoraKitError):
    """A file whose content is not what it must be (truncated, altered, of another kind)."""


class NotAvailableError(LoraKitError):
    """Something that is neither in the cache nor within reach (no network, not installed)."""


class DiskSpaceError(LoraKitError):
    """Too little free space for what was asked."""


class BusyError(LoraKitError):
    """No place is left for a request just now; the same request may succeed in a moment."""


class RunFailedError(LoraKitError):
    """A notebook or training run that stopped; the message says where and what was kept."""


def nearest(name: str, known: Iterable[str], most: int = 3) -> list[str]:
    """The known names spelt most like `name`, best first; empty when none comes close."""
    lowered = {k.lower(): k for k in known}
    close = difflib.get_close_matches(str(name).lower(), lowered, n=most, cutoff=0.5)
    return [lowered[c] for c in close]


def unknown_name(kind: str, name: str, known: Iterable[str], hint: str = "") -> UnknownNameError:
    """An UnknownNameError that lists the known names and offers the nearest ones."""
    known = sorted(known)
    close = nearest(name, known)
    offer = f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
    text = f"Unknown {kind} {name!r}.{offer} Known: {', '.join(known) or 'none'}."
    return UnknownNameError(f"{text} {hint}" if hint else text)
