"""From a submission to the first line of its program."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.measure import Result, Skipped, compared
from benchmarks.workshop import Cluster, Workshop
from raylaunch.sdk import AsyncCluster

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_COMMAND = "date +first:%s.%N"
"""Prints when it runs. It takes a millisecond itself, so all that is measured is what comes before it."""
_ROUNDS = 9
_LIMIT_S = 120.0
_REST_S = 0.5


class _Raw(NamedTuple):
    """Seconds from a raw submission to its first line."""

    written: float
    shown: float


def run(shop: Workshop) -> Iterator[Result]:
    """Measure both in one Python that has imported both clients already."""
    pairs = asyncio.run(_rounds(shop.cluster, shop.rounds(_ROUNDS)))
    ours = "AsyncCluster.submit of `date`, without code, until its line comes out of follow_logs()"
    how = f"{ours}. The peer's clock stops earlier, when the program writes the line; nobody has seen it then."
    peer = "JobSubmissionClient.submit_job of the same command"
    yield compared("first_line", [(shown, raw.written) for shown, raw in pairs], unit="s", peer=peer, how=how)
    how = f"{ours}; the peer's comes out of tail_job_logs(), as in `ray job submit`."
    peer = "the same with tail_job_logs()"
    yield compared("first_line_shown", [(shown, raw.shown) for shown, raw in pairs], unit="s", peer=peer, how=how)


async def _rounds(cluster: Cluster, rounds: int) -> list[tuple[float, _Raw]]:
    raw = _raw_client(cluster)
    pairs = []
    async with await AsyncCluster.connect(reach=cluster.reach) as ours:
        for turn in range(rounds + 1):
            shown = await asyncio.wait_for(_ours(ours), _LIMIT_S)
            theirs = await asyncio.wait_for(_theirs(raw), _LIMIT_S)
            if turn:  # the first of each makes what the later ones find made
                pairs.append((shown, theirs))
    return pairs


def _raw_client(cluster: Cluster) -> JobSubmissionClient:
    from ray.job_submission import JobSubmissionClient  # noqa: PLC0415 -- slow to import

    environ = cluster.ray_environ
    token = {"Authorization": f"Bearer {environ['RAY_AUTH_TOKEN']}"}
    return JobSubmissionClient(environ["RAY_API_SERVER_ADDRESS"], headers=token)


async def _ours(cluster: AsyncCluster) -> float:
    began = time.time()
    job = await cluster.submit(_COMMAND, working_dir="")
    shown = 0.0
    async for line in job.follow_logs():
        if line.startswith("first:") and not shown:
            shown = time.time() - began
    await job.wait()
    return _found(shown)


async def _theirs(client: JobSubmissionClient) -> _Raw:
    began = time.time()
    submission = client.submit_job(entrypoint=_COMMAND)
    written = shown = 0.0
    async for text in client.tail_job_logs(submission):
        for line in text.splitlines():
            if line.startswith("first:") and not shown:
                shown = time.time() - began
                written = float(line.partition(":")[2]) - began
    while not client.get_job_status(submission).is_terminal():  # noqa: ASYNC110 -- Ray's client has no event for it
        await asyncio.sleep(_REST_S)
    return _Raw(_found(written), shown)


def _found(seconds: float) -> float:
    if not seconds:
        msg = "a job ended without its line"
        raise Skipped(msg)
    return seconds
