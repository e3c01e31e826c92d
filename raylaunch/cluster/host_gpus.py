"""Which of a host's real GPUs the cluster uses. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from raylaunch.cluster.own import is_own
from raylaunch.cluster.probe.facts import HostFacts, HostGpu
from raylaunch.spec import ClusterSpec, HostSpec

_SHORTEST_UUID = len("GPU-") + 4


def chosen_gpus(spec: ClusterSpec, host: HostSpec, facts: HostFacts) -> tuple[HostGpu, ...]:
    """Return the real GPUs that the cluster would use on the host.

    A number means so many of them: those that the cluster has already, then those that no other cluster has.
    """
    gpus = facts.gpus.gpus
    match host.gpus:
        case "auto":
            return gpus
        case int(count):
            ours, others = _of_clusters(spec, facts)
            best = sorted(range(len(gpus)), key=lambda at: (gpus[at].uuid not in ours, gpus[at].uuid in others, at))
            return tuple(gpus[at] for at in sorted(best[:count]))
        case words:
            return tuple(gpu for word in words if (gpu := find_gpu(word, gpus)) is not None)


def counted(spec: ClusterSpec, host: HostSpec, facts: HostFacts) -> HostSpec:
    """Return the host with a number of GPUs made into which ones; without any real ones it stays a number."""
    if not isinstance(host.gpus, int) or not facts.gpus.gpus or host.gpus == 0:
        return host
    return host.model_copy(update={"gpus": tuple(gpu.uuid for gpu in chosen_gpus(spec, host, facts))})


def find_gpu(word: str, gpus: Sequence[HostGpu]) -> HostGpu | None:
    """Return the GPU with that index or UUID, or whose UUID alone begins so."""
    exact = next((gpu for gpu in gpus if word in (gpu.index, gpu.uuid)), None)
    if exact is not None or len(word) < _SHORTEST_UUID:
        return exact
    close = [gpu for gpu in gpus if gpu.uuid.startswith(word)]
    return close[0] if len(close) == 1 else None


def _of_clusters(spec: ClusterSpec, facts: HostFacts) -> tuple[set[str], set[str]]:
    """Return the UUIDs of the GPUs that this cluster has on the host, and those that others have."""
    ours: set[str] = set()
    others: set[str] = set()
    for cluster in facts.clusters:
        runs = cluster.pid is not None or cluster.wanted == "running"
        if is_own(cluster, spec, facts):
            ours |= set(cluster.gpu_uuids or ())
        elif runs:
            others |= set(cluster.gpu_uuids or ())
    return ours, others
