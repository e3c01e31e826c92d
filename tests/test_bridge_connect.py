"""A bridge that connects while Ray's head ends must not keep that connection: calls on it get no response."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from raylaunch.controller.ray.process import _closed_by_peer, _open_socket


@pytest.fixture
def head() -> Iterator[socket.socket]:
    """What listens as a head of Ray does, without a word of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def knocked(head: socket.socket) -> tuple[socket.socket, socket.socket]:
    ours = _open_socket(f"127.0.0.1:{head.getsockname()[1]}")
    assert ours is not None
    return ours, head.accept()[0]


def test_an_address_without_a_head_is_reported_as_not_listening(head: socket.socket) -> None:
    port = head.getsockname()[1]
    head.close()
    assert _open_socket(f"127.0.0.1:{port}") is None


def test_a_live_head_has_not_hung_up_whatever_it_sends(head: socket.socket) -> None:
    ours, theirs = knocked(head)
    with theirs:
        theirs.sendall(b"settings of HTTP/2" * 100)
        assert not _closed_by_peer(ours)


def test_a_head_that_was_another_one_meanwhile_has(head: socket.socket) -> None:
    ours, theirs = knocked(head)
    theirs.sendall(b"settings")
    theirs.close()
    assert _closed_by_peer(ours)
