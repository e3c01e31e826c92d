"""Inviting people to a cluster, and joining one by an invitation; for every interface."""

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
    connection: ClusterConnection, person: str, role: str, *, valid_s: float, token_expires_at: float | None
) -> tuple[str, float]:
    """Invite a person to a cluster of hosts; return the command that they run, and when it expires.

    Args:
        connection: the cluster.
        person: their name, shown next to their jobs.
        role: viewer, trainer, operator or admin.
        valid_s: how long the code is valid.
        token_expires_at: when their token expires, seconds since the epoch; None for never.

    Raises:
        ConflictError: the cluster is reachable only from this machine.
        AccessError: the caller is not an admin, or somebody else runs the cluster.
        SpecError: the name or the role is invalid.
    """
    check_hosts(connection.spec)
    async with connection.client() as client:
        record, tunnel = joined.own_records(connection.spec.name)
        invitation = await client.admin.invite(person, role, valid_s=valid_s, token_expires_at=token_expires_at)
    return joined.join_line(invitation, record, tunnel), invitation.expires_at


def check_hosts(spec: ClusterSpec) -> None:
    """Check that others can reach a cluster. Pure.

    Raises:
        ConflictError: it is reachable only from this machine.
    """
    if spec.kind != "ssh":
        msg = f"cluster {spec.name} listens on this machine's loopback, for the account that started it"
        hint = "to share it, make a cluster of one host: raylaunch init NAME HOST, then raylaunch up"
        raise ConflictError(msg, hint=hint)


async def join(name: str, host: dict[str, object], *, port: int, code: str) -> Admission:
    """Join a cluster by an invitation; afterwards it is used like any other.

    Args:
        name: the cluster's name.
        host: its head, as in cluster.yaml.
        port: the controller's port on the head's loopback.
        code: the code of the invitation.

    Raises:
        HostError: the head cannot be reached, or refuses this account.
        AccessError: the code is invalid, was used, or has expired.
        ConflictError: a cluster of this name was started from here.
    """
    work = joined.InvitationJoin(name, host, port)
    try:
        endpoint = await work.reach(code)
        async with Client(endpoint, cluster=name) as client:
            admission = await client.admin.accept(work.sha256)
        async with Client(work.with_own_token(endpoint), cluster=name) as client:
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
    """Make a cluster the default if none was chosen and `cwd` has no cluster.yaml; return whether it is now."""
    link = chosen_file(os.environ)
    if link.is_file() or (cwd / "cluster.yaml").is_file():
        return False
    replace_link(link, kept_file(name, os.environ))
    return True
