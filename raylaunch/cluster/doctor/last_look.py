"""What the doctor found last, kept here for those who cannot wait for another look: ``doctor.json`` of a cluster."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from raylaunch.cluster.doctor.problem import Problem
from raylaunch.cluster.home import cluster_paths, make_private_dir, raylaunch_home, write_private
from raylaunch.errors import ConflictError, StorageError
from raylaunch.spec import ClusterSpec, HostSpec

YOUNG_S = 3600.0
"""Older findings say little: disks fill, and people mend things."""

_log = logging.getLogger(__name__)


class LastLook(BaseModel):
    """The problems of a cluster's hosts at one time, blocking ones first."""

    model_config = ConfigDict(frozen=True)

    at: float
    """Seconds since the epoch."""
    hosts: tuple[str, ...]
    problems: tuple[Problem, ...] = ()

    @property
    def blocked(self) -> tuple[str, ...]:
        """The hosts on which `up` would not begin."""
        ill = {one.host for one in self.problems if one.level == "blocking"}
        return tuple(host for host in self.hosts if host in ill or "" in ill)


def keep_problems(spec: ClusterSpec, problems: Sequence[Problem]) -> LastLook:
    """Keep the problems of all hosts of `spec` as they were seen just now. A disk that takes nothing is no error."""
    hosts = tuple(host.name for host in hosts_to_look_at(spec))
    look = LastLook(at=time.time(), hosts=hosts, problems=tuple(problems))
    file = _file(spec)
    try:
        for folder in (file.parent.parent.parent, file.parent.parent, file.parent):
            make_private_dir(folder)
        write_private(file, look.model_dump_json(indent=2) + "\n")
    except (ConflictError, StorageError) as error:
        _log.warning("what the doctor found is not kept: %s", error.message)
    return look


def last_look(spec: ClusterSpec, *, now: float) -> LastLook | None:
    """Return what was found last; None where that is older than an hour, or was of other hosts."""
    try:
        look = LastLook.model_validate_json(_file(spec).read_bytes())
    except (OSError, ValidationError):
        return None
    same = look.hosts == tuple(host.name for host in hosts_to_look_at(spec))
    return look if same and 0 <= now - look.at <= YOUNG_S else None


def hosts_to_look_at(spec: ClusterSpec) -> tuple[HostSpec, ...]:
    """Return the hosts that the doctor looks at, in the order of cluster.yaml; of an embedded cluster this machine."""
    return spec.host_specs() if spec.kind == "ssh" else (_this_host(spec),)


def _this_host(spec: ClusterSpec) -> HostSpec:
    name = platform.node().partition(".")[0]
    return HostSpec(
        host="localhost", name=name if name.isalnum() else "here", root=str(raylaunch_home()), store=spec.store
    )


def _file(spec: ClusterSpec) -> Path:
    return cluster_paths(spec.name).root / "doctor.json"
