"""Large files over several SSH connections: a real sshd, the real HTTP API behind it, and connections that break."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.api import Api, token_of
from support.api_use import submit, write
from support.sshd import LOOPBACK, Sshd, sshd

from raylaunch.client.client import Client
from raylaunch.client.transport import OnProgress
from raylaunch.cluster.client_record import (
    ClientRecord,
    TunnelRecord,
    load_tunnel,
    save_client,
    save_tunnel,
    tunnel_file,
)
from raylaunch.cluster.probe.choices import target_of
from raylaunch.cluster.processes import identify
from raylaunch.errors import TransferError
from raylaunch.files import sha256_of
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.models.job import Artifact
from raylaunch.paths import cluster_paths, make_private_dir
from raylaunch.ssh.ranges import notes_of
from raylaunch.ssh.resolve import command
from raylaunch.version import __version__

pytestmark = pytest.mark.slow  # each test has an sshd, and programs that speak through it

_MB = 1_000_000
_SIZE = 300 * _MB
_PATH = "attempt-1/outputs/model.bin"


@pytest.fixture
def host(tmp_path: Path, api: Api, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sshd]:
    """The head, as this machine knows it after `up`."""
    with sshd(tmp_path / "sshd") as served:
        served.config(f"Host {LOOPBACK}\n  IdentityFile {served.key}\n  User {served.user}\n")
        served.trust()
        monkeypatch.setenv("HOME", str(served.home))
        monkeypatch.setenv("RAYLAUNCH_HOME", str(tmp_path / "home"))
        paths = cluster_paths("test")
        for folder in (paths.home, paths.home / "clusters", paths.root):
            make_private_dir(folder)
        spec = ClusterSpec.model_validate({"name": "test", "hosts": [{"host": f"{LOOPBACK}:{served.port}"}]})
        ports = {"controller": int(api.url.rpartition(":")[2])}
        save_client(paths, ClientRecord(spec=spec, token=token_of("tom"), head_ports=ports, head=spec.hosts[0].name))
        words = command(target_of(spec.host_specs()[0]))
        if words is not None:
            ours = identify(os.getpid())
            assert ours is not None
            has = TunnelRecord(process=ours, ports=ports, head_ports=ports, openssh=tuple(words), version=__version__)
            save_tunnel(paths, has.model_copy(update={"up": True}))
        yield served


def through(program: Path, script: str) -> Path:
    """Put a program before the `ssh` that is installed, which notes its words; return where it does."""
    paths = cluster_paths("test")
    tunnel = load_tunnel(paths)
    assert tunnel is not None
    notes = program.with_suffix(".notes")
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(f'#!/bin/sh\necho "$@" >>{notes}\n{script}\nexec {tunnel.openssh[0]} "$@"\n')
    program.chmod(0o755)
    save_tunnel(paths, tunnel.model_copy(update={"openssh": (str(program), *tunnel.openssh[1:])}))
    return notes


@pytest.fixture
def model(api: Api) -> tuple[str, Artifact]:
    """A job's model, mostly a hole: fast to make, and no two ranges alike."""
    with api.client("tom") as tom:
        job = submit(tom)
        write(api, job, _PATH, b"")
        with (api.store / "jobs" / job.id / _PATH).open("r+b") as file:
            file.truncate(_SIZE)
            for at in range(0, _SIZE, _MB):
                file.seek(at)
                file.write(os.urandom(64))
        api.do(lambda: api.state.artifacts.finalize(job.id))
        found = [Artifact.model_validate(one) for one in tom.get(f"/v1/jobs/{job.id}/files").json()]
    return job.id, next(one for one in found if one.path == _PATH)


def silent(_what: str, _done: int, _total: int) -> None:
    pass


def fetched(api: Api, model: tuple[str, Artifact], target: Path, on_progress: OnProgress = silent) -> None:
    async def run() -> None:
        async with Client(api.reach(), cluster="test", over_ssh=True, patience_s=0) as client:
            await client.download(model[0], [_PATH], dest=target.parent, on_progress=on_progress)

    asyncio.run(asyncio.wait_for(run(), 90))


def visible(folder: Path) -> list[str]:
    return [one.name for one in folder.iterdir() if one.name != ".raylaunch"]


def once(work: Callable[[], object], after: int) -> OnProgress:
    """Do something when so many bytes have come."""
    done: list[int] = []

    def report(_what: str, here: int, _total: int) -> None:
        if here >= after and not done:
            done.append(here)
            work()

    return report


def test_a_large_file_comes_whole_over_connections_of_its_own_written_by_ssh_itself(
    api: Api, host: Sshd, model: tuple[str, Artifact], tmp_path: Path
) -> None:
    notes = through(tmp_path / "bin" / "ssh", "")
    fetched(api, model, tmp_path / "got" / "model.bin")
    assert sha256_of(tmp_path / "got" / "model.bin") == model[1].sha256
    assert visible(tmp_path / "got") == ["model.bin"]
    assert ["dd if" in line for line in notes.read_text().splitlines()] == [True, True]
    assert host.log().count("Accepted publickey") == 2


def test_what_a_login_shell_prints_is_no_part_of_the_file(
    api: Api, host: Sshd, model: tuple[str, Artifact], tmp_path: Path
) -> None:
    through(tmp_path / "bin" / "ssh", "echo Welcome to this host; echo Mind the gap >&2")
    fetched(api, model, tmp_path / "got" / "model.bin")
    assert sha256_of(tmp_path / "got" / "model.bin") == model[1].sha256
    assert host.log().count("Accepted publickey") == 2


@pytest.mark.usefixtures("host")
def test_through_the_controller_where_our_account_may_not_read_the_file(
    api: Api, model: tuple[str, Artifact], tmp_path: Path
) -> None:
    denied = """case "$*" in *"dd if"*) echo "dd: failed to open: Permission denied" >&2; exit 1 ;; esac"""
    notes = through(tmp_path / "bin" / "ssh", denied)
    fetched(api, model, tmp_path / "got" / "model.bin")
    assert sha256_of(tmp_path / "got" / "model.bin") == model[1].sha256
    assert "dd if" in notes.read_text()


def test_through_the_controller_where_no_ssh_is_installed(
    api: Api, host: Sshd, model: tuple[str, Artifact], tmp_path: Path
) -> None:
    tunnel_file(cluster_paths("test")).unlink()
    fetched(api, model, tmp_path / "got" / "model.bin")
    assert sha256_of(tmp_path / "got" / "model.bin") == model[1].sha256
    assert "Accepted publickey" not in host.log()


def test_connections_that_break_cost_speed_alone(
    api: Api, host: Sshd, model: tuple[str, Artifact], tmp_path: Path
) -> None:
    fetched(api, model, tmp_path / "got" / "model.bin", once(host.drop, 120 * _MB))
    assert sha256_of(tmp_path / "got" / "model.bin") == model[1].sha256


def test_a_file_comes_where_no_connection_can_be_had(
    api: Api, host: Sshd, model: tuple[str, Artifact], tmp_path: Path
) -> None:
    host.stop()
    fetched(api, model, tmp_path / "got" / "model.bin")
    assert sha256_of(tmp_path / "got" / "model.bin") == model[1].sha256


class _Interrupted(Exception):  # noqa: N818 -- what a person does
    pass


def interrupt() -> None:
    raise _Interrupted


@pytest.mark.usefixtures("host")
def test_an_interrupted_one_goes_on_with_what_has_come(api: Api, model: tuple[str, Artifact], tmp_path: Path) -> None:
    target = tmp_path / "got" / "model.bin"
    with pytest.raises(_Interrupted):
        fetched(api, model, target, once(interrupt, 120 * _MB))
    assert not target.exists()
    (part,) = (tmp_path / "got").glob(".*.part")
    assert part.with_name(notes_of(part.name)).exists()
    reported: list[int] = []
    fetched(api, model, target, lambda _what, done, _total: reported.append(done))
    assert reported[0] > 0
    assert sha256_of(target) == model[1].sha256
    assert visible(tmp_path / "got") == ["model.bin"]


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("size", [_SIZE, _SIZE // 2])
def test_a_file_that_is_another_by_now_is_not_put_in_place(
    api: Api, model: tuple[str, Artifact], tmp_path: Path, size: int
) -> None:
    file = api.store / "jobs" / model[0] / _PATH

    def change() -> None:
        os.truncate(file, size)
        with file.open("r+b") as opened:
            opened.seek(size - 10)
            opened.write(b"something")

    with pytest.raises(TransferError):
        fetched(api, model, tmp_path / "got" / "model.bin", once(change, 0))
    assert not (tmp_path / "got" / "model.bin").exists()
