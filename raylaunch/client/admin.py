"""What operators and admins ask of a cluster over HTTP: its hosts, and who may come in."""

from __future__ import annotations

from urllib.parse import quote

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from raylaunch.client.transport import Transport
from raylaunch.models.cluster import Admission, HostJobs, Invitation, Quiet, TokenView
from raylaunch.models.fields import Count


class _Revoked(TypedDict):
    revoked: Count


class Admin:
    """The part of a `raylaunch.client.client.Client` that is about hosts and people.

    All verbs raise `AccessError` when the token's role is less than what they take.
    """

    def __init__(self, wire: Transport) -> None:
        self._wire = wire

    async def host_jobs(self, host: str) -> HostJobs:
        """Return what runs on a host, and whether it is drained."""
        return await self._wire.model(HostJobs, "GET", f"/v1/hosts/{quote(host, safe='')}")

    async def drain(self, host: str, *, until: float | None = None, stop: bool = False) -> HostJobs:
        """Let no attempt begin on a host until a time (seconds since the epoch), or until `undrain`.

        With `stop`, what runs there is stopped, each job with its own grace, and queued again.
        """
        body: dict[str, object] = {"until": until, "stop": stop}
        return await self._wire.model(HostJobs, "POST", f"/v1/hosts/{quote(host, safe='')}/drain", body=body)

    async def undrain(self, host: str) -> HostJobs:
        """Let a host take jobs again."""
        return await self._wire.model(HostJobs, "DELETE", f"/v1/hosts/{quote(host, safe='')}/drain")

    async def quiet(self, *, limit_s: float | None = None, stop: bool = False) -> Quiet:
        """Say what runs; with `limit_s`, let no attempt begin for so long, or until `loud`.

        With `stop`, what runs is stopped, each job with its own grace, and queued again.
        """
        if limit_s is None:
            return await self._wire.model(Quiet, "GET", "/v1/quiet")
        return await self._wire.model(Quiet, "POST", "/v1/quiet", body={"limit_s": limit_s, "stop": stop})

    async def loud(self) -> Quiet:
        """Let attempts begin again."""
        return await self._wire.model(Quiet, "DELETE", "/v1/quiet")

    async def tokens(self) -> tuple[TokenView, ...]:
        """Return who may come in, and who is invited."""
        answer = await self._wire.ask("GET", "/v1/tokens")
        return answer.read(TypeAdapter(tuple[TokenView, ...]))

    async def invite(
        self, person: str, role: str, *, valid_s: float, token_expires_at: float | None = None
    ) -> Invitation:
        """Invite a person; the code is good once, for `valid_s` seconds."""
        body: dict[str, object] = {
            "person": person,
            "role": role,
            "valid_s": valid_s,
            "token_expires_at": token_expires_at,
        }
        return await self._wire.model(Invitation, "POST", "/v1/tokens", body=body)

    async def revoke(self, who: str) -> int:
        """Take back a person's tokens and invitations, or one by its id; return how many those were."""
        answer = await self._wire.ask("DELETE", f"/v1/tokens/{quote(who, safe='')}")
        return answer.read(TypeAdapter(_Revoked))["revoked"]

    async def take(self, sha256: str) -> Admission:
        """Take an invitation, where the connection's token is its code; `sha256` is that of a token made here."""
        return await self._wire.model(Admission, "POST", "/v1/join", body={"sha256": sha256})
