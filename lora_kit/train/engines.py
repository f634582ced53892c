"""The engines under `finetune`: transformers + peft + trl anywhere, Unsloth on a GPU, and the
kit's own loop (`native`).

All train on the same token ids and labels, which `prompts.encode` made. trl and Unsloth go through
trl's SFTTrainer and differ in how the model is loaded and given its adapter.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from lora_kit.architectures import check_targets
from lora_kit.errors import RunFailedError
from lora_kit.hardware import PeakMemory, detect
from lora_kit.models import ModelFiles, load_model, load_tokenizer, quiet_libraries
from lora_kit.train.spec import TrainSpec

# trl's names for ours.
SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
OPTIMIZERS = {
    "auto": "adamw_8bit",
    "adamw": "adamw_torch_fused",
    "adamw-8bit": "adamw_8bit",
    "paged-adamw": "paged_adamw_32bit",
    "paged-adamw-8bit": "paged_adamw_8bit",
}


@dataclass
class Trained:
    """What an engine hands back: the model with its adapter, and what the run was like.

    The native engine counts its tokens (the others leave None), the steps it `skipped` for NaN or
    infinity, and the step it was `resumed_at` (0: from the start).
    """

    model: object
    losses: list[tuple[int, float]]
    seconds: float
    peak_memory: int
    memory_before: int
    tokens: int | None = None
    trained_tokens: int | None = None
    skipped: int = 0
    resumed_at: int = 0


def load_for_training(files: ModelFiles, spec: TrainSpec, engine: str):
    """The model with a fresh adapter, ready to train, and its tokenizer."""
    if engine == "native":
        from lora_kit.train import native

        return native.load(files.path, spec)
    return (_load_unsloth if engine == "unsloth" else _load_trl)(files, spec)


def _load_trl(files: ModelFiles, spec: TrainSpec):
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(spec.seed)  # the adapter's A is drawn here
    loaded = load_model(str(files.path), spec.dtype, spec.quantization)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=list(check_targets(spec.targets)),
        task_type="CAUSAL_LM",
    )
    loaded.model.config.use_cache = False
    return get_peft_model(loaded.model, config), loaded.tokenizer


def _load_unsloth(files: ModelFiles, spec: TrainSpec):
    from unsloth import FastLanguageModel  # isort: skip  (patches what is imported after it)

    import torch

    dtype = detect().dtype if spec.dtype == "auto" else spec.dtype
    with quiet_libraries():
        model, _ = FastLanguageModel.from_pretrained(
            model_name=str(files.path),
            max_seq_length=spec.max_length,
            dtype=getattr(torch, dtype),
            load_in_4bit=spec.quantization == "nf4",
        )
        model = FastLanguageModel.get_peft_model(
            model,
            r=spec.rank,
            lora_alpha=spec.alpha,
            lora_dropout=spec.dropout,
            target_modules=list(check_targets(spec.targets)),
            bias="none",
            use_gradient_checkpointing="unsloth" if spec.checkpointing is True else False,
            random_state=spec.seed,
        )
    # Our own tokenizer: Unsloth's copy may have another pad token.
    return model, load_tokenizer(files)


def train(
    model,
    tokenizer,
    rows: list[dict],
    spec: TrainSpec,
    steps: int,
    on_step=None,
    keep: tuple[Path, str] | None = None,
    every: int = 0,
) -> Trained:
    """Train a prepared model on encoded rows with trl's SFTTrainer.

    Args:
        on_step: called with each step's number and loss.
        keep: the folder of checkpoints and the run's identity; the newest whole one is taken up.
        every: steps between checkpoints; 0 means one every two minutes.

    Raises:
        RunFailedError: the loss or an adapter weight became NaN or infinite.
    """
    import torch
    from datasets import Dataset as HubDataset
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    from lora_kit.train.trainer_checkpoints import newest_whole, saver

    hardware = detect()
    dtype = hardware.dtype if spec.dtype == "auto" else spec.dtype
    checkpointing = spec.checkpointing is True
    losses: list[tuple[int, float]] = []
    started = time.perf_counter()

    class Progress(TrainerCallback):
        """Keeps every step's loss and prints a line ten times a run: no bar, so that a committed
        notebook stays readable."""

        def on_log(self, args, state, control, logs=None, **_):
            if not logs or "loss" not in logs:
                return
            losses.append((state.global_step, float(logs["loss"])))
            if on_step:
                on_step(*losses[-1])
            every = max(1, state.max_steps // 10)
            if state.global_step % every == 0 or state.global_step == state.max_steps:
                passed = time.perf_counter() - started
                print(
                    f"step {state.global_step:>4} of {state.max_steps}  "
                    f"loss {losses[-1][1]:.3f}  {passed:5.0f} s",
                    flush=True,
                )

    class PlainLossTrainer(SFTTrainer):
        """SFTTrainer 1.15 computes its loss in a Triton kernel, which needs a GPU; on a CPU the
        model's own cross-entropy gives the same number."""

        compute_loss = Trainer.compute_loss

    trainer_class = SFTTrainer if hardware.device == "cuda" else PlainLossTrainer
    with tempfile.TemporaryDirectory() as scratch, quiet_libraries():
        folder = keep[0] if keep else Path(scratch)
        config = SFTConfig(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=spec.batch_size,
            gradient_accumulation_steps=spec.accumulation,
            learning_rate=spec.learning_rate,
            lr_scheduler_type=SCHEDULERS[spec.schedule],
            warmup_steps=round(spec.warmup * steps),
            weight_decay=spec.weight_decay,
            max_grad_norm=spec.max_grad_norm,
            max_length=spec.max_length,
            optim="adamw_torch" if hardware.device == "cpu" else OPTIMIZERS[spec.optimizer],
            fp16=dtype == "float16",
            bf16=dtype == "bfloat16",
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
            seed=spec.seed,
            data_seed=spec.seed,
            logging_steps=1,
            save_strategy="no",  # `saver` decides when
            save_total_limit=2,
            report_to="none",
            disable_tqdm=True,
            packing=False,
            use_cpu=hardware.device == "cpu",
            dataloader_pin_memory=hardware.device != "cpu",
        )
        trainer = trainer_class(
            model=model,
            args=config,
            train_dataset=HubDataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Progress(), *([saver(*keep, every)] if keep else [])],
        )
        # Without this the Trainer prints each log as a dictionary when its bar is off.
        trainer.remove_callback(PrinterCallback)
        # trl turns the adapter of a 4-bit model to bf16 even under fp16, and the loss scaler then
        # cannot unscale its gradients. fp32 adapters train well under either.
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()
        started = time.perf_counter()
        with PeakMemory() as memory:
            found = newest_whole(*keep) if keep else None
            trainer.train(resume_from_checkpoint=str(found) if found else None)
        seconds = time.perf_counter() - started
    resumed_at = int(found.name.rpartition("-")[2]) if found else 0
    # The Trainer's own log: on a resumed run it holds the steps before as well.
    losses = [(e["step"], float(e["loss"])) for e in trainer.state.log_history if "loss" in e]
    _check_finite(model, losses)
    return Trained(model, losses, seconds, memory.peak, memory.before, resumed_at=resumed_at)


def train_native(
    model, tokenizer, rows, spec: TrainSpec, steps: int, keep=None, every=0, on_step=None
) -> Trained:
    """Train with the kit's own loop, taken up again from `keep`'s newest checkpoint."""
    from lora_kit.train import native

    done = native.train(model, rows, spec, steps, tokenizer.pad_token_id, keep, every, on_step)
    run = done.progress
    _check_finite(model, run.losses)
    return Trained(
        model=model,
        losses=run.losses,
        seconds=run.seconds,
        peak_memory=done.peak_memory,
        memory_before=done.memory_before,
        tokens=run.tokens,
        trained_tokens=run.trained_tokens,
        skipped=run.skipped,
        resumed_at=done.resumed_at,
    )


def save_adapter(model, folder: Path) -> None:
    """Write the adapter in peft's format, read it back and compare it with memory.

    Raises:
        RunFailedError: what lies on disk is not what was trained.
    """
    from lora_kit.lora import lora_layers, save_lora

    if lora_layers(model):
        save_lora(model, folder)
        wanted = {
            f"{path}.{kind}": layer._modules[kind]["default"]
            for path, layer in lora_layers(model).items()
            for kind in ("lora_A", "lora_B")
        }
    else:
        from peft import get_peft_model_state_dict

        with quiet_libraries():
            model.save_pretrained(folder)
            state = get_peft_model_state_dict(model)
        wanted = {
            name.removeprefix("base_model.model.").removesuffix(".weight"): tensor
            for name, tensor in state.items()
        }
    _check_saved(wanted, folder)


def _check_saved(wanted: dict, folder: Path) -> None:
    import torch

    from lora_kit.lora import read_adapter

    layers = read_adapter(folder).tensors
    found = {f"{path}.{kind}": t for path, parts in layers.items() for kind, t in parts.items()}
    differing = sorted(wanted.keys() ^ found.keys()) or [
        name
        for name, tensor in wanted.items()
        if not torch.equal(tensor.detach().cpu(), found[name].to(tensor.dtype))
    ]
    if differing:
        raise RunFailedError(
            f"The adapter read back from {folder} is not the one that was trained ({differing[0]} "
            "differs): the disk or its driver is at fault. Name another output folder."
        )


def _check_finite(model, losses: list[tuple[int, float]]) -> None:
    import math

    bad = [step for step, loss in losses if not math.isfinite(loss)]
    if bad:
        raise RunFailedError(
            f"The loss became NaN or infinite at step {bad[0]}; nothing was saved. Lower the "
            "learning rate, and on a T4 make sure the adapter is fp32."
        )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise RunFailedError(
                f"The adapter weight {name} holds NaN or infinity; nothing was saved. Lower the "
                "learning rate."
            )
