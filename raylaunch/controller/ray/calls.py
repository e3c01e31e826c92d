"""Calls to Ray itself: node agents, nodes, job supervisors. Blocking, for threads of a connected process."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypedDict

import ray
from ray._private import state as ray_state
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import raylaunch
from raylaunch.agent.agent import NodeAgent
from raylaunch.agent.node_info import NodeFacts
from raylaunch.contract import VAR_NODE_ROOT
from raylaunch.models.cluster import GpuView, NodeView
from raylaunch.version import __version__

_log = logging.getLogger(__name__)

HOST_LABEL = "raylaunch-host"
"""The Ray label with a node's host name in cluster.yaml; `raylaunch.cluster.local.ray_head` sets it."""

_BUILT_IN = ("CPU", "GPU", "memory", "object_store_memory")
_INTERNAL = ("node:", "accelerator_type:", "bundle_")
_ACCELERATOR = "accelerator_type:"
_ACCELERATOR_LABEL = "ray.io/accelerator-type"
_RELEASE_S, _RELEASE_POLL_S = 10.0, 0.1
_DIGITS = re.compile(r"(\d+)")


class RayNode(TypedDict):
    """A node as Ray reports it."""

    id: str
    alive: bool
    hostname: str
    address: str
    total: dict[str, float]
    free: dict[str, float]
    labels: dict[str, str]
    logs: str
    """Ray's log folder on the node."""


def node_view(row: RayNode, facts: NodeFacts | None, *, agent_responds: bool) -> NodeView | None:
    """Combine what Ray and the agent report about one node; None, and a line in the log, if that cannot be read.

    Args:
        row: Ray's report.
        facts: The agent's report; None if it has never responded.
        agent_responds: Whether it responds now.
    """
    try:
        return _node_view(row, facts, agent_responds=agent_responds)
    except (ValueError, TypeError, OverflowError) as error:
        _log.warning("skipping node %s, whose data cannot be read: %s", row["id"], error)
        return None


def _node_view(row: RayNode, facts: NodeFacts | None, *, agent_responds: bool) -> NodeView:
    total, free = row["total"], row["free"]
    gpus = tuple(GpuView.model_validate(gpu) for gpu in facts.gpus) if facts else ()
    return NodeView(
        id=row["id"],
        hostname=row["labels"].get(HOST_LABEL) or row["hostname"],
        address=row["address"],
        alive=row["alive"],
        arch=facts.arch if facts else "",
        cpus=total.get("CPU", 0),
        gpus=total.get("GPU", 0),
        memory=int(total.get("memory", 0)),
        custom={name: amount for name, amount in total.items() if _is_custom(name)},
        labels=row["labels"],
        cpus_free=max(0.0, free.get("CPU", 0)),  # negative while a blocked worker resumes
        gpus_free=max(0.0, free.get("GPU", 0)),
        memory_free=max(0, int(free.get("memory", 0))),
        gpu_type=gpus[0].name if gpus else _gpu_type(total, row["labels"]),
        gpu=gpus,
        disk_free=facts.disk_free if facts else None,
        steward=agent_responds,
    )


def by_name(nodes: Iterable[NodeView]) -> tuple[NodeView, ...]:
    """Return nodes sorted by name, ``dgx-2`` before ``dgx-10``. Pure."""
    return tuple(sorted(nodes, key=lambda node: _natural_key(node.hostname)))


def _natural_key(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (0, part) for part in _DIGITS.split(name)]


def _is_custom(name: str) -> bool:
    return name not in _BUILT_IN and not name.startswith(_INTERNAL) and "_group_" not in name


def _gpu_type(total: Mapping[str, float], labels: Mapping[str, str]) -> str:
    named = next((name[len(_ACCELERATOR) :] for name in total if name.startswith(_ACCELERATOR)), "")
    return named or labels.get(_ACCELERATOR_LABEL, "")


def connect(address: str, namespace: str, *, carries: bool = False) -> None:
    """Connect this process to Ray.

    Args:
        address: ``host:port`` of its head.
        namespace: Ray namespace of the agents.
        carries: whether Ray copies raylaunch's code to its nodes: it is not installed there, and each cluster that uses
            this Ray has its own folder there.
    """
    folder = f"~/.raylaunch/nodes/{namespace.removeprefix('raylaunch-')}"
    runtime_env = {"py_modules": [str(Path(raylaunch.__file__).parent)], "env_vars": {VAR_NODE_ROOT: folder}}
    ray.init(
        address=address,
        namespace=namespace,
        runtime_env=runtime_env if carries else None,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def release_agents(address: str, namespace: str) -> str:
    """Connect and kill every actor of a namespace; return the failures in words, usually none."""
    connect(address, namespace)
    until = time.monotonic() + _RELEASE_S
    while left := [one["name"] for one in list_named_actors(all_namespaces=True) if one["namespace"] == namespace]:
        if time.monotonic() > until:
            return f"{', '.join(left)}: still running {_RELEASE_S:.0f} s after being killed"
        for name in left:
            with contextlib.suppress(ValueError):  # it has exited meanwhile
                ray.kill(ray.get_actor(name, namespace=namespace), no_restart=True)
        time.sleep(_RELEASE_POLL_S)  # Ray kills in the background: this process must not exit before
    return ""


def agent_on(node_id: str, namespace: str) -> ray.actor.ActorHandle:
    """Return the agent of a node, starting it if there is none; agents of other versions are killed."""
    prefix = f"raylaunch-steward-{node_id}-"
    name = f"{prefix}{__version__}"
    for actor in list_named_actors(all_namespaces=True):
        if actor["namespace"] == namespace and actor["name"].startswith(prefix) and actor["name"] != name:
            ray.kill(ray.get_actor(actor["name"], namespace=namespace))
    return (
        ray.remote(NodeAgent)
        .options(
            name=name,
            namespace=namespace,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=100,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        )
        .remote()
    )


def kill_supervisor(submission: str) -> bool:
    """Kill a job's supervisor by the name from Ray (``ray.dashboard.modules.job.common`` in Ray 2.60)."""
    try:
        actor = ray.get_actor(f"_ray_internal_job_actor_{submission}", namespace="SUPERVISOR_ACTOR_RAY_NAMESPACE")
    except ValueError:  # there is none
        return False
    ray.kill(actor, no_restart=True)
    return True


def end_actors(job_id: str) -> list[str]:
    """Kill the named actors that a Ray job has left behind, so that Ray does not restart them; return their classes.

    Killing their processes is not enough: Ray Train and Data keep cluster-wide helpers as detached actors that are
    restarted without limit, with the job's own interpreter, which no longer exists.
    """
    left = {
        str(actor["ActorID"]): str(actor["ActorClassName"])
        for actor in ray_state.actors().values()
        if actor["JobID"] == job_id and actor["State"] != "DEAD" and actor["Name"]
    }
    ended = []
    for named in list_named_actors(all_namespaces=True) if left else []:
        with contextlib.suppress(ValueError):  # it has ended meanwhile
            actor = ray.get_actor(named["name"], namespace=named["namespace"])
            if actor._actor_id.hex() in left:  # noqa: SLF001 -- a name may exist in several namespaces
                ray.kill(actor, no_restart=True)
                ended.append(left[actor._actor_id.hex()])  # noqa: SLF001 -- same reason
    return ended


def nodes_of_ray() -> list[RayNode]:
    """Return every node that Ray lists, dead ones too."""
    free = ray_state.available_resources_per_node()
    return [
        RayNode(
            id=node["NodeID"],
            alive=node["Alive"],
            hostname=node["NodeManagerHostname"],
            address=node["NodeManagerAddress"],
            total=dict(node["Resources"]),
            free=dict(free.get(node["NodeID"], {})),
            labels=dict(node.get("Labels") or {}),
            logs=str(Path(node.get("ObjectStoreSocketName", "")).parent.parent / "logs"),
        )
        for node in ray.nodes()
    ]
