"""What a notebook says to the outside: which parameters it runs with, and what it measured.

`begin` opens every notebook, `record` and `record_table` note its results. Notes are ordinary cell
outputs of a type of our own, so they travel with the executed notebook; `lora-kit run` collects
them into the run's result record.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_kit import store
from lora_kit.errors import BadInputError, unknown_name

MIME = "application/vnd.lora-kit.note+json"
SET_SWITCH = "LORA_KIT_PARAMS"
METRIC_KEYS = {"value", "stderr", "low", "high", "n"}
SCALARS = (bool, int, float, str)


def begin(name: str, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Open a notebook: apply the parameter set LORA_KIT_PARAMS names, set style, seed and quiet.

    Args:
        name: the notebook's file name without its ending.
        variables: the notebook's `globals()`.

    Returns:
        The parameters to override, for `globals().update(...)`; empty when no set is named.

    Raises:
        UnknownNameError: the set, or a parameter in it, is not known.
        BadInputError: a value of another type than the default's.
    """
    _quiet()
    from lora_kit.figures import use_style
    from lora_kit.hardware import hold_to_t4_rules

    use_style()
    hold_to_t4_rules()
    chosen = os.environ.get(SET_SWITCH)
    overrides = parameter_set(chosen, name) if chosen else {}
    defaults = {k: v for k, v in variables.items() if k.isupper()}
    overrides = match_parameters(name, defaults, overrides)
    seed = overrides.get("SEED", variables.get("SEED"))
    if isinstance(seed, int):
        seed_everything(seed)
    if overrides:
        print(f"{SET_SWITCH}={chosen}:", ", ".join(f"{k} = {v!r}" for k, v in overrides.items()))
    return overrides


def match_parameters(
    notebook: str, defaults: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Hold given parameters to a notebook's defaults; return them in the defaults' types.

    A whole number is taken for a float default; nothing else is converted.

    Raises:
        UnknownNameError: a name the notebook does not have; lists known ones, offers the nearest.
        BadInputError: a value of another type than the default's, or NaN or infinity.
    """
    checked = {}
    for name, value in given.items():
        if name not in defaults:
            raise unknown_name(f"parameter of {notebook}", str(name), defaults)
        default = defaults[name]
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        if default is not None and type(value) is not type(default):
            hint = ""
            if isinstance(default, float) and isinstance(value, str):
                hint = " YAML reads 1e-3 as a text: write 1.0e-3."
            raise BadInputError(
                f"{name} must be {_kind(default)} like its default {default!r}, "
                f"not {value!r}.{hint}"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise BadInputError(f"{name} must be a finite number, not {value!r}.")
        checked[name] = value
    return checked


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch (CPU and GPU)."""
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def parameter_sets() -> list[str]:
    """The named sets: the files of `notebooks/params/`."""
    return sorted(p.stem for p in (store.repository() / "notebooks" / "params").glob("*.yaml"))


def parameter_set(name_or_path: str, notebook: str) -> dict[str, Any]:
    """The parameters a set holds for one notebook.

    A set is a YAML file. Its top-level scalars and lists apply to whatever notebook is run; a
    mapping applies to the notebook its key names.

    Args:
        name_or_path: a name of `parameter_sets()`, or a path to a YAML file.
        notebook: the notebook's stem.

    Raises:
        UnknownNameError: no such set, or a section that is no notebook's name.
        BadInputError: not YAML, or not a mapping.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = store.repository() / "notebooks" / "params" / f"{name_or_path}.yaml"
        if not path.exists():
            raise unknown_name("parameter set", name_or_path, parameter_sets())
    elif not path.exists():
        raise BadInputError(f"There is no parameters file {path}.")
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise BadInputError(f"{path} is not YAML: {' '.join(str(e).split())}.") from e
    if not isinstance(values, Mapping):
        raise BadInputError(f"{path} must hold NAME: value lines, not a {type(values).__name__}.")
    notebooks = {p.stem for p in (store.repository() / "notebooks").rglob("*.ipynb")} | {notebook}
    # A heading with every line under it commented out reads as None.
    values = {k: {} if v is None and k in notebooks else v for k, v in values.items()}
    sections = {k for k, v in values.items() if isinstance(v, Mapping)}
    for unknown in sorted(sections - notebooks, key=str):
        raise unknown_name(f"notebook in {path.name}", str(unknown), notebooks)
    shared = {k: v for k, v in values.items() if k not in sections}
    return {**shared, **values.get(notebook, {})}


def record(**metrics: float | Mapping[str, float | int]) -> None:
    """Note metrics of this run: a number each, or {"value", "stderr", "low", "high", "n"}.

    The notes show as one line each, and reach the run's result record.

    Raises:
        BadInputError: a value that is no finite number, or unknown keys.
    """
    clean = {name: _metric(name, value) for name, value in metrics.items()}
    lines = [f"{name} = {describe(value)}" for name, value in clean.items()]
    _show({"metrics": clean}, "\n".join(lines))


def record_table(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Note a table (a list of rows with the same columns) and show it.

    Raises:
        BadInputError: no rows, rows with different columns, or NaN or infinity in one.
    """
    rows = [{k: _entry(name, k, v) for k, v in row.items()} for row in rows]
    if not rows or any(list(row) != list(rows[0]) for row in rows):
        raise BadInputError(f"Table {name!r} needs rows, all with the same columns.")
    import pandas as pd

    frame = pd.DataFrame(rows)
    # Columns and rows apart: a notebook file sorts the keys of every object, and with them a
    # table's columns.
    note = {"columns": list(rows[0]), "rows": [list(row.values()) for row in rows]}
    _show({"tables": {name: note}}, frame.to_string(index=False), frame.to_html(index=False))


def record_facts(**facts: Any) -> None:
    """Note what the run worked on: `model=loaded.record()`, `data=rows.record()`,
    `peak_memory_bytes=...`. Nothing is shown.

    Raises:
        BadInputError: another fact than these three.
    """
    unknown = set(facts) - {"model", "data", "peak_memory_bytes"}
    if unknown:
        raise BadInputError(f"A run's facts are model, data and peak_memory_bytes, not {unknown}.")
    _show({"facts": facts}, "")


def describe(metric: float | Mapping[str, float | int]) -> str:
    """A metric in words: `0.84 ± 0.05 (n = 50)`, `[low, high]` where an interval was given."""
    if not isinstance(metric, Mapping):
        return _digits(metric)
    text = _digits(metric["value"])
    if metric.get("low") is not None and metric.get("high") is not None:
        text += f" [{metric['low']:.3g}, {metric['high']:.3g}]"
    elif metric.get("stderr") is not None:
        text += f" ± {metric['stderr']:.2g}"
    return text + (f" (n = {metric['n']})" if metric.get("n") is not None else "")


def _digits(value: float) -> str:
    """Four digits, and whole numbers whole: 0.8412, 1,211, 134,515,008."""
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def _metric(name: str, value) -> Any:
    if isinstance(value, Mapping):
        if value.get("value") is None or not set(value) <= METRIC_KEYS:
            raise BadInputError(
                f"Metric {name!r} needs 'value' and at most {', '.join(sorted(METRIC_KEYS))}; "
                f"it has {', '.join(sorted(value))}."
            )
        return {k: _number(f"{name}.{k}", v) for k, v in value.items() if v is not None}
    return _number(name, value)


def _number(name: str, value) -> float | int:
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadInputError(f"Metric {name!r} must be a finite number, not {value!r}.")
    return value


def _plain(value):
    """A Python number for a numpy or torch one."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _entry(table: str, column: str, value):
    value = _plain(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise BadInputError(
            f"Table {table!r}, column {column!r}: {value!r} is not a finite number."
        )
    return value


def _kind(value: Any) -> str:
    kinds = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def _show(note: dict, text: str, html: str | None = None) -> None:
    from IPython.display import publish_display_data

    data = {MIME: note, "text/plain": text}
    if html:
        data["text/html"] = html
    publish_display_data(data)


def _quiet() -> None:
    """No progress bars, no trackers, no prompts: outputs are committed and read in class."""
    for name, value in {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "WANDB_DISABLED": "true",
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
        "BITSANDBYTES_NOWELCOME": "1",
    }.items():
        os.environ.setdefault(name, value)
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    for library in ("bitsandbytes", "lm_eval", "lm-eval", "transformers", "httpx", "datasets"):
        logging.getLogger(library).setLevel(logging.ERROR)
