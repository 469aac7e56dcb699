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
_PR_SET_CHILD_SUBREAPER, _PR_SET_DUMPABLE = 36, 4
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4

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


def hide_memory() -> None:
    """Other processes of this one's user can neither read nor write its memory."""
    _check(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl")


def drop_capabilities() -> None:
    """None is left, and none comes back by running another program."""
    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _check(_libc.syscall(126, header, none), "capset")


def adopt_orphans() -> None:
    """Descendants whose parent has ended become this process's children, not those of process 1."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl")


def no_new_privileges() -> None:
    """No program run from here on gains anything by being set-user-id."""
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")


# linux/landlock.h: rights on files by the version that brought them, TCP ports, and what a domain keeps in.
_LANDLOCK_READ, _LANDLOCK_USE_FILE = 1 | 4 | 8, 2 | 4
_LANDLOCK_RIGHTS = ((1, 0x1FFF), (2, 1 << 13), (3, 1 << 14), (5, 1 << 15))
_ON_FILES = _LANDLOCK_USE_FILE | 1 << 14
_LANDLOCK_PORTS, _LANDLOCK_SCOPES = 1 | 2, 1 | 2
TRUNCATE_VERSION, PORTS_VERSION, SCOPES_VERSION = 3, 4, 6


def landlock_version() -> int:
    """The kernel's Landlock interface, 0 where it has none."""
    return max(0, int(_libc.syscall(444, None, 0, 1)))


def landlock(readable: Iterable[str], writable: Iterable[str]) -> None:
    """From here on only these paths (and what is below them) can be opened; for ever, children included.

    Where the kernel can: no TCP port, no signal to a process outside, no abstract socket of one outside.
    """
    version = landlock_version()
    rights = sum(bits for since, bits in _LANDLOCK_RIGHTS if version >= since)
    ports = _LANDLOCK_PORTS if version >= PORTS_VERSION else 0
    scopes = _LANDLOCK_SCOPES if version >= SCOPES_VERSION else 0
    size = 24 if scopes else 16 if ports else 8
    attributes = struct.pack("QQQ", rights, ports, scopes)[:size]
    ruleset = _check(_libc.syscall(444, attributes, size, 0), "landlock_create_ruleset")
    for paths, folder in ((readable, _LANDLOCK_READ), (writable, rights)):
        for path in paths:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            allowed = folder if os.path.isdir(path) else folder & _ON_FILES
            rule = struct.pack("=Qi", allowed & rights, place)
            _check(_libc.syscall(445, ruleset, 1, rule, 0), f"landlock_add_rule {path}")
            os.close(place)
    _check(_libc.syscall(446, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


# Sockets and what can stand in for them, other processes' memory, keys, mounts, modules, namespaces; memory
# that no process's limit counts (System V, POSIX queues, memfd); timers that could send SIGKILL.
_DENIED = (
    *(41, 425, 426, 427),  # socket; io_uring can make sockets too
    *(101, 310, 311, 312, 434, 438),  # ptrace, process_vm_*, kcmp, pidfd_open, pidfd_getfd
    *(165, 166, 155, 161, 272, 308, 428, 429, 430, 431, 432, 433, 442),  # mounts, chroot, unshare, setns
    *(246, 320, 175, 313, 176, 169, 167, 168),  # kexec, modules, reboot, swap
    *(248, 249, 250, 298, 321, 323, 303, 304, 135),  # keys, perf, bpf, userfaultfd, handles, personality
    *(29, 30, 31, 67, 64, 65, 66, 220, 68, 69, 70, 71),  # System V: shared memory, semaphores, queues
    *(240, 241, 242, 243, 244, 245, 222),  # mq_*, timer_create
    *(
        319,
        447,
        300,
        163,
        448,
        440,
        256,
    ),  # memfd_*, fanotify, acct, process_mrelease, process_madvise, migrate_pages
)
# Where the program is in namespaces of its own these concern itself alone. Ways out of the process group that
# is ended; files' owners, modes, times and attributes, which Landlock does not know; sockets' names; watches.
_DENIED_BESIDE_OTHERS = (
    *(112, 109),  # setsid, setpgid
    *(90, 91, 268, 452, 92, 93, 94, 260),  # chmod and chown
    *(132, 235, 261, 280, 188, 189, 190, 197, 198, 199, 463, 466, 469),  # utime, setxattr, removexattr
    *(49, 42, 50, 254),  # bind, connect, listen, inotify_add_watch
)
_SIGNALS = (62, 200, 234, 129, 297, 424)  # kill, tkill, tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo, pidfd
_ARCH_X86_64, _X32_BIT, _NEGATIVE = 0xC000003E, 0x40000000, 0x80000000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x50000 | 1, 0x50000 | 38
# A rule: a call's number, and what must hold of its arguments to refuse it: (argument, test, value), all.
_Rule = tuple[int, tuple[tuple[int, str, int], ...]]


def _rules() -> list[_Rule]:
    """Everywhere."""
    pid = os.getpid()
    rules: list[_Rule] = [(number, ()) for number in _DENIED]
    # The program's own process gets no SIGKILL from the program: what kills it is known to come from outside.
    for number, target, what in ((62, 0, 1), (129, 0, 1), (200, 0, 1), (234, 1, 2), (297, 1, 2)):
        rules.append((number, ((what, "=", 9), (target, "=", pid))))
        rules.append((number, ((what, "=", 9), (target, "=", 0))))
        rules.append((number, ((what, "=", 9), (target, "&", _NEGATIVE))))
    rules.append((302, ((0, "!", 0),)))  # prlimit64 of another process
    rules.append((302, ((1, "=", 0), (2, "!", 0))))  # and RLIMIT_CPU, which ends by SIGKILL
    rules.append((160, ((0, "=", 0),)))
    # F_SETOWN, F_SETSIG, F_SETOWN_EX, F_SETLEASE, F_NOTIFY, F_SETPIPE_SZ; FIOSETOWN, SIOCSPGRP
    rules += [(72, ((1, "=", command),)) for command in (8, 10, 15, 1024, 1026, 1031)]
    rules += [(16, ((1, "=", command),)) for command in (0x8901, 0x8902)]
    # clone: not into a user namespace, where a process is its own root
    rules.append((56, ((0, "&", CLONE_NEWUSER),)))
    return rules


def _rules_beside_others() -> list[_Rule]:
    """Return the rules for isolations in which a program can name foreign processes and files."""
    version = landlock_version()
    rules: list[_Rule] = [(number, ()) for number in _DENIED_BESIDE_OTHERS]
    if version < SCOPES_VERSION:
        rules += [(number, ()) for number in _SIGNALS if number != 234]
        rules.append((234, ((0, "!", os.getpid()),)))
    if version < TRUNCATE_VERSION:
        rules.append((76, ()))
    # Datagram sockets, which can name another end: socketpair's types 2 and 3, sendto with an address.
    rules += [(53, ((1, "type", kind),)) for kind in (2, 3)]
    rules += [(44, ((4, "!", 0),)), (44, ((4, "high", 0),))]
    # Priority, scheduler and pages of others: setpriority, ioprio_set, sched_set*, move_pages
    rules += [(141, ((0, "!", 0),)), (141, ((1, "!", 0),)), (251, ((0, "!", 1),)), (251, ((1, "!", 0),))]
    rules += [(number, ((0, "!", 0),)) for number in (203, 142, 144, 314, 279)]
    return rules


def _compiled(rule: _Rule) -> list[tuple[int, int, int, int]]:
    number, tests = rule
    body: list[tuple[int, int, int, int]] = []
    blocks = []
    for argument, test, value in tests:
        block = [(_LOAD, 0, 0, 16 + 8 * argument + (4 if test == "high" else 0))]
        if test == "type":
            block.append((_AND, 0, 0, 0xF))
        blocks.append((block, test, value))
    after = sum(len(block) + 1 for block, _, _ in blocks) + 1  # up to the end of the return
    for block, test, value in blocks:
        body += block
        left = after - len(body) - 1
        code = _ANY_BIT if test == "&" else _EQUAL
        negated = test in ("!", "high")
        body.append((code, left if negated else 0, 0 if negated else left, value))
    body.append((_RETURN, 0, 0, _EPERM))
    if tests:
        body.append((_LOAD, 0, 0, 0))
    return [(_EQUAL, 0, len(body), number), *body]


def seccomp(*, beside_others: bool) -> None:
    """Refuse system calls a test of a function never needs; for ever, children included.

    Args:
        beside_others: processes and files that are not the program's can be named: what concerns them is
            refused too, as far as Landlock does not see to it.
    """
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
    for rule in _rules() + (_rules_beside_others() if beside_others else []):
        program += _compiled(rule)
    program.append((_RETURN, 0, 0, _ALLOW))
    code = b"".join(struct.pack("HBBI", *line) for line in program)
    lines = ctypes.create_string_buffer(code)
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(lines))
    _check(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header, 0, 0), "seccomp")
