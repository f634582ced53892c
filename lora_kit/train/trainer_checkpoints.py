"""Checkpoints of the Trainer's engines (trl, Unsloth): which of its folders are whole.

transformers writes a checkpoint file by file, so a killed run can leave half of one behind, and the
Trainer would take it up and fail. Here a folder counts when the list of its files' checksums, which
is written last, agrees.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from lora_kit import store
from lora_kit.errors import CorruptFileError
from lora_kit.train.checkpoints import CHECKPOINT_SECONDS

SEAL = "whole.json"


def seal(folder: Path, identity: str) -> None:
    """Write the checksums of a finished checkpoint, and what run it belongs to."""
    files = {
        str(p.relative_to(folder)): store.sha256_file(p)
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }
    store.write_json(folder / SEAL, {"identity": identity, "files": files})


def newest_whole(folder: Path, identity: str, say=print) -> Path | None:
    """The newest checkpoint of this run that is complete; damaged ones are removed, with a line."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: -int(p.name.rpartition("-")[2]))
    for checkpoint in found:
        try:
            kept = store.read_json(checkpoint / SEAL)
            if kept["identity"] != identity:
                continue
            wrong = [
                name
                for name, digest in kept["files"].items()
                if not (checkpoint / name).is_file()
                or store.sha256_file(checkpoint / name) != digest
            ]
        except (OSError, KeyError, TypeError, CorruptFileError):
            wrong = [SEAL]
        if not wrong:
            return checkpoint
        say(f"{checkpoint.name} is not whole ({wrong[0]}): taking the one before it.")
        shutil.rmtree(checkpoint, ignore_errors=True)
    return None


def saver(folder: Path, identity: str, every: int):
    """A Trainer callback that saves every `every` steps (0: every two minutes) and seals."""
    from transformers import TrainerCallback

    class Saver(TrainerCallback):
        def __init__(self):
            self.last = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            due = time.perf_counter() - self.last > CHECKPOINT_SECONDS
            if state.global_step % every == 0 if every else due:
                control.should_save = True
            return control

        def on_save(self, args, state, control, **_):
            self.last = time.perf_counter()
            seal(folder / f"checkpoint-{state.global_step}", identity)

    return Saver()
