"""A cluster's folders, secrets and record on this machine: ours alone, whole, and changed by one at a time."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from raylaunch.cluster.local.controller_process import admit
from raylaunch.cluster.processes import identify
from raylaunch.cluster.record import cluster_lock, keep_unreadable_aside, load_record, new_record, save_record
from raylaunch.errors import ConflictError, StorageError
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.paths import (
    ClusterPaths,
    cluster_paths,
    make_cluster_dirs,
    make_store,
    secret_file,
    share_job_folders,
    write_private,
)

SPEC = ClusterSpec(gpus=2)
NOBODY = 65534

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root")


def test_all_folders_of_a_cluster_are_private_to_the_user(paths: ClusterPaths) -> None:
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


def held_by_another(folder: Path) -> None:
    folder.mkdir()
    os.chown(folder, NOBODY, NOBODY)


@pytest.mark.parametrize(
    "taken",
    [pytest.param(held_by_another, marks=needs_root), lambda folder: folder.symlink_to("/etc"), Path.touch],
)
def test_another_account_that_owns_the_temp_folder_does_not_block_the_cluster(
    tmp_path: Path, taken: Callable[[Path], None]
) -> None:
    paths = cluster_paths("lab", {"RAYLAUNCH_HOME": str(tmp_path / "home")})
    paths.home.mkdir(mode=0o700)
    (paths.home / "temp").write_text(str(tmp_path / "usual"))
    taken(tmp_path / "usual")
    make_cluster_dirs(paths)
    ours = paths.temp
    assert stat.S_IMODE(ours.parent.lstat().st_mode) == 0o700
    assert ours.parent.lstat().st_uid == os.getuid()
    make_cluster_dirs(paths)
    assert paths.temp == ours
    shutil.rmtree(ours.parent)


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


def test_a_secret_is_created_once_and_is_private_to_the_user(paths: ClusterPaths) -> None:
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
    with pytest.raises(ConflictError, match="has other files and other users may read it"):
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


def test_workers_keep_jobs_folders_at_the_path_that_the_head_has(tmp_path: Path) -> None:
    head, worker = (cluster_paths(name, {"RAYLAUNCH_HOME": str(tmp_path)}) for name in ("lab", "lab.h2"))
    for paths in (head, worker, worker):
        make_cluster_dirs(paths)
        share_job_folders(paths, "lab")
    assert (worker.node / "jobs").resolve() == (head.node / "jobs").resolve()
    assert not (head.node / "jobs").is_symlink()
