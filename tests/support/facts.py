"""Facts of real-looking machines, to change one thing of, and what is then found to be wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from raylaunch.cluster.doctor.checks_cluster import problems
from raylaunch.cluster.doctor.problem import Level, Problem
from raylaunch.cluster.probe.facts import HostFacts
from raylaunch.models.cluster_spec import ClusterSpec

DATA = Path(__file__).parent.parent / "data/facts"
GIB = 1024**3

Changes = Mapping[str, object]


def facts(name: str = "dgx", changes: Changes | None = None) -> HostFacts:
    """Return the facts of a machine, some of them changed; a dotted name reaches into them."""
    data: dict[str, object] = HostFacts.model_validate_json((DATA / f"{name}.json").read_bytes()).model_dump()
    for dotted, value in (changes or {}).items():
        *parents, last = dotted.split(".")
        holder: object = data
        for parent in parents:
            holder = holder[int(parent)] if isinstance(holder, list | tuple) else holder[parent]  # type: ignore[index]  # it is there
        holder[last] = value  # type: ignore[index]  # as above
    return HostFacts.model_validate(data)


def one_host(changes: Changes | None = None, **host: object) -> tuple[Problem, ...]:
    """Return what is wrong with one DGX."""
    spec = ClusterSpec.model_validate({"name": "lab", "hosts": [{"host": "dgx-1", **host}]})
    return problems(spec, {"dgx-1": facts(changes=changes)})


SECOND: Changes = {
    "hostname": "dgx-2",
    "system.boot_id": "0b2f8f1e-0003",
    "reached_at": "10.0.0.3",
    "interfaces": [
        {"name": "enp226s0f0", "kind": "physical", "addresses": ["10.0.0.3/24"], "up": True, "bits_per_s": 10**10},
        {"name": "ibp24s0", "kind": "physical", "addresses": ["10.1.0.3/24"], "up": True, "infiniband": True},
    ],
}


def two_hosts(
    second: Changes | None = None, *, first: Changes | None = None, other: str = "dgx", **host: object
) -> tuple[Problem, ...]:
    """Return what is wrong with two hosts that use InfiniBand, of which the second is changed."""
    hosts = [{"host": "dgx-1", "address": "10.1.0.1"}, {"host": "dgx-2", "address": "10.1.0.3", **host}]
    spec = ClusterSpec.model_validate({"name": "lab", "hosts": hosts})
    return problems(spec, {"dgx-1": facts(changes=first), "dgx-2": facts(other, {**SECOND, **(second or {})})})


def disk(**changes: object) -> dict[str, object]:
    return {"wanted": "/home/ml/.raylaunch", "mount": "/", "kind": "ext4", "free": 1200 * GIB} | changes


@dataclass(frozen=True)
class Case:
    """Facts, and the one problem that they show."""

    code: str
    level: Level
    message: str
    mend: str
    changes: Changes = field(default_factory=dict)
    host: Changes = field(default_factory=dict)


def only(found: tuple[Problem, ...]) -> tuple[str, str, str, str, str]:
    """Return the one problem that was found."""
    (one,) = found
    return one.code, one.level, one.host, one.message, one.mend


def check_words(case: Case) -> None:
    """Check that the problem has its words and its mend."""
    found = [one for one in one_host(case.changes, **case.host) if one.code == case.code]
    assert found == [Problem(host="dgx-1", code=case.code, level=case.level, message=case.message, mend=case.mend)]


def check_alone(case: Case) -> None:
    """Check that one thing is said where one thing is wrong."""
    assert {one.code for one in one_host(case.changes, **case.host)} == {case.code}


BLOCKING: Level = "blocking"
WARNING: Level = "warning"
SOMEBODY = {"pid": 4711, "user": "anna", "command": "python3", "memory": 60 * GIB}
