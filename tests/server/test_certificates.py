"""The coordinator's authority: its leaves are good for whoever trusts its root, and for nobody else."""

from __future__ import annotations

import datetime
import socket
import ssl
import stat
import threading

import pytest

from common.errors import StoreError
from server.certificates import LEAF_DAYS, WARN_DAYS, Authority

NOW = datetime.datetime.now(datetime.UTC)


@pytest.fixture
def authority(tmp_path):
    made = Authority.open(tmp_path / "tls", now=NOW)
    made.issue("leaf", ["localhost", "127.0.0.1"], now=NOW)
    return made


def shake_hands(server: Authority, trusted: Authority, host: str) -> bytes:
    """One TLS handshake on loopback; returns the certificate that the client saw."""
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(*server.pair("leaf"))
    mine = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    mine.load_verify_locations(trusted.root)
    a, b = socket.socketpair()

    def serve():
        try:
            with theirs.wrap_socket(b, server_side=True) as end:
                end.recv(1)
        except (ssl.SSLError, OSError):
            b.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with mine.wrap_socket(a, server_hostname=host) as end:
            return end.getpeercert(binary_form=True)
    finally:
        a.close()
        thread.join()


def test_whoever_trusts_the_root_takes_the_leaf(authority):
    assert shake_hands(authority, authority, "localhost")
    assert shake_hands(authority, authority, "127.0.0.1")


def test_another_authority_or_another_name_is_refused(authority, tmp_path):
    other = Authority.open(tmp_path / "other", now=NOW)
    other.issue("leaf", ["localhost"], now=NOW)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(other, authority, "localhost")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(authority, authority, "elsewhere.example.org")


def test_a_renewed_leaf_is_another_one_under_the_same_root(authority):
    root, before = authority.root.read_bytes(), shake_hands(authority, authority, "localhost")
    authority.issue("leaf", ["localhost"], now=NOW)
    assert shake_hands(authority, authority, "localhost") != before
    assert Authority.open(authority.folder, now=NOW).root.read_bytes() == root


def test_a_warning_comes_thirty_days_ahead(authority):
    assert authority.days_left("leaf", now=NOW) in (LEAF_DAYS - 1, LEAF_DAYS)  # certificates count whole seconds
    assert authority.warning(now=NOW) is None
    assert authority.warning(now=NOW + datetime.timedelta(days=LEAF_DAYS - WARN_DAYS - 2)) is None
    assert "homespun server renew" in authority.warning(now=NOW + datetime.timedelta(days=LEAF_DAYS - WARN_DAYS))
    assert "-" in authority.warning(now=NOW + datetime.timedelta(days=LEAF_DAYS + 5))


def test_a_leaf_does_not_outlive_its_root(authority):
    authority.issue("inner", ["localhost"], now=NOW + datetime.timedelta(days=3600), days=3650)
    assert authority.days_left("inner", now=NOW) <= 3650


def test_keys_are_readable_by_their_owner_alone_and_half_an_authority_is_none(authority):
    for name in ("ca.key", "leaf.key"):
        assert stat.S_IMODE((authority.folder / name).stat().st_mode) == 0o600
    (authority.folder / "ca.key").unlink()
    with pytest.raises(StoreError, match="part of the authority"):
        Authority.open(authority.folder, now=NOW)
