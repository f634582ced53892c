"""The course's notebook rules, each a function from a notebook to a list of complaints.

A complaint is one sentence that names the cell. No complaints: the notebook keeps the rule.
`COURSE_CHECKS` hold for `notebooks/`, `SOLUTION_CHECKS` for `notebooks/solutions/`.
"""

from __future__ import annotations

import ast
import io
import os
import re
import tokenize
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nbformat

from lora_kit.studies import runner

MOST_LINES = 30
MOST_BYTES = 300_000
MOST_CODE_IN_A_ROW = 2
SCALARS = (bool, int, float, str)

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


# One notebook at a time -------------------------------------------------------------------------


def parameters_cell(sheet: Sheet) -> list[str]:
    """One cell tagged `parameters`, the first code cell: NAME = plain value  # valid values."""
    tagged = sheet.tagged("parameters")
    if len(tagged) != 1:
        return [f"{len(tagged)} cells are tagged 'parameters'; there must be one"]
    (cell,) = tagged
    found = []
    if not sheet.code or sheet.code[0][0] != cell:
        found.append("the parameters cell is not the first code cell")
    lines = [line for line in sheet.nb.cells[cell].source.splitlines() if line.strip()]
    if not lines:
        found.append("the parameters cell is empty")
    for line in lines:
        fault = _fault_of_parameter(line)
        if fault:
            found.append(f"parameters cell, {line!r}: {fault}")
    return found


def _fault_of_parameter(line: str) -> str | None:
    try:
        (node,) = ast.parse(line).body
    except (SyntaxError, ValueError):
        return "not one NAME = value line"
    if not (
        isinstance(node, ast.Assign)
        and len(node.targets) == 1
        and isinstance(node.targets[0], ast.Name)
    ):
        return "not a NAME = value line"
    if not re.fullmatch(r"[A-Z][A-Z0-9_]*", node.targets[0].id):
        return "the name is not in capitals"
    try:
        value = ast.literal_eval(node.value)
    except ValueError:
        return "the value is derived, not plain"
    if not isinstance(value, SCALARS):
        return "the value is not a number, a text, True or False"
    comments = [
        token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(line).readline)
        if token.type == tokenize.COMMENT
    ]
    return None if comments and comments[0] else "no comment says which values are valid"


def parameters_used(sheet: Sheet) -> list[str]:
    """Every parameter is read by a later cell; SEED is read by `begin`."""
    tagged = sheet.tagged("parameters")
    declared, read = set(), {"SEED"}
    for i, tree in sheet.parsed:
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                stored = isinstance(node.ctx, ast.Store)
                if i in tagged and stored:
                    declared.add(node.id)
                elif not stored:
                    read.add(node.id)
    return [f"the parameter {name} is never used" for name in sorted(declared - read)]


def set_up(sheet: Sheet) -> list[str]:
    """The second code cell is the set-up cell, the same everywhere but for the notebook's name."""
    expected = setup_cell(sheet.root, sheet.name)
    sources = [source.strip() for _, source in sheet.code]
    if sources[1:2] == [expected]:
        return []
    if expected in sources:
        return ["the set-up cell is not the second code cell"]
    return [f"no cell is the set-up cell of {sheet.name}, letter for letter"]


def opening(sheet: Sheet) -> list[str]:
    """The first cell: numbered title, badge, question, what is learnt and needed, minutes."""
    first = sheet.nb.cells[0] if sheet.nb.cells else None
    if first is None or first.cell_type != "markdown":
        return ["the first cell is not prose"]
    lines = first.source.splitlines()
    found = []
    if not re.fullmatch(rf"# {sheet.number} · \S.*", lines[0]):
        found.append(f"the first line is not '# {sheet.number} · Title' but {lines[0]!r}")
    if badge(sheet.root, f"notebooks/{sheet.path.name}") not in lines:
        found.append("the first cell lacks the Colab badge made from project.urls")
    for label in ("**Question", "**You will know", "**You need"):
        if not any(line.startswith(label) for line in lines):
            found.append(f"the first cell has no line that starts with {label}")
    rows = [line.strip("| ").split("|") for line in lines if line.startswith("|")]
    minutes = [row for row in rows if row[0].strip() == "minutes"]
    if not rows or "laptop" not in "".join(rows[0]) or "T4" not in "".join(rows[0]):
        found.append("the first cell has no table with a column for a laptop and one for a T4")
    elif len(minutes) != 1 or not all(re.search(r"\d", cell) for cell in minutes[0][1:]):
        found.append("the first cell's table has no row 'minutes' with a number in each column")
    return found


def title_of_solution(sheet: Sheet) -> list[str]:
    """A solutions notebook opens with its notebook's number, the word, and a link back."""
    first = sheet.nb.cells[0] if sheet.nb.cells else None
    if first is None or first.cell_type != "markdown":
        return ["the first cell is not prose"]
    found = []
    if not re.match(rf"# {sheet.number} · .*[Ss]olutions", first.source):
        found.append(f"the first line is not '# {sheet.number} · Title: solutions'")
    if f"(../{sheet.name.removesuffix('_solutions')}.ipynb)" not in first.source:
        found.append("the first cell does not link to the notebook whose exercises are solved")
    return found


def closing(sheet: Sheet) -> list[str]:
    """The last sections are What was found, Exercises, Read next, each with something in it."""
    ends = ["What was found", "Exercises", "Read next"]
    sections = re.findall(r"^## (.+?)\s*$", sheet.prose, flags=re.M)
    if sections[-3:] != ends:
        return [f"the last sections are {sections[-3:]}, not {ends}"]
    found = []
    for title, text in _sections(sheet.prose):
        if title in ends and not text.strip():
            found.append(f"the section {title!r} is empty")
        if title == "Exercises" and not re.search(r"^1\. ", text, flags=re.M):
            found.append("the exercises are not a numbered list")
    return found


def _sections(prose: str) -> list[tuple[str, str]]:
    parts = re.split(r"^## (.+?)\s*$", prose, flags=re.M)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def code_parses(sheet: Sheet) -> list[str]:
    """Code cells are plain Python: no magics, no shell lines, no syntax errors."""
    good = {i for i, _ in sheet.parsed}
    return [f"cell {i} is not plain Python" for i, _ in sheet.code if i not in good]


def cell_length(sheet: Sheet) -> list[str]:
    """A code cell has at most 30 lines, unless it defines a class."""
    long = {i for i, source in sheet.code if len(source.splitlines()) > MOST_LINES}
    classes = {i for i, t in sheet.parsed if any(isinstance(n, ast.ClassDef) for n in t.body)}
    return [f"cell {i} has more than {MOST_LINES} lines" for i in sorted(long - classes)]


def prose_between(sheet: Sheet) -> list[str]:
    """Never more than two code cells without prose between them."""
    found, row = [], 0
    for i, cell in enumerate(sheet.nb.cells):
        row = row + 1 if cell.cell_type == "code" else 0
        if row == MOST_CODE_IN_A_ROW + 1:
            found.append(f"cell {i} is the third code cell in a row without prose")
    return found


def no_empty_cells(sheet: Sheet) -> list[str]:
    return [f"cell {i} is empty" for i, c in enumerate(sheet.nb.cells) if not c.source.strip()]


def executed(sheet: Sheet) -> list[str]:
    """Every code cell was executed, from the first to the last, in one go."""
    counts = [sheet.nb.cells[i].execution_count for i, _ in sheet.code]
    if counts == list(range(1, len(counts) + 1)):
        return []
    shown = ", ".join("none" if c is None else str(c) for c in counts)
    return [f"the execution counts are not 1 to {len(counts)} but {shown}"]


NOISE = (
    (r"Warning\b|\bWARNING\b", "a warning"),
    (r"\d\s?(?:it/s|s/it)\b|\d%\||examples/s\]", "a progress bar"),
    (r"Traceback \(most recent call last\)", "a traceback"),
    (r"IProgress|HBox\(|FloatProgress", "a widget's progress bar"),
)


def outputs_clean(sheet: Sheet) -> list[str]:
    """No errors, warnings, progress bars, or anything else on stderr."""
    found = []
    for i, output in _outputs(sheet):
        if output.output_type == "error":
            found.append(f"cell {i} stores an error: {output.ename}")
        if output.get("name") == "stderr":
            found.append(f"cell {i} wrote to stderr: {output.text.strip()[:80]!r}")
        for text in _texts(output):
            for pattern, what in NOISE:
                if re.search(pattern, text):
                    found.append(f"cell {i} shows {what}")
    return sorted(set(found))


def _outputs(sheet: Sheet) -> Iterator[tuple[int, nbformat.NotebookNode]]:
    for i, cell in enumerate(sheet.nb.cells):
        for output in cell.get("outputs", []):
            yield i, output


def _texts(output) -> Iterator[str]:
    """What an output shows as text: images and our own notes are left out."""
    if "text" in output:
        yield output.text
    for kind, value in output.get("data", {}).items():
        if kind.startswith("text/") and isinstance(value, str):
            yield value


MACHINE_PATH = re.compile(
    r"(?<![\w.])/(?:home|root|Users|tmp|work|var|mnt|opt|usr|private|content|kaggle)/[\w.@~-]+"
    r"|\b[A-Z]:\\\\?(?:Users|Windows|Program|Temp)\b"
)


def no_machine_paths(sheet: Sheet) -> list[str]:
    """No absolute path of somebody's machine in outputs, metadata or the cells themselves."""
    places = [("the notebook's metadata", sheet.nb.metadata)]
    for i, cell in enumerate(sheet.nb.cells):
        places += [(f"cell {i}", [cell.source, cell.metadata])]
        places += [(f"an output of cell {i}", output) for output in cell.get("outputs", [])]
    return [
        f"{where} holds the path {hit}"
        for where, value in places
        for text in _strings(value)
        for hit in MACHINE_PATH.findall(text)
    ]


def _strings(value) -> Iterator[str]:
    """Every text inside a JSON value, but for images, whose base64 may look like anything."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if not key.startswith("image/"):
                yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def size(sheet: Sheet) -> list[str]:
    bytes_ = sheet.path.stat().st_size
    return [] if bytes_ < MOST_BYTES else [f"{bytes_:,} bytes; under {MOST_BYTES:,} is wanted"]


def file_format(sheet: Sheet) -> list[str]:
    """nbformat 4.5 or later, valid, with an id of its own for every cell; kernel python3."""
    nb, found = sheet.nb, []
    if (nb.nbformat, nb.nbformat_minor) < (4, 5):
        return [f"nbformat {nb.nbformat}.{nb.nbformat_minor}; cell ids need 4.5"]
    ids = [c.get("id") for c in nb.cells]
    if None in ids or len(set(ids)) != len(ids):
        return ["cell ids are missing or repeated"]
    try:
        nbformat.validate(nb)
    except nbformat.ValidationError as e:
        found.append(f"not a valid notebook: {e.message[:120]}")
    if nb.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("the kernel is not 'python3'")
    return found


def metadata_clean(sheet: Sheet) -> list[str]:
    """Nothing that a run leaves behind: papermill's notes, injected cells, times, widgets."""
    found = [
        f"the notebook's metadata have {key!r}"
        for key in ("papermill", "widgets")
        if key in sheet.nb.metadata
    ]
    for i, cell in enumerate(sheet.nb.cells):
        for key in ("papermill", "execution", "ExecuteTime"):
            if key in cell.metadata:
                found.append(f"the metadata of cell {i} have {key!r}")
    found += [f"cell {i} was injected by a run" for i in sheet.tagged("injected-parameters")]
    return found


def public_names(sheet: Sheet) -> list[str]:
    """Only public names of lora_kit are used."""
    found, ours = [], set()
    for i, tree in sheet.parsed:
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and _is_ours(node.module):
                names = [*node.module.split("."), *(alias.name for alias in node.names)]
                ours |= {alias.asname or alias.name for alias in node.names}
            elif isinstance(node, ast.Import):
                kit = [alias for alias in node.names if _is_ours(alias.name)]
                names = [part for alias in kit for part in alias.name.split(".")]
                ours |= {alias.asname or "lora_kit" for alias in kit}
            elif isinstance(node, ast.Attribute) and _root_name(node) in ours:
                names = [node.attr]
            else:
                continue
            for name in names:
                if name.startswith("_") and not name.endswith("__"):
                    found.append(f"cell {i} uses lora_kit's private name {name}")
    return found


def _is_ours(module: str | None) -> bool:
    return bool(module) and module.split(".")[0] == "lora_kit"


def _root_name(node: ast.AST) -> str | None:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


LINK = re.compile(r"\]\(([^)\s]+)\)")


def links_resolve(sheet: Sheet) -> list[str]:
    """Every relative link leads to a file; Colab links are those of this repository."""
    found = []
    for target in LINK.findall(sheet.prose):
        if target.startswith("https://colab.research.google.com/github/"):
            place = target.split("/blob/main/")[-1]
            if target != colab_link(sheet.root, place) or not (sheet.root / place).is_file():
                found.append(f"the Colab link {target} leads elsewhere or nowhere")
        elif not re.match(r"[a-z]+:", target) and not target.startswith("#"):
            if not (sheet.path.parent / target.split("#")[0]).exists():
                found.append(f"the link {target} leads nowhere")
    return found


def figures_exist(sheet: Sheet) -> list[str]:
    """A figure saved here is named by the notebook's number and lies in figures/."""
    found = []
    for name in saved_figures(sheet):
        if name is None:
            found.append("a figure is saved under a name that is not a plain text")
        elif not name.startswith(f"{sheet.number}_"):
            found.append(f"the figure {name} does not start with {sheet.number}_")
        elif not (sheet.root / "figures" / f"{name}.png").is_file():
            found.append(f"figures/{name}.png does not exist")
    return found


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


def no_loose_figures(sheet: Sheet) -> list[str]:
    """Matplotlib's own savefig is not called: figures go through lora_kit.figures.save."""
    return [
        f"cell {i} calls savefig; use lora_kit.figures.save"
        for i, tree in sheet.parsed
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "savefig"
    ]


COMMON = (
    parameters_cell,
    parameters_used,
    set_up,
    code_parses,
    cell_length,
    prose_between,
    no_empty_cells,
    executed,
    outputs_clean,
    no_machine_paths,
    size,
    file_format,
    metadata_clean,
    public_names,
    links_resolve,
    figures_exist,
    no_loose_figures,
)
COURSE_CHECKS = (*COMMON, opening, closing)
SOLUTION_CHECKS = (*COMMON, title_of_solution)


# The whole checkout -----------------------------------------------------------------------------


def solutions_match(root: Path) -> list[str]:
    """Each notebook with exercises has a solutions notebook, linked and complete; none is left
    over."""
    found = []
    solved = {p.stem: p for p in solutions(root)}
    for path in notebooks(root):
        name = f"{path.stem}_solutions"
        exercises = dict(_sections(Sheet(path, root).prose)).get("Exercises", "")
        numbers = re.findall(r"^(\d+)\. ", exercises, flags=re.M)
        if not numbers and name not in solved:
            continue
        if f"(solutions/{name}.ipynb)" not in exercises:
            found.append(f"the exercises of {path.stem} do not link to solutions/{name}.ipynb")
        if name not in solved:
            found.append(f"{path.stem} has exercises but no solutions notebook")
            continue
        titles = [t for t, _ in _sections(Sheet(solved.pop(name), root).prose)]
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
