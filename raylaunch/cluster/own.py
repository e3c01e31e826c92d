"""Which of the clusters that a probe found is the one that is asked for. A pure function."""

from __future__ import annotations

from raylaunch.cluster.facts import FoundCluster, HostFacts
from raylaunch.spec import ClusterSpec


def is_own(cluster: FoundCluster, spec: ClusterSpec, facts: HostFacts) -> bool:
    """Return whether a cluster that was found is the one that is asked for: its name, and in our own folder."""
    if facts.root and not cluster.folder.startswith(f"{facts.root}/"):
        return False
    return cluster.name == spec.name and cluster.user == facts.user
