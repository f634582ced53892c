"""Jobs side by side: which starts next, what is tried again, and when to stop starting.

The processes that run them are an engine's: `pool.LocalPool` on this machine, `sweep_ray.RayPool`
on a cluster.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

GRACE = 5.0  # seconds over the budget after which what still runs is cut off


@dataclass(frozen=True)
class Job:
    """One call to make somewhere: `function(**arguments)`, see `calls`.

    kind: jobs of a kind take about as long as each other. group: the jobs of a group are of use
    together only, such as the seeds of a setting. needs: names of jobs that must have ended well
    before. log: where what it prints goes.
    """

    name: str
    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    kind: str = ""
    group: str | None = None
    needs: tuple[str, ...] = ()
    log: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """How a call ended. error: one sentence, None when it ended well; lost: its process did not
    live to say so (killed, out of memory, its machine gone)."""

    value: Any = None
    error: str | None = None
    traceback: str = ""
    lost: bool = False
    seconds: float = 0.0


class Engine(Protocol):
    """Where jobs run, `slots` of them at a time."""

    slots: int

    def start(self, job: Job) -> None:
        """Begin a job; called only while fewer than `slots` run."""

    def wait(self, seconds: float | None) -> list[tuple[Job, Outcome]]:
        """The jobs that ended since; [] when none did within so many seconds."""

    def close(self) -> None:
        """End every process, whatever it is doing."""


@dataclass
class Ended:
    """What became of the jobs: by name, how each ended; and the names of those that were not run,
    for want of time or of something they need."""

    done: dict[str, Outcome] = field(default_factory=dict)
    failed: dict[str, Outcome] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    attempts: dict[str, int] = field(default_factory=dict)


@dataclass
class Clock:
    """How long jobs take: measured, by group and by kind. budget: seconds in all, or None."""

    budget: float | None = None
    started: float = field(default_factory=time.monotonic)
    took: dict[str, list[float]] = field(default_factory=dict)

    @property
    def passed(self) -> float:
        return time.monotonic() - self.started

    def note(self, job: Job, seconds: float) -> None:
        for name in self._names(job):
            self.took.setdefault(name, []).append(seconds)

    def expect(self, job: Job) -> float:
        """Seconds of a job: the longest of its group so far, else of its kind, else 0."""
        known = [self.took[name] for name in self._names(job) if name in self.took]
        return max(known[0]) if known else 0.0

    def fits(self, job: Job, waiting: Sequence[Job], begun: set[str], slots: int) -> bool:
        """Whether a job would end in time; the first of its group, whether all of them would."""
        if self.budget is None:
            return True
        rounds = 1
        if job.group is not None and job.group not in begun:
            rounds = math.ceil(sum(other.group == job.group for other in waiting) / slots)
        return self.passed + rounds * self.expect(job) < self.budget

    @staticmethod
    def _names(job: Job) -> list[str]:
        return [*([f"group {job.group}"] if job.group is not None else []), f"kind {job.kind}"]


def run_jobs(
    jobs: Iterable[Job],
    engine: Engine,
    clock: Clock | None = None,
    done: Iterable[str] = (),
    begun: Iterable[str] = (),
    retries: int = 1,
    lost_retries: int = 2,
    on_end: Callable[[Job, Outcome, bool], None] | None = None,
    say: Callable[[str], None] = print,
) -> Ended:
    """Run jobs, most important first, each as soon as a slot is free and what it needs is done.

    Args:
        clock: measures; its budget is kept: no job is started that would not end in time by what
            was measured so far, nor a group all of whose jobs would not. What still runs `GRACE`
            seconds after it is cut off.
        done: names of jobs that are done already; begun: groups of which some are.
        retries: how often a job that failed is tried again at once; lost_retries: the same for one
            whose process was lost, which may be no fault of the job.
        on_end: called with each ended job, its outcome, and whether it will be tried again.
        say: prints a line.

    Returns:
        Ended. The engine is closed, also when this raises.
    """
    clock, waiting, ended = clock or Clock(), list(jobs), Ended()
    ready, groups, running = set(done), set(begun), 0
    tried: dict[tuple[str, bool], int] = {}
    try:
        while waiting or running:
            while running < engine.slots:
                job = next(
                    (
                        j
                        for j in waiting
                        if ready.issuperset(j.needs)
                        and clock.fits(j, waiting, groups, engine.slots)
                    ),
                    None,
                )
                if job is None:
                    break
                waiting.remove(job)
                groups |= {job.group} - {None}
                engine.start(job)
                running += 1
            if not running:  # so nothing that waits can ever start
                break
            rest = None if clock.budget is None else clock.budget + GRACE - clock.passed
            if rest is not None and rest <= 0:
                say(f"the budget is spent: {running} job(s) that still run are cut off")
                break
            for job, outcome in engine.wait(rest):
                running -= 1
                ended.attempts[job.name] = ended.attempts.get(job.name, 0) + 1
                again = False
                if outcome.error is None:
                    clock.note(job, outcome.seconds)
                    ready.add(job.name)
                    ended.done[job.name] = outcome
                else:
                    key = (job.name, outcome.lost)
                    tried[key] = tried.get(key, 0) + 1
                    again = tried[key] <= (lost_retries if outcome.lost else retries)
                    if again:
                        waiting.insert(0, job)
                    else:
                        ended.failed[job.name] = outcome
                if on_end:
                    on_end(job, outcome, again)
    finally:
        engine.close()
    over = ended.done.keys() | ended.failed.keys()
    ended.left = [job.name for job in jobs if job.name not in over]
    return ended
