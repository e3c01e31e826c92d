"""raylaunch from Python: clusters and jobs, blocking for notebooks and scripts, asynchronous for programs."""

from __future__ import annotations

from raylaunch.sdk.async_cluster import AsyncCluster
from raylaunch.sdk.async_job import AsyncJob
from raylaunch.sdk.cluster import Cluster
from raylaunch.sdk.job import Job

__all__ = ["AsyncCluster", "AsyncJob", "Cluster", "Job", "aconnect", "connect"]

connect = Cluster.connect
aconnect = AsyncCluster.connect
