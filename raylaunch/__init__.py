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
    from raylaunch.sdk import AsyncCluster, AsyncJob, Cluster, Job, aconnect, connect
    from raylaunch.spec import ClusterSpec, JobSpec
    from raylaunch.state import JobState

_HOMES = {
    "AsyncCluster": "raylaunch.sdk",
    "AsyncJob": "raylaunch.sdk",
    "Cluster": "raylaunch.sdk",
    "ClusterSpec": "raylaunch.spec",
    "Job": "raylaunch.sdk",
    "JobFailedError": "raylaunch.errors",
    "JobSpec": "raylaunch.spec",
    "JobState": "raylaunch.state",
    "RaylaunchError": "raylaunch.errors",
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
    "Job",
    "JobFailedError",
    "JobSpec",
    "JobState",
    "RaylaunchError",
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
