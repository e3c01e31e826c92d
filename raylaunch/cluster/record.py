"""What was started on this machine: ``cluster.json``, and the lock under which it changes."""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import os
import platform
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

import anyio
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer

from raylaunch.cluster.ports import LOOPBACK
from raylaunch.cluster.processes import ProcessIdentity
from raylaunch.errors import ConflictError
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.models.fields import Moment
from raylaunch.paths import ClusterPaths, storage_errors, write_private
from raylaunch.version import __version__

_POLL_S = 0.05


class ClusterVersions(BaseModel):
    """The versions that the cluster was started with."""

    model_config = ConfigDict(frozen=True)

    raylaunch: str = ""
    ray: str = ""
    python: str = ""


def current_versions(ray: str) -> ClusterVersions:
    """Return the versions of this process, and of `ray`."""
    return ClusterVersions(raylaunch=__version__, ray=ray, python=platform.python_version())


class NodePlace(BaseModel):
    """Which part of a cluster this machine is. An embedded cluster is alone on loopback, and has no host's name."""

    model_config = ConfigDict(frozen=True)

    host: str = ""
    """Its name in cluster.yaml."""
    address: str = ""
    """Its address on the cluster's network; empty for loopback."""
    interface: str = ""
    """The network interface with that address, for NCCL and Gloo."""
    head: str = ""
    """``address:port`` of Ray's head; empty on the head itself."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of everything that runs here."""

    @property
    def ray_address(self) -> str:
        """The address of Ray's node."""
        return self.address or LOOPBACK

    @property
    def is_worker(self) -> bool:
        """Whether Ray's head is on another machine."""
        return bool(self.head)


class ClusterRecord(BaseModel):
    """A cluster as it was last started. Frozen: a change is a new record, which replaces the file."""

    model_config = ConfigDict(frozen=True)

    name: str
    kind: Literal["local"] = "local"
    cluster_id: str
    """In the environment of every process of the cluster; restarts keep it."""
    owner: str
    machine: str
    wanted: Literal["running", "stopped"] = "stopped"
    tls: bool = False
    """Whether its Ray was started with TLS. That changes only after the cluster was taken down."""
    tls_until: Moment | None = None
    """When the certificate of this machine's Ray expires; seconds since the epoch."""
    spec: ClusterSpec
    store: str
    ports: dict[str, int] = Field(default_factory=dict)
    gpu_uuids: tuple[str, ...] = ()
    place: NodePlace = NodePlace()
    ray: ProcessIdentity | None = None
    controller: ProcessIdentity | None = None
    controller_answered: bool = False
    """Whether this controller has answered since its start: if it does not answer after that, it hangs."""
    versions: ClusterVersions = ClusterVersions()

    @field_serializer("spec")
    def _said(self, spec: ClusterSpec) -> dict[str, object]:
        """Leave out defaults and `tls`: 0.1.0 ignores a record whose spec has fields that it does not know."""
        return {field: value for field, value in spec.non_defaults().items() if field != "tls"}

    def with_(self, **changes: object) -> ClusterRecord:
        """Return a copy with some fields changed."""
        return self.model_copy(update=changes)


def machine_id() -> str:
    """Return this machine's id, which does not change over reboots and changes of address."""
    for path in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        with contextlib.suppress(OSError):
            if text := Path(path).read_text(encoding="ascii").strip():
                return text
    return os.uname().nodename


def new_record(spec: ClusterSpec, paths: ClusterPaths, *, cluster_id: str = "") -> ClusterRecord:
    """Return a new record; its id is by default the one in the controller's configuration, if there is one."""
    return ClusterRecord(
        name=spec.name,
        cluster_id=cluster_id or _recalled_cluster_id(paths) or secrets.token_hex(8),
        owner=getpass.getuser(),
        machine=machine_id(),
        spec=spec,
        store=store_of(spec, paths),
    )


def store_of(spec: ClusterSpec, paths: ClusterPaths) -> str:
    """Return the folder of records, logs and outputs."""
    return str(Path(spec.store).expanduser().absolute()) if spec.store else str(paths.default_store)


def load_record(paths: ClusterPaths) -> ClusterRecord | None:
    """Return the record; None if there is none, or it is invalid.

    Raises:
        ConflictError: it was written on another machine that shares this home folder.
        StorageError: it exists and cannot be read.
    """
    try:
        with storage_errors(paths.record), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            record = ClusterRecord.model_validate_json(paths.record.read_bytes())
            _check_machine(record, paths)
            return record
    except ValidationError:
        return None
    return None


def _check_machine(record: ClusterRecord, paths: ClusterPaths) -> None:
    if record.machine != machine_id():
        msg = f"cluster {record.name} was started on another machine that shares {paths.home}"
        raise ConflictError(msg, hint="use it there, or set RAYLAUNCH_HOME to a folder of this machine")


def keep_unreadable_aside(paths: ClusterPaths) -> Path | None:
    """Rename an invalid record, so that nothing is lost; return its new name."""
    if not paths.record.exists() or load_record(paths) is not None:
        return None
    aside = paths.record.with_name(f"{paths.record.name}.unreadable-{time.time():.0f}")
    with storage_errors(paths.record):
        paths.record.rename(aside)
    return aside


def _recalled_cluster_id(paths: ClusterPaths) -> str:
    """Return the id in the controller's configuration, in case the record was deleted; else empty."""
    try:
        value = json.loads(paths.controller_config.read_bytes())["cluster_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return value if isinstance(value, str) else ""


def save_record(paths: ClusterPaths, record: ClusterRecord) -> ClusterRecord:
    """Write the record, and return it."""
    write_private(paths.record, record.model_dump_json(indent=2))
    return record


@contextlib.asynccontextmanager
async def cluster_lock(paths: ClusterPaths, *, limit_s: float) -> AsyncIterator[None]:
    """Hold the cluster's lock: only one command can change a cluster. The kernel frees it when the holder exits.

    Raises:
        ConflictError: another process held it for all of `limit_s` seconds.
        StorageError: the lock file cannot be created.
    """
    with storage_errors(paths.lock):
        descriptor = os.open(paths.lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        await _take(descriptor, paths, limit_s)
        yield
    finally:
        os.close(descriptor)


async def _take(descriptor: int, paths: ClusterPaths, limit_s: float) -> None:
    with anyio.move_on_after(limit_s):
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                await anyio.sleep(_POLL_S)
                continue
            with storage_errors(paths.lock):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            return
    held_by = os.pread(descriptor, 32, 0).decode(errors="replace") or "?"
    msg = f"another raylaunch (pid {held_by}) has been changing cluster {paths.name} for more than {limit_s:.0f} s"
    raise ConflictError(msg, hint=f"wait for it, or check what it does: ps -fp {held_by}")
