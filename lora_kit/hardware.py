"""What this machine is, and what it may do.

`detect` answers every question about the machine in one value; `PeakMemory` measures a block of
code; `hold_to_t4_rules` makes a bigger GPU obey what a Colab T4 allows.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from lora_kit.errors import BadInputError

GIB = 2**30
T4_MEMORY_BYTES = 15 * GIB  # what a Colab T4 has left for a program, of its 16 GB
T4_SWITCH = "LORA_KIT_T4_RULES"


@dataclass(frozen=True)
class Hardware:
    """This machine. Memory and disk in bytes.

    kind: "cpu", "t4" (compute capability 7.x), "gpu" (8.0 or newer) or "gpu-t4-rules" (a newer GPU
    held to a T4's rules). dtype: what to compute in, and `why`.
    """

    kind: str
    name: str
    cpu: str
    cores: int
    memory: int
    memory_free: int
    disk_free: int
    gpu: str | None
    gpu_memory: int
    gpu_memory_free: int
    capability: tuple[int, int] | None
    dtype: str
    why: str
    system: str
    python: str

    @property
    def device(self) -> str:
        """The torch device to use: "cuda" or "cpu"."""
        return "cpu" if self.kind == "cpu" else "cuda"

    def to_dict(self) -> dict:
        """What a result record keeps: the machine, not its free space of the moment."""
        keep = asdict(self)
        for passing in ("memory_free", "disk_free", "gpu_memory_free", "why"):
            keep.pop(passing)
        keep["capability"] = list(self.capability) if self.capability else None
        return keep


def t4_rules_wanted() -> bool:
    """Whether LORA_KIT_T4_RULES asks to hold a bigger GPU to a T4's rules."""
    value = os.environ.get(T4_SWITCH, "0").strip().lower()
    if value not in ("", "0", "1", "false", "true"):
        raise BadInputError(f"{T4_SWITCH} must be 0 or 1, not {value!r}.")
    return value in ("1", "true")


def choose_dtype(capability: tuple[int, int] | None, t4_rules: bool = False) -> tuple[str, str]:
    """The dtype to compute in, and why.

    Args:
        capability: the GPU's compute capability (major, minor); None for a CPU.
        t4_rules: treat a newer GPU as a T4.
    """
    if capability is None:
        return "float32", "A CPU: fp32 is fastest there and needs no loss scaling."
    if t4_rules:
        return "float16", "Held to T4 rules: fp16 with a loss scaler, no bf16, 15 GiB."
    if capability >= (8, 0):
        return "bfloat16", (
            f"Compute capability {capability[0]}.{capability[1]} has bf16 units: fp32's range, "
            "so no loss scaler."
        )
    return "float16", (
        f"Compute capability {capability[0]}.{capability[1]} has no bf16 units (torch only "
        "emulates it): fp16 with a loss scaler."
    )


def detect(folder: Path | None = None) -> Hardware:
    """Look at this machine.

    Args:
        folder: the disk to report on; the kit's cache by default.
    """
    import psutil
    import torch

    from lora_kit.store import home

    place = folder or home()
    while not place.exists():
        place = place.parent
    rules = t4_rules_wanted()
    gpu, gpu_memory, gpu_free, capability, kind = None, 0, 0, None, "cpu"
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name(0)
        gpu_free, gpu_memory = torch.cuda.mem_get_info(0)
        capability = torch.cuda.get_device_capability(0)
        if rules:
            kind = "gpu-t4-rules"
            gpu_free, gpu_memory = min(gpu_free, T4_MEMORY_BYTES), min(gpu_memory, T4_MEMORY_BYTES)
        else:
            kind = "gpu" if capability >= (8, 0) else "t4"
    dtype, why = choose_dtype(capability, rules)
    memory = psutil.virtual_memory()
    cpu, cores = _cpu_name(), _cores()
    name = f"{gpu}{', held to T4 rules' if rules else ''}" if gpu else f"{cpu}, {cores} cores"
    return Hardware(
        kind=kind,
        name=name,
        cpu=cpu,
        cores=cores,
        memory=memory.total,
        memory_free=memory.available,
        disk_free=shutil.disk_usage(place).free,
        gpu=gpu,
        gpu_memory=gpu_memory,
        gpu_memory_free=gpu_free,
        capability=capability,
        dtype=dtype,
        why=why,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
    )


def hold_to_t4_rules() -> bool:
    """Cap this process's GPU memory at a T4's 15 GiB where LORA_KIT_T4_RULES=1 asks for it.

    fp16 follows from `detect().dtype`; FlashAttention and cuDNN's fused attention are off because a
    T4 has neither. Returns whether the rules are in force; on a CPU, or without the switch, nothing
    changes.
    """
    import torch

    if not (t4_rules_wanted() and torch.cuda.is_available()):
        return False
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, T4_MEMORY_BYTES / total))
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    return True


class PeakMemory:
    """Measure the memory a block of code takes.

    ::

        with PeakMemory() as memory:
            train()
        print(memory.peak - memory.before)

    `before` and `peak` are bytes: on a GPU what torch has allocated, exactly; on a CPU the
    resident memory of this process, sampled every 10 ms.
    """

    def __init__(self) -> None:
        self.before = self.peak = 0

    def __enter__(self) -> PeakMemory:
        import torch

        self._cuda = torch.cuda.is_available()
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = self.peak = torch.cuda.memory_allocated()
            return self
        import psutil

        process = psutil.Process()
        self.before = self.peak = process.memory_info().rss
        self._done = threading.Event()

        def watch() -> None:
            while not self._done.wait(0.01):
                self.peak = max(self.peak, process.memory_info().rss)

        self._watcher = threading.Thread(target=watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_) -> None:
        if self._cuda:
            import torch

            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated()
        else:
            self._done.set()
            self._watcher.join()

    @property
    def delta(self) -> int:
        """Bytes above what was held before the block."""
        return self.peak - self.before


class ChildrenMemory:
    """The most resident memory this process's children held together during a block, in bytes.

    For work done elsewhere, as a notebook's kernel does it; sampled every 0.2 s. `peak` is 0 where
    there was no child.
    """

    def __init__(self) -> None:
        self.peak = 0

    def __enter__(self) -> ChildrenMemory:
        import psutil

        process = psutil.Process()
        self._done = threading.Event()

        def watch() -> None:
            while not self._done.wait(0.2):
                held = 0
                for child in process.children(recursive=True):
                    with contextlib.suppress(psutil.Error):  # it may end while we look
                        held += child.memory_info().rss
                self.peak = max(self.peak, held)

        self._watcher = threading.Thread(target=watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        self._watcher.join()


def advice(hardware: Hardware) -> list[str]:
    """What to do on this machine, one sentence each; the first is the most useful."""
    lines = []
    if hardware.kind == "cpu":
        lines.append(
            "No GPU: run the notebooks with their default parameters (SmolLM2-135M, minutes each)."
        )
        if hardware.memory_free < 3 * GIB:
            lines.append(
                f"Only {hardware.memory_free / GIB:.1f} GiB of memory are free and training the "
                "default model takes about 3: close other programs."
            )
    else:
        lines.append(
            "A GPU: run a notebook with '-f t4' (Llama-3.2-1B in 4-bit); "
            "'lora-kit plan' tells what fits."
        )
        if hardware.gpu_memory_free < 6 * GIB:
            lines.append(
                f"Only {hardware.gpu_memory_free / GIB:.1f} GiB of GPU memory are free: another "
                "notebook may be holding the rest; shut its kernel down."
            )
    if hardware.disk_free < 3 * GIB:
        lines.append(
            f"Only {hardware.disk_free / GIB:.1f} GiB of disk are free: the default model takes "
            "0.7, a 1B model about 3."
        )
    return lines


def report(hardware: Hardware) -> str:
    """`lora-kit doctor`'s text: the machine, the dtype and why, and advice."""
    rows = [
        ("machine", f"{hardware.name} ({hardware.kind})"),
        ("processor", f"{hardware.cpu}, {hardware.cores} cores"),
        ("memory", f"{hardware.memory_free / GIB:.1f} of {hardware.memory / GIB:.1f} GiB free"),
        ("disk", f"{hardware.disk_free / GIB:.1f} GiB free"),
    ]
    if hardware.gpu:
        rows.append(
            (
                "GPU memory",
                f"{hardware.gpu_memory_free / GIB:.1f} of {hardware.gpu_memory / GIB:.1f} GiB free",
            )
        )
    rows += [
        ("compute in", f"{hardware.dtype}. {hardware.why}"),
        ("system", f"{hardware.system}, Python {hardware.python}"),
    ]
    width = max(len(k) for k, _ in rows)
    text = [f"{k:<{width}}  {v}" for k, v in rows]
    return "\n".join(text + [""] + [f"- {line}" for line in advice(hardware)])


def _cores() -> int:
    """Cores this process may use, which in a container are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_name() -> str:
    if sys.platform.startswith("linux"):
        try:
            for line in Path("/proc/cpuinfo").read_text().splitlines():
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
        except OSError:
            pass
    return platform.processor() or platform.machine()
