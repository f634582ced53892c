"""vLLM: the command that serves a base with adapters, and adapter folders laid out for it.

vLLM batches many adapters on a GPU of compute capability 7.0 and up. It reserves a slot of
`--max-lora-rank` for each of `--max-loras` adapters of one batch, and keeps `--max-cpu-loras` in
the CPU's memory.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

from lora_kit import store
from lora_kit.errors import BadInputError

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes
FILES = ("adapter_config.json", "adapter_model.safetensors")
MOST_SLOTS = 16


def base_address(name: str) -> str:
    """The hub id of a registry model, or the folder itself."""
    from lora_kit.model_registry import MODELS

    return MODELS[name].hub_id if name in MODELS else name


def slot_rank(rank: int) -> int:
    """The smallest `--max-lora-rank` that holds adapters of this rank.

    Raises:
        BadInputError: vLLM takes no adapter of such a rank.
    """
    for size in VLLM_RANKS:
        if size >= rank:
            return size
    raise BadInputError(f"vLLM takes adapters up to rank {VLLM_RANKS[-1]}, not {rank}.")


def serve_command(
    base: str, modules: Mapping[str, str | Path], rank: int, slots: int = 1, half: bool = False
) -> str:
    """The command that serves a base and adapters together.

    Args:
        base: a registry name, a hub id or a folder.
        modules: {name a client asks for: the adapter's folder}.
        rank: the largest rank among them.
        slots: how many of them one batch may mix.
        half: ask for fp16, which GPUs below compute capability 8.0 need: they have no bf16.
    """
    words = ["vllm", "serve", base_address(base), "--enable-lora"]
    words += ["--max-lora-rank", str(slot_rank(rank))]
    if slots > 1:
        words += ["--max-loras", str(slots), "--max-cpu-loras", str(max(slots, len(modules)))]
    words += ["--lora-modules", *(f"{name}={path}" for name, path in modules.items())]
    return shlex.join(words + (["--dtype", "half"] if half else []))


def export_vllm(
    base: str,
    adapters: Mapping[str, str | Path],
    output: str | Path,
    slots: int | None = None,
    half: bool = False,
) -> str:
    """Copy adapters into a folder for vLLM, and write the command beside them (`serve.sh`).

    Args:
        base, slots, half: as for `serve_command`; by default every adapter has a slot, 16 at most.
        adapters: {name: folder}, in peft's format; each is read and checked.
        output: a folder that does not exist yet; it appears whole, or not at all.

    Returns:
        The command, with paths relative to `output`.

    Raises:
        BadInputError: no adapter, an adapter vLLM does not serve (DoRA, a rank above its largest),
            a folder that exists, slots below 1; and what `read_adapter` raises.
    """
    from lora_kit.lora_files import read_adapter

    output = Path(output)
    if not adapters:
        raise BadInputError("There is no adapter to export.")
    if output.exists():
        raise BadInputError(f"{output} exists already: name a new folder.")
    slots = min(len(adapters), MOST_SLOTS) if slots is None else slots
    if slots < 1:
        raise BadInputError(f"slots must be at least 1, not {slots}.")
    found = {name: read_adapter(folder) for name, folder in adapters.items()}
    for name, files in found.items():
        if files.config.get("use_dora"):
            raise BadInputError(f"{name} is a DoRA adapter, which vLLM does not serve: merge it.")
    rank = max(files.config["r"] for files in found.values())
    # Relative to the folder, so that it can be moved to the machine that serves.
    command = serve_command(base, {n: f"adapters/{n}" for n in found}, rank, slots, half)
    with store.new_folder(output) as part:
        for name, files in found.items():
            (part / "adapters" / name).mkdir(parents=True)
            for file in FILES:
                shutil.copyfile(files.folder / file, part / "adapters" / name / file)
        runtime = "export VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
        script = [
            "#!/bin/sh",
            "# Serves on 127.0.0.1:8000; clients name an adapter as their model.",
            f"# To load and unload adapters while it runs: {runtime}",
            'cd "$(dirname "$0")" || exit 1',
            f'exec {command} --host 127.0.0.1 "$@"',
        ]
        store.write_text(part / "serve.sh", "\n".join(script) + "\n").chmod(0o755)
    return command
