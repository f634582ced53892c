"""A notebook as the style checks read it, and what every notebook of a checkout shares."""

from __future__ import annotations

import ast
import re
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nbformat

SETUP = """\
# Set-up: does nothing where the kit is installed; on Colab it fetches the kit and what is missing.
import importlib.util
import pathlib
import subprocess
import sys

if importlib.util.find_spec("lora_kit") is None:
    if not pathlib.Path("{folder}").exists():
        url = "{repository}"
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", url], check=True)
    sys.path.insert(0, "{folder}")
    from lora_kit.install import install_missing

    install_missing()

from lora_kit.notebook import begin, record

globals().update(begin("{name}", globals()))"""


@dataclass(frozen=True)
class Sheet:
    """A notebook as it lies on disk, in its checkout."""

    path: Path
    root: Path

    @cached_property
    def nb(self):
        # nbformat.read would mend missing and repeated ids before they are seen.
        return nbformat.v4.reads(self.path.read_text(encoding="utf-8"))

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def number(self) -> str:
        return self.name.split("_")[0]

    @property
    def is_solution(self) -> bool:
        return self.path.parent.name == "solutions"

    @cached_property
    def code(self) -> list[tuple[int, str]]:
        """(index, source) of every code cell that holds code."""
        return [
            (i, c.source)
            for i, c in enumerate(self.nb.cells)
            if c.cell_type == "code" and c.source.strip()
        ]

    @cached_property
    def parsed(self) -> list[tuple[int, ast.Module]]:
        """(index, syntax tree) of every code cell; cells that do not parse are left out here and
        reported by `code_parses`."""
        trees = []
        for i, source in self.code:
            try:
                trees.append((i, ast.parse(source)))
            except SyntaxError:
                continue
        return trees

    @property
    def prose(self) -> str:
        return "\n\n".join(c.source for c in self.nb.cells if c.cell_type == "markdown")

    def tagged(self, tag: str) -> list[int]:
        return [i for i, c in enumerate(self.nb.cells) if tag in c.metadata.get("tags", [])]


def repository_url(root: Path) -> str:
    """The repository's address, from the one place where it stands: pyproject's project.urls."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["urls"]["Repository"]


def colab_link(root: Path, notebook: str) -> str:
    """Where Colab opens a notebook, named by its path within the checkout."""
    slug = repository_url(root).removeprefix("https://github.com/")
    return f"https://colab.research.google.com/github/{slug}/blob/main/{notebook}"


def badge(root: Path, notebook: str) -> str:
    """The "Open in Colab" badge of a notebook."""
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    return f"[![Open in Colab]({image})]({colab_link(root, notebook)})"


def setup_cell(root: Path, name: str) -> str:
    """The set-up cell of the notebook called `name`."""
    url = repository_url(root)
    return SETUP.format(folder=url.rsplit("/", 1)[1], repository=url, name=name)


def notebooks(root: Path) -> list[Path]:
    return sorted(p for p in (root / "notebooks").glob("*.ipynb") if not p.name.startswith("."))


def solutions(root: Path) -> list[Path]:
    folder = root / "notebooks" / "solutions"
    return sorted(p for p in folder.glob("*.ipynb") if not p.name.startswith("."))


def sections(prose: str) -> list[tuple[str, str]]:
    parts = re.split(r"^## (.+?)\s*$", prose, flags=re.M)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def saved_figures(sheet: Sheet) -> list[str | None]:
    """The names of `save(fig, "name")`, where `save` is lora_kit.figures'; None for a computed
    name."""
    names, called = [], set()
    for _, tree in sheet.parsed:
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "lora_kit.figures":
                called |= {a.asname or a.name for a in node.names if a.name == "save"}
    for _, tree in sheet.parsed:
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in called
            ):
                given = [*node.args[1:2], *(k.value for k in node.keywords if k.arg == "name")]
                plain = given and isinstance(given[0], ast.Constant)
                names.append(given[0].value if plain else None)
    return names
