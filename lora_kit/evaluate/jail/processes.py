"""The processes of a sandbox: how they start, what they give up, how they are ended."""

from __future__ import annotations

import math
import os
import random
import signal
import struct
import sys
import time
from contextlib import suppress

from . import confinement, program, values


class Processes:
    """The program's process, and everything that descends from it."""

    def __init__(self, job: dict) -> None:
        self.isolated, self.spare = job["isolate"], 0
        calls, answers, status = os.pipe(), os.pipe(), os.pipe()
        if not self.isolated:
            confinement.process_control(confinement.SUBREAPER, 1)
            if os.geteuid() == 0 and confinement.LINUX:
                self.spare = confinement.spare_user()
            if self.spare:
                os.chown(job["folder"], self.spare, self.spare)
        # From here on nobody without privileges can trace this process or read its memory.
        confinement.process_control(confinement.DUMPABLE, 0)
        self.pid = os.fork()
        if self.pid == 0:
            if self.isolated:
                _be_process_one(job, calls[0], answers[1], status[1])
            else:
                _be_program(job, calls[0], answers[1], self.spare)
        for handle in (calls[0], answers[1], status[1]):
            os.close(handle)
        self.calls, self.answers, self._status = calls[1], answers[0], status[0]
        self._ended: int | None = None
        self._gone = False
        try:
            first = values.receive(self.answers)
        except EOFError:
            first = {"missing": "the program's process ended at its start"}
        if first["missing"]:
            self.end()
            raise OSError(0, first["missing"])
        self.started = time.monotonic()

    def status(self) -> int:
        """Wait for the program's own process: its exit code, or minus the signal that ended it."""
        if self._ended is None:
            code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            if self.isolated:
                told = os.read(self._status, 4)
                code = struct.unpack("<i", told)[0] if told else -signal.SIGKILL
            self._ended = code
        return self._ended

    def end(self) -> bool:
        """Kill the program with all its descendants; whether none is left."""
        if self.isolated:
            # The kernel kills a whole tree when its process 1 dies, before that one is reaped.
            with suppress(ProcessLookupError, ChildProcessError):
                if self._ended is None and not self._gone:
                    os.kill(self.pid, signal.SIGKILL)
                    os.waitpid(self.pid, 0)
                    self._gone = True  # its number may be another's from now on
            return True
        with suppress(OSError):
            os.killpg(self.pid, signal.SIGKILL)
        until = time.monotonic() + 5
        while time.monotonic() < until:
            if self.spare >= confinement.SPARE:
                confinement.kill_user(self.spare)
            # Whoever loses its parent becomes a child of this process, wherever it hides.
            for pid in confinement.children():
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            try:
                if not os.waitpid(-1, os.WNOHANG)[0]:
                    time.sleep(0.001)
            except ChildProcessError:
                if self.spare >= confinement.SPARE:
                    confinement.remove_shared_memory(self.spare)
                return True
        return False


def _be_process_one(job: dict, calls: int, answers: int, status: int) -> None:
    """Start the program, reap what it leaves, say how it ended; with this process all others go."""
    confinement.process_control(confinement.DIE_WITH_PARENT, signal.SIGKILL)
    _close_all_but(calls, answers, status)
    first = os.fork()
    if first == 0:
        _be_program(job, calls, answers, 0)
    os.close(calls)
    os.close(answers)
    while True:
        pid, ended = os.wait()
        if pid == first:
            os.write(status, struct.pack("<i", os.waitstatus_to_exitcode(ended)))
            os._exit(0)


def _be_program(job: dict, calls: int, answers: int, spare: int) -> None:
    """Give up every right and handle, then run the program. Does not return."""
    try:
        _give_up_everything(job, calls, answers, spare)
    except OSError as e:
        values.send(answers, {"missing": refusal(e)})
        os._exit(1)
    values.send(answers, {"missing": ""})
    if job["function"] is not None:
        with suppress(BaseException):
            program.serve(job, calls, answers)
        os._exit(1)
    os.close(calls)
    os.close(answers)
    sys.exit(program.run(job["program"]))  # threads are waited for and atexit runs


def _give_up_everything(job: dict, calls: int, answers: int, spare: int) -> None:
    """All that stands between the program and the machine; OSError where a step is refused."""
    limits, processes = job["limits"], job["limits"]["processes"]
    os.setsid()  # a signal to its process group reaches nobody else
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    _close_all_but(calls, answers)
    os.chdir(job["folder"])
    confinement.leave_keyring()
    if job["isolate"]:
        confinement.forget_privileges(job["inside"])
        processes += 3  # the checker and process 1 may count as this user's too
    elif confinement.LINUX:
        if spare:
            confinement.become(spare)
        else:
            processes += confinement.tasks_of_user()
            confinement.drop_capabilities()
        confinement.landlock()
    confinement.process_control(confinement.DIE_WITH_PARENT, signal.SIGKILL)
    seconds = math.ceil(limits["seconds"]) + 1
    confinement.set_limits(seconds, limits["memory"], limits["disk"], processes, limits["files"])
    os.environ.clear()
    sys.argv[:] = ["program"]
    random.seed(1)  # the same program draws the same each time, and not what the checks draw
    sys.stdout.reconfigure(line_buffering=True)


def _close_all_but(*keep: int) -> None:
    """Close every handle but these and the three standard ones."""
    kept = [2, *sorted(keep), 1 << 16]
    for i in range(len(kept) - 1):
        os.closerange(kept[i] + 1, kept[i + 1])


def refusal(error: OSError) -> str:
    """What the kernel refused, in words."""
    where = error.filename if isinstance(error.filename, str) else "a new process"
    return f"{where}: {error.strerror}" if error.errno else str(error.strerror)
