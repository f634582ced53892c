"""What the kernel is asked for: namespaces, an empty root, a spare user, Landlock, limits.

Every step raises OSError where the kernel refuses it, so that a caller can say which step failed.
The constants are Linux's, the same on every architecture (linux/sched.h, mount.h, prctl.h,
capability.h, landlock.h).
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import struct
import sys
from contextlib import suppress

LINUX = sys.platform.startswith("linux")
LIBC = ctypes.CDLL(None, use_errno=True) if LINUX else None

NEW_MOUNTS, NEW_NAMES, NEW_IPC = 0x00020000, 0x04000000, 0x08000000
NEW_USERS, NEW_PIDS, NEW_NET = 0x10000000, 0x20000000, 0x40000000
READ_ONLY, NO_SUID, NO_DEVICES, NO_EXEC, REMOUNT = 1, 2, 4, 8, 32
NO_ATIME, NO_DIR_ATIME, BIND, RECURSIVE, PRIVATE = 1024, 2048, 4096, 16384, 1 << 18
RELATIVE_ATIME = 1 << 21
DETACH = 2
DIE_WITH_PARENT, DUMPABLE, KEEP_CAPABILITIES, SUBREAPER, NO_NEW_PRIVILEGES = 1, 4, 8, 36, 38
SECURE_BITS, ROOT_IS_NOBODY = 28, 0b1111  # executing as user 0 brings no capabilities, for good
KEYCTL = {"x86_64": 250, "aarch64": 219}  # system calls have other numbers elsewhere
CAP_DAC_READ_SEARCH = 2
INSIDE = 1000  # the user and group a program has in its own namespace when root starts it
NOBODY = 65534
SPARE = 0x70000000  # users from here to 2^31 belong to nobody by convention (systemd, UIDS-GIDS)
DEVICES = ("null", "zero", "urandom", "random")


def system(name: str, *arguments) -> int:
    """Call the C library's function; OSError, naming it, where it returns -1."""
    found = getattr(LIBC, name)(*arguments)
    if found == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)
    return found


def process_control(option: int, value: int) -> None:
    """prctl(2), where there is one."""
    if LINUX:
        system("prctl", option, *(ctypes.c_ulong(v) for v in (value, 0, 0, 0)))


def library_folders() -> list[str]:
    """What a Python program reads before its own files: standard library, shared libraries."""
    wanted = [
        *sys.path,
        *(os.path.join(sys.base_prefix, name) for name in ("lib", "lib64")),
        *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/nix/store", "/etc/ld.so.cache"),
    ]
    found: list[str] = []
    for path in sorted({os.path.abspath(p) for p in wanted if p}, key=len):
        if os.path.exists(path) and not any(path.startswith(f + "/") for f in found):
            found.append(path)
    return found


def spare_user() -> int:
    """A user id that no other process has, so that limits and kill(-1) reach this sandbox alone.

    NOBODY's where the caller's namespace has no such id; 0 where it has no second id at all.
    """
    with open("/proc/self/uid_map") as f:
        ranges = [[int(n) for n in line.split()] for line in f]
    for wanted in (SPARE + os.getpid(), NOBODY):
        if any(a <= wanted < a + n for a, _, n in ranges):
            return wanted
    return 0


def enter_namespaces() -> int:
    """Own users, mounts, network, IPC, host name; the next child is process 1 of its own tree.

    User namespaces can be made by anybody (user_namespaces(7)). Whoever is not root can give only
    itself a name there; from root the program gets the user INSIDE, outside one who owns nothing.
    That map can be written only from outside, hence the child that waits.

    Returns:
        The user the program is to have inside.
    """
    user, group = os.geteuid(), os.getegid()
    spare = spare_user() if user == 0 else 0
    flags = NEW_USERS | NEW_MOUNTS | NEW_PIDS | NEW_NET | NEW_IPC | NEW_NAMES
    if not spare:
        _unshare(flags)
        write("/proc/self/setgroups", "deny")
        write("/proc/self/uid_map", f"0 {user} 1")
        write("/proc/self/gid_map", f"0 {group} 1")
    else:
        ready = os.pipe()
        writer = os.fork()
        if writer == 0:
            os.close(ready[1])
            code = 1
            with suppress(OSError):
                if os.read(ready[0], 1):
                    for kind in ("uid_map", "gid_map"):
                        write(f"/proc/{os.getppid()}/{kind}", f"0 0 1\n{INSIDE} {spare} 1\n")
                    code = 0
            os._exit(code)
        os.close(ready[0])
        try:
            _unshare(flags)
            os.write(ready[1], b"x")
        finally:
            os.close(ready[1])
            failed = os.waitpid(writer, 0)[1]
        if failed:
            raise OSError(1, "Operation not permitted", "uid_map")
    # Namespaces within this one would lift its limits: none may be made. Shared memory segments
    # are no part of a process's memory limit: 16 MiB in all. Older kernels keep these from us.
    for name, value in (("user/max_user_namespaces", "0"), ("kernel/shmall", "4096")):
        with suppress(OSError):
            write(f"/proc/sys/{name}", value)
    return INSIDE if spare else 0


def empty_root(folder: str, space: int) -> None:
    """Make a root that holds the libraries, read-only, four devices and an empty /tmp, no more.

    There is no /proc, no /sys, no home. /tmp is memory, of at most `space` bytes, and goes with
    the last process.

    Args:
        folder: an empty folder to mount it on.
        space: bytes.
    """
    mount(None, "/", None, RECURSIVE | PRIVATE)
    mount("tmpfs", folder, "tmpfs", NO_SUID | NO_DEVICES, "mode=0755,size=1m")
    os.mkdir(f"{folder}/tmp")
    mount("tmpfs", f"{folder}/tmp", "tmpfs", NO_SUID | NO_DEVICES, f"mode=1777,size={space}")
    for path in library_folders():
        _bind(path, folder + path)
    for device in DEVICES:
        _bind(f"/dev/{device}", f"{folder}/dev/{device}")
    for at, options in reversed(_mounts(folder)):
        if at != f"{folder}/tmp" and not at.startswith(f"{folder}/dev/"):
            mount(None, at, None, REMOUNT | BIND | READ_ONLY | NO_SUID | options)
    os.chdir(folder)
    system("pivot_root", b".", b".")  # the old root now lies over the new one: pivot_root(2), NOTES
    system("umount2", b".", DETACH)
    os.chdir("/")


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    """mount(2)."""
    words = [None if w is None else os.fsencode(w) for w in (source, target, kind)]
    system("mount", *words, ctypes.c_ulong(flags), data.encode() or None)


def become(user: int) -> None:
    """Become a user who owns nothing, for good; from root only.

    Python's library may lie where only root looks (its own home). Then the right to read what
    others may not is kept, and Landlock, which must have been found, bounds what it reaches.
    """
    closed = [path for path in library_folders() if not _open_to_all(path)]
    if closed and not landlock_version():
        raise OSError(13, "Permission denied", f"users other than root reading {closed[0]}")
    keep = 1 << CAP_DAC_READ_SEARCH if closed else 0
    if keep:
        process_control(KEEP_CAPABILITIES, 1)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    drop_capabilities(keep)


def forget_privileges(inside: int) -> None:
    """Become the user `inside` of the namespace, without capabilities."""
    process_control(SECURE_BITS, ROOT_IS_NOBODY)
    if inside:
        os.setgroups([])
        os.setresgid(inside, inside, inside)
        os.setresuid(inside, inside, inside)
    drop_capabilities()


def drop_capabilities(keep: int = 0) -> None:
    """Keep only the capabilities in the mask `keep`, and gain none by executing a program."""
    header, sets = struct.pack("Ii", 0x20080522, 0), struct.pack("6I", keep, keep, 0, 0, 0, 0)
    system("capset", header, sets)  # version 3: effective, permitted, inheritable; low, then high
    process_control(NO_NEW_PRIVILEGES, 1)


def leave_keyring() -> None:
    """Exchange the caller's session keyring, which may hold tickets, for an empty one."""
    number = KEYCTL.get(os.uname().machine)
    if LINUX and number:
        LIBC.syscall(number, 1, None)


def landlock_version() -> int:
    """The version of Landlock's interface in this kernel, 0 without it (landlock(7))."""
    return max(0, LIBC.syscall(444, None, ctypes.c_size_t(0), 1)) if LINUX else 0


def landlock() -> None:
    """Leave files outside the libraries (to read) and this folder (to write) unreachable.

    From version 4 TCP is refused too; from 6, signals and abstract sockets to anybody outside.
    chmod, stat and UDP are not covered. A process in Landlock cannot trace one outside it.
    """
    version = landlock_version()
    if not version:
        return
    files = (1 << 13) - 1 | (version >= 2) << 13 | (version >= 3) << 14 | (version >= 5) << 15
    of_a_file = 0b111 | (version >= 3) << 14 | (version >= 5) << 15
    reading = 0b1100  # files and folders; executing is not among it
    rules = struct.pack("QQQ", files, 0b11 * (version >= 4), 0b11 * (version >= 6))
    ruleset = system("syscall", 444, rules, ctypes.c_size_t(len(rules)), 0)
    allowed = [(".", files), ("/dev/null", 0b110), ("/dev/urandom", 0b100)]
    for path, access in [*allowed, *((p, reading) for p in library_folders())]:
        at = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not os.path.isdir(path):
            access &= of_a_file
        system("syscall", 445, ruleset, 1, struct.pack("=Qi", access, at), 0)
        os.close(at)
    system("syscall", 446, ruleset, 0)
    os.close(ruleset)


def set_limits(seconds: int, memory: int, file_size: int, processes: int, files: int) -> None:
    """Resource limits of this process and its children, soft and hard; what a system lacks, not.

    seconds and memory (address space, bytes) are for each process; processes for the user.
    """
    for name, value in (
        ("CPU", seconds),
        ("AS", memory),
        ("FSIZE", file_size),
        ("NPROC", processes),
        ("NOFILE", files),
        ("CORE", 0),
        ("MSGQUEUE", 0),
        ("MEMLOCK", 0),
    ):
        with suppress(AttributeError, OSError, ValueError):
            kind = getattr(resource, f"RLIMIT_{name}")
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))


def tasks_of_user() -> int:
    """Threads this user has on the machine: RLIMIT_NPROC counts them all."""
    found = 0
    for name in os.listdir("/proc") if LINUX else ():
        with suppress(OSError):
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == os.getuid():
                found += len(os.listdir(f"/proc/{name}/task"))
    return found


def kill_user(user: int) -> None:
    """Kill every process of a spare user, wherever it hides; from root only."""
    child = os.fork()
    if child == 0:
        with suppress(OSError):
            os.setresuid(user, user, user)
            os.kill(-1, signal.SIGKILL)
        os._exit(0)
    os.waitpid(child, 0)


def remove_shared_memory(user: int) -> None:
    """Remove a spare user's System V segments, semaphores and queues, which outlive processes."""
    for kind in ("shm", "sem", "msg"):
        with suppress(OSError), open(f"/proc/sysvipc/{kind}") as f:
            names, *rows = (line.split() for line in f)
            for row in rows:
                if int(dict(zip(names, row, strict=True))["uid"]) == user:
                    which = [int(row[1]), *([0] if kind == "sem" else [])]
                    getattr(LIBC, f"{kind}ctl")(*which, 0, None)


def children() -> list[int]:
    """This process's children, orphans it has inherited among them."""
    found = []
    for name in os.listdir("/proc") if LINUX else ():
        with suppress(OSError, ValueError):
            with open(f"/proc/{int(name)}/stat") as f:
                # "pid (name) state parent …"; the name may hold spaces and brackets.
                if int(f.read().rpartition(")")[2].split()[1]) == os.getpid():
                    found.append(int(name))
    return found


def write(path: str, text: str) -> None:
    handle = os.open(path, os.O_WRONLY)
    try:
        os.write(handle, text.encode())
    finally:
        os.close(handle)


def _unshare(flags: int) -> None:
    try:
        system("unshare", flags)
    except OSError as e:
        if e.errno == errno.ENOSPC:
            e.strerror = "user namespaces are switched off, or too many"
        raise


def _bind(source: str, target: str) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o444))
    mount(source, target, None, BIND | RECURSIVE)


def _mounts(folder: str) -> list[tuple[str, int]]:
    """Mount points at and below `folder`, and the flags a remount has to repeat."""
    known = {
        **{"nosuid": NO_SUID, "nodev": NO_DEVICES, "noexec": NO_EXEC},
        **{"noatime": NO_ATIME, "nodiratime": NO_DIR_ATIME, "relatime": RELATIVE_ATIME},
    }
    found = []
    with open("/proc/self/mountinfo") as f:
        for line in f:
            at, options = line.split()[4:6]
            at = at.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")
            if at == folder or at.startswith(folder + "/"):
                flags = (known.get(word, 0) for word in options.split(","))
                found.append((at, sum(set(flags))))
    return found


def _open_to_all(path: str) -> bool:
    """Whether any user may read a path: every folder on the way lets others through."""
    parts = path.split("/")
    folders = ["/".join(parts[:i]) or "/" for i in range(1, len(parts))]
    return bool(os.stat(path).st_mode & 0o4) and all(os.stat(f).st_mode & 0o1 for f in folders)
