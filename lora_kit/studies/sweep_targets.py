"""What a sweep can run: a notebook, a training recipe, or a study's own cells.

A target says which parameters it takes, with their defaults, so that a grid is checked before
anything runs, and names the function that runs one setting with one seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_kit import store
from lora_kit.errors import BadInputError, UnknownNameError, unknown_name
from lora_kit.notebook import match_parameters
from lora_kit.studies.calls import load_function, load_module
from lora_kit.studies.records import Record

# Studies whose cells are functions `run_cell(parameters, seed, folder) -> Record`. A module's
# `DEFAULTS` name the parameters it takes, with their defaults.
TARGETS = {
    "arithmetic": "lora_kit.studies.arithmetic_cells:run_cell",
    "coupled": "lora_kit.studies.coupled_cells:run_cell",
    "leakage": "lora_kit.studies.leakage_cells:run_cell",
    "specialists": "lora_kit.studies.specialists_cells:run_cell",
    "shop": "lora_kit.studies.shop_cells:run_cell",
}
RECIPE_CELLS = "lora_kit.studies.sweep_recipes:run_cell"
NOTEBOOK_SEED = "SEED"


@dataclass(frozen=True)
class Target:
    """One thing a sweep can run.

    name: short, for folders and figures. defaults: parameters and their defaults; None where the
    study does not say. function: "module:function" or "file.py:function" of its cells, found again
    in each worker. fixed: what every cell gets beside its parameters (the recipe's or notebook's
    name). check: a study's own look at a whole setting, which raises a BadInputError.
    """

    name: str
    kind: str
    function: str
    defaults: Mapping[str, Any] | None = None
    fixed: Mapping[str, Any] | None = None
    either: tuple[str, ...] = ()  # parameters that take more than one type
    check: Callable[[dict[str, Any]], None] | None = None

    def complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All parameters of a setting: the defaults, and the given ones over them, checked.

        Raises:
            UnknownNameError: a parameter the target does not have; BadInputError: a value it
            cannot take.
        """
        given = dict(given)
        if self.defaults is None:
            return given
        strict = {k: v for k, v in given.items() if k not in self.either}
        checked = {**given, **match_parameters(self.name, self.defaults, strict)}
        whole = {**self.defaults, **checked}
        if self.check:
            self.check(whole)
        return whole


def find_target(name: str) -> Target:
    """A target by its name: a study's, a recipe's, a notebook's (name, number or path), or the
    place of a function of your own ("cells.py:run_cell", "package.module:run_cell").

    Raises:
        UnknownNameError: nothing answers to the name; the nearest ones are offered.
        NotAvailableError: a study whose module is not there.
    """
    from lora_kit.studies import runner
    from lora_kit.train.recipes import RECIPES

    if name in TARGETS:
        return _study(name, TARGETS[name])
    if ":" in name:
        place = name.rsplit(":", 1)[0]
        if place.endswith(".py"):
            function = f"{Path(place).expanduser().resolve()}:{name.rsplit(':', 1)[1]}"
            return _study(Path(place).stem, function)
        return _study(place.rsplit(".", 1)[-1], name)
    if name in RECIPES:
        from lora_kit.studies import sweep_recipes

        return Target(
            name=name,
            kind="recipe",
            function=RECIPE_CELLS,
            defaults=sweep_recipes.defaults(name),
            fixed={"recipe": name},
            either=sweep_recipes.EITHER,
            check=lambda values: sweep_recipes.check(name, values),
        )
    try:
        path = runner.find_notebook(name)
    except UnknownNameError:
        known = [*TARGETS, *RECIPES, *runner.list_notebooks()]
        raise unknown_name("target of a sweep", name, known) from None
    return _notebook(path)


def _notebook(path: Path) -> Target:
    from lora_kit.studies import runner

    defaults = runner.notebook_parameters(path)
    defaults.pop(NOTEBOOK_SEED, None)
    ours = path.parent == store.repository() / "notebooks"  # another machine has it elsewhere
    return Target(
        name=path.stem,
        kind="notebook",
        function="lora_kit.studies.sweep_targets:run_notebook_cell",
        defaults=defaults,
        fixed={"notebook": path.stem if ours else str(path)},
    )


def _study(name: str, function: str) -> Target:
    module = load_module(function)
    load_function(function)
    return Target(
        name=name,
        kind="study",
        function=function,
        defaults=getattr(module, "DEFAULTS", None),
        check=getattr(module, "check_setting", None),
    )


def fixed_parameters(
    target: Target, texts: Mapping[str, str], file: str | None = None, varied: Iterable[str] = ()
) -> dict[str, Any]:
    """What is the same in all settings, from the command line.

    Args:
        texts: values as words; a word stays a text where the default is one.
        file: a notebook's parameter set, under the words.
        varied: names the grid varies; the set's values of these give way.

    Raises:
        BadInputError: a parameter set for what is no notebook.
    """
    from lora_kit.notebook import parameter_set
    from lora_kit.studies.runner import parse_value

    found: dict[str, Any] = {}
    if file is not None:
        if target.kind != "notebook":
            raise BadInputError(f"-f is for notebooks, and {target.name} is none.")
        left_out = {NOTEBOOK_SEED, *varied}
        found = {k: v for k, v in parameter_set(file, target.name).items() if k not in left_out}
    defaults = target.defaults or {}
    keep = {name for name, value in defaults.items() if isinstance(value, str)}
    for name, text in texts.items():
        found[name] = text if name in keep - set(target.either) else parse_value(text)
    return found


def check_seeds(target: Target, seeds: list[int]) -> None:
    """Refuse more than one seed where a notebook has no SEED: the runs would be copies.

    Raises:
        BadInputError: says so.
    """
    from lora_kit.studies import runner

    if target.kind != "notebook" or len(seeds) < 2:
        return
    if NOTEBOOK_SEED not in runner.notebook_parameters(
        runner.find_notebook(target.fixed["notebook"])
    ):
        raise BadInputError(
            f"{target.name} has no parameter {NOTEBOOK_SEED}, so its runs would be copies of each "
            "other: ask for one seed."
        )


def run_notebook_cell(parameters: dict[str, Any], seed: int, folder: Path, notebook: str) -> Record:
    """Run a notebook with a setting's parameters; its copy and figures stay in `folder`."""
    from lora_kit.studies import runner

    if NOTEBOOK_SEED in runner.notebook_parameters(runner.find_notebook(notebook)):
        parameters = {**parameters, NOTEBOOK_SEED: seed}
    return runner.run_notebook(notebook, parameters, output=folder).record
