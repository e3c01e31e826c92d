"""The check that hosts reach each other: an all-reduce between all hosts with GPUs, on the chosen interface.

A worker's Ray needs to reach only the head, so a firewall between two workers leaves Ray healthy but hangs training.
One small job on each host (`raylaunch.runner.netcheck`) finds that.
"""

from __future__ import annotations

import contextlib
import json
import random
import secrets
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio

from raylaunch.cluster.hosts.host_program import HostState
from raylaunch.cluster.hosts.probe_jobs import ProbeJobs
from raylaunch.cluster.ports import SINGLE_PORTS
from raylaunch.cluster.types import Step
from raylaunch.errors import ClusterError, ClusterStartError, RaylaunchError
from raylaunch.models.cluster import NodeView
from raylaunch.models.job import JobView
from raylaunch.models.states import JobState

TURN_S = 45.0
"""How long to wait for the GPUs, which were free a moment ago."""
WHOLE_S = 240.0
BYTES = 64 * 1000 * 1000
_MEET_S, _QUIET_S, _REDUCE_S = 60.0, 15.0, 60.0
_STEP = "network"
_POLL_S = 0.2
_MARK = "raylaunch-together "
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


class AllReduceCheck:
    """One check.

    Args:
        jobs: submits jobs to the controller.
        plan: the hosts that take part.
        on_step: called with each step.
    """

    def __init__(self, jobs: ProbeJobs, plan: AllReducePlan, *, on_step: Callable[[Step], None]) -> None:
        self._jobs = jobs
        self._plan = plan
        self._on_step = on_step
        self._began = time.monotonic()
        self.unproved: set[str] = set()
        """Hosts whose job did not start in time."""

    async def run(self) -> dict[str, RaylaunchError]:
        """Return errors by host; the outcome is reported as a step."""
        hosts = ", ".join(one.host for one in self._plan.members)
        self._on_step(Step(_STEP, "begins", f"checking the network between {hosts}"))
        seen: list[JobView] = []
        try:
            for rank, member in enumerate(self._plan.members):
                entrypoint = self._plan.entrypoint(rank)
                seen.append(await self._jobs.submit(member.host, entrypoint, gpus=1, timeout_s=WHOLE_S))
            return await self._judge(await self._until_ended(seen))
        except RaylaunchError as error:
            first = self._plan.members[0].host
            return {first: ClusterError(f"the network could not be checked: {error.message}", hint=error.hint)}
        finally:
            with anyio.CancelScope(shield=True), contextlib.suppress(RaylaunchError):
                await self._clean(seen)

    async def _until_ended(self, seen: list[JobView]) -> list[JobView]:
        """Wait until all have ended, or one does not start or end in time."""
        while not all(one.state.ended for one in seen):
            took = time.monotonic() - self._began
            queued = [one for one in seen if one.state in {JobState.HELD, JobState.QUEUED}]
            if took > WHOLE_S or (queued and took > TURN_S):
                return seen
            await anyio.sleep(_POLL_S)
            seen = [one if one.state.ended else await self._jobs.get(one.id) for one in seen]
        return seen

    async def _judge(self, seen: list[JobView]) -> dict[str, RaylaunchError]:
        members = self._plan.members
        queued = [m.host for m, one in zip(members, seen, strict=True) if one.state in {JobState.HELD, JobState.QUEUED}]
        if queued:
            words = f"not checked: no GPU became free on {', '.join(queued)}; the next up retries"
            self._on_step(Step(_STEP, "note", words))
            self.unproved = {one.host for one in members}
            return {}
        ends = [_ended(one, await self._jobs.last_lines(one.id)) for one in seen]
        if found := explain(members, ends):
            return found
        self._on_step(Step(_STEP, "done", success(members, ends), time.monotonic() - self._began))
        return {}

    async def _clean(self, seen: list[JobView]) -> None:
        left = [one.id for one in seen]
        for job in left:
            await self._jobs.stop(job)
        with anyio.move_on_after(_QUIET_S):
            while left:
                await anyio.sleep(_POLL_S)
                ended = [job for job in left if (await self._jobs.get(job)).state.ended]
                for job in ended:
                    await self._jobs.delete(job)
                left = [job for job in left if job not in ended]


def _ended(job: JobView, printed: str) -> dict[str, Any]:
    """Return a member's result, or a substitute from the job's state."""
    _, mark, line = printed.rpartition(_MARK)
    try:
        said = json.loads(line.splitlines()[0]) if mark else None
    except (ValueError, IndexError, RecursionError):
        said = None
    if isinstance(said, dict) and "kind" in said:
        return said
    why = job.message or f"its job is {job.state.value}"
    return {"kind": "job", "why": f"{why} (raylaunch show {job.id})"}


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
    for kind, says in _KINDS.items():
        if ranks := by_kind.get(kind):
            return says(members, ends, ranks)
    return {}


_Says = Callable[[Sequence[NetworkMember], Sequence[Mapping[str, Any]], list[int]], dict[str, RaylaunchError]]


def _not_run(
    members: Sequence[NetworkMember], ends: Sequence[Mapping[str, Any]], ranks: list[int]
) -> dict[str, RaylaunchError]:
    hint = "see its log, then run raylaunch up again"
    return {
        members[rank].host: _error(
            f"{members[rank].host}: its part of the network check failed: {ends[rank]['why']}", hint
        )
        for rank in ranks
    }


def _no_port(
    members: Sequence[NetworkMember], ends: Sequence[Mapping[str, Any]], ranks: list[int]
) -> dict[str, RaylaunchError]:
    hint = (
        "run raylaunch up again, which uses another port; if the host has a new address, set address: in cluster.yaml"
    )
    found = {}
    for rank in ranks:
        one = members[rank]
        msg = f"{one.host}: cannot listen on {one.address} port {one.port}: {ends[rank]['why']}"
        found[one.host] = _error(msg, hint)
    return found


def _unmet(
    members: Sequence[NetworkMember], ends: Sequence[Mapping[str, Any]], ranks: list[int]
) -> dict[str, RaylaunchError]:
    """Report each failing pair at the host that is not reached."""
    by_host = {one.host: one for one in members}
    found: dict[str, RaylaunchError] = {}
    for target in members:
        whys = {members[rank].host: ends[rank].get("unreached", {}).get(target.host) for rank in ranks}
        whys = {host: why for host, why in whys.items() if why}
        if not whys:
            continue
        who = " and ".join(f"{host} ({by_host[host].address})" for host in whys)
        msg = f"{who} cannot reach {target.host} at {target.address}: {'; '.join(dict.fromkeys(whys.values()))}"
        allow = "; ".join(f"sudo ufw allow from {by_host[host].address}" for host in whys)
        hint = (
            f"training over these hosts would hang: allow TCP on all ports of {target.host}, for example: {allow}; "
            "or set another interface or address in cluster.yaml"
        )
        found[target.host] = _error(f"{target.host}: {msg}", hint)
    return found


def _lost(
    members: Sequence[NetworkMember], ends: Sequence[Mapping[str, Any]], ranks: list[int]
) -> dict[str, RaylaunchError]:
    """Report members that were missing although no member failed to reach another."""
    names = ", ".join(dict.fromkeys(host for rank in ranks for host in ends[rank]["absent"])) or "the others"
    host = members[ranks[0]].host
    return {host: _error(f"{host}: {names} did not take part in the network check", "run raylaunch up again")}


def _hop(
    members: Sequence[NetworkMember], ends: Sequence[Mapping[str, Any]], ranks: list[int]
) -> dict[str, RaylaunchError]:
    first = min((ends[rank] for rank in ranks), key=lambda end: int(end["step"]))
    sender, receiver = (str(one) for one in first["hop"])
    msg = f"{receiver}: the connection from {sender} to {receiver} failed after it was made: {first['why']}"
    hint = (
        f"check the network between the two: if small packets pass and large ones do not, the MTUs differ "
        f"(on {sender}: ping -M do -s 8972 {next(one.address for one in members if one.host == receiver)}; ip link)"
    )
    return {receiver: _error(msg, hint)}


def _torch(
    members: Sequence[NetworkMember], ends: Sequence[Mapping[str, Any]], ranks: list[int]
) -> dict[str, RaylaunchError]:
    end, host = ends[ranks[0]], members[ranks[0]].host
    msg = (
        f"{host}: all hosts reach each other over TCP, but PyTorch's all-reduce over {end['over']} fails: {end['why']}"
    )
    variables = "NCCL_SOCKET_IFNAME and NCCL_IB_HCA" if end["over"] == "nccl" else "GLOO_SOCKET_IFNAME"
    hint = f"it uses its own ports: is every TCP port open between the hosts? {variables} choose its network"
    return {host: _error(msg, f"{hint}; set them with env: in cluster.yaml")}


def _number(
    members: Sequence[NetworkMember], ends: Sequence[Mapping[str, Any]], ranks: list[int]
) -> dict[str, RaylaunchError]:
    end, host = ends[ranks[0]], members[ranks[0]].host
    msg = f"{host}: the all-reduce over {end['over']} computed a wrong result: {end['why']}"
    return {host: _error(msg, "memory, a network card or a GPU is broken: check dmesg and nvidia-smi -q -d ECC")}


_KINDS: Mapping[str, _Says] = {
    "listen": _no_port,
    "unmet": _unmet,
    "hop": _hop,
    "number": _number,
    "torch": _torch,
    "job": _not_run,
    "lost": _lost,
}


def _error(message: str, hint: str) -> RaylaunchError:
    return ClusterStartError(message, hint=hint, step=_STEP)
