"""``add``, ``drain``, ``remove``, ``ssh``, ``switch``: clusters over SSH and their hosts."""

from __future__ import annotations

import os
from pathlib import Path

import click

from raylaunch.cli.cluster import say_status
from raylaunch.cli.connect import ClusterCommand, as_json, ask_person, finish, parse_future_time, request, show_step
from raylaunch.cli.console import note, say, say_json, say_lines
from raylaunch.client.client import Client
from raylaunch.cluster.trust import accept, check_accepted
from raylaunch.cluster.types import DownReport
from raylaunch.config.load import chosen_file, kept_clusters, kept_file, load_cluster_file
from raylaunch.errors import NotFoundError
from raylaunch.files import replace_link
from raylaunch.models.cluster import HostJobs
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.models.host_spec import HostSpec
from raylaunch.operations.hosts import add as add_host
from raylaunch.operations.hosts import plan_add, plan_remove, wait_empty
from raylaunch.operations.hosts import remove as remove_host
from raylaunch.operations.upgrade import running_jobs

LOCAL = "local"


@click.command(epilog="Example:  raylaunch switch dgx")
@click.argument("name", required=False)
@as_json
def switch(name: str | None, *, as_json: bool) -> None:
    """Choose the default cluster, used where there is no cluster.yaml. Without NAME, list the clusters."""
    link = chosen_file(os.environ)
    if name is None:
        chosen = link.resolve().parent.name if link.is_file() else LOCAL
        known = list(dict.fromkeys([LOCAL, *kept_clusters(os.environ)]))
        if as_json:
            say_json({"chosen": chosen, "clusters": [*known]})
        else:
            say_lines(f"{'*' if one == chosen else ' '} {one}" for one in known)
        return
    if name == LOCAL:
        link.unlink(missing_ok=True)
    else:
        replace_link(link, named_file(name))
    if as_json:
        say_json({"chosen": name})
    note(f"{name} is now the default cluster (a cluster.yaml takes precedence)")


def named_file(name: str) -> Path:
    """Return the stored cluster file of a cluster over SSH.

    Raises:
        NotFoundError: it was not brought up from here.
    """
    file = kept_file(name, os.environ)
    if not file.is_file():
        known = ", ".join(kept_clusters(os.environ)) or "none yet"
        msg = f"no cluster {name!r} was started from here; known: {known}"
        raise NotFoundError(msg, hint="start it in the folder of its cluster.yaml: raylaunch up")
    return file.absolute()


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog="Example:  raylaunch ssh dgx-2 nvidia-smi",
)
@click.argument("host")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def ssh(cluster_file: Path | None, *, host: str, command: tuple[str, ...]) -> None:
    """Open a shell on a host of the cluster, or run a command there, using the installed ssh."""
    spec = load_cluster_file(cluster_file).spec
    finish(check_accepted(spec, on_prompt=ask_person))
    argv = ssh_argv(_host(spec, host), command)
    os.execvp(argv[0], argv)  # noqa: S606 -- ssh takes over, terminal and all


def _host(spec: ClusterSpec, name: str) -> HostSpec:
    for host in spec.host_specs():
        if name in (host.name, host.host):
            return host
    has = ", ".join(host.name for host in spec.host_specs())
    msg = f"cluster {spec.name} has no host {name!r}" + (f"; it has {has}" if has else ": it runs on this machine")
    raise NotFoundError(msg, hint="see: raylaunch status")


def ssh_argv(host: HostSpec, command: tuple[str, ...] = ()) -> list[str]:
    """Return ssh's command line for a host of cluster.yaml; ``~/.ssh/config`` sets the rest."""
    argv = ["ssh"]
    argv += ["-p", str(host.port)] if host.port else []
    argv += ["-l", host.user] if host.user else []
    argv += ["-i", str(Path(host.key).expanduser())] if host.key else []
    argv += ["-J", ",".join(host.jump)] if host.jump else []
    return [*argv, "--", host.host, *command]


@click.command(epilog="Example:  raylaunch add dgx-3 --gpus 4")
@click.argument("host")
@click.option("--gpus", metavar="GPUS", help="A number, or indices and UUIDs with commas. Default: all.")
@click.option("--address", help="Address on the cluster's network, if ssh uses another one.")
@click.option("--user", help="Account for the login.")
@click.option("--key", help="Private key for the login.")
@click.option("--jump", multiple=True, help="Jump host; may be repeated.")
@click.option("--dry-run", is_flag=True, help="Print what would be done; change nothing.")
@as_json
@click.pass_obj
def add(  # noqa: PLR0913 -- each is one fact of the host
    cluster_file: Path | None,
    *,
    host: str,
    gpus: str | None,
    address: str | None,
    user: str | None,
    key: str | None,
    jump: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
) -> None:
    """Add HOST (as you would give it to ssh) to the cluster; once it has joined, it is added to cluster.yaml."""
    place = ClusterCommand(cluster_file)
    given = {"gpus": _gpus(gpus), "address": address, "user": user, "key": key, "jump": list(jump)}
    change = plan_add(place.file, {"host": host, **{name: value for name, value in given.items() if value}})
    finish(check_accepted(place.spec, on_prompt=ask_person))
    accept(change.spec)  # a person has typed the host's name
    if dry_run:
        say_lines(str(finish(place.backend.plan(change.spec, on_prompt=ask_person))).split("\n"))
        return
    status = finish(add_host(change, host, on_step=show_step, on_prompt=ask_person))
    if change.path is not None:
        note(f"Added {host} to {change.path}")
    say_status(status, as_json=as_json)


def _gpus(text: str | None) -> object:
    """A plain number is a count, as in cluster.yaml; with commas they are indices or UUIDs."""
    if text is None:
        return None
    return int(text) if text.isdigit() else [one.strip() for one in text.split(",") if one.strip()]


@click.command(epilog="Example:  raylaunch drain dgx-2 --until 18:00")
@click.argument("host")
@click.option("--until", metavar="TIME", help="When the drain ends: 18:00, 2h, 2026-11-28T18:00.")
@click.option("--stop", is_flag=True, help="Stop jobs running there (with their grace time) and queue them again.")
@click.option("--wait", is_flag=True, help="Return when no raylaunch job is running there.")
@click.option("--off", is_flag=True, help="End the drain.")
@as_json
@click.pass_obj
def drain(  # noqa: PLR0913 -- each is one option
    cluster_file: Path | None, *, host: str, until: str | None, stop: bool, wait: bool, off: bool, as_json: bool
) -> None:
    """Stop placing new jobs on HOST; running jobs continue. Undo with --until TIME or --off."""
    if off and (until or stop or wait):
        msg = "--off ends a drain; it excludes --until, --stop and --wait"
        raise click.UsageError(msg)
    at = parse_future_time(until, option="--until")

    async def work(client: Client) -> HostJobs:
        if off:
            return await client.admin.undrain(host)
        found = await client.admin.drain(host, until=at, stop=stop)
        if wait:
            await wait_empty(client, host, on_step=show_step, stopping=stop)
            found = await client.admin.host_jobs(host)
        return found

    found = request(cluster_file, work)
    if as_json:
        say_json(found)
        return
    say(f"{host} {found.drain}" if found.drain else f"{host} accepts jobs again")
    if found.drain and found.jobs:
        say(running_jobs(found.jobs))
    if found.others:
        say(f"{found.others}: workers of Ray programs, or plain Ray jobs, which a drain does not affect")


@click.command(epilog="Example:  raylaunch remove dgx-2 --stop")
@click.argument("host")
@click.option("--stop", is_flag=True, help="Stop jobs running there (with their grace time) and queue them again.")
@click.option(
    "--forget", is_flag=True, help="The host is gone: do not connect to it. Jobs still running there are not stopped."
)
@click.pass_obj
def remove(cluster_file: Path | None, *, host: str, stop: bool, forget: bool) -> None:
    """Remove HOST from the cluster: stop what 'up' started there, and remove it from cluster.yaml."""
    place = ClusterCommand(cluster_file)
    change = plan_remove(place.file, host)
    report = finish(remove_host(place, change, host, stop=stop, forget=forget))
    say_removed(report, host, reached=not forget)


def say_removed(report: DownReport, host: str, *, reached: bool) -> None:
    """Print what was stopped on a host that was removed from its cluster."""
    for one in (*report.ended, *report.notes):
        say(f"  {one}")
    if not reached:
        note(f"{host} was not contacted: Ray and jobs of cluster {report.cluster} may still be running there")
    say(f"Removed {host} from cluster {report.cluster}")
