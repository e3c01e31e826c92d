"""What this machine knows of a cluster on other machines: ``client.json``, and ``tunnel.json`` beside it."""

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
    """Those that were brought up, also such as are not in the spec any more; by name."""
    head: str = ""
    """The name of the one with the controller."""
    proved: tuple[str, ...] = ()
    """Hosts on which a job has run since they were started, and that reach the others."""
    begun: tuple[str, ...] = ()
    """Hosts on which an `up` from here has started something, or was about to, and did not come to hear of it."""
    owner: str = ""
    """Who brought the cluster up and invited us, where we joined it; empty where that was done from here."""
    gcs: bool = False
    """Whether the tunnel leads to the GCS, Ray's own port, too: `raylaunch env --gcs`."""
    at: float = Field(default_factory=time.time)

    @field_serializer("spec")
    def _said(self, spec: ClusterSpec) -> dict[str, object]:
        """Leave out defaults: an older raylaunch takes a record with fields that it does not know for none."""
        return spec.non_defaults()

    @property
    def joined(self) -> bool:
        """Whether somebody else runs the cluster: it is used from here, and not brought up, changed or ended."""
        return bool(self.owner)

    def with_(self, **changes: object) -> ClientRecord:
        """Return a copy with some fields changed."""
        return self.model_copy(update=changes)


class TunnelRecord(BaseModel):
    """A tunnel's process, and where it listens here."""

    model_config = ConfigDict(frozen=True)

    process: ProcessIdentity
    ports: dict[str, int]
    """``controller``, ``dashboard`` and, where it is asked for, ``gcs``, on loopback."""
    head_fingerprint: str = ""
    """Of the host key that the head showed."""
    head_address: str = ""
    """The address that it was reached at."""
    head_ports: dict[str, int] = Field(default_factory=dict)
    """Where it leads to on the head."""
    openssh: tuple[str, ...] = ()
    """The command of the `ssh` that is installed, to the head, for large files; empty where there is none."""
    up: bool = False
    why: str = ""
    """Why it is not up, in words."""
    hint: str = ""
    code: str = ""
    """The error's."""
    at: float = 0.0
    """When it came up, or went down; seconds since the epoch."""
    version: str = ""
    """Of the raylaunch that it runs; empty before 0.2.0."""

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return is_alive(self.process)


def client_file(paths: ClusterPaths) -> Path:
    """Return the path of ``client.json``."""
    return paths.root / "client.json"


def tunnel_file(paths: ClusterPaths) -> Path:
    """Return the path of ``tunnel.json``."""
    return paths.root / "tunnel.json"


def tunnel_log(paths: ClusterPaths) -> Path:
    """Return the path of what the tunnel says."""
    return paths.root / "tunnel.log"


def load_client(paths: ClusterPaths) -> ClientRecord | None:
    """Return what is known of the cluster here; None when there is nothing that can be understood.

    Raises:
        StorageError: it is there and cannot be read.
    """
    return _load(client_file(paths), ClientRecord)


def load_tunnel(paths: ClusterPaths) -> TunnelRecord | None:
    """Return what the tunnel last said; None when there was none.

    Raises:
        StorageError: it is there and cannot be read.
    """
    return _load(tunnel_file(paths), TunnelRecord)


def _load(path: Path, model: type[_Model]) -> _Model | None:
    with storage_errors(path):
        try:
            return model.model_validate_json(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValidationError):
            return None


def save_client(paths: ClusterPaths, record: ClientRecord) -> ClientRecord:
    """Write ``client.json``, and the spec as a cluster file beside it; return the record."""
    write_private(client_file(paths), record.model_dump_json(indent=2))
    spec = json.dumps(record.spec.non_defaults(), indent=2)
    write_private(paths.root / "cluster.yaml", f"# As it was last brought up. JSON is YAML too.\n{spec}\n")
    return record


def save_tunnel(paths: ClusterPaths, record: TunnelRecord) -> TunnelRecord:
    """Write ``tunnel.json``, and return the record."""
    write_private(tunnel_file(paths), record.model_dump_json(indent=2))
    return record


def refuse_joined(record: ClientRecord | None, what: str) -> None:
    """Refuse to change a cluster that somebody else runs.

    Raises:
        AccessError: it is one.
    """
    if record is not None and record.joined:
        msg = f"cluster {record.spec.name} is run by {record.owner}, and is not {what} from here"
        raise AccessError(
            msg, hint=f"ask {record.owner}; to forget the cluster here: raylaunch leave {record.spec.name}"
        )
