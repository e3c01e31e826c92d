"""Train on your own GPU machines.

Importing this costs nothing: names are loaded when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from raylaunch.version import __version__

if TYPE_CHECKING:
    from raylaunch.errors import JobFailedError, RaylaunchError
    from raylaunch.job import context, report
    from raylaunch.models.cluster_spec import ClusterSpec
    from raylaunch.models.fields import Environment
    from raylaunch.models.job_spec import JobSpec, Resources, Tracking, Where
    from raylaunch.models.states import JobState
    from raylaunch.sdk import AsyncCluster, AsyncJob, Cluster, Job, aconnect, connect

_HOMES = {
    "AsyncCluster": "raylaunch.sdk",
    "AsyncJob": "raylaunch.sdk",
    "Cluster": "raylaunch.sdk",
    "ClusterSpec": "raylaunch.models.cluster_spec",
    "Environment": "raylaunch.models.fields",
    "Job": "raylaunch.sdk",
    "JobFailedError": "raylaunch.errors",
    "JobSpec": "raylaunch.models.job_spec",
    "JobState": "raylaunch.models.states",
    "RaylaunchError": "raylaunch.errors",
    "Resources": "raylaunch.models.job_spec",
    "Tracking": "raylaunch.models.job_spec",
    "Where": "raylaunch.models.job_spec",
    "aconnect": "raylaunch.sdk",
    "connect": "raylaunch.sdk",
    "context": "raylaunch.job",
    "report": "raylaunch.job",
}

__all__ = [
    "AsyncCluster",
    "AsyncJob",
    "Cluster",
    "ClusterSpec",
    "Environment",
    "Job",
    "JobFailedError",
    "JobSpec",
    "JobState",
    "RaylaunchError",
    "Resources",
    "Tracking",
    "Where",
    "__version__",
    "aconnect",
    "connect",
    "context",
    "report",
]


def __getattr__(name: str) -> object:
    """Load a public name from its module when it is first used (PEP 562)."""
    home = _HOMES.get(name)
    if home is None:
        msg = f"module 'raylaunch' has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
