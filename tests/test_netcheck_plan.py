"""Which hosts check the network between them, and what is reported. Pure."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest

from raylaunch.cluster.hosts.allreduce import AllReducePlan, NetworkMember, explain, plan_allreduce, success
from raylaunch.cluster.hosts.host_program import HostState
from raylaunch.cluster.hosts.verify import still_held
from raylaunch.cluster.record import NodePlace
from raylaunch.models.cluster import ControllerStatus, NodeView
from raylaunch.runner import netcheck

MEMBERS = tuple(NetworkMember(f"dgx-{n}", f"10.0.0.{n}", 24_000, "ens1") for n in (1, 2, 3))
DONE: dict[str, Any] = {"kind": "done", "over": "TCP", "seconds": 0.1, "bytes_per_s": 850e6}


def host(n: int, *, gpus: int = 8) -> HostState:
    place = NodePlace(host=f"dgx-{n}", address=f"10.0.0.{n}", interface="ens1")
    return HostState(name="lab", place=place, gpus=gpus, ports={"gcs": 20_000 + n})


def node(n: int, *, free: float = 8) -> NodeView:
    return NodeView(id=str(n), hostname=f"dgx-{n}", address=f"10.0.0.{n}", alive=True, gpus=8, gpus_free=free)


def hosts(*states: HostState) -> dict[str, HostState]:
    return {state.place.host: state for state in states}


def unmet(absent: tuple[str, ...] = (), **unreached: str) -> dict[str, Any]:
    whys = {name.replace("_", "-"): why for name, why in unreached.items()}
    return {"kind": "unmet", "unreached": whys, "absent": list(absent)}


def test_all_hosts_with_gpus_take_part_where_one_of_them_is_new() -> None:
    plan = plan_allreduce(hosts(host(1, gpus=0), host(2), host(3)), [node(1), node(2), node(3)], {"dgx-3"})
    assert plan is not None
    assert [(one.host, one.address, one.interface) for one in plan.members] == [
        ("dgx-2", "10.0.0.2", "ens1"),
        ("dgx-3", "10.0.0.3", "ens1"),
    ]
    assert plan.left_out == ()
    assert len({one.port for one in plan.members}) == 1


@pytest.mark.parametrize(
    ("states", "fresh"),
    [
        (hosts(host(1), host(2)), set()),
        (hosts(host(1), host(2, gpus=0)), {"dgx-1"}),
        (hosts(host(1, gpus=0), host(2), host(3)), {"dgx-1"}),
    ],
    ids=["nothing new", "one with GPUs", "only the head is new, which has none"],
)
def test_nothing_is_checked_without_a_new_host_with_gpus_and_a_peer(
    states: dict[str, HostState], fresh: set[str]
) -> None:
    assert plan_allreduce(states, [node(1), node(2), node(3)], fresh) is None


def test_a_host_whose_gpus_are_in_use_is_left_out_and_not_waited_for() -> None:
    plan = plan_allreduce(hosts(host(1), host(2), host(3)), [node(1), node(2, free=0), node(3)], {"dgx-1"})
    assert plan is not None
    assert [one.host for one in plan.members] == ["dgx-1", "dgx-3"]
    assert plan.left_out == ("dgx-2",)


def test_the_command_of_a_member_is_understood_by_its_program() -> None:
    words = shlex.split(AllReducePlan(MEMBERS, run="r").entrypoint(1))
    assert words[-2] == netcheck.OPTION
    plan = json.loads(words[-1])
    assert plan["members"][plan["rank"]] == ["dgx-2", "10.0.0.2", 24_000]
    netcheck.NetworkCheck(plan)


def test_success_reports_the_backend_the_hosts_and_the_slowest_rate() -> None:
    output = success(MEMBERS, [DONE, {**DONE, "bytes_per_s": 120e6}, DONE])
    assert output == "64 MB over TCP between dgx-1, dgx-2 and dgx-3 on ens1 (10.0.0.1, 10.0.0.2, 10.0.0.3): 120 MB/s"
    fast = success(MEMBERS[:2], [{**DONE, "over": "nccl", "bytes_per_s": 3.14e9}] * 2)
    assert fast == "64 MB over nccl between dgx-1 and dgx-2 on ens1 (10.0.0.1, 10.0.0.2): 3.1 GB/s"


def test_a_firewall_between_two_workers_is_reported_on_both_with_the_command_that_opens_it() -> None:
    found = explain(
        MEMBERS,
        [
            unmet(absent=("dgx-2", "dgx-3")),
            unmet(absent=("dgx-3",), dgx_3="no answer within 3 s"),
            unmet(absent=("dgx-2",), dgx_2="no answer within 3 s"),
        ],
    )
    assert set(found) == {"dgx-2", "dgx-3"}
    assert found["dgx-3"].message == "dgx-3: dgx-2 (10.0.0.2) cannot reach dgx-3 at 10.0.0.3: no answer within 3 s"
    assert "sudo ufw allow from 10.0.0.2" in found["dgx-3"].hint


def test_a_host_that_nobody_reaches_is_one_problem() -> None:
    why = "no route to host"
    found = explain(MEMBERS, [unmet(dgx_3=why), unmet(dgx_3=why), unmet()])
    assert list(found) == ["dgx-3"]
    assert "dgx-1 (10.0.0.1) and dgx-2 (10.0.0.2) cannot reach dgx-3 at 10.0.0.3: no route" in found["dgx-3"].message


def test_of_several_broken_connections_the_first_is_reported() -> None:
    ends: list[dict[str, Any]] = [
        {"kind": "hop", "hop": ["dgx-3", "dgx-1"], "why": "nothing passed for 15 s", "step": 1},
        {"kind": "unmet", "unreached": {}, "absent": []},
        {"kind": "hop", "hop": ["dgx-2", "dgx-3"], "why": "nothing passed for 15 s", "step": 0},
    ]
    found = explain(MEMBERS, ends)
    assert list(found) == ["dgx-3"]
    assert "from dgx-2 to dgx-3 failed after it was made: nothing passed" in found["dgx-3"].message
    assert "ping -M do -s 8972 10.0.0.3" in found["dgx-3"].hint


def test_other_failures_are_reported_by_host_with_their_fix() -> None:
    taken = explain(MEMBERS, [DONE, {"kind": "listen", "why": "address already in use"}, unmet(dgx_2="refused")])
    assert taken["dgx-2"].message == "dgx-2: cannot listen on 10.0.0.2 port 24000: address already in use"
    torch = explain(MEMBERS, [{"kind": "torch", "over": "nccl", "why": "DistBackendError: x"}, DONE, DONE])
    assert "all hosts reach each other over TCP" in torch["dgx-1"].message
    assert "NCCL_SOCKET_IFNAME" in torch["dgx-1"].hint
    number = explain(MEMBERS, [DONE, {"kind": "number", "over": "gloo", "why": "5 of 16 numbers are wrong"}, DONE])
    assert "wrong result: 5 of 16" in number["dgx-2"].message
    job = explain(MEMBERS, [{"kind": "job", "why": "the environment venv:/x does not exist"}, DONE, DONE])
    assert "the environment venv:/x does not exist" in job["dgx-1"].message


def test_only_gpus_that_a_test_job_held_are_waited_for() -> None:
    before = {"dgx-1": 8.0, "dgx-2": 3.0}
    seen = says(node(1, free=7), node(2, free=3))
    assert still_held(before, seen) == ("dgx-1",)
    assert not still_held(before, says(node(1), node(2, free=3)))
    assert not still_held(before, "it does not answer")


def says(*nodes: NodeView) -> ControllerStatus:
    return ControllerStatus(
        cluster="c", version="", api=1, pid=1, person="p", role="admin", started_at=0, ray="up", nodes=nodes
    )
