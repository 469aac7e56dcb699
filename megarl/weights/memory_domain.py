"""Ids of memory domains: equal if memory can be mapped (host) or belongs to one device (device)."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import torch

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def host_id() -> str:
    """Return an id that is equal in two processes that can map each other's shared memory.

    Containers of one machine have different /dev/shm file systems, hence different ids.
    """
    try:
        return f"{_BOOT_ID.read_text().strip()}/{os.stat('/dev/shm').st_dev}"
    except OSError:
        return socket.gethostname()


def device_id(device: torch.device) -> str:
    """Return "cpu" or the UUID of the GPU: its index may differ between processes."""
    if device.type == "cpu":
        return "cpu"
    return str(torch.cuda.get_device_properties(device).uuid)


def address_towards(other: str) -> str:
    """Return this machine's address on the route to ``other`` (a name or an address)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((other, 1))  # sends nothing: asks for the route
        return str(probe.getsockname()[0])
