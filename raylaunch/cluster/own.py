"""Which of the clusters that a probe found is the one that is asked for, and how one comes into the others. Pure."""

from __future__ import annotations

import time

from raylaunch.cluster.probe.facts import FoundCluster, HostFacts
from raylaunch.spec import ClusterSpec


def is_own(cluster: FoundCluster, spec: ClusterSpec, facts: HostFacts) -> bool:
    """Return whether a cluster that was found is the one that is asked for: its name, and in our own folder."""
    if facts.root and not cluster.folder.startswith(f"{facts.root}/"):
        return False
    return cluster.name == spec.name and cluster.user == facts.user


def runs_here(cluster: FoundCluster) -> str:
    """Say who runs a cluster on the host, and since when."""
    since = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(cluster.since)) if cluster.since else ""
    beside = ", ".join(
        [*([f"since {since}"] if since else []), *([f"controller pid {cluster.pid}"] if cluster.pid else [])]
    )
    return f"{cluster.user} runs cluster {cluster.name} there ({beside or 'it is down now'}; {cluster.folder})"


def way_in(cluster: FoundCluster, facts: HostFacts) -> str:
    """Say how the one who asked comes into a cluster that somebody runs on the host."""
    if cluster.user == facts.user:
        return (
            f"it is this account's: write name: {cluster.name} in cluster.yaml, and raylaunch up uses it from here too"
        )
    return f"ask {cluster.user} for: raylaunch token create --for {facts.user}; paste the line that it prints"
