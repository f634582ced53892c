"""Several adapters made into one, by peft's methods, written as an ordinary adapter.

With ΔW_i = s_i · B_i A_i and weights w_i:

    cat      [w₁s₁A₁; w₂s₂A₂ …], [B₁ B₂ …]: the exact sum Σ w_i ΔW_i, ranks added up
    svd      the best approximation of that sum by one matrix of rank r
    linear   A = Σ √(w_i s_i) A_i,  B = Σ √(w_i s_i) B_i: no larger than one adapter, but B A also
             holds the products B_i A_j of strangers, which no adapter ever meant
    ties     as linear, of factors trimmed to their largest entries and freed of sign conflicts
             (Yadav et al. 2023, "TIES-Merging")
    dare     as linear, of factors thinned at random and scaled up (Yu et al. 2023, "Language Models
             are Super Mario")
    *_svd    TIES or DARE on the ΔW_i themselves, then the best approximation of rank r
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lora_kit import store
from lora_kit.errors import BadInputError
from lora_kit.fingerprint import fingerprint_model
from lora_kit.lora_files import AdapterFiles, read_adapter, stamp_fingerprint
from lora_kit.lora_state import lora_layers

# Our word → peft's combination_type.
METHODS = {
    "cat": "cat",
    "svd": "svd",
    "linear": "linear",
    "ties": "ties",
    "dare": "dare_linear",
    "dare-ties": "dare_ties",
    "ties-svd": "ties_svd",
    "dare-svd": "dare_linear_svd",
}
EQUAL_RANKS = ("linear", "ties", "dare", "dare-ties")
NAME = "combined"


def combine_adapters(
    model,
    adapters: Mapping[str, str | Path],
    target: str | Path,
    method: str = "svd",
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> Path:
    """Write one adapter made of several.

    Args:
        model: the bare base; peft wraps it meanwhile, and it comes back as it was.
        adapters: {name: folder}, two or more.
        target: the new adapter's folder; it appears whole, or not at all.
        method: a name of METHODS.
        weights: w_i, one for each adapter and above 0; 1 each by default.
        rank: of the result, for the methods with svd; by default the largest of the adapters'.
        density: the share of entries that ties and dare keep, in (0, 1].
        seed: of dare's thinning.

    Returns:
        The target folder.

    Raises:
        BadInputError: fewer than two adapters, another base, ranks that differ where the method
            needs equal ones, values out of range, DoRA or rank-stabilised adapters, or a model
            that carries adapters already; and what `read_adapter` raises.
    """
    files = {name: read_adapter(folder) for name, folder in adapters.items()}
    weights = [1.0] * len(files) if weights is None else [float(w) for w in weights]
    _check(model, files, method, weights, rank, density)
    from peft import PeftModel

    from lora_kit.models import quiet_libraries

    folders = [str(f.folder) for f in files.values()]
    with (
        store.new_folder(Path(target)) as part,
        quiet_libraries(),
        warnings.catch_warnings(),
        torch.random.fork_rng([]),  # peft draws the start of every adapter it loads
    ):
        warnings.simplefilter("ignore")
        wrapped = PeftModel.from_pretrained(model, folders[0], adapter_name="a0")
        try:
            for i, folder in enumerate(folders[1:], 1):
                wrapped.load_adapter(folder, adapter_name=f"a{i}")
            options = {"svd_rank": rank, "svd_full_matrices": False} if "svd" in method else {}
            if method not in ("cat", "svd", "linear"):
                options["density"] = density
            torch.manual_seed(seed)
            names = [f"a{i}" for i in range(len(folders))]
            wrapped.add_weighted_adapter(names, weights, NAME, METHODS[method], **options)
            wrapped.save_pretrained(part, selected_adapters=[NAME])
        except (ValueError, TypeError) as e:
            raise BadInputError(f"peft cannot combine these by {method!r}: {e}") from e
        finally:
            wrapped.unload()
            _unmark(model)
        for file in (part / NAME).iterdir():
            if file.suffix in (".json", ".safetensors"):
                file.rename(part / file.name)
            else:
                file.unlink()
        (part / NAME).rmdir()
        for left in part.glob("*.md"):
            left.unlink()
        stamp_fingerprint(part, fingerprint_model(model))
    return Path(target)


def delta_weights(files: AdapterFiles) -> dict[str, torch.Tensor]:
    """{layer path: ΔW = s · B A} of a plain adapter, each (out, in), in fp32."""
    config = files.config
    rank = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return {
        path: parts["lora_B"].float() @ parts["lora_A"].float() * scale
        for path, parts in files.tensors.items()
    }


def _unmark(model) -> None:
    """peft leaves its mark on a base it has been taken off; later adapters would stumble on it."""
    for mark in ("peft_config", "_hf_peft_config_loaded"):
        if mark in vars(model):
            delattr(model, mark)


def _check(model, files, method, weights, rank, density) -> None:
    if method not in METHODS:
        raise BadInputError(f"method must be one of {', '.join(METHODS)}, not {method!r}.")
    if len(files) < 2:
        raise BadInputError("Name at least two adapters to combine.")
    if len(weights) != len(files):
        raise BadInputError(f"{len(weights)} weights for {len(files)} adapters: give one each.")
    if not all(0 < w < math.inf for w in weights):
        raise BadInputError(f"Weights must be above 0, not {weights}: peft takes their roots.")
    if not 0 < density <= 1:
        raise BadInputError(f"density must lie in (0, 1], not {density}.")
    if rank is not None and ("svd" not in method or rank < 1):
        raise BadInputError("rank is for the methods with svd, and must be at least 1.")
    if hasattr(model, "peft_config") or lora_layers(model):
        raise BadInputError("The model carries adapters already: take them off first.")
    ranks = {name: f.config["r"] for name, f in files.items()}
    if method in EQUAL_RANKS and len(set(ranks.values())) > 1:
        told = ", ".join(f"{name} {r}" for name, r in ranks.items())
        raise BadInputError(
            f"{method} adds factors and needs equal ranks ({told}): use svd, cat or ties-svd."
        )
    here = fingerprint_model(model)
    for name, file in files.items():
        # peft keeps the first one's config: its scale would be wrong for the sum.
        for kind in ("use_dora", "use_rslora"):
            if file.config.get(kind):
                raise BadInputError(f"{name} has {kind}: only plain LoRA can be combined here.")
        sentence = file.fingerprint.mismatch(here) if file.fingerprint else None
        if sentence:
            raise BadInputError(f"{name} was trained on another base: {sentence}")
