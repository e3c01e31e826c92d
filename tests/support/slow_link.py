"""A long or narrow wire: carries frames between a host's link and the bridge, later and not faster than told.

    python slow_link.py LINK TAP DELAY_MS MBIT_PER_S

Run as a program by `support.host`. LINK is the outer end of the host's link, taken off the bridge; TAP is made here and
put into the bridge in its place. Frames keep their offload header, so that one of 64 KiB stays one. (The kernel's own
way, ``tc netem``, is missing from many kernels.) A rate of 0 is none.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import sys
import time
from collections import deque

TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6 = 0x01, 0x02, 0x04
SOL_PACKET, PACKET_ADD_MEMBERSHIP, PACKET_MR_PROMISC = 263, 1, 1
PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING, SO_RCVBUFFORCE = 15, 23, 33
ETH_P_ALL = 3
FRAME = 70_000
QUEUED_BYTES = 64 * 1024 * 1024


def open_tap(name: str) -> int:
    """Make a tap device; it lasts as long as the returned descriptor."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
    fcntl.ioctl(descriptor, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6)
    return descriptor


def open_link(name: str) -> socket.socket:
    """Open a link for whole frames, in both directions."""
    link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    link.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    link.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    link.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, QUEUED_BYTES)
    link.bind((name, ETH_P_ALL))
    member = struct.pack("iHH8s", socket.if_nametoindex(name), PACKET_MR_PROMISC, 0, b"")
    link.setsockopt(SOL_PACKET, PACKET_ADD_MEMBERSHIP, member)
    link.settimeout(0)
    return link


class Wire:
    """One direction."""

    def __init__(self, source: int, sink: int, delay_s: float, bytes_per_s: float) -> None:
        self.source = source
        self.sink = sink
        self._delay_s = delay_s
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0
        self._queued = 0
        self._frames: deque[tuple[float, bytes]] = deque()

    def take(self) -> None:
        """Take what has come; what does not fit into the queue is lost, as in a switch."""
        for _ in range(64):
            try:
                frame = os.read(self.source, FRAME)
            except BlockingIOError:
                return
            now = time.monotonic()
            leaves = max(now, self._free_at)
            if self._bytes_per_s:
                leaves += len(frame) / self._bytes_per_s
            if self._queued + len(frame) > QUEUED_BYTES:
                continue
            self._free_at = leaves
            self._queued += len(frame)
            self._frames.append((leaves + self._delay_s, frame))

    def give(self) -> float:
        """Pass on what is due; return the seconds until the next is."""
        now = time.monotonic()
        while self._frames and self._frames[0][0] <= now:
            _, frame = self._frames.popleft()
            self._queued -= len(frame)
            try:
                os.write(self.sink, frame)
            except OSError:  # the link is down, or the queue behind is full: lost
                continue
        return self._frames[0][0] - now if self._frames else 1.0


def main() -> None:
    """Carry frames until killed."""
    link_name, tap_name, delay_ms, mbit_per_s = sys.argv[1:]
    link, tap = open_link(link_name), open_tap(tap_name)
    delay_s, bytes_per_s = float(delay_ms) / 1000, float(mbit_per_s) * 125_000
    wires = [
        Wire(link.fileno(), tap, delay_s, bytes_per_s),
        Wire(tap, link.fileno(), delay_s, bytes_per_s),
    ]
    print("ready", flush=True)  # noqa: T201 -- a program, which says so
    while True:
        wait_s = max(0.0, min(wire.give() for wire in wires))
        ready, _, _ = select.select([wire.source for wire in wires], [], [], wait_s)
        for wire in wires:
            if wire.source in ready:
                wire.take()


if __name__ == "__main__":
    main()
