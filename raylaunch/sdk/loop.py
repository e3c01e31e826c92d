"""One event loop in a thread of its own: blocking calls work in a script and inside a notebook's running loop alike."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import AsyncGenerator, Coroutine, Generator, Iterable
from typing import Generic, Protocol, TypeVar

_Result = TypeVar("_Result")

_CLEAN_UP_S = 5.0
"""How long a cancelled call may take to release what it holds."""


class _Call(Generic[_Result]):
    """One coroutine on the loop, and a thread that waits for it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, work: Coroutine[None, None, _Result]) -> None:
        self._loop = loop
        self._done = threading.Event()
        self._task: asyncio.Task[_Result] | None = None
        loop.call_soon_threadsafe(self._start, work)

    def _start(self, work: Coroutine[None, None, _Result]) -> None:
        self._task = self._loop.create_task(work)
        self._task.add_done_callback(lambda _: self._done.set())

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def wait(self) -> _Result:
        try:
            self._done.wait()
        except BaseException:  # Ctrl-C, or whatever else a signal's handler raises here
            self._loop.call_soon_threadsafe(self._cancel)
            self._done.wait(_CLEAN_UP_S)
            raise
        if self._task is None:
            msg = "the call ended before it started"
            raise RuntimeError(msg)
        return self._task.result()


class Closable(Protocol):
    """An object with connections that belong to the loop."""

    async def close(self) -> None:
        """Close them."""


class LoopThread:
    """A running event loop in a daemon thread."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._ended = False
        self._open: set[Closable] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="raylaunch", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[None, None, _Result]) -> _Result:
        """Run `work` on the loop and wait for its result. Ctrl-C cancels it, and it cleans up.

        Raises:
            RuntimeError: called from the loop itself, for example by a callback, or at Python's exit.
        """
        if self._ended or threading.current_thread() is self._thread:
            work.close()
            own = "a callback cannot call raylaunch's blocking verbs; pass the result to a thread of your own"
            msg = "Python is exiting, and raylaunch's connections are closed" if self._ended else own
            raise RuntimeError(msg)
        return _Call(self._loop, work).wait()

    def each(self, source: AsyncGenerator[_Result, None]) -> Generator[_Result, None, None]:
        """Yield what an asynchronous generator yields; it is closed when the caller stops iterating."""
        try:
            while True:
                try:
                    item = self.run(_next(source))
                except StopAsyncIteration:
                    return
                yield item
        finally:
            if not self._ended:
                self.run(_closed(source))

    def keep(self, holder: Closable) -> None:
        """Close this at Python's exit, unless it was closed before."""
        self._open.add(holder)

    def close(self, holder: Closable) -> None:
        """Close this now; a second call, or one at Python's exit, does nothing."""
        if holder in self._open and not self._ended:
            self._open.discard(holder)
            self.run(holder.close())

    def end(self) -> None:
        """Cancel what still runs, let it clean up, and stop the thread."""
        if self._ended or os.getpid() != self.pid:
            return
        self._ended = True
        asyncio.run_coroutine_threadsafe(_wind_down(self._open), self._loop)
        self._thread.join(_CLEAN_UP_S)
        if not self._thread.is_alive():
            self._loop.close()


async def _wind_down(still_open: Iterable[Closable]) -> None:
    loop = asyncio.get_running_loop()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.gather(*(holder.close() for holder in still_open), return_exceptions=True)
    await loop.shutdown_asyncgens()
    loop.stop()


async def _closed(source: AsyncGenerator[_Result, None]) -> None:
    await source.aclose()


async def _next(source: AsyncGenerator[_Result, None]) -> _Result:
    return await source.__anext__()


_lock = threading.Lock()
_threads: list[LoopThread] = []


def shared_loop() -> LoopThread:
    """Return this process's loop; it is started when first needed, and again in a forked child."""
    with _lock:
        if not _threads or _threads[-1].pid != os.getpid():
            thread = LoopThread()
            _threads[:] = [thread]
            atexit.register(thread.end)
        return _threads[-1]
