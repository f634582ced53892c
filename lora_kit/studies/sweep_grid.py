"""What a sweep varies: a grid of parameters as settings, checked, and a name for each run."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_kit import store
from lora_kit.errors import BadInputError, NotAvailableError
from lora_kit.studies.runner import parse_value
from lora_kit.studies.sweep_targets import NOTEBOOK_SEED, Target

LONGEST = 120  # characters of a run's name; file systems allow 255
Grid = Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: a setting with a seed.

    setting: the parameters the grid names; parameters: all of the target's; name: of its record's
    file; group: of its setting.
    """

    name: str
    group: str
    setting: Mapping[str, Any]
    parameters: Mapping[str, Any]
    seed: int


def read_grid(path: Path) -> Grid:
    """A grid from a YAML file: `NAME: [values]` lines, or a list of `{NAME: value}` settings.

    Raises:
        NotAvailableError: no such file. BadInputError: not YAML, or neither of the two.
    """
    import yaml

    path = Path(path).expanduser()
    if not path.is_file():
        raise NotAvailableError(f"There is no grid {path}.")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise BadInputError(f"{path} is not YAML: {' '.join(str(e).split())}.") from e


def settings_of(grid: Grid) -> list[dict[str, Any]]:
    """The settings of a grid, in order: of a mapping every combination, the last name fastest.

    Raises:
        BadInputError: neither form, an empty list, a value that is no list, a NaN.
    """
    if isinstance(grid, Mapping):
        for name, values in grid.items():
            if isinstance(values, str) or not isinstance(values, Sequence):
                raise BadInputError(
                    f"The grid's {name} must be a list of values, not {values!r}: write [{values}]."
                )
            if not values:
                raise BadInputError(f"The grid's {name} is an empty list: there is nothing to run.")
        settings = [dict(zip(grid, v, strict=True)) for v in itertools.product(*grid.values())]
    elif isinstance(grid, Sequence) and not isinstance(grid, str):
        if not grid:
            raise BadInputError("The grid is an empty list: there is nothing to run.")
        for setting in grid:
            if not isinstance(setting, Mapping):
                raise BadInputError(
                    f"A grid that is a list holds settings, {{NAME: value}} each, not {setting!r}."
                )
        settings = [dict(s) for s in grid]
    else:
        raise BadInputError(
            "A grid is a mapping of names to lists of values, or a list of settings; "
            f"this one is {'empty' if grid is None else repr(grid)}."
        )
    for setting in settings:
        for name, value in setting.items():
            _check_value(str(name), value)
    return settings


def _check_value(name: str, value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise BadInputError(f"{name} must be a finite number, not {value!r}.")
    if isinstance(value, Mapping):
        for inner in value.values():
            _check_value(name, inner)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for inner in value:
            _check_value(name, inner)
    elif not isinstance(value, str | int | float | bool | None):
        raise BadInputError(f"{name} must be a plain value, not {value!r}: put it in quotes.")


def names_of(grid: Grid) -> list[str]:
    """The parameters a grid names."""
    return list(dict.fromkeys(name for setting in settings_of(grid) for name in setting))


def cells_of(
    target: Target, grid: Grid, seeds: Sequence[int], fixed: Mapping[str, Any] | None = None
) -> list[Cell]:
    """Every run of a sweep, all seeds of a setting before the next setting.

    Args:
        fixed: parameters that are the same in all settings.

    Raises:
        UnknownNameError: a parameter the target does not have, with the nearest names.
        BadInputError: a value it cannot take, a parameter both fixed and varied, a setting twice.
    """
    fixed, cells, met = dict(fixed or {}), [], {}
    settings = settings_of(grid)
    for setting in settings:
        if both := [name for name in setting if name in fixed]:
            raise BadInputError(f"{both[0]} is in the grid and fixed as well: choose one.")
        if NOTEBOOK_SEED in setting and target.kind == "notebook":
            raise BadInputError(f"{NOTEBOOK_SEED} is the sweep's own: say how many with --seeds.")
        parameters = json.loads(json.dumps(target.complete({**fixed, **setting})))
        key = store.sha256_json(parameters)
        if key in met:
            raise BadInputError(
                f"The grid has one setting twice: {_words(met[key])} and {_words(setting)} are the "
                "same run."
            )
        met[key] = setting
        order = list(target.defaults or setting)
        group = name_of({n: setting[n] for n in order if n in setting})
        for seed in seeds:
            name = "_".join([*([group] if group else []), f"seed{seed}"])
            cells.append(Cell(name, group, setting, parameters, seed))
    # A file system may not tell upper from lower case.
    for name, count in Counter(cell.name.lower() for cell in cells).items():
        if count > 1:
            raise BadInputError(f"Two settings would share the name {name}: rename a value.")
    return cells


def name_of(setting: Mapping[str, Any]) -> str:
    """A setting as a file's name: RANK-8_TARGETS-all. The same setting always has the same name.

    Where a value cannot stand in it as it is, eight digits of its hash follow.
    """
    words = [(_clean(name), *_value_word(value)) for name, value in setting.items()]
    text = "_".join(f"{name}-{word}" for name, word, _ in words)
    if len(text) > LONGEST or not all(exact for *_, exact in words):
        text = f"{text[: LONGEST - 9].rstrip('-_.')}-{store.sha256_json(dict(setting))[:8]}"
    return text


def _value_word(value: Any) -> tuple[str, bool]:
    """A value in a file's name, and whether it can be read back from there."""
    if isinstance(value, bool) or value is None:
        return str(value).lower(), True
    if isinstance(value, int | float):
        return repr(value), True
    if isinstance(value, str):
        word = _clean(value)
        return word, bool(word) and word == value and parse_value(value) == value
    if isinstance(value, list | tuple) and value:
        inner = [_value_word(v) for v in value]
        return "+".join(w for w, _ in inner), all(exact for _, exact in inner)
    return _clean(json.dumps(value)), False


def _clean(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", str(text)).strip("-.")[:60]


def _words(setting: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in setting.items()) or "the defaults"


def seeds_of(seeds: int | Iterable[int]) -> list[int]:
    """Seeds 0 … n−1 of a number, or those that were listed.

    Raises:
        BadInputError: none, one twice, or one that is no whole number.
    """
    found = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not found:
        raise BadInputError(f"A sweep needs at least one seed, not {seeds}.")
    if wrong := [s for s in found if type(s) is not int or s < 0]:
        raise BadInputError(f"A seed is a whole number from 0 up, not {wrong[0]!r}.")
    if len(set(found)) < len(found):
        raise BadInputError(f"A seed is listed twice: {', '.join(map(str, found))}.")
    return found
