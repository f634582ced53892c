"""From a person's rows to an adapter: report, held-out part, training, held-out loss, card.

What the command `lora-kit finetune` does, as one function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lora_kit.architectures import Architecture
from lora_kit.data_files import LoadedRows, load_training_rows
from lora_kit.errors import BadInputError
from lora_kit.hardware import detect, hold_to_t4_rules
from lora_kit.store import read_json
from lora_kit.train.card import vllm_command, write_card
from lora_kit.train.finetune import TrainResult, finetune
from lora_kit.train.heldout import heldout_loss
from lora_kit.train.report import data_report, estimate, format_report, matmul_speed
from lora_kit.train.spec import TrainSpec, choose_engine


def finetune_from(
    model: str,
    data: str,
    spec: TrainSpec,
    engine: str = "auto",
    output: Path | None = None,
    held_out: int | None = None,
    limit: int | None = None,
    fields: Mapping[str, str] | None = None,
    report_only: bool = False,
) -> TrainResult | None:
    """Report on the rows, train on them, measure on those held out, write a card.

    Args:
        model, spec, engine, output: as for `finetune`.
        data: a file, a registry name or a hub id (`data_files.load_training_rows`).
        held_out: rows kept from training, seeded and disjoint; by default a twentieth, 100 at most;
            0 for none.
        limit: use the first so many usable rows.
        fields: new names of fields.
        report_only: stop after the report, and return None.

    Raises:
        BadInputError: nothing to train on, or nothing left beside the held-out rows.
    """
    # First of all: Unsloth must be imported before transformers is.
    chosen, why = choose_engine(engine)
    hold_to_t4_rules()
    from lora_kit.models import fetch_model, load_tokenizer

    loaded = load_training_rows(data, limit=limit, fields=fields)
    files = fetch_model(model)
    tokenizer = load_tokenizer(files)
    if held_out is None:
        held_out = min(100, len(loaded.kept) // 20)
    if held_out < 0:
        raise BadInputError(f"held_out must be 0 or more, not {held_out}.")
    rows, test = (loaded.kept, None)
    if held_out:
        rows, test = loaded.kept.split(held_out, spec.seed)
    report = data_report(
        LoadedRows(rows, loaded.dropped), tokenizer, spec, len(test) if test else 0
    )
    hardware = detect()
    shape = Architecture.from_config(read_json(files.path / "config.json"), files.name)
    expected = estimate(report, spec, shape, hardware, matmul_speed(hardware))
    print(format_report(report, expected))
    print(f"engine: {chosen}. {why}")
    if report_only:
        return None
    result = finetune(model, rows, spec, output, engine)
    scores = None
    if test:
        scores = (*_losses(model, result, test), len(test))
        print(f"held-out loss {scores[0]:.3f} → {scores[1]:.3f} over {scores[2]} rows")
    write_card(model, result, scores)
    minutes = result.seconds / 60
    print(f"{minutes:.1f} minutes, {result.tokens_per_second:,.0f} tokens/s; {result.adapter}")
    print(f"serve it: {vllm_command(model, result, hardware.capability)}")
    return replace(result, train=rows, test=test)


def _losses(model: str, result: TrainResult, test) -> tuple[float, float]:
    """Held-out loss of the bare base and with the adapter as it was read back from disk."""
    import torch

    from lora_kit.lora import disable_lora, load_lora
    from lora_kit.models import load_model
    from lora_kit.train.finetune import encode_rows

    loaded = load_model(model, result.spec.dtype, result.spec.quantization)
    encoded = encode_rows(test, loaded.tokenizer, result.spec)
    load_lora(loaded.model, result.adapter)
    device, dtype = loaded.model.device.type, getattr(torch, loaded.dtype)
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        with disable_lora(loaded.model):
            before = heldout_loss(loaded.model, loaded.tokenizer, encoded)
        return before, heldout_loss(loaded.model, loaded.tokenizer, encoded)
