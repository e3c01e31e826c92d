"""Uploads to the cluster: they continue where they stopped and are verified at the end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from typing_extensions import TypedDict

from raylaunch.client.transport import Response, Transport
from raylaunch.errors import TransferError
from raylaunch.models.fields import Count

if TYPE_CHECKING:
    from raylaunch.client.packing import Packed

OnProgress = Callable[[str, int, int], None]
"""Called with the name of the transfer, the bytes done, and the total bytes."""
Retry = Callable[[Callable[[], Awaitable[Response]]], Awaitable[Response]]
"""Retries a request while there is no response."""

CHUNK = 8 * 1024 * 1024
_CONFLICT = 409


class _Have(TypedDict):
    have: Count
    complete: bool


def no_progress(_what: str, _done: int, _total: int, /) -> None:
    """Show nothing."""


async def allow_upload(_bytes: int) -> None:
    """Allow every upload."""


async def upload(  # noqa: PLR0913 -- what goes where, and callbacks
    transport: Transport,
    packed: Packed,
    *,
    retry: Retry,
    on_start: Callable[[int], Awaitable[None]] = allow_upload,
    on_progress: OnProgress = no_progress,
    what: str = "code",
) -> int:
    """Send a package unless the cluster has it, starting where an earlier upload stopped; return the bytes sent.

    `what` is its name for `on_progress`; `on_start` is called with the number of bytes to send, before the first.

    Raises:
        TransferError: it did not arrive as it was sent.
    """
    path = f"/v1/packages/{packed.sha256}"
    answer = await retry(lambda: transport.request("HEAD", path))
    have, sent = answer.number("X-Have"), 0
    if answer.header("X-Complete") == "1":
        return 0
    await on_start(packed.bytes - have)
    while True:
        on_progress(what, have, packed.bytes)
        packed.file.seek(have)
        data = packed.file.read(CHUNK)
        answer = await _put(transport, path, packed.bytes, have, data, retry=retry)
        if answer.status == _CONFLICT:
            have = _other_offset(answer, have)  # a response was lost, or somebody else is sending the same package
            continue
        facts = answer.read(_Have)
        sent, have = sent + len(data), facts["have"]
        if facts["complete"]:
            on_progress(what, packed.bytes, packed.bytes)
            return sent


async def _put(  # noqa: PLR0913 -- what goes where
    transport: Transport, path: str, total: int, offset: int, data: bytes, *, retry: Retry
) -> Response:
    params = {"offset": offset, "total": total}
    return await retry(lambda: transport.request("PUT", path, params=params, content=data, allowed=(_CONFLICT,)))


def _other_offset(answer: Response, offset: int) -> int:
    have = answer.number("X-Have", offset)
    if have == offset:
        msg = f"the cluster refused the code at byte {offset} and did not report where to continue"
        raise TransferError(msg, hint="repeat the command")
    return have
