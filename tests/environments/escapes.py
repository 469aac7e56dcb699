"""Programs that try to escape the sandbox, and their externally visible results. Also run as nobody."""

from __future__ import annotations

# name: (program, how it must end, what it must not have printed / what it must have printed)
ESCAPES: dict[str, tuple[str, str, str]] = {
    "fork bomb": (
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n",
        "timeout",
        "",
    ),
    "children that stay": (
        "import os, time\nif os.fork() == 0:\n    time.sleep(600)\nprint('done')\n",
        "exited",
        "done\n",
    ),
    "memory": (
        "x = []\ntry:\n    while True:\n        x.append(bytearray(1 << 20))\n"
        "except MemoryError:\n    print('stopped')\n",
        "exited",
        "stopped\n",
    ),
    "memory of many processes": (
        "import os, time\n"
        "for _ in range(8):\n    if os.fork() == 0:\n        x = bytearray(40 << 20)\n        time.sleep(60)\n"  # noqa: E501
        "time.sleep(60)\n",
        "memory or timeout",
        "",
    ),
    "endless output": ("while True:\n    print('x' * 1000)\n", "output", ""),
    "endless errors": (
        "import sys\nwhile True:\n    print('x' * 1000, file=sys.stderr)\n",
        "output",
        "",
    ),
    "endless loop": ("while True:\n    pass\n", "timeout", ""),
    "sleep": ("import time\ntime.sleep(600)\n", "timeout", ""),
    "a big file": (
        "try:\n    with open('f', 'wb') as f:\n        for _ in range(100):\n            f.write(bytes(1 << 20))\n"  # noqa: E501
        "except OSError:\n    print('stopped')\n",
        "exited",
        "stopped\n",
    ),
    "writing outside": (
        "import os\n"
        "for path in ('/x', '/usr/x', '/etc/x', '/root/x', '/home/x', '/dev/shm/x', '/var/tmp/x', HOST + '/x'):\n"  # noqa: E501
        "    try:\n        open(path, 'w').close()\n        print('wrote', path)\n"
        "    except OSError:\n        pass\n"
        "open('inside', 'w').close()\nprint(os.path.exists('inside'))\n",
        "exited",
        "True\n",
    ),
    "reading outside": (
        "import os\n"
        "for path in ('/etc/shadow', '/etc/passwd', HOST + '/secret', '/root/.bashrc', '/proc/1/environ', '/proc/1/cwd/x'):\n"  # noqa: E501
        "    try:\n        text = open(path).read()\n"
        "        if 'SECRET' in text or 'root:' in text:\n            print('read', path)\n"
        "    except OSError:\n        pass\n"
        "print('end')\n",
        "exited",
        "end\n",
    ),
    "sockets": (
        "import socket\n"
        "for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK):\n"
        "    try:\n        socket.socket(family, socket.SOCK_STREAM if family != 16 else socket.SOCK_RAW)\n"
        "        print('socket', family)\n"
        "    except OSError:\n        pass\n"
        "try:\n    socket.create_connection(('127.0.0.1', PORT), 2)\n    print('connected')\n"
        "except OSError:\n    print('end')\n",
        "exited",
        "end\n",
    ),
    "the environment": (
        "import os\n"
        "found = [k for k, v in os.environ.items() if 'SECRET' in v]\n"
        "for name in [*map(str, range(1, 400)), str(PARENT), 'self']:\n"
        "    try:\n        data = open(f'/proc/{name}/environ', 'rb').read()\n"
        "        found += [name] if b'SECRET' in data else []\n"
        "    except OSError:\n        pass\n"
        "print(found, os.environ.get('HOME') == os.getcwd())\n",
        "exited",
        "[] True\n",
    ),
    "killing others": (
        "import os, signal\n"
        "killed = []\n"
        "for pid in (PARENT, os.getppid()):\n"
        "    try:\n        os.kill(pid, signal.SIGTERM) if pid > 1 else None\n        killed += [pid] if pid > 1 else []\n"  # noqa: E501
        "    except OSError:\n        pass\n"
        "print(killed)\n",
        "exited",
        "[]\n",
    ),
    "becoming root": (
        "import ctypes, os\n"
        "libc = ctypes.CDLL(None)\n"
        "print(libc.unshare(0x10000000), libc.mount(b'none', b'/work', b'tmpfs', 0, None), libc.setuid(0) if os.getuid() else -1,\n"  # noqa: E501
        "      libc.ptrace(16, 1, 0, 0), libc.syscall(425, 1, 0))\n",
        "exited",
        "-1 -1 -1 -1 -1\n",
    ),
}
