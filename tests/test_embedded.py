"""The embedded cluster, as far as it can be seen without starting Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from functools import partial
from pathlib import Path

import anyio
import pytest
from support import older
from support.signals import send
from support.standing import Start
from support.waiting import wait_until

from raylaunch.cluster.client_record import ClientRecord, save_client
from raylaunch.cluster.local import backend
from raylaunch.cluster.local.gpus import choose_gpus, parse_gpus
from raylaunch.cluster.local.inspect import check_versions, inspect_cluster
from raylaunch.cluster.local.ray_head import RayStart, clean_environment, whole_cpus
from raylaunch.cluster.ports import RAY_PORTS
from raylaunch.cluster.processes import VAR_CLUSTER_ID, identify, is_alive, of_ray
from raylaunch.cluster.record import ClusterRecord, ClusterVersions, load_record, new_record, save_record
from raylaunch.cluster.types import Step
from raylaunch.config.load import load_cluster_file
from raylaunch.errors import ClusterDownError, SpecError, VersionError
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.operations.connect import backend_for
from raylaunch.paths import ClusterPaths, secret_file, write_private
from raylaunch.runner.command import without_ray

SPEC = ClusterSpec(gpus=2)
ROWS = "0, GPU-aaaa1111, NVIDIA H100, 81559\n1, GPU-bbbb2222, NVIDIA H100, 81559"


def ignore(_step: Step) -> None:
    """Take a step and say nothing."""


# What is seen, and the verbs of a cluster that does not run


def test_the_backend_of_a_local_cluster_is_the_embedded_one() -> None:
    assert backend_for(SPEC) is backend


def test_a_cluster_that_was_never_started_is_stopped(home: Path) -> None:
    status = anyio.run(backend.status, ClusterSpec())
    assert status.state == "stopped"
    assert list(home.iterdir()) == []


def test_reaching_a_cluster_that_does_not_run_reports_how_to_start_it(home: Path) -> None:
    assert home.is_dir()
    with pytest.raises(ClusterDownError) as caught:
        anyio.run(backend.reach, ClusterSpec())
    assert str(caught.value) == "cluster local is not running on this machine\n  → start it: raylaunch up"


def test_down_on_a_cluster_that_does_not_run_succeeds_and_reports_that(paths: ClusterPaths) -> None:
    report = anyio.run(backend.down, ClusterSpec())
    assert not report.was_running
    assert str(report) == f"cluster local was not running; jobs, logs and outputs stay in {paths.default_store}"


def test_the_record_of_a_cluster_is_readable_by_0_1_0(paths: ClusterPaths, tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"tls": True})  # as a host of several is told
    save_record(paths, new_record(spec, paths).with_(tls=True, versions=ClusterVersions(raylaunch="99.0.0")))
    read = "from raylaunch.cluster import home, record; print(record.load_record(home.cluster_paths('local')).versions)"
    words = [str(older.install(tmp_path / "env")), "-c", read]
    done = subprocess.run(words, cwd="/", capture_output=True, text=True, timeout=60, check=False)
    assert "99.0.0" in done.stdout, done.stderr


def test_the_record_of_a_cluster_has_its_start_options(paths: ClusterPaths) -> None:
    hosts = ["h1", {"host": "h2", "gpus": "auto", "user": "root"}]
    spec = ClusterSpec.model_validate(
        {"name": "lab", "gpus": 2, "defaults": {"user": "ada", "cpus": 2}, "hosts": hosts}
    )
    save_record(paths, new_record(spec, paths))
    found = load_record(paths)
    assert found is not None
    assert found.spec == spec
    assert found.spec.hosts[1].gpus == "auto"
    save_client(paths, ClientRecord(spec=spec))
    assert load_cluster_file(paths.root / "cluster.yaml").spec == spec


def test_a_record_of_before_the_reboot_is_a_stopped_cluster(paths: ClusterPaths) -> None:
    me = identify(os.getpid())
    assert me is not None
    old = me.model_copy(update={"boot_id": "before"})
    save_record(paths, new_record(SPEC, paths).with_(wanted="running", ray=old, controller=old))
    assert anyio.run(backend.status, ClusterSpec()).state == "stopped"


def test_an_exited_controller_next_to_a_running_ray_is_a_degraded_cluster(paths: ClusterPaths, start: Start) -> None:
    ray = start()
    dead = ray.model_copy(update={"ticks": ray.ticks + 1, "pid": 4711})
    ports = {"controller": 25990, "dashboard": 25991}
    save_record(paths, new_record(SPEC, paths).with_(wanted="running", ray=ray, controller=dead, ports=ports))
    status = anyio.run(backend.status, ClusterSpec())
    assert status.state == "degraded"
    assert status.problems == ("the controller (pid 4711) has exited",)
    assert status.ray is not None
    assert status.ray.alive
    assert status.ray_ports == {"dashboard": 25991}


def test_down_stops_recorded_and_marked_processes_and_no_others(paths: ClusterPaths, start: Start) -> None:
    record = new_record(SPEC, paths)
    ray = start(**{VAR_CLUSTER_ID: record.cluster_id})
    strayed = start(**{VAR_CLUSTER_ID: record.cluster_id})
    training = start(RAYLAUNCH_ATTEMPT_ID=f"{record.cluster_id}/digits-k3f9qa-1")
    controller = start(RAYLAUNCH_CONTROLLER_OF=record.cluster_id)
    other = start(**{VAR_CLUSTER_ID: "another"})
    save_record(paths, record.with_(wanted="running", ray=ray, controller=controller, ports={"controller": 25990}))
    report = anyio.run(backend.down, ClusterSpec())
    assert {one.pid for one in report.ended} == {ray.pid, strayed.pid, training.pid, controller.pid}
    assert {one.what for one in report.ended if one.pid == ray.pid} == {"Ray"}  # a worker's is no head
    assert is_alive(other)
    assert not any(is_alive(one) for one in (ray, strayed, training, controller))
    assert anyio.run(backend.status, ClusterSpec()).state == "stopped"


def test_leftover_processes_are_found_without_the_clusters_record(paths: ClusterPaths, start: Start) -> None:
    cluster_id = uuid.uuid4().hex  # this test may run elsewhere on this machine
    write_private(paths.controller_config, json.dumps({"cluster_id": cluster_id}))
    left = start(**{VAR_CLUSTER_ID: cluster_id})
    report = anyio.run(backend.down, ClusterSpec())
    assert [one.pid for one in report.ended] == [left.pid]


def test_the_session_of_a_dead_head_is_found_by_its_processes_titles(paths: ClusterPaths, start: Start) -> None:
    head = start("/bin/bash", "-c", "exec -a ray::Worker sleep 600 & exec sleep 0.1")
    wait_until(lambda: not is_alive(head), 60, "the head's death")
    (left,) = of_ray("none", head, paths.temp)
    assert left.pid != head.pid
    send(left.pid)


# Plans


def test_a_plan_reports_the_steps_and_starts_nothing(home: Path) -> None:
    text = str(anyio.run(backend.plan, SPEC))
    assert text.startswith("cluster local: would start\n  + Ray 2.60.")
    assert "with all CPU cores and 2 logical GPUs, loopback only" in text
    assert "\n  + the controller, on a free port, log " in text
    assert list(home.iterdir()) == []


def test_half_a_cpu_is_refused_with_an_alternative() -> None:
    with pytest.raises(SpecError, match=r"cpus: 2.4 is not a whole number of cores"):
        whole_cpus(2.4)


# Ray's arguments and environment


def head_of(paths: ClusterPaths, spec: ClusterSpec) -> RayStart:
    record = new_record(spec, paths)
    choice = choose_gpus(spec, parse_gpus(ROWS), {})
    names = [*RAY_PORTS, "worker_min", "worker_max"]
    return RayStart(paths, spec, record.cluster_id, {name: 20000 + n for n, name in enumerate(names)}, choice)


def test_a_list_of_gpus_is_in_the_order_of_nvidia_smi(paths: ClusterPaths) -> None:
    head = head_of(paths, ClusterSpec(gpus=("GPU-bbbb2222",)))
    env = head.environment({"CUDA_VISIBLE_DEVICES": "0,1"})
    assert "--num-gpus=1" in head.argv()
    assert (env["CUDA_VISIBLE_DEVICES"], env["CUDA_DEVICE_ORDER"]) == ("1", "PCI_BUS_ID")


def test_the_folder_of_rays_python_is_first_on_its_path_and_jobs_get_their_own(paths: ClusterPaths) -> None:
    env = head_of(paths, ClusterSpec()).environment({"PATH": "/usr/bin"})
    assert env["PATH"] == f"{Path(sys.executable).parent}:/usr/bin"
    assert without_ray(env)["PATH"] == "/usr/bin"
    assert without_ray({"PATH": "/opt/bin"})["PATH"] == "/opt/bin"  # where somebody else runs Ray


def test_logical_gpus_leave_the_real_ones_unnamed(paths: ClusterPaths) -> None:
    head = head_of(paths, ClusterSpec(gpus=4))
    assert "--num-gpus=4" in head.argv()
    assert "CUDA_VISIBLE_DEVICES" not in head.environment({"CUDA_VISIBLE_DEVICES": "0"})


def test_the_environment_of_jobs_has_no_secrets_and_no_variables_of_another_ray(paths: ClusterPaths) -> None:
    planted = {
        "WANDB_API_KEY": "x",
        "RAY_ADDRESS": "x",
        "HF_TOKEN": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "PYTHONPATH": "x",
    }
    kept = {"PATH": "/usr/bin", "HOME": "/root", "HF_HOME": "/data/hf", "NCCL_DEBUG": "INFO"}
    assert planted.keys() & clean_environment(planted | kept, paths).keys() <= {"PYTHONPATH"}
    assert clean_environment(planted | kept, paths).items() >= kept.items()
    assert clean_environment(planted, paths).get("PYTHONPATH") != "x"


def test_loopback_never_uses_a_proxy(paths: ClusterPaths) -> None:
    env = clean_environment({"https_proxy": "http://proxy:3128", "no_proxy": "intranet"}, paths)
    assert env["no_proxy"] == "intranet,127.0.0.1,localhost"


def test_rays_arguments_hold_no_secret(paths: ClusterPaths) -> None:
    token = secret_file(paths.ray_token)
    head = head_of(paths, SPEC)
    assert token not in " ".join(head.argv())
    assert token not in head.environment({}).values()


# Versions


def running_with(paths: ClusterPaths, start: Start, **versions: str) -> ClusterRecord:
    record = new_record(SPEC, paths).with_(
        wanted="running",
        ray=start(),
        ports={"controller": 25990, "dashboard": 25991},
        versions=ClusterVersions(**versions),
    )
    return save_record(paths, record)


def test_a_cluster_that_runs_another_ray_is_refused_with_a_hint(paths: ClusterPaths, start: Start) -> None:
    running_with(paths, start, ray="2.59.1", raylaunch="0.1.0")
    with pytest.raises(VersionError) as caught:
        anyio.run(partial(backend.up, SPEC, on_step=ignore))
    assert caught.value.message.startswith("cluster local runs Ray 2.59.1, but Ray 2.60.")
    assert caught.value.hint.startswith("raylaunch up --upgrade ")


def test_a_cluster_of_a_newer_raylaunch_is_refused(paths: ClusterPaths, start: Start) -> None:
    running_with(paths, start, ray="2.60.0", raylaunch="99.0.0")
    seen = anyio.run(inspect_cluster, paths)
    with pytest.raises(VersionError, match=r"cluster local was started by raylaunch 99\.0\.0, and this is"):
        check_versions(seen, "2.60.0")


def test_an_incompatible_ray_is_refused_with_the_command_that_fixes_it(home: Path, tmp_path: Path) -> None:
    facts = tmp_path / "ray-2.9.3.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: ray\nVersion: 2.9.3\n")
    program = "import anyio; from raylaunch.cluster.local import backend\n"
    program += "from raylaunch.models.cluster_spec import ClusterSpec\n"
    program += "from raylaunch.errors import VersionError\n"
    program += "try: anyio.run(backend.plan, ClusterSpec())\nexcept VersionError as error: print(error)"
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{Path(backend.__file__).parents[3]}", "RAYLAUNCH_HOME": str(home)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert f"needs Ray 2.60, but Ray 2.9.3 is installed in {sys.prefix}\n  → install that version: " in done.stdout
