"""The check that hosts reach each other, planned and explained: an all-reduce between all hosts with GPUs.

A worker's Ray needs to reach only the head, so a firewall between two workers leaves Ray healthy but hangs training.
One small job on each host (`raylaunch.runner.netcheck`) finds that.
"""

from __future__ import annotations

import json
import random
import secrets
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raylaunch.cluster.hosts.host_program import HostState
from raylaunch.cluster.ports import SINGLE_PORTS
from raylaunch.errors import ClusterStartError, RaylaunchError
from raylaunch.models.cluster import NodeView

BYTES = 64 * 1000 * 1000
_MEET_S, _QUIET_S, _REDUCE_S = 60.0, 15.0, 60.0
STEP = "network"
MARK = "raylaunch-together "
"""Prefix of the line in a member's log that holds its result."""
_PROGRAM = 'python "$(dirname "$RAYLAUNCH_PROGRESS_FILE")/runner.pyz" --together'
_GB, _MB = 1e9, 1e6


@dataclass(frozen=True)
class NetworkMember:
    """A host that takes part, and where it listens."""

    host: str
    address: str
    port: int
    interface: str = ""


@dataclass(frozen=True)
class AllReducePlan:
    """Which hosts check the network between them."""

    members: tuple[NetworkMember, ...]
    left_out: tuple[str, ...] = ()
    """Hosts that would take part if they had a free GPU."""
    run: str = field(default_factory=lambda: secrets.token_hex(8))

    def entrypoint(self, rank: int) -> str:
        """Return the command of one member's job."""
        plan = {
            "run": self.run,
            "rank": rank,
            "members": [[one.host, one.address, one.port] for one in self.members],
            "interface": self.members[rank].interface,
            "bytes": BYTES,
            "meet_s": _MEET_S,
            "quiet_s": _QUIET_S,
            "whole_s": _REDUCE_S,
        }
        return f"exec {_PROGRAM} {shlex.quote(json.dumps(plan))}"


def plan_allreduce(states: Mapping[str, HostState], nodes: Iterable[NodeView], fresh: set[str]) -> AllReducePlan | None:
    """Return which hosts take part; None if there is nothing to check. Pure, except for a random port.

    Args:
        states: the hosts that are up.
        nodes: as the controller sees them.
        fresh: hosts that are not checked yet.
    """
    able = {host: state for host, state in sorted(states.items()) if state.gpus and state.place.address}
    if len(able) < 2 or not able.keys() & fresh:  # noqa: PLR2004 -- one host has no peer
        return None
    free = {node.hostname for node in nodes if node.alive and node.gpus_free >= 1}
    taken = {port for state in able.values() for port in state.ports.values()}
    port = random.choice([port for port in SINGLE_PORTS if port not in taken])  # noqa: S311 -- not a secret
    members = tuple(
        NetworkMember(host, state.place.address, port, state.place.interface)
        for host, state in able.items()
        if host in free
    )
    return AllReducePlan(members, tuple(host for host in able if host not in free))


def success(members: Sequence[NetworkMember], ends: Sequence[Mapping[str, Any]]) -> str:
    """Return the outcome as text. Pure."""
    rate = min(float(end["bytes_per_s"]) for end in ends)
    speed = f"{rate / _GB:.1f} GB/s" if rate >= _GB else f"{rate / _MB:.0f} MB/s"
    interfaces = ", ".join(dict.fromkeys(one.interface for one in members if one.interface))
    on = f" on {interfaces}" if interfaces else ""
    addresses = ", ".join(one.address for one in members)
    between = " and ".join([", ".join(one.host for one in members[:-1]), members[-1].host])
    return f"{BYTES / _MB:.0f} MB over {ends[0]['over']} between {between}{on} ({addresses}): {speed}"


def explain(members: Sequence[NetworkMember], ends: Sequence[Mapping[str, Any]]) -> dict[str, RaylaunchError]:
    """Return errors by the host where they are fixed; empty if all is well. Pure.

    The first cause counts: members that never ran, then those that were not reached, then the first broken connection.
    """
    by_kind: dict[str, list[int]] = {}
    for rank, end in enumerate(ends):
        kind = "lost" if end["kind"] == "unmet" and not end["unreached"] else str(end["kind"])
        by_kind.setdefault(kind, []).append(rank)
    kind = next((kind for kind in _CAUSES if kind in by_kind), "")
    ranks = by_kind.get(kind, [])
    if kind == "unmet":
        return _unreached(members, ends, ranks)
    if kind == "hop":
        return _hop(members, ends, ranks)
    several = ranks if kind in _ON_EACH_HOST else ranks[:1]
    return dict(_error(kind, members, ends, rank) for rank in several)


_CAUSES = ("listen", "unmet", "hop", "number", "torch", "job", "lost")
_ON_EACH_HOST = ("listen", "job")


def _error(
    kind: str, members: Sequence[NetworkMember], ends: Sequence[Mapping[str, Any]], rank: int
) -> tuple[str, RaylaunchError]:
    one, end = members[rank], ends[rank]
    why, over = end.get("why", ""), end.get("over", "")
    match kind:
        case "listen":
            msg = f"cannot listen on {one.address} port {one.port}: {why}"
            hint = (
                "run raylaunch up again, which uses another port; if its address is new, set address: in cluster.yaml"
            )
        case "number":
            msg = f"the all-reduce over {over} computed a wrong result: {why}"
            hint = "memory, a network card or a GPU is broken: check dmesg and nvidia-smi -q -d ECC"
        case "torch":
            msg = f"all hosts reach each other over TCP, but PyTorch's all-reduce over {over} fails: {why}"
            variables = "NCCL_SOCKET_IFNAME and NCCL_IB_HCA" if over == "nccl" else "GLOO_SOCKET_IFNAME"
            hint = (
                f"it uses its own ports: is every TCP port open between the hosts? {variables} choose its network; "
                "set them with env: in cluster.yaml"
            )
        case "job":
            msg = f"its part of the network check failed: {why}"
            hint = "see its log, then run raylaunch up again"
        case _:
            absent = ", ".join(dict.fromkeys(host for each in ends for host in each.get("absent", ()))) or "the others"
            msg, hint = f"{absent} did not take part in the network check", "run raylaunch up again"
    return one.host, ClusterStartError(f"{one.host}: {msg}", hint=hint, step=STEP)


def _unreached(
    members: Sequence[NetworkMember], ends: Sequence[Mapping[str, Any]], ranks: list[int]
) -> dict[str, RaylaunchError]:
    """Report each failing pair at the host that is not reached."""
    found: dict[str, RaylaunchError] = {}
    for target in members:
        whys = {members[rank]: ends[rank]["unreached"].get(target.host) for rank in ranks}
        whys = {member: why for member, why in whys.items() if why}
        if not whys:
            continue
        who = " and ".join(f"{one.host} ({one.address})" for one in whys)
        msg = f"{who} cannot reach {target.host} at {target.address}: {'; '.join(dict.fromkeys(whys.values()))}"
        allow = "; ".join(f"sudo ufw allow from {one.address}" for one in whys)
        hint = (
            f"training over these hosts would hang: allow TCP on all ports of {target.host}, for example: {allow}; "
            "or set another interface or address in cluster.yaml"
        )
        found[target.host] = ClusterStartError(f"{target.host}: {msg}", hint=hint, step=STEP)
    return found


def _hop(
    members: Sequence[NetworkMember], ends: Sequence[Mapping[str, Any]], ranks: list[int]
) -> dict[str, RaylaunchError]:
    """Report the connection that broke first, at its receiver."""
    first = min((ends[rank] for rank in ranks), key=lambda end: int(end["step"]))
    sender, receiver = (str(one) for one in first["hop"])
    msg = f"{receiver}: the connection from {sender} to {receiver} failed after it was made: {first['why']}"
    address = next(one.address for one in members if one.host == receiver)
    hint = (
        f"check the network between the two: if small packets pass and large ones do not, the MTUs differ "
        f"(on {sender}: ping -M do -s 8972 {address}; ip link)"
    )
    return {receiver: ClusterStartError(msg, hint=hint, step=STEP)}
