"""A process of `pool.LocalPool`: one call a line on stdin, one answer a line on stdout.

What a call prints goes to its log. The process ends, with its children, when stdin closes: so it
never outlives the one that started it, even one that was killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from queue import Queue


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    own = os.dup(2)
    os.dup2(own, 1)  # what libraries print is no answer
    lines: Queue[str] = Queue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    from lora_kit.studies.calls import call, obey_t4_rules

    obey_t4_rules()
    while True:
        job = json.loads(lines.get())
        _print_to(job["log"], own)
        begun = time.monotonic()  # here, so that no job is charged with this process's start
        said = call(job["function"], job["arguments"])
        said["seconds"] = time.monotonic() - begun
        _print_to(None, own)
        answers.write(json.dumps(said, allow_nan=False) + "\n")
        answers.flush()


def _listen(lines: Queue[str]) -> None:
    for line in sys.stdin:
        lines.put(line)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _print_to(log: str | None, own: int) -> None:
    """Send stdout and stderr, of libraries in C too, to a file; None: to this process's own log."""
    sys.stdout.flush()
    sys.stderr.flush()
    target = own
    if log:
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    if log:
        os.close(target)


if __name__ == "__main__":
    main()
