"""Files onto a host: whole, once, and in their place only when they are complete."""

# ruff: noqa: ASYNC240 -- the files are what is looked at, and nothing else runs meanwhile

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from support.disks import small_disk
from support.sshd import Sshd, sshd
from support.waiting import wait_until

from raylaunch.errors import HostLostError, HostStorageError, RaylaunchError, SpecError, StorageError, TransferError
from raylaunch.files import sha256_of
from raylaunch.ssh.host import SSHHost, machine
from raylaunch.ssh.push import PushFile, push
from raylaunch.ssh.ranges import RANGE_BYTES

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

MB = 1_000_000


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with sshd(tmp_path_factory.mktemp("sshd")) as served:
        yield served


@pytest.fixture(scope="module")
async def there(host: Sshd) -> AsyncIterator[SSHHost]:
    async with machine(host.target) as opened:
        yield opened


def noise(size: int, *, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)  # noqa: S311 -- no secret


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three ranges and a bit."""
    path = tmp_path_factory.mktemp("big") / "big.whl"
    path.write_bytes(noise(3 * RANGE_BYTES + 12345, seed=1))
    return path


class Meter:
    """Counts bytes as they are told."""

    def __init__(self) -> None:
        self.reported: list[int] = []

    def __call__(self, count: int) -> None:
        self.reported.append(count)

    @property
    def total(self) -> int:
        return sum(self.reported)


async def refusal(there: SSHHost, *files: PushFile) -> RaylaunchError:
    with pytest.raises(RaylaunchError) as caught:
        await push(there, files)
    return caught.value


@pytest.mark.parametrize("durable", [True, False])
async def test_files_arrive_as_they_are_with_their_modes_in_folders_of_their_own(
    there: SSHHost, tmp_path: Path, big: Path, *, durable: bool
) -> None:
    far = tmp_path / "far/with a space"
    meter = Meter()
    files = [
        PushFile(big, f"{far}/big.whl", 0o644, durable=durable),
        PushFile(b"secret", f"{far}/token"),
        PushFile(b"#!/bin/sh\n", f"{far}/program", 0o755),
        PushFile(b"", f"{far}/empty", durable=durable),
    ]
    await push(there, files, on_bytes=meter)
    assert (far / "big.whl").read_bytes() == big.read_bytes()
    assert (far / "token").read_bytes() == b"secret"
    assert {path.name: path.stat().st_mode & 0o777 for path in far.iterdir()} == {
        "big.whl": 0o644,
        "token": 0o600,
        "program": 0o755,
        "empty": 0o600,
    }
    assert far.stat().st_mode & 0o777 == 0o700
    assert meter.total == big.stat().st_size + 16


async def test_a_tilde_is_the_home_there(there: SSHHost) -> None:
    home = Path((await there.run(["sh", "-c", "echo $HOME"], limit_s=20)).text)
    name = f".raylaunch-test-{os.getpid()}"
    try:
        await push(there, [PushFile(b"x", f"~/{name}")])
        assert (home / name).read_bytes() == b"x"
    finally:
        (home / name).unlink(missing_ok=True)


async def test_many_files_share_a_few_sessions(there: SSHHost, tmp_path: Path) -> None:
    files = [PushFile(f"file {number}".encode(), f"{tmp_path}/many/{number}") for number in range(60)]
    await push(there, files)
    assert all((tmp_path / f"many/{number}").read_text() == f"file {number}" for number in range(60))


async def test_what_is_there_already_is_not_sent_again(there: SSHHost, tmp_path: Path, big: Path) -> None:
    far = tmp_path / "big.whl"
    await push(there, [PushFile(big, str(far))])
    inode = far.stat().st_ino
    await push(there, [PushFile(big, str(far), 0o640)])
    assert far.stat().st_ino == inode
    assert far.stat().st_mode & 0o777 == 0o640


async def test_a_file_of_the_same_size_and_other_content_is_replaced(there: SSHHost, tmp_path: Path, big: Path) -> None:
    far = tmp_path / "big.whl"
    far.write_bytes(b"\0" * big.stat().st_size)
    await push(there, [PushFile(big, str(far))])
    assert far.read_bytes() == big.read_bytes()


async def interrupted(there: SSHHost, big: Path, far: Path) -> None:
    """Push a file and stop in the middle, when a range and more has arrived."""
    meter = Meter()

    async def pushing() -> None:
        await push(there, [PushFile(big, str(far))], on_bytes=meter, limit_bytes_per_s=200 * MB)

    async with anyio.create_task_group() as group:
        group.start_soon(pushing)
        notes = partial(far.parent.glob, "*.ranges")
        await anyio.to_thread.run_sync(wait_until, lambda: list(notes()), 60, "a range has arrived")
        assert not far.exists()
        group.cancel_scope.cancel()


async def test_an_interrupted_push_is_taken_up_where_it_was(there: SSHHost, tmp_path: Path, big: Path) -> None:
    far = tmp_path / "far/big.whl"
    await interrupted(there, big, far)
    assert not far.exists()
    meter = Meter()
    await push(there, [PushFile(big, str(far))], on_bytes=meter)
    assert meter.reported[0] >= RANGE_BYTES or meter.reported[0] == big.stat().st_size % RANGE_BYTES
    assert meter.total == big.stat().st_size
    assert far.read_bytes() == big.read_bytes()
    assert [path.name for path in far.parent.iterdir()] == ["big.whl"]


async def test_two_contents_of_one_name_are_never_mixed(there: SSHHost, tmp_path: Path, big: Path) -> None:
    far = tmp_path / "far/big.whl"
    await interrupted(there, big, far)
    other = tmp_path / "other"
    other.write_bytes(noise(big.stat().st_size, seed=2))
    await push(there, [PushFile(other, str(far))])
    assert far.read_bytes() == other.read_bytes()
    assert [path.name for path in far.parent.iterdir()] == ["big.whl"]


async def test_a_piece_that_went_bad_while_nobody_looked_is_found_and_sent_anew(
    there: SSHHost, tmp_path: Path, big: Path
) -> None:
    far = tmp_path / "far/big.whl"
    await interrupted(there, big, far)
    part = next(path for path in far.parent.iterdir() if path.suffix != ".ranges")
    with part.open("r+b") as file:
        first = int(Path(f"{part}.ranges").read_text().split()[0])
        file.seek(first)
        file.write(b"bad")
    error = await refusal(there, PushFile(big, str(far)))
    assert isinstance(error, TransferError)
    assert not far.exists()
    await push(there, [PushFile(big, str(far))])
    assert far.read_bytes() == big.read_bytes()


async def test_a_connection_lost_in_the_middle_keeps_what_has_arrived(tmp_path: Path, big: Path) -> None:
    far = tmp_path / "far/big.whl"
    with sshd(tmp_path / "sshd") as own:

        def lose(_count: int) -> None:
            if list(far.parent.glob("*.ranges")):
                own.drop()

        async with machine(own.target) as there:
            with pytest.raises(HostLostError) as caught:
                await push(there, [PushFile(big, str(far))], on_bytes=lose, step="push wheels")
            assert caught.value.step == "push wheels"
        assert not far.exists()
        meter = Meter()
        async with machine(own.target) as there:
            await push(there, [PushFile(big, str(far))], on_bytes=meter)
    assert meter.reported[0] > 0
    assert far.read_bytes() == big.read_bytes()


async def test_two_that_push_the_same_at_once_do_not_disturb_each_other(
    there: SSHHost, host: Sshd, tmp_path: Path, big: Path
) -> None:
    far = tmp_path / "far/big.whl"
    async with machine(host.target) as other, anyio.create_task_group() as group:
        group.start_soon(push, there, [PushFile(big, str(far))])
        group.start_soon(push, other, [PushFile(big, str(far))])
    assert far.read_bytes() == big.read_bytes()


async def test_what_another_is_just_beginning_to_write_is_left_to_both(
    there: SSHHost, tmp_path: Path, big: Path
) -> None:
    far = tmp_path / "far/big.whl"
    far.parent.mkdir()
    with (far.parent / f"big.whl.part-{sha256_of(big)[:16]}").open("wb") as part:  # no range of it has arrived yet
        part.write(b"its first bytes")
        part.flush()
        await push(there, [PushFile(big, str(far))])
        assert far.stat().st_ino == os.fstat(part.fileno()).st_ino
    assert far.read_bytes() == big.read_bytes()


async def test_a_speed_limit_holds_for_all_files_together(there: SSHHost, tmp_path: Path) -> None:
    started = time.monotonic()
    files = [PushFile(bytes(MB // 4), f"{tmp_path}/far/{number}") for number in range(5)]
    await push(there, files, limit_bytes_per_s=MB)
    assert time.monotonic() - started >= 0.9  # of 1.25 s, less the last piece, which nobody waits for


# What can go wrong


async def test_a_full_disk_is_said_to_be_full_and_what_was_there_stays(
    there: SSHHost, tmp_path: Path, big: Path
) -> None:
    with small_disk(tmp_path / "small", kib=40 * 1024) as disk:
        (disk / "big.whl").write_text("the old one")
        with pytest.raises(HostStorageError) as caught:
            await push(there, [PushFile(big, f"{disk}/big.whl")], step="push wheels")
        assert "here: the disk is full (push wheels)" in caught.value.message
        assert "0 KiB free" in caught.value.message
        assert "root" in caught.value.hint
        assert (disk / "big.whl").read_text() == "the old one"


async def test_a_place_that_cannot_be_written_is_named(there: SSHHost) -> None:
    error = await refusal(there, PushFile(b"x", "/proc/nowhere/x"))
    assert isinstance(error, HostStorageError)
    assert "cannot create directory '/proc/nowhere'" in error.message


@pytest.mark.parametrize("remote", ["relative/path", "", "/with\na newline"])
async def test_a_place_must_be_one(there: SSHHost, remote: str) -> None:
    assert isinstance(await refusal(there, PushFile(b"x", remote)), SpecError)


async def test_a_file_here_that_is_missing_is_named(there: SSHHost, tmp_path: Path) -> None:
    error = await refusal(there, PushFile(tmp_path / "missing", f"{tmp_path}/far"))
    assert isinstance(error, StorageError)
    assert str(tmp_path / "missing") in error.message


async def test_a_file_that_does_not_have_the_checksum_that_was_said_is_not_put_in_place(
    there: SSHHost, tmp_path: Path
) -> None:
    error = await refusal(there, PushFile(b"x", f"{tmp_path}/far/x", sha256=hashlib.sha256(b"y").hexdigest()))
    assert isinstance(error, TransferError)
    assert list((tmp_path / "far").iterdir()) == []
