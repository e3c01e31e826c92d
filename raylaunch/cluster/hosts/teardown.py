"""One host leaves a cluster over SSH: what was started there is ended, and it is forgotten here."""

from __future__ import annotations

import time

import anyio

from raylaunch.cluster.client_record import ClientRecord, load_client, refuse_joined, save_client
from raylaunch.cluster.hosts import host_calls
from raylaunch.cluster.probe.choices import target_of
from raylaunch.cluster.record import cluster_lock
from raylaunch.cluster.types import DownReport, Ended
from raylaunch.errors import ClusterDownError, ConflictError, NotFoundError, RaylaunchError
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.paths import cluster_paths
from raylaunch.ssh.host import machine
from raylaunch.ssh.target import OnPrompt


class Teardown:
    """One taking down: what was ended, and what could not be.

    Args:
        record: what was brought up from here.
        on_prompt: asks a person; None where nobody is there.
    """

    def __init__(self, record: ClientRecord, *, on_prompt: OnPrompt | None = None) -> None:
        self._record = record
        self._prompt = on_prompt
        self.ended: list[Ended] = []
        self.notes: list[str] = []
        self.errors: dict[str, RaylaunchError] = {}
        """By host."""
        self.store = ""
        """On the head."""

    async def run(self) -> None:
        """End it on every host that was brought up; a host that fails does not stop the others."""
        async with anyio.create_task_group() as group:
            for name in self._record.hosts:
                if name != self._record.head:
                    group.start_soon(self._host, name)
        if self._record.head in self._record.hosts:
            await self._host(self._record.head)

    async def _host(self, name: str) -> None:
        worker = "" if name == self._record.head else name
        cluster = self._record.spec.name
        try:
            async with machine(target_of(self._record.hosts[name]), on_prompt=self._prompt) as connection:
                done = await host_calls.down(connection, self._record.programs[name], name=cluster, worker=worker)
        except RaylaunchError as error:
            self.errors[name] = error
            return
        self.ended += [Ended(f"{name}: {one}") for one in done.ended]
        self.notes += [f"{name}: {one}" for one in done.notes]
        if not worker:
            self.store = f"{name}:{done.store}"


_LOCK_S = 1800.0


def known(cluster: str) -> ClientRecord:
    """Return what this machine knows of a cluster over SSH.

    Raises:
        ClusterDownError: nothing.
        AccessError: somebody else runs it.
    """
    record = load_client(cluster_paths(cluster))
    if record is None:
        msg = f"cluster {cluster} was not brought up from here"
        raise ClusterDownError(msg, hint="bring it up: raylaunch up")
    refuse_joined(record, "changed")
    return record


def check_leaves(record: ClientRecord, host: str) -> None:
    """Check that a host is one that can leave. Pure.

    Raises:
        NotFoundError: the cluster has no such host.
        ConflictError: it is the head.
    """
    if host not in record.hosts and host not in {one.name for one in record.spec.host_specs()}:
        has = ", ".join(record.hosts) or "none"
        msg = f"cluster {record.spec.name} has no host {host!r}; it has {has}"
        raise NotFoundError(msg, hint="see: raylaunch status")
    if host == record.head or host == record.spec.host_specs()[0].name:
        msg = f"{host} is the head of cluster {record.spec.name}: records, queue and logs are there"
        raise ConflictError(msg, hint="the cluster goes as a whole: raylaunch down")


async def take_out(cluster: str, host: str, *, forget: bool = False, on_prompt: OnPrompt | None = None) -> DownReport:
    """End what was started on a host, see that nothing of it is left, and forget the host.

    Args:
        cluster: the cluster's name.
        host: the host's.
        forget: leave the host alone; it may be gone permanently.
        on_prompt: asks a person; None where nobody is there.

    Raises:
        ClusterDownError: this machine knows nothing of the cluster.
        NotFoundError: the cluster has no such host.
        ConflictError: it is the head.
        HostError: it could not be reached, or something there could not be ended; it stays a host of the cluster.
    """
    paths, began = cluster_paths(cluster), time.monotonic()
    async with cluster_lock(paths, limit_s=_LOCK_S):
        record = known(cluster)
        check_leaves(record, host)
        work = Teardown(
            record.with_(hosts={host: record.hosts[host]} if host in record.hosts else {}), on_prompt=on_prompt
        )
        if not forget:
            await work.run()
            for error in work.errors.values():
                raise error
        hosts = {name: one for name, one in record.hosts.items() if name != host}
        programs = {name: one for name, one in record.programs.items() if name != host}
        save_client(paths, record.with_(spec=without(record.spec, host), hosts=hosts, programs=programs))
    return DownReport(
        cluster=cluster, ended=tuple(work.ended), store="", notes=tuple(work.notes), seconds=time.monotonic() - began
    )


def without(spec: ClusterSpec, host: str) -> ClusterSpec:
    """Return the cluster without a host. Pure. It keeps its binding: one host that is left may be joined again."""
    bind = spec.bind if spec.loopback else "network"
    left = tuple(one for one in spec.hosts if one.name != host)
    return spec.model_copy(update={"hosts": left, "bind": bind})
