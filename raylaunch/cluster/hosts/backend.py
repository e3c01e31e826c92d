"""Clusters of hosts over SSH: Ray and the controller run there, a tunnel runs here."""

from __future__ import annotations

from collections.abc import Callable

from raylaunch.cluster.client_record import ClientRecord, load_client, save_client
from raylaunch.cluster.hosts.tunnel_client import ensure_tunnel
from raylaunch.cluster.ports import LOOPBACK
from raylaunch.cluster.tls import variables_of
from raylaunch.cluster.trust import check_accepted
from raylaunch.cluster.types import IF_UNKNOWN, DownReport, Endpoint, Plan, Step
from raylaunch.errors import (
    ClusterDownError,
    RaylaunchError,
)
from raylaunch.models.cluster import ClusterStatus, ControllerStatus
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.paths import ClusterPaths, cluster_paths
from raylaunch.ssh.target import OnPrompt

_LOCK_S = 1800.0


def _paths(spec: ClusterSpec | str) -> ClusterPaths:
    return cluster_paths(spec if isinstance(spec, str) else spec.name)


def _known(spec: ClusterSpec | str) -> tuple[ClusterPaths, ClientRecord]:
    paths = _paths(spec)
    record = load_client(paths)
    if record is None or record.wanted != "running" or not record.token:
        msg = f"cluster {paths.name} was not brought up from this machine, or is down"
        raise ClusterDownError(msg, hint="bring it up: raylaunch up")
    return paths, record


async def reach(spec: ClusterSpec | str, /) -> Endpoint:
    """Return the tunnel's URL here, and the token; start the tunnel if it does not run.

    Raises:
        ClusterDownError: the cluster is not up as far as this machine knows, or its head cannot be reached.
    """
    paths, record = _known(spec)
    tunnel = await ensure_tunnel(paths)
    return Endpoint(
        url=f"http://{LOOPBACK}:{tunnel.ports['controller']}",
        token=record.token,
        dashboard_url=f"http://{LOOPBACK}:{tunnel.ports['dashboard']}",
        gcs_address=f"{LOOPBACK}:{tunnel.ports['gcs']}" if "gcs" in tunnel.head_ports else "",
        ray_tls=variables_of(paths, client=True),
        over_ssh=True,
    )


async def forward_gcs(name: str) -> None:
    """Forward the GCS, Ray's own port, through the tunnel too, until the cluster is taken down.

    Raises:
        ClusterDownError: the cluster is not up as far as this machine knows, or its head cannot be reached.
    """
    paths, record = _known(name)
    if not record.gcs:
        save_client(paths, record.with_(gcs=True))
        await ensure_tunnel(paths, fresh=True)


async def status(spec: ClusterSpec | str, /) -> ClusterStatus:
    """Return the cluster's status. Starts the tunnel if necessary, and changes nothing else."""
    paths = _paths(spec)
    record = load_client(paths)
    if record is None or record.wanted != "running":
        return not_up(paths.name, record)
    try:
        tunnel = await ensure_tunnel(paths)
    except RaylaunchError as error:
        return ClusterStatus(name=paths.name, kind="ssh", state="degraded", problems=(error.message,))
    from raylaunch.cluster.local.controller_process import controller_status  # noqa: PLC0415 -- commands about jobs do not need it

    says = await controller_status(tunnel.ports["controller"], record.token)
    if isinstance(says, str):
        return unanswered(record, says)
    return status_of(record, says)


def not_up(name: str, record: ClientRecord | None) -> ClusterStatus:
    """Return the status of a cluster that is not up as far as this machine knows. Pure."""
    said = f"not started from this machine; {IF_UNKNOWN}" if record is None else ""
    if record is not None and record.hosts:
        where = ", ".join(record.hosts)
        said = f"an up or a down was interrupted: parts of it may run on {where}; raylaunch down ends them"
    return ClusterStatus(name=name, kind="ssh", state="stopped", problems=(said,) if said else ())


def unanswered(record: ClientRecord, why: str) -> ClusterStatus:
    """Return the status of a cluster whose tunnel is up and whose controller does not answer. Pure."""
    head = record.head or record.spec.host_specs()[0].name
    problem = (
        f"{head} cannot be reached, or its controller is not responding and is being restarted there ({why}); "
        "jobs on other hosts continue; their state is shown once it answers again"
    )
    return ClusterStatus(name=record.spec.name, kind="ssh", state="degraded", problems=(problem,))


def status_of(record: ClientRecord, says: ControllerStatus) -> ClusterStatus:
    """Combine the spec's hosts with the nodes that the controller sees. Pure."""
    hosts = () if record.joined else record.spec.host_specs()
    living = {node.hostname for node in says.nodes if node.alive}
    missing = [f"{host.name}: is not in the Ray cluster" for host in hosts if host.name not in living]
    dead = () if says.ray == "up" else ("the controller does not reach Ray",)
    problems = (*dead, *missing, *says.problems)
    return ClusterStatus(
        name=record.spec.name,
        kind="ssh",
        state="degraded" if missing or dead else "running",
        problems=problems,
        nodes=says.nodes,
        queued=says.queued,
        running=says.running,
        store=says.store,
        store_free=says.store_free,
        gpus_logical=isinstance(record.spec.gpus, int) and record.spec.gpus > 0,
        owner=record.owner or record.spec.host_specs()[0].name,
    )


async def plan(spec: ClusterSpec, /, *, on_prompt: OnPrompt | None = None) -> Plan:
    """Return what `up` would do: every host is probed, and nothing is changed.

    Raises:
        UntrustedError: nobody has accepted its hosts.
    """
    from raylaunch.cluster.hosts import bring_up  # noqa: PLC0415 -- it loads asyncssh, which takes longer than a command about jobs

    await check_accepted(spec, on_prompt=on_prompt)
    return await bring_up.plan(spec, on_prompt=on_prompt)


async def up(
    spec: ClusterSpec, /, *, on_step: Callable[[Step], None], on_prompt: OnPrompt | None = None
) -> ClusterStatus:
    """Bring every host into the cluster; healthy parts that run stay as they are.

    Raises:
        ClusterStartError: a host or a check failed; the message lists them. Hosts that came up stay up, and the next
            `up` continues from there.
        UntrustedError: nobody has accepted its hosts.
    """
    from raylaunch.cluster.hosts import bring_up  # noqa: PLC0415 -- as above

    await check_accepted(spec, on_prompt=on_prompt)
    await bring_up.up(spec, on_step=on_step, on_prompt=on_prompt)
    return await status(spec)


async def down(spec: ClusterSpec | str, /, *, on_prompt: OnPrompt | None = None) -> DownReport:
    """End exactly what `up` started, on every host, and return when no process is left.

    Raises:
        ClusterError: a host could not be reached or something could not be ended; the others are down.
    """
    from raylaunch.cluster.hosts import bring_up  # noqa: PLC0415 -- as above

    return await bring_up.down(spec if isinstance(spec, str) else spec.name, on_prompt=on_prompt)
