"""Processes on this machine that stay warm and take one job after another.

Importing torch and loading libraries takes a process seconds, which a sweep of short runs would
pay for every run. A process that dies is replaced.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue

from lora_kit.errors import BadInputError
from lora_kit.hardware import GIB
from lora_kit.studies.calls import tail, threads, visible_gpus
from lora_kit.studies.jobs import Job, Outcome

NEEDED = 3 * GIB  # of memory for a process that trains the default model on a CPU


@dataclass
class _Worker:
    process: subprocess.Popen
    log: Path
    job: Job | None = None
    begun: float = 0.0


class LocalPool:
    """`slots` processes, each with a job or idle; an engine of `jobs.run_jobs`.

    folder: where the processes' own logs go. environments: one a slot, what is set there beside
    this process's own environment. The processes end when this one does, however it ends.
    """

    def __init__(self, folder: Path, environments: list[Mapping[str, str]]):
        self.slots, self.folder, self.environments = len(environments), folder, environments
        self.workers: list[_Worker | None] = [None] * self.slots
        self.answers: Queue[tuple[_Worker, dict | None]] = Queue()
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, job: Job) -> None:
        slot = next(i for i, w in enumerate(self.workers) if w is None or w.job is None)
        worker = self.workers[slot]
        if worker is None or worker.process.poll() is not None:  # it may have died while idle
            worker = self.workers[slot] = self._new(slot)
        worker.job, worker.begun = job, time.monotonic()
        log = str(job.log) if job.log else None
        line = {"function": job.function, "arguments": dict(job.arguments), "log": log}
        with contextlib.suppress(BrokenPipeError):  # it has just died, and its listener says so
            worker.process.stdin.write(json.dumps(line) + "\n")
            worker.process.stdin.flush()

    def wait(self, seconds: float | None) -> list[tuple[Job, Outcome]]:
        try:
            worker, said = self.answers.get(timeout=seconds)
        except Empty:
            return []
        if said is None and worker in self.workers:
            self.workers[self.workers.index(worker)] = None
        job, worker.job = worker.job, None
        if job is None:  # died while idle
            return []
        if said is not None:
            return [(job, Outcome(**said))]
        took = time.monotonic() - worker.begun
        code = worker.process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        last = (tail(job.log) if job.log else "") or tail(worker.log)
        return [(job, Outcome(None, f"its process {how}", last, lost=True, seconds=took))]

    def close(self) -> None:
        for worker in self.workers:
            if worker is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(worker.process.pid, signal.SIGKILL)
                worker.process.wait()

    def _new(self, slot: int) -> _Worker:
        log = self.folder / f"worker{slot}.log"
        with open(log, "w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "lora_kit.studies.pool_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **self.environments[slot]},
                start_new_session=True,  # so that it can be ended with all its children
            )
        worker = _Worker(process, log)
        threading.Thread(target=self._listen, args=(worker,), daemon=True).start()
        return worker

    def _listen(self, worker: _Worker) -> None:
        for line in worker.process.stdout:
            self.answers.put((worker, json.loads(line)))
        self.answers.put((worker, None))  # it has ended


def local_pool(
    folder: Path, jobs: int | None = None, device: str | None = None, most: int | None = None
) -> LocalPool:
    """Processes for this machine: `jobs` of them on each GPU (1 by default); on a CPU `jobs`, with
    its cores shared between them (by default one for two cores, as far as memory goes).

    Args:
        device: "cpu" leaves the GPUs alone; None uses what there is.
        most: so many processes at most, in all: no more than there are jobs to do.

    Raises:
        BadInputError: no job, or more than the CPU has cores.
    """
    from lora_kit.hardware import detect

    if jobs is not None and jobs < 1:
        raise BadInputError(f"jobs must be at least 1, not {jobs}.")
    machine, gpus = detect(), [] if device == "cpu" else visible_gpus()
    if gpus:
        jobs = jobs or 1
        share = threads(machine.cores // (jobs * len(gpus)))
        # One after another over the GPUs, so that a few jobs use all of them.
        places = [gpu for _ in range(jobs) for gpu in gpus][:most]
        return LocalPool(folder, [{**share, "CUDA_VISIBLE_DEVICES": gpu} for gpu in places])
    if jobs is None:
        jobs = max(1, min(machine.cores // 2, machine.memory_free // NEEDED))
    if jobs > machine.cores:
        raise BadInputError(f"{jobs} jobs are more than this machine's {machine.cores} cores.")
    jobs = min(jobs, most or jobs)
    return LocalPool(folder, [threads(machine.cores // jobs)] * jobs)
