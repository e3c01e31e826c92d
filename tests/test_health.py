"""A controller that runs and does not respond: when it counts as hung, and its end."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from functools import partial

import anyio
import pytest
from support.api import Api
from support.standing import Start

from raylaunch.cluster.local.health import START_S, HealthWatch, end_hung, responds
from raylaunch.cluster.processes import ProcessIdentity, is_alive
from raylaunch.cluster.record import new_record, save_record
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.paths import ClusterPaths

ONE = ProcessIdentity(pid=1, started_at=0, ticks=1, boot_id="b")
OTHER = ONE.model_copy(update={"pid": 2})


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Watched:
    """A watch over one controller, and what it says after so many seconds more."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.watch = HealthWatch(self.clock)

    def after(self, seconds: float, *, answers: bool = False, controller: ProcessIdentity = ONE) -> bool:
        self.clock.now += seconds
        return self.watch.judge(controller, answers=answers)

    def silence_s(self, controller: ProcessIdentity) -> float:
        """Return for how long this controller may be silent, once it has answered."""
        self.after(0, answers=True, controller=controller)
        started = self.clock.now
        while not self.after(1, controller=controller):
            pass
        return self.clock.now - started


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield int(listener.getsockname()[1])


def test_one_that_answered_counts_as_hung_after_some_seconds_of_silence() -> None:
    assert 5 < Watched().silence_s(ONE) < 20


def test_a_response_resets_the_count() -> None:
    watched = Watched()
    watched.after(0, answers=True)
    for _ in range(5):
        assert not watched.after(7)
        assert not watched.after(1, answers=True)


def test_one_that_starts_may_be_silent_for_longer() -> None:
    watched = Watched()
    assert not watched.after(0)
    assert not watched.after(START_S - 1)
    assert watched.after(1)
    assert not watched.after(0, controller=OTHER)


def test_one_of_which_is_known_that_it_answered_is_not_waited_for_as_if_it_started() -> None:
    watched = Watched()
    watched.watch.judge(ONE, answers=False, answered_before=True)
    watched.clock.now += START_S / 2
    assert watched.watch.judge(ONE, answers=False, answered_before=True)


def test_a_watch_that_was_suspended_queries_twice() -> None:
    watched = Watched()
    watched.after(0, answers=True)
    assert not watched.after(3600)
    assert watched.after(1)


def test_each_replacement_allows_the_next_one_more_silence_until_it_has_run_steadily() -> None:
    watched = Watched()
    allowed = []
    for pid in range(10, 16):
        allowed.append(watched.silence_s(ONE.model_copy(update={"pid": pid})))
        watched.watch.note_replaced()
    assert allowed[1] >= 2 * allowed[0]
    assert allowed == sorted(allowed)
    assert allowed[-1] == allowed[-2]  # there is a most
    for _ in range(20):
        watched.after(60, answers=True)
    assert watched.silence_s(ONE) == allowed[0]


def test_a_port_that_accepts_connections_and_sends_nothing_does_not_respond(silent_port: int) -> None:
    assert not anyio.run(partial(responds, silent_port, "", limit_s=0.2))


@pytest.mark.parametrize(("age_s", "answered"), [(3600.0, False), (0.0, True), (0.0, False)])
def test_a_controller_that_is_silent_is_ended_unless_it_still_starts(
    paths: ClusterPaths, start: Start, silent_port: int, age_s: float, *, answered: bool
) -> None:
    process = start()
    hung = process.model_copy(update={"started_at": process.started_at - age_s})
    record = new_record(ClusterSpec(), paths).with_(
        wanted="running", controller=hung, controller_answered=answered, ports={"controller": silent_port}
    )
    save_record(paths, record)
    ended = answered or age_s > START_S
    found = anyio.run(partial(end_hung, paths, "token", lock_s=5))
    assert found == (hung if ended else None)
    assert is_alive(process) is not ended


def test_a_controller_that_answers_the_second_query_stays(paths: ClusterPaths, start: Start, api: Api) -> None:
    process = start()
    ports = {"controller": int(api.url.rpartition(":")[2])}
    record = new_record(ClusterSpec(), paths).with_(
        wanted="running", controller=process, controller_answered=True, ports=ports
    )
    save_record(paths, record)
    assert anyio.run(partial(end_hung, paths, "token", lock_s=5)) is None
    assert is_alive(process)
