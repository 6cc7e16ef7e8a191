"""The guard that keeps tests off the network."""

from __future__ import annotations

import socket
import sys

import pytest


@pytest.mark.parametrize(
    ("event", "arguments"),
    [
        # The events themselves, not real connections: were the guard broken, the test would be what reaches out.
        ("socket.connect", (None, ("192.0.2.1", 443))),
        ("socket.connect", (None, ("2001:db8::1", 443, 0, 0))),
        ("socket.sendto", (None, ("192.0.2.1", 53))),
        ("socket.getaddrinfo", ("example.org", 443, 0, 0, 0)),
        ("socket.getaddrinfo", (b"example.org", 443, 0, 0, 0)),
    ],
)
def test_the_network_is_refused(event, arguments):
    with pytest.raises(RuntimeError, match="reached for the network"):
        sys.audit(event, *arguments)


def test_loopback_is_allowed():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(("localhost", server.getsockname()[1])).close()


def test_a_unix_socket_is_allowed(tmp_path):
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(path)
        server.listen()
        client.connect(path)
