"""`finetune`: from a model's name and rows to an adapter on disk and the record of its making."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import lora_kit
from lora_kit import store
from lora_kit.architectures import Architecture
from lora_kit.data import Dataset
from lora_kit.errors import BadInputError, CorruptFileError, RunFailedError
from lora_kit.train.processes import processes
from lora_kit.train.spec import TrainSpec, check_engine, choose_engine

RECORD = "training.json"
SETTLED = ("batch_size", "accumulation", "checkpointing")


@dataclass(frozen=True)
class TrainResult:
    """An adapter in peft's format, and how it was made.

    losses: (step, training loss) of every step. tokens: all that went through the model, padding
    left out; trained_tokens: those with a label. Memory in bytes: `memory_before` held with the
    model loaded, `peak_memory` the most during training. reused: taken from an earlier run.
    skipped: steps left out for NaN or infinity. resumed_at: the step a killed run was taken up
    again at. settings: rows at once, accumulation and checkpointing as the memory planner settled
    them, and why.
    """

    adapter: Path
    engine: str
    why: str
    losses: tuple[tuple[int, float], ...]
    seconds: float
    tokens: int
    trained_tokens: int
    trainable: int
    total: int
    memory_before: int
    peak_memory: int
    spec: TrainSpec
    base: dict
    data: dict
    hardware: str
    reused: bool = False
    skipped: int = 0
    resumed_at: int = 0
    settings: dict = field(default_factory=dict)
    train: Dataset | None = None
    test: Dataset | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def bytes_on_disk(self) -> int:
        """Size of the adapter's weights file."""
        return (self.adapter / "adapter_model.safetensors").stat().st_size


def finetune(
    model: str,
    rows: Dataset,
    spec: TrainSpec,
    output: Path | None = None,
    engine: str = "auto",
    reuse: bool = True,
    checkpoint_every: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> TrainResult:
    """Fine-tune a model with LoRA or QLoRA and save the adapter in peft's format.

    Args:
        model: a registry name or a local folder.
        rows: rows of any shape `prompts.to_example` knows.
        spec: hyperparameters.
        output: the adapter's folder; by default one in the cache, named by everything that shapes
            the result (model, rows, hyperparameters, engine, version of the kit).
        engine: "auto", "native", "trl" or "unsloth"; see `choose_engine`.
        reuse: return a finished run of the same kind instead of repeating it.
        checkpoint_every: steps between checkpoints; 0 means one every two minutes. The same call
            after a crash carries on from the newest whole one.
        on_step: called with each step's number and training loss.

    Started by `accelerate launch` or torchrun, all processes make the same call and train one
    adapter together (`processes`); the effective batch stays batch_size × accumulation.

    Returns:
        TrainResult; the adapter's folder appears only when training ended well.

    Raises:
        BadInputError: rows on which no token would be trained, an output folder that holds
            something else, targets the engine cannot train; and what loading raises.
        RunFailedError: the loss or the adapter became NaN or infinite, or not one row fits.
    """
    asked = engine
    engine, why = choose_engine(asked)  # before anything else: Unsloth must be imported first
    from lora_kit.models import fetch_model

    files = fetch_model(model)
    if asked == "auto":
        engine, why = choose_engine(asked, store.read_json(files.path / "config.json"))
    check_engine(engine, spec)
    identity = {
        "model": [files.name, files.revision, *_weights_of(files)],
        "data": rows.fingerprint,
        "spec": spec.to_dict(),
        "engine": engine,
        "version": lora_kit.__version__,
    }
    if output is None:
        key = store.sha256_json(identity)[:12]
        output = store.home() / "adapters" / f"{files.name}-{rows.name}-{key}"
    output, crew = Path(output), processes()
    if crew.count > 1 and engine != "native":
        raise BadInputError(f"Several processes train with engine native, not with {engine}.")
    if output.is_dir() and any(output.iterdir()) and not (output / RECORD).exists():
        raise BadInputError(f"{output} holds something else than an adapter; name another folder.")
    # The first process alone holds the lock and writes.
    with store.lock(output) if crew.main else nullcontext(), crew.quiet():
        if reuse and (output / RECORD).exists():
            found = _read(output)
            if found is not None and found[0] == identity:
                if crew.main:
                    _checkpoints(output, identity).clear()
                return replace(found[1], reused=True)
        if crew.main:
            store.sweep(output)
        on_step = on_step if crew.main else None
        return _train(files, rows, spec, output, engine, why, identity, checkpoint_every, on_step)


def _checkpoints(output: Path, identity: dict):
    """Where the checkpoints of a run lie: beside the adapter's folder, until that stands."""
    from lora_kit.train.checkpoints import Checkpoints

    return Checkpoints(output.with_name(f".{output.name}.checkpoints"), store.sha256_json(identity))


def _weights_of(files) -> list[str]:
    """A folder's weights may change under the same name and config, so they are told apart too."""
    if files.source != "folder":
        return []
    return [store.sha256_file(p)[:12] for p in sorted(files.path.glob("*.safetensors"))]


def _train(files, rows, spec, output, engine, why, identity, every, on_step) -> TrainResult:
    from lora_kit.fingerprint import fingerprint_model
    from lora_kit.hardware import detect
    from lora_kit.models import load_tokenizer
    from lora_kit.train import engines
    from lora_kit.train.settings import settle

    encoded = encode_rows(rows, load_tokenizer(files), spec)
    per_step = spec.batch_size * spec.accumulation
    epoch = math.ceil(len(encoded) / per_step)
    steps = spec.steps or math.ceil(epoch * spec.epochs)
    shape = Architecture.from_config(store.read_json(files.path / "config.json"), files.name)
    longest = max(len(row["input_ids"]) for row in encoded)
    settled, how = settle(spec, shape, detect(), engine, longest)
    keep = _checkpoints(output, identity)
    while True:
        model, tokenizer = engines.load_for_training(files, settled, engine)
        base = {
            "name": files.name,
            "source": files.source,
            "revision": files.revision,
            "fingerprint": fingerprint_model(model).digest,
        }
        if engine == "native":
            done = engines.train_native(
                model, tokenizer, encoded, settled, steps, keep, every, on_step
            )
            break
        done = _with_trainer(model, tokenizer, encoded, settled, steps, keep, every, on_step)
        if done is not None:
            break
        del model
        settled = smaller(settled)
        keep.clear()
    # Rows are drawn without replacement in every epoch, whose last step takes what is left: a run
    # of whole epochs sees each row equally often and a part of one its share on average.
    passes = steps / epoch
    counts = {
        "tokens": done.tokens or round(passes * sum(len(r["input_ids"]) for r in encoded)),
        "trained_tokens": done.trained_tokens
        or round(passes * sum(x != -100 for r in encoded for x in r["labels"])),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "total": _count_all(model),
    }
    facts = {
        "engine": engine,
        "why": why,
        "losses": done.losses,
        "seconds": done.seconds,
        **counts,
        "memory_before": done.memory_before,
        "peak_memory": done.peak_memory,
        "skipped": done.skipped,
        "resumed_at": done.resumed_at,
        "settings": {n: getattr(settled, n) for n in SETTLED} | {"why": how},
        "base": base,
        "data": rows.record(),
        "hardware": detect().name,
    }
    if processes().main:
        with store.new_folder(output) as part:
            engines.save_adapter(model, part)
            store.write_json(part / RECORD, {"identity": identity, **facts})
        keep.clear()
    processes().wait()
    return _result(output, spec, facts)


def _with_trainer(model, tokenizer, encoded, spec, steps, keep, every, on_step):
    """What the Trainer's engines made, or None where memory ran out."""
    import torch

    from lora_kit.train import engines

    place = (keep.folder, keep.identity)
    try:
        return engines.train(model, tokenizer, encoded, spec, steps, on_step, place, every)
    except RunFailedError:
        if not any(keep.folder.glob("checkpoint-*")):
            keep.clear()  # the Trainer makes the folder before there is anything to keep
        raise
    except torch.OutOfMemoryError as error:
        # The traceback holds on to the tensors that filled the memory.
        error.__traceback__ = None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def smaller(spec: TrainSpec) -> TrainSpec:
    """The same step in more, smaller parts, after memory ran out.

    Raises:
        RunFailedError: it was a single row already, with checkpointing.
    """
    if spec.batch_size == 1 and spec.checkpointing is True:
        raise RunFailedError(
            "Out of memory with a single row and checkpointing: shorten max_length, or load the "
            "base in 4 bits (quantization='nf4')."
        )
    if spec.batch_size == 1:
        print("out of memory with one row: checkpointing from here on")
        return replace(spec, checkpointing=True)
    per_step = spec.batch_size * spec.accumulation
    rows = max(n for n in range(1, spec.batch_size) if per_step % n == 0)
    print(f"out of memory: begun again with {rows} rows at once, still {per_step} a step")
    return replace(spec, batch_size=rows, accumulation=per_step // rows)


def encode_rows(rows: Dataset, tokenizer, spec: TrainSpec) -> list[dict]:
    """Token ids and labels of every row that has something to learn.

    Raises:
        BadInputError: none has.
    """
    from lora_kit.prompts import encode, to_example

    encoded = [
        encode(tokenizer, to_example(row, spec.style, tokenizer), spec.max_length) for row in rows
    ]
    kept = [e for e in encoded if any(x != -100 for x in e["labels"])]
    if not kept:
        raise BadInputError(
            f"No row of {rows.name} has a token to train on within max_length={spec.max_length}; "
            "raise max_length, or look at the rows' completions."
        )
    if len(kept) < len(encoded):
        print(
            f"{len(encoded) - len(kept)} of {len(encoded)} rows left out: the prompt alone "
            f"fills max_length={spec.max_length}."
        )
    return kept


def _count_all(model) -> int:
    """Parameters of the whole model; a 4-bit weight stores two in a byte."""
    total = 0
    for parameter in model.parameters():
        packed = getattr(parameter, "quant_state", None) is not None
        total += parameter.numel() * (2 if packed else 1)
    return total


def _read(folder: Path) -> tuple[dict, TrainResult] | None:
    """The record of a finished run, or None where the folder holds something else."""
    if not (folder / "adapter_model.safetensors").exists():
        return None
    try:
        facts = store.read_json(folder / RECORD)
        identity = facts.pop("identity")
        spec = TrainSpec(**identity["spec"])
        return identity, _result(folder, spec, facts)
    except (CorruptFileError, BadInputError, KeyError, TypeError):
        return None


def _result(folder: Path, spec: TrainSpec, facts: dict) -> TrainResult:
    losses = tuple((int(step), float(loss)) for step, loss in facts["losses"])
    return TrainResult(adapter=folder, spec=spec, **{**facts, "losses": losses})
