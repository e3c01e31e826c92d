"""The embedded cluster: Ray and the controller on this machine, loopback only, in process groups of their own."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from raylaunch.cluster.local.gpus import gpus_for
from raylaunch.cluster.local.inspect import (
    LocalInspection,
    check_versions,
    client_token,
    differences,
    inspect_cluster,
    status_of,
)
from raylaunch.cluster.local.node_up import BringUp
from raylaunch.cluster.local.ray_head import installed_ray, whole_cpus
from raylaunch.cluster.ports import LOOPBACK, controller_port, wait_free
from raylaunch.cluster.processes import end, is_alive, of_controller, of_ray, runners, sweep_ray, wait_gone
from raylaunch.cluster.progress import locked
from raylaunch.cluster.record import (
    ClusterRecord,
    cluster_lock,
    load_record,
    new_record,
    save_record,
)
from raylaunch.cluster.types import DownReport, Ended, Endpoint, Plan, Step
from raylaunch.errors import ClusterDownError, ClusterError
from raylaunch.models.cluster import ClusterStatus
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.paths import ClusterPaths, cluster_paths, make_cluster_dirs
from raylaunch.ssh.target import OnPrompt

LOCK_S = 600.0
_REVIVE_LOCK_S = 1.0
_CONTROLLER_GRACE_S = 10.0
_JOB_GRACE_S = 15.0
_RAY_GRACE_S = 15.0


async def plan(spec: ClusterSpec, /, *, on_prompt: OnPrompt | None = None) -> Plan:  # noqa: ARG001 -- nothing here asks
    """Return what `up` would do, without changing anything.

    Raises:
        SpecError: a GPU that the spec lists does not exist, or its cpus are not a whole number.
        ConflictError: another cluster uses those GPUs, or the port that the spec fixes is taken.
        VersionError: the installed Ray, or the running cluster, is incompatible.
    """
    paths = cluster_paths(spec.name)
    seen = await inspect_cluster(paths)
    version = installed_ray()
    upgrade = check_versions(seen, version)
    runs = seen.record.spec if seen.record and (seen.ray_alive or seen.controller_alive) else spec
    if not seen.controller_alive and runs.port is not None:
        controller_port({}, fixed=runs.port, on_taken=lambda _: None, avoid=())
    with_gpus, offers = "", dict[str, float]()
    if not seen.ray_alive:
        choice = await gpus_for(runs, paths.controller_config)
        cpus = "all CPU cores" if runs.cpus is None else f"{whole_cpus(runs.cpus)} CPU cores"
        with_gpus = f"Ray {version} with {cpus} and {choice}, loopback only, log {paths.ray_log}"
        offers = {"gpus": choice.count, **({} if runs.cpus is None else {"cpus": runs.cpus})}
    found = plan_up(spec, seen, ray=with_gpus, log=str(paths.controller_log), upgrade=upgrade)
    return dataclasses.replace(found, offers=offers)


def plan_up(spec: ClusterSpec, seen: LocalInspection, *, ray: str, log: str, upgrade: bool) -> Plan:
    """Compute the plan from an inspection. `ray` describes how Ray would be started; empty if it runs."""
    actions, keeps = [], []
    record = seen.record
    if ray:
        actions.append(ray)
    elif record and record.ray:
        keeps.append(f"Ray (pid {record.ray.pid})")
    if seen.controller_alive and not upgrade and record and record.controller:
        keeps.append(f"the controller (pid {record.controller.pid})")
    else:
        actions.append(f"the controller, {'port ' + str(spec.port) if spec.port else 'on a free port'}, log {log}")
    notes = differences(spec, record) if record and keeps else ()
    return Plan(cluster=spec.name, actions=tuple(actions), keeps=tuple(keeps), notes=notes)


async def up(
    spec: ClusterSpec,
    /,
    *,
    on_step: Callable[[Step], None],
    on_prompt: OnPrompt | None = None,  # noqa: ARG001 -- nothing here asks
) -> ClusterStatus:
    """Bring the cluster up, starting only what does not run, and return when it can take jobs.

    That is: Ray's Jobs API answers, the node is listed, the controller reaches Ray, and the node agent answers. Of two
    concurrent calls, one waits for the other and finds everything running.

    Raises:
        ClusterStartError: a step failed; everything that this call started has been ended.
        ConflictError: a fixed port, a GPU or a folder is in use by somebody else.
        SpecError: a GPU that the spec lists does not exist, or its cpus are not a whole number.
        StorageError: a disk is full, or a file cannot be written.
        VersionError: the installed Ray, or the running cluster, is incompatible.
    """
    if spec.cpus is not None:
        whole_cpus(spec.cpus)
    paths = cluster_paths(spec.name)
    make_cluster_dirs(paths)
    async with locked(paths, on_step, limit_s=LOCK_S) as report:
        seen = await BringUp(paths, spec, report).run()
    return status_of(seen, paths)


async def revive_ray(name: str, /, *, on_step: Callable[[Step], None]) -> bool:
    """Restart Ray if the cluster should run and its Ray has exited; return whether there was something to do.

    Ports, token and storage are unchanged. The controller stays too, unless a port had to change.

    Raises:
        ConflictError: another raylaunch command is changing the cluster. An `up` is not waited for: it waits for
            the controller, which may wait for this.
    """
    paths = cluster_paths(name)
    async with cluster_lock(paths, limit_s=_REVIVE_LOCK_S):
        seen = await inspect_cluster(paths)
        if seen.record is None or seen.record.wanted != "running" or seen.ray_alive:
            return False
        await BringUp(paths, seen.record.spec, on_step).run(ray_only=True)
    return True


async def down(spec: ClusterSpec, /, *, on_prompt: OnPrompt | None = None) -> DownReport:  # noqa: ARG001 -- as above
    """End exactly what `up` started, and return when no process is left and every port is free.

    Succeeds also if the cluster does not run. The store stays.

    Raises:
        ClusterError: something could not be ended; the message names it.
    """
    paths, began = cluster_paths(spec.name), time.monotonic()
    if not paths.root.is_dir():
        record = new_record(spec, paths)
        return DownReport(cluster=paths.name, ended=(), store=record.store)
    async with cluster_lock(paths, limit_s=LOCK_S):
        seen = await inspect_cluster(paths)
        record = seen.record or new_record(spec, paths)
        record = record.with_(wanted="stopped")
        if seen.record is not None:
            save_record(paths, record)
        ended = (*await end_controller(record), *await _end_ray(record, paths))
        _verify(record, paths)
        taken = await wait_free(record.ports, limit_s=5)
        if seen.record is not None:
            save_record(paths, record.with_(ray=None, controller=None))
    took = time.monotonic() - began
    return DownReport(cluster=paths.name, ended=ended, store=record.store, notes=taken, seconds=took)


async def end_controller(record: ClusterRecord) -> tuple[Ended, ...]:
    """End a cluster's controller and what it started; return how."""
    first = [record.controller] if record.controller and is_alive(record.controller) else []
    how = await end(first, grace_s=_CONTROLLER_GRACE_S)
    ended = [Ended("controller", one.pid, how[one.pid]) for one in first]
    left = of_controller(record.cluster_id)
    how = await end(left, grace_s=3)
    return (*ended, *(Ended("controller's helper", one.pid, how[one.pid]) for one in left))


async def _end_ray(record: ClusterRecord, paths: ClusterPaths) -> tuple[Ended, ...]:
    jobs = runners(record.cluster_id)
    how = await end(jobs, grace_s=_JOB_GRACE_S)
    ended = [Ended("job's runner", one.pid, how[one.pid]) for one in jobs]
    family = of_ray(record.cluster_id, record.ray, paths.temp)
    if record.ray is not None and is_alive(record.ray):
        how = await end([record.ray], grace_s=_RAY_GRACE_S)  # it drains, and ends what it started
        ended.append(Ended("Ray", record.ray.pid, how[record.ray.pid]))
    left = await wait_gone(family, limit_s=2)  # those that are about to end
    how = await end(left, grace_s=3)
    ended += [Ended(_words(one.argv), one.pid, how[one.pid]) for one in left]
    swept = await sweep_ray(record.cluster_id, record.ray, paths.temp)
    ended += [Ended(_words(one.argv), one.pid, way) for one, way in swept.items()]
    return tuple(ended)


def _words(argv: tuple[str, ...]) -> str:
    return "left behind: " + (" ".join(argv)[:60] or "a process")


def _verify(record: ClusterRecord, paths: ClusterPaths) -> None:
    left = [*of_controller(record.cluster_id), *of_ray(record.cluster_id, record.ray, paths.temp)]
    if left:
        pids = ", ".join(str(one.pid) for one in left)
        msg = f"cluster {record.name}: these processes could not be ended: {pids}"
        raise ClusterError(msg, hint=f"check what they wait for: ps -o pid,stat,wchan,args -p {pids.replace(' ', '')}")


async def reach(spec: ClusterSpec, /) -> Endpoint:
    """Return the controller's URL and token. Its process is checked, without a request: that takes milliseconds.

    Raises:
        ClusterDownError: the cluster does not run.
    """
    paths = cluster_paths(spec.name)
    record = load_record(paths)
    token = client_token(paths)
    if record is None or record.wanted != "running" or not is_alive(record.controller) or not token:
        msg = f"cluster {paths.name} is not running on this machine"
        raise ClusterDownError(msg, hint="start it: raylaunch up")
    return Endpoint(url=f"http://{LOOPBACK}:{record.ports['controller']}", token=token)


async def status(spec: ClusterSpec, /) -> ClusterStatus:
    """Return the state of the cluster. A cluster that was never started is ``stopped``."""
    paths = cluster_paths(spec.name)
    return status_of(await inspect_cluster(paths), paths)
