"""The controller's loop and the bridge's words: what is seen of the nodes is what they are in the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import psutil
import pytest
from support.api import settings_of
from support.bridges import UnconnectedBridge
from support.waiting import until

from raylaunch.controller.ray.bridge import RayBridge
from raylaunch.controller.ray.jobs_api import RayJobs
from raylaunch.controller.ray.protocol import BridgeDown, BridgeUp, NodesChanged
from raylaunch.controller.scheduler.attempt_context import AttemptContext, AttemptResult
from raylaunch.controller.scheduler.external_jobs import ExternalJobs
from raylaunch.controller.scheduler.loop import RECORDED_AHEAD, SchedulerLoop
from raylaunch.controller.scheduler.observed import ObservedState
from raylaunch.controller.scheduler.queue import Block
from raylaunch.controller.store.artifacts import Artifacts
from raylaunch.controller.store.audit import DrainStore
from raylaunch.controller.store.jobs import Records
from raylaunch.controller.store.record import JobRecord
from raylaunch.controller.store.secrets import SecretStore
from raylaunch.errors import ClusterDownError, RaylaunchError
from raylaunch.models.cluster import GpuView, NodeView
from raylaunch.models.job import AttemptView, SubmitRequest
from raylaunch.models.job_spec import JobSpec, Resources
from raylaunch.models.states import Change, JobState, Reason


class BrokenBridge(UnconnectedBridge):
    """A bridge whose child has a bug."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.asked = 0

    async def nodes(self) -> tuple[NodeView, ...]:
        self.asked += 1
        msg = "the bridge failed at nodes"
        raise RaylaunchError(msg)


class SlowBridge(UnconnectedBridge):
    """A bridge that answers with the nodes as they were when it was asked, once it is let."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.there: tuple[NodeView, ...] = ()
        self.asked = 0
        self.silent = 0
        """How many questions are not answered."""
        self.let = asyncio.Semaphore(0)

    async def nodes(self) -> tuple[NodeView, ...]:
        self.asked += 1
        found = self.there
        await self.let.acquire()
        if self.silent:
            self.silent -= 1
            msg = "the bridge did not respond"
            raise ClusterDownError(msg)
        return found


def node(name: str, *, steward: bool) -> NodeView:
    return NodeView(id=name * 8, hostname=name, address="10.0.0.1", alive=True, steward=steward)


async def _nothing_left(_: JobRecord) -> AttemptResult:
    return AttemptResult(log_tail=(), outputs=0, output_bytes=0, last_metrics={})


@asynccontextmanager
async def running(
    folder: Path, records: Records | None = None
) -> AsyncIterator[tuple[SchedulerLoop, SlowBridge, ObservedState]]:
    bridge = SlowBridge(folder)
    async with running_with(bridge, folder, records) as (lifecycle, observed):
        yield lifecycle, bridge, observed


@asynccontextmanager
async def running_with(
    bridge: RayBridge, folder: Path, records: Records | None, **settings: object
) -> AsyncIterator[tuple[SchedulerLoop, ObservedState]]:
    records, observed = records or Records(folder), ObservedState()
    ray = RayJobs("http://127.0.0.1:9", "none")
    context = AttemptContext(
        settings_of(folder, 9).model_copy(update=settings),
        records,
        SecretStore(folder),
        bridge,
        ray,
        observed,
        _nothing_left,
    )
    foreign = ExternalJobs(records=records, ray=ray, bridge=bridge, observed=observed)
    lifecycle = SchedulerLoop(context, Artifacts(folder), foreign, DrainStore(folder))
    task = asyncio.create_task(lifecycle.run())
    try:
        yield lifecycle, observed
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        records.close()


@pytest.mark.anyio
async def test_what_changes_while_the_nodes_are_asked_for_is_asked_for_again(tmp_path: Path) -> None:
    async with running(tmp_path) as (lifecycle, bridge, observed):
        bridge.there = (node("h1", steward=False),)
        lifecycle.on_event(BridgeUp(ray_version="2"))
        await until(lambda: bridge.asked == 1, 60, "the nodes are asked for")
        bridge.there = (node("h1", steward=True),)
        lifecycle.on_event(NodesChanged())
        bridge.let.release()
        bridge.let.release()
        await until(lambda: bool(observed.ready_nodes()), 60, "the node agent is seen")
        await asyncio.sleep(0.1)
        assert bridge.asked == 2


@pytest.mark.anyio
async def test_a_question_without_an_answer_is_asked_again(tmp_path: Path) -> None:
    async with running(tmp_path) as (lifecycle, bridge, observed):
        bridge.there, bridge.silent = (node("h1", steward=True),), 1
        lifecycle.on_event(BridgeUp(ray_version="2"))
        bridge.let.release()
        bridge.let.release()
        await until(lambda: bool(observed.ready_nodes()), 60, "the node is seen")


@pytest.mark.anyio
async def test_a_bug_of_the_bridges_process_is_not_met_again_and_again(tmp_path: Path) -> None:
    records, bridge = Records(tmp_path), BrokenBridge(tmp_path)
    spec = JobSpec(entrypoint="python train.py", resources=Resources(gpus=1))
    records.create(SubmitRequest(spec=spec), owner="ana", wandb=None)
    async with running_with(bridge, tmp_path, records) as (lifecycle, observed):
        lifecycle.on_event(BridgeUp(ray_version="2"))
        await until(lambda: bridge.asked == 1, 60, "the nodes are asked for")
        for _ in range(200):  # each lets the loop take a step
            observed.notify()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert bridge.asked < 10


@pytest.mark.anyio
async def test_nobody_is_asked_while_the_bridge_is_down(tmp_path: Path) -> None:
    async with running(tmp_path) as (lifecycle, bridge, observed):
        lifecycle.on_event(NodesChanged())
        lifecycle.on_event(BridgeDown(why="Ray is gone"))
        await asyncio.sleep(0.1)
        assert (bridge.asked, observed.bridge_error) == (0, "Ray is gone")
        bridge.there = (node("h1", steward=True),)
        bridge.let.release()
        lifecycle.on_event(BridgeUp(ray_version="2"))
        await until(lambda: bool(observed.ready_nodes()), 60, "the node is seen")


@pytest.mark.anyio
async def test_a_job_that_wants_gpus_is_placed_by_what_they_are_used_for_now(tmp_path: Path) -> None:
    records = Records(tmp_path)
    async with running(tmp_path, records) as (lifecycle, bridge, observed):
        free = node("h1", steward=True).model_copy(update={"gpus": 1, "gpus_free": 1, "gpu": (GpuView(index="0"),)})
        bridge.there = (free,)
        lifecycle.on_event(BridgeUp(ray_version="2"))
        bridge.let.release()
        await until(lambda: observed.nodes == (free,), 60, "the free GPU was seen")
        observed.nodes_at = float("-inf")  # long ago
        taken = GpuView(index="0", processes=("eve:7:python",))
        bridge.there = (free.model_copy(update={"gpu": (taken,)}),)  # nothing of this is told
        spec = JobSpec(entrypoint="python train.py", resources=Resources(gpus=1))
        record, _ = records.create(SubmitRequest(spec=spec), owner="ana", wandb=None)
        observed.notify()
        await until(lambda: bridge.asked == 2, 60, "the nodes are asked for")
        assert records.get(record.id).state is JobState.QUEUED
        for _ in range(9):  # as often as it is asked again on a machine that is busy
            bridge.let.release()
        with anyio.fail_after(60):
            while records.get(record.id).reason is not Reason.GPU_BUSY_OUTSIDE:  # noqa: ASYNC110 -- its thread is this one
                await asyncio.sleep(0.02)
        assert "eve's python" in records.get(record.id).message


@pytest.mark.anyio
async def test_who_asks_for_the_nodes_has_them_looked_at_unless_that_was_a_moment_ago(tmp_path: Path) -> None:
    async with running(tmp_path) as (lifecycle, bridge, observed):
        lifecycle.on_event(BridgeUp(ray_version="2"))
        bridge.let.release()
        await until(lambda: observed.nodes_age < 60, 60, "the nodes were looked at")
        await observed.fresh_nodes(age_s=600, timeout_s=60)
        assert bridge.asked == 1
        bridge.there = (node("h1", steward=True),)  # nothing of this is told
        bridge.let.release()
        await observed.fresh_nodes(age_s=0, timeout_s=60)
        assert (bridge.asked, observed.nodes) == (2, bridge.there)


@pytest.mark.anyio
async def test_where_the_nodes_cannot_be_looked_at_who_asks_gets_what_was_seen_last(tmp_path: Path) -> None:
    async with running(tmp_path) as (lifecycle, bridge, observed):
        lifecycle.on_event(BridgeUp(ray_version="2"))
        await until(lambda: bridge.asked == 1, 60, "the nodes are asked for")
        await observed.fresh_nodes(age_s=0, timeout_s=0.2)
        lifecycle.on_event(BridgeDown(why="Ray is gone"))
        await observed.fresh_nodes(age_s=0, timeout_s=60)
        assert observed.nodes == ()


# -- a queue ---------------------------------------------------------------------------------------------------------


def submitted(records: Records, name: str, **resources: float) -> str:
    spec = JobSpec(entrypoint="python train.py", name=name, resources=Resources.model_validate(resources))
    return records.create(SubmitRequest(spec=spec), owner="ana", wandb=None)[0].id


async def soon(condition: Callable[[], bool]) -> None:
    """Wait on this thread, whose the records are."""
    with anyio.fail_after(60):
        while not condition():  # noqa: ASYNC110 -- as above
            await asyncio.sleep(0.01)


def why(records: Records, observed: ObservedState, job: str) -> Block:
    ask = records.backlog.get(job)
    block = observed.plan.block(ask) if observed.plan and ask else None
    return block or Block(Reason.SENDING_CODE, str)


@pytest.mark.anyio
async def test_what_all_jobs_wait_for_is_read_and_recorded_for_those_ahead_alone(tmp_path: Path) -> None:
    records = Records(tmp_path)
    jobs = [submitted(records, f"job-{n}", cpus=4) for n in range(RECORDED_AHEAD + 10)]
    async with running(tmp_path, records) as (lifecycle, bridge, observed):
        bridge.there = (node("h1", steward=True).model_copy(update={"cpus": 2}),)
        lifecycle.on_event(BridgeUp(ray_version="2"))
        bridge.let.release()
        with anyio.fail_after(60):
            while any(records.light(job).reason is not Reason.WAITING_FOR_NODE for job in jobs):
                observed.notify()
                await asyncio.sleep(0.01)
        lifecycle.on_event(BridgeDown(why="Ray is gone"))
        with anyio.fail_after(60):
            while records.light(jobs[RECORDED_AHEAD - 1]).reason is not Reason.WAITING_FOR_RAY:
                observed.notify()
                await asyncio.sleep(0.01)
        reported = [records.light(job).reason for job in jobs]
        assert reported == [Reason.WAITING_FOR_RAY] * RECORDED_AHEAD + [Reason.WAITING_FOR_NODE] * 10
        shown = why(records, observed, jobs[-1])
        assert (shown.reason, shown.message) == (Reason.WAITING_FOR_RAY, "waiting for Ray: Ray is gone")


@pytest.mark.anyio
async def test_a_new_sentence_with_the_same_reason_is_not_recorded(tmp_path: Path) -> None:
    records = Records(tmp_path)
    job = submitted(records, "waits", gpus=2)
    async with running(tmp_path, records) as (lifecycle, bridge, observed):
        bridge.there = (node("h1", steward=True).model_copy(update={"gpus": 2, "gpus_free": 1}),)
        lifecycle.on_event(BridgeUp(ray_version="2"))
        bridge.let.release()
        await soon(lambda: records.light(job).reason is Reason.WAITING_FOR_GPUS)
        journal = records.folder(job) / "journal.jsonl"
        before = journal.stat().st_size
        bridge.there = (bridge.there[0].model_copy(update={"gpus_free": 0}),)
        lifecycle.on_event(NodesChanged())
        bridge.let.release()
        await soon(lambda: "has 0 free" in why(records, observed, job).message)
        assert journal.stat().st_size == before


@pytest.mark.anyio
async def test_the_last_lines_of_an_attempt_are_no_longer_shown_when_the_next_one_starts(tmp_path: Path) -> None:
    records = Records(tmp_path)
    job = submitted(records, "again", gpus=1)
    first = AttemptView(id=f"{job}-1", n=1, admitted_at=0)
    records.update(job, change=Change.ADMIT, attempts=(first,))
    records.update(job, change=Change.REQUEUE, log_tail=("Traceback of attempt 1",))
    async with running(tmp_path, records) as (lifecycle, bridge, _):
        bridge.there = (node("h1", steward=True).model_copy(update={"gpus": 1, "gpus_free": 1}),)
        lifecycle.on_event(BridgeUp(ray_version="2"))
        bridge.let.release()
        await soon(lambda: len(records.light(job).attempts) == 2)
        assert records.get(job).log_tail == ()


@pytest.mark.anyio
async def test_a_command_that_starts_ray_again_and_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    noted = tmp_path / "pids"
    hangs = f"sleep 1000 & echo $! $$ > {noted}.new; mv {noted}.new {noted}; wait"
    command = ("sh", "-c", hangs)
    async with running_with(BrokenBridge(tmp_path), tmp_path, None, revive=command, revive_limit_s=0.2):
        await until(noted.exists, 60, "Ray is silent for long enough to be started again")
        pids = [int(word) for word in noted.read_text().split()]
        await until(lambda: not any(map(psutil.pid_exists, pids)), 60, "both are ended")
