"""A lane: a process with an SSH connection of its own to a cluster's head, over which ranges of a file come here.

``python -m raylaunch.cluster.reach.lane NAME``. One connection is one stream of ciphers on one core, and one window on
a long way; several lanes are several of both. The `ssh` that is installed here carries them where it can, for its
ciphers are cheaper than ours. A lane takes its orders on stdin and answers on stdout, a line each:

======================  ==============================================================
``{"url": …, "token": …, …}``   first of all: which file of the controller, and into which part of it here
``ready``                              connected
``OFFSET LENGTH``                      a range that is wanted; `STREAMS` of them are fetched at a time
``got N``                              so many bytes more have been written
``done OFFSET``                        that range is complete
``full ERRNO WORDS``                   it cannot be written here, and the lane ends
======================  ==============================================================

It ends with its stdin, and with the first thing that goes wrong: whoever started it goes on without it.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from raylaunch.cluster.reach.pipe import piped
from raylaunch.cluster.reach.writing import write_all
from raylaunch.errors import RaylaunchError, StorageError, TransferError

STREAMS = 2
"""Ranges that a lane fetches at a time: while one is asked for, another arrives."""
_SILENT_S = 30.0
_BLOCK = 1024 * 1024
_HEAD_END = b"\r\n\r\n"
_MOST_HEAD = 64 * 1024
_PARTIAL = re.compile(rb"HTTP/1\.1 206 .*\r\ncontent-range: bytes (\d+)-(\d+)/(\d+)\r\n", re.DOTALL | re.IGNORECASE)


class _Call(Protocol):
    """A connection to the controller, whoever carries it."""

    @property
    def closed(self) -> asyncio.Future[None]: ...

    def send(self, data: bytes) -> None: ...


OnData = Callable[[bytes], None]
Connect = Callable[[OnData], AbstractAsyncContextManager[_Call]]


class _Stream:
    """One connection to the controller, with one range at a time on it."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor = descriptor
        self._size = size
        self._head = bytearray()
        self._pieces: list[bytes] = []
        self._held = 0
        self._at = self._end = 0
        self._in_body = False
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.last = 0.0

    async def fetch(self, call: _Call, request: bytes, offset: int, length: int) -> None:
        """Ask for a range, and return when all of it is written."""
        loop = asyncio.get_running_loop()
        self._at, self._end, self._in_body, self._over = offset, offset + length, False, loop.create_future()
        self._head.clear()
        self.last = loop.time()
        span = f"Range: bytes={offset}-{offset + length - 1}\r\n\r\n"
        call.send(request + span.encode())
        while not self._over.done():
            await asyncio.wait({self._over, call.closed}, timeout=1, return_when=asyncio.FIRST_COMPLETED)
            if not self._over.done() and (call.closed.done() or loop.time() - self.last > _SILENT_S):
                msg = f"the connection ended, or was silent, at byte {self._at}"
                raise TransferError(msg)
        self._over.result()

    def feed(self, data: bytes) -> None:
        """Take what has arrived."""
        self.last = asyncio.get_running_loop().time()
        if self._over.done():
            return
        try:
            body = data if self._in_body else self._after_head(data)
            if body:
                self._take(body)
        except RaylaunchError as error:
            self._over.set_exception(error)

    def _after_head(self, data: bytes) -> bytes:
        self._head += data
        end = self._head.find(_HEAD_END)
        if end < 0 and len(self._head) < _MOST_HEAD:
            return b""
        found = _PARTIAL.match(self._head[: end + 2])
        if (
            end < 0
            or found is None
            or (int(found[1]), int(found[2]), int(found[3]))
            != (
                self._at,
                self._end - 1,
                self._size,
            )
        ):
            msg = f"the controller did not answer with the range: {bytes(self._head[:60])!r}"
            raise TransferError(msg)
        self._in_body = True
        return bytes(self._head[end + len(_HEAD_END) :])

    def _take(self, body: bytes) -> None:
        self._pieces.append(body)
        self._held += len(body)
        complete = self._at + self._held >= self._end
        if not complete and self._held < _BLOCK:
            return
        if self._at + self._held > self._end:
            msg = "the controller sent more than the range"
            raise TransferError(msg)
        try:
            write_all(self._descriptor, self._pieces, self._at)
        except OSError as error:
            _say(f"full {error.errno or 0} {error.strerror}")
            msg = f"it cannot be written: {error.strerror}"
            raise StorageError(msg) from None
        if self._held > 1:  # not the byte with which a connection is tried
            _say(f"got {self._held}")
        self._at += self._held
        self._pieces, self._held = [], 0
        if complete:
            self._over.set_result(None)


async def run(name: str) -> None:
    """Take orders until there are none any more.

    Raises:
        RaylaunchError: there is no way to the head, or it broke.
    """
    loop = asyncio.get_running_loop()
    orders = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    order = json.loads(await orders.readline())
    descriptor = os.open(order["part"], os.O_WRONLY)
    try:
        work = _Work(_request(order["url"], order["token"]), descriptor, int(order["size"]), orders)
        await _serve(name, work, order["openssh"])
    finally:
        os.close(descriptor)


async def _serve(name: str, work: _Work, words: Sequence[str]) -> None:
    """Fetch over the `ssh` that is installed; where it gets no connection, over ours, which takes longer to load."""
    if words and await work.serve(partial(piped, words)):
        return
    from raylaunch.cluster.reach.lane_ssh import connected, installed  # noqa: PLC0415 -- as just said

    if not words and (found := installed(name)) and await work.serve(partial(piped, found)):
        return
    async with connected(name) as connect:
        if not await work.serve(connect):
            msg = "the controller does not answer over a connection of its own"
            raise TransferError(msg)


@dataclass
class _Work:
    """What the streams of a lane share."""

    request: bytes
    descriptor: int
    size: int
    orders: asyncio.StreamReader
    _reading: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def serve(self, connect: Connect) -> bool:
        """Fetch what is ordered over connections of this kind; False, with nothing done, where there is none.

        Raises:
            RaylaunchError: one broke.
        """
        async with AsyncExitStack() as stack:
            streams = [_Stream(self.descriptor, self.size) for _ in range(STREAMS)]
            calls = [await stack.enter_async_context(connect(stream.feed)) for stream in streams]
            try:
                await streams[0].fetch(calls[0], self.request, 0, 1)
            except TransferError:
                return False
            _say("ready")
            tasks = [asyncio.ensure_future(self._all(*pair)) for pair in zip(streams, calls, strict=True)]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
        return True

    async def _all(self, stream: _Stream, call: _Call) -> None:
        """Fetch one range after the other, until no more are wanted."""
        while line := await self._order():
            offset, length = map(int, line.split())
            await stream.fetch(call, self.request, offset, length)
            _say(f"done {offset}")

    async def _order(self) -> bytes:
        async with self._reading:
            return await self.orders.readline()


def _request(url: str, token: str) -> bytes:
    lines = (f"GET {url} HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {token}", "Accept-Encoding: identity")
    return "".join(f"{line}\r\n" for line in lines).encode()


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(argv: list[str]) -> int:
    """Serve one download."""
    os.umask(0o077)
    try:
        asyncio.run(run(argv[0]))
    except RaylaunchError as error:
        sys.stderr.write(f"lane: {error}\n")
        return 1
    except BrokenPipeError:  # nobody wants it any more
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
