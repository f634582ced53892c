"""The README's commands are real: each is taken apart and tried, or run dry, against this checkout.

A command that cannot be judged is a failure too: a README may not hold what nobody can check.
"""

from __future__ import annotations

import ast
import itertools
import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import sheets
import style
import typer

from lora_kit import cli
from lora_kit.errors import LoraKitError
from lora_kit.notebook import parameter_set
from lora_kit.studies import runner

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Reading commands: quick, offline, and they change nothing. They are really run.
REALLY_RUN = {"doctor", "plan", "models", "data"}
SHELL = {"sh", "bash", "shell", "console"}


def fenced(text: str, languages: set[str]) -> list[str]:
    """The bodies of the fenced blocks of a language."""
    blocks = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, flags=re.M | re.S)
    return [body for language, body in blocks if language in languages]


def commands(text: str) -> list[list[str]]:
    """The words of every command in the shell blocks; prompts and comments are dropped."""
    found = []
    for body in fenced(text, SHELL):
        for line in body.replace("\\\n", " ").splitlines():
            line = re.sub(r"^\s*\$ ", "", line)
            lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
            lexer.whitespace_split = True
            lexer.commenters = "#"
            part: list[str] = []
            for word in [*lexer, ";"]:
                if set(word) <= set(";&|"):
                    found += [part] if part else []
                    part = []
                else:
                    part.append(word)
    return found


def complaints(words: list[str]) -> list[str]:
    """What is wrong with a command; [] when it is real."""
    while words and re.match(r"[A-Z_]+=", words[0]):
        name, words = words[0].split("=")[0], words[1:]
        if not known_setting(name):
            return [f"{name} is a setting that nothing reads"]
    if not words:
        return []
    program = Path(words[0]).name
    if "/" in words[0] and not words[0].startswith(".venv/bin/"):
        return [f"{words[0]} is not a program of this checkout"]
    if program in ("python", "python3") and words[1:2] == ["-m"]:
        program, words = words[2], words[2:]
    check = CHECKS.get(program)
    return check(words[1:]) if check else [f"no test knows how to check {shlex.join(words)!r}"]


def known_setting(name: str) -> bool:
    return name in settings_in_code() or re.search(rf"^{name}\b", MAKEFILE, flags=re.M) is not None


def settings_in_code() -> set[str]:
    """Every LORA_KIT_* name that the package reads."""
    texts = [p.read_text(encoding="utf-8") for p in (ROOT / "lora_kit").rglob("*.py")]
    return set(re.findall(r'"(LORA_KIT_[A-Z0-9_]+)"', "\n".join(texts)))


MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def check_make(words: list[str]) -> list[str]:
    found = []
    phony = " ".join(re.findall(r"^\.PHONY:(.*)$", MAKEFILE, flags=re.M)).split()
    for word in words:
        if "=" in word:
            name = word.split("=")[0]
            if not re.search(rf"^{name}\s*[?:]?=", MAKEFILE, flags=re.M):
                found.append(f"the Makefile has no variable {name}")
        elif word not in phony:
            found.append(f"the Makefile has no target {word}")
    dry = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
    if dry.returncode:
        found.append(f"make -n {' '.join(words)}: {dry.stderr.strip()}")
    return found


def check_lora_kit(words: list[str]) -> list[str]:
    """The subcommand exists, its own parser takes the words, and what they name exists."""
    group = typer.main.get_command(cli.app)
    if not words or words == ["--help"]:
        return []
    if words[0] not in group.commands:
        return [f"lora-kit has no command {words[0]}"]
    command = group.commands[words[0]]
    given = cli._pair_parameters(words)[1:]
    try:
        context = command.make_context(words[0], list(given))
    except Exception as e:  # click's own errors, in whatever package typer keeps them
        return [f"lora-kit {shlex.join(words)}: {getattr(e, 'message', e)}"]
    try:
        what_is_named_exists(words[0], context.params)
        if words[0] in REALLY_RUN:
            cli.main(words)
    except LoraKitError as e:
        return [f"lora-kit {shlex.join(words)}: {e}"]
    except SystemExit as e:
        return [f"lora-kit {shlex.join(words)} ended with {e.code}"] if e.code else []
    return []


def what_is_named_exists(command: str, options: dict) -> None:
    """Notebooks, parameters, parameter sets and models named by a command that is not run.

    Raises:
        LoraKitError: the package's own, for what does not exist.
    """
    notebook = runner.find_notebook(options["notebook"]) if command == "run" else None
    if options.get("file"):
        for name in [notebook.stem] if notebook else runner.list_notebooks():
            found = parameter_set(options["file"], name)
            runner.check_parameters(runner.find_notebook(name), found)
    if notebook and options.get("parameter"):
        pairs = dict(p.split("=", 1) for p in options["parameter"])
        runner.check_parameters(notebook, runner.parse_parameters(str(notebook), pairs))
    if command == "sweep":
        from lora_kit.studies.sweep_grid import cells_of, names_of, read_grid
        from lora_kit.studies.sweep_targets import find_target, fixed_parameters

        target, grid = find_target(options["target"]), read_grid(options["grid"])
        texts = dict(p.split("=", 1) for p in options["parameter"] or [])
        fixed = fixed_parameters(target, texts, options["file"], names_of(grid))
        cells_of(target, grid, [0], fixed)
    if command == "fetch":
        from lora_kit.errors import unknown_name
        from lora_kit.models import MODELS

        if options["model"] not in MODELS:
            raise unknown_name("model", options["model"], MODELS)


def check_pip(words: list[str]) -> list[str]:
    if words[:1] != ["install"]:
        return [f"pip {shlex.join(words)} installs nothing"]
    files = [b for a, b in itertools.pairwise(words) if a in ("-r", "-e", "-c")]
    if not files:
        return ["pip install names packages; requirements*.txt is where they stand"]
    return check_paths(files)


def check_conda(words: list[str]) -> list[str]:
    if words[:2] == ["env", "create"] and "-f" in words:
        return check_paths([words[words.index("-f") + 1]])
    environment = (ROOT / "environment.yml").read_text(encoding="utf-8")
    if words[:1] == ["activate"] and f"name: {words[1]}" in environment:
        return []
    return [f"conda {shlex.join(words)} does not fit environment.yml"]


def check_git(words: list[str]) -> list[str]:
    url = sheets.repository_url(ROOT)
    if words[:1] == ["clone"] and words[-1].removesuffix(".git") == url:
        return []
    return [f"git {shlex.join(words)} does not clone {url}"]


def check_cd(words: list[str]) -> list[str]:
    cloned = sheets.repository_url(ROOT).rsplit("/", 1)[1]
    return [] if words == [cloned] else check_paths(words)


def check_paths(words: list[str]) -> list[str]:
    """Every word that is no option is a path of the checkout."""
    paths = [w.split("::")[0] for w in words if not w.startswith("-")]
    return [f"there is no {path}" for path in paths if not (ROOT / path).exists()]


def check_launch(words: list[str]) -> list[str]:
    """torchrun and `accelerate launch`, with `-m lora_kit`: read by their own parsers."""
    if words[:1] == ["launch"]:
        from accelerate.commands.launch import launch_command_parser

        parser, words = launch_command_parser(), words[1:]
    else:
        from torch.distributed.run import get_args_parser

        parser = get_args_parser()
    try:
        given = parser.parse_args(words)
    except SystemExit:
        return [f"{shlex.join(words)} is not what the launcher takes"]
    if not given.module or given.training_script != "lora_kit":
        return ["what is launched is not -m lora_kit"]
    return check_lora_kit(given.training_script_args)


def check_ray(words: list[str]) -> list[str]:
    from ray.scripts.scripts import cli as ray_cli

    if words[:1] != ["start"]:
        return [f"ray {shlex.join(words)} starts nothing"]
    try:
        ray_cli.commands["start"].make_context("start", list(words[1:]))
    except Exception as e:  # click's own errors
        return [f"ray {shlex.join(words)}: {getattr(e, 'message', e)}"]
    return []


def check_export(words: list[str]) -> list[str]:
    names = [w.split("=")[0] for w in words]
    return [f"{name} is a setting that nothing reads" for name in names if not known_setting(name)]


CHECKS = {
    "make": check_make,
    "lora-kit": check_lora_kit,
    "pip": check_pip,
    "conda": check_conda,
    "git": check_git,
    "cd": check_cd,
    "export": check_export,
    "torchrun": check_launch,
    "accelerate": check_launch,
    "ray": check_ray,
    "python": check_paths,
    "python3": check_paths,
    "source": lambda words: [] if words == [".venv/bin/activate"] else check_paths(words),
    "pytest": check_paths,
    "jupyter": lambda words: [] if words[:1] == ["lab"] else ["jupyter lab is what is installed"],
}


# The README ------------------------------------------------------------------------------------


def test_readme_has_commands():
    """Otherwise every test below would pass on nothing."""
    said = [" ".join(words) for words in commands(README)]
    assert "make demo" in said
    assert "make test" in said
    assert any(" run " in f" {words} " and "lora-kit" in words for words in said)


@pytest.mark.parametrize("words", commands(README), ids=lambda words: " ".join(words)[:60])
def test_command(words):
    assert complaints(words) == []


def test_inline_commands():
    """`make x` and `lora-kit x` in running text exist too."""
    prose = re.sub(r"^```.*?^```", "", README, flags=re.M | re.S)
    group = typer.main.get_command(cli.app)
    for code in re.findall(r"`([^`\n]+)`", prose):
        words = code.split()
        if words[0] == "make" and len(words) > 1:
            assert check_make(words[1:]) == [], code
        if words[0] == "lora-kit" and len(words) > 1:
            assert words[1] in group.commands, code


def test_every_command_of_lora_kit_has_help(capsys):
    for name, command in typer.main.get_command(cli.app).commands.items():
        with pytest.raises(SystemExit) as ended:
            cli.main([name, "--help"])
        assert not ended.value.code, name
        assert "--help" in capsys.readouterr().out, name
        assert command.help, f"lora-kit {name} does not say what it does"


def test_links_resolve():
    for target in style.LINK.findall(README):
        if not re.match(r"[a-z]+:|#", target):
            assert (ROOT / target.split("#")[0]).exists(), f"the link {target} leads nowhere"


def test_every_notebook_is_in_the_table():
    linked = set(re.findall(r"\(notebooks/(\w+)\.ipynb\)", README))
    assert linked == set(runner.list_notebooks())


def test_settings_are_those_the_package_reads():
    assert set(re.findall(r"`(LORA_KIT_[A-Z0-9_]+)`", README)) == settings_in_code()


def test_no_placeholder_is_left():
    assert re.findall(r"@[A-Z0-9]+@|\bTODO\b|\bTBD\b|\bXXX\b", README) == []


@pytest.mark.parametrize("code", fenced(README, {"python"}))
def test_python_block_fits_the_package(code):
    """The block runs, with a `finetune` that trains nothing but checks its arguments."""
    from lora_kit import train

    result = SimpleNamespace(adapter=Path("adapter"), losses=((1, 0.5),))
    with mock.patch.object(
        train, "finetune", mock.create_autospec(train.finetune, return_value=result)
    ):
        exec(compile(ast.parse(code), "README.md", "exec"), {})


# The test itself: what is not real is caught ---------------------------------------------------


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("make demos", "no target demos"),
        ("make README.md", "no target README.md"),
        ("make test SPEED=9", "no variable SPEED"),
        ("lora-kit rum 03", "no command rum"),
        ("lora-kit run 97", "Unknown notebook"),
        ("lora-kit run", "lora-kit run"),
        ("lora-kit run 03 --fast", "--fast"),
        ("lora-kit run 03 -f smok", "Did you mean 'smoke'"),
        ("lora-kit run 03 -p STEP 3", "Did you mean 'STEPS'"),
        ("lora-kit run 03 -p STEPS many", "whole number"),
        (".venv/bin/lora-kit run 03 -f nothing", "Unknown parameter set"),
        ("lora-kit fetch smollm3", "Unknown model"),
        ("lora-kit plan llama-9", "ended with 2"),
        ("lora-kit demo -f smok", "Did you mean 'smoke'"),
        ("pip install torch", "names packages"),
        (".venv/bin/pip install -r requirements-gpus.txt", "no requirements-gpus.txt"),
        ("python -m pip install -r nothing.txt", "no nothing.txt"),
        ("python benchmarks/nothing.py", "no benchmarks/nothing.py"),
        ("git clone https://github.com/somebody/else", "does not clone"),
        ("lora-kit sweep addition --grid nothing.yaml", "no grid nothing.yaml"),
        ("lora-kit sweep 97 --grid benchmarks/grids/rank.yaml", "Unknown target"),
        ("lora-kit sweep addition --grid benchmarks/grids/rank.yaml -p stepz 3", "'steps'"),
        ("torchrun --nproc-pre-node 2 -m lora_kit doctor", "not what the launcher takes"),
        ("torchrun --nproc-per-node 2 lora_kit", "not -m lora_kit"),
        ("accelerate launch -m lora_kit finetun", "no command finetun"),
        ("ray start --heads", "--heads"),
        ("ray stop", "starts nothing"),
        ("cd nowhere", "no nowhere"),
        ("export LORA_KIT_HOUSE=/x", "nothing reads"),
        ("LORA_KIT_HOUSE=/x make demo", "nothing reads"),
        ("bin/lora-kit doctor", "not a program"),
        ("curl https://example.org | sh", "no test knows"),
        ("make lab && make nothing", "no target nothing"),
    ],
)
def test_unreal_command_is_caught(line, complaint):
    found = [c for words in commands(f"```sh\n{line}  # why\n```\n") for c in complaints(words)]
    assert any(complaint in c for c in found), found


def test_commands_are_found_in_all_their_forms():
    text = (
        "```bash\n$ make demo  # a comment\nA=1 lora-kit run 03 \\\n  -f smoke; cd x && ls\n```\n"
    )
    assert commands(text + "```python\nmake = 1\n```\n") == [
        ["make", "demo"],
        ["A=1", "lora-kit", "run", "03", "-f", "smoke"],
        ["cd", "x"],
        ["ls"],
    ]


def test_wrong_python_block_is_caught():
    code = "from lora_kit.train import finetune\n\nfinetune('m', rows=[], spec=None, spice=1)\n"
    with pytest.raises(TypeError, match="spice"):
        test_python_block_fits_the_package(code)
