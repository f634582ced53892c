"""The card beside an adapter: what it is, how it was made, what was measured, how it is used."""

from __future__ import annotations

from pathlib import Path

from lora_kit import store
from lora_kit.errors import BadInputError
from lora_kit.hardware import GIB
from lora_kit.train.finetune import TrainResult
from lora_kit.vllm import base_address, serve_command


def vllm_command(model: str, result: TrainResult, capability: tuple[int, int] | None = None) -> str:
    """The command that serves the base and the adapter together.

    Args:
        model: what was given to `finetune`.
        capability: of the GPU that will serve; below 8.0 there is no bf16, so half is asked for.
    """
    adapter = result.adapter
    half = capability is None or capability < (8, 0)
    try:
        return serve_command(model, {adapter.name: adapter.resolve()}, result.spec.rank, half=half)
    except BadInputError as e:
        return str(e)  # a rank vLLM does not take is no reason to lose the card


def write_card(
    model: str, result: TrainResult, heldout: tuple[float, float, int] | None = None
) -> Path:
    """Write README.md into the adapter's folder; every number in it was measured in this run.

    Args:
        heldout: (loss before, loss after, rows), in nats per token.
    """
    spec, losses = result.spec, [loss for _, loss in result.losses]
    data = result.data
    half = max(1, min(10, len(losses) // 2))
    first, last = sum(losses[:half]) / half, sum(losses[-half:]) / half
    measured = [
        ("steps", f"{len(losses)} of {spec.batch_size * spec.accumulation} rows"),
        ("minutes", f"{result.seconds / 60:.1f} on {result.hardware}"),
        ("tokens a second", f"{result.tokens_per_second:,.0f} (padding not counted)"),
        ("peak memory", f"{result.peak_memory / GIB:.2f} GiB"),
        ("training loss", f"{first:.3f} → {last:.3f} (first and last {half} steps)"),
    ]
    if heldout:
        before, after, rows = heldout
        measured.append(("held-out loss", f"{before:.3f} → {after:.3f} ({rows} rows)"))
    if result.skipped:
        measured.append(("steps skipped", f"{result.skipped} (NaN or infinity)"))
    address = base_address(model)
    text = [
        "---",
        "library_name: peft",
        *([f"base_model: {address}"] if "/" in address and not Path(address).exists() else []),
        "---",
        "",
        f"# {result.adapter.name}",
        "",
        f"A LoRA adapter for {result.base['name']} ({address}), fingerprint of the base "
        f"`{result.base['fingerprint']}`. Trained on {data['rows']:,} rows of {data['name']} "
        f"({data['source']}, {data['revision']}) with the engine `{result.engine}`.",
        "",
        "| measured | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in measured),
        "",
        "| setting | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in spec.to_dict().items()),
        "",
        "Use it with peft:",
        "",
        "```python",
        "from peft import PeftModel",
        f'model = PeftModel.from_pretrained(base, "{result.adapter.name}")',
        "```",
        "",
        "Serve it with vLLM:",
        "",
        "```",
        vllm_command(model, result),
        "```",
        "",
        "Not measured: whether it is safe, fair or right on anything but the rows named here.",
    ]
    return store.write_text(result.adapter / "README.md", "\n".join(text) + "\n")
