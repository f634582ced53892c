"""Rules that the notebooks of a checkout keep together, each a function from its root to a list of
complaints."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from sheets import Sheet, notebooks, repository_url, saved_figures, sections, solutions

from lora_kit.studies import runner


def solutions_match(root: Path) -> list[str]:
    """Each notebook with exercises has a solutions notebook, linked and complete; none is left
    over."""
    found = []
    solved = {p.stem: p for p in solutions(root)}
    for path in notebooks(root):
        name = f"{path.stem}_solutions"
        exercises = dict(sections(Sheet(path, root).prose)).get("Exercises", "")
        numbers = re.findall(r"^(\d+)\. ", exercises, flags=re.M)
        if not numbers and name not in solved:
            continue
        if f"(solutions/{name}.ipynb)" not in exercises:
            found.append(f"the exercises of {path.stem} do not link to solutions/{name}.ipynb")
        if name not in solved:
            found.append(f"{path.stem} has exercises but no solutions notebook")
            continue
        titles = [t for t, _ in sections(Sheet(solved.pop(name), root).prose)]
        for number in numbers:
            if not any(re.match(rf"(Exercise )?{number}\b", title) for title in titles):
                found.append(f"{name} has no section 'Exercise {number}'")
    return found + [f"{name} belongs to no notebook" for name in sorted(solved)]


def no_orphan_figures(root: Path) -> list[str]:
    """A figure in figures/ that bears a notebook's number is drawn by that number's notebooks."""
    drawn: dict[str, set] = {}
    for path in [*notebooks(root), *solutions(root)]:
        sheet = Sheet(path, root)
        drawn.setdefault(sheet.number, set()).update(saved_figures(sheet))
    return [
        f"figures/{p.name} is drawn by no notebook {p.stem.split('_')[0]}"
        for p in sorted((root / "figures").glob("*.png"))
        if p.stem.split("_")[0] in drawn and p.stem not in drawn[p.stem.split("_")[0]]
    ]


def parameter_sets_fit(root: Path) -> list[str]:
    """Every section of notebooks/params/*.yaml names a notebook, and its parameters are that
    notebook's, of the right types."""
    import yaml

    from lora_kit.errors import LoraKitError

    found = []
    paths = {p.stem: p for p in [*notebooks(root), *solutions(root)]}
    for file in sorted((root / "notebooks" / "params").glob("*.yaml")):
        for key, value in (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).items():
            if not isinstance(value, dict):
                found.append(f"{file.name}: {key} stands outside any notebook's section")
            elif key not in paths:
                found.append(f"{file.name}: no notebook is called {key}")
            else:
                try:
                    runner.check_parameters(paths[key], value)
                except LoraKitError as e:
                    found.append(f"{file.name}, {key}: {e}")
    return found


SHARED = ("MODEL", "STEPS", "SECOND_STEPS", "SEED")


def shared_parameters_agree(root: Path) -> list[str]:
    """03, 04, 05 and their solutions reuse one another's adapters: the parameters that shape an
    adapter have the same value wherever they stand, as defaults and in the smoke set; and the
    default steps are the recipes'."""
    import yaml

    from lora_kit.train.recipes import RECIPES

    found = []
    sheets = [p for p in [*notebooks(root), *solutions(root)] if p.stem[:2] in ("03", "04", "05")]
    smoke = root / "notebooks" / "params" / "smoke.yaml"
    overrides = (yaml.safe_load(smoke.read_text(encoding="utf-8")) or {}) if smoke.exists() else {}
    for label, sets in (("default", {}), ("smoke", overrides)):
        for parameter in SHARED:
            values = {}
            for path in sheets:
                known = {**runner.notebook_parameters(path), **sets.get(path.stem, {})}
                if parameter in known:
                    values[path.stem] = known[parameter]
            if len(set(values.values())) > 1:
                found.append(f"{parameter} differs ({label}): {values}")
            recipe = {"STEPS": "addition", "SECOND_STEPS": "reversal"}.get(parameter)
            if label == "default" and recipe and values:
                steps = RECIPES[recipe].spec.steps
                if set(values.values()) != {steps}:
                    found.append(f"{parameter} is not the {recipe} recipe's {steps}: {values}")
    return found


TEXT_FILES = {".md", ".toml", ".yml", ".yaml", ".py", ".cff", ".txt", ".ipynb", ".html"}
SKIPPED = {".venv", ".git", "runs", "build", ".pytest_cache", ".ruff_cache", ".hypothesis"}


def _text_files(root: Path) -> Iterator[Path]:
    for folder, inside, files in os.walk(root):
        inside[:] = sorted(d for d in inside if d not in SKIPPED and not d.endswith(".egg-info"))
        yield from (Path(folder, f) for f in sorted(files) if Path(f).suffix in TEXT_FILES)


def one_address(root: Path) -> list[str]:
    """Wherever this repository is named on GitHub or Colab, it is project.urls' Repository."""
    owner_and_name = repository_url(root).removeprefix("https://github.com/")
    name = owner_and_name.split("/")[1]
    pattern = re.compile(
        rf"(?:github\.com|research\.google\.com/github|githubusercontent\.com)/([\w.-]+/{name})\b"
    )
    colab = re.compile(r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+?)/blob")
    found = []
    for file in _text_files(root):
        text = file.read_text(encoding="utf-8", errors="replace")
        named = set(pattern.findall(text)) | set(colab.findall(text))
        for other in sorted(named - {owner_and_name}):
            found.append(f"{file.relative_to(root)} names {other}, not {owner_and_name}")
    return found


CHECKOUT_CHECKS = (
    solutions_match,
    no_orphan_figures,
    parameter_sets_fit,
    shared_parameters_agree,
    one_address,
)
