"""The growing loss curve, and runs in processes of their own."""

import nbformat
from nbclient import NotebookClient
from train_fixtures import tiny_spec

from lora_kit.data import Dataset
from lora_kit.live import LiveLoss
from lora_kit.train.apart import finetune_apart

CODE = """
import lora_kit.live
lora_kit.live.SECONDS_BETWEEN = -1
from lora_kit.live import LiveLoss
live = LiveLoss("Sums")
for step in range(1, 6):
    live(step, 1 / step)
"""


def test_an_executed_notebook_holds_the_last_figure_once():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CODE)])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    outputs = notebook.cells[0].outputs
    assert [o.output_type for o in outputs] == ["display_data"]
    assert "image/png" in outputs[0].data


def test_without_a_notebook_it_only_draws():
    live = LiveLoss("Sums", window=2)
    for step, loss in ((1, 3.0), (2, 1.0)):
        live(step, loss)
    live.draw()
    points, mean = live.axes.lines
    assert list(points.get_ydata()) == [3.0, 1.0]
    assert list(mean.get_ydata()) == [2.0]


def test_every_run_comes_back_in_order(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_KIT_HOME", str(tmp_path))
    rows = tuple({"prompt": f"{i} +", "completion": f" {i}"} for i in range(6))
    data = Dataset("sums", "train", rows, "test", "0")
    spec = tiny_spec(steps=2, warmup=0.0)
    runs = [("native", spec), ("native", tiny_spec(steps=1, warmup=0.0)), ("trl", spec)]
    done = finetune_apart(str(tiny_folder), data, runs)
    assert [(r.result.engine, len(r.ends)) for r in done] == [
        ("native", 2),
        ("native", 1),
        ("trl", 2),
    ]
    assert all((r.result.adapter / "adapter_model.safetensors").exists() for r in done)
    assert all(r.steady > 0 for r in done)
