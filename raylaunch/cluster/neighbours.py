"""Other raylaunch clusters on this machine, and whether they use the same GPUs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from raylaunch.cluster.controller_program import MODULE
from raylaunch.cluster.gpus import GpuChoice
from raylaunch.cluster.home import user_name
from raylaunch.cluster.record import ClusterRecord
from raylaunch.errors import ConflictError
from raylaunch.spec import ClusterSpec


@dataclass(frozen=True)
class Neighbour:
    """Another cluster that runs here. `gpu_uuids` is None where its record is not ours to read."""

    name: str
    user: str
    folder: str
    pid: int
    gpu_uuids: tuple[str, ...] | None

    def __str__(self) -> str:
        return f"cluster {self.name} of user {self.user} (controller pid {self.pid}, {self.folder})"


def neighbours(own_config: Path) -> list[Neighbour]:
    """Return the clusters whose controllers run on this machine, except the one configured by `own_config`."""
    found = []
    for process in psutil.process_iter():
        try:
            config = config_of(process.cmdline())
            if config is None or config == own_config or process.status() == psutil.STATUS_ZOMBIE:
                continue
            found.append(_neighbour(config, user=user_name(process.uids().real), pid=process.pid))
        except psutil.Error:  # it ended while we looked, or hides from us
            continue
    return found


def config_of(argv: list[str]) -> Path | None:
    """Return the configuration with which a controller was started; None if this is no controller."""
    for at, word in enumerate(argv[:-3]):
        if word == "-m" and argv[at + 1] == MODULE and argv[at + 2] == "--config":
            return Path(argv[at + 3])
    return None


def _neighbour(config: Path, *, user: str, pid: int) -> Neighbour:
    try:
        record = ClusterRecord.model_validate_json((config.parent / "cluster.json").read_bytes())
    except (OSError, ValueError):
        return Neighbour(name=config.parent.name, user=user, folder=str(config.parent), pid=pid, gpu_uuids=None)
    return Neighbour(name=record.name, user=user, folder=str(config.parent), pid=pid, gpu_uuids=record.gpu_uuids)


def check_gpus(spec: ClusterSpec, choice: GpuChoice, others: Iterable[Neighbour]) -> None:
    """Refuse to use a GPU that another cluster uses. Logical GPUs never conflict.

    A cluster whose record we may not read is taken to use all GPUs, unless the spec lists which ones are wanted.

    Raises:
        ConflictError: it says whose cluster that is, and which GPUs.
    """
    for other in others:
        shared = [gpu for gpu in choice.gpus if other.gpu_uuids is None or gpu.uuid in other.gpu_uuids]
        if not shared or (other.gpu_uuids is None and spec.gpus != "auto"):
            continue
        which = ", ".join(gpu.index for gpu in shared)
        word = "uses" if other.gpu_uuids is not None else "may use"
        msg = f"{other} {word} GPU{'s' if len(shared) > 1 else ''} {which} of this machine"
        raise ConflictError(
            msg, hint=f"{_way_in(other)}, or list other GPUs in cluster.yaml (gpus: [..]; gpus: 0 for none)"
        )


def _way_in(other: Neighbour) -> str:
    me = user_name(os.getuid())
    if other.user == me:
        return "use that cluster"
    return f"use that cluster (ask {other.user} for: raylaunch token create --for {me})"
