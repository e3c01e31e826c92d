"""``switch``, ``ssh``: which of several clusters is meant, and the way to one of its hosts."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import click

from raylaunch.cli.connect import ask_person, finish
from raylaunch.cli.console import note, say_json, say_lines
from raylaunch.cli.options import as_json
from raylaunch.cluster.trust import check_accepted
from raylaunch.config import chosen_file, kept_clusters, kept_file, load_cluster_spec
from raylaunch.errors import NotFoundError
from raylaunch.spec import ClusterSpec, HostSpec

LOCAL = "local"


@click.command(epilog="Example:  raylaunch switch dgx")
@click.argument("name", required=False)
@as_json
def switch(name: str | None, *, as_json: bool) -> None:
    """Choose the cluster that is meant where no cluster.yaml lies; without NAME list the clusters."""
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
        beside = link.with_name(f".{link.name}.{secrets.token_hex(4)}")
        beside.symlink_to(named_file(name))
        beside.replace(link)
    if as_json:
        say_json({"chosen": name})
    note(f"{name} is meant now, where no cluster.yaml lies")


def named_file(name: str) -> Path:
    """Return the file that is kept of a cluster over SSH.

    Raises:
        NotFoundError: it was not brought up from here.
    """
    file = kept_file(name, os.environ)
    if not file.is_file():
        known = ", ".join(kept_clusters(os.environ)) or "none yet"
        msg = f"no cluster {name!r} was brought up from here; known: {known}"
        raise NotFoundError(msg, hint="bring it up where its cluster.yaml lies: raylaunch up")
    return file.absolute()


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog="Example:  raylaunch ssh dgx-2 nvidia-smi",
)
@click.argument("host")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def ssh(cluster_file: Path | None, *, host: str, command: tuple[str, ...]) -> None:
    """Open a shell on a host of the cluster, or run a command there, with ssh itself."""
    spec = load_cluster_spec(cluster_file)
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
    """Return ssh's command line for what cluster.yaml says of a host; the rest is ``~/.ssh/config``'s."""
    argv = ["ssh"]
    argv += ["-p", str(host.port)] if host.port else []
    argv += ["-l", host.user] if host.user else []
    argv += ["-i", str(Path(host.key).expanduser())] if host.key else []
    argv += ["-J", ",".join(host.jump)] if host.jump else []
    return [*argv, "--", host.host, *command]
