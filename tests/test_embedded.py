"""The embedded cluster, as far as it can be seen without starting Ray."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import anyio
import pytest
from support.waiting import wait_until

from raylaunch.cluster import embedded
from raylaunch.cluster.backends import Step, backend_for
from raylaunch.cluster.controller_program import admit
from raylaunch.cluster.gpus import choose_gpus, parse_gpus
from raylaunch.cluster.home import (
    ClusterPaths,
    cluster_paths,
    make_cluster_dirs,
    make_store,
    secret_file,
    write_private,
)
from raylaunch.cluster.look import look
from raylaunch.cluster.neighbours import Neighbour, check_gpus, neighbours
from raylaunch.cluster.ports import RAY_PORTS
from raylaunch.cluster.process import ProcessIdentity, identify, is_alive, start_apart
from raylaunch.cluster.ray_head import VAR_CLUSTER_ID, RayStart, clean_environment, whole_cpus
from raylaunch.cluster.record import (
    ClusterRecord,
    Versions,
    cluster_lock,
    keep_unreadable_aside,
    load_record,
    new_record,
    save_record,
)
from raylaunch.cluster.sweep import of_ray
from raylaunch.cluster.versions import check_versions
from raylaunch.errors import ClusterDownError, ConflictError, SpecError, StorageError, VersionError
from raylaunch.spec import ClusterSpec

SPEC = ClusterSpec(gpus=2)
STAYS = (sys.executable, "-I", "-S", "-c", "import signal; signal.pause()")
NOBODY = 65534
ROWS = "0, GPU-aaaa1111, NVIDIA H100, 81559, 0, 0\n1, GPU-bbbb2222, NVIDIA H100, 81559, 0, 0"

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root")


@pytest.fixture
def paths(home: Path) -> Iterator[ClusterPaths]:
    assert home.is_dir()
    found = cluster_paths("local")
    make_cluster_dirs(found)
    yield found
    shutil.rmtree(found.temp, ignore_errors=True)


Start = Callable[..., ProcessIdentity]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[ProcessIdentity] = []

    def start_one(*argv: str, **env: str) -> ProcessIdentity:
        process = anyio.run(partial(start_apart, argv or STAYS, env=env, cwd=Path("/"), log=tmp_path / "log"))
        started.append(process)
        return process

    yield start_one
    for process in started:
        if is_alive(process):
            os.kill(process.pid, signal.SIGKILL)


def ignore(_step: Step) -> None:
    """Take a step and say nothing."""


# Files


def test_all_folders_of_a_cluster_are_ours_alone(paths: ClusterPaths) -> None:
    folders = (paths.home / "clusters", paths.root, paths.node, paths.gcs, paths.temp.parent, paths.temp)
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}


def test_rays_temp_folder_is_short_enough_for_unix_sockets_however_long_the_home(tmp_path: Path) -> None:
    paths = cluster_paths("a-long-name", {"RAYLAUNCH_HOME": str(tmp_path / ("deep" * 20))})
    socket = paths.temp / "session_2026-01-01_00-00-00_000000_4194304" / "sockets" / "plasma_store"
    assert len(str(socket)) < 107


def test_two_homes_have_different_temp_folders(tmp_path: Path) -> None:
    one, other = (cluster_paths("local", {"RAYLAUNCH_HOME": str(tmp_path / name)}) for name in "ab")
    assert one.temp != other.temp


def test_a_folder_that_others_could_read_is_closed(paths: ClusterPaths) -> None:
    paths.temp.chmod(0o777)
    make_cluster_dirs(paths)
    assert stat.S_IMODE(paths.temp.stat().st_mode) == 0o700


@needs_root
def test_a_temp_folder_of_another_user_is_refused(paths: ClusterPaths) -> None:
    os.chown(paths.temp, NOBODY, NOBODY)
    with pytest.raises(ConflictError, match=rf"{paths.temp} belongs to nobody, not to you \(root\)"):
        make_cluster_dirs(paths)


def test_a_link_in_place_of_a_folder_is_refused(paths: ClusterPaths, tmp_path: Path) -> None:
    paths.temp.rmdir()
    paths.temp.symlink_to(tmp_path)
    with pytest.raises(ConflictError, match="is not a folder"):
        make_cluster_dirs(paths)
    paths.temp.unlink()


def test_a_secret_is_made_once_and_only_we_can_read_it(paths: ClusterPaths) -> None:
    first = secret_file(paths.token)
    assert secret_file(paths.token) == first
    assert len(first) == 43
    assert stat.S_IMODE(paths.token.stat().st_mode) == 0o600


def words_of_nobody(*argv: str) -> str:
    done = subprocess.run(
        argv, user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True, text=True, check=False, cwd="/"
    )
    return done.stderr


@needs_root
def test_another_user_of_the_machine_can_read_neither_token_nor_record_nor_log(paths: ClusterPaths) -> None:
    paths.home.chmod(0o755)
    secret_file(paths.token)
    secret_file(paths.ray_token)
    save_record(paths, new_record(SPEC, paths))
    write_private(paths.ray_log, "x")
    for path in (paths.token, paths.ray_token, paths.record, paths.ray_log, paths.temp):
        assert "Permission denied" in words_of_nobody("cat", str(path))


@needs_root
def test_a_full_disk_is_an_error_with_the_path_and_the_free_bytes(home: Path) -> None:
    disk = home / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    try:
        with pytest.raises(StorageError) as caught:
            write_private(disk / "cluster.json", "x" * 100_000)
        assert caught.value.message.startswith(f"no space left to write {disk}/cluster.json: ")
        assert caught.value.message.endswith(" bytes free")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_store_that_holds_other_peoples_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.pdf").write_text("x")
    tmp_path.chmod(0o755)
    with pytest.raises(ConflictError, match="holds other files and other users may read it"):
        make_store(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


def test_our_token_is_admitted_once_and_other_tokens_stay(tmp_path: Path) -> None:
    other = {"sha256": "ab", "person": "anna", "role": "viewer"}
    (tmp_path / "tokens.json").write_text(json.dumps({"tokens": [other]}))
    admit(tmp_path, "secret-token")
    admit(tmp_path, "secret-token")
    tokens = json.loads((tmp_path / "tokens.json").read_text())["tokens"]
    assert tokens[0] == other
    assert [one["role"] for one in tokens] == ["viewer", "admin"]
    assert "secret-token" not in (tmp_path / "tokens.json").read_text()


# The record and its lock


def test_a_record_is_read_back_as_it_was_written(paths: ClusterPaths) -> None:
    record = new_record(SPEC, paths).with_(ray=identify(os.getpid()), ports={"gcs": 20000})
    save_record(paths, record)
    assert load_record(paths) == record


def test_a_record_that_cannot_be_understood_is_kept_aside(paths: ClusterPaths) -> None:
    write_private(paths.record, "{ torn")
    assert load_record(paths) is None
    aside = keep_unreadable_aside(paths)
    assert aside is not None
    assert aside.read_text() == "{ torn"
    assert not paths.record.exists()


def test_a_record_of_another_machine_that_shares_the_home_is_refused(paths: ClusterPaths) -> None:
    save_record(paths, new_record(SPEC, paths).with_(machine="another"))
    with pytest.raises(ConflictError, match="cluster local was started on another machine that shares"):
        load_record(paths)


def test_of_two_that_change_a_cluster_at_once_one_waits(paths: ClusterPaths) -> None:
    inside: list[str] = []

    async def change(name: str) -> None:
        async with cluster_lock(paths, limit_s=20):
            inside.append(f"{name} begins")
            await anyio.lowlevel.checkpoint()
            inside.append(f"{name} ends")

    async def both() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(change, "a")
            tasks.start_soon(change, "b")

    anyio.run(both)
    assert inside in (["a begins", "a ends", "b begins", "b ends"], ["b begins", "b ends", "a begins", "a ends"])


def test_a_lock_that_is_held_too_long_names_its_holder(paths: ClusterPaths) -> None:
    async def twice() -> None:
        async with cluster_lock(paths, limit_s=1), cluster_lock(paths, limit_s=0.1):
            pass

    with pytest.raises(
        ConflictError, match=rf"another raylaunch \(pid {os.getpid()}\) has been changing cluster local"
    ):
        anyio.run(twice)


def test_the_lock_of_a_killed_process_is_free(paths: ClusterPaths) -> None:
    program = (
        "import fcntl, os, sys, time; f = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT);"
        "fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    )
    argv = [sys.executable, "-c", program, str(paths.lock)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        holder.kill()

    async def take() -> None:
        async with cluster_lock(paths, limit_s=10):
            pass

    anyio.run(take)


# What is seen, and the verbs of a cluster that does not run


def test_the_backend_of_a_local_cluster_is_the_embedded_one() -> None:
    assert backend_for(SPEC) is embedded


def test_a_cluster_that_was_never_started_is_stopped(home: Path) -> None:
    status = anyio.run(embedded.status, "local")
    assert status.state == "stopped"
    assert list(home.iterdir()) == []


def test_reaching_a_cluster_that_does_not_run_says_how_to_start_it(home: Path) -> None:
    assert home.is_dir()
    with pytest.raises(ClusterDownError) as caught:
        anyio.run(embedded.reach, "local")
    assert str(caught.value) == "cluster local does not run on this machine\n  → start it: raylaunch up"


def test_down_on_a_cluster_that_does_not_run_succeeds_and_says_so(paths: ClusterPaths) -> None:
    report = anyio.run(embedded.down, "local")
    assert not report.was_running
    assert str(report) == f"cluster local was not running; jobs, logs and outputs stay in {paths.default_store}"


def test_a_record_of_before_the_reboot_is_a_stopped_cluster(paths: ClusterPaths) -> None:
    me = identify(os.getpid())
    assert me is not None
    old = me.model_copy(update={"boot_id": "before"})
    save_record(paths, new_record(SPEC, paths).with_(wanted="running", ray=old, controller=old))
    assert anyio.run(embedded.status, "local").state == "stopped"


def test_a_dead_controller_beside_a_living_ray_is_a_degraded_cluster_in_words(
    paths: ClusterPaths, start: Start
) -> None:
    ray = start()
    dead = ray.model_copy(update={"ticks": ray.ticks + 1, "pid": 4711})
    ports = {"controller": 25990, "dashboard": 25991}
    save_record(paths, new_record(SPEC, paths).with_(wanted="running", ray=ray, controller=dead, ports=ports))
    status = anyio.run(embedded.status, "local")
    assert status.state == "degraded"
    assert status.problems == ("the controller (pid 4711) is dead",)
    assert status.ray is not None
    assert status.ray.alive
    assert status.ray_ports == {"dashboard": 25991}


def test_down_ends_what_the_record_names_and_all_that_carry_the_clusters_mark_and_nobody_else(
    paths: ClusterPaths, start: Start
) -> None:
    record = new_record(SPEC, paths)
    ray = start(**{VAR_CLUSTER_ID: record.cluster_id})
    strayed = start(**{VAR_CLUSTER_ID: record.cluster_id})
    training = start(RAYLAUNCH_ATTEMPT_ID=f"{record.cluster_id}/digits-k3f9qa-1")
    controller = start(RAYLAUNCH_CONTROLLER_OF=record.cluster_id)
    other = start(**{VAR_CLUSTER_ID: "another"})
    save_record(paths, record.with_(wanted="running", ray=ray, controller=controller, ports={"controller": 25990}))
    report = anyio.run(embedded.down, "local")
    assert {one.pid for one in report.ended} == {ray.pid, strayed.pid, training.pid, controller.pid}
    assert is_alive(other)
    assert not any(is_alive(one) for one in (ray, strayed, training, controller))
    assert anyio.run(embedded.status, "local").state == "stopped"


def test_what_a_cluster_left_behind_is_found_when_its_record_is_gone(paths: ClusterPaths, start: Start) -> None:
    write_private(paths.controller_config, json.dumps({"cluster_id": "c0ffee"}))
    left = start(**{VAR_CLUSTER_ID: "c0ffee"})
    report = anyio.run(embedded.down, "local")
    assert [one.pid for one in report.ended] == [left.pid]


def test_the_session_of_a_dead_head_is_found_by_its_processes_titles(paths: ClusterPaths, start: Start) -> None:
    head = start("/bin/bash", "-c", "exec -a ray::Worker sleep 600 & exec sleep 0.1")
    wait_until(lambda: not is_alive(head), 10, "the head's death")
    (left,) = of_ray("none", head, paths.temp)
    assert left.pid != head.pid
    os.kill(left.pid, signal.SIGKILL)


# Plans


def test_a_plan_says_what_would_be_started_and_makes_nothing(home: Path) -> None:
    text = str(anyio.run(embedded.plan, SPEC))
    assert text.startswith("cluster local: would start\n  + Ray 2.60.")
    assert "with all CPU cores and 2 logical GPUs, loopback only" in text
    assert "\n  + the controller, on a free port, log " in text
    assert list(home.iterdir()) == []


def test_half_a_cpu_is_refused_with_what_to_write() -> None:
    with pytest.raises(SpecError, match=r"cpus: 2.4 is not a whole number of cores"):
        whole_cpus(2.4)


# Ray's arguments and environment


def head_of(paths: ClusterPaths, spec: ClusterSpec) -> RayStart:
    record = new_record(spec, paths)
    choice = choose_gpus(spec, parse_gpus(ROWS), {})
    names = [*RAY_PORTS, "worker_min", "worker_max"]
    return RayStart(paths, spec, record.cluster_id, {name: 20000 + n for n, name in enumerate(names)}, choice)


def test_a_list_of_gpus_limits_what_ray_sees_by_ids_in_the_order_of_nvidia_smi(paths: ClusterPaths) -> None:
    head = head_of(paths, ClusterSpec(gpus=("GPU-bbbb2222",)))
    env = head.environment({"CUDA_VISIBLE_DEVICES": "0,1"})
    assert "--num-gpus=1" in head.argv()
    assert (env["CUDA_VISIBLE_DEVICES"], env["CUDA_DEVICE_ORDER"]) == ("1", "PCI_BUS_ID")


def test_logical_gpus_leave_the_real_ones_unnamed(paths: ClusterPaths) -> None:
    head = head_of(paths, ClusterSpec(gpus=4))
    assert "--num-gpus=4" in head.argv()
    assert "CUDA_VISIBLE_DEVICES" not in head.environment({"CUDA_VISIBLE_DEVICES": "0"})


def test_no_secret_and_nothing_of_another_ray_gets_into_the_environment_of_jobs(paths: ClusterPaths) -> None:
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


def test_a_proxy_is_never_asked_for_loopback(paths: ClusterPaths) -> None:
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
        wanted="running", ray=start(), ports={"controller": 25990, "dashboard": 25991}, versions=Versions(**versions)
    )
    return save_record(paths, record)


def test_a_cluster_that_runs_another_ray_is_refused_with_what_to_do(paths: ClusterPaths, start: Start) -> None:
    running_with(paths, start, ray="2.59.1", raylaunch="0.1.0")
    with pytest.raises(VersionError) as caught:
        anyio.run(partial(embedded.up, SPEC, on_step=ignore))
    assert caught.value.message.startswith("cluster local runs Ray 2.59.1, and Ray 2.60.")
    assert caught.value.hint == (
        "raylaunch up --upgrade: when no job runs any more, it starts the cluster anew with this Ray"
    )


def test_a_cluster_of_a_newer_raylaunch_is_refused(paths: ClusterPaths, start: Start) -> None:
    running_with(paths, start, ray="2.60.0", raylaunch="99.0.0")
    seen = anyio.run(look, paths)
    with pytest.raises(VersionError, match=r"cluster local was started by raylaunch 99\.0\.0, and this is"):
        check_versions(seen, "2.60.0")


def test_an_installed_ray_that_does_not_fit_is_said_with_the_command_that_helps(home: Path, tmp_path: Path) -> None:
    facts = tmp_path / "ray-2.9.3.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: ray\nVersion: 2.9.3\n")
    program = "import anyio; from raylaunch.cluster import embedded; from raylaunch.spec import ClusterSpec\n"
    program += "from raylaunch.errors import VersionError\n"
    program += "try: anyio.run(embedded.plan, ClusterSpec())\nexcept VersionError as error: print(error)"
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{Path(embedded.__file__).parents[2]}", "RAYLAUNCH_HOME": str(home)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert f"needs Ray 2.60, and Ray 2.9.3 is installed in {sys.prefix}\n  → install the one that fits: " in done.stdout


# Neighbours


def test_a_cluster_that_uses_the_same_gpus_is_found_and_said_whose_it_is(
    paths: ClusterPaths, start: Start, tmp_path: Path
) -> None:
    theirs = new_record(ClusterSpec(name="lab"), paths).with_(gpu_uuids=("GPU-bbbb2222",))
    (tmp_path / "cluster.json").write_text(theirs.model_dump_json())
    pid = start(*STAYS, "-m", "raylaunch.controller", "--config", str(tmp_path / "controller.json")).pid
    others = [one for one in neighbours(paths.controller_config) if one.folder == str(tmp_path)]
    choice = choose_gpus(ClusterSpec(), parse_gpus(ROWS), {})
    with pytest.raises(ConflictError) as caught:
        check_gpus(ClusterSpec(), choice, others)
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    assert caught.value.message == (
        f"cluster lab of user {user} (controller pid {pid}, {tmp_path}) uses GPU 1 of this machine"
    )


def test_other_gpus_of_the_same_machine_do_not_conflict() -> None:
    other = Neighbour(name="lab", user="anna", folder="/f", pid=1, gpu_uuids=("GPU-bbbb2222",))
    spec = ClusterSpec(gpus=("0",))
    check_gpus(spec, choose_gpus(spec, parse_gpus(ROWS), {}), [other])


def test_logical_gpus_never_conflict() -> None:
    other = Neighbour(name="lab", user="anna", folder="/f", pid=1, gpu_uuids=None)
    check_gpus(SPEC, choose_gpus(SPEC, parse_gpus(ROWS), {}), [other])


def test_a_cluster_whose_gpus_we_may_not_see_conflicts_unless_gpus_are_listed() -> None:
    other = Neighbour(name="lab", user="anna", folder="/f", pid=1, gpu_uuids=None)
    auto, listed = ClusterSpec(), ClusterSpec(gpus=("0",))
    check_gpus(listed, choose_gpus(listed, parse_gpus(ROWS), {}), [other])
    with pytest.raises(ConflictError, match="may use GPUs 0, 1 of this machine"):
        check_gpus(auto, choose_gpus(auto, parse_gpus(ROWS), {}), [other])


def test_our_own_controller_is_no_neighbour(paths: ClusterPaths, start: Start) -> None:
    start(*STAYS, "-m", "raylaunch.controller", "--config", str(paths.controller_config))
    assert str(paths.root) not in [one.folder for one in neighbours(paths.controller_config)]
