"""Half-precision copies of adapters: what is trained in fp32 is shipped in fp16."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from lora_kit import store
from lora_kit.errors import BadInputError
from lora_kit.lora_files import CONFIG, PREFIX, STAMP, WEIGHTS, read_adapter

# How peft spells the tensors that `read_adapter` gives short names.
ENDINGS = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_magnitude": "lora_magnitude_vector",
}


def round_adapter(
    source: str | Path,
    target: str | Path,
    dtype: torch.dtype = torch.float16,
    base: str | None = None,
) -> Path:
    """Write a copy of an adapter in peft's format, rounded to `dtype`; the fingerprint rides along.

    fp16 keeps 11 significant bits: every number moves by at most 1 part in 2,048, and one below
    6·10⁻⁸ becomes zero.

    Args:
        source, target: adapter folders; target appears whole, or not at all.
        base: what `base_model_name_or_path` shall say, for peft and vLLM; else what it said.

    Returns:
        The target folder.

    Raises:
        BadInputError: a number too large for `dtype`, or an adapter that brings weights of its
            base; and what `read_adapter` raises.
    """
    files = read_adapter(source)
    if files.copies:
        raise BadInputError(f"{files.folder} brings weights of its base along: nothing to ship.")
    tensors = {}
    for path, parts in files.tensors.items():
        for kind, tensor in parts.items():
            rounded = tensor.to(dtype).contiguous()
            if not torch.isfinite(rounded).all():
                raise BadInputError(f"{kind} of {path} in {files.folder} does not fit {dtype}.")
            tensors[f"{PREFIX}{path}.{ENDINGS[kind]}"] = rounded
    header = {"format": "pt"}
    if files.fingerprint is not None:
        header[STAMP] = json.dumps(files.fingerprint.to_dict(), separators=(",", ":"))
    config = files.config | ({"base_model_name_or_path": base} if base else {})
    with store.new_folder(Path(target)) as part:
        save_file(tensors, part / WEIGHTS, metadata=header)
        (part / WEIGHTS).chmod(0o644)
        store.write_json(part / CONFIG, config)
    return Path(target)
