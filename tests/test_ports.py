"""Free ports on loopback."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator

import pytest

from raylaunch.cluster.ports import (
    RAY_PORTS,
    WORKER_PORTS,
    controller_port,
    free_ports,
    holder,
    is_free,
    ray_ports,
    worker_range,
)
from raylaunch.errors import ClusterStartError, ConflictError


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_port_on_which_somebody_listens_is_not_free(taken: int) -> None:
    assert not is_free(taken)


def test_a_port_that_somebody_has_on_all_interfaces_is_not_free() -> None:
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))  # noqa: S104 -- for the length of one test
        listener.listen()
        assert not is_free(listener.getsockname()[1])


def test_free_ports_are_distinct_and_avoid_what_is_promised() -> None:
    promised = set(range(20000, 25900))
    ports = free_ports(20, avoid=promised)
    assert len(set(ports)) == 20
    assert not promised & set(ports)


def test_no_single_port_lies_in_a_block_of_worker_ports() -> None:
    assert not set(free_ports(50)) & set(worker_range(taken=[]))


def test_a_worker_block_keeps_clear_of_other_rays_and_of_promised_ports() -> None:
    block = worker_range(avoid=(27000,), taken=[range(28000, 40000)], free=lambda _port: True)
    assert block.stop <= 28000
    assert 27000 not in block


def test_missing_worker_ports_are_an_error() -> None:
    with pytest.raises(ClusterStartError, match=f"no {WORKER_PORTS} consecutive ports are free"):
        worker_range(taken=[range(10000, 60000)])


def test_the_holder_of_a_port_is_named_by_pid(taken: int) -> None:
    assert re.fullmatch(rf"pid {os.getpid()} \(.+, user .+\)", holder(taken))


def test_ray_keeps_the_ports_that_it_had() -> None:
    had = ray_ports({}, on_taken=print, avoid=())
    assert ray_ports(had, on_taken=print, avoid=()) == had
    assert set(had) == {*RAY_PORTS, "worker_min", "worker_max"}


def test_a_recorded_port_that_was_taken_meanwhile_is_replaced_and_reported(taken: int) -> None:
    had = ray_ports({}, on_taken=print, avoid=()) | {"dashboard": taken}
    messages: list[str] = []
    now = ray_ports(had, on_taken=messages.append, avoid=())
    assert now["dashboard"] != taken
    assert {**now, "dashboard": taken} == had
    assert messages == [f"port {taken} (dashboard) is taken by {holder(taken)}; using another one"]


def test_a_fixed_port_that_is_taken_is_an_error_with_the_owner(taken: int) -> None:
    with pytest.raises(ConflictError) as caught:
        controller_port({}, fixed=taken, on_taken=print, avoid=())
    message = (
        rf"port {taken} is taken by pid {os.getpid()} \(.+, user .+\), but cluster.yaml sets it for the controller"
    )
    assert re.fullmatch(message, caught.value.message)
    assert caught.value.hint == f"end that process, or change or remove port: {taken} in cluster.yaml"
