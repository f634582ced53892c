"""The merged model on disk, uploads and trackers: asked for, checked, never by default."""

import sys
from types import SimpleNamespace

import pytest
import torch
from train_fixtures import tiny_spec

from lora_kit.data import Dataset
from lora_kit.errors import BadInputError, NotAvailableError, RunFailedError, UnknownNameError
from lora_kit.train import export, finetune
from lora_kit.train.export import export_merged, push_adapter
from lora_kit.train.log import tracker

ROWS = Dataset(
    "sums", "train", tuple({"prompt": f"{i} +", "completion": f" {i}"} for i in range(8)), "t", "0"
)


@pytest.fixture(params=["none", "nf4"])
def made(request, tiny_folder, tmp_path):
    spec = tiny_spec(steps=4, warmup=0.0, quantization=request.param)
    return finetune(str(tiny_folder), ROWS, spec, tmp_path / "adapter", "native")


def test_the_merged_model_read_back_is_base_plus_adapter(made, tiny_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    from lora_kit.lora import load_lora
    from lora_kit.models import load_model

    done = export_merged(str(tiny_folder), made, tmp_path / "merged")
    assert done.difference < 0.01
    assert done.bytes == sum(p.stat().st_size for p in done.folder.rglob("*") if p.is_file())
    plain = AutoModelForCausalLM.from_pretrained(done.folder, dtype=torch.float32)
    beside = load_model(str(tiny_folder), "float32", made.spec.quantization).model
    load_lora(beside, made.adapter)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        one, two = plain(ids).logits, beside(ids).logits
    assert (one - two).norm() / two.norm() < 0.01


def test_a_folder_that_holds_something_is_left_alone(made, tiny_folder, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("mine")
    with pytest.raises(BadInputError, match="holds something already"):
        export_merged(str(tiny_folder), made, tmp_path / "merged")
    assert [p.name for p in (tmp_path / "merged").iterdir()] == ["mine.txt"]


def test_a_disk_that_lies_is_caught(made, tiny_folder, tmp_path, monkeypatch):
    real = export._logits
    calls = []

    def drifting(model, ids):
        calls.append(1)
        return real(model, ids) * (1 if len(calls) == 1 else 1.1)

    monkeypatch.setattr(export, "_logits", drifting)
    with pytest.raises(RunFailedError, match="off base"):
        export_merged(str(tiny_folder), made, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


class FakeHub:
    def __init__(self):
        self.done = []

    def create_repo(self, repository, private, exist_ok):
        self.done.append(("create", repository, private))

    def upload_folder(self, repo_id, folder_path):
        self.done.append(("upload", repo_id, folder_path))
        return f"https://hub/{repo_id}"


def test_pushing_uploads_the_adapter_s_folder(monkeypatch, tmp_path):
    import huggingface_hub

    hub = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    result = SimpleNamespace(adapter=tmp_path)
    assert push_adapter(result, "me/sums") == "https://hub/me/sums"
    assert hub.done == [("create", "me/sums", True), ("upload", "me/sums", str(tmp_path))]
    with pytest.raises(BadInputError, match="owner/name"):
        push_adapter(result, "sums")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(NotAvailableError, match="hf auth login"):
        push_adapter(result, "me/sums")


def test_trackers_are_chosen_by_name(monkeypatch, tmp_path):
    with tracker("none", "run", tmp_path) as log:
        assert log is None
    with pytest.raises(UnknownNameError, match="tensorboard"), tracker("tensorbord", "r", tmp_path):
        pass
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(NotAvailableError, match="pip install trackio"):
        with tracker("trackio", "run", tmp_path):
            pass
    seen = []
    fake = SimpleNamespace(
        init=lambda **o: seen.append(o["name"]),
        log=lambda values, step: seen.append((step, values["train/loss"])),
        finish=lambda: seen.append("end"),
    )
    monkeypatch.setitem(sys.modules, "trackio", fake)
    with tracker("trackio", "run", tmp_path) as log:
        log(3, 0.5)
    assert seen == ["run", (3, 0.5), "end"]


def test_tensorboard_files_hold_the_losses(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not among the requirements")
    with tracker("tensorboard", "run", tmp_path / "tb") as log:
        log(1, 2.5)
    assert list((tmp_path / "tb").glob("events*"))
