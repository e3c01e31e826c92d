"""Hosts come and go: what a file becomes, what the queue does about a drain, and who may say so."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from support.api import Api, serving
from support.api_use import error
from support.queues import decide

from raylaunch.config.load import ClusterFile, load_cluster_file
from raylaunch.controller.scheduler.host_service import HostService
from raylaunch.controller.scheduler.observed import ObservedState
from raylaunch.controller.scheduler.queue import Admit, NodeCapacity
from raylaunch.controller.store.audit import DrainStore
from raylaunch.controller.store.backlog import ResourceRequest, WaitDecision
from raylaunch.controller.store.jobs import Records
from raylaunch.errors import ConflictError, NotFoundError, SpecError
from raylaunch.models.cluster import Drain, NodeView
from raylaunch.models.fields import point_in_time
from raylaunch.models.states import Reason
from raylaunch.operations.hosts import plan_add, plan_remove

BLOCK = """\
# Our cluster.
name: lab
hosts:
  - dgx-1          # the head
  # the new one
  - host: dgx-2.example.org
    gpus: [0, 1]   # the others are Anna's
defaults:          # of all
  user: ml
"""
FLOW = "name: lab\nhosts: [dgx-1, {host: dgx-2, gpus: 4}]  # two\nstore: /raid/store\n"


def file_of(folder: Path, text: str) -> ClusterFile:
    path = folder / "cluster.yaml"
    path.write_text(text)
    return load_cluster_file(path)


# -- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [BLOCK, BLOCK.rstrip(), FLOW], ids=["block", "no last newline", "flow"])
def test_a_host_is_added_and_nothing_else_in_the_file_changes(text: str, tmp_path: Path) -> None:
    change = plan_add(file_of(tmp_path, text), {"host": "dgx-3", "gpus": 2})
    assert [host.name for host in change.spec.hosts] == ["dgx-1", "dgx-2", "dgx-3"]
    assert change.spec.hosts[2].gpus == 2
    removed = change.text.replace("  - {gpus: 2, host: dgx-3}\n", "").replace(", {gpus: 2, host: dgx-3}", "")
    assert removed.rstrip() == text.rstrip()
    change.write()
    assert load_cluster_file(tmp_path / "cluster.yaml").spec == change.spec


@pytest.mark.parametrize("text", [BLOCK, FLOW], ids=["block", "flow"])
def test_a_host_that_is_added_and_removed_leaves_the_file_as_it_was(text: str, tmp_path: Path) -> None:
    plan_add(file_of(tmp_path, text), {"host": "dgx-3"}).write()
    change = plan_remove(load_cluster_file(tmp_path / "cluster.yaml"), "dgx-3")
    assert change.text == text


def test_the_last_but_the_head_may_go_and_what_is_left_listens_as_before(tmp_path: Path) -> None:
    change = plan_remove(file_of(tmp_path, BLOCK), "dgx-2")
    assert [host.name for host in change.spec.hosts] == ["dgx-1"]
    assert not change.spec.loopback
    assert "dgx-2" not in change.text
    assert "# Our cluster." in change.text


def test_a_host_that_is_there_already_changes_nothing(tmp_path: Path) -> None:
    file = file_of(tmp_path, BLOCK)
    change = plan_add(file, {"host": "dgx-2.example.org"})
    assert (change.spec, change.path) == (file.spec, None)


def test_the_head_cannot_be_removed(tmp_path: Path) -> None:
    with pytest.raises(
        ConflictError, match="dgx-1 is the head of cluster lab: records, queue and logs are there"
    ) as no:
        plan_remove(file_of(tmp_path, BLOCK), "dgx-1")
    assert no.value.hint == "to end the whole cluster: raylaunch down"


def test_what_is_no_host_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="is not a host"):
        plan_add(file_of(tmp_path, BLOCK), {"host": "dgx 3!"})
    assert (tmp_path / "cluster.yaml").read_text() == BLOCK


def test_a_name_that_another_host_has_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"^cluster.yaml:\d+: .*dgx-1"):
        plan_add(file_of(tmp_path, BLOCK), {"host": "10.0.0.9", "name": "dgx-1"})


def test_the_embedded_cluster_has_no_hosts_to_add(tmp_path: Path) -> None:
    with pytest.raises(ConflictError, match="cluster local is on this machine") as no:
        plan_add(file_of(tmp_path, "kind: local\n"), {"host": "dgx-3"})
    assert "raylaunch init" in no.value.hint


def test_a_file_of_rays_own_is_left_to_its_owner(tmp_path: Path) -> None:
    text = (
        "cluster_name: lab\nprovider: {type: local, head_ip: 10.0.0.1, worker_ips: [10.0.0.2]}\nauth: {ssh_user: ml}\n"
    )
    with pytest.raises(ConflictError, match="Ray's own cluster file") as no:
        plan_add(file_of(tmp_path, text), {"host": "dgx-3"})
    assert "worker_ips" in no.value.hint


# -- the queue -------------------------------------------------------------------------------------------------------


def room(name: str, *, gpus: float = 8, drained: str = "") -> NodeCapacity:
    total = {"GPU": gpus, "CPU": 64.0, "memory": 2.0**40}
    return NodeCapacity(node_id=f"id-{name}", hostname=name, total=total, ray_free=dict(total), drained=drained)


def test_a_drained_host_gets_no_job_and_another_does() -> None:
    rooms = [room("dgx-1", drained="is drained by anna"), room("dgx-2")]
    assert decide([ResourceRequest("a", "a", 0, {"GPU": 8.0})], rooms, []) == [Admit("a", "id-dgx-2", "dgx-2")]


def test_a_job_that_only_a_drained_host_could_run_waits_and_says_who_drains_it() -> None:
    rooms = [room("dgx-1", drained="is drained by anna until 2026-11-27 18:00 UTC"), room("dgx-2", gpus=4)]
    (wait,) = decide([ResourceRequest("a", "a", 0, {"GPU": 8.0})], rooms, [])
    assert wait == WaitDecision(
        "a", Reason.WAITING_FOR_DRAIN, "could run, but dgx-1 is drained by anna until 2026-11-27 18:00 UTC"
    )


def test_a_job_that_waits_for_a_drained_host_holds_nothing_back_there_or_elsewhere() -> None:
    rooms = [room("dgx-1", drained="is drained by anna"), room("dgx-2", gpus=4)]
    _, second = decide(
        [ResourceRequest("a", "a", 0, {"GPU": 8.0}), ResourceRequest("b", "b", 1, {"GPU": 4.0})], rooms, []
    )
    assert second == Admit("b", "id-dgx-2", "dgx-2")


# -- the book --------------------------------------------------------------------------------------------------------


def test_a_drain_outlives_the_controller_and_ends_at_its_time(tmp_path: Path) -> None:
    now = [1000.0]
    DrainStore(tmp_path, clock=lambda: now[0]).put(Drain(host="dgx-1", person="anna", since=1000, until=2000))
    book = DrainStore(tmp_path, clock=lambda: now[0])
    assert book.now()["dgx-1"].person == "anna"
    now[0] = 2000.0
    assert not book.now()


def test_a_book_that_cannot_be_read_drains_nothing_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "drains.json").write_text("{")
    book = DrainStore(tmp_path)
    assert not book.now()
    assert book.problem.startswith(f"{tmp_path}/drains.json cannot be read")
    book.put(Drain(host="dgx-1", person="anna", since=0))
    assert (book.problem, list(DrainStore(tmp_path).now())) == ("", ["dgx-1"])


# -- over HTTP -------------------------------------------------------------------------------------------------------


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with serving(tmp_path) as running:
        node = NodeView(id="1", hostname="dgx-1", address="10.0.0.1", alive=True, steward=True, gpus=8, gpus_free=6)
        running.do(lambda: setattr(running.observed, "nodes", (node,)))
        yield running


def test_an_operator_drains_and_a_trainer_may_not(api: Api) -> None:
    with api.client("tom") as tom, api.client("olga") as olga:
        refused = error(tom.post("/v1/hosts/dgx-1/drain", json={}))
        assert refused[:3] == (403, "access", "tom is a trainer and may not drain hosts")
        found = olga.post("/v1/hosts/dgx-1/drain", json={"until": 4e9}).json()
        assert (found["drain"]["person"], found["drain"]["until"]) == ("olga", 4e9)
        assert tom.get("/v1/hosts/dgx-1").json()["others"] == "Ray counts 2 GPUs in use there"
        assert olga.delete("/v1/hosts/dgx-1/drain").json()["drain"] is None
        assert error(olga.delete("/v1/hosts/dgx-1/drain"))[:3] == (404, "not_found", "dgx-1 is not drained")
    audit = (api.store / "audit.jsonl").read_text()
    assert '"dgx-1"' in audit


def test_what_ray_counts_for_a_moment_after_a_jobs_end_is_not_reported(tmp_path: Path) -> None:
    node = NodeView(id="1", hostname="dgx-1", address="10.0.0.1", alive=True, steward=True, cpus=4, cpus_free=3)
    observed = ObservedState(nodes=(node,), bridge_up=True)
    records = Records(tmp_path)
    service = HostService(records=records, drains=DrainStore(tmp_path), observed=observed)

    async def scenario() -> str:
        asked = asyncio.create_task(service.drain("dgx-1", until=None, stop=False, person="olga"))
        await asyncio.sleep(0)
        observed.set_nodes((node.model_copy(update={"cpus_free": 4}),))
        observed.notify()
        return (await asked).others

    try:
        assert not asyncio.run(scenario())
    finally:
        records.close()


def test_a_host_that_there_is_not_is_refused_with_those_there_are(api: Api) -> None:
    with api.client("olga") as olga:
        problem = error(olga.post("/v1/hosts/dgx-9/drain", json={}))
        assert problem[:3] == (404, "not_found", "the cluster has no host 'dgx-9'; it has dgx-1")


def test_a_time_that_is_over_is_refused(api: Api) -> None:
    with api.client("olga") as olga:
        problem = error(olga.post("/v1/hosts/dgx-1/drain", json={"until": 1.0}))
        assert problem[:3] == (409, "conflict", "cannot drain dgx-1: the drain's end is in the past")


def test_a_quiet_cluster_says_until_when_and_is_loud_again(api: Api) -> None:
    with api.client("tom") as tom, api.client("olga") as olga:
        assert error(tom.post("/v1/quiet", json={}))[0] == 403
        assert olga.post("/v1/quiet", json={"limit_s": 600}).json()["until"] is not None
        assert olga.delete("/v1/quiet").json() == {"until": None, "jobs": []}


# -- times -----------------------------------------------------------------------------------------------------------

NOON = datetime(2026, 11, 27, 12, 0, tzinfo=timezone(timedelta(hours=1)))


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("18:00", NOON.replace(hour=18)),
        ("9:30", NOON.replace(day=28, hour=9, minute=30)),
        ("90m", NOON + timedelta(minutes=90)),
        ("2d", NOON + timedelta(days=2)),
        ("2026-11-28T06:00", NOON.replace(day=28, hour=6)),
        ("2026-11-27 18:00", NOON.replace(hour=18)),
    ],
)
def test_times_are_read_as_people_write_them(text: str, at: datetime) -> None:
    assert point_in_time(text, now=NOON) == at


@pytest.mark.parametrize(
    ("text", "expected"), [("noonish", "is not a time; write 18:00"), ("2026-11-27T11:00", "past")]
)
def test_what_is_no_time_to_come_is_refused(text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        point_in_time(text, now=NOON)


def test_nothing_is_drained_that_was_not(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="dgx-1 is not drained"):
        DrainStore(tmp_path).remove("dgx-1")
