"""Problems between hosts (the same machine twice, different Pythons, separate networks), and all problems. Pure."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from raylaunch.cluster.doctor.checks_gpus import problems_of_gpus, problems_of_other_programs
from raylaunch.cluster.doctor.checks_host import problems_of_host
from raylaunch.cluster.doctor.problem import Problem, blocking, warning
from raylaunch.cluster.probe.choices import network_of, usable_pythons
from raylaunch.cluster.probe.facts import HostFacts, Interface
from raylaunch.errors import (
    ClusterStartError,
    HostAuthError,
    HostKeyError,
    HostLostError,
    HostUnreachableError,
    RaylaunchError,
)
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.models.host_spec import HostSpec

_MUCH_FASTER = 2
_GIGABIT = 10**9


def problems_between(spec: ClusterSpec, hosts: Sequence[HostSpec], facts: Mapping[str, HostFacts]) -> Iterator[Problem]:
    """Yield problems between hosts, and problems of each host's address on the cluster's network."""
    if len(hosts) > 1:
        yield from _same_machine(hosts, facts)
        yield from _same_root(hosts, facts)
        yield from _pythons(hosts, facts)
        yield from _architectures(hosts, facts)
    if spec.kind == "ssh" and not spec.loopback:
        yield from _network(spec, hosts, facts)


def _same_machine(hosts: Sequence[HostSpec], facts: Mapping[str, HostFacts]) -> Iterator[Problem]:
    seen: dict[tuple[str, ...], str] = {}
    for host in hosts:
        one = facts[host.name]
        addresses = sorted(text for interface in one.interfaces or () for text in interface.addresses)
        identity = (one.system.boot_id, one.hostname, *addresses)
        if not one.system.boot_id:
            continue
        first = seen.setdefault(identity, host.name)
        if first != host.name:
            message = f"{host.host} is the same machine as {first} ({one.hostname})"
            yield blocking(host.name, "same_machine", message, "list each machine once in cluster.yaml")


def _same_root(hosts: Sequence[HostSpec], facts: Mapping[str, HostFacts]) -> Iterator[Problem]:
    seen: dict[tuple[str, str], str] = {}
    for host in hosts:
        root = facts[host.name].disks.get("root")
        if root is None or not root.over_network or not root.source:
            continue
        first = seen.setdefault((root.source, root.wanted), host.name)
        if first != host.name:
            message = f"its folder {root.wanted} is the same as that of {first}: both come from {root.source}"
            fix = "set root to a folder on each host's own disk: defaults: {root: /raid/YOU/raylaunch}"
            yield blocking(host.name, "root_shared", message, fix)


def _pythons(hosts: Sequence[HostSpec], facts: Mapping[str, HostFacts]) -> Iterator[Problem]:
    """Check that all hosts have one minor version, preferably the most frequent, as Ray needs."""
    has = {host.name: _minors(host, facts[host.name]) for host in hosts}
    has = {name: minors for name, minors in has.items() if minors}
    if not has or set.intersection(*has.values()):
        return
    counted = Counter(minor for minors in has.values() for minor in minors)
    own = sys.version_info[:2]
    best = max(counted, key=lambda minor: (counted[minor], minor == own, minor))
    for name, minors in has.items():
        if best not in minors:
            mine = ", ".join(_dotted(minor) for minor in sorted(minors))
            message = f"it has Python {mine}, others {_dotted(best)}; Ray needs the same minor version on all nodes"
            fix = f"without root: uv python install {_dotted(best)}; or make conda environments of one version"
            yield blocking(name, "python_differs", message, fix)


def _minors(host: HostSpec, facts: HostFacts) -> set[tuple[int, int]]:
    if host.environment:
        return {one.minor for one in facts.pythons if one.named and one.version}
    return set(usable_pythons(facts))


def _dotted(minor: tuple[int, int]) -> str:
    return f"{minor[0]}.{minor[1]}"


def _architectures(hosts: Sequence[HostSpec], facts: Mapping[str, HostFacts]) -> Iterator[Problem]:
    kinds: dict[str, list[str]] = {}
    for host in hosts:
        kinds.setdefault(facts[host.name].arch, []).append(host.name)
    kinds.pop("", None)
    if len(kinds) > 1:
        which = "; ".join(f"{', '.join(names)}: {arch}" for arch, names in kinds.items())
        message = (
            f"the hosts are of different architectures ({which}): a job runs only on those that its packages support"
        )
        yield warning("", "architectures_differ", message, "set it in jobs that need one: where: {arch: aarch64}")


def _network(spec: ClusterSpec, hosts: Sequence[HostSpec], facts: Mapping[str, HostFacts]) -> Iterator[Problem]:
    chosen: dict[str, tuple[Interface, str]] = {}
    for host in hosts:
        one = facts[host.name]
        if one.interfaces is None:
            continue
        try:
            name, address = network_of(spec.host_specs(), host, one)
        except ClusterStartError as error:
            message = error.message.removeprefix(f"{host.name} ")
            yield blocking(host.name, "network_unclear", f"it {message}", error.hint)
            continue
        interface = next(interface for interface in one.interfaces if interface.name == name)
        chosen[host.name] = (interface, address)
        yield from _infiniband(host, one)
    yield from _apart(chosen)
    yield from _slow(hosts, facts, chosen)


def _infiniband(host: HostSpec, facts: HostFacts) -> Iterator[Problem]:
    if facts.infiniband and not any(port.active for port in facts.infiniband):
        devices = ", ".join(f"{port.device}/{port.port}" for port in facts.infiniband[:4])
        message = f"none of its InfiniBand ports is up ({devices}); NCCL uses the slower network"
        yield warning(host.name, "infiniband_down", message, "check the cables and the subnet manager: ibstat")


def _apart(chosen: Mapping[str, tuple[Interface, str]]) -> Iterator[Problem]:
    head, *others = chosen or ("",)
    for name in others:
        mine, theirs = chosen[name][0].networks, chosen[head][0].networks
        if not set(mine) & set(theirs):
            message = f"its address {chosen[name][1]} is in another network than {chosen[head][1]} of {head}"
            fix = "nothing if the two reach each other; else set address for both to a network that they share"
            yield warning(name, "networks_differ", message, fix)


def _slow(
    hosts: Sequence[HostSpec], facts: Mapping[str, HostFacts], chosen: Mapping[str, tuple[Interface, str]]
) -> Iterator[Problem]:
    """Check for a network that all hosts share and that is much faster than the one they use."""
    if len(chosen) < 2 or len(chosen) != len(hosts):  # noqa: PLR2004 -- a network is between two
        return
    used = min((speed_of(interface, facts[name]) for name, (interface, _) in chosen.items()), default=0)
    every = [dict(_networks(facts[host.name])) for host in hosts]
    for network in every[0]:
        if not all(network in one for one in every):
            continue
        speed = min(one[network] for one in every)
        if used and speed >= used * _MUCH_FASTER:
            message = (
                f"the hosts share {network} at {speed / _GIGABIT:g} Gb/s, and use {used / _GIGABIT:g} Gb/s: "
                "training over several hosts is slower than it could be"
            )
            fix = "set address for each host to its address there"
            yield warning(hosts[0].name, "slow_network", message, fix)
            return


def speed_of(interface: Interface, facts: HostFacts) -> int:
    """Return an interface's bits per second, of InfiniBand the port's; 0 if unknown."""
    if interface.bits_per_s:
        return interface.bits_per_s
    rates = (port.rate for port in facts.infiniband if interface.name in port.interfaces and port.active)
    return max((int(float(rate.split()[0]) * _GIGABIT) for rate in rates if rate[:1].isdigit()), default=0)


def _networks(facts: HostFacts) -> Iterator[tuple[object, int]]:
    by_speed = itertools.chain.from_iterable(
        ((network, speed_of(interface, facts)) for network in interface.networks)
        for interface in facts.interfaces or ()
        if interface.up is not False
    )
    yield from sorted(by_speed, key=lambda pair: pair[1])


_NOT_HERE = frozenset(
    [
        *("system_unsupported", "architecture_unsupported", "python_missing"),
        *("index_unreachable", "no_start_after_reboot", "root_noexec", "container", "not_answered"),
    ]
)
"""Checks that an embedded cluster does not need: it runs in this environment."""


def problems(spec: ClusterSpec, facts: Mapping[str, HostFacts | RaylaunchError]) -> tuple[Problem, ...]:
    """Return all problems, blocking ones first, then in the order of the hosts.

    Args:
        spec: the cluster.
        facts: by host's name, the result of its probe, or its error.
    """
    hosts = hosts_of(spec, facts)
    found = [one for host in hosts for one in _of_host(spec, host, facts[host.name])]
    seen = {host.name: one for host in hosts if isinstance(one := facts[host.name], HostFacts)}
    found += problems_between(spec, [host for host in hosts if host.name in seen], seen)
    if spec.kind == "local":
        found = [one for one in found if one.code not in _NOT_HERE]
    order = {host.name: at for at, host in enumerate(hosts)}
    return tuple(sorted(found, key=lambda one: (one.level != "blocking", order.get(one.host, -1))))


def hosts_of(spec: ClusterSpec, names: Mapping[str, object]) -> tuple[HostSpec, ...]:
    """Return the hosts that were probed; for an embedded cluster this machine, with its part of the spec."""
    if spec.kind == "local":
        return tuple(
            HostSpec(host="localhost", name=name, gpus=spec.gpus, cpus=spec.cpus, labels=spec.labels, store=spec.store)
            for name in names
        )
    return tuple(host for host in spec.host_specs() if host.name in names)


def _of_host(spec: ClusterSpec, host: HostSpec, facts: HostFacts | RaylaunchError) -> Iterator[Problem]:
    if not isinstance(facts, HostFacts):
        yield _no_facts(host, facts)
        return
    yield from problems_of_host(spec, host, facts)
    yield from problems_of_gpus(spec, host, facts)
    yield from problems_of_other_programs(spec, host, facts)


def _no_facts(host: HostSpec, error: RaylaunchError) -> Problem:
    match error:
        case HostUnreachableError():
            code = "unreachable"
        case HostKeyError():
            code = "host_key"
        case HostAuthError():
            code = "login_refused"
        case HostLostError():
            code = "connection_lost"
        case _:
            code = "probe_failed"
    return blocking(host.name, code, error.message.removeprefix(f"{host.name}: "), error.hint)
