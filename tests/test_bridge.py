"""The bridge and real node agents on a real Ray. The bridge never opens the node root; tests play the runner there."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import random
import subprocess
import sys
import tarfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
from support.attempts import attempt_spec
from support.ray_head import RayHeadRunning
from support.waiting import until

import raylaunch
from raylaunch.contract import VAR_ATTEMPT, VAR_NODE_ROOT
from raylaunch.controller.ray.bridge import RayBridge
from raylaunch.controller.ray.protocol import BridgeDown, BridgeEvent, BridgeUp, Grew, ObservedAttempt, Stored
from raylaunch.errors import ClusterDownError, NotFoundError

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def head(plain_ray: RayHeadRunning) -> RayHeadRunning:
    return plain_ray


class Store:
    """A store, and what the bridge said about it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "store"
        self.log_path = folder / "link.log"
        self.events: list[BridgeEvent] = []

    def add_job(self, job: str) -> None:
        (self.path / "jobs" / job).mkdir(parents=True)

    def file(self, attempt: str, path: str) -> Path:
        job, _, number = attempt.rpartition("-")
        return self.path / "jobs" / job / f"attempt-{number}" / path

    def size(self, attempt: str, path: str) -> int:
        return max(
            (
                event.size
                for event in self.events
                if isinstance(event, Grew) and (event.attempt, event.path) == (attempt, path)
            ),
            default=0,
        )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@asynccontextmanager
async def connected(head: RayHeadRunning, store: Store) -> AsyncIterator[RayBridge]:
    bridge = RayBridge(
        gcs_address=head.gcs_address,
        ray_token_path=head.token_path,
        store=store.path,
        on_event=store.events.append,
        log_path=store.log_path,
    )
    await bridge.start()
    try:
        await until(lambda: bridge.up, 60, "the bridge is up")
        yield bridge
    finally:
        await bridge.close()


async def node_of(bridge: RayBridge) -> str:
    return (await bridge.nodes())[0].id


async def prepared(bridge: RayBridge, store: Store, attempt: str) -> Path:
    """Prepare an attempt, and return its folder on the node."""
    store.add_job(attempt.rpartition("-")[0])
    ready = await bridge.prepare(
        await node_of(bridge), spec=attempt_spec(attempt), package="", secrets={"KEY": "planted"}
    )
    return Path(ready.folder)


def agent_of(head: RayHeadRunning) -> psutil.Process | None:
    """Find the node agent's process on this Ray; None while it is being started."""
    return next((process for process in psutil.process_iter() if _is_agent(process, head)), None)


def _is_agent(process: psutil.Process, head: RayHeadRunning) -> bool:
    try:
        return process.name() in {"ray::NodeAgent", "ray::Steward"} and process.environ().get(VAR_NODE_ROOT) == str(
            head.node_root
        )
    except psutil.Error:
        return False


def test_a_node_is_reported_with_its_resources(head: RayHeadRunning, store: Store) -> None:
    async def scenario() -> None:
        async with connected(head, store) as bridge:
            (node,) = await bridge.nodes()
            assert (node.alive, node.cpus, node.gpus, node.cpus_free, node.gpus_free) == (True, 4, 2, 4, 2)
            assert node.custom == {"fast_disk": 2}
            assert node.labels["zone"] == "attic"
            assert node.arch == os.uname().machine
            assert node.disk_free
            await until(lambda: any(isinstance(event, BridgeUp) for event in store.events), 60, "BridgeUp")

    asyncio.run(scenario())


def test_an_attempt_is_prepared_settled_and_continued_from_the_store(head: RayHeadRunning, store: Store) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        info = tarfile.TarInfo("train.py")
        info.size = 9 << 20
        tar.addfile(info, io.BytesIO(os.urandom(9 << 20)))
    sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
    (store.path / "packages").mkdir(parents=True)
    (store.path / f"packages/{sha256}.tar.gz").write_bytes(buffer.getvalue())
    store.add_job("code-a")

    async def scenario() -> None:
        async with connected(head, store) as bridge:
            node = await node_of(bridge)
            ready = await bridge.prepare(node, spec=attempt_spec("code-a-1"), package=sha256, secrets={})
            folder = Path(ready.folder)
            assert (folder / "code/train.py").stat().st_size == 9 << 20
            (folder / "logs/rank-0.log").write_bytes(b"hello\n")
            (folder / "outputs/model.bin").write_bytes(b"m" * (20 << 20))
            fenced = await bridge.fence(node, "code-a-1", "cluster/code-a-1")
            assert fenced.claim is not None
            assert fenced.claim["epoch"] == "fenced"
            assert await bridge.drain(node, "code-a-1", 30)
            assert store.file("code-a-1", "outputs/model.bin").stat().st_size == 20 << 20
            stored = {event.path: event.sha256 for event in store.events if isinstance(event, Stored)}
            assert stored["logs/rank-0.log"] == hashlib.sha256(b"hello\n").hexdigest()
            assert stored["outputs/model.bin"] == hashlib.sha256(b"m" * (20 << 20)).hexdigest()
            await bridge.forget(node, "code-a-1")
            assert not await asyncio.to_thread(folder.exists)
            again = await bridge.prepare(node, spec=attempt_spec("code-a-2"), package=sha256, secrets={})
            model = await asyncio.to_thread(Path(again.folder, "outputs/model.bin").read_bytes)
            assert model == b"m" * (20 << 20)

    asyncio.run(scenario())


def test_the_bridge_writes_into_the_store_and_nowhere_else(head: RayHeadRunning, store: Store) -> None:
    async def scenario() -> None:
        async with connected(head, store) as bridge:
            folder = await prepared(bridge, store, "opened-a-1")
            (folder / "logs/rank-0.log").write_bytes(b"line\n")
            await until(lambda: store.size("opened-a-1", "logs/rank-0.log"), 60, "the line is in the store")
            child = psutil.Process(bridge.pid)
            opened = [file.path for file in child.open_files()]
            assert not [path for path in opened if path.startswith(str(head.node_root))]
            assert head.token_path.read_text() not in " ".join(child.cmdline())

    asyncio.run(scenario())


def test_children_in_sessions_of_their_own_die_at_a_fence(head: RayHeadRunning, store: Store) -> None:
    family = "import os, time\nfor _ in range(2):\n    if os.fork() == 0: os.setsid()\ntime.sleep(600)"

    async def scenario() -> None:
        async with connected(head, store) as bridge:
            await prepared(bridge, store, "family-a-1")
            env = {**os.environ, VAR_ATTEMPT: "cluster/family-a-1"}
            first = subprocess.Popen([sys.executable, "-c", family], env=env)  # noqa: ASYNC220 -- returns at once
            me = psutil.Process(first.pid)
            await until(lambda: len(me.children(recursive=True)) == 3, 60, "three children")
            children = me.children(recursive=True)
            fenced = await bridge.fence(await node_of(bridge), "family-a-1", "cluster/family-a-1")
            assert fenced.killed == 4
            assert first.wait(5) == -9
            assert not [child for child in children if child.is_running() and child.status() != "zombie"]

    asyncio.run(scenario())


@pytest.mark.long
def test_an_agent_killed_ten_times_loses_no_byte(head: RayHeadRunning, store: Store) -> None:
    dice = random.Random(7)  # noqa: S311 -- dice, not a secret

    async def scenario() -> None:
        async with connected(head, store) as bridge:
            folder = await prepared(bridge, store, "kills-a-1")
            path = folder / "logs/rank-0.log"
            kills = 0
            with path.open("ab", buffering=0) as file:
                while kills < 10:
                    next_kill = time.monotonic() + dice.uniform(0.05, 0.6)
                    while time.monotonic() < next_kill:
                        file.write(dice.randbytes(dice.randrange(1, 100_000)))
                        await asyncio.sleep(0.005)
                    if agent := agent_of(head):
                        agent.kill()
                        kills += 1
            size = path.stat().st_size
            await until(lambda: store.size("kills-a-1", "logs/rank-0.log") == size, 60, "all bytes are in the store")
            assert store.file("kills-a-1", "logs/rank-0.log").read_bytes() == path.read_bytes()
            assert not [event for event in store.events if isinstance(event, BridgeDown)]

    asyncio.run(scenario())


def test_a_killed_bridge_restarts_and_sends_nothing_twice(head: RayHeadRunning, store: Store) -> None:
    async def scenario() -> None:
        async with connected(head, store) as bridge:
            folder = await prepared(bridge, store, "again-a-1")
            (folder / "logs/rank-0.log").write_bytes(b"before\n")
            await until(lambda: store.size("again-a-1", "logs/rank-0.log") == 7, 60, "the first line")
            psutil.Process(bridge.pid).kill()
            await until(lambda: not bridge.up, 60, "the bridge is down")
            with pytest.raises(ClusterDownError, match="Ray cannot be reached"):
                await bridge.nodes()
            with (folder / "logs/rank-0.log").open("ab") as file:
                file.write(b"after\n")
            await until(lambda: store.size("again-a-1", "logs/rank-0.log") == 13, 30, "the second line")
            assert store.file("again-a-1", "logs/rank-0.log").read_bytes() == b"before\nafter\n"
            assert [
                event for event in store.events if isinstance(event, ObservedAttempt) and event.attempt == "again-a-1"
            ]

    asyncio.run(scenario())


def test_a_large_log_leaves_the_memory_of_bridge_and_agent_flat(head: RayHeadRunning, store: Store) -> None:
    async def scenario() -> None:
        async with connected(head, store) as bridge:
            folder = await prepared(bridge, store, "large-a-1")
            (folder / "logs/rank-0.log").write_bytes(b"x" * 1_000_000)
            await until(lambda: store.size("large-a-1", "logs/rank-0.log") == 1_000_000, 60, "the first megabyte")
            agent = agent_of(head)
            assert agent is not None
            both = (psutil.Process(bridge.pid), agent)
            before = [process.memory_info().rss for process in both]
            with (folder / "logs/rank-0.log").open("ab") as file:
                for _ in range(200):
                    file.write(b"y" * 1_000_000)
            await until(lambda: store.size("large-a-1", "logs/rank-0.log") == 201_000_000, 60, "all of the log")
            grown = [process.memory_info().rss - was for process, was in zip(both, before, strict=True)]
            assert max(grown) < 120_000_000

    asyncio.run(scenario())


def test_each_line_arrives_before_the_next_is_written(head: RayHeadRunning, store: Store) -> None:
    async def scenario() -> None:
        async with connected(head, store) as bridge:
            folder = await prepared(bridge, store, "soon-a-1")
            with (folder / "logs/rank-0.log").open("ab", buffering=0) as file:
                for number in range(1, 11):
                    file.write(b"a line\n")
                    size = 7 * number
                    await until(lambda: store.size("soon-a-1", "logs/rank-0.log") == size, 60, "the line")  # noqa: B023 -- awaited at once

    asyncio.run(scenario())


def test_an_unknown_node_is_refused(head: RayHeadRunning, store: Store) -> None:
    async def scenario() -> None:
        async with connected(head, store) as bridge:
            with pytest.raises(NotFoundError, match="no living node"):
                await bridge.fence("0" * 56, "x-a-1", "tag")

    asyncio.run(scenario())


def test_a_full_store_is_reported_and_nothing_is_lost(head: RayHeadRunning, store: Store) -> None:
    """A file where a folder must be stands for a disk that refuses; root ignores permissions."""

    async def scenario() -> None:
        async with connected(head, store) as bridge:
            folder = await prepared(bridge, store, "full-a-1")
            await until(lambda: store.file("full-a-1", "attempt.json").exists(), 60, "the first file")
            store.file("full-a-1", "logs").write_text("in the way")
            (folder / "logs/rank-0.log").write_bytes(b"kept\n")
            await until(
                lambda: "StoreProblem" in {type(event).__name__ for event in store.events}, 10, "the report about it"
            )
            store.file("full-a-1", "logs").unlink()
            await until(lambda: store.size("full-a-1", "logs/rank-0.log") == 5, 30, "the line after all")

    asyncio.run(scenario())


@pytest.mark.long
def test_a_bridge_without_ray_reports_the_reason(store: Store, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("t" * 48)

    async def scenario() -> None:
        bridge = RayBridge(
            gcs_address="127.0.0.1:9",
            ray_token_path=token,
            store=store.path,
            on_event=store.events.append,
            log_path=store.log_path,
        )
        await bridge.start()
        try:
            await until(lambda: [event for event in store.events if isinstance(event, BridgeDown)], 40, "BridgeDown")
            with pytest.raises(ClusterDownError, match=r"127\.0\.0\.1:9"):
                await bridge.nodes()
        finally:
            await bridge.close()

    asyncio.run(scenario())


def test_the_bridge_ends_when_its_controller_is_killed(tmp_path: Path) -> None:
    """`python` in the middle is the controller; it is killed while the bridge tries to connect."""
    controller = f"""
import asyncio
from pathlib import Path
from raylaunch.controller.ray.bridge import RayBridge

async def main():
    folder = Path({str(tmp_path)!r})
    bridge = RayBridge(gcs_address="127.0.0.1:9", ray_token_path=folder / "token", store=folder / "store",
                       on_event=print, log_path=folder / "link.log")
    await bridge.start()
    while bridge.pid is None:
        await asyncio.sleep(0.01)
    print(bridge.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", controller], stdout=subprocess.PIPE, env=_importable()) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    child.wait(20)


def _importable() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(raylaunch.__file__).parents[1])}
