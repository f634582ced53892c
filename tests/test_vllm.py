"""Export for vLLM: the command's numbers, whole folders, and what vLLM cannot serve."""

import shlex
import subprocess

import pytest
from lora_fixtures import tiny_llama

from lora_kit.errors import BadInputError, NotAvailableError
from lora_kit.lora import LoraSpec, add_lora, read_adapter, save_lora
from lora_kit.vllm import base_address, export_vllm, serve_command, slot_rank


def adapter(folder, rank=4, **options):
    return save_lora(add_lora(tiny_llama(), LoraSpec(rank, 8, **options), seed=0), folder)


@pytest.fixture
def pair(tmp_path):
    return {"a": adapter(tmp_path / "in" / "a"), "b": adapter(tmp_path / "in" / "b", rank=12)}


@pytest.mark.parametrize(
    ("rank", "slot"), [(1, 1), (2, 8), (8, 8), (9, 16), (256, 256), (512, 512)]
)
def test_slots(rank, slot):
    assert slot_rank(rank) == slot


def test_a_rank_beyond_vllm():
    with pytest.raises(BadInputError, match="up to rank 512, not 513"):
        slot_rank(513)


def test_the_command():
    one = serve_command("smollm2-135m-instruct", {"x": "/some where/x"}, 4)
    words = shlex.split(one)
    assert words[:4] == ["vllm", "serve", base_address("smollm2-135m-instruct"), "--enable-lora"]
    assert words[4:] == ["--max-lora-rank", "8", "--lora-modules", "x=/some where/x"]
    many = shlex.split(serve_command("./base", {"x": "x", "y": "y", "z": "z"}, 16, 2, half=True))
    assert many[2] == "./base"
    at = many.index("--max-loras")
    assert many[at : at + 4] == ["--max-loras", "2", "--max-cpu-loras", "3"]
    assert many[-2:] == ["--dtype", "half"]


def test_the_folder_holds_all_that_the_command_names(pair, tmp_path):
    command = export_vllm("smollm2-135m-instruct", pair, tmp_path / "out", half=True)
    words = shlex.split(command)
    assert words[words.index("--max-lora-rank") + 1] == "16"
    assert words[words.index("--max-loras") + 1] == "2"
    for name in pair:
        assert f"{name}=adapters/{name}" in words
        assert read_adapter(tmp_path / "out" / "adapters" / name).config["peft_type"] == "LORA"
    script = tmp_path / "out" / "serve.sh"
    assert command in script.read_text()
    assert "--host 127.0.0.1" in script.read_text()
    assert subprocess.run(["sh", "-n", script], check=False).returncode == 0
    assert script.stat().st_mode & 0o111


def test_what_cannot_be_exported(pair, tmp_path):
    with pytest.raises(BadInputError, match="no adapter to export"):
        export_vllm("m", {}, tmp_path / "out")
    with pytest.raises(BadInputError, match="exists already"):
        export_vllm("m", pair, tmp_path)
    with pytest.raises(BadInputError, match="slots must be at least 1"):
        export_vllm("m", pair, tmp_path / "out", slots=0)
    with pytest.raises(NotAvailableError):
        export_vllm("m", {**pair, "c": tmp_path / "none"}, tmp_path / "out")
    with pytest.raises(BadInputError, match="d is a DoRA adapter"):
        export_vllm("m", {**pair, "d": adapter(tmp_path / "d", dora=True)}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
