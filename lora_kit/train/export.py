"""After training: the merged model as a folder of its own, and the adapter on the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lora_kit import store
from lora_kit.errors import BadInputError, NotAvailableError, RunFailedError
from lora_kit.train.finetune import TrainResult

LARGEST_DIFFERENCE = 0.02  # of the logits' norm: fp16's rounding of weights adds up over the layers


@dataclass(frozen=True)
class MergedExport:
    """A merged model on disk. difference: ‖logits read back − logits with the adapter‖ over the
    latter's norm, in float32 on seeded random tokens. bytes: of the folder."""

    folder: Path
    difference: float
    bytes: int


def export_merged(model: str, result: TrainResult, folder: Path) -> MergedExport:
    """Write base + adapter as one fp16 model, read it back, and compare.

    The adapter was trained beside the base as it was loaded, so that is what it is merged into: for
    QLoRA the dequantised 4-bit weights, not the original ones. The merge proves itself in memory
    (`merge_lora`); then every tensor on disk must be the one in memory, and the model read back
    must give the logits of base + adapter.

    Args:
        model: what was given to `finetune`.
        folder: where to; must not hold anything yet.

    Raises:
        BadInputError: the folder holds something.
        MergeError: the proof in memory failed.
        RunFailedError: what lies on disk is not what was merged; nothing is left there.
    """
    import torch

    from lora_kit.lora import bake_lora, load_lora
    from lora_kit.models import load_model, quiet_libraries

    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInputError(f"{folder} holds something already; name a new folder.")
    loaded = load_model(model, "float32", result.spec.quantization)
    merged = loaded.model
    load_lora(merged, result.adapter)
    ids = torch.randint(
        merged.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0)
    ).to(merged.device)
    wanted = _logits(merged, ids)
    bake_lora(merged, ids, dense=True)
    # Nothing in it is quantised any longer, but transformers goes by these.
    if hasattr(merged.config, "quantization_config"):
        del merged.config.quantization_config
    merged.hf_quantizer, merged.is_quantized, merged.quantization_method = None, False, None
    merged.to(torch.float16)
    merged.config.dtype = torch.float16
    with store.new_folder(folder) as part:
        with quiet_libraries():
            merged.save_pretrained(part)
            loaded.tokenizer.save_pretrained(part)
        difference = _check(merged, part, ids, wanted)
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    return MergedExport(folder, difference, size)


def _logits(model, ids):
    import torch

    with torch.inference_mode():
        return model(ids).logits.float()


def _check(merged, folder: Path, ids, wanted) -> float:
    import torch

    from lora_kit.models import load_model

    found = load_model(str(folder), "float32").model.to(ids.device)
    memory = merged.state_dict()
    for name, tensor in found.state_dict().items():
        if not torch.equal(tensor.cpu(), memory[name].float().cpu()):
            raise RunFailedError(f"The merged weight {name} on disk is not the one in memory.")
    difference = float((_logits(found, ids) - wanted).norm() / wanted.norm())
    if not difference <= LARGEST_DIFFERENCE:
        raise RunFailedError(
            f"The merged model read back is {difference:.1%} off base + adapter (at most "
            f"{LARGEST_DIFFERENCE:.0%} is rounding): not exported."
        )
    return difference


def push_adapter(result: TrainResult, repository: str, private: bool = True) -> str:
    """Upload the adapter's folder (weights, config, card) to the hub; returns its address.

    Never done unless asked for. Needs the token that `hf auth login` stores, or HF_TOKEN.

    Raises:
        BadInputError: the name is not "owner/name".
        NotAvailableError: no token, no network, or the hub refuses.
    """
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise BadInputError(f"A repository is owner/name, not {repository!r}.")
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if not get_token():
        raise NotAvailableError("Pushing needs a token: run 'hf auth login' or set HF_TOKEN.")
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repository, folder_path=str(result.adapter))
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise NotAvailableError(f"The hub did not take {repository}: {reason}") from error
    return str(done)
