"""A node as people see it, from what Ray and its steward say. Pure."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import TypedDict

from pydantic import ValidationError

from raylaunch.cluster_state import GpuView, NodeView
from raylaunch.node.facts import NodeFacts

_log = logging.getLogger(__name__)

HOST_LABEL = "raylaunch-host"
"""Ray's label of a node that bears the host's name in cluster.yaml; `raylaunch.cluster.ray_head` sets it."""

_BUILT_IN = ("CPU", "GPU", "memory", "object_store_memory")
_INTERNAL = ("node:", "accelerator_type:", "bundle_")
_ACCELERATOR = "accelerator_type:"
_ACCELERATOR_LABEL = "ray.io/accelerator-type"
_DIGITS = re.compile(r"(\d+)")


class RayNode(TypedDict):
    """What Ray says of a node."""

    id: str
    alive: bool
    hostname: str
    address: str
    total: dict[str, float]
    free: dict[str, float]
    labels: dict[str, str]
    logs: str
    """Folder on the node where Ray keeps its logs."""


def node_view(row: RayNode, facts: NodeFacts | None, *, steward: bool) -> NodeView:
    """Put together what Ray and the steward say of one node.

    Args:
        row: What Ray says.
        facts: What its steward says; None when it never answered.
        steward: Whether it answers now.
    """
    total, free = row["total"], row["free"]
    gpus = tuple(GpuView.model_validate(gpu) for gpu in facts["gpus"]) if facts else ()
    return NodeView(
        id=row["id"],
        hostname=row["labels"].get(HOST_LABEL) or row["hostname"],
        address=row["address"],
        alive=row["alive"],
        arch=facts["arch"] if facts else "",
        cpus=total.get("CPU", 0),
        gpus=total.get("GPU", 0),
        memory=int(total.get("memory", 0)),
        custom={name: amount for name, amount in total.items() if _is_custom(name)},
        labels=row["labels"],
        cpus_free=max(0.0, free.get("CPU", 0)),  # below nothing where a worker that waited goes on
        gpus_free=max(0.0, free.get("GPU", 0)),
        memory_free=max(0, int(free.get("memory", 0))),
        gpu_type=gpus[0].name if gpus else _gpu_type(total, row["labels"]),
        gpu=gpus,
        disk_free=facts["disk_free"] if facts else None,
        steward=steward,
    )


def node_views(rows: Iterable[object]) -> tuple[NodeView, ...]:
    """Return the nodes that can be read; the others are left out, and logged."""
    found = []
    for row in rows:
        try:
            found.append(NodeView.model_validate(row))
        except ValidationError as error:  # noqa: PERF203 -- each is one node
            _log.warning("a node is left out, since what is said of it cannot be read: %s", error)
    return tuple(found)


def by_name(nodes: Iterable[NodeView]) -> tuple[NodeView, ...]:
    """Return nodes in the order of their names, ``dgx-2`` before ``dgx-10``: Ray lists them in any. Pure."""
    return tuple(sorted(nodes, key=lambda node: _counted(node.hostname)))


def _counted(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (0, part) for part in _DIGITS.split(name)]


def _is_custom(name: str) -> bool:
    return name not in _BUILT_IN and not name.startswith(_INTERNAL) and "_group_" not in name


def _gpu_type(total: Mapping[str, float], labels: Mapping[str, str]) -> str:
    named = next((name[len(_ACCELERATOR) :] for name in total if name.startswith(_ACCELERATOR)), "")
    return named or labels.get(_ACCELERATOR_LABEL, "")
