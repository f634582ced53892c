"""Run a program that nobody has read, as a model writes them: cut off, limited, and judged fairly.

Three processes of their own, none of which is this one: the *checker* holds the checks and gives
the verdict, *process 1* keeps the sandbox, the *program* runs in it. Between checker and program
only plain data passes (`jail/`), so a verdict cannot be forged: a program passes by returning what
the checks ask for, and in no other way.

Isolated, on Linux with user namespaces, the program sees no process, file, socket or network but
its own: its root holds Python's library, read-only, and an empty /tmp in memory. All of it ends
with the verdict. Where that cannot be had, `run_program` and `check_function` refuse, unless the
caller insists; then what remains applies: a spare user (as root), Landlock (Linux 5.13), an own
session, resource limits, no environment, a throw-away folder, and every descendant killed. Without
namespaces the network stays in reach. Without both root and Landlock so do the caller's files and
processes, and with them its verdicts.

What no sandbox of this kind holds back: a flaw in the kernel, what a program learns from the
processor's timing, and load on the machine up to the limits. And a verdict is as good as its
checks: a program that knows the published answers by heart passes.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path

from lora_kit.errors import BadInputError, NotAvailableError, RunFailedError
from lora_kit.evaluate.jail import values

MIB = 2**20
GRACE_SECONDS = 20.0  # for a busy machine to start the checker, over the program's own time
ENDING_SECONDS = 10.0  # for the checker to end the program, before both are killed from here

# No site-packages (-S), no user site, nothing from the environment but the hash seed, with which
# sets of strings come in the same order each time: the same completion, the same verdict.
_FLAGS = ("-S", "-s", "-P", "-Wignore")
_ENVIRONMENT = {"PYTHONHASHSEED": "0"}
# The folder is on the path only while the jail is imported, and last, so that it hides nothing.
_START = (
    "import sys; sys.path.append(sys.argv[1]); from jail import checker; "
    "sys.path.remove(sys.argv[1]); sys.dont_write_bytecode = True; "
    "checker.main(int(sys.argv[2]))"
)


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    seconds: of the clock, from its first line to the verdict; of each process's CPU one more.
    memory: bytes of address space, each process. disk: bytes, one file; isolated, all files
    together. processes: threads count. output: bytes printed, more ends it.
    """

    seconds: float = 5.0
    memory: int = 512 * MIB
    disk: int = 16 * MIB
    processes: int = 16
    files: int = 64
    output: int = MIB

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not (whole or (field.name == "seconds" and isinstance(value, float))) or not (
                0 < value < 2**50
            ):
                raise BadInputError(
                    f"Limits: {field.name} must be a positive number, not {value!r}."
                )


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    verdict: "passed" or "failed" (the checks), "exited" (a program without checks), "timeout",
    "crashed" (it ended, or was ended by a signal, before it had answered), "flooded" (too much
    output). why: one line. output: what it printed, stdout and stderr together. seconds: from its
    first line to the verdict. exit_code: of a program that exited. isolated: False where only
    limits applied.
    """

    verdict: str
    why: str
    output: str
    seconds: float
    exit_code: int | None
    isolated: bool

    @property
    def passed(self) -> bool:
        """Whether every check held."""
        return self.verdict == "passed"


def run_program(program: str, limits: Limits | None = None, insist: bool = False) -> Outcome:
    """Run a Python program to its end; standard library only, standard input empty.

    Args:
        program: source text.
        limits: what it may use; `Limits()` by default.
        insist: run it with limits alone where this machine cannot isolate it.

    Returns:
        The outcome: "exited", "crashed", "timeout" or "flooded". An exit code says what the program
        wants to say; for a verdict use `check_function`.

    Raises:
        NotAvailableError: this machine cannot isolate it and `insist` is False, or there is no
            fork at all (Windows).
        RunFailedError: the sandbox does not work here at all.
    """
    return _run({"program": program, "function": None}, None, limits, insist)


def check_function(
    program: str,
    function: str,
    checks: str,
    setup: str = "",
    limits: Limits | None = None,
    insist: bool = False,
) -> Outcome:
    """Define a function by a program nobody has read, and check what it returns.

    The checks run in another process than the program. Arguments and results pass as plain data:
    numbers, texts, bytes, lists, tuples, dicts, sets; instances of their subclasses as what they
    are made of, other iterables as iterators. A result that is none of these fails.

    Args:
        program: source text that defines the function; imports of the standard library only.
        function: its name.
        checks: source text, trusted, that defines `check(candidate)`, which asserts. The name of
            the function stands for the candidate there too.
        setup: source text, trusted, run before the checks, such as the helpers they use.
        limits, insist: as for `run_program`.

    Returns:
        The outcome: "passed" only where `check` called the function and returned.

    Raises:
        NotAvailableError, RunFailedError: as for `run_program`.
    """
    told = {"function": function, "checks": checks, "setup": setup}
    return _run({"program": program, "function": function}, told, limits, insist)


def missing_isolation() -> str | None:
    """What keeps this machine from isolating a program, in words; None where nothing does."""
    if not sys.platform.startswith("linux"):
        return f"{sys.platform} has no Linux namespaces"
    return _refused(isolate=True)


@lru_cache(maxsize=2)
def _refused(isolate: bool) -> str | None:
    """What the kernel refuses of a sandbox. It is tried, once: a kernel may make a namespace and
    yet forbid its use."""
    found = _launch({"program": "", "function": None}, None, Limits(seconds=60), isolate)
    if isinstance(found, str):
        return found
    if found.exit_code != 0:
        raise RunFailedError(
            f"The sandbox does not work here: an empty program ended as {found.verdict!r} "
            f"({found.why}{'; ' if found.output else ''}{found.output.strip()[-300:]})."
        )
    return None


def _run(job: dict, checks: dict | None, limits: Limits | None, insist: bool) -> Outcome:
    if os.name != "posix":
        raise NotAvailableError(
            "Model-written code runs in a sandbox of processes that Windows cannot fork; use WSL "
            "or a Linux container."
        )
    missing = missing_isolation()
    if missing and not insist:
        raise NotAvailableError(
            "Model-written code would not be cut off from your files and network here "
            f"({missing}); use a Linux that lets you make user namespaces, or pass insist=True to "
            "run it all the same, with resource limits only."
        )
    found = _refused(isolate=False) if missing else None
    found = found or _launch(job, checks, limits or Limits(), isolate=not missing)
    if isinstance(found, str):
        raise NotAvailableError(
            f"The sandbox could not be set up ({found}) and nothing was run; free some memory and "
            "processes, or use another machine."
        )
    return found


def _launch(job: dict, checks: dict | None, limits: Limits, isolate: bool) -> Outcome | str:
    """The outcome, or what the kernel refused before anything ran."""
    folder = os.path.realpath(tempfile.mkdtemp(prefix="lora-kit-sandbox-"))
    told = {"isolate": isolate, "limits": asdict(limits), "folder": folder, "parent": os.getpid()}
    try:
        with tempfile.TemporaryFile() as stdin:
            # Two messages: the checks are read only when the program's process has left.
            for message in ({**job, **told}, checks):
                values.send(stdin.fileno(), message)
            stdin.seek(0)
            return _follow(stdin, folder, limits, isolate)
    finally:
        _remove(folder)


def _follow(stdin, folder: str, limits: Limits, isolate: bool) -> Outcome | str:
    output, verdict = os.pipe(), os.pipe()
    started = time.monotonic()
    deadline = started + limits.seconds + GRACE_SECONDS
    try:
        process = subprocess.Popen(
            [sys.executable, *_FLAGS, "-c", _START, str(Path(__file__).parent), str(verdict[1])],
            stdin=stdin,
            stdout=output[1],
            stderr=output[1],
            pass_fds=(verdict[1],),
            cwd=folder,
            env=_ENVIRONMENT,
            start_new_session=True,
        )
    except OSError as e:
        for handle in (*output, *verdict):
            os.close(handle)
        return f"starting Python: {e.strerror}"
    os.close(output[1])
    os.close(verdict[1])
    printed, told, why = bytearray(), bytearray(), ""
    try:
        with selectors.DefaultSelector() as ready:
            ready.register(output[0], selectors.EVENT_READ, printed)
            ready.register(verdict[0], selectors.EVENT_READ, told)
            # The verdict comes when nothing of the program is left; what it printed lies ready.
            open_ones = {output[0], verdict[0]}
            while open_ones:
                wait = deadline - time.monotonic() if verdict[0] in open_ones else 0
                events = ready.select(max(0.0, wait))
                if not events:
                    why = "" if verdict[0] not in open_ones else "timeout"
                    break
                for key, _ in events:
                    block = os.read(key.fd, 1 << 16)
                    key.data.extend(block)
                    if not block:
                        ready.unregister(key.fd)
                        open_ones.discard(key.fd)
                if len(printed) > limits.output:
                    why = "flooded"
                    break
    finally:
        _end(process)
        os.close(output[0])
        os.close(verdict[0])
    seconds = time.monotonic() - started
    text = bytes(printed[: limits.output]).decode("utf-8", "replace")
    if why == "flooded":
        reason = f"it printed more than {limits.output:,} bytes"
        return Outcome("flooded", reason, text, seconds, None, isolate)
    if why == "timeout":
        reason = f"no verdict after {limits.seconds:g} s"
        return Outcome("timeout", reason, text, seconds, None, isolate)
    return _read(bytes(told), text, seconds, isolate)


def _read(told: bytes, text: str, seconds: float, isolate: bool) -> Outcome | str:
    """The checker's message as an outcome. Without one the checker broke down: nothing passes."""
    if not told:
        last = text.strip().rpartition("\n")[2][-200:]
        why = f"the checker ended without a verdict{f' ({last})' if last else ''}"
        return Outcome("crashed", why, text, seconds, None, isolate)
    found = json.loads(told[4:])
    if "missing" in found:
        return found["missing"]
    return Outcome(
        found["verdict"], found["why"], text, found["seconds"], found.get("exit_code"), isolate
    )


def _end(process: subprocess.Popen) -> None:
    """End the checker and all below it, and wait until none of them is left."""
    import psutil

    below = []
    if process.poll() is None:
        with suppress(psutil.Error):
            below = psutil.Process(process.pid).children(recursive=True)
        # The checker knows best what is below it, orphans and hidden ones too: it is asked first.
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(ENDING_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for child in below:
            with suppress(psutil.Error):
                child.kill()
    process.wait()
    psutil.wait_procs(below, timeout=ENDING_SECONDS)  # a killed process takes a while to go


def _remove(folder: str) -> None:
    """Remove the throw-away folder, whatever a program has made of it."""
    with suppress(OSError):
        os.rmdir(folder)  # isolated, nothing was ever in it
    # rm, because Python's own way ends at folders nested too deep; some are closed to their owner.
    for command in (["rm", "-rf"], ["chmod", "-R", "u+rwX"], ["rm", "-rf"]):
        if os.path.lexists(folder):
            subprocess.run([*command, folder], capture_output=True, check=False)
