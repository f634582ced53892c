"""Installing what is missing on a machine that has most of it already, such as Colab.

Colab's image carries its own torch, built for its driver, so torch is never touched. Everything
else is held to what the kit was tested with: a package is installed when it is absent or when its
version is known not to work, and is left alone otherwise. Nothing here imports the packages it
judges, so that no restart is needed.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from lora_kit.errors import NotAvailableError

# What each package must be to work with the others; a package not named here must only be there.
# Unsloth caps transformers, trl and datasets; peft refuses torchao before 0.16.
WORKS = {
    "transformers": ">=5.15,<=5.17.0",
    "trl": "==1.15.0",
    "datasets": ">=4.3,<5,!=4.4.*,!=4.5.0",
    "peft": ">=0.20,<0.22",
    "bitsandbytes": ">=0.50,<0.51",
    "accelerate": ">=1.10",
    "lm_eval": "==0.4.13",
    "torchao": ">=0.16",
}
# Wanted in a notebook on Colab; test tools, JupyterLab and torch are not.
NEEDED = (
    "transformers",
    "trl",
    "datasets",
    "peft",
    "bitsandbytes",
    "accelerate",
    "lm_eval",
    "gguf",
    "matplotlib",
    "statsmodels",
    "pydantic",
    "typer",
    "platformdirs",
    "papermill",
)


def installed_versions(names) -> dict[str, str | None]:
    """The installed version of each package, None where it is absent."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def missing(installed: Mapping[str, str | None], gpu: bool) -> tuple[list[str], list[str]]:
    """What to install: (requirements with their dependencies, requirements without).

    Args:
        installed: version of each package, None where absent; see `installed_versions`.
        gpu: also Unsloth, whose own dependencies are left out: they would replace torch.

    torchao is mended only where it is there: its absence breaks nothing.
    """
    pins = _pins()
    wanted = [*NEEDED, *(["torchao"] if installed.get("torchao") else [])]
    ordinary = []
    for name in wanted:
        version = installed.get(name)
        works = Requirement(f"{name}{WORKS.get(name, '')}").specifier
        if version is None or not works.contains(Version(version), prereleases=True):
            ordinary.append(pins.get(name, f"{name}{WORKS.get(name, '')}"))
    alone = []
    if gpu:
        alone = [
            line
            for name, line in _pins("requirements-gpu.txt").items()
            if installed.get(name) is None
        ]
    return ordinary, alone


def install_missing(gpu: bool | None = None) -> None:
    """Install what `missing` names, with torch held to the version that is there.

    Args:
        gpu: whether to install Unsloth too; by default, where torch sees a GPU.

    Raises:
        NotAvailableError: pip could not.
    """
    if gpu is None:
        import torch

        gpu = torch.cuda.is_available()
    names = [*NEEDED, "torchao", *(_pins("requirements-gpu.txt") if gpu else ())]
    ordinary, alone = missing(installed_versions(names), gpu)
    if ordinary:
        _pip([*_hold_torch(), *ordinary])
    if alone:
        _pip(["--no-deps", *alone])
    print(f"Installed: {', '.join(ordinary + alone) or 'nothing was missing'}.")


def _hold_torch() -> list[str]:
    """Name the torch that is there as a requirement: pip then refuses to replace it."""
    version = installed_versions(["torch"])["torch"]
    return [f"torch=={version}"] if version else []


def _pins(file: str = "requirements.txt") -> dict[str, str]:
    """The pinned requirement of each package in a requirements file beside the package."""
    path = Path(__file__).resolve().parent.parent / file
    pins = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        line = line.split("#", 1)[0].strip()
        if line:
            pins[Requirement(line).name] = line
    return pins


def _pip(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", *arguments]
    code = subprocess.run(command).returncode
    if code != 0:
        raise NotAvailableError(
            f"pip could not install {' '.join(arguments)} (it ended with {code}, see above)."
        )
