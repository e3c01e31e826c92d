"""The HTTP server: uvicorn, told to let those who wait for news go first when it shuts down."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn

from raylaunch.controller.app import create_app
from raylaunch.controller.services import Services

_LOOK_S = 0.25


class ApiServer(uvicorn.Server):
    """Serves the API. Set `should_exit` to end it: long polls and event streams then answer at once.

    Signals are the program's own matter: uvicorn's handlers are not installed.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        super().__init__(
            uvicorn.Config(
                create_app(services),
                http="h11",
                loop="asyncio",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=5,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to serve. Accepted connections inherit the option that is set here.

        Without it an answer's head waits 40 ms for the acknowledgement of the one before: asyncio sets it only on
        sockets that were made with the protocol number of TCP, which ready-made listeners are not.
        """
        for listener in sockets or []:
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await super().startup(sockets)

    async def main_loop(self) -> None:
        """Wait for the end. uvicorn's own loop wakes ten times a second, for a date in each answer and a limit."""
        await self.on_tick(0)
        while not self.should_exit:  # noqa: ASYNC110 -- uvicorn's own word for its end, and a plain attribute
            await asyncio.sleep(_LOOK_S)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wake everybody who waits, then end as uvicorn does."""
        self._services.closing.set()
        await super().shutdown(sockets)
