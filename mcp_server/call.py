"""One call of a tool: the way to the cluster, and news to whoever waits for the answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

from raylaunch.client import Client
from raylaunch.cluster.backends import Step
from raylaunch.config import load_cluster_spec
from raylaunch.errors import SpecError
from raylaunch.place import Place

_log = logging.getLogger(__name__)

PATIENCE_S = 30.0
"""How long a call outlasts a controller that is away: it restarts in a few seconds."""
NEWS_EVERY_S = 2.0


class News(NamedTuple):
    """How far a call is: in what unit is the tool's to choose, but it never falls."""

    done: float
    total: float | None
    message: str


Tell = Callable[[News], Awaitable[None]]
"""Sends a progress notification; does nothing where the client asked for none."""


class Call:
    """One call.

    Args:
        heals: whether a cluster that should run and does not is started again.
        tell: sends news to the client.
    """

    def __init__(self, *, heals: bool, tell: Tell) -> None:
        self._heals = heals
        self._tell = tell
        self._last = 0.0
        self._healing = ""

    def place(self) -> Place:
        """Return the cluster that applies where the server was started.

        Raises:
            SpecError: its file cannot be read, or says something that cannot be.
        """
        return Place(load_cluster_spec(), on_notice=self._notice, on_step=self._step, heals=self._heals)

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        """Yield a client of that cluster, and say what is healed meanwhile.

        Raises:
            ClusterDownError: there is no cluster.
        """
        async with self.telling(lambda: News(self._last, None, self._healing) if self._healing else None):
            manager = self.place().client(patience_s=PATIENCE_S)
            client = await manager.__aenter__()
        try:
            yield client
        finally:
            await manager.__aexit__(None, None, None)

    @contextlib.asynccontextmanager
    async def telling(self, news: Callable[[], News | None], *, every_s: float = NEWS_EVERY_S) -> AsyncIterator[None]:
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
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def tell(self, news: News) -> None:
        """Send news now. The figure always grows, as the protocol asks for."""
        self._last = news.done if news.done > self._last else self._last + 0.001
        await self._tell(news._replace(done=self._last))

    def _notice(self, sentence: str) -> None:
        _log.warning("%s", sentence)
        self._healing = sentence

    def _step(self, step: Step) -> None:
        self._notice(str(step))


def here() -> Path:
    """Return the folder that relative paths are relative to: where the server was started."""
    return Path.cwd()


def local_path(text: str, *, field: str) -> Path:
    """Return an absolute path of this machine, without links.

    Raises:
        SpecError: it cannot be one; or it is a home or root folder itself, which no tool takes as a whole.
    """
    try:
        path = (here() / Path(text).expanduser()).resolve()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        msg = f"{field}: {text[:80]!r} cannot be a path here: {why}"
        raise SpecError(msg, field=field, hint="name a folder or file of this machine, as models/digits") from None
    if path in {Path("/"), Path.home().resolve()}:
        msg = f"{field}: {path} as a whole is not what is meant"
        raise SpecError(msg, field=field, hint="name a folder inside it, as models/digits")
    return path
