"""The controller's loop and the link's words: what is seen of the nodes is what they are in the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support.api import settings_of
from support.links import LinkToNothing
from support.waiting import until

from raylaunch.cluster_state import NodeView
from raylaunch.controller.artifacts import Artifacts
from raylaunch.controller.drains import DrainBook
from raylaunch.controller.foreign import ForeignJobs
from raylaunch.controller.lifecycle import Lifecycle
from raylaunch.controller.link import LinkDown, LinkUp, NodesChanged
from raylaunch.controller.means import Leavings, Means
from raylaunch.controller.ray_jobs import RayJobs
from raylaunch.controller.record import JobRecord
from raylaunch.controller.records import Records
from raylaunch.controller.secret_store import SecretStore
from raylaunch.controller.sight import Sight
from raylaunch.errors import ClusterDownError


class SlowLink(LinkToNothing):
    """A link that answers with the nodes as they were when it was asked, once it is let."""

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
            msg = "Ray's link did not answer"
            raise ClusterDownError(msg)
        return found


def node(name: str, *, steward: bool) -> NodeView:
    return NodeView(id=name * 8, hostname=name, address="10.0.0.1", alive=True, steward=steward)


async def _nothing_left(_: JobRecord) -> Leavings:
    return Leavings(log_tail=(), outputs=0, output_bytes=0, last_metrics={})


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[tuple[Lifecycle, SlowLink, Sight]]:
    records, sight, link = Records(folder), Sight(), SlowLink(folder)
    ray = RayJobs("http://127.0.0.1:9", "none")
    means = Means(settings_of(folder, 9), records, SecretStore(folder), link, ray, sight, _nothing_left)
    foreign = ForeignJobs(records=records, ray=ray, link=link, sight=sight)
    lifecycle = Lifecycle(means, Artifacts(folder), foreign, DrainBook(folder))
    task = asyncio.create_task(lifecycle.run())
    try:
        yield lifecycle, link, sight
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        records.close()


@pytest.mark.anyio
async def test_what_changes_while_the_nodes_are_asked_for_is_asked_for_again(tmp_path: Path) -> None:
    async with running(tmp_path) as (lifecycle, link, sight):
        link.there = (node("h1", steward=False),)
        lifecycle.see(LinkUp(ray_version="2"))
        await until(lambda: link.asked == 1, 5, "the nodes are asked for")
        link.there = (node("h1", steward=True),)
        lifecycle.see(NodesChanged())
        link.let.release()
        link.let.release()
        await until(lambda: bool(sight.ready_nodes()), 5, "the steward is seen")
        await asyncio.sleep(0.1)
        assert link.asked == 2


@pytest.mark.anyio
async def test_a_question_without_an_answer_is_asked_again(tmp_path: Path) -> None:
    async with running(tmp_path) as (lifecycle, link, sight):
        link.there, link.silent = (node("h1", steward=True),), 1
        lifecycle.see(LinkUp(ray_version="2"))
        link.let.release()
        link.let.release()
        await until(lambda: bool(sight.ready_nodes()), 5, "the node is seen")


@pytest.mark.anyio
async def test_nobody_is_asked_while_the_link_is_down(tmp_path: Path) -> None:
    async with running(tmp_path) as (lifecycle, link, sight):
        lifecycle.see(NodesChanged())
        lifecycle.see(LinkDown(why="Ray is gone"))
        await asyncio.sleep(0.1)
        assert (link.asked, sight.link_why) == (0, "Ray is gone")
        link.there = (node("h1", steward=True),)
        link.let.release()
        lifecycle.see(LinkUp(ray_version="2"))
        await until(lambda: bool(sight.ready_nodes()), 5, "the node is seen")
