"""Other clusters on the same machine, and whose GPUs are whose."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from support.standing import STAYS, Start

from raylaunch.cluster.local.gpus import OtherCluster, check_gpus, choose_gpus, other_clusters, parse_gpus
from raylaunch.cluster.record import new_record
from raylaunch.errors import ConflictError
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.paths import ClusterPaths

ROWS = "0, GPU-aaaa1111, NVIDIA H100, 81559\n1, GPU-bbbb2222, NVIDIA H100, 81559"


def test_a_cluster_that_uses_the_same_gpus_is_found_with_its_owner(
    paths: ClusterPaths, start: Start, tmp_path: Path
) -> None:
    theirs = new_record(ClusterSpec(name="lab"), paths).with_(gpu_uuids=("GPU-bbbb2222",))
    (tmp_path / "cluster.json").write_text(theirs.model_dump_json())
    pid = start(*STAYS, "-m", "raylaunch.controller", "--config", str(tmp_path / "controller.json")).pid
    others = [one for one in other_clusters(paths.controller_config) if one.folder == str(tmp_path)]
    choice = choose_gpus(ClusterSpec(), parse_gpus(ROWS), {})
    with pytest.raises(ConflictError) as caught:
        check_gpus(ClusterSpec(), choice, others)
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    assert caught.value.message == (
        f"cluster lab of user {user} (controller pid {pid}, {tmp_path}) uses GPU 1 of this machine"
    )


def test_other_gpus_of_the_same_machine_do_not_conflict() -> None:
    other = OtherCluster(name="lab", user="anna", folder="/f", pid=1, gpu_uuids=("GPU-bbbb2222",))
    spec = ClusterSpec(gpus=("0",))
    check_gpus(spec, choose_gpus(spec, parse_gpus(ROWS), {}), [other])


def test_logical_gpus_never_conflict() -> None:
    other = OtherCluster(name="lab", user="anna", folder="/f", pid=1, gpu_uuids=None)
    spec = ClusterSpec(gpus=2)
    check_gpus(spec, choose_gpus(spec, parse_gpus(ROWS), {}), [other])


def test_a_cluster_whose_gpus_we_may_not_see_conflicts_unless_gpus_are_listed() -> None:
    other = OtherCluster(name="lab", user="anna", folder="/f", pid=1, gpu_uuids=None)
    auto, listed = ClusterSpec(), ClusterSpec(gpus=("0",))
    check_gpus(listed, choose_gpus(listed, parse_gpus(ROWS), {}), [other])
    with pytest.raises(ConflictError, match="may use GPUs 0, 1 of this machine"):
        check_gpus(auto, choose_gpus(auto, parse_gpus(ROWS), {}), [other])


def test_our_own_controller_is_no_neighbour(paths: ClusterPaths, start: Start) -> None:
    start(*STAYS, "-m", "raylaunch.controller", "--config", str(paths.controller_config))
    assert str(paths.root) not in [one.folder for one in other_clusters(paths.controller_config)]
