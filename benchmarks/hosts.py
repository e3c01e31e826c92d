"""Machines for benchmarks to reach over SSH: hosts made of namespaces, or this machine behind an sshd of its own.

Both are those of the tests (`tests/support/hosts.py`, `tests/support/sshd.py`).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.measure import Skipped
from raylaunch.cluster.client_record import ClientRecord, load_tunnel, save_client
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.paths import cluster_paths, make_private_dir

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from support.api import Api, serving, token_of
from support.api_use import submit, write
from support.fittings import this_python
from support.hosts import Host, World, world
from support.sshd import LOOPBACK, Sshd, sshd
from support.terminal import Laptop

__all__ = [
    "LOOPBACK",
    "Api",
    "Host",
    "Laptop",
    "Sshd",
    "World",
    "head_here",
    "known",
    "lab",
    "serving",
    "submit",
    "this_python",
    "token_of",
    "write",
]


@contextmanager
def lab(hosts: int, *, share: Mapping[Path, Path] | None = None) -> Iterator[World]:
    """Make a world with so many hosts, named ``h1``, ``h2``, …. It needs root.

    Args:
        hosts: how many.
        share: folders of this machine, and where the hosts see them, read-only.

    Raises:
        Skipped: hosts cannot be made here.
    """
    try:
        with world() as made:
            for _ in range(hosts):
                made.host(share=share)
            yield made
    except pytest.skip.Exception as reason:
        raise Skipped(str(reason)) from None


@contextmanager
def head_here(folder: Path) -> Iterator[Sshd]:
    """Reach this machine by a real sshd of its own on the loopback; `home` has the client's configuration.

    Raises:
        Skipped: there is no sshd here.
    """
    try:
        with sshd(folder) as host:
            host.config(
                f"Host {LOOPBACK}\n  IdentityFile {host.key}\n  User {host.user}\n"
                f"  UserKnownHostsFile {host.known_hosts}\n"
            )
            host.trust()
            yield host
    except pytest.skip.Exception as reason:
        raise Skipped(str(reason)) from None


@contextmanager
def known(environ: Mapping[str, str], host: Sshd, *, controller: int, token: str) -> Iterator[None]:
    """Write down what `up` would have left here of a cluster ``test`` with that head; its tunnel ends at the end.

    Args:
        environ: names the home (RAYLAUNCH_HOME) in which it is written.
        host: the head.
        controller: the port on which the controller listens there.
        token: a person's.
    """
    paths = cluster_paths("test", environ)
    for one in (paths.home, paths.home / "clusters", paths.root):
        make_private_dir(one)
    spec = ClusterSpec.model_validate({"name": "test", "hosts": [{"host": f"{LOOPBACK}:{host.port}"}]})
    ports = dict.fromkeys(("controller", "dashboard", "gcs"), controller)
    save_client(paths, ClientRecord(spec=spec, token=token, head_ports=ports, head=spec.hosts[0].name))
    try:
        yield
    finally:
        tunnel = load_tunnel(paths)
        if tunnel is not None and tunnel.alive:
            subprocess.run(["kill", str(tunnel.process.pid)], check=False)
