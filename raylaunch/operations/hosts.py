"""Adding hosts to a cluster and removing them, for every interface; cluster.yaml is updated to match."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import ValidationError

from raylaunch.client.client import Client
from raylaunch.cluster.ports import LOOPBACK
from raylaunch.cluster.types import DownReport, Step
from raylaunch.config.load import ClusterFile, load_cluster_file
from raylaunch.config.validation import spec_error
from raylaunch.config.yaml_file import with_item, without_item
from raylaunch.errors import ClusterDownError, ConflictError, NotFoundError, SpecError
from raylaunch.files import write_atomic
from raylaunch.models.cluster import ClusterStatus, HostJobs
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.models.host_spec import HostSpec
from raylaunch.models.job import JobView
from raylaunch.operations.connect import ClusterConnection
from raylaunch.operations.upgrade import running_jobs, until_ended
from raylaunch.paths import storage_errors
from raylaunch.ssh.target import OnPrompt

_HOSTS = "hosts"


@dataclass(frozen=True)
class HostChange:
    """The new text of a cluster file, and the cluster that it describes. `path` is None if no file changes."""

    spec: ClusterSpec
    path: Path | None
    text: str = ""

    def write(self) -> None:
        """Write the file atomically, keeping its mode.

        Raises:
            StorageError: it cannot be written.
        """
        if self.path is None:
            return
        target = self.path.resolve()
        with storage_errors(target):
            mode = target.stat().st_mode & 0o777
            write_atomic(target, self.text, mode=mode)
            target.chmod(mode)


def plan_add(file: ClusterFile, host: Mapping[str, object]) -> HostChange:
    """Compute a cluster and its file with one more host. A host that is already in it changes nothing.

    Raises:
        SpecError: the host is invalid, or its name is taken.
        ConflictError: it is not a cluster of hosts, or its file is Ray's own.
    """
    _check_kind(file)
    wanted = _host(dict(host))
    if any((one.host, one.port) == (wanted.host, wanted.port) for one in file.spec.hosts):
        return HostChange(file.spec, None)
    plain: object = str(host["host"]) if set(host) == {"host"} else dict(host)
    return _changed(file, with_item(_text(file), _HOSTS, plain), file.spec.hosts[0].name)


def plan_remove(file: ClusterFile, name: str) -> HostChange:
    """Compute a cluster and its file without a host. A host that is not in the file changes nothing.

    Raises:
        ConflictError: it is not a cluster of hosts, its file is Ray's own, or the host is its head.
    """
    _check_kind(file)
    names = [one.name for one in file.spec.hosts]
    if name not in names:
        return HostChange(file.spec, None)
    if name == names[0]:
        msg = f"{name} is the head of cluster {file.spec.name}: records, queue and logs are there"
        raise ConflictError(msg, hint="to end the whole cluster: raylaunch down")
    text = without_item(_text(file), _HOSTS, names.index(name))
    only_head = len(names) == 2  # noqa: PLR2004 -- the head and the removed one
    if only_head and not file.spec.bind:
        text = f"{text.rstrip()}\nbind: network\n"  # as it listens now; a single host would default to loopback
    return _changed(file, text, names[0])


def _host(data: dict[str, object]) -> HostSpec:
    try:
        return HostSpec.model_validate(data)
    except ValidationError as error:
        raise spec_error(error, HostSpec, data, lambda _path: "") from None


def _check_kind(file: ClusterFile) -> None:
    if file.spec.kind != "ssh":
        msg = f"cluster {file.spec.name} is on this machine and has no hosts to add or remove"
        raise ConflictError(msg, hint="create a cluster of hosts: raylaunch init NAME HOST...")
    if file.path is not None and file.of_ray:
        msg = f"{file.path} is Ray's own cluster file, which raylaunch does not change"
        raise ConflictError(msg, hint="change its worker_ips and run raylaunch up; or: raylaunch init --from it")


def _text(file: ClusterFile) -> str:
    path = file.path or Path()
    with storage_errors(path):
        return path.read_text(encoding="utf-8")


def _changed(file: ClusterFile, text: str, head: str) -> HostChange:
    """Read the new text like the file: the head and the name must not change."""
    with TemporaryDirectory() as folder:
        draft = Path(folder) / (file.path or Path("cluster.yaml")).name
        draft.write_text(text, encoding="utf-8")
        try:
            spec = load_cluster_file(draft).spec
        except SpecError as error:
            message = error.message.replace(f"{folder}/", "")
            raise SpecError(message, hint=error.hint, field=error.field) from None
    if spec.hosts[0].name != head or spec.name != file.spec.name:
        msg = f"{file.path} cannot be changed without also changing {head}"
        raise SpecError(msg, hint=f"edit its list {_HOSTS} by hand, then run raylaunch up")
    return HostChange(spec, file.path, text)


async def add(
    change: HostChange, host: str, *, on_step: Callable[[Step], None], on_prompt: OnPrompt | None = None
) -> ClusterStatus:
    """Start one more host of a cluster; everything running is left alone. The file is changed once it has joined.

    Raises:
        ConflictError: the cluster listens only on loopback, where no other host can reach it.
        ClusterStartError: the host, or another, did not start; the file is unchanged.
    """
    from raylaunch.cluster.hosts import host_calls  # noqa: PLC0415 -- it loads asyncssh, which takes longer than most verbs

    connection = ClusterConnection(change.spec, on_notice=lambda _: None, on_step=on_step, on_prompt=on_prompt)
    try:
        record = host_calls.known(change.spec.name)
    except ClusterDownError:
        record = None
    if record is not None and record.wanted == "running" and record.head_address == LOOPBACK:
        msg = f"cluster {change.spec.name} listens only on its host's loopback, where {host} cannot reach it"
        raise ConflictError(msg, hint=f"raylaunch down, then raylaunch add {host}: it starts on the cluster's network")
    status = await connection.up()
    change.write()
    return status


async def remove(
    connection: ClusterConnection, change: HostChange, host: str, *, stop: bool, forget: bool
) -> DownReport:
    """Remove a host from a cluster: drain it, stop what was started there, and forget it.

    Args:
        connection: the cluster.
        change: its file without the host.
        host: the host's name.
        stop: stop jobs running there and queue them again; otherwise running jobs are an error.
        forget: do not connect to the host, which may be gone permanently.

    Raises:
        ConflictError: jobs are running there, or it is the head.
        NotFoundError: the cluster has no such host.
        HostError: it cannot be reached, or something there cannot be stopped.
    """
    from raylaunch.cluster.hosts import host_calls  # noqa: PLC0415 -- as above

    host_calls.check_leaves(host_calls.known(connection.spec.name), host)
    async with connection.client() as client:
        if not forget:
            await _empty(client, host, stop=stop, on_step=connection.on_step)
        report = await host_calls.remove_host(connection.spec.name, host, forget=forget, on_prompt=connection.on_prompt)
        change.write()
        with contextlib.suppress(NotFoundError):  # it was not drained
            await client.admin.undrain(host)
    return report


async def _empty(client: Client, host: str, *, stop: bool, on_step: Callable[[Step], None]) -> None:
    """Drain a host, and wait until nothing is running there."""
    try:
        before = await client.admin.host_jobs(host)
    except NotFoundError:  # its Ray has already exited
        return
    if not stop:
        _refuse_busy(before)
    now = await client.admin.drain(host, stop=stop)
    if not stop and (now.jobs or now.others):  # one has just started
        if before.drain is None:
            await client.admin.undrain(host)
        _refuse_busy(now)
    await wait_empty(client, host, on_step=on_step)


def _refuse_busy(seen: HostJobs) -> None:
    if seen.jobs:
        msg = f"{running_jobs(seen.jobs)} on {seen.host}"
        hint = f"wait until they end, or stop them and queue them again: raylaunch remove {seen.host} --stop"
        raise ConflictError(msg, hint=hint)
    if seen.others:
        msg = f"{seen.host}: {seen.others}, by workers of a Ray program or by plain Ray jobs"
        hint = f"see raylaunch list; stop them together with the host: raylaunch remove {seen.host} --stop"
        raise ConflictError(msg, hint=hint)


async def wait_empty(client: Client, host: str, *, on_step: Callable[[Step], None], stopping: bool = True) -> None:
    """Wait until none of raylaunch's jobs is running on a drained host, without limit unless they are `stopping`.

    Raises:
        ClusterError: they are stopping, and some have not ended after their longest grace time and a margin.
    """

    async def running() -> tuple[JobView, ...]:
        return (await client.admin.host_jobs(host)).jobs

    await until_ended(running, where=f" on {host}", on_step=on_step, stopping=stopping)
