"""What mutual TLS between the nodes' Rays costs: a cluster with it next to one without it, in turns."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator

from benchmarks.measure import Result, Skipped, compared, in_turns, seconds
from benchmarks.workshop import PROGRAMS, RAYLAUNCH, Cluster, Workshop, run_program
from raylaunch.sdk import AsyncCluster

_ROUNDS = 7
_LINE = 100
_LARGE, _SMALL = 400_000_000, 10_000_000
_LIMIT_S = 300.0


def run(shop: Workshop) -> Iterator[Result]:
    """Measure a submission, and a log on its way from the node to the store."""
    size = _SMALL if shop.quick else _LARGE
    with shop.other_cluster("tls", spec="name: local\ntls: on\n") as ours, shop.other_cluster("plain") as peer:
        pairs = in_turns(
            lambda: asyncio.run(_submission(ours)),
            lambda: asyncio.run(_submission(peer)),
            rounds=shop.rounds(_ROUNDS),
        )
        how = "AsyncCluster.submit of `true`, without code, until its end is known."
        yield compared("tls_submission", pairs, unit="s", peer="a cluster with `tls: off`", how=how)
        pairs = in_turns(lambda: _log(ours, size), lambda: _log(peer, size), rounds=shop.rounds(_ROUNDS))
        how = f"A job that writes a log of {size / 1e6:.0f} MB, from its submission until all of it is in the store."
        yield compared("tls_log", pairs, unit="s", peer="a cluster with `tls: off`", how=how)


async def _submission(cluster: Cluster) -> float:
    async with await AsyncCluster.connect(reach=cluster.reach) as connected:
        began = time.perf_counter()
        job = await connected.submit("true", working_dir="")
        await asyncio.wait_for(job.wait(), _LIMIT_S)
        return time.perf_counter() - began


def _log(cluster: Cluster, size: int) -> float:
    jobs: list[str] = []

    def write() -> None:
        command = ("python", str(PROGRAMS / "large_log.py"), str(size // _LINE))
        answer = run_program((*RAYLAUNCH, "submit", "--json", "--working-dir", "", "--", *command), cluster.environ)
        jobs.append(str(json.loads(answer)["job"]["id"]))
        run_program((*RAYLAUNCH, "wait", jobs[0]), cluster.environ, limit_s=_LIMIT_S)

    took = seconds(write)
    last = run_program((*RAYLAUNCH, "logs", "--tail", "1", jobs[0]), cluster.environ)
    run_program((*RAYLAUNCH, "rm", jobs[0]), cluster.environ)
    if not last.startswith(f"{size // _LINE - 1:09} "):
        msg = "the log was not whole"
        raise Skipped(msg)
    return took
