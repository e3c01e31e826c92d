"""A long queue: what one end of a job costs the controller's event loop, and how soon `list` and `show` answer."""

from __future__ import annotations

import asyncio
import http.client
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode, urlsplit

from benchmarks.measure import Result, Skipped
from benchmarks.workshop import Workshop
from raylaunch.agent.job_dir import ReadyAttempt
from raylaunch.cluster.types import Endpoint
from raylaunch.controller.ray.bridge import RayBridge
from raylaunch.controller.ray.jobs_api import RayJobs
from raylaunch.controller.ray.protocol import BridgeUp
from raylaunch.controller.scheduler.attempt_context import AttemptContext, AttemptResult
from raylaunch.controller.scheduler.external_jobs import ExternalJobs
from raylaunch.controller.scheduler.loop import SchedulerLoop
from raylaunch.controller.scheduler.observed import ObservedState
from raylaunch.controller.settings import Settings
from raylaunch.controller.store.artifacts import Artifacts
from raylaunch.controller.store.audit import DrainStore
from raylaunch.controller.store.jobs import Records
from raylaunch.controller.store.record import JobRecord
from raylaunch.controller.store.secrets import SecretStore
from raylaunch.models.cluster import NodeView
from raylaunch.models.job import SubmitRequest
from raylaunch.models.job_spec import JobSpec, Resources, Where
from raylaunch.models.states import Change

_SIZES, _FEW_SIZES = (10, 100, 1_000, 10_000), (10, 100)
_ENDS = 9
_ANSWERS = 40
_GIB = 1024**3


def end(shop: Workshop) -> Iterator[Result]:
    """Measure the controller's own loop over a real store; its nodes and Ray are a stand-in."""
    taken = {}
    for size in _FEW_SIZES if shop.quick else _SIZES:
        folder = shop.folder / f"queue-{size}"
        _fill(folder, size + _ENDS + 1, where=Where())
        taken[size] = asyncio.run(_one_end(folder, shop.rounds(_ENDS)))
    few, many = min(taken), max(taken)
    growth = ", ".join(f"{size:,}: {figure:.3g} ms" for size, figure in taken.items())
    how = (
        f"Longest time for which the controller's event loop does nothing else, from the end of a job to the start of"
        f" the next one and all that follows, with {many:,} jobs waiting; median of {_ENDS} ends. By waiting jobs"
        f" ({growth})."
    )
    yield Result("queue_end", taken[many], "ms", how, peer=f"with {few} jobs waiting", peer_figure=taken[few])


def answers(shop: Workshop) -> Iterator[Result]:
    """Measure a real controller and a real Ray, over HTTP."""
    jobs = _FEW_SIZES[-1] if shop.quick else _SIZES[-1]
    ids = _fill(shop.home("queue") / "clusters" / "local" / "store", jobs, where=Where(hosts=("elsewhere",)))
    with shop.other_cluster("queue") as cluster:
        lists = _ask(cluster.reach, [f"/v1/jobs?{urlencode({'limit': 50, 'state': 'queued'})}"] * _ANSWERS)
        shows = _ask(cluster.reach, [f"/v1/jobs/{job}" for job in ids[:: max(1, jobs // _ANSWERS)]])
    how = f"95th percentile of {_ANSWERS} answers over HTTP on the same machine, with {jobs:,} jobs waiting:"
    yield Result("queue_list", _slowest(lists), "ms", f"{how} a page of 50 of them, each with what it waits for.")
    yield Result("queue_show", _slowest(shows), "ms", f"{how} one of them.")


class _Elsewhere(RayBridge):
    """A link to one node on which attempts are prepared without end."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            gcs_address="127.0.0.1:9",
            ray_token_path=folder / "none",
            store=folder,
            on_event=lambda _event: None,
            log_path=folder / "link.log",
        )

    async def nodes(self) -> tuple[NodeView, ...]:
        """Return the node: eight GPUs, and as much memory as any job asks for."""
        memory = 1024 * _GIB
        free = {"gpus": 8.0, "gpus_free": 8.0, "memory": memory, "memory_free": memory}
        return (
            NodeView.model_validate(
                {"id": "n", "hostname": "h", "address": "", "alive": True, "steward": True, **free}
            ),
        )

    async def prepare(self, *_attempt: object, **_with: object) -> ReadyAttempt:
        """Never return."""
        await asyncio.Event().wait()
        raise AssertionError


async def _one_end(folder: Path, rounds: int) -> float:
    records, observed = Records(folder), ObservedState()
    settings = Settings(
        cluster="bench",
        cluster_id="bench",
        store=folder,
        port=9,
        gcs_address="127.0.0.1:9",
        dashboard_url="http://127.0.0.1:9",
        ray_token_path=folder / "none",
    )
    link, ray = _Elsewhere(folder), RayJobs(settings.dashboard_url, "none")
    context = AttemptContext(settings, records, SecretStore(folder), link, ray, observed, _nothing_left)
    foreign = ExternalJobs(records=records, ray=ray, bridge=link, observed=observed)
    lifecycle = SchedulerLoop(context, Artifacts(folder), foreign, DrainStore(folder))
    running = asyncio.create_task(lifecycle.run())
    try:
        lifecycle.on_event(BridgeUp(ray_version=""))
        await _until_one_runs(records, but="")
        while next(records.backlog.unrecorded(1), None):  # until what each waits for is recorded
            observed.notify()
            await asyncio.sleep(0)
        return statistics.median([await _pause_at_end(records, observed) for _ in range(rounds)])
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await ray.close()
        records.close()


async def _nothing_left(_record: JobRecord) -> AttemptResult:
    return AttemptResult(log_tail=(), outputs=0, output_bytes=0, last_metrics={})


async def _until_one_runs(records: Records, *, but: str) -> None:
    for _ in range(2000):
        if any(record.id != but for record in records.active()):
            return
        await asyncio.sleep(0.01)
    msg = "no job got its turn"
    raise Skipped(msg)


async def _pause_at_end(records: Records, observed: ObservedState) -> float:
    """Return the longest that other work on the loop waits while a job ends and the next one starts, milliseconds."""
    (ended,) = records.active()
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0)
    records.update(ended.id, kind="ended", message="it failed", change=Change.FAIL)
    observed.notify()
    await _until_one_runs(records, but=ended.id)
    await asyncio.sleep(0.2)
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    return longest * 1000


def _fill(store: Path, jobs: int, *, where: Where) -> list[str]:
    """Make a store with jobs that wait, through the controller's own records; return their ids."""
    before = os.umask(0o077)
    try:
        records = Records(store)
    finally:
        os.umask(before)
    made = []
    for n in range(jobs):
        resources = Resources(gpus=8, memory=(1 + n % 16) * _GIB)  # sixteen kinds of job, one of which runs at a time
        spec = JobSpec(entrypoint="python train.py", name=f"job-{n}", working_dir="", resources=resources, where=where)
        made.append(records.create(SubmitRequest(spec=spec), owner="anna", wandb=None)[0].id)
    records.close()
    return made


def _ask(reach: Endpoint, paths: list[str]) -> list[float]:
    connection = http.client.HTTPConnection(urlsplit(reach.url).netloc, timeout=30)
    times = []
    for path in paths:
        began = time.perf_counter()
        connection.request("GET", path, headers={"Authorization": f"Bearer {reach.token}"})
        answer = connection.getresponse()
        body = answer.read()
        times.append(time.perf_counter() - began)
        if answer.status != http.client.OK or b"elsewhere" not in body:
            msg = f"{path} was answered with {answer.status}"
            raise Skipped(msg)
    connection.close()
    return times


def _slowest(times: list[float]) -> float:
    return statistics.quantiles(times, n=100)[94] * 1000
