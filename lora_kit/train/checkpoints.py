"""Checkpoints: a run that is killed at any moment carries on from the newest whole one.

Each is a folder `step-00000040` with the state and its checksum, built under another name and
renamed when complete: a reader finds all of it or nothing. What a crash of the machine or a full
disk spoils all the same is told by the checksum, and the checkpoint before it is taken.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from lora_kit import store
from lora_kit.errors import CorruptFileError

STATE, FACTS = "state.pt", "checkpoint.json"
CHECKPOINT_SECONDS = 120  # between two, where no number of steps was asked for


class Checkpoints:
    """The checkpoints of one run.

    folder: holds them and nothing else. identity: what the run is (model, rows, hyperparameters);
    checkpoints of another are passed over. keep: how many of the newest stay.
    """

    def __init__(self, folder: Path, identity: str, keep: int = 2, say=print):
        self.folder, self.identity, self.keep, self.say = Path(folder), identity, keep, say

    def save(self, step: int, state: dict[str, Any]) -> bool:
        """Write a checkpoint; older ones beyond `keep` go when it is complete.

        A disk that refuses stops nothing: the run goes on, the checkpoint before stays, and a line
        says so. Returns whether it was written.
        """
        target = self.folder / f"step-{step:08d}"
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getvalue()
        try:
            with store.new_folder(target) as part:
                with open(part / STATE, "wb") as f:
                    f.write(data)
                    f.flush()
                    os.fsync(f.fileno())  # before the rename: a name must not outlive its content
                facts = {"identity": self.identity, "step": step, "bytes": len(data)}
                store.write_json(part / FACTS, facts | {"sha256": _sha256(data)})
        except OSError as error:
            reason = error.strerror or str(error)
            self.say(f"Checkpoint at step {step} not written ({reason}); training goes on.")
            return False
        for old in self._found()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return True

    def newest(self) -> dict[str, Any] | None:
        """The state of the newest whole checkpoint of this run; None where there is none.

        One that is damaged is passed over with a line that says why.
        """
        for part in self.folder.glob(".step-*.part"):  # what a killed save left
            shutil.rmtree(part, ignore_errors=True)
        for folder in reversed(self._found()):
            try:
                state = self._read(folder)
            except CorruptFileError as error:
                self.say(f"{error} Falling back to the checkpoint before it.")
                continue
            if state is not None:
                return state
        return None

    def clear(self) -> None:
        """Remove them all; called when the adapter stands complete on disk."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _found(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("step-*") if p.is_dir())

    def _read(self, folder: Path) -> dict[str, Any] | None:
        try:
            facts = store.read_json(folder / FACTS)
            data = (folder / STATE).read_bytes()
            wanted, length = facts["sha256"], facts["bytes"]
        except (OSError, KeyError, TypeError) as error:
            raise CorruptFileError(f"Checkpoint {folder.name} is incomplete ({error}).") from error
        if facts.get("identity") != self.identity:
            return None
        if len(data) != length:
            raise CorruptFileError(
                f"Checkpoint {folder.name} is truncated: {len(data):,} of {length:,} bytes."
            )
        if _sha256(data) != wanted:
            raise CorruptFileError(f"Checkpoint {folder.name} is not what was written.")
        # weights_only: tensors and plain values, no code.
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def random_states() -> list[torch.Tensor]:
    """torch's generators: the CPU's, and the current GPU's where there is one."""
    gpu = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *gpu]


def restore_random(states: list[torch.Tensor]) -> None:
    """Put back what `random_states` gave."""
    torch.set_rng_state(states[0])
    for gpu in states[1:]:
        torch.cuda.set_rng_state(gpu)
