"""Whose turn it is, and why not yours."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from support.queues import decide

from raylaunch.controller.scheduler.queue import (
    Admit,
    Allocation,
    NodeCapacity,
    free_amounts,
    max_groups,
    plan_queue,
    unsatisfiable_reason,
)
from raylaunch.controller.store.backlog import Backlog, ResourceRequest, WaitDecision, required_amounts
from raylaunch.models.job_spec import JobSpec, Resources, Where
from raylaunch.models.states import Reason

GIB = 1024**3


def room(name: str = "dgx", *, gpus: float = 8, cpus: float = 64, outside: int = 0, gpu_type: str = "") -> NodeCapacity:
    total = {"GPU": gpus, "CPU": cpus, "memory": 512.0 * GIB}
    return NodeCapacity(
        node_id=f"id-{name}",
        hostname=name,
        total=total,
        ray_free=dict(total),
        outside=outside,
        outside_users=("bob's python",) if outside else (),
        arch="x86_64",
        gpu_type=gpu_type,
    )


def ask(
    job: str, *, gpus: float = 0, cpus: float = 0, since: float = 0, priority: int = 0, **where: object
) -> ResourceRequest:
    amounts = {name: amount for name, amount in (("GPU", gpus), ("CPU", cpus)) if amount}
    return ResourceRequest(job, job, since, amounts, Where.model_validate(where), priority)


def holding(job: str, gpus: float, *, placed: bool = True) -> Allocation:
    return Allocation(job, job, "id-dgx", {"GPU": gpus}, placed=placed)


def used(of: NodeCapacity, gpus: float) -> NodeCapacity:
    return NodeCapacity(of.node_id, of.hostname, of.total, {**of.ray_free, "GPU": of.total["GPU"] - gpus})


def test_a_job_that_fits_starts_at_once() -> None:
    assert decide([ask("a", gpus=8)], [room()], []) == [Admit("a", "id-dgx", "dgx")]


def test_the_older_job_goes_first() -> None:
    first, second = decide([ask("young", gpus=8, since=2), ask("old", gpus=8, since=1)], [room()], [])
    assert first == Admit("old", "id-dgx", "dgx")
    assert isinstance(second, WaitDecision)


def test_a_higher_priority_goes_before_age() -> None:
    first, _ = decide([ask("old", gpus=8, since=1), ask("urgent", gpus=8, since=2, priority=5)], [room()], [])
    assert first.job == "urgent"


def test_why_not_yours_is_arithmetic() -> None:
    busy = used(room(), 7)
    (wait,) = decide([ask("a", gpus=4)], [busy], [holding("x", 5)])
    assert wait == WaitDecision(
        "a",
        Reason.WAITING_FOR_GPUS,
        "needs 4 GPUs on one node; dgx has 1 free of 8: 5 held by x (x), 2 held in Ray by others",
    )


def test_gpus_that_processes_outside_raylaunch_use_are_not_given_away() -> None:
    (wait,) = decide([ask("a", gpus=8)], [room(outside=1)], [])
    assert wait == WaitDecision(
        "a",
        Reason.GPU_BUSY_OUTSIDE,
        "needs 8 GPUs on one node; dgx has 7 free of 8: 1 used by processes outside raylaunch (bob's python)",
    )


def test_a_small_job_does_not_starve_a_large_one() -> None:
    asks = [ask("large", gpus=8, since=1), ask("small", gpus=1, since=2)]
    large, small = decide(asks, [used(room(), 4)], [holding("x", 4)])
    assert isinstance(large, WaitDecision)
    assert small == WaitDecision(
        "small",
        Reason.WAITING_FOR_TURN,
        "would fit on dgx, but large (large) is ahead of it and waits for 8 GPUs there",
    )


def test_a_job_that_takes_nothing_of_what_the_first_waits_for_goes_on() -> None:
    asks = [ask("large", gpus=8, since=1), ask("cpu", cpus=2, since=2)]
    _, cpu = decide(asks, [used(room(), 4)], [holding("x", 4)])
    assert cpu == Admit("cpu", "id-dgx", "dgx")


def test_a_job_without_gpus_goes_where_no_gpus_are() -> None:
    decisions = decide([ask("cpu", cpus=1)], [room(), room("plain", gpus=0)], [])
    assert decisions == [Admit("cpu", "id-plain", "plain")]


def test_two_jobs_do_not_get_the_same_gpus_in_one_plan() -> None:
    decisions = decide([ask("a", gpus=5), ask("b", gpus=5)], [room()], [])
    assert [type(decision) for decision in decisions] == [Admit, WaitDecision]


def test_an_attempt_that_ray_does_not_count_yet_still_holds_its_gpus() -> None:
    assert free_amounts(room(), [holding("x", 6, placed=False)])["GPU"] == 2


def test_more_than_the_largest_node_has_is_said_with_what_there_is() -> None:
    message = unsatisfiable_reason(ask("a", gpus=16), [room(), room("small", gpus=2)])
    assert message == "needs 16 GPUs on one node; the largest has 8 (dgx)"


def test_a_resource_that_no_node_has_is_said() -> None:
    asked = ResourceRequest("a", "a", 0, {"scratch": 1})
    assert unsatisfiable_reason(asked, [room()]) == "needs 1 scratch on one node, but no node has any"


def test_a_host_that_does_not_exist_is_said() -> None:
    message = unsatisfiable_reason(ask("a", hosts=("spark",)), [room()])
    assert message == "dgx: is not one of the requested hosts (spark)"


def test_a_gpu_type_is_matched_by_a_part_of_its_name() -> None:
    rooms = [room("old", gpu_type="NVIDIA A100"), room("new", gpu_type="NVIDIA H100 80GB")]
    assert decide([ask("a", gpus=1, gpu_type="h100")], rooms, []) == [Admit("a", "id-new", "new")]


def test_a_job_with_gpus_holds_no_cpu_unless_it_asks_for_some() -> None:
    assert required_amounts(JobSpec(entrypoint="x", resources=Resources(gpus=2))) == {"GPU": 2}
    assert required_amounts(JobSpec(entrypoint="x")) == {"CPU": 1}


@given(
    wanted=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(-2, 2)), max_size=12),
    held=st.lists(st.integers(1, 3), max_size=3),
)
def test_no_plan_ever_gives_more_than_there_is(wanted: list[tuple[int, int, int]], held: list[int]) -> None:
    holdings = [holding(f"h{index}", gpus) for index, gpus in enumerate(held) if sum(held) <= 8]
    dgx = used(room(cpus=6), sum(one.amounts["GPU"] for one in holdings))
    asks = [ask(f"j{index}", gpus=g, cpus=c, since=index, priority=p) for index, (g, c, p) in enumerate(wanted)]
    decisions = decide(asks, [dgx], holdings)
    admitted = {decision.job for decision in decisions if isinstance(decision, Admit)}
    given_gpus = sum(one.needs.get("GPU", 0) for one in asks if one.job in admitted)
    assert len(decisions) == len(asks)
    assert given_gpus + sum(one.amounts["GPU"] for one in holdings) <= 8
    assert sum(one.needs.get("CPU", 0) for one in asks if one.job in admitted) <= 6


# -- long queues -----------------------------------------------------------------------------------------------------


def test_jobs_that_ask_for_the_same_wait_for_the_same_and_only_the_first_of_them_is_planned() -> None:
    waiting = [ask(f"j{index:05}", gpus=8, since=index) for index in range(1000)]
    plan = plan_queue(waiting, [used(room(), 8)], [holding("x", 8)], groups=1)
    assert len(plan.blocks) == 1
    assert len({id(plan.block(one)) for one in waiting}) == 1


def test_behind_a_group_that_waits_the_next_of_another_group_starts() -> None:
    waiting = [ask("l1", gpus=8, since=1), ask("c1", cpus=1, since=2), ask("l2", gpus=8, since=3), ask("c2", cpus=1)]
    first, _, third, _ = decide(waiting, [used(room(), 8)], [holding("x", 8)])
    assert (first.job, third.job) == ("c2", "c1")
    assert isinstance(first, Admit)
    assert isinstance(third, Admit)


def test_what_many_different_jobs_wait_for_takes_no_more_than_so_many_looks() -> None:
    waiting = [
        ResourceRequest(f"j{index:05}", "j", index, {"CPU": 100.0 + index}) for index in range(max_groups(1) + 5)
    ]
    decisions = decide(waiting, [room()], [])
    reasons = [decision.reason for decision in decisions if isinstance(decision, WaitDecision)]
    assert reasons.count(Reason.WAITING_FOR_TURN) == 5
    assert len(reasons) == len(waiting)


def test_a_job_that_came_after_the_plan_has_no_decision_yet() -> None:
    plan = plan_queue([ask("a", gpus=9)], [room()], [], groups=1)
    assert plan.block(ask("b", gpus=1)) is None


def test_a_requested_host_that_is_down_is_named_and_not_the_others() -> None:
    asked = ask("a", gpus=1, hosts=("gpu-2",))
    plan = plan_queue([asked], [room()], [], groups=1, down={"gpu-2": 46.0 * 60, "gpu-3": 0.0})
    expected = "gpu-2, the only requested host, has been down since 1970-01-01 00:46 UTC"
    assert plan.of(asked) == WaitDecision("a", Reason.WAITING_FOR_NODE, expected)


def test_a_requested_host_that_is_up_is_the_one_that_is_spoken_of() -> None:
    message = unsatisfiable_reason(ask("a", gpus=16, hosts=("dgx", "gpu-2")), [room()], {"gpu-2": 0.0})
    assert message == "needs 16 GPUs on one node; the largest has 8 (dgx)"


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 1), st.booleans()), max_size=30))
def test_the_backlog_holds_what_was_put_and_not_dropped_in_the_order_of_the_queue(
    steps: list[tuple[int, int, bool]],
) -> None:
    backlog, left = Backlog(), dict[str, ResourceRequest]()
    for index, (gpus, priority, drops) in enumerate(steps):
        job = f"j{index // 2}"
        left[job] = ask(job, gpus=gpus, since=index // 3, priority=priority)
        backlog.put(left[job])
        if drops:
            backlog.drop(job)
            del left[job]
    ordered = sorted(left.values(), key=lambda one: one.order)
    assert list(backlog) == ordered
    assert (len(backlog), backlog.groups) == (len(ordered), len({one.group for one in ordered}))
