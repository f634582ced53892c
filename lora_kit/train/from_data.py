"""From a person's rows to an adapter: report, held-out part, training, held-out loss, card.

What the command `lora-kit finetune` does, as one function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lora_kit.architectures import Architecture
from lora_kit.data_files import LoadedRows, load_training_rows
from lora_kit.errors import BadInputError, unknown_name
from lora_kit.hardware import GIB, detect, hold_to_t4_rules
from lora_kit.store import read_json
from lora_kit.train.card import vllm_command, write_card
from lora_kit.train.export import export_merged, push_adapter
from lora_kit.train.finetune import TrainResult, finetune
from lora_kit.train.heldout import heldout_loss
from lora_kit.train.log import TRACKERS, tracker
from lora_kit.train.processes import processes
from lora_kit.train.report import data_report, estimate, format_report, matmul_speed
from lora_kit.train.settings import settle
from lora_kit.train.spec import TrainSpec, check_engine, choose_engine


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
    merged: Path | None = None,
    push: str | None = None,
    log: str = "none",
    checkpoint_every: int = 0,
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
        merged: also write base + adapter as one fp16 model there (`export.export_merged`).
        push: also upload the adapter to this repository of the hub (`export.push_adapter`).
        log: also log the loss with "tensorboard" or "trackio" (`log.tracker`).
        checkpoint_every: as for `finetune`.

    Raises:
        BadInputError: nothing to train on, or nothing left beside the held-out rows.
    """
    if log not in TRACKERS:
        raise unknown_name("tracker", log, TRACKERS)
    if merged and Path(merged).exists():
        raise BadInputError(f"{merged} is there already; name a new folder for the merged model.")
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
    config = read_json(files.path / "config.json")
    shape = Architecture.from_config(config, files.name)
    chosen, why = choose_engine(engine, config) if engine == "auto" else (chosen, why)
    check_engine(chosen, spec)
    longest = max(report.lengths)
    settled, how = settle(spec, shape, hardware, chosen, longest)
    expected = estimate(report, settled, shape, hardware, matmul_speed(hardware), chosen)
    with processes().quiet():
        print(format_report(report, expected))
        print(f"engine: {chosen}: {why}\nsettings: {how}")
    if report_only:
        return None
    name = output.name if output else f"{files.name}-{rows.name}"
    with tracker(
        log if processes().main else "none", name, Path("runs") / "tensorboard" / name
    ) as on_step:
        result = finetune(
            model, rows, spec, output, engine, checkpoint_every=checkpoint_every, on_step=on_step
        )
    if not processes().main:
        return replace(result, train=rows, test=test)
    scores = None
    if test:
        scores = (*losses_of(model, result, test), len(test))
        print(f"held-out loss {scores[0]:.3f} → {scores[1]:.3f} over {scores[2]} rows")
    write_card(model, result, scores)
    minutes = result.seconds / 60
    print(f"{minutes:.1f} minutes, {result.tokens_per_second:,.0f} tokens/s; {result.adapter}")
    if merged:
        export = export_merged(model, result, merged)
        print(
            f"merged model: {export.folder}, {export.bytes / GIB:.2f} GiB, logits "
            f"{export.difference:.2%} off base + adapter"
        )
    if push:
        print(f"pushed: {push_adapter(result, push)}")
    print(f"serve it: {vllm_command(model, result, hardware.capability)}")
    return replace(result, train=rows, test=test)


def losses_of(model: str, result: TrainResult, test) -> tuple[float, float]:
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
