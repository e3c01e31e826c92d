"""Which processes belong to a cluster, however they were started; and ending them all."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from raylaunch.cluster.processes import VAR_CLUSTER_ID, VAR_CONTROLLER_OF, ProcessIdentity, end, is_alive, matching

_VAR_ATTEMPT = "RAYLAUNCH_ATTEMPT_ID"  # runner.contract.VAR_ATTEMPT: ``<cluster id>/<job>-<n>``
_AGENT_TITLES = ("ray::NodeAgent", "ray::Steward")
"""The titles of node agents of this version and of 0.1."""
_OWN = ("raylet", "gcs_server", "ray::", "ray-")


def of_ray(cluster_id: str, head: ProcessIdentity | None, temp: Path) -> list[ProcessIdentity]:
    """Return a cluster's Ray processes: the head's descendants, its session, and all with its id in the environment."""
    tree = _descendants(head)

    def ours(process: psutil.Process) -> bool:
        if process.pid in tree or _has_id(process, cluster_id):
            return True
        return head is not None and os.getsid(process.pid) == head.pid and _looks_like_ray(process, temp)

    return matching(ours, uid=os.getuid())


def of_controller(cluster_id: str) -> list[ProcessIdentity]:
    """Return the controller's processes of a cluster: itself, its bridge to Ray, and the restart of Ray."""
    return matching(lambda process: process.environ().get(VAR_CONTROLLER_OF) == cluster_id, uid=os.getuid())


def runners(cluster_id: str) -> list[ProcessIdentity]:
    """Return the runners of a cluster's jobs: at SIGTERM they stop their training with its grace, and finish W&B."""

    def ours(process: psutil.Process) -> bool:
        tagged = process.environ().get(_VAR_ATTEMPT, "").startswith(f"{cluster_id}/")
        return tagged and any(word.endswith("/runner.pyz") for word in process.cmdline())

    return matching(ours, uid=os.getuid())


def node_agents(head: ProcessIdentity | None) -> list[ProcessIdentity]:
    """Return the node agents of a Ray on this machine; Ray restarts one that exits."""
    tree = _descendants(head)
    return matching(lambda one: one.pid in tree and one.cmdline()[0].startswith(_AGENT_TITLES), uid=os.getuid())


def _descendants(head: ProcessIdentity | None) -> set[int]:
    if head is None or not is_alive(head):
        return set()
    try:
        return {head.pid, *(child.pid for child in psutil.Process(head.pid).children(recursive=True))}
    except psutil.NoSuchProcess:
        return set()


def _has_id(process: psutil.Process, cluster_id: str) -> bool:
    environ = process.environ()
    return environ.get(VAR_CLUSTER_ID) == cluster_id or environ.get(_VAR_ATTEMPT, "").startswith(f"{cluster_id}/")


def _looks_like_ray(process: psutil.Process, temp: Path) -> bool:
    """Check session and title: Ray's workers overwrite their environment with their title."""
    line = " ".join(process.cmdline())
    return str(temp) in line or line.startswith(_OWN) or "/ray/" in line


async def sweep_ray(cluster_id: str, head: ProcessIdentity | None, temp: Path) -> dict[ProcessIdentity, str]:
    """End all of Ray's processes that are left of a cluster; return how each ended.

    It repeats until none is found, because an ended process may just have started another.
    """
    ended: dict[ProcessIdentity, str] = {}
    for _ in range(5):
        left = of_ray(cluster_id, head, temp)
        if not left:
            break
        how = await end(left, grace_s=3)
        ended |= {one: how[one.pid] for one in left}
    return ended
