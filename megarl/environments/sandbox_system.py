"""System calls of the sandbox that Python has no names for; imports nothing but the standard library.

Numbers and structures are those of Linux on x86_64 (asm/unistd_64.h, linux/landlock.h, linux/seccomp.h).
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_MNT_DETACH, _AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = 2, -100, 0x8000, 1
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 1, 38, 22, 2
_PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    """Leave the namespaces of ``flags`` for new ones."""
    _check(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    """Mount a file system, or bind a path to another; as the call of that name."""
    arguments = [text.encode() if text is not None else None for text in (source, target, kind)]
    _check(_libc.mount(*arguments, ctypes.c_ulong(flags), data.encode() or None), f"mount {target}")


def make_read_only(path: str, *, recursive: bool) -> None:
    """Nothing can be written below a mount any more."""
    attributes = struct.pack("QQQQ", _MOUNT_ATTR_RDONLY, 0, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    _check(_libc.syscall(442, _AT_FDCWD, path.encode(), flags, attributes, 32), f"mount_setattr {path}")


def pivot_root(root: str) -> None:
    """Make ``root`` the root directory and drop the old one."""
    os.chdir(root)
    _check(_libc.syscall(155, b".", b"."), "pivot_root")  # the old root now lies on top of the new one
    _check(_libc.umount2(b".", _MNT_DETACH), "umount")
    os.chdir("/")


def die_with_parent() -> None:
    """This process gets SIGKILL when the one that forked it ends."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0), "prctl")


def adopt_orphans() -> None:
    """Descendants whose parent has ended become this process's children, not those of process 1."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl")


def no_new_privileges() -> None:
    """No program run from here on gains anything by being set-user-id."""
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")


_LANDLOCK_READ, _LANDLOCK_ALL = 1 | 4 | 8, 0x1FFF
_LANDLOCK_READ_FILE, _LANDLOCK_USE_FILE = 4, 2 | 4


def landlock_version() -> int:
    """The kernel's Landlock interface, 0 where it has none."""
    return max(0, int(_libc.syscall(444, None, 0, 1)))


def landlock(readable: Iterable[str], writable: Iterable[str]) -> None:
    """From here on only these paths (and what is below them) can be opened; for ever, children included."""
    ruleset = _check(_libc.syscall(444, struct.pack("Q", _LANDLOCK_ALL), 8, 0), "landlock_create_ruleset")
    for paths, folder, file in (
        (readable, _LANDLOCK_READ, _LANDLOCK_READ_FILE),
        (writable, _LANDLOCK_ALL, _LANDLOCK_USE_FILE),
    ):
        for path in paths:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rule = struct.pack("=Qi", folder if os.path.isdir(path) else file, place)
            _check(_libc.syscall(445, ruleset, 1, rule, 0), f"landlock_add_rule {path}")
            os.close(place)
    _check(_libc.syscall(446, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


# Sockets and what can stand in for them, other processes' memory, keys, mounts, modules, namespaces.
_DENIED = (
    *(41, 425, 426, 427),  # socket; io_uring can make sockets too
    *(101, 310, 311, 312, 434, 438),  # ptrace, process_vm_*, kcmp, pidfd_open, pidfd_getfd
    *(165, 166, 155, 272, 308, 428, 429, 430, 431, 432, 433, 442),  # mounts, unshare, setns
    *(246, 320, 175, 313, 176, 169, 167, 168),  # kexec, modules, reboot, swap
    *(248, 249, 250, 298, 321, 323, 303, 304, 135),  # keys, perf, bpf, userfaultfd, handles, personality
)
# Where no PID namespace does: signals to others, and ways out of the process group that is killed.
_DENIED_BESIDE_OTHERS = (62, 200, 129, 297, 424, 112, 109)
_ARCH_X86_64, _X32_BIT = 0xC000003E, 0x40000000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x50000 | 1, 0x50000 | 38


def seccomp(*, beside_others: bool) -> None:
    """Refuse system calls a test of a function never needs; for ever, children included.

    Args:
        beside_others: processes that are not the program's are visible: signals and sessions are refused too.
    """
    denied = _DENIED + (_DENIED_BESIDE_OTHERS if beside_others else ())
    program = [
        (_LOAD, 0, 0, 4),  # the architecture
        (_EQUAL, 1, 0, _ARCH_X86_64),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),  # the call's number
        (_AT_LEAST, 0, 1, _X32_BIT),
        (_RETURN, 0, 0, _KILL),
        (_EQUAL, 0, 1, 435),  # clone3 has its flags in memory, out of reach: libc falls back to clone
        (_RETURN, 0, 0, _ENOSYS),
    ]
    for number in denied:
        program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _EPERM)]
    program += [
        (_EQUAL, 0, 3, 56),  # clone: not into a user namespace, where a process is its own root
        (_LOAD, 0, 0, 16),
        (_ANY_BIT, 0, 1, CLONE_NEWUSER),
        (_RETURN, 0, 0, _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    code = b"".join(struct.pack("HBBI", *line) for line in program)
    lines = ctypes.create_string_buffer(code)
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(lines))
    _check(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header, 0, 0), "seccomp")
