"""The sandbox against programs that mean harm: nothing outside changes, and none passes."""

import os
import socket
import subprocess
import sys
import time
import uuid

import psutil
import pytest
from sandbox_attacks import ATTACKS, CHECKS, SECRET

from lora_kit.errors import BadInputError, NotAvailableError, RunFailedError
from lora_kit.evaluate import sandbox
from lora_kit.evaluate.jail import confinement
from lora_kit.evaluate.sandbox import Limits, check_function, run_program

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the sandbox needs fork")

SHORT = Limits(seconds=0.5)
MISSING = sandbox.missing_isolation() if os.name == "posix" else "Windows"
SPARE = os.name == "posix" and os.geteuid() == 0 and bool(confinement.spare_user())
LANDLOCK = confinement.landlock_version()
# What holds an attack where nothing is isolated, and whether this machine has it.
HOLDS = {
    "limits": (True, ""),
    "files": (SPARE or LANDLOCK >= 1, "neither root nor Landlock"),
    "modes": (SPARE, "not root: the files are the program's own user's"),
    "sockets": (SPARE, "not root: the socket is the program's own user's"),
    "signals": (SPARE or LANDLOCK >= 6, "neither root nor Landlock 6"),
    "abstract": (LANDLOCK >= 6, "no Landlock 6"),
    "tcp": (LANDLOCK >= 4, "no Landlock 4"),
    "alone": (SPARE, "not root: everybody would be this user's processes"),
    "namespaces": (False, "only namespaces hold this"),
}


@pytest.fixture(scope="module")
def victim():
    """A process of ours with a secret in its environment."""
    process = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], env={"SECRET": SECRET}
    )
    yield process
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def listeners(tmp_path_factory):
    """Sockets that wait for a caller: TCP, UDP, a path and an abstract name."""
    tcp = socket.create_server(("127.0.0.1", 0))
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    path = str(tmp_path_factory.mktemp("s") / "s")
    unix, abstract = (socket.socket(socket.AF_UNIX) for _ in range(2))
    unix.bind(path)
    name = f"lora-kit-{uuid.uuid4().hex}"
    if sys.platform.startswith("linux"):
        abstract.bind("\0" + name)
    else:
        abstract.bind(path + "2")
    found = {"tcp": tcp, "udp": udp, "unix": unix, "abstract": abstract}
    for kind, listening in found.items():
        listening.setblocking(False)
        if kind in ("unix", "abstract"):
            listening.listen()
    yield (
        found,
        {
            "TCP": tcp.getsockname()[1],
            "UDP": udp.getsockname()[1],
            "SOCKET": path,
            "ABSTRACT": name,
        },
    )
    for listening in found.values():
        listening.close()


@pytest.fixture
def witness(tmp_path):
    """A file of ours."""
    path = tmp_path / "ours" / "witness"
    path.parent.mkdir()
    path.write_text(SECRET)
    path.chmod(0o600)
    return path


@pytest.fixture
def marked(monkeypatch):
    """A mark on every process of the sandbox; gives the ids of those that are left."""
    mark = f"mark={uuid.uuid4().hex}"
    monkeypatch.setattr(sandbox, "_FLAGS", (*sandbox._FLAGS, "-X", mark))

    def left():
        return [
            p.pid for p in psutil.process_iter(["cmdline"]) if mark in (p.info["cmdline"] or ())
        ]

    return left


def called(listening):
    """Whether anybody has called a socket that waits."""
    try:
        listening.recv(10) if listening.type == socket.SOCK_DGRAM else listening.accept()[0].close()
        return True
    except BlockingIOError:
        return False


def armed(attack, witness, victim, listeners):
    known = {"WITNESS": str(witness), "SECRET": SECRET, "VICTIM": victim.pid, **listeners[1]}
    lines = [f"{name} = {value!r}" for name, value in known.items()]
    return "; ".join(lines) + "\n" + attack.source


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_harms_nobody_and_does_not_pass(
    name, mode, witness, victim, listeners, marked, tmp_path_factory
):
    attack = ATTACKS[name]
    held, why = HOLDS[attack.held_by]
    if mode == "limits" and not held:
        pytest.skip(f"limits alone do not hold this: {why}")
    folders = tmp_path_factory.getbasetemp().parent  # of this user's pytest runs
    before = witness.stat()
    memory, started = psutil.Process().memory_info().rss, time.monotonic()

    found = check_function(
        armed(attack, witness, victim, listeners), "f", CHECKS, limits=SHORT, insist=True
    )

    assert found.isolated == (mode == "isolated")
    assert not found.passed, found
    assert "HARM" not in found.output.splitlines(), found.output
    assert len(found.output) <= SHORT.output
    assert SECRET not in found.output
    assert found.seconds < SHORT.seconds + 1 or found.verdict == "timeout"
    assert time.monotonic() - started < SHORT.seconds + 15
    assert marked() == []
    after = witness.stat()
    assert witness.read_text() == SECRET
    assert (before.st_mode, before.st_mtime_ns, before.st_nlink) == (
        after.st_mode,
        after.st_mtime_ns,
        after.st_nlink,
    )
    assert folders.is_dir()
    assert victim.poll() is None
    assert psutil.Process(victim.pid).status() != psutil.STATUS_STOPPED
    assert not any(called(listening) for listening in listeners[0].values())
    assert psutil.Process().memory_info().rss < memory + 200 * 2**20


@pytest.mark.parametrize("name", [n for n, a in ATTACKS.items() if a.outside])
def test_the_same_attack_does_its_harm_without_a_sandbox(name, witness, victim, listeners):
    if not sys.platform.startswith("linux") and ATTACKS[name].held_by == "abstract":
        pytest.skip("abstract sockets are Linux's")
    run = subprocess.run(
        [sys.executable, "-I", "-c", armed(ATTACKS[name], witness, victim, listeners)],
        capture_output=True,
        text=True,
        cwd=witness.parent,
        check=False,
    )
    for listening in listeners[0].values():
        while called(listening):
            pass
    if name == "tracing a process" and "HARM" not in run.stdout:
        pytest.skip("this machine lets nobody trace a process")
    assert "HARM" in run.stdout, run.stderr


def test_no_folder_is_left_behind(mode, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    tmp_path.chmod(0o755)
    for name in ("deep folders", "closed folders", "huge file", "daemon"):
        found = check_function(ATTACKS[name].source, "f", CHECKS, insist=True)
        assert found.verdict == "failed"  # it ran to its end
    assert list(tmp_path.iterdir()) == []


def test_shared_memory_is_removed_with_its_user(mode):
    if mode == "limits" and not SPARE:
        pytest.skip("not root: the segments are this user's own")
    if not os.path.exists("/proc/sysvipc/shm"):
        pytest.skip("no System V shared memory here")
    found = run_program(
        "import ctypes, os\nlibc = ctypes.CDLL(None)\n"
        "print(libc.shmget(0, 4096, 0o1600) >= 0, libc.msgget(0, 0o1600) >= 0,"
        " libc.semget(0, 1, 0o1600) >= 0)",
        insist=True,
    )
    assert found.output == "True True True\n"
    for kind in ("shm", "msg", "sem"):
        with open(f"/proc/sysvipc/{kind}") as f:
            users = [row.split()[{"shm": 7, "msg": 7, "sem": 4}[kind]] for row in f]
        assert not [user for user in users[1:] if int(user) >= confinement.SPARE]


def test_the_limits_are_in_force(mode):
    limits = Limits(seconds=3, memory=300 * 2**20, disk=2**20, processes=8, files=32)
    found = run_program(
        "import resource as r\n"
        "names = 'CPU AS FSIZE NPROC NOFILE CORE'.split()\n"
        "print(*(r.getrlimit(getattr(r, 'RLIMIT_' + n))[1] for n in names))",
        limits,
        insist=True,
    )
    cpu, memory, file, processes, files, core = (int(n) for n in found.output.split())
    assert (cpu, memory, file, files, core) == (4, 300 * 2**20, 2**20, 32, 0)
    assert 8 <= processes < 100_000


def test_fork_is_refused_at_the_limit(mode):
    if mode == "limits" and not SPARE:
        pytest.skip("the limit counts all processes of this user, which come and go")
    found = run_program(
        "import os, time\n"
        "made = 0\n"
        "try:\n"
        "    while made < 500:\n"
        "        if os.fork() == 0: time.sleep(60)\n"
        "        made += 1\n"
        "except OSError: pass\n"
        "print(made)",
        Limits(processes=8),
        insist=True,
    )
    assert 4 <= int(found.output) <= 11


def test_inside_there_is_only_the_library():
    if MISSING:
        pytest.skip(f"this machine cannot isolate a program: {MISSING}")
    found = run_program(
        "import os\n"
        "print(os.getuid(), os.getpid(), len(os.environ), os.getcwd(), os.listdir('/tmp'))\n"
        "for path in ('/proc', '/sys', '/home', '/etc/passwd', '/bin/sh'):\n"
        "    print(os.path.exists(path))\n"
        "for path in ('/', os.path.dirname(os.__file__), '/dev'):\n"
        "    try: open(os.path.join(path, 'x'), 'w')\n"
        "    except OSError as e: print(e.errno)\n"
        "open('/tmp/x', 'w').write('mine')\n"
    )
    lines = found.output.split("\n")
    assert lines[0] == f"{1000 if SPARE else 0} 2 0 /tmp []"
    assert lines[1:6] == ["False"] * 5
    read_only, not_permitted = "30", "13"
    assert set(lines[6:9]) <= {read_only, not_permitted}
    assert found.verdict == "exited"


def test_refused_where_nothing_can_be_isolated(monkeypatch):
    monkeypatch.setattr(sandbox, "missing_isolation", lambda: "unshare: Operation not permitted")
    with pytest.raises(NotAvailableError, match=r"unshare: Operation not permitted.*insist=True"):
        run_program("print(1)")
    assert run_program("print(1)", insist=True).output == "1\n"


def test_the_kernel_is_asked_what_it_refuses(monkeypatch):
    # As in a container whose filter forbids unshare, or a kernel whose namespaces come without
    # rights: the system call in the child is what fails.
    sandbox._refused.cache_clear()
    start = sandbox._START.replace(
        "checker.main",
        "checker.confinement.enter_namespaces = lambda: "
        "checker.confinement.os.stat('/nothing/unshare'); checker.main",
    )
    monkeypatch.setattr(sandbox, "_START", start)
    try:
        with pytest.raises(NotAvailableError, match="/nothing/unshare: No such file"):
            run_program("print(1)")
    finally:
        sandbox._refused.cache_clear()


def test_windows_is_refused_even_when_one_insists(monkeypatch):
    monkeypatch.setattr(sandbox.os, "name", "nt")
    with pytest.raises(NotAvailableError, match="WSL"):
        run_program("print(1)", insist=True)


def test_a_sandbox_that_does_not_work_is_reported(monkeypatch):
    sandbox._refused.cache_clear()
    monkeypatch.setattr(sandbox, "_START", "raise RuntimeError('no such thing')")
    try:
        with pytest.raises(RunFailedError, match="no such thing"):
            run_program("print(1)", insist=True)
    finally:
        sandbox._refused.cache_clear()


def test_all_of_it_ends_with_the_caller(tmp_path, mode):
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux ends a child with its parent")
    mark = f"mark={uuid.uuid4().hex}"
    caller = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from lora_kit.evaluate import sandbox as s\n"
            f"s._FLAGS += ('-X', {mark!r})\n"
            f"if {mode == 'limits'}: s.missing_isolation = lambda: 'a test'\n"
            "s._refused(s.missing_isolation() is None)\n"
            "print('ready', flush=True)\n"
            "s.run_program('import time; time.sleep(60)', s.Limits(seconds=60), insist=True)\n",
        ],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )

    def left():
        return [p for p in psutil.process_iter(["cmdline"]) if mark in (p.info["cmdline"] or ())]

    def waits(for_what):
        until = time.monotonic() + 20
        while not for_what() and time.monotonic() < until:
            time.sleep(0.05)
        return for_what()

    assert caller.stdout.readline() == "ready\n"
    assert waits(lambda: len(left()) >= (3 if mode == "isolated" else 2))
    caller.kill()
    caller.wait()
    caller.stdout.close()
    assert waits(lambda: not left())


@pytest.mark.parametrize(
    "wrong", [{"seconds": 0}, {"seconds": float("nan")}, {"memory": 1.5}, {"processes": True}]
)
def test_limits_that_are_none_are_refused(wrong):
    with pytest.raises(BadInputError, match=next(iter(wrong))):
        Limits(**wrong)
