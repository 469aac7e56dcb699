"""The ranks' store listens where it is meant to, and what MASTER_ADDR and MASTER_PORT cannot be is said."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import psutil
import pytest

from megarl.cluster.rendezvous import open_store
from megarl.errors import UserError

TIMEOUT = timedelta(seconds=20)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listeners(port: int) -> set[str]:
    """The addresses at which this process listens on a port."""
    found = psutil.Process(os.getpid()).net_connections("tcp")
    return {each.laddr.ip for each in found if each.status == psutil.CONN_LISTEN and each.laddr.port == port}


def environment(host: str, port: int | str) -> dict[str, str]:
    return {"MASTER_ADDR": host, "MASTER_PORT": str(port)}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_store_listens_on_the_address_that_is_meant(host: str) -> None:
    port = free_port()
    first = open_store(0, 1, TIMEOUT, environment(host, port))
    assert listeners(port) in ({"127.0.0.1"}, {"::1"})
    second = open_store(1, 2, TIMEOUT, environment(host, port))
    second.set("from", "rank 1")
    assert first.get("from") == b"rank 1"


def test_what_cannot_be_a_meeting_point_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"MASTER_PORT: {port} of 127.0.0.1 is taken"):
            open_store(0, 1, TIMEOUT, environment("127.0.0.1", port))
    for odd in ("x", "99999", "0", "-1", "", "²"):
        with pytest.raises(UserError, match="MASTER_PORT: expected a port"):
            open_store(0, 1, TIMEOUT, environment("127.0.0.1", odd))
    with pytest.raises(UserError, match="MASTER_ADDR: 'no.such.host.invalid' does not resolve"):
        open_store(0, 1, TIMEOUT, environment("no.such.host.invalid", 29511))


def test_an_agent_of_torchrun_has_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 is a client there, as all others: nothing listens here."""
    port = free_port()
    agent = open_store(0, 1, TIMEOUT, environment("127.0.0.1", port))
    environ = {**environment("127.0.0.1", port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    rank = open_store(0, 1, TIMEOUT, environ)
    rank.set("a", "1")
    assert agent.num_keys() >= 1
