"""What this machine knows about a cluster on other machines: ``client.json``, and its tunnel's ``tunnel.json``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer

from raylaunch.cluster.processes import ProcessIdentity, is_alive
from raylaunch.errors import AccessError
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.models.host_spec import HostSpec
from raylaunch.paths import ClusterPaths, storage_errors, write_private

_Model = TypeVar("_Model", bound=BaseModel)


class HeadProgram(BaseModel):
    """How the host program is started on a host."""

    model_config = ConfigDict(frozen=True)

    python: str
    """The environment's interpreter."""
    root: str
    """raylaunch's folder there, absolute."""


class ClientRecord(BaseModel):
    """A cluster as it was last brought up, or joined, from here."""

    model_config = ConfigDict(frozen=True)

    spec: ClusterSpec
    cluster_id: str = ""
    wanted: Literal["running", "stopped"] = "running"
    token: str = Field(default="", repr=False)
    programs: dict[str, HeadProgram] = Field(default_factory=dict)
    """By host."""
    head_ports: dict[str, int] = Field(default_factory=dict)
    head_address: str = "127.0.0.1"
    """Where Ray's head listens on its host."""
    hosts: dict[str, HostSpec] = Field(default_factory=dict)
    """By name, every host that was brought up, including those that are no longer in the spec."""
    head: str = ""
    """The name of the host with the controller."""
    proved: tuple[str, ...] = ()
    """Hosts that are verified since they were started: a job has run there, and they reach the others."""
    begun: tuple[str, ...] = ()
    """Hosts on which an interrupted `up` from here may have started something."""
    owner: str = ""
    """Who runs the cluster, if it was joined by an invitation; empty if it was brought up from here."""
    gcs: bool = False
    """Whether the tunnel also forwards the GCS, Ray's own port: `raylaunch env --gcs`."""
    at: float = Field(default_factory=time.time)

    @field_serializer("spec")
    def _said(self, spec: ClusterSpec) -> dict[str, object]:
        """Leave out defaults: an older raylaunch ignores a record with fields that it does not know."""
        return spec.non_defaults()

    @property
    def joined(self) -> bool:
        """Whether somebody else runs the cluster: it can be used from here, but not changed or ended."""
        return bool(self.owner)

    def with_(self, **changes: object) -> ClientRecord:
        """Return a copy with some fields changed."""
        return self.model_copy(update=changes)


class TunnelRecord(BaseModel):
    """A tunnel's process, and where it listens here."""

    model_config = ConfigDict(frozen=True)

    process: ProcessIdentity
    ports: dict[str, int]
    """``controller``, ``dashboard`` and, if requested, ``gcs``, on loopback."""
    head_fingerprint: str = ""
    """The fingerprint of the head's host key."""
    head_address: str = ""
    """The address at which it was reached."""
    head_ports: dict[str, int] = Field(default_factory=dict)
    """The ports on the head that it forwards to."""
    openssh: tuple[str, ...] = ()
    """The command line of the installed `ssh` to the head, for large files; empty if there is none."""
    up: bool = False
    why: str = ""
    """Why it is not up."""
    hint: str = ""
    code: str = ""
    """The code of that error."""
    at: float = 0.0
    """When it came up or went down; seconds since the epoch."""
    version: str = ""
    """The raylaunch version that it runs; empty before 0.2.0."""

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return is_alive(self.process)


def tunnel_file(paths: ClusterPaths) -> Path:
    """Return the path of ``tunnel.json``."""
    return paths.root / "tunnel.json"


def tunnel_log(paths: ClusterPaths) -> Path:
    """Return the path of the tunnel's log."""
    return paths.root / "tunnel.log"


def load_client(paths: ClusterPaths) -> ClientRecord | None:
    """Return this machine's record of the cluster; None if there is none, or it is invalid.

    Raises:
        StorageError: it exists and cannot be read.
    """
    return _load(paths.root / "client.json", ClientRecord)


def load_tunnel(paths: ClusterPaths) -> TunnelRecord | None:
    """Return the tunnel's last record; None if there is none, or it is invalid.

    Raises:
        StorageError: it exists and cannot be read.
    """
    return _load(tunnel_file(paths), TunnelRecord)


def _load(path: Path, model: type[_Model]) -> _Model | None:
    with storage_errors(path):
        try:
            return model.model_validate_json(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValidationError):
            return None


def save_client(paths: ClusterPaths, record: ClientRecord) -> ClientRecord:
    """Write ``client.json``, and the spec as a cluster file next to it; return the record."""
    write_private(paths.root / "client.json", record.model_dump_json(indent=2))
    spec = json.dumps(record.spec.non_defaults(), indent=2)
    write_private(paths.root / "cluster.yaml", f"# As it was last brought up. JSON is YAML too.\n{spec}\n")
    return record


def save_tunnel(paths: ClusterPaths, record: TunnelRecord) -> None:
    """Write ``tunnel.json``."""
    write_private(tunnel_file(paths), record.model_dump_json(indent=2))


def refuse_joined(record: ClientRecord | None, what: str) -> None:
    """Refuse to change a cluster that somebody else runs.

    Raises:
        AccessError: somebody else runs it.
    """
    if record is not None and record.joined:
        msg = f"cluster {record.spec.name} is run by {record.owner} and cannot be {what} from here"
        raise AccessError(
            msg, hint=f"ask {record.owner}; to forget the cluster here: raylaunch leave {record.spec.name}"
        )
