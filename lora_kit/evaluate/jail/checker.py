"""The process that judges. It never runs a line of the program under test.

sandbox.py → this process (trusted: holds the checks, writes the verdict) → process 1 of the
sandbox (trusted: reaps) → the program (not trusted: holds two pipes and what was printed).

The checks call a stand-in for the program's function. It sends the arguments through a pipe to the
program's process and returns what comes back, as plain data made here. So there is nothing in the
program's process to steal, patch or skip: no expected answer, no `assert`, no pass mark; its exit
says nothing. A right answer is the one way to pass.
"""

from __future__ import annotations

import builtins
import math
import os
import random
import re  # noqa: F401  (what many programs import is read once, before the fork)
import signal
import time
import traceback
import typing  # noqa: F401
from contextlib import suppress

from . import confinement, processes, values
from .program import remembered

# As messages these would end a loop or the process of the checks, not fail them.
_NOT_RAISED_HERE = (StopIteration, StopAsyncIteration)


class Stopped(BaseException):
    """The program can answer no more. No `except Exception` of a check holds this up."""


class ProgramError(Exception):
    """The program raised something that is no exception of Python's own."""


def main(verdict: int) -> None:
    """Read a job from standard input, run it, write the verdict to the handle `verdict`."""
    try:
        job = values.receive(0, largest=None)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        confinement.process_control(confinement.DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != job["parent"]:
            return
        with suppress(OSError):  # should memory run out, this goes first
            confinement.write("/proc/self/oom_score_adj", "1000")
        try:
            if job["isolate"]:
                job["inside"] = confinement.enter_namespaces()
                confinement.empty_root(job["folder"], job["limits"]["disk"])
                job["folder"] = "/tmp"
            program = processes.Processes(job)
        except OSError as e:
            values.send(verdict, {"missing": processes.refusal(e)})
            return

        def give_up(*_):
            program.end()
            os._exit(1)

        signal.signal(signal.SIGTERM, give_up)  # the caller wants no verdict any more
        checks = values.receive(0, largest=None)
        os.close(0)
        found = _judge(program, job, checks) if checks else _wait(program, job)
        found["seconds"] = round(time.monotonic() - program.started, 6)
        if not program.end():
            found["why"] += "; some of its processes could not be ended"
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        values.send(verdict, found)
    except BrokenPipeError:
        return


class StandIn:
    """What the checks call: the function of the program, at the other end of two pipes."""

    def __init__(self, program: processes.Processes, name: str) -> None:
        self._program, self.__name__, self.calls = program, name, 0
        self.stopped: dict | None = None
        self.last = ""

    def __call__(self, *arguments, **named):
        if self.stopped:
            raise Stopped
        self.calls += 1
        self.last = ""
        call = [[values.pack(a) for a in arguments], {k: values.pack(v) for k, v in named.items()}]
        try:
            values.send(self._program.calls, call)
            answer = values.receive(self._program.answers)
            if not isinstance(answer, dict) or not {"value", "raised"} & set(answer):
                raise values.Garbled("neither a value nor an error")
            if "value" in answer:
                value = values.unpack(answer["value"])
                self.last = f"returned {_short(value)}"
                return value
            kind, text = str(answer["raised"])[:100], str(answer.get("text", ""))[:300]
        except (EOFError, BrokenPipeError):
            self.stop("crashed", _ending(self._program.status()))
        except (values.Garbled, RecursionError, MemoryError) as e:
            self.stop("failed", f"its answer could not be read: {str(e) or type(e).__name__}")
        self.last = f"raised {kind}: {text}" if text else f"raised {kind}"
        if answer.get("fatal"):
            self.stop("failed", f"the program {self.last}")
        raise _error(kind, text)

    def stop(self, verdict: str, why: str) -> None:
        """Note why there are no more answers, and leave the checks."""
        self.stopped = self.stopped or {"verdict": verdict, "why": why}
        raise Stopped


def _error(kind: str, text: str) -> Exception:
    """The exception of Python's own that the program raised, or a ProgramError."""
    known = getattr(builtins, kind, None)
    if isinstance(known, type) and issubclass(known, Exception):
        if not issubclass(known, _NOT_RAISED_HERE):
            with suppress(TypeError):  # UnicodeDecodeError wants five arguments
                return known(text)
    return ProgramError(f"{kind}: {text}")


def _judge(program: processes.Processes, job: dict, checks: dict) -> dict:
    """Run the checks against the program's function."""
    stand_in = StandIn(program, checks["function"])
    seconds = job["limits"]["seconds"]

    def time_is_up(*_):
        stand_in.stop("timeout", f"no verdict after {seconds:g} s")

    signal.signal(signal.SIGALRM, time_is_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    confinement.set_limits(
        math.ceil(seconds) + 5, job["limits"]["memory"] + 2**29, 2**20, 2**20, 256
    )
    random.seed(0)  # checks that draw their inputs draw the same each time
    space: dict = {"__name__": "checks"}
    try:
        try:
            exec(remembered(checks["setup"], "<setup>"), space)
            space[checks["function"]] = stand_in
            exec(remembered(checks["checks"], "<checks>"), space)
            space["check"](stand_in)
            found = {"verdict": "passed", "why": f"all checks held, in {stand_in.calls} calls"}
            if not stand_in.calls:
                found = {"verdict": "failed", "why": "the checks called nothing"}
        except Stopped:
            found = {"verdict": "failed", "why": "stopped"}
        except (Exception, SystemExit) as e:
            found = {"verdict": "failed", "why": _failure(e, stand_in)}
        signal.setitimer(signal.ITIMER_REAL, 0)
    except Stopped:  # the alarm, just when it no longer mattered
        found = {"verdict": "failed", "why": "stopped"}
    return stand_in.stopped or found


def _wait(program: processes.Processes, job: dict) -> dict:
    """Let a program without checks run to its end."""
    seconds = job["limits"]["seconds"]

    def time_is_up(*_):
        raise Stopped

    signal.signal(signal.SIGALRM, time_is_up)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        status = program.status()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except Stopped:
        return {"verdict": "timeout", "why": f"still running after {seconds:g} s"}
    if status < 0:
        return {"verdict": "crashed", "why": _ending(status)}
    return {"verdict": "exited", "why": _ending(status), "exit_code": status}


def _failure(error: BaseException, stand_in: StandIn) -> str:
    """Which check failed, and what the program had answered."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == "<checks>"]
    line = " ".join((frames[-1].line or "").split())[:200] if frames else ""
    if isinstance(error, AssertionError) and line:
        return f"{line}: {stand_in.last}" if stand_in.last else line
    text = f"{type(error).__name__}: {str(error)[:300]}"
    if stand_in.last.startswith("raised"):
        text = stand_in.last
    return f"{line}: {text}" if line else text


def _short(value) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError, MemoryError):  # an int of more digits than Python prints
        text = f"a {type(value).__name__} too large to print"
    return text if len(text) <= 200 else f"{text[:197]}…"


def _ending(status: int) -> str:
    if status < 0:
        with suppress(ValueError):
            return f"the program was killed by {signal.Signals(-status).name}"
    return f"the program ended with exit code {status}"
