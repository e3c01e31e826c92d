"""The two pipes between the controller and a program that links it to Ray: a line of JSON is a frame."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping
from typing import BinaryIO, NoReturn, cast

from raylaunch.controller.link import error_frame
from raylaunch.errors import RaylaunchError

_MOST_WAITING = 64 * 1024 * 1024
"""Bytes of frames that may wait for the controller to read them."""
_LAST_WORDS_S, _LOOK_S = 2.0, 0.01


class Stdout:
    """The frames' way to the controller. Ray's core may print to descriptor 1, so the pipe moves to another.

    A thread writes to it: a controller that does not read for a while must not hold up what happens here.
    """

    def __init__(self) -> None:
        self._file: BinaryIO = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)
        self._lines: queue.Queue[bytes] = queue.Queue()
        self._lock = threading.Lock()
        self._waiting_bytes = 0
        threading.Thread(target=self._write, name="stdout", daemon=True).start()

    def send(self, frame: Mapping[str, object]) -> None:
        """Pass one frame on; it is written soon."""
        line = json.dumps(frame, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            self._waiting_bytes += len(line)
            too_many = self._waiting_bytes > _MOST_WAITING
        if too_many:  # the controller hangs; the next one starts another link and is told everything again
            os._exit(1)
        self._lines.put(line)

    def fail(self, why: str) -> NoReturn:
        """Say why the link is down, and end within a moment: Ray's own threads may hang."""
        self.send({"event": "down", "why": why})
        until = time.monotonic() + _LAST_WORDS_S
        while self._waiting_bytes and time.monotonic() < until:
            time.sleep(_LOOK_S)
        os._exit(1)

    def _write(self) -> None:
        while True:
            line = self._lines.get()
            try:
                self._file.write(line)
                self._file.flush()
            except OSError:
                os._exit(0)
            with self._lock:
                self._waiting_bytes -= len(line)


class Stdin:
    """The controller's frames. When they end the controller is gone: this process ends, whatever it does then."""

    def __init__(self) -> None:
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="stdin", daemon=True).start()

    def next(self) -> dict[str, object]:
        """Wait for the next frame, and return it."""
        return cast("dict[str, object]", json.loads(self._lines.get()))

    def _read(self) -> None:
        for line in sys.stdin.buffer:
            self._lines.put(line)
        os._exit(0)


async def serve_all(methods: Mapping[str, Callable[..., Awaitable[object]]], stdin: Stdin, stdout: Stdout) -> None:
    """Answer requests for ever, each in a task of its own."""
    tasks: set[asyncio.Task[None]] = set()
    while True:
        task = asyncio.create_task(_serve(methods, await asyncio.to_thread(stdin.next), stdout))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


async def _serve(
    methods: Mapping[str, Callable[..., Awaitable[object]]], request: Mapping[str, object], stdout: Stdout
) -> None:
    answer: dict[str, object]
    try:
        method = methods[str(request["method"])]
        params = cast("dict[str, object]", request["params"])
        answer = {"result": await method(**params)}
    except RaylaunchError as error:
        answer = {"error": error_frame(error)}
    except Exception as error:  # noqa: BLE001 -- the top of one request
        traceback.print_exc()
        message = f"the link failed at {request['method']}: {str(error).partition(chr(10))[0]}"
        answer = {"error": error_frame(RaylaunchError(message, hint="see the link's log"))}
    stdout.send({"id": request["id"], **answer})
