"""Being told by the kernel of news in attempts' folders."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from raylaunch.agent.attempt_dir import write_json
from raylaunch.agent.inotify import Watcher

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's inotify")

ATTEMPT = "digits-abc-1"


@pytest.fixture
def attempt(tmp_path: Path) -> Path:
    """An attempt's folder below the node root `tmp_path`."""
    folder = tmp_path / "attempts" / ATTEMPT
    (folder / "logs").mkdir(parents=True)
    (folder / "logs/rank-0.log").touch()
    (folder / "wandb/wandb/run-1").mkdir(parents=True)
    return folder


def wakes(root: Path, act: Callable[[], object], *, limit_s: float) -> bool:
    """Whether somebody who waits for news is woken when `act` is done."""

    async def scenario() -> bool:
        watcher, woken = Watcher(root), asyncio.Event()
        assert watcher.works
        watcher.follow([ATTEMPT])
        waiting = asyncio.create_task(watcher.wait_for_events(woken, limit_s))
        await asyncio.sleep(0)
        act()
        await waiting
        return woken.is_set()

    return asyncio.run(scenario())


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_a_line_in_a_log_is_news(tmp_path: Path, attempt: Path) -> None:
    assert wakes(tmp_path, lambda: append(attempt / "logs/rank-0.log", "line\n"), limit_s=10)


def test_the_log_of_a_further_rank_is_news(tmp_path: Path, attempt: Path) -> None:
    assert wakes(tmp_path, lambda: append(attempt / "logs/rank-7.log", "line\n"), limit_s=10)


def test_a_record_that_is_renamed_into_place_is_news(tmp_path: Path, attempt: Path) -> None:
    assert wakes(tmp_path, lambda: write_json(attempt / "exit.json", {"ended": "completed"}), limit_s=10)


def test_a_new_attempt_is_news(tmp_path: Path, attempt: Path) -> None:
    assert wakes(tmp_path, lambda: attempt.with_name("digits-abc-2").mkdir(), limit_s=10)


@pytest.mark.parametrize("path", ["heartbeat", "progress.jsonl", "wandb/wandb/run-1/run-1.wandb"])
def test_what_grows_with_each_step_wakes_nobody(path: str, tmp_path: Path, attempt: Path) -> None:
    (attempt / path).touch()
    assert not wakes(tmp_path, lambda: append(attempt / path, "more"), limit_s=0.3)


def test_news_that_was_looked_at_is_old(tmp_path: Path, attempt: Path) -> None:
    async def scenario() -> bool:
        watcher, woken = Watcher(tmp_path), asyncio.Event()
        watcher.follow([ATTEMPT])
        for n in range(3000):
            append(attempt / f"logs/rank-{n % 50}.log", "line\n")
        watcher.drain()
        await watcher.wait_for_events(woken, 0.3)
        return woken.is_set()

    assert not asyncio.run(scenario())


def test_an_attempt_that_is_gone_is_no_problem(tmp_path: Path, attempt: Path) -> None:
    watcher = Watcher(tmp_path)
    watcher.follow([ATTEMPT, "digits-gone-1"])
    attempt.rename(attempt.with_name(".forgotten"))
    watcher.follow([])
    watcher.drain()
    assert watcher.works


def test_whoever_is_told_by_other_means_need_not_wait(tmp_path: Path, attempt: Path) -> None:
    async def scenario() -> None:
        woken = asyncio.Event()
        woken.set()
        await Watcher(tmp_path).wait_for_events(woken, 30)

    assert attempt.is_dir()
    asyncio.run(asyncio.wait_for(scenario(), 10))
