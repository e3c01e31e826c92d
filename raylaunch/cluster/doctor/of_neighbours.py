"""What other programs of a host stand in the way: its ports, other Rays, clusters of other people. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator

from raylaunch.cluster.doctor.problem import Problem, blocking, warning
from raylaunch.cluster.own import is_own, runs_here, way_in
from raylaunch.cluster.ports import RAY_PORTS, SINGLE_PORTS, WORKER_BLOCKS, worker_ports
from raylaunch.cluster.probe.facts import FoundCluster, HostFacts
from raylaunch.spec import ClusterSpec, HostSpec

_STEP = 100
_EXPIRING_DAYS = 60


def problems_of_neighbours(spec: ClusterSpec, host: HostSpec, facts: HostFacts) -> Iterator[Problem]:
    """Yield what other programs of the host stand in the way."""
    own = next((one for one in facts.clusters if is_own(one, spec, facts)), None)
    yield from _ports(spec, host, facts, own)
    yield from _rays(host, facts)
    yield from _of_others(spec, host, facts)
    yield from _certificate(host, own)


def _certificate(host: HostSpec, own: FoundCluster | None) -> Iterator[Problem]:
    if own is None or own.tls_days is None or own.wanted != "running" or own.tls_days >= _EXPIRING_DAYS:
        return
    when = f"expires in {own.tls_days} days" if own.tls_days > 0 else "has expired"
    message = f"the certificate of this host's Ray {when}; without it the host cannot join the others"
    yield warning(host.name, "certificate_expiring", message, "raylaunch down, then raylaunch up makes new ones")


def _of_others(spec: ClusterSpec, host: HostSpec, facts: HostFacts) -> Iterator[Problem]:
    """Offer the clusters that others run there. About one whose GPUs are wanted, the GPUs' problems say the same."""
    for cluster in facts.clusters:
        if cluster.user == facts.user or cluster.pid is None:
            continue
        mend = f"{way_in(cluster, facts)}; raylaunch up starts yours beside it"
        if cluster.name == spec.name:
            yield warning(host.name, "same_name_cluster", runs_here(cluster), mend)
        elif host.gpus == 0 or not facts.gpus.gpus or cluster.gpu_uuids == ():
            yield warning(host.name, "other_cluster", runs_here(cluster), mend)


def _ports(spec: ClusterSpec, host: HostSpec, facts: HostFacts, own: FoundCluster | None) -> Iterator[Problem]:
    if facts.listening is None or (own is not None and own.pid is not None):
        return
    taken = set(facts.listening)
    is_head = spec.kind == "local" or host.name == spec.hosts[0].name
    if is_head and spec.port in taken:
        holder = facts.holders.get(spec.port, "")
        by = f" by {holder}" if holder else ""
        message = f"port {spec.port}, which cluster.yaml wants for the controller, is taken there{by}"
        mend = "end that" if holder else f"see who has it: ss -ltnp sport = :{spec.port}"
        yield blocking(host.name, "port_taken", message, f"leave port out of cluster.yaml; or {mend}")
    free = sum(port not in taken for port in SINGLE_PORTS)
    length = worker_ports(facts.memory.cpus)
    if free <= len(RAY_PORTS) or not _has_block(facts, taken, length):
        message = (
            f"Ray's ports do not fit: it needs {len(RAY_PORTS) + 1} from {SINGLE_PORTS.start} to "
            f"{SINGLE_PORTS.stop - 1} ({free} are free), and a block of {length} from {WORKER_BLOCKS.start} to "
            f"{WORKER_BLOCKS.stop - 1}"
        )
        yield blocking(host.name, "no_free_ports", message, "end what holds them: ss -ltnp")


def _has_block(facts: HostFacts, taken: set[int], length: int) -> bool:
    used = [ray.worker_ports for ray in facts.rays or () if ray.worker_ports]
    blocks = (range(start, start + length) for start in range(WORKER_BLOCKS.start, WORKER_BLOCKS.stop - length, _STEP))
    return any(
        taken.isdisjoint(block) and not any(low < block.stop and block.start <= high for low, high in used)
        for block in blocks
    )


def _rays(host: HostSpec, facts: HostFacts) -> Iterator[Problem]:
    ours = {cluster.cluster_id for cluster in facts.clusters if cluster.cluster_id}
    folders = [cluster.user for cluster in facts.clusters]
    foreign = [ray for ray in facts.rays or () if ray.kind == "raylet" and ray.cluster_id not in ours]
    foreign = [ray for ray in foreign if not ("/raylaunch-" in ray.temp_dir and ray.user in folders)]
    if foreign:
        who = ", ".join(f"pid {ray.pid} of {ray.user or 'somebody'}" for ray in foreign[:3])
        message = (
            f"another Ray runs there ({who}); it is left alone, and raylaunch does not see what GPUs it has given away"
        )
        mend = "list GPUs that it does not use (gpus: [..]), or end that one by its process ids; Ray's command ends all"
        yield warning(host.name, "other_ray", message, mend)
