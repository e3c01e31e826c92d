"""The two pipes between the controller and a program that links it to Ray: a line of JSON is a frame."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Mapping
from typing import BinaryIO, NoReturn, cast

from raylaunch.controller.link import error_frame
from raylaunch.errors import RaylaunchError


class Stdout:
    """The frames' way to the controller. Ray's core may print to descriptor 1, so the pipe moves to another."""

    def __init__(self) -> None:
        self._file: BinaryIO = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)
        self._lock = threading.Lock()

    def send(self, frame: Mapping[str, object]) -> None:
        """Write one frame."""
        line = json.dumps(frame, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            try:
                self._file.write(line)
                self._file.flush()
            except BrokenPipeError:
                os._exit(0)

    def fail(self, why: str) -> NoReturn:
        """Say why the link is down, and end at once: Ray's own threads may hang."""
        self.send({"event": "down", "why": why})
        os._exit(1)


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
