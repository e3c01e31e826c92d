"""From what cluster.yaml says of a host, and what its probe found, to what is asked of it. Pure functions."""

from __future__ import annotations

import ipaddress
import posixpath
from collections.abc import Sequence

from raylaunch.cluster.probe.facts import HostFacts, Interface
from raylaunch.cluster.record import NodePlace
from raylaunch.cluster.ssh.target import Target
from raylaunch.errors import ClusterStartError
from raylaunch.spec import ClusterSpec, HostSpec


def target_of(host: HostSpec) -> Target:
    """Return how the host is reached over SSH."""
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
    """Return which part of the cluster the host is; the head's address on a worker is not known yet.

    Raises:
        ClusterStartError: its address on the cluster's network cannot be told.
    """
    if spec.loopback:
        return NodePlace(host=host.name, env=host.env)
    interface, address = network_of(spec.host_specs(), host, facts)
    return NodePlace(host=host.name, address=address, interface=interface, env=host.env)


def network_of(hosts: Sequence[HostSpec], host: HostSpec, facts: HostFacts) -> tuple[str, str]:
    """Return the interface and the address of a host on the cluster's network.

    What the spec says counts; else the address by which ssh reaches it, if it is the host's own; else the only one.

    Raises:
        ClusterStartError: the host has no such interface or address, or several that it could be.
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
    hint = f"say in cluster.yaml which is on the cluster's network{others}: {{host: {host.host}, address: …}}"
    raise ClusterStartError(msg, hint=hint, step="network")


def addresses_of(facts: HostFacts) -> tuple[str, ...]:
    """Return all addresses of a host that lead to it."""
    return tuple(text for one in facts.interfaces or () for text in _usable(one))


def _usable(interface: Interface) -> list[str]:
    """IPv4 before IPv6; loopback and link-local ones lead nowhere."""
    addresses = [ipaddress.ip_interface(text).ip for text in interface.addresses]
    usable = [one for one in addresses if not (one.is_loopback or one.is_link_local)]
    return [str(one) for one in sorted(usable, key=lambda one: one.version)]
