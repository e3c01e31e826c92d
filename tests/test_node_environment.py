"""What a node's Ray is started with reaches what runs in it: interfaces for NCCL and Gloo, memory, the user's own."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from support.running import Attempt
from support.waiting import wait_until

from raylaunch import contract
from raylaunch.cluster.local.gpus import GpuChoice
from raylaunch.cluster.local.ray_head import RayStart, memory_threshold
from raylaunch.cluster.ports import RAY_PORTS, free_ports
from raylaunch.cluster.record import NodePlace
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.paths import cluster_paths

INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
GIB = 1024**3
TELLS = "import os; print(*(os.environ.get(name, '-') for name in ('NCCL_SOCKET_IFNAME', 'MASTER_ADDR')))"


def environment(place: NodePlace) -> dict[str, str]:
    ports = {name: 20_000 + n for n, name in enumerate((*RAY_PORTS, "worker_min", "worker_max"))}
    start = RayStart(cluster_paths("lab"), ClusterSpec(name="lab"), "id", ports, GpuChoice(0), place)
    return start.environment({"PATH": "/usr/bin"})


def test_the_interface_that_bears_the_address_is_that_of_nccl_and_gloo() -> None:
    env = environment(NodePlace(host="dgx-1", address="10.0.0.1", interface="ens1"))
    assert [env[name] for name in INTERFACES] == ["ens1", "ens1"]


def test_what_the_file_says_of_a_host_wins() -> None:
    own = {"NCCL_SOCKET_IFNAME": "ib0", "RAY_memory_usage_threshold": "0.9"}
    env = environment(NodePlace(host="dgx-1", address="10.0.0.1", interface="ens1", env=own))
    assert [env[name] for name in INTERFACES] == ["ib0", "ens1"]
    assert env["RAY_memory_usage_threshold"] == "0.9"


def test_a_cluster_on_loopback_names_no_interface() -> None:
    assert not set(INTERFACES) & environment(NodePlace()).keys()


@pytest.mark.parametrize(
    ("total", "threshold"), [(16 * GIB, "0.9500"), (128 * GIB, "0.9500"), (2048 * GIB, "0.9922"), (0, "0.9500")]
)
def test_of_a_large_memory_no_more_than_sixteen_gib_are_kept_free(total: int, threshold: str) -> None:
    assert memory_threshold(total) == threshold


def test_ports_come_from_one_block_where_all_of_it_is_free() -> None:
    blocks = [sorted(free_ports(9)) for _ in range(20)]
    assert sum(block[-1] - block[0] == 8 for block in blocks) > 10
    assert len({block[0] for block in blocks}) > 10


@pytest.mark.parametrize(("own", "seen"), [({}, "ens1"), ({"NCCL_SOCKET_IFNAME": "ib0"}, "ib0")], ids=["node", "job"])
def test_a_job_has_the_nodes_interface_unless_it_says_another(tmp_path: Path, own: dict[str, str], seen: str) -> None:
    attempt = Attempt(tmp_path, [sys.executable, "-c", TELLS], env=own)
    attempt.start(NCCL_SOCKET_IFNAME="ens1")
    wait_until((attempt.folder / contract.EXIT).exists, 60, "it ends")
    assert attempt.log.read_text().split()[0] == seen


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs PyTorch, which is not installed here")
def test_ranks_of_torchrun_have_the_nodes_interface_and_meet_on_loopback(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, "python tells.py", launcher="torchrun", processes=2)
    attempt.file("tells.py", TELLS)
    attempt.start(NCCL_SOCKET_IFNAME="ens1", GLOO_SOCKET_IFNAME="ens1")
    wait_until((attempt.folder / contract.EXIT).exists, 120, "it ends")
    logs = sorted((attempt.folder / contract.LOGS).glob("rank-*.log"))
    assert [log.read_text().split()[-2:] for log in logs] == [["ens1", "127.0.0.1"]] * 2
