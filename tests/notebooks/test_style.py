"""Every notebook keeps the course's rules; and each rule catches a notebook that breaks it."""

from __future__ import annotations

import copy
from pathlib import Path

import checkout_style
import nbformat
import pytest
import sheets
import style
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from sheets import Sheet

ROOT = Path(__file__).resolve().parents[2]
COURSE = [Sheet(p, ROOT) for p in sheets.notebooks(ROOT)]
SOLUTIONS = [Sheet(p, ROOT) for p in sheets.solutions(ROOT)]


def named(check):
    return check.__name__


def test_there_is_a_course():
    numbers = [sheet.number for sheet in COURSE]
    lessons = [f"{i:02d}" for i in range(6)]
    assert numbers[:6] == lessons, "a notebook is missing"
    # The studies, one a paper and a report, come one by one.
    assert numbers[6:] == sorted(set(numbers[6:]) & {f"{i:02d}" for i in range(6, 12)})


@pytest.mark.parametrize("check", style.COURSE_CHECKS, ids=named)
@pytest.mark.parametrize("sheet", COURSE, ids=lambda s: s.name)
def test_notebook(sheet, check):
    assert check(sheet) == []


@pytest.mark.parametrize("check", style.SOLUTION_CHECKS, ids=named)
@pytest.mark.parametrize("sheet", SOLUTIONS, ids=lambda s: s.name)
def test_solutions(sheet, check):
    assert check(sheet) == []


@pytest.mark.parametrize("check", checkout_style.CHECKOUT_CHECKS, ids=named)
def test_checkout(check):
    assert check(ROOT) == []


def test_readme_badge():
    """If the README has badges to Colab, they are those made from project.urls."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for link in style.LINK.findall(text):
        if "colab.research.google.com/github" in link:
            place = link.split("/blob/main/")[-1]
            assert link == sheets.colab_link(ROOT, place)
            assert (ROOT / place).is_file(), link


# The rules themselves: a good notebook passes them all, and each bad one is caught ---------------

PYPROJECT = (
    '[project]\nname = "kit"\n[project.urls]\nRepository = "https://github.com/an-owner/kit"\n'
)
PARAMETERS = 'MODEL = "tiny"  # a name\nSTEPS = 80  # 1 or more\nSECOND_STEPS = 30  # 1 or more'
DRAW = 'from lora_kit.figures import save\n\nsave(fig, "03_curve")'
USE = "print(MODEL, STEPS, SECOND_STEPS)"


def opening_cell(root: Path, name: str) -> str:
    return "\n".join(
        [
            f"# {name[:2]} · A title",
            sheets.badge(root, f"notebooks/{name}.ipynb"),
            "**Question:** does it work?",
            "**You will know** that it does.",
            "**You need** nothing.",
            "",
            "| | laptop | T4 (estimated) |",
            "|---|---|---|",
            "| minutes | 1 | 2 |",
        ]
    )


def number_outputs(nb):
    for count, cell in enumerate((c for c in nb.cells if c.cell_type == "code"), 1):
        cell.execution_count = count


def good_notebook(root: Path, name: str = "03_good"):
    nb = new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    nb.cells = [
        new_markdown_cell(opening_cell(root, name)),
        new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        new_markdown_cell("Set-up."),
        new_code_cell(sheets.setup_cell(root, name)),
        new_markdown_cell("Use and draw."),
        new_code_cell(USE, outputs=[new_output("stream", name="stdout", text="tiny 80 30\n")]),
        new_code_cell(DRAW),
        new_markdown_cell(
            "## What was found\n\nIt works.\n\n## Exercises\n\n1. Again.\n2. And again.\n\n"
            f"Solutions: [here](solutions/{name}_solutions.ipynb)\n\n## Read next\n\nNothing."
        ),
    ]
    number_outputs(nb)
    return nb


def good_solutions(root: Path, name: str = "03_good_solutions"):
    nb = good_notebook(root, name)
    nb.cells[0].source = "# 03 · A title: solutions\n\nOf [this](../03_good.ipynb)."
    nb.cells[-1].source = "## Exercise 1\n\nDone.\n\n## Exercise 2\n\nDone."
    return nb


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    for folder in ("figures", "notebooks/solutions", "notebooks/params"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "figures" / "03_curve.png").write_bytes(b"png")
    (tmp_path / "notebooks" / "params" / "smoke.yaml").write_text("03_good:\n  STEPS: 2\n")
    write(tmp_path, good_notebook(tmp_path))
    write(tmp_path, good_solutions(tmp_path), "solutions/03_good_solutions")
    (tmp_path / "notebooks" / "params" / "smoke.yaml").write_text(
        "03_good:\n  STEPS: 2\n03_good_solutions:\n  STEPS: 2\n"
    )
    return tmp_path


def write(root: Path, nb, name: str = "03_good") -> Sheet:
    path = root / "notebooks" / f"{name}.ipynb"
    nb = copy.deepcopy(nb)
    path.write_text(nbformat.writes(nb), encoding="utf-8")
    return Sheet(path, root)


def test_good_notebook_passes(checkout):
    sheet = Sheet(checkout / "notebooks" / "03_good.ipynb", checkout)
    assert {named(c): c(sheet) for c in style.COURSE_CHECKS if c(sheet)} == {}
    solved = Sheet(checkout / "notebooks" / "solutions" / "03_good_solutions.ipynb", checkout)
    assert {named(c): c(solved) for c in style.SOLUTION_CHECKS if c(solved)} == {}
    assert {named(c): c(checkout) for c in checkout_style.CHECKOUT_CHECKS if c(checkout)} == {}


def source(cell, new):
    """A change: cell number `cell` gets the source `new`, or what `new` makes of the old one."""

    def change(nb):
        old = nb.cells[cell].source
        nb.cells[cell].source = new(old) if callable(new) else new

    return change


def swap(cell, old, new):
    def change(nb):
        assert old in nb.cells[cell].source, "the change would change nothing"
        nb.cells[cell].source = nb.cells[cell].source.replace(old, new)

    return change


def output(text, kind="stdout"):
    def change(nb):
        nb.cells[5].outputs = [new_output("stream", name=kind, text=text)]

    return change


def error(nb):
    nb.cells[5].outputs = [new_output("error", ename="ValueError", evalue="no", traceback=[])]


def html(text):
    def change(nb):
        nb.cells[5].outputs = [new_output("display_data", data={"text/html": text})]

    return change


def metadata(place, **values):
    def change(nb):
        (nb if place is None else nb.cells[place]).metadata.update(values)

    return change


def drop(cell):
    def change(nb):
        del nb.cells[cell]
        number_outputs(nb)

    return change


def add(cell, *new):
    def change(nb):
        nb.cells[cell:cell] = [copy.deepcopy(c) for c in new]
        number_outputs(nb)

    return change


def field(name, value, cell=None):
    def change(nb):
        setattr(nb if cell is None else nb.cells[cell], name, value)

    return change


def same_ids(nb):
    nb.cells[5].id = nb.cells[6].id


LONG = "\n".join(f"x{i} = {i}" for i in range(31))
TAG = {"tags": ["parameters"]}
BAD = [
    # check, what is changed in a good notebook, what the complaint must say
    ("parameters_cell", metadata(1, tags=[]), "0 cells are tagged"),
    ("parameters_cell", add(6, new_code_cell("A = 1  # 1", metadata=TAG)), "2 cells are tagged"),
    ("parameters_cell", add(1, new_code_cell("x = 1")), "not the first code cell"),
    ("parameters_cell", source(1, ""), "empty"),
    ("parameters_cell", source(1, "STEPS = 80"), "no comment"),
    ("parameters_cell", source(1, "STEPS = 80  #"), "no comment"),
    ("parameters_cell", source(1, 'STEPS = "a # b"'), "no comment"),
    ("parameters_cell", source(1, "steps = 80  # 1 or more"), "not in capitals"),
    ("parameters_cell", source(1, "STEPS = 8 * 10  # 1 or more"), "derived"),
    ("parameters_cell", source(1, "STEPS = [1, 2]  # some"), "not a number"),
    ("parameters_cell", source(1, "import os  # a module"), "not a NAME = value"),
    ("parameters_cell", source(1, "A = B = 1  # 1"), "not a NAME = value"),
    ("parameters_cell", source(1, "A = 1; B = 2  # 1"), "not one NAME = value"),
    ("parameters_cell", source(1, "STEPS = (  # 1\n    80\n)"), "not one NAME = value"),
    ("parameters_used", source(5, "print(MODEL, STEPS)"), "SECOND_STEPS is never used"),
    ("set_up", drop(3), "letter for letter"),
    ("set_up", swap(3, "--quiet", "--verbose"), "letter for letter"),
    ("set_up", swap(3, "03_good", "04_good"), "letter for letter"),
    ("set_up", swap(3, "an-owner", "another"), "letter for letter"),
    ("set_up", add(3, new_code_cell("x = 1")), "not the second code cell"),
    ("opening", drop(0), "not prose"),
    ("opening", swap(0, "# 03 ·", "# 04 ·"), "first line"),
    ("opening", swap(0, "an-owner", "another"), "badge"),
    ("opening", swap(0, "03_good", "03_bad"), "badge"),
    ("opening", swap(0, "**Question:**", "Question:"), "**Question"),
    ("opening", swap(0, "**You will know**", "Learn"), "**You will know"),
    ("opening", swap(0, "**You need**", "Needs"), "**You need"),
    ("opening", swap(0, "| laptop |", "| machine |"), "no table"),
    ("opening", swap(0, "| minutes |", "| hours |"), "no row 'minutes'"),
    ("opening", swap(0, "| 2 |", "| ? |"), "no row 'minutes'"),
    ("closing", swap(-1, "## What was found", "## Found"), "the last sections"),
    ("closing", source(-1, lambda s: f"{s}\n\n## More\n\nStill more."), "the last sections"),
    ("closing", swap(-1, "## Read next\n\nNothing.", "## Read next"), "is empty"),
    ("closing", swap(-1, "1. Again.\n2. And again.", "Again."), "numbered list"),
    ("code_parses", source(5, "%timeit x"), "not plain Python"),
    ("code_parses", source(5, "!pip install x"), "not plain Python"),
    ("cell_length", source(5, LONG), "more than 30 lines"),
    ("prose_between", add(6, new_code_cell("y = 1")), "third code cell in a row"),
    ("no_empty_cells", add(6, new_markdown_cell("  \n")), "is empty"),
    ("executed", field("execution_count", None, 5), "none"),
    ("executed", field("execution_count", 7, 5), "not 1 to 4"),
    ("outputs_clean", error, "stores an error: ValueError"),
    ("outputs_clean", output("anything at all", "stderr"), "wrote to stderr"),
    ("outputs_clean", output("x.py:3: UserWarning: beware"), "shows a warning"),
    ("outputs_clean", output("WARNING: beware"), "shows a warning"),
    ("outputs_clean", output("100%|####| 3/3 [00:01<00:00, 2.9it/s]"), "shows a progress bar"),
    ("outputs_clean", html("<pre>Map: 2050/2050 [00:01, 99 examples/s]</pre>"), "progress bar"),
    ("outputs_clean", output("Traceback (most recent call last):"), "shows a traceback"),
    ("no_machine_paths", output("kept in /home/ann/runs"), "an output of cell 5"),
    ("no_machine_paths", output("line\n/tmp/x"), "/tmp/x"),
    ("no_machine_paths", html("<td>/Users/ann/kit</td>"), "/Users/ann"),
    ("no_machine_paths", output(r"C:\Users\ann"), "path C:"),
    ("no_machine_paths", metadata(5, path="/home/ann/kit"), "cell 5"),
    ("no_machine_paths", metadata(None, home="/home/ann/kit"), "notebook's metadata"),
    ("no_machine_paths", source(5, f"{USE}\nopen('/home/ann/x')"), "/home/ann"),
    ("size", output("x" * 300_000), "300,000 is wanted"),
    ("file_format", same_ids, "missing or repeated"),
    ("file_format", field("nbformat_minor", 4), "need 4.5"),
    ("file_format", field("source", 5, 5), "not a valid notebook"),
    ("file_format", metadata(None, kernelspec={"name": "ir", "display_name": "R"}), "python3"),
    ("metadata_clean", metadata(None, papermill={}), "papermill"),
    ("metadata_clean", metadata(None, widgets={}), "widgets"),
    ("metadata_clean", metadata(5, papermill={}), "cell 5 have 'papermill'"),
    ("metadata_clean", metadata(5, execution={}), "cell 5 have 'execution'"),
    ("metadata_clean", metadata(5, tags=["injected-parameters"]), "injected"),
    ("public_names", source(6, "from lora_kit.models import _load"), "_load"),
    ("public_names", source(6, "from lora_kit._secret import name"), "_secret"),
    ("public_names", source(6, "import lora_kit._secret"), "_secret"),
    ("public_names", source(6, "from lora_kit import models\nmodels._load()"), "_load"),
    ("public_names", source(6, "import lora_kit.models\nlora_kit.models._load()"), "_load"),
    ("links_resolve", swap(4, "Use", "[Use](99_none.ipynb)"), "99_none.ipynb leads nowhere"),
    ("links_resolve", swap(0, "an-owner", "another"), "leads elsewhere"),
    ("figures_exist", swap(6, "03_curve", "03_other"), "03_other.png does not exist"),
    ("figures_exist", swap(6, "03_curve", "04_curve"), "does not start with 03_"),
    ("figures_exist", swap(6, '"03_curve"', 'f"03_{MODEL}"'), "not a plain text"),
    ("no_loose_figures", source(6, 'fig.savefig("x.png")'), "savefig"),
]


@pytest.mark.parametrize(
    ("check", "change", "complaint"), BAD, ids=[f"{i:02d}-{b[0]}" for i, b in enumerate(BAD)]
)
@pytest.mark.filterwarnings("ignore::nbformat.warnings.DuplicateCellId")
@pytest.mark.filterwarnings("ignore::nbformat.warnings.MissingIDFieldWarning")
def test_bad_notebook_is_caught(checkout, check, change, complaint):
    nb = good_notebook(checkout)
    change(nb)
    complaints = getattr(style, check)(write_unchecked(checkout, nb))
    assert any(complaint in c for c in complaints), complaints


def write_unchecked(root: Path, nb) -> Sheet:
    """As `write`, for notebooks that nbformat itself would refuse or mend."""
    import json

    path = root / "notebooks" / "03_good.ipynb"
    path.write_text(json.dumps(nb), encoding="utf-8")
    return Sheet(path, root)


def test_class_may_be_long(checkout):
    nb = good_notebook(checkout)
    nb.cells[5].source = "class Long:\n" + "\n".join(f"    x{i} = {i}" for i in range(40))
    assert style.cell_length(write(checkout, nb)) == []


def test_solution_title_is_caught(checkout):
    for old, new in (("solutions", "answers"), ("../03_good.ipynb", "../04_good.ipynb")):
        nb = good_solutions(checkout)
        swap(0, old, new)(nb)
        assert style.title_of_solution(write(checkout, nb, "solutions/03_good_solutions"))


def test_solutions_without_a_notebook_are_caught(checkout):
    write(checkout, good_solutions(checkout), "solutions/07_gone_solutions")
    assert checkout_style.solutions_match(checkout) == ["07_gone_solutions belongs to no notebook"]


def test_missing_solutions_are_caught(checkout):
    nb = good_notebook(checkout)
    nb.cells[-1].source = nb.cells[-1].source.replace("2. And again.", "2. On.\n3. And on.")
    write(checkout, nb)
    assert checkout_style.solutions_match(checkout) == [
        "03_good_solutions has no section 'Exercise 3'"
    ]
    (checkout / "notebooks" / "solutions" / "03_good_solutions.ipynb").unlink()
    assert "no solutions notebook" in checkout_style.solutions_match(checkout)[0]


def test_unlinked_solutions_are_caught(checkout):
    nb = good_notebook(checkout)
    swap(-1, "(solutions/", "(elsewhere/")(nb)
    write(checkout, nb)
    assert "do not link" in checkout_style.solutions_match(checkout)[0]


def test_orphan_figure_is_caught(checkout):
    (checkout / "figures" / "03_old.png").write_bytes(b"png")
    (checkout / "figures" / "banner.png").write_bytes(b"png")
    assert checkout_style.no_orphan_figures(checkout) == [
        "figures/03_old.png is drawn by no notebook 03"
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("09_none:\n  STEPS: 2\n", "no notebook is called 09_none"),
        ("03_good:\n  STEP: 2\n", "Did you mean 'STEPS'"),
        ("03_good:\n  STEPS: two\n", "STEPS must be a whole number"),
        ("STEPS: 2\n", "outside any notebook's section"),
    ],
)
def test_bad_parameter_set_is_caught(checkout, text, complaint):
    (checkout / "notebooks" / "params" / "t4.yaml").write_text(text)
    (found,) = checkout_style.parameter_sets_fit(checkout)
    assert complaint in found


@pytest.mark.parametrize("name", ["MODEL", "STEPS", "SECOND_STEPS"])
def test_disagreeing_defaults_are_caught(checkout, name):
    nb = good_notebook(checkout, "05_other")
    old = {"MODEL": '"tiny"', "STEPS": "80", "SECOND_STEPS": "30"}[name]
    swap(1, old, '"other"' if name == "MODEL" else "31")(nb)
    write(checkout, nb, "05_other")
    complaints = checkout_style.shared_parameters_agree(checkout)
    assert any(c.startswith(f"{name} differs (default)") for c in complaints)


def test_disagreeing_smoke_set_is_caught(checkout):
    write(checkout, good_notebook(checkout, "05_other"), "05_other")
    (found,) = checkout_style.shared_parameters_agree(checkout)
    assert found.startswith("STEPS differs (smoke)")


def test_steps_that_are_not_the_recipes_are_caught(checkout):
    for name in ("03_good", "solutions/03_good_solutions"):
        nb = good_notebook(checkout)
        swap(1, "STEPS = 80", "STEPS = 81")(nb)
        write(checkout, nb, name)
    (found,) = checkout_style.shared_parameters_agree(checkout)
    assert found.startswith("STEPS is not the addition recipe's 80")


@pytest.mark.parametrize(
    ("before", "slug", "after"),
    [
        ("see https://github.com/", "another/kit", " for more"),
        ("https://colab.research.google.com/github/", "another/kit", "/blob/main/x.ipynb"),
        ("https://colab.research.google.com/github/", "an-owner/old-kit", "/blob/main/x.ipynb"),
        ("https://raw.githubusercontent.com/", "another/kit", "/main/figures/03_curve.png"),
    ],
)
def test_another_address_is_caught(checkout, before, slug, after):
    readme = checkout / "README.md"
    readme.write_text(before + slug + after)
    assert checkout_style.one_address(checkout) == [f"README.md names {slug}, not an-owner/kit"]
    readme.write_text(f"{before}an-owner/kit{after}, and https://github.com/huggingface/peft")
    assert checkout_style.one_address(checkout) == []


def test_every_check_has_a_notebook_that_it_catches():
    caught = {b[0] for b in BAD}
    on_their_own = {"title_of_solution"}
    every = {named(c) for c in (*style.COURSE_CHECKS, *style.SOLUTION_CHECKS)}
    assert every - caught - on_their_own == set()
