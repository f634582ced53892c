"""Programs that mean harm. Each prints HARM where it got what it was after, and none is right.

A program knows what it would find on an open machine: `WITNESS` (a file of ours that holds
`SECRET`), `VICTIM` (a process of ours with `SECRET` in its environment), `TCP` and `UDP` (ports
that listen), `SOCKET` (a path that listens), `ABSTRACT` (a name that listens). It does not know
`ANSWER`, which the checks want.
"""

from dataclasses import dataclass

SECRET = "kept-in-a-file-of-ours"
ANSWER = "right-answer-42"
CHECKS = f"def check(candidate):\n    assert candidate(20) == {ANSWER!r}\n"


@dataclass(frozen=True)
class Attack:
    """`held_by`: what stops it where nothing is isolated ("limits" are always there).
    `outside`: run openly it does its harm, and a test shows that."""

    source: str
    held_by: str = "limits"
    outside: bool = False


def _try(code: str, found: str = "True") -> str:
    """Code that fails in silence, and whose success is HARM."""
    body = "\n".join(f"    {line}" for line in code.splitlines())
    return (
        f"import os\ntry:\n{body}\n    if {found}: print('HARM', flush=True)\n"
        "except OSError: pass\ndef f(x): return x\n"
    )


FUNCTION = "\ndef f(x): return x\n"

ATTACKS = {
    # The machine's time and memory.
    "fork bomb": Attack(
        "import os, resource\n"
        "limited = resource.getrlimit(resource.RLIMIT_NPROC)[1] < 100_000\n"
        "if not limited: print('HARM')\n"
        "while limited:\n"
        "    try: os.fork()\n"
        "    except OSError: pass"
    ),
    "thread bomb": Attack(
        "import threading, time\n"
        "for _ in range(5000): threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "print('HARM')"
    ),
    "memory at once": Attack("held = b'x' * (2 << 30)\nprint('HARM')"),
    "memory bit by bit": Attack(
        "held = []\nfor _ in range(2048): held.append(bytearray(1 << 20))\nprint('HARM')"
    ),
    "endless output": Attack("while True: print('passed ' * 1000)"),
    "endless errors": Attack("import os\nwhile True: os.write(2, b'passed ' * 1000)"),
    "spinning": Attack("while True: pass"),
    "spinning when called": Attack("def f(x):\n    while True: pass"),
    "sleeping": Attack("import time\ntime.sleep(1000)"),
    "waiting for input": Attack("def f(x): return input()"),
    "endless generator": Attack("import itertools\ndef f(x): return itertools.count()"),
    "deep recursion": Attack("import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return [f(x)]\n"),
    "deep source": Attack("x = " + "(" * 5000 + ")" * 5000),
    "crash": Attack("import ctypes\nctypes.string_at(0)"),
    "lifting its limits": Attack(
        "import resource\n"
        "for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NPROC):\n"
        "    try:\n"
        "        resource.setrlimit(kind, (resource.RLIM_INFINITY,) * 2)\n"
        "        print('HARM')\n"
        "    except (ValueError, OSError): pass\n" + FUNCTION
    ),
    "shared memory": Attack(
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "for size in (1 << 30, 64 << 20):\n"
        "    found = libc.shmget(0, ctypes.c_size_t(size), 0o1600)\n"
        "    if found >= 0:\n"
        "        print('HARM')\n"
        "        libc.shmctl(found, 0, None)\n" + FUNCTION,
        "namespaces",
    ),
    "memory of a file": Attack(
        "import os\nhandle = os.memfd_create('x')\n"
        "for _ in range(64): os.write(handle, bytes(1 << 20))\n"
        "print('HARM')"
    ),
    # The disk.
    "huge file": Attack(
        "with open('x', 'wb') as f:\n    for _ in range(64): f.write(bytes(1 << 20))\nprint('HARM')"
    ),
    "many files": Attack(
        "for i in range(64):\n"
        "    with open(str(i), 'wb') as f: f.write(bytes(1 << 20))\n"
        "print('HARM')",
        "namespaces",
    ),
    "deep folders": Attack(
        "import os\nfor _ in range(1100):\n    os.mkdir('d')\n    os.chdir('d')\n" + FUNCTION
    ),
    "closed folders": Attack(
        "import os\nos.makedirs('a/b')\nopen('a/b/c', 'w').close()\n"
        "os.chmod('a/b', 0)\nos.chmod('a', 0)\nos.chmod('.', 0)\n" + FUNCTION
    ),
    "writing a file outside": Attack(_try("open(WITNESS, 'a').write('changed')"), "files", True),
    "writing through a symlink": Attack(
        _try("os.symlink(WITNESS, 'link')\nopen('link', 'a').write('changed')"), "files", True
    ),
    "writing through a hard link": Attack(
        _try("os.link(WITNESS, 'link')\nopen('link', 'a').write('changed')"), "files"
    ),
    "deleting a file": Attack(_try("os.remove(WITNESS)"), "files", True),
    "deleting a folder": Attack(
        "import os, shutil\n"
        "shutil.rmtree(os.path.dirname(WITNESS), ignore_errors=True)\n" + FUNCTION,
        "files",
    ),
    "renaming": Attack(_try("os.rename(WITNESS, WITNESS + '2')"), "files", True),
    "opening a file to all": Attack(_try("os.chmod(WITNESS, 0o777)"), "modes", True),
    "opening the library to patch it": Attack(_try("open(os.__file__, 'r+')"), "files"),
    "climbing out": Attack(
        "import os\n"
        "try: os.mkdir('s'), os.chroot('s')\n"
        "except OSError: pass\n"
        "for _ in range(30): os.chdir('..')\n"
        "try:\n"
        "    if SECRET in open(WITNESS[1:]).read(): print('HARM')\n"
        "except OSError: pass\n" + FUNCTION,
        "files",
        True,
    ),
    # What the parent knows.
    "reading a file": Attack(
        _try("found = open(WITNESS).read()", "SECRET in found"), "files", True
    ),
    "reading its environment": Attack(
        "import os\nprint('HARM' if any(v for k, v in os.environ.items()) else '')" + FUNCTION
    ),
    "reading a process's environment": Attack(
        _try("found = open(f'/proc/{VICTIM}/environ').read()", "SECRET in found"), "files", True
    ),
    "reading the parent's environment": Attack(
        _try("found = open(f'/proc/{os.getppid()}/environ').read()", "len(found) > 100"), "files"
    ),
    "reading the parent's memory": Attack(
        _try("found = open(f'/proc/{os.getppid()}/mem', 'rb').fileno()")
    ),
    "reading the parent's handles": Attack(_try("found = os.listdir(f'/proc/{os.getppid()}/fd')")),
    "tracing the parent": Attack(
        "import ctypes, os\nlibc = ctypes.CDLL(None)\n"
        "if libc.ptrace(16, os.getppid(), 0, 0) == 0: print('HARM')\n" + FUNCTION,
    ),
    "tracing a process": Attack(
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "if libc.ptrace(0x4206, VICTIM, 0, 0) == 0:\n"
        "    print('HARM', flush=True)\n    libc.ptrace(17, VICTIM, 0, 0)\n" + FUNCTION,
        "files",
        True,
    ),
    # Other processes.
    "killing the parent": Attack(
        "import os\nos.kill(os.getppid(), 9)\nimport time; time.sleep(0.2)" + FUNCTION, "signals"
    ),
    "killing its group": Attack("import os\nos.killpg(0, 9)"),
    "killing everybody": Attack(
        "import os\n"
        "alone = os.getpid() == 2 or os.getuid() >= 0x70000000\n"  # or it would be everybody
        "os.kill(-1, 9) if alone else print('HARM')\n" + FUNCTION,
        "alone",
    ),
    "killing a process": Attack(_try("os.kill(VICTIM, 0)"), "signals", True),
    "stopping the parent": Attack("import os\nos.kill(os.getppid(), 19)" + FUNCTION, "signals"),
    "ignoring signals": Attack(
        "import signal\n"
        "for s in range(1, 65):\n"
        "    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\n"
        "while True: pass"
    ),
    "grandchild": Attack("import os, time\nif os.fork() == 0: time.sleep(600)\n" + FUNCTION),
    "grandchild in a session of its own": Attack(
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(600)\n" + FUNCTION
    ),
    "daemon": Attack(
        "import os, time, signal\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork(): os._exit(0)\n"
        "    signal.signal(15, signal.SIG_IGN)\n"
        "    os.closerange(0, 100)\n"
        "    time.sleep(600)\n" + FUNCTION
    ),
    "daemon of an ended program": Attack(
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(600)\nos._exit(0)"
    ),
    "relay of processes": Attack(
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    os.closerange(0, 100)\n"
        "    while True:\n"
        "        if os.fork(): os._exit(0)\n" + FUNCTION
    ),
    "thread that outlives": Attack(
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(600,), daemon=False).start()\n" + FUNCTION
    ),
    "another interpreter": Attack(
        "import os, sys\nos.execv(sys.executable or '/usr/bin/python3', ['python', '-c', ''])"
    ),
    # The network.
    "tcp": Attack(
        _try("import socket\nsocket.create_connection(('127.0.0.1', TCP), 2)"), "tcp", True
    ),
    "udp": Attack(
        _try(
            "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
            "s.sendto(b'x', ('127.0.0.1', UDP))"
        ),
        "namespaces",
        True,
    ),
    "unix socket": Attack(
        _try("import socket\nsocket.socket(socket.AF_UNIX).connect(SOCKET)"), "sockets", True
    ),
    "abstract unix socket": Attack(
        _try("import socket\nsocket.socket(socket.AF_UNIX).connect('\\0' + ABSTRACT)"),
        "abstract",
        True,
    ),
    "interfaces": Attack(
        "import socket\nif [n for _, n in socket.if_nameindex() if n != 'lo']: print('HARM')\n"
        + FUNCTION,
        "namespaces",
    ),
    # More rights.
    "taking every right": Attack(
        "import ctypes, os, struct\n"
        "try: os.setuid(0)\n"
        "except OSError: pass\n"
        "header, sets = struct.pack('Ii', 0x20080522, 0), struct.pack('6I', 1, 1, *[0] * 4)\n"
        "if ctypes.CDLL(None).capset(header, sets) == 0: print('HARM')\n" + FUNCTION
    ),
    "a namespace of its own": Attack(
        "import ctypes\nif ctypes.CDLL(None).unshare(0x10000000) == 0: print('HARM')" + FUNCTION,
        "namespaces",
    ),
    "mounting": Attack(
        "import ctypes, os\nlibc = ctypes.CDLL(None)\nos.mkdir('m')\n"
        "if libc.mount(b'proc', b'm', b'proc', 0, None) == 0: print('HARM')\n"
        "if libc.mount(b'/', b'm', None, 4096, None) == 0: print('HARM')\n" + FUNCTION
    ),
    # The verdict.
    "leaving with 0": Attack("import sys\nsys.exit(0)"),
    "leaving at once with 0": Attack("import os\nos._exit(0)"),
    "leaving when called": Attack("import os\ndef f(x): os._exit(0)"),
    "SystemExit when called": Attack("def f(x): raise SystemExit(0)"),
    "leaving at exit": Attack(
        "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): raise SystemExit(0)"
    ),
    "KeyboardInterrupt": Attack("def f(x): raise KeyboardInterrupt"),
    "printing a pass": Attack(
        'print(\'passed\')\nprint(\'{"verdict": "passed", "why": "", "seconds": 0}\')\n' + FUNCTION
    ),
    "writing a pass to every handle": Attack(
        "import json, os, struct\n"
        "data = json.dumps({'verdict': 'passed', 'why': '', 'seconds': 0.0}).encode()\n"
        "for handle in range(256):\n"
        "    try: os.write(handle, struct.pack('<I', len(data)) + data)\n"
        "    except OSError: pass\n" + FUNCTION
    ),
    "reading every handle": Attack(
        "import os, select\n"
        "for handle in range(256):\n"
        "    try:\n"
        "        if select.select([handle], [], [], 0)[0]:\n"
        "            if b'right-' b'answer' in os.read(handle, 10**6): print('HARM')\n"
        "    except (OSError, ValueError): pass\n" + FUNCTION
    ),
    "patching the checker": Attack(
        "import sys\n"
        "for name, module in list(sys.modules.items()):\n"
        "    if name.startswith('jail'):\n"
        "        for key, value in list(vars(module).items()):\n"
        "            if callable(value): setattr(module, key, lambda *a, **k: True)\n" + FUNCTION
    ),
    "patching builtins": Attack(
        "import builtins\n"
        "builtins.AssertionError = type('Quiet', (BaseException,), {})\n"
        "builtins.isinstance = lambda *a: True\n"
        "builtins.compile = builtins.exec = lambda *a, **k: None\n" + FUNCTION
    ),
    "searching the heap": Attack(
        "import gc\n"
        "def f(x):\n"
        "    for d in gc.get_objects():\n"
        "        if isinstance(d, dict):\n"
        "            for v in list(d.values()):\n"
        "                if isinstance(v, str) and v.startswith('right-' + 'answer'): return v\n"
        "                if isinstance(v, str) and 'def che' + 'ck(' in v: print('HARM')\n"
    ),
    "searching the frames": Attack(
        "import sys\n"
        "def f(x):\n"
        "    frame = sys._getframe()\n"
        "    while frame:\n"
        "        for v in list(frame.f_locals.values()) + list(frame.f_globals.values()):\n"
        "            if 'right-' + 'answer' in str(v)[:100000]: print('HARM')\n"
        "        frame = frame.f_back\n"
    ),
    "searching its memory": Attack(
        "import ctypes\n"
        "try: lines = open('/proc/self/maps').read().splitlines()\n"
        "except OSError: lines = []\n"
        "import re\nwanted = re.compile(rb'assert can[d]idate.20. == .righ[t]')\n"
        "for line in lines:\n"
        "    if '[heap]' in line or ' rw-p ' in line:\n"
        "        low, high = (int(n, 16) for n in line.split()[0].split('-'))\n"
        "        data = ctypes.string_at(low, high - low)\n"
        "        if wanted.search(data): print('HARM')\n" + FUNCTION
    ),
    "equal to everything": Attack(
        "class Yes:\n"
        "    def __eq__(self, other): return True\n"
        "    def __ne__(self, other): return False\n"
        "    def __hash__(self): return 0\n"
        "    def __bool__(self): return True\n"
        "def f(x): return Yes()"
    ),
    "text equal to everything": Attack(
        "class Yes(str):\n"
        "    def __eq__(self, other): return True\n"
        "    def __str__(self): return self\n"
        "    def __hash__(self): return 0\n"
        "def f(x): return Yes('no')"
    ),
    "equal to everything in a list": Attack(
        "class Yes(list):\n"
        "    def __eq__(self, other): return True\n"
        "    def __iter__(self): yield self\n"
        "def f(x): return Yes()"
    ),
    "lying about its class": Attack(
        "class Yes:\n"
        "    __class__ = str\n"
        "    def __eq__(self, other): return True\n"
        "    def __str__(self): return self\n"
        "def f(x): return Yes()"
    ),
    "raising AssertionError": Attack("def f(x): raise AssertionError('passed')"),
    "raising StopIteration": Attack("def f(x): raise StopIteration('passed')"),
    "raising what cannot be printed": Attack(
        "class E(Exception):\n    def __str__(self): raise SystemExit(0)\ndef f(x): raise E"
    ),
    "an answer of another shape": Attack(
        "import os, struct\n"
        "def f(x):\n"
        '    data = b\'{"verdict": "passed", "value": {"type": "passed"}}\'\n'
        "    for handle in range(3, 64):\n"
        "        try: os.write(handle, struct.pack('<I', len(data)) + data)\n"
        "        except OSError: pass\n"
        "    return x"
    ),
    "answers before the question": Attack(
        "import json, os, struct\n"
        "for n in range(200):\n"
        "    data = json.dumps({'value': f'right-answer-{n % 40}'}).encode()\n"
        "    for handle in range(3, 64):\n"
        "        try: os.write(handle, struct.pack('<I', len(data)) + data)\n"
        "        except OSError: pass\n" + FUNCTION
    ),
    "endless answer": Attack(
        "import os, struct\n"
        "def f(x):\n"
        "    for handle in range(3, 64):\n"
        "        try: os.write(handle, struct.pack('<I', 2**32 - 1) + b'x' * 1000)\n"
        "        except OSError: pass\n"
        "    return x"
    ),
    "very nested answer": Attack(
        "import os, struct\n"
        "def f(x):\n"
        "    data = b'{\"value\":' + b'[' * 200_000\n"
        "    for handle in range(3, 64):\n"
        "        try: os.write(handle, struct.pack('<I', len(data)) + data)\n"
        "        except OSError: pass\n"
        "    return x"
    ),
    "huge answer": Attack("def f(x): return 'x' * 10**8"),
    "huge number": Attack("def f(x): return 1 << 10**7"),
    "closing its pipes": Attack(
        "import os, time\nos.closerange(0, 64)\ntime.sleep(600)" + FUNCTION
    ),
}
