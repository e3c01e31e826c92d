"""The client fetches what jobs have left: whole, once, under its own names."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from support.api import Api
from support.client_use import ask, submitted, write

from raylaunch.client import Client
from raylaunch.errors import ConflictError, NotFoundError, TransferError


def test_outputs_are_downloaded_under_their_own_names_and_verified(api: Api, tmp_path: Path) -> None:
    job = submitted(api)
    write(api, job.id, "attempt-1/outputs/best/model.pt", b"weights")
    write(api, job.id, "attempt-1/logs/rank-0.log", b"log")
    (done,) = ask(api, lambda client: client.download(job.id, dest=tmp_path / "here"))
    assert (done.local, done.fetched, done.verified) == (tmp_path / "here" / "best" / "model.pt", True, True)
    assert done.local.read_bytes() == b"weights"


def test_of_two_attempts_the_later_output_is_downloaded(api: Api, tmp_path: Path) -> None:
    job = submitted(api)
    write(api, job.id, "attempt-1/outputs/model.pt", b"early")
    write(api, job.id, "attempt-2/outputs/model.pt", b"late")
    (done,) = ask(api, lambda client: client.download(job.id, dest=tmp_path / "here"))
    assert done.local.read_bytes() == b"late"


def test_a_file_that_is_here_is_not_fetched_again(api: Api, tmp_path: Path) -> None:
    job = submitted(api)
    write(api, job.id, "attempt-1/outputs/model.pt", b"weights")
    ask(api, lambda client: client.download(job.id, dest=tmp_path / "here"))
    (again,) = ask(api, lambda client: client.download(job.id, ["model.pt"], dest=tmp_path / "here"))
    assert not again.fetched


def test_a_file_that_is_there_is_not_replaced_where_that_is_not_wanted(api: Api, tmp_path: Path) -> None:
    job = submitted(api)
    write(api, job.id, "attempt-1/outputs/model.pt", b"weights")
    (tmp_path / "model.pt").write_bytes(b"mine")
    with pytest.raises(ConflictError, match=r"model\.pt is there already, and is something else"):
        ask(api, lambda client: client.download(job.id, dest=tmp_path, replace=False))
    assert (tmp_path / "model.pt").read_bytes() == b"mine"


def part_of(tmp_path: Path, data: bytes) -> Path:
    return tmp_path / f".model.pt.{hashlib.sha256(data).hexdigest()[:12]}.part"


def test_an_interrupted_download_goes_on_where_it_stopped(api: Api, tmp_path: Path) -> None:
    data = bytes(range(256)) * 8192
    job = submitted(api)
    write(api, job.id, "attempt-1/outputs/model.pt", data)
    part_of(tmp_path, data).write_bytes(data[:1_000_000])
    progress: list[int] = []

    async def download(client: Client) -> None:
        await client.download(job.id, dest=tmp_path, on_progress=lambda _what, done, _total: progress.append(done))

    ask(api, download)
    assert (tmp_path / "model.pt").read_bytes() == data
    assert progress[0] > 1_000_000
    assert not part_of(tmp_path, data).exists()


def test_a_download_with_another_checksum_is_refused_by_name_and_leaves_nothing(api: Api, tmp_path: Path) -> None:
    job = submitted(api)
    write(api, job.id, "attempt-1/outputs/model.pt", b"weights")
    part_of(tmp_path, b"weights").write_bytes(b"wrong!!")
    with pytest.raises(TransferError, match=r"attempt-1/outputs/model\.pt did not arrive as it was sent"):
        ask(api, lambda client: client.download(job.id, dest=tmp_path))
    assert list(tmp_path.glob("*model.pt*")) == []


def test_a_file_that_is_not_there_is_answered_with_the_nearest(api: Api, tmp_path: Path) -> None:
    job = submitted(api)
    write(api, job.id, "attempt-1/outputs/model.pt", b"weights")
    with pytest.raises(NotFoundError) as caught:
        ask(api, lambda client: client.download(job.id, ["modle.pt"], dest=tmp_path))
    assert caught.value.message == "the job has left no file 'modle.pt'"
    assert "model.pt" in caught.value.hint
