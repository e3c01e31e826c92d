"""The client fetches what jobs have left: whole, once, under its own names."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from functools import partial
from pathlib import Path
from urllib.parse import quote

import pytest
from support.any_head import any_head
from support.api import Api
from support.client_use import ask, submitted, write

from raylaunch.client.client import Client
from raylaunch.client.downloads import IncompleteDownloadError
from raylaunch.cluster.types import Endpoint
from raylaunch.errors import ConflictError, NotFoundError, StorageError, TransferError
from raylaunch.models.job import JobView
from raylaunch.models.job_spec import JobSpec
from raylaunch.models.states import JobState


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


def test_a_changed_file_is_kept_and_the_others_are_downloaded(api: Api, tmp_path: Path) -> None:
    job = submitted(api)
    write(api, job.id, "attempt-1/outputs/a.pt", b"weights")
    write(api, job.id, "attempt-1/outputs/b.pt", b"more weights")
    (tmp_path / "a.pt").write_bytes(b"mine")
    with pytest.raises(IncompleteDownloadError, match=r"a\.pt already exists with other content") as caught:
        ask(api, lambda client: client.download(job.id, dest=tmp_path))
    assert (tmp_path / "a.pt").read_bytes() == b"mine"
    assert [done.local.read_bytes() for done in caught.value.done] == [b"more weights"]
    assert list(caught.value.problems) == ["attempt-1/outputs/a.pt"]
    ask(api, lambda client: client.download(job.id, dest=tmp_path, replace=True))
    assert (tmp_path / "a.pt").read_bytes() == b"weights"


def test_earlier_downloads_are_updated_until_a_person_changes_them(api: Api, tmp_path: Path) -> None:
    job = submitted(api)
    write(api, job.id, "attempt-1/outputs/model.pt", b"early")
    ask(api, lambda client: client.download(job.id, dest=tmp_path))
    write(api, job.id, "attempt-2/outputs/model.pt", b"late")
    ask(api, lambda client: client.download(job.id, dest=tmp_path))
    assert (tmp_path / "model.pt").read_bytes() == b"late"
    write(api, job.id, "attempt-3/outputs/model.pt", b"later")
    (tmp_path / "model.pt").write_bytes(b"mine!")
    with pytest.raises(IncompleteDownloadError):
        ask(api, lambda client: client.download(job.id, dest=tmp_path))
    assert (tmp_path / "model.pt").read_bytes() == b"mine!"


def test_a_folder_with_another_jobs_files_is_refused(api: Api, tmp_path: Path) -> None:
    first, second = submitted(api), submitted(api)
    write(api, first.id, "attempt-1/outputs/model.pt", b"first")
    write(api, second.id, "attempt-1/outputs/other.pt", b"second")
    ask(api, lambda client: client.download(first.id, dest=tmp_path / "models"))
    with pytest.raises(ConflictError, match=f"has files of job {first.id}"):
        ask(api, lambda client: client.download(second.id, dest=tmp_path / "models"))
    assert not (tmp_path / "models" / "other.pt").exists()
    ask(api, lambda client: client.download(second.id, dest=tmp_path / "models", replace=True))
    assert (tmp_path / "models" / "other.pt").read_bytes() == b"second"


def test_a_file_name_with_a_line_feed_is_downloaded(api: Api, tmp_path: Path) -> None:
    job = submitted(api)
    write(api, job.id, "attempt-1/outputs/a\nb/c\n", b"odd")
    write(api, job.id, "attempt-1/outputs/model.pt", b"weights")
    done = ask(api, lambda client: client.download(job.id, dest=tmp_path))
    assert len(done) == 2
    assert (tmp_path / "a\nb" / "c\n").read_bytes() == b"odd"


def test_a_link_in_the_folder_is_not_followed(api: Api, tmp_path: Path) -> None:
    job = submitted(api)
    write(api, job.id, "attempt-1/outputs/best/authorized_keys", b"key")
    write(api, job.id, "attempt-1/outputs/model.pt", b"weights")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "file").write_bytes(b"mine")
    here = tmp_path / "here"
    here.mkdir()
    (here / "best").symlink_to(tmp_path / "secret")
    (here / "model.pt").symlink_to(tmp_path / "secret" / "file")
    for replace in (False, True):
        with pytest.raises(IncompleteDownloadError, match="it is a link"):
            ask(api, partial(Client.download, ref=job.id, dest=here, replace=replace))
        assert (tmp_path / "secret" / "file").read_bytes() == b"mine"
        assert [path.name for path in (tmp_path / "secret").iterdir()] == ["file"]
    assert not (here / "model.pt").is_symlink()  # replaced, not followed
    assert (here / "model.pt").read_bytes() == b"weights"


@pytest.mark.parametrize("plant", ["link", "hard link", "pipe", "other bytes"])
def test_a_planted_part_is_neither_followed_nor_waited_for(api: Api, tmp_path: Path, plant: str) -> None:
    job = submitted(api)
    write(api, job.id, "attempt-1/outputs/model.pt", b"weights")
    (tmp_path / "mine").write_bytes(b"wei")
    part = part_of(tmp_path / "here", b"weights")
    part.parent.mkdir()
    match plant:
        case "link":
            part.symlink_to(tmp_path / "mine")
        case "hard link":
            part.hardlink_to(tmp_path / "mine")
        case "pipe":
            os.mkfifo(part)
        case _:
            part.write_bytes(b"we")
    ask(api, lambda client: client.download(job.id, dest=tmp_path / "here"))
    assert (tmp_path / "mine").read_bytes() == b"wei"
    assert (tmp_path / "here" / "model.pt").read_bytes() == b"weights"


def test_a_folder_that_is_a_link_is_refused(api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = submitted(api)
    write(api, job.id, "attempt-1/outputs/authorized_keys", b"key")
    (tmp_path / "secret").mkdir()
    (tmp_path / "models").symlink_to(tmp_path / "secret")
    monkeypatch.chdir(tmp_path)
    for dest in (Path("models"), Path("models/digits"), tmp_path / "models"):
        with pytest.raises(StorageError, match="it is a link"):
            ask(api, partial(Client.download, ref=job.id, dest=dest))
    assert list((tmp_path / "secret").iterdir()) == []


def job_view(job: str = "digits-1") -> JobView:
    return JobView(id=job, name="digits", owner="tom", state=JobState.SUCCEEDED, created_at=1.0, updated_at=1.0)


def from_any_head(files: list[dict[str, object]], bodies: dict[str, bytes], dest: Path) -> IncompleteDownloadError:
    """Download all that a head offers which says what it likes; return what is said of it."""
    answers = {
        "/v1/jobs/digits-1": job_view().model_dump_json().encode(),
        "/v1/jobs/digits-1/files": json.dumps(files).encode(),
        **{f"/v1/jobs/digits-1/files/{quote(name)}": body for name, body in bodies.items()},
    }

    async def run(reach: Endpoint) -> None:
        async with Client(reach, cluster="test", patience_s=0) as client:
            await asyncio.wait_for(client.download("digits-1", dest=dest, everything=True), 30)

    with any_head(answers) as reach, pytest.raises(IncompleteDownloadError) as caught:
        asyncio.run(run(reach))
    return caught.value


BAD_NAMES = ["../up", "/etc/cron.d/x", "a/../../up", "a//b", "./a", "", "a\0b", "x" * 300, ".raylaunch/fetched.json"]


def test_names_of_the_head_that_lead_out_or_cannot_be_are_refused_one_by_one(tmp_path: Path) -> None:
    files: list[dict[str, object]] = [{"path": name, "bytes": 1, "kind": "output"} for name in [*BAD_NAMES, "good"]]
    error = from_any_head(files, {"good": b"x"}, tmp_path / "a" / "b")
    assert set(error.problems) == set(BAD_NAMES)
    assert [done.path for done in error.done] == ["good"]
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["fetched.json", "good"]


SHA = hashlib.sha256(b"x").hexdigest()
BAD_FACTS: list[tuple[dict[str, object], str]] = [
    ({"bytes": -1}, "size or checksum in the cluster is invalid"),
    ({"bytes": 1, "sha256": "../../x"}, "size or checksum in the cluster is invalid"),
    ({"bytes": 1, "sha256": SHA.upper()}, "size or checksum in the cluster is invalid"),
    ({"bytes": 2, "sha256": SHA}, "did not arrive as it was sent"),
    ({"bytes": 1, "sha256": SHA}, "did not arrive as it was sent"),
]


@pytest.mark.parametrize(("facts", "expected"), BAD_FACTS)
def test_sizes_and_checksums_of_the_head_must_be_true(tmp_path: Path, facts: dict[str, object], expected: str) -> None:
    error = from_any_head([{"path": "f", "kind": "output", **facts}], {"f": b"yy" * 50_000}, tmp_path / "here")
    assert expected in error.problems["f"]
    assert list((tmp_path / "here").iterdir()) == []


def test_a_growing_file_is_downloaded_up_to_the_announced_size(tmp_path: Path) -> None:
    files: list[dict[str, object]] = [
        {"path": "log", "bytes": 10, "kind": "log"},
        {"path": "../x", "bytes": 1, "kind": "log"},
    ]
    error = from_any_head(files, {"log": b"y" * 5_000_000}, tmp_path)
    assert error.done[0].local.read_bytes() == b"y" * 10


def part_of(tmp_path: Path, data: bytes) -> Path:
    return tmp_path / f".model.pt.{hashlib.sha256(data).hexdigest()[:12]}.part"


def test_an_interrupted_download_is_resumed(api: Api, tmp_path: Path) -> None:
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


def test_a_download_with_a_wrong_checksum_is_refused_and_deleted(api: Api, tmp_path: Path) -> None:
    job = submitted(api)
    write(api, job.id, "attempt-1/outputs/model.pt", b"weights")
    part_of(tmp_path, b"weights").write_bytes(b"wrong!!")
    with pytest.raises(TransferError, match=r"attempt-1/outputs/model\.pt': it did not arrive as it was sent"):
        ask(api, lambda client: client.download(job.id, dest=tmp_path))
    assert list(tmp_path.glob("*model.pt*")) == []


def test_a_file_that_is_not_there_is_answered_with_the_nearest(api: Api, tmp_path: Path) -> None:
    job = submitted(api)
    write(api, job.id, "attempt-1/outputs/model.pt", b"weights")
    with pytest.raises(NotFoundError) as caught:
        ask(api, lambda client: client.download(job.id, ["modle.pt"], dest=tmp_path))
    assert caught.value.message == "no file matches 'modle.pt' (nearest: model.pt)"


def test_a_suspected_secret_is_downloaded_only_by_its_full_name(api: Api, tmp_path: Path) -> None:
    job = submitted(api)
    write(api, job.id, "attempt-1/outputs/model.pt", b"weights")
    write(api, job.id, "attempt-1/facts.json", b'{"left": {"keys/id_rsa": 3}, "withheld": ["keys/id_rsa"]}')
    write(api, job.id, "attempt-1/withheld/keys/id_rsa", b"KEY")
    done = ask(api, lambda client: client.download(job.id, ["*"], dest=tmp_path / "all"))
    done += ask(api, lambda client: client.download(job.id, everything=True, dest=tmp_path / "all"))
    assert "id_rsa" not in {one.local.name for one in done}
    with pytest.raises(NotFoundError):
        ask(api, lambda client: client.download(job.id, ["keys"], dest=tmp_path / "all"))
    (one,) = ask(api, lambda client: client.download(job.id, ["keys/id_rsa"], dest=tmp_path / "one"))
    assert (one.local.read_bytes(), one.verified) == (b"KEY", True)


def test_a_name_means_ones_own_job_and_anothers_is_downloaded_by_its_id_alone(api: Api, tmp_path: Path) -> None:
    own = submitted(api, JobSpec(entrypoint="true", name="shared", working_dir=""))
    theirs = ask(
        api, lambda client: client.submit(JobSpec(entrypoint="true", name="shared", working_dir="")), person="olga"
    ).job
    only = ask(
        api, lambda client: client.submit(JobSpec(entrypoint="true", name="hers", working_dir="")), person="olga"
    ).job
    for job in (own, theirs, only):
        write(api, job.id, "attempt-1/outputs/model.pt", job.id.encode())
    (done,) = ask(api, lambda client: client.download("shared", dest=tmp_path / "a"))
    assert done.local.read_bytes() == own.id.encode()
    with pytest.raises(ConflictError, match=f"the latest is {only.id}, which is olga's"):
        ask(api, lambda client: client.download("hers", dest=tmp_path / "b"))
    (done,) = ask(api, lambda client: client.download(only.id, dest=tmp_path / "b"))
    assert done.local.read_bytes() == only.id.encode()
