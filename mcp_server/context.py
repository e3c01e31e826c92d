"""One call of a tool: the way to the cluster, and news to whoever waits for the answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NamedTuple

from mcp_server.policy import Roots
from raylaunch.client.client import Client
from raylaunch.client.sensitive import NO_MORE, Allowances
from raylaunch.cluster.types import Step
from raylaunch.config.load import load_cluster_file
from raylaunch.operations.connect import ClusterConnection

_log = logging.getLogger(__name__)

PATIENCE_S = 30.0
"""How long a call outlasts a controller that is away: it restarts in a few seconds."""
NEWS_EVERY_S = 2.0


class ToolProgress(NamedTuple):
    """How far a call is: in what unit is the tool's to choose, but it never falls."""

    done: float
    total: float | None
    message: str


Tell = Callable[[ToolProgress], Awaitable[None]]
"""Sends a progress notification; does nothing where the client asked for none."""


class ToolCall:
    """One call.

    Args:
        restarts: whether a cluster that should run and does not is started again.
        tell: sends news to the client.
        roots: the folders that path arguments may lead into.
        allow: what a person lets through of a working directory.
    """

    def __init__(self, *, restarts: bool, tell: Tell, roots: Roots, allow: Allowances = NO_MORE) -> None:
        self.roots = roots
        self.allow = allow
        self._restarts = restarts
        self._tell = tell
        self._last = 0.0
        self._healing = ""

    def place(self) -> ClusterConnection:
        """Return the cluster that applies where the server was started.

        Raises:
            SpecError: its file cannot be read, or says something that cannot be.
        """
        return ClusterConnection(
            load_cluster_file(quoted=False).spec, on_notice=self._notice, on_step=self._step, restarts=self._restarts
        )

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        """Yield a client of that cluster, and say what is healed meanwhile.

        Raises:
            ClusterDownError: there is no cluster.
        """
        async with contextlib.AsyncExitStack() as stack:
            async with self.telling(lambda: ToolProgress(self._last, None, self._healing) if self._healing else None):
                client = await stack.enter_async_context(self.place().client(patience_s=PATIENCE_S))
            yield client

    @contextlib.asynccontextmanager
    async def telling(
        self, news: Callable[[], ToolProgress | None], *, every_s: float = NEWS_EVERY_S
    ) -> AsyncIterator[None]:
        """Send what `news` returns, again and again, while the block runs."""

        async def repeat() -> None:
            while True:
                await asyncio.sleep(every_s)
                if (said := news()) is not None:
                    await self.tell(said)

        task = asyncio.ensure_future(repeat())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def tell(self, news: ToolProgress) -> None:
        """Send news now. The figure always grows, as the protocol asks for."""
        self._last = news.done if news.done > self._last else self._last + 0.001
        await self._tell(news._replace(done=self._last))

    def _notice(self, sentence: str) -> None:
        _log.warning("%s", sentence)
        self._healing = sentence

    def _step(self, step: Step) -> None:
        self._notice(str(step))
