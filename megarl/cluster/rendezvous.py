"""Rendezvous of a run's ranks: torch's store at MASTER_ADDR:MASTER_PORT, on no other interface.

Left to itself torch has the store listen on every interface of rank 0's host. Whoever reaches it reads and
writes what the ranks tell each other, and nobody is asked for a password.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from megarl.errors import UserError

_CONNECT = timedelta(minutes=10)  # ranks of other hosts may start much later


def open_store(
    rank: int, world_size: int, timeout: timedelta, environ: Mapping[str, str] = os.environ
) -> Any:
    """The store of this run: made by rank 0, found by the others. torchrun has one already.

    Raises:
        UserError: MASTER_ADDR is no address of this host, the port is taken, or nobody answers.
    """
    from torch import distributed

    dist: Any = distributed
    host, port = address_of(environ)
    at = f"MASTER_ADDR:MASTER_PORT {host}:{port}"
    own = environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    listener = _listen(host, port) if own and rank == 0 else None
    try:
        store = dist.TCPStore(
            host,
            port,
            world_size,
            listener is not None,
            _CONNECT,
            False,
            master_listen_fd=None if listener is None else listener.detach(),
        )
    except (dist.DistError, RuntimeError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise UserError(f"{at}: rank {rank} cannot reach the store of rank 0: {reason}") from error
    store.set_timeout(timeout)
    if own:
        return dist.PrefixStore("ranks", store)
    attempt = environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # an agent's store outlives its ranks
    return dist.PrefixStore(f"ranks/{attempt}", store)


def address_of(environ: Mapping[str, str]) -> tuple[str, int]:
    """MASTER_ADDR and MASTER_PORT.

    Raises:
        UserError: the address has no host, or the port is none.
    """
    host, text = environ.get("MASTER_ADDR", ""), environ.get("MASTER_PORT", "")
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 2**16):
        raise UserError(f"MASTER_PORT: expected a port from 1 to 65535 (got {text!r})")
    try:
        socket.getaddrinfo(host, int(text), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UserError(f"MASTER_ADDR: {host!r} does not resolve ({error})") from None
    return host, int(text)


def _listen(host: str, port: int) -> socket.socket:
    """A socket that is bound to ``host`` alone; to every interface where this host does not have the address.

    Addresses that only others know this host by are those of containers and of clouds.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"MASTER_PORT: {port} of {host} is taken by another process") from None
        return socket.create_server(("", port), family=family)
    listener.listen(1024)
    return listener
