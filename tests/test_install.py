"""What a machine that has most things lacks: exactly that, and never torch."""

import sys
import types

import pytest
from packaging.requirements import Requirement

from lora_kit import install
from lora_kit.errors import NotAvailableError
from lora_kit.install import NEEDED, WORKS, install_missing, installed_versions, missing

# Colab's image of August 2026 (Python 3.12).
COLAB = {
    "torch": "2.11.0+cu128",
    "transformers": "5.15.0",
    "peft": "0.20.0",
    "datasets": "4.0.0",
    "torchao": "0.10.0",
    "accelerate": "1.14.0",
    "matplotlib": "3.10.8",
    "statsmodels": "0.14.6",
    "pydantic": "2.13.1",
    "typer": "0.24.0",
    "platformdirs": "4.9.0",
    "sentencepiece": "0.2.1",
    "diffusers": "0.38.0",
    "typeguard": "4.5.0",
    "nest-asyncio": "1.6.0",
}


def names(requirements):
    return {Requirement(r).name for r in requirements}


def pins(file):
    return install._pins(file)


def test_colab_without_a_gpu():
    ordinary, alone = missing(COLAB, gpu=False)
    assert names(ordinary) == {
        "trl",
        "datasets",
        "bitsandbytes",
        "lm_eval",
        "gguf",
        "papermill",
        "torchao",
    }
    assert alone == []


def test_colab_with_a_gpu_adds_unsloth_without_its_dependencies():
    ordinary, alone = missing(COLAB, gpu=True)
    assert ordinary == missing(COLAB, gpu=False)[0]
    assert {"unsloth", "unsloth_zoo", "cut_cross_entropy"} <= names(alone)
    assert not {"torchao", "diffusers", "sentencepiece", "typeguard", "torch"} & names(alone)
    assert names(alone) == names(pins("requirements-gpu.txt").values()) - set(COLAB)


@pytest.mark.parametrize("gpu", [False, True])
def test_torch_is_never_touched(gpu):
    for machine in (COLAB, {}, {"torch": "2.5.0"}):
        ordinary, alone = missing(machine, gpu)
        for name in names([*ordinary, *alone]):
            assert name not in ("torch", "torchvision", "torchaudio", "triton")


def test_a_complete_machine_needs_nothing():
    pinned = {**pins("requirements.txt"), **pins("requirements-gpu.txt")}
    complete = {n: next(iter(Requirement(r).specifier)).version for n, r in pinned.items()}
    assert missing(complete, gpu=True) == ([], [])


def test_this_machine_needs_nothing():
    assert missing(installed_versions(NEEDED), gpu=False) == ([], [])


def test_an_empty_machine_needs_all_but_torchao():
    ordinary, _ = missing({}, gpu=False)
    assert names(ordinary) == set(NEEDED)
    for requirement in ordinary:
        assert "==" in requirement


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("transformers", "5.18.0", "5.17.0"),
        ("transformers", "4.57.1", "5.15.0"),
        ("datasets", "4.5.0", "4.8.5"),
        ("datasets", "4.4.2", "4.3.0"),
        ("datasets", "5.0.0", "4.6.0"),
        ("peft", "0.22.0", "0.21.2"),
        ("torchao", "0.10.0", "0.18.0"),
        ("trl", "1.14.0", "1.15.0"),
    ],
)
def test_versions_that_do_not_work_are_replaced(name, bad, good):
    pinned = pins("requirements.txt")
    machine = {n: next(iter(Requirement(pinned[n]).specifier)).version for n in NEEDED}
    assert names(missing({**machine, name: bad}, gpu=False)[0]) == {name}
    assert missing({**machine, name: good}, gpu=False) == ([], [])


def test_our_pins_are_versions_that_work():
    for name, requirement in pins("requirements.txt").items():
        if name in WORKS:
            version = next(iter(Requirement(requirement).specifier)).version
            assert Requirement(f"{name}{WORKS[name]}").specifier.contains(version)


def fake_pip(monkeypatch, machine, code=0):
    commands = []

    def run(command, **_):
        commands.append(command)
        return types.SimpleNamespace(returncode=code)

    monkeypatch.setattr(install.subprocess, "run", run)
    found = {n.lower().replace("_", "-"): v for n, v in machine.items()}

    def version(name):
        try:
            return found[name.lower().replace("_", "-")]
        except KeyError:
            raise install.metadata.PackageNotFoundError(name) from None

    monkeypatch.setattr(install.metadata, "version", version)
    return commands


def test_pip_is_told_to_keep_torch(monkeypatch, capsys):
    commands = fake_pip(monkeypatch, COLAB)
    install_missing(gpu=True)
    ordinary, alone = commands
    assert ordinary[:4] == [sys.executable, "-m", "pip", "install"]
    assert "torch==2.11.0+cu128" in ordinary
    assert "--no-deps" not in ordinary
    assert "--no-deps" in alone
    assert "unsloth==2026.10.9" in alone
    assert capsys.readouterr().out.startswith("Installed: ")


def test_a_complete_machine_runs_no_pip(monkeypatch, capsys):
    commands = fake_pip(monkeypatch, installed_versions([*NEEDED, "torch"]))
    install_missing(gpu=False)
    assert commands == []
    assert "nothing was missing" in capsys.readouterr().out


def test_without_a_gpu_unsloth_is_left_out(monkeypatch):
    commands = fake_pip(monkeypatch, COLAB)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    install_missing()
    assert len(commands) == 1
    assert not any("unsloth" in word for word in commands[0])


def test_pip_that_fails_is_said(monkeypatch):
    fake_pip(monkeypatch, COLAB, code=1)
    with pytest.raises(NotAvailableError, match=r"pip could not install .*trl.*ended with 1"):
        install_missing(gpu=False)
