"""Fine-tuning as a plain PyTorch loop: everything a trainer does, in the open.

One step sees `batch_size × accumulation` rows. They are packed (`packing`), run forward in parts
that fit the memory, and the loss of the whole step is

    L = −1/T · Σ log p(token | what stands before it in its row),   over the step's T labels

divided by the T of the step and not of the part, so that neither packing nor the size of the parts
changes the gradient. The vocabulary-wide logits are made only where there is a label. The adapter
is fp32; the frozen base computes in fp32, bf16 or fp16, fp16 with a loss scaler (Micikevicius et
al. 2018, section 3.2). The rate rises linearly and falls as a cosine, the gradient's norm is
clipped, the optimiser is AdamW; several processes share a step's rows (`processes`). On a CPU a
resumed run repeats an unbroken one bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from lora_kit.architectures import check_targets
from lora_kit.engine_memory import LABELS_AT_ONCE  # more labels' logits are made in pieces
from lora_kit.errors import BadInputError, RunFailedError
from lora_kit.hardware import PeakMemory
from lora_kit.prompts import IGNORE
from lora_kit.train.checkpoints import CHECKPOINT_SECONDS as SECONDS
from lora_kit.train.checkpoints import Checkpoints, random_states, restore_random
from lora_kit.train.compiling import compiled_layers
from lora_kit.train.graphs import GraphedSteps, Steps, graphs_pay
from lora_kit.train.optimizers import make_optimizer
from lora_kit.train.packing import Batch, collate
from lora_kit.train.processes import processes
from lora_kit.train.spec import TrainSpec

MOST_SKIPPED = {True: 12, False: 3}  # steps skipped in a row before giving up: fp16, others


@dataclass
class Progress:
    """How far a run is: what a checkpoint keeps beside tensors. `at_once`: rows of one forward
    pass; `skipped`: steps left out because of NaN or infinity, `in_a_row` of them just now."""

    at_once: int
    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    trained_tokens: int = 0
    skipped: int = 0
    in_a_row: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class Outcome:
    """A finished run. Memory in bytes, as `hardware.PeakMemory` measures it."""

    progress: Progress
    peak_memory: int
    memory_before: int
    resumed_at: int


def load(path, spec: TrainSpec):
    """The model with a fresh adapter, and its tokenizer."""
    from lora_kit.lora import LoraSpec, add_lora
    from lora_kit.models import load_model

    loaded = load_model(str(path), spec.dtype, spec.quantization)
    add_lora(
        loaded.model,
        LoraSpec(spec.rank, spec.alpha, check_targets(spec.targets), spec.dropout),
        seed=spec.seed,
    )
    return loaded.model, loaded.tokenizer


def row_order(rows: int, per_step: int, step: int, seed: int) -> list[int]:
    """The rows of a step: every epoch a new seeded order, its last step takes what is left.

    A function of its arguments alone, so a resumed run needs no memory of the order.
    """
    epoch, inside = divmod(step, math.ceil(rows / per_step))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(rows, generator=generator).tolist()
    return order[inside * per_step : (inside + 1) * per_step]


def learning_rate(step: int, steps: int, spec: TrainSpec) -> float:
    """The rate of a step, counted from 0: linear warm-up from 0, then what spec.schedule says."""
    warm = round(spec.warmup * steps)
    if step < warm:
        return spec.learning_rate * step / warm
    done = (step - warm) / max(1, steps - warm)
    shape = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}
    return spec.learning_rate * shape[spec.schedule]


def loss_sum(model, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
    """−Σ log p over the labels of a batch (a scalar, float32).

    The layers run over every token, the output layer over tokens with a label only: with a
    vocabulary of 128,256 that is where most memory of a small batch would go.
    """
    hidden = model.get_decoder()(
        input_ids=batch.input_ids,
        attention_mask=batch.mask(dtype),
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    hidden = hidden.flatten(0, 1).index_select(0, batch.picked)
    head = model.get_output_embeddings()

    def piece(some: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return cross_entropy(head(some).float(), targets, reduction="sum")

    if len(hidden) <= LABELS_AT_ONCE:
        return piece(hidden, batch.targets)
    pieces = zip(hidden.split(LABELS_AT_ONCE), batch.targets.split(LABELS_AT_ONCE), strict=True)
    again = {"use_reentrant": False, "preserve_rng_state": False}  # nothing random in there
    return sum(checkpoint(piece, h, t, **again) for h, t in pieces)


def forward_backward(model, dtype, scaler, batch: Batch, labels: torch.Tensor) -> torch.Tensor:
    """Add the gradient of −Σ log p / labels to the adapter's; return that loss."""
    half = {"enabled": dtype != torch.float32, "cache_enabled": False}
    with torch.autocast(labels.device.type, dtype, **half):
        loss = loss_sum(model, batch, dtype) / labels
    scaler.scale(loss).backward()
    return loss.detach()


def train(
    model,
    rows: Sequence[dict],
    spec: TrainSpec,
    steps: int,
    pad_id: int,
    keep: Checkpoints | None = None,
    every: int = 0,
    on_step: Callable[[int, float], None] | None = None,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Train the parameters of `model` that require a gradient.

    Args:
        model: a causal language model of transformers with an adapter (`load`).
        rows: {"input_ids", "labels"}, as `prompts.encode` makes them.
        spec, steps: hyperparameters; optimiser steps.
        pad_id: fills sequences up; never seen by a row.
        keep, every: checkpoints, and steps between them (0: one every two minutes).
        on_step: called with each step's number and loss; say: prints the ten lines of progress.

    Raises:
        RunFailedError: NaN or infinity several steps in a row, or not even one row fits.
    """
    device = model.get_input_embeddings().weight.device
    dtype = model.get_input_embeddings().weight.dtype
    if getattr(model.config, "final_logit_softcapping", None):
        raise BadInputError("This model caps its logits: use engine='trl', which does so too.")
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    parameters = list(named.values())
    optimizer = make_optimizer(parameters, spec, device)
    scaler = torch.amp.GradScaler(
        device.type, init_scale=2.0**14, growth_interval=500, enabled=dtype == torch.float16
    )
    progress, crew = Progress(at_once=spec.batch_size), processes()
    per_step = spec.batch_size * spec.accumulation
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus), PeakMemory() as memory, ExitStack() as stack:
        torch.manual_seed(spec.seed + crew.index)  # dropout's; the caller's stays as it was
        if keep and (found := keep.newest()):
            progress = restore(found, named, optimizer, scaler)
            say(f"taken up again after step {progress.step} of {steps}")
        resumed_at, before = progress.step, progress.seconds
        model.train()
        if spec.checkpointing is True:
            again = {"use_reentrant": False, "preserve_rng_state": bool(spec.dropout)}
            model.gradient_checkpointing_enable(again)
        stack.enter_context(compiled_layers(model, spec.compile is True))

        once = partial(forward_backward, model, dtype, scaler)
        work = Steps(once, parameters)
        if graphs_pay(spec, device):
            work = GraphedSteps(once, parameters, pad_id, say)
        started = last_kept = time.perf_counter()
        while progress.step < steps:
            step = progress.step
            chosen = [rows[i] for i in row_order(len(rows), per_step, step, spec.seed)]
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps, spec)
            loss = backward(work, chosen, spec, progress, pad_id, say)
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(parameters, spec.max_grad_norm)
            loss, norm = torch.stack([loss, norm]).tolist()  # the step's one wait for the GPU
            if math.isfinite(loss) and math.isfinite(norm):
                scaler.step(optimizer)
                progress.in_a_row = 0
            else:
                skip(progress, loss, scaler.is_enabled())
            scaler.update()
            optimizer.zero_grad(set_to_none=not work.keeps_gradients)
            progress.step += 1
            if math.isfinite(loss):
                progress.losses.append((progress.step, loss))
            progress.seconds = before + time.perf_counter() - started
            if on_step:
                on_step(progress.step, loss)
            if progress.step % max(1, steps // 10) == 0 or progress.step == steps:
                said = f"step {progress.step:>4} of {steps}  loss {loss:.3f}"
                say(f"{said}  {progress.seconds:5.0f} s")
            due = time.perf_counter() - last_kept > SECONDS
            if keep and crew.main and (progress.step % every == 0 if every else due):
                keep.save(progress.step, snapshot(named, optimizer, scaler, progress))
                last_kept = time.perf_counter()
    model.eval()
    return Outcome(progress, memory.peak, memory.before, resumed_at)


def backward(work, chosen, spec, progress, pad_id, say) -> torch.Tensor:
    """Put the gradient of a step's loss into the parameters; return the loss.

    Each process runs its share of the rows; the loss is divided by the labels of the whole step.
    Out of memory, it is begun again with half as many rows at once and the same effective batch.
    """
    labels = sum(label != IGNORE for row in chosen for label in row["labels"][1:]) or 1
    mine, random_state = processes().share(chosen), random_states()
    while True:
        parts = [
            collate(mine[i : i + progress.at_once], pad_id, spec.packing)
            for i in range(0, len(mine), progress.at_once)
        ]
        loss, full = 0.0, False
        try:
            for part in parts:
                loss = loss + work.run(part, labels)
        except torch.OutOfMemoryError:
            full = True  # left here: the exception holds on to the tensors that filled the memory
        if not full:
            progress.tokens += sum(len(row["input_ids"]) for row in chosen)
            progress.trained_tokens += labels
            return processes().sum_up(loss, work.parameters)
        restore_random(random_state)
        if work.give_up():
            continue
        if progress.at_once == 1:
            raise RunFailedError(
                "Out of memory with a single row: turn checkpointing on, shorten max_length, or "
                "load the base in 4 bits (quantization='nf4')."
            )
        progress.at_once = math.ceil(min(progress.at_once, len(mine)) / 2)
        say(f"out of memory: {progress.at_once} rows at once from here on, {len(chosen)} a step")


def skip(progress: Progress, loss: float, fp16: bool) -> None:
    """Count a step whose loss or gradient is NaN or infinite; raise when they do not stop."""
    progress.skipped += 1
    progress.in_a_row += 1
    if progress.in_a_row < MOST_SKIPPED[fp16]:
        return
    what = "gradient" if math.isfinite(loss) else "loss"
    cure = (
        "A lower learning rate is the likely cure"
        if progress.step > 10
        else "The very first steps failed: the model's weights or its dtype are the likely cause; "
        "try dtype='float32'"
    )
    raise RunFailedError(
        f"The {what} was NaN or infinite {progress.in_a_row} steps in a row, at step "
        f"{progress.step + 1}; the adapter is not saved. {cure}."
    )


def snapshot(named, optimizer, scaler, progress: Progress) -> dict:
    """All that the next step depends on: adapter, optimiser, loss scale, random states, counts."""
    return {
        "adapter": {name: p.detach().cpu() for name, p in named.items()},
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "random": random_states(),
        "progress": asdict(progress),
    }


def restore(state: dict, named, optimizer, scaler) -> Progress:
    """Put a snapshot back; returns how far its run was."""
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(state["adapter"][name])
    optimizer.load_state_dict(state["optimizer"])
    if scaler.is_enabled():
        scaler.load_state_dict(state["scaler"])
    restore_random(state["random"])
    return Progress(**state["progress"])
