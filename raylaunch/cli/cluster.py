"""``up``, ``down``, ``status``, ``env``: the cluster itself."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import click

from raylaunch.cli.connect import ClusterCommand, as_json, finish
from raylaunch.cli.console import count, note, say, say_json, say_lines, size, span, styled
from raylaunch.cluster.hosts.backend import forward_gcs
from raylaunch.cluster.ports import is_loopback
from raylaunch.errors import AccessError
from raylaunch.models.cluster import ClusterStatus, GpuView, NodeView, ProcessView, RayAccess
from raylaunch.operations.upgrade import take_down, upgraded

_TLS = frozenset({"RAY_USE_TLS", "RAY_TLS_CA_CERT", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY"})
"""The only TLS variables that a cluster may set in the user's shell."""


@click.command(epilog="Example:  raylaunch up")
@click.option("--dry-run", is_flag=True, help="Check everything and print what would be started; start nothing.")
@click.option("--upgrade", is_flag=True, help="If another Ray version is running, wait for its jobs, then replace it.")
@click.option("--stop", is_flag=True, help="With --upgrade: stop running jobs (with their grace time) and retry them.")
@as_json
@click.pass_obj
def up(cluster_file: Path | None, *, dry_run: bool, upgrade: bool, stop: bool, as_json: bool) -> None:
    """Start the cluster, or its missing parts; return when it accepts jobs.

    The controller of an older raylaunch is replaced; jobs keep running.
    """
    if stop and not upgrade:
        msg = "--stop needs --upgrade; to stop a job: raylaunch stop JOB"
        raise click.UsageError(msg)
    place = ClusterCommand(cluster_file)
    for line in place.notes:
        note(line)
    if dry_run:
        plan = finish(place.plan())
        say_lines(str(plan).split("\n"))
        click.get_current_context().exit(1 if plan.problems else 0)
    status = finish(upgraded(place, stop=stop) if upgrade else place.up())
    say_status(status, as_json=as_json)


@click.command(epilog="Example:  raylaunch down")
@click.option(
    "--stop", is_flag=True, help="Stop running jobs first (with their grace time); the next 'up' retries them."
)
@click.option("--force", is_flag=True, help="Kill running jobs; the next 'up' retries them.")
@click.pass_obj
def down(cluster_file: Path | None, *, stop: bool, force: bool) -> None:
    """Stop exactly what 'up' started; refuse while jobs are running. Records, logs and outputs stay."""
    place = ClusterCommand(cluster_file)
    hint = "stop them with their grace time: raylaunch down --stop; or at once: --force. The next up retries them"
    work = take_down(place, stop=stop, force=force, hint=hint)
    say_lines(str(finish(work)).split("\n"))


@click.command(epilog="Example:  raylaunch status --json | jq .controller.pid")
@as_json
@click.pass_obj
def status(cluster_file: Path | None, *, as_json: bool) -> None:
    """Show controller and Ray with pids and ports, nodes, GPUs, queue and problems."""
    place = ClusterCommand(cluster_file)
    say_status(finish(place.backend.status(place.spec)), as_json=as_json)


@click.command(epilog='Example:  eval "$(raylaunch env)" && ray job list')
@click.option("--gcs", is_flag=True, help="Forward Ray's GCS port too, for ray status and ray.init().")
@click.pass_obj
def env(cluster_file: Path | None, *, gcs: bool) -> None:
    """Print export lines for Ray's own tools. They contain the cluster's token: do not share them.

    For a cluster over SSH they cover `ray job`; --gcs adds what other Ray tools need.
    """
    place = ClusterCommand(cluster_file)

    async def work() -> RayAccess:
        async with place.client() as client:
            access = await client.ray_access()
        endpoint = await place.backend.reach(place.spec)
        if not endpoint.over_ssh:
            return access
        if gcs and not endpoint.gcs_address:
            if access.tls and not endpoint.ray_tls:
                msg = "this cluster's Ray requires a client certificate, and this machine has none"
                raise AccessError(msg, hint="run Ray's tools on the head: raylaunch ssh HEAD; ray job works from here")
            await forward_gcs(place.spec.name)
            endpoint = await place.backend.reach(place.spec)
        found = {"dashboard_url": endpoint.dashboard_url, "gcs_address": endpoint.gcs_address, "tls": endpoint.ray_tls}
        return access.model_copy(update=found)

    for line in export_lines(finish(work())):
        say(line)


def export_lines(access: RayAccess) -> list[str]:
    """Return the lines that a shell evaluates."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": access.token}
    values = {
        **({"RAY_ADDRESS": access.gcs_address} if access.gcs_address else {}),
        "RAY_API_SERVER_ADDRESS": access.dashboard_url,
        **(token if access.token else {"RAY_AUTH_MODE": "disabled"}),
        **({name: value for name, value in access.tls.items() if name in _TLS} if access.gcs_address else {}),
    }
    if is_loopback(urlsplit(f"//{access.gcs_address}").hostname or ""):
        values["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # else Ray's tools use the machine's outward address
    return [f"export {name}={shlex.quote(value)}" for name, value in values.items()]


def say_status(found: ClusterStatus, *, as_json: bool) -> None:
    """Print a cluster's status."""
    if as_json:
        say_json(found)
    else:
        say_lines(status_lines(found, now=time.time()))


_STATES = {"running": "green", "degraded": "yellow", "stopped": "dim"}


def status_lines(found: ClusterStatus, *, now: float) -> Iterator[str]:
    """Yield a cluster's status for people."""
    yield f"cluster {found.name} is {styled(found.state, _STATES[found.state])}"
    for problem in found.problems:
        yield f"  ! {problem}"
    yield from _process_lines("controller", found.controller, now)
    yield from _process_lines("ray", found.ray, now)
    if found.ray_ports:
        yield f"  ray ports   {', '.join(f'{name} {port}' for name, port in sorted(found.ray_ports.items()))}"
    for node in found.nodes:
        yield from _node_lines(node, logical=found.gpus_logical)
    if found.nodes or (found.controller and found.controller.alive):  # else nothing counted them
        yield f"  jobs        {found.running} running, {found.queued} queued"
    if found.store:
        free = f" ({size(found.store_free)} free)" if found.store_free is not None else ""
        yield f"  store       {found.store}{free}"
    if found.state == "stopped":
        yield "Start it: raylaunch up"


def _process_lines(what: str, process: ProcessView | None, now: float) -> Iterator[str]:
    if process is None:
        return
    if not process.alive:
        yield f"  {what:<11} dead (was pid {process.pid}), log {process.log}"
        return
    version = f", {process.version}" if process.version else ""
    yield f"  {what:<11} pid {process.pid}, {process.url}, up {span(now - process.started_at)}{version}"


def _node_lines(node: NodeView, *, logical: bool) -> Iterator[str]:
    parts = [f"{node.cpus_free:g} of {node.cpus:g} CPUs free"]
    if node.gpus:
        kind = f" {node.gpu_type}" if node.gpu_type else " logical" if logical else ""
        parts.insert(0, f"{node.gpus_free:g} of {node.gpus:g}{kind} GPUs free")
    parts.append(f"{size(node.memory_free)} of {size(node.memory)} memory free")
    suffix = "" if node.ready else " (no node agent yet)" if node.alive else " (dead)"
    suffix += f", {node.drain}," if node.drain else ""
    yield f"  node        {node.hostname}{suffix}: {', '.join(parts)}"
    for gpu in node.gpu:
        yield f"    gpu {gpu.index:<5} {_gpu_words(gpu)}"


def _gpu_words(gpu: GpuView) -> str:
    words = [gpu.name]
    if gpu.memory_total is not None and gpu.memory_used is not None:
        words.append(f"{size(gpu.memory_used)} of {size(gpu.memory_total)} used")
    if gpu.utilization is not None:
        words.append(f"{gpu.utilization:g} % busy")
    if gpu.processes:
        words.append(
            f"{count(len(gpu.processes), 'process', 'processes')} outside raylaunch: {', '.join(gpu.processes)}"
        )
    return ", ".join(word for word in words if word)
