"""The program's own process: runs what nobody has read, and answers calls of its function.

Nothing here is trusted once the first line of the program has run, and nothing has to be.
"""

from __future__ import annotations

import linecache
import sys
import traceback
import types
from contextlib import suppress

from . import values


def run(source: str) -> int:
    """The exit code of a program that is only run."""
    try:
        exec(remembered(source, "<program>"), _module().__dict__)
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException as e:
        _print_traceback(e)
        return 1
    return 0


def serve(job: dict, calls: int, answers: int) -> int:
    """Define the program, then answer calls of its function until there are no more."""
    space, send, receive = _module().__dict__, values.send, values.receive
    function = error = None
    try:
        exec(remembered(job["program"], "<program>"), space)
        function = space.get(job["function"])
        if function is None:
            error = {"raised": "NameError", "text": f"it defines no {job['function']}"}
    except BaseException as e:
        _print_traceback(e)
        error = _told(e)
    while True:
        try:
            arguments, named = receive(calls, None)
        except EOFError:
            return 0
        if error is None:
            try:
                value = function(
                    *(values.unpack(a) for a in arguments),
                    **{k: values.unpack(v) for k, v in named.items()},
                )
                answer = {"value": values.pack(value)}
            except BaseException as e:
                answer = _told(e)
            send(answers, answer)
        else:
            send(answers, error | {"fatal": True})


def _module() -> types.ModuleType:
    """A module of the program's own: dataclasses and pickle look a class's module up."""
    made = types.ModuleType("program")
    sys.modules["program"] = made
    return made


def _told(error: BaseException) -> dict:
    try:
        text = str(error)[:1000]
    except BaseException:
        text = ""
    # Not `type(error).__name__`, which a metaclass may make anything.
    name = type.__getattribute__(type(error), "__name__")
    return {"raised": str(name), "text": text, "fatal": not isinstance(error, Exception)}


def _print_traceback(error: BaseException) -> None:
    with suppress(BaseException):
        error.__traceback__ = error.__traceback__.tb_next
        traceback.print_exception(error)


def remembered(source: str, name: str):
    """Compiled, without this file's own `__future__`, and its lines kept for tracebacks."""
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    return compile(source, name, "exec", dont_inherit=True)
