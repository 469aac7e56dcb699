# ruff: noqa: E501
"""What a program should not be able to do: one program each, which prints "open" where it can. Also run as nobody.

Before each stand VICTIM (a process of the same user), FILE and FOLDER (the user's, open to all), SOCKET (a path
where datagrams are received), and DISK, TASKS, MEMORY (the limits).
"""

from __future__ import annotations

HEAD = r"""
import ctypes, fcntl, mmap, os, resource, signal, socket, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *args):
    return libc.syscall(ctypes.c_long(number), *(ctypes.c_long(a) if isinstance(a, int) else a for a in args))
def works(attempt, *args):
    try:
        attempt(*args)
    except (OSError, ValueError):
        return False
    return True
def tell(*found):
    if any(found):
        print("open", found, flush=True)
"""

WAYS: dict[str, str] = {
    "sockets, also by io_uring and as datagrams from a pair": r"""
kinds = [(2, 1), (2, 2), (10, 1), (1, 1), (16, 3), (17, 3), (40, 1)]
tell(*(works(socket.socket, family, kind) for family, kind in kinds))
tell(call(425, 4, ctypes.create_string_buffer(256)) >= 0)
for kind in (socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET, socket.SOCK_STREAM):
    try:
        ends = socket.socketpair(socket.AF_UNIX, kind)
    except OSError:
        continue
    works(ends[0].sendto, b"out", SOCKET)  # who listens at SOCKET sees whether it came
    works(ends[0].sendmsg, [b"out"], [], 0, SOCKET)
    if works(ends[0].connect, SOCKET):
        works(ends[0].send, b"out")
""",
    "signals to other processes": r"""
tell(works(os.kill, VICTIM, 15), call(200, VICTIM, 15) == 0, call(234, VICTIM, VICTIM, 15) == 0)
info = ctypes.create_string_buffer(struct.pack("iii", 15, 0, -1) + bytes(116))
tell(call(129, VICTIM, 15, info) == 0, call(297, VICTIM, VICTIM, 15, info) == 0)
r, w = os.pipe()
pair = socket.socketpair()[0].fileno()
tell(works(fcntl.fcntl, r, 10, 9), works(fcntl.fcntl, r, 8, VICTIM))
tell(works(fcntl.ioctl, pair, 0x8901, struct.pack("i", VICTIM)))
""",
    "limits, priority and processors of other processes": r"""
none = ctypes.create_string_buffer(16)
tell(call(302, VICTIM, 0, none, 0) == 0, call(302, VICTIM, 7, none, 0) == 0, call(141, 0, VICTIM, 19) == 0)
tell(call(203, VICTIM, 8, ctypes.create_string_buffer(struct.pack("Q", 1))) == 0, call(251, 1, VICTIM, 3 << 13) == 0)
tell(call(144, VICTIM, 5, ctypes.create_string_buffer(4)) == 0)
""",
    "memory and tracing of other processes": r"""
tell(call(101, 16, VICTIM, 0, 0) == 0, call(101, 0x4206, VICTIM, 0, 0) == 0, call(434, VICTIM, 0) >= 0)
tell(*(works(open, f"/proc/{VICTIM}/{name}", "rb") for name in ("mem", "environ", "maps")))
""",
    "contents of other files": r"""
tell(*(works(open, path) for path in (FILE, "/etc/passwd", "/proc/self/root" + FILE, "/proc/1/root" + FILE)))
os.symlink(FILE, "link")
tell(works(open, "link"), works(os.link, FILE, "hard"), works(os.rename, FILE, "moved"))
""",
    "writing, emptying and removing other files": r"""
tell(works(open, FILE, "a"), works(os.truncate, FILE, 0), works(os.unlink, FILE), works(os.mkdir, FOLDER + "/made"))
tell(*(works(open, path + "/x", "w") for path in (FOLDER, "/usr", "/etc", "/dev/shm", "/var/tmp")))
""",
    "owner, mode, times and attributes of other files": r"""
tell(works(os.chmod, FILE, 0o777), works(os.utime, FILE, (1, 1)), works(os.chown, FILE, os.getuid(), os.getgid()))
tell(works(os.setxattr, FILE, "user.x", b"1"), works(os.chmod, FOLDER, 0o777))
""",
    "existence and sizes of other files": "tell(works(os.stat, FILE), works(os.stat, '/etc/shadow'))\n",
    "kernel settings": r"""
for path in ("kernel/core_pattern", "vm/swappiness", "kernel/panic", "vm/overcommit_memory", "vm/drop_caches"):
    tell(works(os.open, "/proc/sys/" + path, os.O_WRONLY))
tell(works(os.open, "/proc/sysrq-trigger", os.O_WRONLY))
""",
    "the first process of its namespace": r"""
for name, mode in (("mem", "r+b"), ("environ", "rb"), ("maps", "rb")):
    tell(works(open, "/proc/1/" + name, mode))
try:
    tell("Seccomp:\t2" not in open("/proc/1/status").read())
except OSError:
    pass
tell(call(302, 1, 7, ctypes.create_string_buffer(16), 0) == 0)
""",
    "namespaces, mounts, another user, raised limits": r"""
tell(*(call(272, flag) == 0 for flag in (0x10000000, 0x40000000, 0x20000, 0x20000000)))
child = call(56, 0x10000000 | 17, 0, 0, 0, 0)
if child == 0:
    os._exit(0)
tell(child > 0, call(165, b"none", b".", b"tmpfs", 0, 0) == 0, call(161, b"/usr") == 0)
tell(os.getuid() == 0, works(os.setuid, 0), works(os.setresuid, 0, 0, 0))
for name in ("AS", "FSIZE", "NPROC", "NOFILE"):
    kind = getattr(resource, "RLIMIT_" + name)
    hard = resource.getrlimit(kind)[1]
    tell(works(resource.setrlimit, kind, (hard * 2, hard * 2)))
""",
    "memory of one process": r"""
held = []
try:
    while True:
        held.append(mmap.mmap(-1, 8 << 20))
        held[-1].write(b"x" * (8 << 20))
except (OSError, MemoryError):
    tell(len(held) * (8 << 20) > MEMORY)
""",
    "memory of all processes together": r"""
reading, writing = os.pipe()
for _ in range(8):
    if os.fork() == 0:
        held = bytearray(MEMORY // 2)
        held[::4096] = b"x" * len(held[::4096])
        os.write(writing, b"x")
        time.sleep(30)
        os._exit(0)
time.sleep(2)
os.set_blocking(reading, False)
tell(works(os.read, reading, 100))
""",
    "memory of no process: memfd, System V, queues": r"""
tell(works(os.memfd_create, "x"), libc.shmget(0, 1 << 20, 0o1600) >= 0, libc.msgget(0x5eed, 0o1600) >= 0)
tell(libc.semget(0x5eee, 1, 0o1600) >= 0, call(240, b"queue", os.O_CREAT | os.O_RDWR, 0o600, 0) >= 0)
""",
    "files together, deleted ones too": r"""
written, held = 0, []
try:
    for number in range(100):
        held.append(open(f"f{number % 2}", "wb"))
        os.unlink(f"f{number % 2}")
        for _ in range(3):
            held[-1].write(bytes(1 << 20))
            held[-1].flush()
            written += 1 << 20
except OSError:
    pass
tell(written > DISK)
""",
    "number of files": r"""
count, end = 0, time.time() + 1.5
try:
    while time.time() < end and count < 30000:
        open(f"i{count}", "w").close()
        count += 1
except OSError:
    pass
tell(count > 4200)
""",
    "number of processes": r"""
count = 0
try:
    while count < 60:
        if os.fork() == 0:
            time.sleep(2)
            os._exit(0)
        count += 1
except OSError:
    pass
tell(count > TASKS)
time.sleep(1)
""",
    "number of threads": r"""
threading.stack_size(128 << 10)
count = 0
try:
    while count < 60:
        threading.Thread(target=time.sleep, args=(3,), daemon=True).start()
        count += 1
except RuntimeError:
    pass
tell(count > TASKS)
time.sleep(1)  # long enough to be seen, as one that uses them would be
os._exit(0)
""",
    "processes past its end": r"""
for leave in (os.setsid, lambda: os.setpgid(0, 0), lambda: None):
    if os.fork() == 0:
        works(leave)
        for number in range(1, 65):
            try:
                signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError):
                pass
        if os.fork() == 0:
            time.sleep(40)
        os._exit(0)
""",
}
