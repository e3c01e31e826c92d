"""Choices from a host's entry in cluster.yaml and its probe: GPUs, Python, folders and address. Pure functions."""

from __future__ import annotations

import ipaddress
import posixpath
import sys
import time
from collections.abc import Collection, Mapping, Sequence

from raylaunch.cluster.install.platforms import HostPython, WheelPlatform
from raylaunch.cluster.probe.facts import FoundCluster, HostFacts, HostGpu, Interface, Python
from raylaunch.cluster.record import NodePlace
from raylaunch.errors import ClusterStartError
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.models.host_spec import HostSpec
from raylaunch.ssh.target import Target

_SHORTEST_UUID = len("GPU-") + 4
_OLDEST, _NEWEST = (3, 10), (3, 14)


def is_own(cluster: FoundCluster, spec: ClusterSpec, facts: HostFacts) -> bool:
    """Return whether a cluster on the host is the one of `spec`: its name, this account's, and in our folder."""
    if facts.root and not cluster.folder.startswith(f"{facts.root}/"):
        return False
    return cluster.name == spec.name and cluster.user == facts.user


def describe_running(cluster: FoundCluster) -> str:
    """Describe who runs a cluster on the host, and since when."""
    since = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(cluster.since)) if cluster.since else ""
    details = ", ".join(
        [*([f"since {since}"] if since else []), *([f"controller pid {cluster.pid}"] if cluster.pid else [])]
    )
    return f"{cluster.user} runs cluster {cluster.name} there ({details or 'it is down now'}; {cluster.folder})"


def access_hint(cluster: FoundCluster, facts: HostFacts) -> str:
    """Return how this account gets access to a cluster on the host."""
    if cluster.user == facts.user:
        return (
            f"it is this account's: write name: {cluster.name} in cluster.yaml, and raylaunch up uses it from here too"
        )
    return f"ask {cluster.user} for: raylaunch token create --for {facts.user}; paste the line that it prints"


def chosen_gpus(spec: ClusterSpec, host: HostSpec, facts: HostFacts) -> tuple[HostGpu, ...]:
    """Return the real GPUs that the cluster would use on the host.

    For a number: first those that the cluster has already, then those that no other cluster has.
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


def with_chosen_gpus(spec: ClusterSpec, host: HostSpec, facts: HostFacts) -> HostSpec:
    """Return the host with its number of GPUs replaced by UUIDs; without real GPUs it stays a number."""
    if not isinstance(host.gpus, int) or not facts.gpus.gpus or host.gpus == 0:
        return host
    return host.model_copy(update={"gpus": tuple(gpu.uuid for gpu in chosen_gpus(spec, host, facts))})


def find_gpu(word: str, gpus: Sequence[HostGpu]) -> HostGpu | None:
    """Return the GPU with that index, UUID or unambiguous prefix of a UUID."""
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


def usable_pythons(facts: HostFacts) -> dict[tuple[int, int], Python]:
    """Return the Pythons of a host from which an environment can be made, the first found of each minor version."""
    found: dict[tuple[int, int], Python] = {}
    for python in facts.pythons:
        fits = _OLDEST <= python.minor <= _NEWEST and python.cpython and python.final and not python.free_threaded
        if fits and not python.in_environment:
            found.setdefault(python.minor, python)
    return found


def choose_pythons(
    facts: Mapping[str, HostFacts],
    *,
    named: Collection[tuple[int, int]] = (),
) -> dict[str, HostPython]:
    """Return each host's Python: one minor version for all, this machine's own if all hosts have it.

    Args:
        facts: of the hosts that get an environment from raylaunch.
        named: the versions of the environments that cluster.yaml names for other hosts.

    Raises:
        ClusterStartError: the hosts have no minor version in common.
    """
    by_host = {host: usable_pythons(one) for host, one in facts.items()}
    common = set.intersection(*(set(one) for one in by_host.values()), *({one} for one in named)) if by_host else set()
    if by_host and not common:
        has = "; ".join(f"{host} has {_words(one)}" for host, one in by_host.items())
        msg = f"the hosts have no Python in common, and Ray needs the same minor version on all: {has}"
        hint = "install one on those that lack it (without root: uv python install 3.12, or a conda environment)"
        raise ClusterStartError(msg, hint=hint, step="python")
    own = sys.version_info[:2]
    minor = own if own in common else max(common, default=own)
    return {host: _host_python(facts[host], one[minor]) for host, one in by_host.items()}


def _words(pythons: Mapping[tuple[int, int], Python]) -> str:
    return ", ".join(f"{major}.{minor}" for major, minor in sorted(pythons)) or "none from 3.10 to 3.14"


def _host_python(facts: HostFacts, python: Python) -> HostPython:
    glibc = ".".join(str(part) for part in facts.glibc or (0, 0))
    return HostPython(path=python.path, platform=WheelPlatform(arch=facts.arch, glibc=glibc, python=python.version))


def target_of(host: HostSpec) -> Target:
    """Return the host as a target for SSH."""
    return Target(
        name=host.name,
        host=host.host,
        port=host.port,
        user=host.user,
        key=host.key,
        jump=host.jump,
        fingerprint=host.fingerprint,
    )


def root_of(host: HostSpec, facts: HostFacts) -> str:
    """Return raylaunch's folder on the host, absolute."""
    root = host.root or "~/.raylaunch"
    if root == "~" or root.startswith("~/"):
        return posixpath.join(facts.home, root[2:])
    return root if root.startswith("/") else posixpath.join(facts.home, root)


def place_of(spec: ClusterSpec, host: HostSpec, facts: HostFacts) -> NodePlace:
    """Return the host's place in the cluster, without the head's address.

    Raises:
        ClusterStartError: its address on the cluster's network is ambiguous or missing.
    """
    if spec.loopback:
        return NodePlace(host=host.name, env=host.env)
    interface, address = network_of(spec.host_specs(), host, facts)
    return NodePlace(host=host.name, address=address, interface=interface, env=host.env)


def network_of(hosts: Sequence[HostSpec], host: HostSpec, facts: HostFacts) -> tuple[str, str]:
    """Return the interface and the address of a host on the cluster's network.

    The one in the spec, else the host's own address that ssh connects to, else its only address.

    Raises:
        ClusterStartError: the host has no such interface or address, or several.
    """
    candidates = [(one.name, text) for one in facts.interfaces or () for text in _usable(one)]
    if host.address:
        found = [pair for pair in candidates if pair[1] == host.address]
    elif host.interface:
        found = [pair for pair in candidates if pair[0] == host.interface]
    else:
        reached = {host.host, facts.reached_at}
        found = [pair for pair in candidates if pair[1] in reached] or candidates
    if len({address for _, address in found}) == 1 or (found and (host.address or host.interface)):
        return found[0]
    has = ", ".join(f"{address} ({name})" for name, address in candidates) or "none"
    asked = host.address or host.interface
    why = f"has no {asked}" if asked else "may be reached by the other hosts at more than one address"
    msg = f"{host.name} {why}; its addresses are: {has}"
    others = f", which {', '.join(one.name for one in hosts if one is not host)} must reach" if len(hosts) > 1 else ""
    hint = f"set the one on the cluster's network{others} in cluster.yaml: {{host: {host.host}, address: …}}"
    raise ClusterStartError(msg, hint=hint, step="network")


def addresses_of(facts: HostFacts) -> tuple[str, ...]:
    """Return all addresses at which other machines reach the host."""
    return tuple(text for one in facts.interfaces or () for text in _usable(one))


def _usable(interface: Interface) -> list[str]:
    """IPv4 before IPv6, without loopback and link-local addresses."""
    addresses = [ipaddress.ip_interface(text).ip for text in interface.addresses]
    usable = [one for one in addresses if not (one.is_loopback or one.is_link_local)]
    return [str(one) for one in sorted(usable, key=lambda one: one.version)]
