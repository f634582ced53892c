"""What the sandbox says of ordinary programs, and of functions held to checks."""

import os

import pytest
from sandbox_attacks import ANSWER, CHECKS

from lora_kit.evaluate.sandbox import Limits, check_function, run_program

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the sandbox needs fork")

SHORT = Limits(seconds=0.5)


def test_an_ordinary_program_runs_to_its_end(mode):
    found = run_program(
        "import sys, atexit, threading, dataclasses, decimal\n"
        "@dataclasses.dataclass\n"
        "class A:\n    x: int = 1\n"
        "atexit.register(print, 'at exit')\n"
        "threading.Thread(target=lambda: print('thread', A())).start()\n"
        "print('to stderr', file=sys.stderr)\n"
        "sys.exit(3)\n",
        insist=True,
    )
    assert (found.verdict, found.exit_code) == ("exited", 3)
    assert sorted(found.output.split("\n")) == ["", "at exit", "thread A(x=1)", "to stderr"]


@pytest.mark.parametrize(
    ("program", "verdict", "why"),
    [
        ("1 / 0", "exited", "exit code 1"),
        ("import os; os.kill(os.getpid(), 9)", "crashed", "SIGKILL"),
        ("import ctypes; ctypes.string_at(0)", "crashed", "SIGSEGV"),
        ("while True: pass", "timeout", "0.5 s"),
        ("while True: print('x' * 1000)", "flooded", "1,048,576 bytes"),
        ("def", "exited", "exit code 1"),
        ("\0", "exited", "exit code 1"),
    ],
)
def test_how_a_program_ended_is_told(program, verdict, why, mode):
    found = run_program(program, SHORT, insist=True)
    assert found.verdict == verdict
    assert why in found.why
    assert found.passed is False


def test_a_traceback_shows_the_program_and_nothing_else():
    found = run_program("def f():\n    return 1 / 0\nf()", insist=True)
    assert "return 1 / 0" in found.output
    assert "ZeroDivisionError" in found.output
    assert "jail" not in found.output


def test_a_right_function_passes(mode):
    found = check_function(
        "def add(a, b=0): return a + b",
        "add",
        "def check(candidate):\n"
        "    assert candidate(2, 3) == 5\n"
        "    assert add(2, b=twice(2)) == 6\n",
        setup="def twice(x): return 2 * x",
        insist=True,
    )
    assert (found.verdict, found.why) == ("passed", "all checks held, in 2 calls")


def test_a_failed_check_is_named_with_the_answer():
    found = check_function("def f(x): return x", "f", CHECKS, insist=True)
    assert found.why == f"assert candidate(20) == {ANSWER!r}: returned 20"
    found = check_function("def f(x): return x / 0", "f", CHECKS, insist=True)
    assert "raised ZeroDivisionError: division by zero" in found.why
    found = check_function("", "f", CHECKS, insist=True)
    assert "defines no f" in found.why


VALUES = (
    "None, True, 0, -1, 2**70, -(10**5000), 1.5, float('inf'), 1j, 'é\\ud800', b'\\x00', "
    "[1, [2]], (1, (2,)), {'a': 1, 2: (3,)}, {1, 2}, frozenset({1}), "
    "__import__('decimal').Decimal('1.50'), __import__('fractions').Fraction(-1, 3)"
)


def test_plain_values_pass_both_ways_unchanged():
    checks = (
        "def check(candidate):\n"
        f"    for v in ({VALUES}):\n"
        "        back = candidate(v)\n"
        "        assert back == v and type(back) is type(v), v\n"
        "    nan = candidate(float('nan'))\n"
        "    assert nan != nan\n"
    )
    found = check_function("def f(x): return x", "f", checks, insist=True)
    assert found.passed, found.why


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        ("__import__('collections').Counter('aab')", "{'a': 2, 'b': 1}"),
        ("__import__('collections').OrderedDict(a=1)", "{'a': 1}"),
        ("__import__('collections').namedtuple('P', 'x y')(1, 2)", "(1, 2)"),
        ("__import__('enum').IntEnum('E', 'A').A", "1"),
        ("bytearray(b'x')", "b'x'"),
    ],
)
def test_an_honest_subclass_counts_as_what_it_holds(made, wanted):
    checks = f"def check(candidate):\n    assert candidate() == {wanted}\n"
    assert check_function(f"def f(): return {made}", "f", checks, insist=True).passed


def test_an_iterator_can_be_read_but_equals_nothing():
    program = "def f(): return (n for n in (1, 2))"
    read = "def check(candidate):\n    assert tuple(candidate()) == (1, 2)\n"
    same = "def check(candidate):\n    assert candidate() == [1, 2]\n"
    assert check_function(program, "f", read, insist=True).passed
    assert not check_function(program, "f", same, insist=True).passed


def test_an_object_that_is_no_data_fails():
    found = check_function("def f(x): return object()", "f", CHECKS, insist=True)
    assert "cannot be handed to a check" in found.why


@pytest.mark.parametrize("kind", ["StopIteration", "StopAsyncIteration", "GeneratorExit"])
def test_an_error_cannot_end_a_loop_of_checks_early(kind):
    checks = "def check(candidate):\n    assert all(map(lambda v: candidate(v) == 1, [1, 2]))\n"
    found = check_function(f"def f(x): raise {kind}", "f", checks, insist=True)
    assert not found.passed


@pytest.mark.parametrize("kind", ["TypeError", "ValueError", "KeyError", "OSError"])
def test_an_error_of_pythons_own_keeps_its_type(kind):
    checks = (
        "def check(candidate):\n"
        f"    try: candidate(1)\n    except {kind}: pass\n    else: assert False\n"
    )
    assert check_function(f"def f(x): raise {kind}('no')", "f", checks, insist=True).passed
    assert not check_function("def f(x): raise EOFError", "f", checks, insist=True).passed


def test_a_program_is_compiled_as_it_stands():
    program = "def f():\n    def g(a: int): pass\n    return g.__annotations__['a'] is int"
    checks = "def check(candidate):\n    assert candidate() is True\n"
    assert check_function(program, "f", checks, insist=True).passed


def test_a_check_may_expect_an_error():
    checks = (
        "def check(candidate):\n"
        "    try: candidate('x')\n"
        "    except ValueError as e: assert 'invalid literal' in str(e)\n"
        "    else: assert False\n"
    )
    assert check_function("def f(x): return int(x)", "f", checks, insist=True).passed
    assert not check_function("def f(x): return 0", "f", checks, insist=True).passed


@pytest.mark.parametrize(
    "program", ["import os\ndef f(x): os._exit(0)", "def f(x):\n    while True: pass"]
)
def test_a_check_that_swallows_errors_passes_no_program_that_stopped(program):
    checks = "def check(candidate):\n    try: candidate(1)\n    except: pass\n"
    assert not check_function(program, "f", checks, limits=SHORT, insist=True).passed


def test_checks_that_call_nothing_pass_nothing():
    found = check_function("def f(x): return 1", "f", "def check(candidate): pass", insist=True)
    assert (found.verdict, found.why) == ("failed", "the checks called nothing")


def test_checks_that_never_end_are_ended():
    checks = "def check(candidate):\n    while candidate(1): pass\n"
    found = check_function("def f(x): return 1", "f", checks, limits=SHORT, insist=True)
    assert found.verdict == "timeout"


def test_the_same_program_gets_the_same_verdict():
    program = "import random\ndef f(): return list({'a', 'b', 'c', 'd', 'e', 'f'}), random.random()"
    checks = (
        "import random\n"
        "def check(candidate):\n    assert (candidate(), random.random()) == 'never'\n"
    )
    found = {check_function(program, "f", checks, insist=True).why for _ in range(3)}
    assert len(found) == 1
