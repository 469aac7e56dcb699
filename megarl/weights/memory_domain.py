"""Names for where memory lies, equal exactly where it can be mapped (host) or is one device's (device)."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import torch

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def host_id() -> str:
    """Equal in two processes that can map each other's shared memory.

    Containers of one machine have different /dev/shm file systems, and so different names.
    """
    try:
        return f"{_BOOT_ID.read_text().strip()}/{os.stat('/dev/shm').st_dev}"
    except OSError:
        return socket.gethostname()


def device_id(device: torch.device) -> str:
    """Either "cpu" or the UUID of the GPU: its index may differ between processes."""
    if device.type == "cpu":
        return "cpu"
    return str(torch.cuda.get_device_properties(device).uuid)


def address_towards(other: str) -> str:
    """This machine's address on the way to ``other`` (a name or an address)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((other, 1))  # sends nothing: asks for the route
        return str(probe.getsockname()[0])
