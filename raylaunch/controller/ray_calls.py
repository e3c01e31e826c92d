"""What the link asks of Ray itself: stewards, nodes, supervisors. Blocking, for threads of a connected process."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import ray
from ray._private import state as ray_state
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import raylaunch
from raylaunch.controller.nodes import RayNode
from raylaunch.node.steward import Steward
from raylaunch.runner.contract import VAR_NODE_ROOT
from raylaunch.version import __version__


def connect(address: str, namespace: str, *, carries: bool = False) -> None:
    """Connect this process to Ray.

    Args:
        address: ``host:port`` of its head.
        namespace: of the stewards.
        carries: whether Ray brings raylaunch's code to its nodes: it is not there, and each cluster that uses this
            Ray has a folder of its own there.
    """
    folder = f"~/.raylaunch/nodes/{namespace.removeprefix('raylaunch-')}"
    brought = {"py_modules": [str(Path(raylaunch.__file__).parent)], "env_vars": {VAR_NODE_ROOT: folder}}
    ray.init(
        address=address,
        namespace=namespace,
        runtime_env=brought if carries else None,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def end_stewards(address: str, namespace: str) -> str:
    """Connect, and end every actor of a namespace; return in words what could not be ended, mostly nothing."""
    connect(address, namespace)
    left = []
    for actor in list_named_actors(all_namespaces=True):
        if actor["namespace"] == namespace:
            try:
                ray.kill(ray.get_actor(actor["name"], namespace=namespace), no_restart=True)
            except ValueError:  # it has ended meanwhile
                continue
            except ray.exceptions.RayError as error:
                left.append(f"{actor['name']}: {error}")
    return "; ".join(left)


def steward_on(node_id: str, namespace: str) -> ray.actor.ActorHandle:
    """Return the steward of a node, started when there is none; those of other versions are ended."""
    prefix = f"raylaunch-steward-{node_id}-"
    name = f"{prefix}{__version__}"
    for actor in list_named_actors(all_namespaces=True):
        if actor["namespace"] == namespace and actor["name"].startswith(prefix) and actor["name"] != name:
            ray.kill(ray.get_actor(actor["name"], namespace=namespace))
    return (
        ray.remote(Steward)
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
    """Kill a job's supervisor by the name that Ray gives it (``ray.dashboard.modules.job.common`` of Ray 2.60)."""
    try:
        actor = ray.get_actor(f"_ray_internal_job_actor_{submission}", namespace="SUPERVISOR_ACTOR_RAY_NAMESPACE")
    except ValueError:  # there is none
        return False
    ray.kill(actor, no_restart=True)
    return True


def end_actors(job_id: str) -> list[str]:
    """Kill what named actors a job of Ray has left, so that Ray does not start them again; return their classes.

    Killing their processes is not enough: Ray Train and Data keep helpers of the whole cluster as detached actors that
    are restarted for ever, and with the job's own interpreter, which is gone.
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
            if actor._actor_id.hex() in left:  # noqa: SLF001 -- a name alone may stand in several namespaces
                ray.kill(actor, no_restart=True)
                ended.append(left[actor._actor_id.hex()])  # noqa: SLF001 -- as above
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
