"""The course's notebook rules, each a function from a notebook to a list of complaints.

A complaint is one sentence that names the cell. No complaints: the notebook keeps the rule.
`COURSE_CHECKS` hold for `notebooks/`, `SOLUTION_CHECKS` for `notebooks/solutions/`.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator

import nbformat
from sheets import Sheet, badge, colab_link, saved_figures, sections, setup_cell

MOST_LINES = 30
MOST_BYTES = 300_000
MOST_CODE_IN_A_ROW = 2
SCALARS = (bool, int, float, str)


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
    titles = re.findall(r"^## (.+?)\s*$", sheet.prose, flags=re.M)
    if titles[-3:] != ends:
        return [f"the last sections are {titles[-3:]}, not {ends}"]
    found = []
    for title, text in sections(sheet.prose):
        if title in ends and not text.strip():
            found.append(f"the section {title!r} is empty")
        if title == "Exercises" and not re.search(r"^1\. ", text, flags=re.M):
            found.append("the exercises are not a numbered list")
    return found


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
