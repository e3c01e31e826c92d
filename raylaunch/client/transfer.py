"""Bytes to the cluster: uploads that go on where they stopped, and are verified at the end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from raylaunch.client.transport import Response, Transport
from raylaunch.errors import TransferError
from raylaunch.models.fields import Count

if TYPE_CHECKING:
    from raylaunch.client.packing import Packed

OnProgress = Callable[[str, int, int], None]
"""Called with what travels, bytes done, and bytes in all."""
Patient = Callable[[Callable[[], Awaitable[Response]]], Awaitable[Response]]
"""Repeats a request while nothing answers."""

CHUNK = 8 * 1024 * 1024
_CONFLICT = 409


class _Have(TypedDict):
    have: Count
    complete: bool


_HAVE = TypeAdapter(_Have)


def no_progress(_what: str, _done: int, _total: int, /) -> None:
    """Show nothing."""


async def send_it(_bytes: int) -> None:
    """Let every upload begin."""


async def upload(  # noqa: PLR0913 -- what goes where, and who is told
    wire: Transport,
    packed: Packed,
    *,
    patient: Patient,
    on_begin: Callable[[int], Awaitable[None]] = send_it,
    on_progress: OnProgress = no_progress,
    what: str = "code",
) -> int:
    """Send a package unless the cluster has it, from where an earlier upload stopped. Return the bytes sent.

    `what` is told of progress, and `on_begin` how many bytes are to be sent, before the first.

    Raises:
        TransferError: it did not arrive as it was sent.
    """
    path = f"/v1/packages/{packed.sha256}"
    answer = await patient(lambda: wire.ask("HEAD", path))
    have, sent = answer.number("X-Have"), 0
    if answer.header("X-Complete") == "1":
        return 0
    await on_begin(packed.bytes - have)
    while True:
        on_progress(what, have, packed.bytes)
        packed.file.seek(have)
        data = packed.file.read(CHUNK)
        answer = await _put(wire, path, packed.bytes, have, data, patient=patient)
        if answer.status == _CONFLICT:
            have = _other_offset(answer, have)  # an answer was lost on the way, or somebody else sends the same
            continue
        facts = answer.read(_HAVE)
        sent, have = sent + len(data), facts["have"]
        if facts["complete"]:
            on_progress(what, packed.bytes, packed.bytes)
            return sent


async def _put(  # noqa: PLR0913 -- what goes where
    wire: Transport, path: str, total: int, offset: int, data: bytes, *, patient: Patient
) -> Response:
    params = {"offset": offset, "total": total}
    return await patient(lambda: wire.ask("PUT", path, params=params, content=data, allowed=(_CONFLICT,)))


def _other_offset(answer: Response, offset: int) -> int:
    have = answer.number("X-Have", offset)
    if have == offset:
        msg = f"the cluster refused the code at byte {offset} and did not say where to go on"
        raise TransferError(msg, hint="repeat the command")
    return have
