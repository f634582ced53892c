"""Jobs on a Ray cluster: an engine of `jobs.run_jobs`.

One task a job, which has a GPU to itself where the cluster has any. The checkout travels with it,
so that a machine of the cluster needs only the installed requirements; the records come back to
the machine that asked and are written there. A job whose worker or machine is lost runs again
wherever there is room. What a job keeps in its folder outlives its machine only where that folder
is on a disk all of them share.

Ray on this machine alone listens on 127.0.0.1, has no dashboard and reports nothing to anybody.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_kit import store
from lora_kit.errors import BadInputError, NotAvailableError
from lora_kit.studies.calls import call, obey_t4_rules, threads
from lora_kit.studies.jobs import Job, Outcome

STARTS = 3  # a busy machine may need more than one, see _surroundings
SETTINGS = ("RAY_USAGE_STATS_ENABLED", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
GRAMMAR = "rfc3987_syntax"
PASSED_ON = ("LORA_KIT_T4_RULES", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
STAYS = [".git", ".venv", "runs", "figures", "build", ".cache", "*.part", "__pycache__"]


class RayPool:
    """`slots` tasks at a time on a cluster that ray is connected to. `own`: it was started here and
    ends with the pool."""

    def __init__(self, slots: int, gpus: bool, own: bool):
        import ray

        self.slots, self.own, self.ray = slots, own, ray
        # max_retries=0: run_jobs tries again, and counts. A GPU's worker ends with its task (Ray's
        # own rule), for a process that has used one GPU cannot change to another.
        self.task = ray.remote(num_cpus=1, num_gpus=int(gpus), max_retries=0)(_task)
        self.running: dict[Any, tuple[Job, float]] = {}

    def start(self, job: Job) -> None:
        sources = {}
        for word in (job.function, job.arguments.get("function", "")):
            path = Path(str(word).rsplit(":", 1)[0])
            if path.suffix == ".py":
                sources[str(path)] = path.read_text(encoding="utf-8")
        task = self.task.options(name=job.name)
        reference = task.remote(job.function, dict(job.arguments), sources)
        self.running[reference] = (job, time.monotonic())

    def wait(self, seconds: float | None) -> list[tuple[Job, Outcome]]:
        ready, _ = self.ray.wait(list(self.running), num_returns=1, timeout=seconds)
        return [self._end(reference) for reference in ready]

    def _end(self, reference) -> tuple[Job, Outcome]:
        job, begun = self.running.pop(reference)
        try:
            said = self.ray.get(reference)
        except self.ray.exceptions.RayError as e:
            lines = [line for line in str(e).splitlines() if line.strip()] or [type(e).__name__]
            error = f"its worker was lost ({type(e).__name__}: {lines[0].strip()})"
            passed = time.monotonic() - begun
            return job, Outcome(None, error, "\n".join(lines), lost=True, seconds=passed)
        # Measured where it ran: it may have waited for a place.
        return job, Outcome(**said)

    def close(self) -> None:
        for reference in self.running:
            with contextlib.suppress(Exception):  # the cluster may be what was lost
                self.ray.cancel(reference, force=True)
        if self.own:
            self.ray.shutdown()


def _task(function: str, arguments: dict[str, Any], sources: Mapping[str, str]) -> dict[str, Any]:
    """In a worker: put the files of cells where this machine has them, and call."""
    places = {}
    for path, text in sources.items():
        here = Path(path)
        if not here.is_file() or here.read_text(encoding="utf-8") != text:
            here = store.home() / "cells" / store.sha256_json(text)[:12] / here.name
            store.write_text(here, text)
        places[path] = str(here)

    def moved(word: str) -> str:
        place, _, name = word.rpartition(":")
        return f"{places[place]}:{name}" if place in places else word

    if "function" in arguments:
        arguments = {**arguments, "function": moved(arguments["function"])}
    obey_t4_rules()
    started = time.monotonic()
    return {**call(moved(function), arguments), "seconds": time.monotonic() - started}


def ray_pool(jobs: int | None = None, address: str | None = None) -> RayPool:
    """Connect to a cluster, or start Ray on this machine.

    Args:
        jobs: tasks at a time; by default one a GPU of the cluster, or one a core where it has none.
        address: of a running cluster ("host:6379"; "auto" on one of its machines). None starts Ray
            here.

    Raises:
        NotAvailableError: ray is not installed, or no cluster answers.
        BadInputError: fewer than one job.
    """
    if jobs is not None and jobs < 1:
        raise BadInputError(f"jobs must be at least 1, not {jobs}.")
    with _surroundings(address is None):
        try:
            import ray
        except ImportError:
            raise NotAvailableError("Ray is not installed: see requirements.txt.") from None
        return _connected(ray, jobs, address)


def _connected(ray, jobs: int | None, address: str | None) -> RayPool:
    variables = {n: os.environ[n] for n in PASSED_ON if n in os.environ} | threads(1)
    options = {
        "runtime_env": {
            "working_dir": str(store.repository()),
            "excludes": STAYS,
            "env_vars": variables,
        },
        "log_to_driver": False,
        "logging_level": "error",
    }
    _connect(ray, address, jobs, options)
    there = ray.cluster_resources()
    gpus = int(there.get("GPU", 0))
    slots = jobs or gpus or int(there.get("CPU", 1))
    return RayPool(slots, gpus > 0, own=address is None)


@contextlib.contextmanager
def _surroundings(own: bool) -> Iterator[None]:
    """What Ray reads when it is imported and started. own: it will be started here.

    Its six processes give up when they are not all there after 15 s, and two thirds of what
    `import ray` takes goes into a grammar of internet addresses: jsonschema builds it where
    JupyterLab has brought that package, and does without where it is missing. So it is missing
    for Ray, which checks no addresses.
    """
    old = {k: os.environ.get(k) for k in (*SETTINGS, "PYTHONPATH")}
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    hidden = own and "jsonschema" not in sys.modules and GRAMMAR not in sys.modules
    if own:
        # Ray's name for it tells of other systems; it means: listen on the loopback address only.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        folder = store.home() / "ray"
        store.write_text(folder / f"{GRAMMAR}.py", "raise ImportError('not needed by Ray')\n")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), old["PYTHONPATH"] or ""])
    if hidden:
        sys.modules[GRAMMAR] = None
    try:
        yield
    finally:
        if hidden:
            del sys.modules[GRAMMAR]
        for name, value in old.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _connect(ray, address: str | None, jobs: int | None, options: dict[str, Any]) -> None:
    if address is not None:
        try:
            ray.init(address=address, **options)
        except Exception as e:  # a dozen kinds, by what does not answer
            first = str(e).splitlines()[0] if str(e) else type(e).__name__
            raise NotAvailableError(f"No Ray cluster answers at {address}: {first}") from None
        return
    from lora_kit.hardware import detect

    cores = max(jobs or 1, detect().cores)
    for again in range(STARTS):
        try:
            # "local": its own, even where a killed run has left the address of a dead one behind.
            ray.init(address="local", num_cpus=cores, include_dashboard=False, **options)
            return
        except Exception as e:
            ray.shutdown()
            if again == STARTS - 1:
                first = str(e).splitlines()[0] if str(e) else type(e).__name__
                raise NotAvailableError(f"Ray did not start on this machine: {first}") from None
