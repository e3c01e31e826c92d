"""One event loop in a thread of its own: blocking calls work in a script and inside a notebook's running loop alike."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import AsyncGenerator, Coroutine, Generator, Iterable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from raylaunch.sdk.async_cluster import AsyncCluster

_Result = TypeVar("_Result")

_CLEAN_UP_S = 5.0
"""How long a cancelled call may take to release what it holds."""


class LoopThread:
    """A running event loop in a daemon thread."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._ended = False
        self._open: set[AsyncCluster] = set()
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
        ended = threading.Event()
        call = asyncio.run_coroutine_threadsafe(_noting_its_end(work, ended), self._loop)
        try:
            return call.result()
        except BaseException:  # also Ctrl-C, or what another signal's handler raises here
            if call.cancel():
                ended.wait(_CLEAN_UP_S)
            raise

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

    def keep(self, holder: AsyncCluster) -> None:
        """Close this at Python's exit, unless it was closed before."""
        self._open.add(holder)

    def close(self, holder: AsyncCluster) -> None:
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


async def _noting_its_end(work: Coroutine[None, None, _Result], ended: threading.Event) -> _Result:
    try:
        return await work
    finally:
        ended.set()


async def _wind_down(still_open: Iterable[AsyncCluster]) -> None:
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
