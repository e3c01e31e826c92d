"""One question to a server, mostly on loopback, and its answer. Standard library only, so that `up` stays quick."""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass

import anyio.to_thread

from raylaunch.cluster.ports import LOOPBACK
from raylaunch.version import __version__


@dataclass(frozen=True)
class Answer:
    """An HTTP answer. `status` is 0 when there was none, and `why` says what happened instead."""

    status: int
    body: bytes = b""
    why: str = ""

    @property
    def ok(self) -> bool:
        """Whether it is a 200."""
        return self.status == http.client.OK

    def json(self) -> object:
        """Return the body's JSON, or None if it is none."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None


async def ask(  # noqa: PLR0913 -- each is one fact of the question, and all are named
    port: int,
    path: str,
    *,
    token: str,
    host: str = LOOPBACK,
    limit_s: float = 5,
    method: str = "GET",
    body: bytes | None = None,
    secure: bool = False,
) -> Answer:
    """Ask for `path` at `port`, with a bearer token unless empty; a broken connection is an `Answer` too.

    With `secure` over https, with a certificate that this machine can verify.
    """
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection

    def get() -> Answer:
        connection = kind(host, port, timeout=limit_s)
        try:
            headers = {"X-Raylaunch-Version": __version__} | ({"Authorization": f"Bearer {token}"} if token else {})
            if body is not None:
                headers["Content-Type"] = "application/json"
            connection.request(method, path, body=body, headers=headers)
            response = connection.getresponse()
            return Answer(response.status, response.read())
        except (OSError, http.client.HTTPException) as error:
            return Answer(0, why=str(error) or type(error).__name__)
        finally:
            connection.close()

    return await anyio.to_thread.run_sync(get)
