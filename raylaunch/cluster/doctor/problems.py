"""From facts to problems, each with its mend. Pure functions; what they mean: `raylaunch.cluster.doctor.problem`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from raylaunch.cluster.doctor.between import problems_between
from raylaunch.cluster.doctor.of_gpus import problems_of_gpus
from raylaunch.cluster.doctor.of_host import problems_of_host
from raylaunch.cluster.doctor.of_neighbours import problems_of_neighbours
from raylaunch.cluster.doctor.problem import CODES, Problem, blocking, warning
from raylaunch.cluster.probe.facts import HostFacts
from raylaunch.errors import (
    HostAuthError,
    HostKeyError,
    HostLostError,
    HostUnreachableError,
    RaylaunchError,
)
from raylaunch.spec import ClusterSpec, HostSpec

__all__ = ["CODES", "Problem", "blocking", "problems", "warning"]

_NOT_HERE = frozenset(
    [
        *("system_unsupported", "architecture_unsupported", "python_missing"),
        *("index_unreachable", "no_start_after_reboot", "root_noexec", "container", "not_answered"),
    ]
)
"""What an embedded cluster does not need: it runs in the environment that runs this."""


def problems(spec: ClusterSpec, facts: Mapping[str, HostFacts | RaylaunchError]) -> tuple[Problem, ...]:
    """Return all that is wrong, blocking ones first, then in the order of the hosts.

    Args:
        spec: the cluster.
        facts: by host's name, what its probe found, or the error with which it ended.
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
    """Return the hosts that were asked; of an embedded cluster this machine, with what the spec says of it."""
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
    yield from problems_of_neighbours(spec, host, facts)


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
