"""Cells for tests of sweeps: no model, a few milliseconds each, nothing but the package."""

import os
import signal
import time

from lora_kit.errors import BadInputError
from lora_kit.studies.records import Record

DEFAULTS = {"RANK": 4, "RATE": 0.1, "KIND": "plain", "SECONDS": 0.0, "LAYERS": [1, 2]}


def check_setting(parameters):
    if parameters["RANK"] > 512:
        raise BadInputError(f"RANK must be 512 at most, not {parameters['RANK']}.")


def run_cell(parameters, seed, folder):
    """A number made of what was given. KIND: "always" fails, "once" fails the first time, "killed"
    kills its own process the first time, "doomed" every time, "other" returns no record."""
    tries = len(list(folder.glob("try*")))
    (folder / f"try{tries}").write_text(str(os.getpid()))
    print(f"try {tries}")
    kind = parameters["KIND"]
    time.sleep(parameters["SECONDS"])
    if kind == "always" or (kind == "once" and tries == 0):
        raise ValueError(f"no good at try {tries}")
    if kind == "doomed" or (kind == "killed" and tries == 0):
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "other":
        return {"score": 1.0}
    score = parameters["RANK"] * parameters["RATE"] + seed
    return Record(
        study="toy",
        command="none",
        parameters={"note": "the cell's own"},
        metrics={"score": score, "items": {"value": score / 10, "low": 0, "high": 1, "n": 5}},
        seconds=0.01,
        hardware={"name": "here"},
        versions={},
        created="2026-01-01T00:00:00+00:00",
    )
