"""``cluster_status``: whether the cluster runs, what it has, and what the doctor found on its hosts."""

from __future__ import annotations

import asyncio
import time

from mcp_server.arguments import LONGEST_WAIT_S, ClusterStatusArguments
from mcp_server.context import ToolCall, ToolProgress
from mcp_server.render import Json, cluster_away, cluster_facts, findings_facts, next_for_cluster, next_without_cluster
from raylaunch.client.client import Client
from raylaunch.cluster.doctor.examine import LastLook, hosts_to_check, keep_problems, last_look
from raylaunch.errors import ClusterDownError, HostError
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.operations.connect import ClusterConnection

_HOST_S = LONGEST_WAIT_S - 5.0
"""Seconds for one host; all are looked at together."""


async def cluster_status(given: ClusterStatusArguments, call: ToolCall) -> Json:
    """Say what the cluster is; one that does not run is an answer too. Nothing is started."""
    place = call.place()
    looking = asyncio.ensure_future(_look(place.spec, call)) if given.doctor else None
    try:
        answer = await _status(place)
        look = await looking if looking else last_look(place.spec, now=time.time())
    finally:
        if looking:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)
    then = answer.pop("next")
    found = {"findings": findings_facts(look, now=time.time())} if look else {}
    if answer["state"] == "up":
        return {**answer, **found, "next": then}
    return {**answer, **found, "next": next_without_cluster(str(then), look)}


async def _status(place: ClusterConnection) -> Json:
    try:
        endpoint = await place.backend.reach(place.spec)
        async with Client(endpoint, cluster=place.spec.name, patience_s=0) as client:
            status = await client.status()
    except (ClusterDownError, HostError) as error:
        seen = await place.backend.status(place.spec)
        up = "a person, or you in a shell, types: raylaunch up"
        away = isinstance(error, ClusterDownError)
        problems, hint = (error.message, *seen.problems), "" if away else error.hint
        return {
            **cluster_away(seen, name=place.spec.name, problems=problems, hint=hint),
            "next": up if away else f"a person weighs the advice in reported; then {up}",
        }
    return {**cluster_facts(status, name=place.spec.name), "next": next_for_cluster(status)}


async def _look(spec: ClusterSpec, call: ToolCall) -> LastLook:
    """Look at all hosts now, and say meanwhile how many are done."""
    from raylaunch.cluster.doctor.examine import examine  # noqa: PLC0415 -- seldom, and it costs 0.1 s to load

    every = len(hosts_to_check(spec))
    done: list[str] = []
    async with call.telling(lambda: ToolProgress(len(done), every, f"looked at {len(done)} of {every} hosts")):
        found = await examine(spec, on_host=lambda host, _: done.append(host), limit_s=_HOST_S)
    return keep_problems(spec, found.problems)
