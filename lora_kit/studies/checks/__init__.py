"""Checks of claims: one small function a claim, registered by its name.

`registered()` imports the modules, some for each paper and two that read this kit's records.
Every function takes nothing, reads the printed tables (or records) and returns an `Outcome`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from lora_kit.errors import unknown_name
from lora_kit.studies.checks.outcome import CHECKS, VERDICTS, Outcome

__all__ = ["MODULES", "VERDICTS", "Outcome", "registered", "run_check"]

MODULES = (
    "saha2024",
    "mai2025",
    "mai2025_scores",
    "oswal2025",
    "zhao2024",
    "zhao2024_scores",
    "zhao2024_complexity",
    "zhao2024_serving",
    "alwadhi2024",
    "measured",
    "counted",
)


def registered() -> dict[str, Callable[[], Outcome]]:
    """Every check by its name."""
    for module in MODULES:
        import_module(f"{__name__}.{module}")
    return CHECKS


def run_check(name: str) -> Outcome:
    """Run one check.

    Raises:
        UnknownNameError: no such check.
    """
    known = registered()
    if name not in known:
        raise unknown_name("check", name, known)
    return known[name]()
