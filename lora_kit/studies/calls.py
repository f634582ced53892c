"""Functions called by name in another process: "package.module:function" or "file.py:function"."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from lora_kit.errors import LoraKitError, NotAvailableError

TAIL = 40  # lines of a traceback or log that are kept


def load_module(function: str) -> ModuleType:
    """The module of "module:function" or "file.py:function".

    Raises:
        NotAvailableError: it is not there.
    """
    place = function.rsplit(":", 1)[0]
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as e:
            raise NotAvailableError(
                f"There is no module {place} with cells to run ({e})."
            ) from None
    path = Path(place)
    if not path.is_file():
        raise NotAvailableError(f"There is no file {path} with cells.")
    known = f"lora_kit_cells_{path.stem}"
    loaded = sys.modules.get(known)
    if loaded is not None and loaded.__file__ == str(path):
        return loaded
    spec = importlib.util.spec_from_file_location(known, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[known] = module  # where the file's dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def load_function(function: str) -> Callable:
    """The function of "module:function" or "file.py:function".

    Raises:
        NotAvailableError: no such module or function.
    """
    place, name = function.rsplit(":", 1)
    found = getattr(load_module(function), name, None)
    if not callable(found):
        raise NotAvailableError(f"{place} has no function {name}.")
    return found


def call(function: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What `function(**arguments)` gave, {"value"}, or how it failed, {"error", "traceback"}.

    The value must be JSON. Memory is given back afterwards, so that a process can go on to the
    next call.
    """
    try:
        value = load_function(function)(**arguments)
        json.dumps(value, allow_nan=False)
        return {"value": value}
    except (Exception, SystemExit) as e:  # a call that fails must not take the process with it
        kind = "" if isinstance(e, LoraKitError) else f"{type(e).__name__}: "
        lines = traceback.format_exc().splitlines()[-TAIL:]
        return {"error": f"{kind}{e}", "traceback": "\n".join(lines)}
    finally:
        free_memory()


def free_memory() -> None:
    """Let go of what the last call left: Python's garbage, and a GPU's cached blocks."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def obey_t4_rules() -> None:
    """Hold this process to a T4's rules where LORA_KIT_T4_RULES asks for it."""
    from lora_kit.hardware import hold_to_t4_rules, t4_rules_wanted

    if t4_rules_wanted():  # a CPU's process need not load torch for it
        hold_to_t4_rules()


def tail(path: Path) -> str:
    """The last lines of a log; "" where there is none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-TAIL:])


def threads(number: int) -> dict[str, str]:
    """Settings that hold a process to so many threads."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {name: str(max(1, number)) for name in names} | {"TOKENIZERS_PARALLELISM": "false"}


def visible_gpus() -> list[str]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them; [] on a CPU."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = [n for n in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if n.strip()]
    return named[:count] if named else [str(i) for i in range(count)]
