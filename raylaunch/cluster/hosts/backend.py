"""Clusters of hosts over SSH: Ray and the controller run there, a tunnel runs here."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from raylaunch.cluster.client_record import (
    ClientRecord,
    HeadProgram,
    load_client,
    load_tunnel,
    refuse_joined,
    save_client,
)
from raylaunch.cluster.hosts.tunnel_client import START_S, end_tunnel, ensure_tunnel
from raylaunch.cluster.ports import LOOPBACK
from raylaunch.cluster.progress import ProgressReporter, locked
from raylaunch.cluster.record import cluster_lock
from raylaunch.cluster.tls import keep, variables_of
from raylaunch.cluster.trust import check_accepted
from raylaunch.cluster.types import IF_UNKNOWN, DownReport, Endpoint, Plan, Step
from raylaunch.errors import ClusterDownError, ClusterError, ClusterStartError, RaylaunchError, RayVersionError
from raylaunch.models.cluster import ClusterStatus, ControllerStatus
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.models.host_spec import HostSpec
from raylaunch.paths import ClusterPaths, cluster_paths, make_private_dir
from raylaunch.ssh.target import OnPrompt

if TYPE_CHECKING:
    from raylaunch.cluster.hosts.bootstrap import BootstrapOutcome
    from raylaunch.cluster.hosts.host_program import HostState

_LOCK_S = 1800.0


def _known(name: str) -> tuple[ClusterPaths, ClientRecord]:
    paths = cluster_paths(name)
    record = load_client(paths)
    if record is None or record.wanted != "running" or not record.token:
        msg = f"cluster {paths.name} was not brought up from this machine, or is down"
        raise ClusterDownError(msg, hint="bring it up: raylaunch up")
    return paths, record


async def reach(spec: ClusterSpec, /) -> Endpoint:
    """Return the tunnel's URL here, and the token; start the tunnel if it does not run.

    Raises:
        ClusterDownError: the cluster is not up as far as this machine knows, or its head cannot be reached.
    """
    paths, record = _known(spec.name)
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


async def status(spec: ClusterSpec, /) -> ClusterStatus:
    """Return the cluster's status. Starts the tunnel if necessary, and changes nothing else."""
    paths = cluster_paths(spec.name)
    record = load_client(paths)
    if record is None or record.wanted != "running":
        return not_up(paths.name, record)
    try:
        tunnel = await ensure_tunnel(paths)
    except RaylaunchError as error:
        return ClusterStatus(name=paths.name, kind="ssh", state="degraded", problems=(error.message,))
    from raylaunch.cluster.local.controller_process import controller_status  # noqa: PLC0415 -- commands about jobs do not need it

    controller = await controller_status(tunnel.ports["controller"], record.token)
    if isinstance(controller, str):
        return unanswered(record, controller)
    return status_of(record, controller)


def not_up(name: str, record: ClientRecord | None) -> ClusterStatus:
    """Return the status of a cluster that is not up as far as this machine knows. Pure."""
    problem = f"not started from this machine; {IF_UNKNOWN}" if record is None else ""
    if record is not None and record.hosts:
        where = ", ".join(record.hosts)
        problem = f"an up or a down was interrupted: parts of it may run on {where}; raylaunch down ends them"
    return ClusterStatus(name=name, kind="ssh", state="stopped", problems=(problem,) if problem else ())


def unanswered(record: ClientRecord, why: str) -> ClusterStatus:
    """Return the status of a cluster whose tunnel is up and whose controller does not answer. Pure."""
    head = record.head or record.spec.host_specs()[0].name
    problem = (
        f"{head} cannot be reached, or its controller is not responding and is being restarted there ({why}); "
        "jobs on other hosts continue; their state is shown once it answers again"
    )
    return ClusterStatus(name=record.spec.name, kind="ssh", state="degraded", problems=(problem,))


def status_of(record: ClientRecord, controller: ControllerStatus) -> ClusterStatus:
    """Combine the spec's hosts with the nodes that the controller sees. Pure."""
    hosts = () if record.joined else record.spec.host_specs()
    living = {node.hostname for node in controller.nodes if node.alive}
    missing = [f"{host.name}: is not in the Ray cluster" for host in hosts if host.name not in living]
    dead = () if controller.ray == "up" else ("the controller does not reach Ray",)
    problems = (*dead, *missing, *controller.problems)
    return ClusterStatus(
        name=record.spec.name,
        kind="ssh",
        state="degraded" if missing or dead else "running",
        problems=problems,
        nodes=controller.nodes,
        queued=controller.queued,
        running=controller.running,
        store=controller.store,
        store_free=controller.store_free,
        gpus_logical=isinstance(record.spec.gpus, int) and record.spec.gpus > 0,
        owner=record.owner or record.spec.host_specs()[0].name,
    )


async def plan(spec: ClusterSpec, /, *, on_prompt: OnPrompt | None = None) -> Plan:
    """Return what `up` would do, and why it would fail: every host is probed, and nothing is changed.

    Raises:
        UntrustedError: nobody has accepted its hosts.
    """
    from raylaunch.cluster.hosts.bootstrap import Bootstrap  # noqa: PLC0415 -- it loads asyncssh, which takes longer than a command about jobs

    await check_accepted(spec, on_prompt=on_prompt)
    outcome = await Bootstrap(spec, lambda _: None, on_prompt=on_prompt).plan()
    return Plan(
        cluster=spec.name,
        actions=tuple(f"{host}: {one}" for host, found in outcome.actions.items() for one in found),
        keeps=tuple(f"{host}: {one}" for host, found in outcome.keeps.items() for one in found),
        notes=tuple(f"{one.host}: {one.message}" for one in outcome.warnings),
        problems=tuple(_named(host, error) for host, error in outcome.errors.items()),
    )


def _named(host: str, error: RaylaunchError) -> str:
    return f"{host}: {str(error).removeprefix(f'{host}: ')}".replace("\n", "\n    ")


async def up(
    spec: ClusterSpec, /, *, on_step: Callable[[Step], None], on_prompt: OnPrompt | None = None
) -> ClusterStatus:
    """Bring every host into the cluster; healthy parts that run stay as they are.

    Raises:
        ClusterStartError: a host or a check failed; the message lists them. Hosts that came up stay up, and the next
            `up` continues from there.
        UntrustedError: nobody has accepted its hosts.
    """
    from raylaunch.cluster.doctor.examine import keep_problems  # noqa: PLC0415 -- as above
    from raylaunch.cluster.hosts.bootstrap import Bootstrap  # noqa: PLC0415 -- as above

    await check_accepted(spec, on_prompt=on_prompt)
    paths = cluster_paths(spec.name)
    refuse_joined(load_client(paths), "brought up")
    for folder in (paths.home, paths.home / "clusters", paths.root):
        make_private_dir(folder)
    async with locked(paths, on_step, limit_s=_LOCK_S) as report:
        had = load_client(paths)
        on_start = partial(_record_started, paths, spec)
        outcome = await Bootstrap(spec, report, on_prompt=on_prompt, on_start=on_start).run()
        keep_problems(spec, outcome.problems)
        await _verify(paths, spec, outcome, had, report)
    if outcome.errors:
        raise _failure(spec, outcome)
    return await status(spec)


def _record_started(paths: ClusterPaths, spec: ClusterSpec, host: HostSpec, program: HeadProgram) -> None:
    """Record that something may run on the host from now on, so that `down` ends it even if this `up` is killed."""
    had = load_client(paths) or ClientRecord(spec=spec, wanted="stopped", head=spec.host_specs()[0].name)
    hosts, programs = {**had.hosts, host.name: host}, {**had.programs, host.name: program}
    begun = tuple(dict.fromkeys([*had.begun, host.name]))
    save_client(paths, had.with_(hosts=hosts, programs=programs, begun=begun))


async def _verify(
    paths: ClusterPaths,
    spec: ClusterSpec,
    outcome: BootstrapOutcome,
    had: ClientRecord | None,
    report: ProgressReporter,
) -> None:
    """Connect to the cluster from here and verify it; failures are added to the outcome's errors.

    Raises:
        RaylaunchError: its head did not come up, or cannot be reached.
    """
    from raylaunch.cluster.hosts.verify import ClusterVerifier  # noqa: PLC0415 -- as above

    for one in outcome.warnings:
        report(Step(one.host or spec.name, "note", one.message))
    head = outcome.states.get(spec.host_specs()[0].name)
    if head is None:
        raise _failure(spec, outcome)
    if note := adopted(had, head, fresh=spec.host_specs()[0].name in outcome.fresh):
        report(Step(spec.host_specs()[0].name, "note", note))
    record = _save_record(paths, spec, outcome)
    tunnel = load_tunnel(paths)
    moved = tunnel is not None and record.head_ports != head.ports
    save_client(paths, record.with_(head_ports=head.ports))
    with report.during("tunnel", f"opening the tunnel to the controller on {record.head}"):
        tunnel = await ensure_tunnel(paths, fresh=moved, limit_s=START_S)
    proof = ClusterVerifier(tunnel.ports["controller"], record.token, spec.environment, outcome.states, on_step=report)
    await proof.nodes()
    unproved = outcome.states.keys() - set(record.proved)
    await proof.jobs(unproved)
    await proof.network(unproved)
    if unproved:
        await proof.wait_released()
    outcome.errors.update(proof.errors)
    proved = sorted(outcome.states.keys() - proof.errors.keys() - proof.unproved)
    save_client(paths, (load_client(paths) or record).with_(proved=tuple(proved)))


def adopted(had: ClientRecord | None, head: HostState, *, fresh: bool) -> str:
    """Return a note about a running cluster that another machine of this account started; else empty. Pure."""
    if fresh or (had is not None and had.cluster_id == head.cluster_id):
        return ""
    if had is not None and head.place.host in had.begun:  # by an `up` that was interrupted
        return ""
    return f"cluster {head.name} is already running, started by {head.owner} from another machine; using it"


def _save_record(paths: ClusterPaths, spec: ClusterSpec, outcome: BootstrapOutcome) -> ClientRecord:
    """Save the record; hosts that were up before and are no longer in the spec stay in it."""
    from raylaunch.cluster.hosts.bootstrap import CLIENT  # noqa: PLC0415 -- as above

    head = outcome.states[spec.host_specs()[0].name]
    had = load_client(paths)
    up_now = {host.name: host for host in spec.host_specs() if host.name in outcome.states}
    record = ClientRecord(
        spec=spec,
        cluster_id=head.cluster_id,
        token=head.token,
        programs={**(had.programs if had else {}), **outcome.programs},
        head_ports=had.head_ports if had else head.ports,
        head_address=head.place.ray_address,
        hosts={**(had.hosts if had else {}), **up_now},
        head=head.place.host,
        proved=tuple(one for one in (had.proved if had else ()) if one not in outcome.fresh),
        gcs=had.gcs if had else False,
    )
    if certificate := head.certificates.get(CLIENT):
        keep(paths, certificate, client=True)
    return save_client(paths, record)


def _failure(spec: ClusterSpec, outcome: BootstrapOutcome) -> RaylaunchError:
    first, *others = outcome.errors.values()
    other_ray = next((one for one in outcome.errors.values() if isinstance(one, RayVersionError)), None)
    if other_ray is not None:
        return other_ray
    if not others and not outcome.states:
        return first
    lines = [str(error).replace("\n", "\n    ") for error in outcome.errors.values()]
    up_too = f"; {', '.join(outcome.states)} came up" if outcome.states else ""
    msg = f"cluster {spec.name}: {len(lines)} of {len(spec.host_specs())} hosts failed{up_too}\n  " + "\n  ".join(lines)
    return ClusterStartError(msg, hint="fix these, then run raylaunch up again; it continues from here")


async def down(spec: ClusterSpec, /, *, on_prompt: OnPrompt | None = None) -> DownReport:
    """End exactly what `up` started, on every host, and return when no process is left.

    Raises:
        ClusterError: a host could not be reached or something could not be ended; the others are down.
    """
    from raylaunch.cluster.hosts.host_calls import Teardown  # noqa: PLC0415 -- as above

    began, paths = time.monotonic(), cluster_paths(spec.name)
    record = load_client(paths)
    refuse_joined(record, "taken down")
    if record is None:
        return DownReport(cluster=paths.name, ended=(), store="", unknown=True)
    async with cluster_lock(paths, limit_s=_LOCK_S):
        save_client(paths, record.with_(wanted="stopped"))
        work = Teardown(record, on_prompt=on_prompt)
        await work.run()
        await end_tunnel(paths)
        left = {name: host for name, host in record.hosts.items() if name in work.errors}
        save_client(paths, record.with_(wanted="stopped", hosts=left, begun=(), gcs=False))
    if work.errors:
        lines = "\n  ".join(str(error).replace("\n", "\n  ") for error in work.errors.values())
        msg = f"cluster {paths.name}: could not be ended on {', '.join(work.errors)}\n  {lines}"
        raise ClusterError(msg, hint="run raylaunch down again once they can be reached")
    took = time.monotonic() - began
    return DownReport(
        cluster=paths.name, ended=tuple(work.ended), store=work.store, notes=tuple(work.notes), seconds=took
    )
