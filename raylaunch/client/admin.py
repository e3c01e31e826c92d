"""The requests of operators and admins over HTTP: hosts, pauses, tokens and invitations."""

from __future__ import annotations

from urllib.parse import quote

from typing_extensions import TypedDict

from raylaunch.client.transport import Transport
from raylaunch.models.cluster import Admission, HostJobs, Invitation, Quiet, TokenView
from raylaunch.models.fields import Count


class _Revoked(TypedDict):
    revoked: Count


class Admin:
    """The part of a `raylaunch.client.client.Client` that is about hosts and people.

    All of them raise `AccessError` if the token's role is not sufficient.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def host_jobs(self, host: str) -> HostJobs:
        """Return the jobs that are running on a host, and whether it is drained."""
        return await self._transport.read(HostJobs, "GET", _of(host))

    async def drain(self, host: str, *, until: float | None = None, stop: bool = False) -> HostJobs:
        """Start no attempt on a host until a time (seconds since the epoch), or until `undrain`.

        With `stop`, running jobs are stopped, each with its own grace, and queued again.
        """
        body: dict[str, object] = {"until": until, "stop": stop}
        return await self._transport.read(HostJobs, "POST", f"{_of(host)}/drain", body=body)

    async def undrain(self, host: str) -> HostJobs:
        """End the drain of a host."""
        return await self._transport.read(HostJobs, "DELETE", f"{_of(host)}/drain")

    async def quiet(self, *, limit_s: float | None = None, stop: bool = False) -> Quiet:
        """Return the running jobs; with `limit_s`, start no attempt for that long, or until `resume`.

        With `stop`, running jobs are stopped, each with its own grace, and queued again.
        """
        if limit_s is None:
            return await self._transport.read(Quiet, "GET", "/v1/quiet")
        return await self._transport.read(Quiet, "POST", "/v1/quiet", body={"limit_s": limit_s, "stop": stop})

    async def resume(self) -> Quiet:
        """Start attempts again."""
        return await self._transport.read(Quiet, "DELETE", "/v1/quiet")

    async def tokens(self) -> tuple[TokenView, ...]:
        """Return all tokens and invitations."""
        return await self._transport.read(tuple[TokenView, ...], "GET", "/v1/tokens")

    async def invite(
        self, person: str, role: str, *, valid_s: float, token_expires_at: float | None = None
    ) -> Invitation:
        """Invite a person; the code works once, within `valid_s` seconds."""
        body: dict[str, object] = {
            "person": person,
            "role": role,
            "valid_s": valid_s,
            "token_expires_at": token_expires_at,
        }
        return await self._transport.read(Invitation, "POST", "/v1/tokens", body=body)

    async def revoke(self, who: str) -> int:
        """Revoke a person's tokens and invitations, or one by its id; return how many."""
        return (await self._transport.read(_Revoked, "DELETE", f"/v1/tokens/{quote(who, safe='')}"))["revoked"]

    async def accept(self, sha256: str) -> Admission:
        """Accept an invitation, whose code is the connection's token; `sha256` is that of a new token, made here."""
        return await self._transport.read(Admission, "POST", "/v1/join", body={"sha256": sha256})


def _of(host: str) -> str:
    return f"/v1/hosts/{quote(host, safe='')}"
