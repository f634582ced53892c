"""What a machine may do, on this one and on ones that are not here."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest

from lora_kit import hardware
from lora_kit.errors import BadInputError
from lora_kit.hardware import (
    GIB,
    ChildrenMemory,
    PeakMemory,
    advice,
    choose_dtype,
    detect,
    report,
)

T4 = ("Tesla T4", (7, 5), int(14.7 * GIB))
H100 = ("NVIDIA H100 80GB HBM3", (9, 0), 79 * GIB)


@pytest.mark.parametrize(
    ("capability", "rules", "dtype", "why"),
    [
        (None, False, "float32", "CPU"),
        (None, True, "float32", "CPU"),
        ((6, 1), False, "float16", "6.1 has no bf16"),
        ((7, 0), False, "float16", "7.0 has no bf16"),
        ((7, 5), False, "float16", "7.5 has no bf16"),
        ((7, 5), True, "float16", "T4 rules"),
        ((8, 0), False, "bfloat16", "8.0 has bf16"),
        ((8, 0), True, "float16", "T4 rules"),
        ((8, 9), False, "bfloat16", "8.9 has bf16"),
        ((9, 0), False, "bfloat16", "9.0 has bf16"),
        ((10, 0), False, "bfloat16", "10.0 has bf16"),
        ((12, 0), True, "float16", "T4 rules"),
    ],
)
def test_dtype_and_why(capability, rules, dtype, why):
    chosen, reason = choose_dtype(capability, rules)
    assert chosen == dtype
    assert why in reason


@pytest.mark.parametrize(
    ("value", "wanted"),
    [(None, False), ("", False), ("0", False), ("false", False), ("1", True), (" True ", True)],
)
def test_the_t4_switch(monkeypatch, value, wanted):
    if value is not None:
        monkeypatch.setenv("LORA_KIT_T4_RULES", value)
    assert hardware.t4_rules_wanted() is wanted


def test_a_misspelt_t4_switch_is_refused(monkeypatch):
    monkeypatch.setenv("LORA_KIT_T4_RULES", "yes")
    with pytest.raises(BadInputError, match="LORA_KIT_T4_RULES must be 0 or 1, not 'yes'"):
        hardware.t4_rules_wanted()
    with pytest.raises(BadInputError, match="LORA_KIT_T4_RULES"):
        detect()


def test_a_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = detect(tmp_path / "not" / "there")
    assert (found.kind, found.device, found.dtype) == ("cpu", "cpu", "float32")
    assert (found.gpu, found.capability, found.gpu_memory) == (None, None, 0)
    assert 0 < found.memory_free <= found.memory
    assert found.cores >= 1
    assert found.disk_free > 0
    assert found.name == f"{found.cpu}, {found.cores} cores"
    assert not hardware.hold_to_t4_rules()


def test_the_t4_switch_changes_nothing_on_a_cpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("LORA_KIT_T4_RULES", "1")
    assert (detect().kind, detect().dtype) == ("cpu", "float32")
    assert not hardware.hold_to_t4_rules()


def test_a_t4(fake_gpu):
    calls = fake_gpu(*T4)
    found = detect()
    assert (found.kind, found.device, found.dtype) == ("t4", "cuda", "float16")
    assert (found.gpu, found.name, found.capability) == ("Tesla T4", "Tesla T4", (7, 5))
    assert found.gpu_memory - found.gpu_memory_free == GIB
    assert not hardware.hold_to_t4_rules()
    assert calls == {}


def test_a_newer_gpu(fake_gpu):
    fake_gpu(*H100)
    found = detect()
    assert (found.kind, found.dtype, found.gpu_memory) == ("gpu", "bfloat16", 79 * GIB)


def test_a_newer_gpu_held_to_t4_rules(fake_gpu, monkeypatch):
    calls = fake_gpu(*H100)
    monkeypatch.setenv("LORA_KIT_T4_RULES", "1")
    found = detect()
    assert (found.kind, found.device, found.dtype) == ("gpu-t4-rules", "cuda", "float16")
    assert found.gpu_memory == found.gpu_memory_free == 15 * GIB
    assert found.name == f"{H100[0]}, held to T4 rules"
    assert hardware.hold_to_t4_rules()
    assert calls == {"fraction": pytest.approx(15 / 79), "flash": False, "cudnn": False}


def test_a_smaller_gpu_held_to_t4_rules_keeps_its_memory(fake_gpu, monkeypatch):
    calls = fake_gpu("small", (8, 6), 8 * GIB)
    monkeypatch.setenv("LORA_KIT_T4_RULES", "1")
    assert detect().gpu_memory == 8 * GIB
    hardware.hold_to_t4_rules()
    assert calls["fraction"] == 1.0


def test_a_record_keeps_the_machine_not_the_moment(fake_gpu):
    fake_gpu(*T4)
    kept = detect().to_dict()
    assert json.loads(json.dumps(kept)) == kept
    assert kept["capability"] == [7, 5]
    assert not {"memory_free", "disk_free", "gpu_memory_free", "why"} & set(kept)


def test_doctor_on_a_cpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    text = report(detect())
    for part in ("(cpu)", "compute in", "float32. A CPU", "GiB free", "- No GPU"):
        assert part in text
    assert "GPU memory" not in text


def test_doctor_on_a_gpu(fake_gpu):
    fake_gpu(*T4)
    text = report(detect())
    assert "Tesla T4 (t4)" in text
    assert "13.7 of 14.7 GiB free" in text
    assert "float16. Compute capability 7.5" in text
    assert "- A GPU: run a notebook with '-f t4'" in text


def test_advice_names_what_is_short(fake_gpu):
    from dataclasses import replace

    fake_gpu(*T4)
    gpu = detect()
    plenty = replace(gpu, disk_free=50 * GIB, memory_free=50 * GIB)
    assert len(advice(plenty)) == 1
    assert "2.0 GiB of GPU memory" in advice(replace(plenty, gpu_memory_free=2 * GIB))[1]
    assert "1.5 GiB of disk" in advice(replace(plenty, disk_free=int(1.5 * GIB)))[1]
    cpu = replace(plenty, kind="cpu", gpu=None)
    assert len(advice(cpu)) == 1
    assert "1.0 GiB of memory" in advice(replace(cpu, memory_free=GIB))[1]


def test_peak_memory_sees_what_a_block_took(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    size = 100 * 2**20
    with PeakMemory() as memory:
        block = np.ones(size, dtype=np.uint8)
        time.sleep(0.1)  # a sample is taken every 10 ms
        del block
    assert memory.delta == memory.peak - memory.before
    assert 0.9 * size < memory.delta < 3 * size


def test_peak_memory_on_a_gpu_is_what_torch_counts(fake_gpu, monkeypatch):
    fake_gpu(*T4)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda: 100)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: 350)
    with PeakMemory() as memory:
        pass
    assert (memory.before, memory.peak, memory.delta) == (100, 350, 250)


def test_children_memory_sees_what_a_child_held():
    with ChildrenMemory() as none:
        pass
    hold = "b = bytearray(200_000_000); import time; time.sleep(1.5)"
    with ChildrenMemory() as some:
        subprocess.run([sys.executable, "-c", hold], check=True)
    assert none.peak == 0
    assert 200e6 < some.peak < 400e6
