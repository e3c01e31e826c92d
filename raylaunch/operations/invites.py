"""People come in: inviting, and taking an invitation, for every door."""

from __future__ import annotations

import os
from pathlib import Path

import anyio

from raylaunch.client.client import Client
from raylaunch.cluster.hosts import joined
from raylaunch.config.load import chosen_file, kept_file
from raylaunch.errors import AccessError, ConflictError
from raylaunch.files import replace_link
from raylaunch.models.cluster import Admission, RayAccess
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.operations.connect import ClusterConnection


async def invite(
    place: ClusterConnection, person: str, role: str, *, valid_s: float, token_expires_at: float | None
) -> tuple[str, float]:
    """Invite a person to a cluster of hosts; return the command that she pastes, and when its code is over.

    Args:
        place: the cluster.
        person: her name, as it stands beside her jobs.
        role: viewer, trainer, operator or admin.
        valid_s: for how long the code is good.
        token_expires_at: when the token is over that she gets, seconds since the epoch; None for never.

    Raises:
        ConflictError: the cluster is on this machine alone.
        AccessError: the caller is no admin, or somebody else runs the cluster.
        SpecError: that is no name, or no role.
    """
    check_hosts(place.spec)
    async with place.client() as client:
        record, tunnel = joined.ours(place.spec.name)
        invitation = await client.admin.invite(person, role, valid_s=valid_s, token_expires_at=token_expires_at)
    return joined.join_line(invitation, record, tunnel), invitation.expires_at


def check_hosts(spec: ClusterSpec) -> None:
    """Check that others can reach a cluster at all. Pure.

    Raises:
        ConflictError: it is on this machine alone.
    """
    if spec.kind != "ssh":
        msg = f"cluster {spec.name} listens on this machine's loopback, for the account that started it"
        hint = "for others make a cluster of one host: raylaunch init NAME HOST, then raylaunch up"
        raise ConflictError(msg, hint=hint)


async def join(name: str, host: dict[str, object], *, port: int, code: str) -> Admission:
    """Join a cluster by an invitation; afterwards it is used from here as any other.

    Args:
        name: the cluster's name.
        host: its head, as in cluster.yaml.
        port: the controller's, on the head's loopback.
        code: the invitation's.

    Raises:
        HostError: the head cannot be reached, or does not let this account in.
        AccessError: the code is none, was taken, or its time is over.
        ConflictError: a cluster of this name was brought up from here.
    """
    work = joined.InvitationJoin(name, host, port)
    try:
        reach = await work.reach(code)
        async with Client(reach, cluster=name) as client:
            admission = await client.admin.take(work.sha256)
        async with Client(work.way(reach), cluster=name) as client:
            await work.admitted(admission, await _ray(client))
    except BaseException:
        with anyio.CancelScope(shield=True):
            await work.undo()
        raise
    return admission


async def _ray(client: Client) -> RayAccess | None:
    try:
        return await client.ray_access()
    except AccessError:
        return None


def choose(name: str, *, cwd: Path) -> bool:
    """Let a cluster be the one that is meant, if no other was chosen and none is described here; say whether it is."""
    link = chosen_file(os.environ)
    if link.is_file() or (cwd / "cluster.yaml").is_file():
        return False
    replace_link(link, kept_file(name, os.environ))
    return True
