"""Problems of a host's GPUs, and conflicts with other programs on the host. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from raylaunch.cluster.doctor.problem import Problem, blocking, warning
from raylaunch.cluster.ports import RAY_PORTS, SINGLE_PORTS, WORKER_BLOCKS, worker_ports
from raylaunch.cluster.probe.choices import access_hint, chosen_gpus, describe_running, find_gpu, is_own
from raylaunch.cluster.probe.facts import FoundCluster, HostFacts, HostGpu
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.models.host_spec import HostSpec

_XID = re.compile(r"NVRM: Xid \((?P<device>[^)]*)\): (?P<number>\d+)")
_GRAVE = {
    48: "uncorrected memory error",
    74: "NVLink error",
    79: "fallen off the bus",
    94: "contained memory error",
    95: "uncontained memory error",
    119: "GSP does not answer",
    120: "GSP error",
}
"""Xids after which the GPU needs a reset or repair; most others are bugs of programs. See NVIDIA's Xid Errors."""
_NAMED = 4


def problems_of_gpus(spec: ClusterSpec, host: HostSpec, facts: HostFacts) -> Iterator[Problem]:
    """Yield problems of the GPUs that the cluster would use on the host."""
    if host.gpus == 0:
        return
    if missing := _driver(host, facts):
        yield missing
        return
    yield from _count(host, facts)
    chosen = chosen_gpus(spec, host, facts)
    yield from _busy(host, chosen)
    yield from _of_other_clusters(spec, host, facts, chosen)
    yield from _health(host, facts, chosen)


def _driver(host: HostSpec, facts: HostFacts) -> Problem | None:
    gpus = facts.gpus
    if gpus.problem:
        message = f"nvidia-smi fails: {gpus.problem[:200]}"
        fix = "reboot if the driver was updated, else reinstall the driver; gpus: 0 does not use the GPUs"
        return blocking(host.name, "driver_broken", message, fix)
    if gpus.hardware and not gpus.nvidia_smi:
        message = f"{_count_of(gpus.hardware, 'NVIDIA GPU')} on its bus, and no nvidia-smi"
        fix = "install the NVIDIA driver (sudo apt install nvidia-driver-…-server); gpus: 0 does not use the GPUs"
        return blocking(host.name, "driver_missing", message, fix)
    return None


def _count_of(number: int, one: str) -> str:
    return f"{number} {one}" + ("s are" if number != 1 else " is")


def _count(host: HostSpec, facts: HostFacts) -> Iterator[Problem]:
    gpus = facts.gpus.gpus
    has = ", ".join(str(gpu) for gpu in gpus) or "none"
    if isinstance(host.gpus, int):
        if not gpus:
            message = f"it has no GPU: its {host.gpus} are logical ones, which jobs are given but cannot compute on"
            yield warning(host.name, "gpus_logical", message, "leave gpus out for a host without GPUs")
        elif len(gpus) < host.gpus:
            message = f"{host.gpus} GPUs are requested, but it has {len(gpus)}: {has}"
            yield blocking(host.name, "gpus_missing", message, f"write gpus: {len(gpus)}, or find the others: lspci")
        return
    if host.gpus == "auto":
        if facts.gpus.hardware and len(gpus) < facts.gpus.hardware:
            message = f"nvidia-smi lists {len(gpus)} of the {facts.gpus.hardware} NVIDIA GPUs on its bus"
            yield warning(host.name, "gpus_missing", message, "check sudo dmesg | grep -i nvrm: one may have failed")
        return
    absent = [word for word in host.gpus if find_gpu(word, gpus) is None]
    if absent:
        message = f"it has no GPU {', '.join(absent)}; it has {has}"
        yield blocking(host.name, "gpus_missing", message, "list ids or UUIDs from: nvidia-smi -L")


def _busy(host: HostSpec, gpus: Sequence[HostGpu]) -> Iterator[Problem]:
    for gpu in gpus:
        others = [process for process in gpu.processes if not process.ours]
        if others:
            named = ", ".join(str(process) for process in others[:_NAMED])
            more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
            message = f"GPU {gpu.index} ({gpu.name}) is used by {named}{more}"
            fix = "jobs wait for that GPU until it is free; to leave it out, list the others: gpus: [..]"
            yield warning(host.name, "gpus_busy", message, fix)


def _of_other_clusters(
    spec: ClusterSpec, host: HostSpec, facts: HostFacts, gpus: Sequence[HostGpu]
) -> Iterator[Problem]:
    for cluster in facts.clusters:
        if is_own(cluster, spec, facts) or (cluster.pid is None and cluster.wanted != "running"):
            continue
        shared = [gpu for gpu in gpus if cluster.gpu_uuids is None or gpu.uuid in cluster.gpu_uuids]
        if not shared:
            continue
        which = f"GPU{'s' if len(shared) > 1 else ''} {', '.join(gpu.index for gpu in shared)}"
        fix = f"{access_hint(cluster, facts)}; or list other GPUs: gpus: [..]"
        if cluster.gpu_uuids is not None:
            yield blocking(
                host.name, "gpus_of_another_cluster", f"{describe_running(cluster)}, and it uses {which}", fix
            )
        elif host.gpus == "auto":
            message = f"{describe_running(cluster)}, and it may use {which}: its record cannot be read"
            yield blocking(host.name, "gpus_of_another_cluster", message, fix)
        else:
            message = (
                f"{describe_running(cluster)}, and it may use {which}: its record cannot be read, but you list yours"
            )
            yield warning(host.name, "gpus_of_another_cluster", message, f"ask {cluster.user} which they are")


def _health(host: HostSpec, facts: HostFacts, gpus: Sequence[HostGpu]) -> Iterator[Problem]:
    sliced = [gpu.index for gpu in gpus if gpu.mig]
    if sliced:
        message = (
            f"MIG is on for GPU {', '.join(sliced)} ({facts.gpus.mig_devices} slices): a job is given the whole GPU's "
            "number, and CUDA then shows it one slice"
        )
        yield warning(host.name, "mig_enabled", message, f"sudo nvidia-smi -i {sliced[0]} -mig 0, while nobody uses it")
    for gpu in gpus:
        if gpu.compute_mode == "Prohibited":
            message = f"the compute mode of GPU {gpu.index} is Prohibited: no program may use it"
            yield blocking(host.name, "gpu_not_for_compute", message, f"sudo nvidia-smi -i {gpu.index} -c DEFAULT")
        if gpu.ecc_errors:
            message = (
                f"GPU {gpu.index} ({gpu.name}) has {gpu.ecc_errors} uncorrected memory errors since the driver start"
            )
            fix = f"reset it while nobody uses it: sudo nvidia-smi -i {gpu.index} -r; if they return it is failing"
            yield warning(host.name, "gpu_errors", message, fix)
    yield from _xids(host, facts)


def _xids(host: HostSpec, facts: HostFacts) -> Iterator[Problem]:
    found = [match for line in facts.gpus.xids or () if (match := _XID.search(line))]
    if not found:
        return
    last = found[-1]
    grave = sorted({int(one["number"]) for one in found} & _GRAVE.keys())
    number = f"{len(found)} error{'s' if len(found) > 1 else ''}"
    message = f"the driver reported {number} since the boot, last Xid {last['number']} of {last['device']}"
    if grave:
        message += "; " + ", ".join(f"Xid {number} is: {_GRAVE[number]}" for number in grave)
        fix = "reset the GPU or reboot the host; if they return it is failing"
    else:
        fix = "these are mostly bugs of programs; look up the numbers if jobs fail without a reason"
    yield warning(host.name, "gpu_xid", message, fix)


_STEP = 100
_EXPIRING_DAYS = 60


def problems_of_other_programs(spec: ClusterSpec, host: HostSpec, facts: HostFacts) -> Iterator[Problem]:
    """Yield conflicts with other programs on the host."""
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
    yield warning(host.name, "certificate_expiring", message, "raylaunch down, then raylaunch up creates new ones")


def _of_others(spec: ClusterSpec, host: HostSpec, facts: HostFacts) -> Iterator[Problem]:
    """Report clusters that others run there, except those that the GPU checks report."""
    for cluster in facts.clusters:
        if cluster.user == facts.user or cluster.pid is None:
            continue
        fix = f"{access_hint(cluster, facts)}; raylaunch up starts yours next to it"
        if cluster.name == spec.name:
            yield warning(host.name, "same_name_cluster", describe_running(cluster), fix)
        elif host.gpus == 0 or not facts.gpus.gpus or cluster.gpu_uuids == ():
            yield warning(host.name, "other_cluster", describe_running(cluster), fix)


def _ports(spec: ClusterSpec, host: HostSpec, facts: HostFacts, own: FoundCluster | None) -> Iterator[Problem]:
    if facts.listening is None or (own is not None and own.pid is not None):
        return
    taken = set(facts.listening)
    is_head = spec.kind == "local" or host.name == spec.hosts[0].name
    if is_head and spec.port in taken:
        holder = facts.holders.get(spec.port, "")
        by = f" by {holder}" if holder else ""
        message = f"port {spec.port}, which cluster.yaml sets for the controller, is taken there{by}"
        fix = "end that" if holder else f"see who has it: ss -ltnp sport = :{spec.port}"
        yield blocking(host.name, "port_taken", message, f"leave port out of cluster.yaml; or {fix}")
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
            f"another Ray runs there ({who}); raylaunch does not touch it, and does not know which GPUs it has assigned"
        )
        fix = "list GPUs that it does not use (gpus: [..]), or end that one by its process ids; Ray's command ends all"
        yield warning(host.name, "other_ray", message, fix)
