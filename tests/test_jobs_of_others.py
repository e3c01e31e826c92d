"""A name means one's own jobs: nobody stops, removes or downloads somebody else's by it, in any interface."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from support.api import Api, serving, token_of
from support.api_use import end, error, start, submit, write
from support.client_use import ask

import raylaunch
from mcp_server.arguments import DownloadModel, JobLogs, MonitorJob, StopJob
from mcp_server.context import ToolCall, ToolProgress
from mcp_server.jobs import monitor_job, stop_job
from mcp_server.policy import roots_of
from mcp_server.render import Json
from mcp_server.results import download_model, job_logs
from raylaunch.cli.app import raylaunch as command_line
from raylaunch.client.client import Client
from raylaunch.cluster.processes import identify
from raylaunch.cluster.record import new_record, save_record
from raylaunch.errors import NotYoursError
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.models.job import JobView
from raylaunch.paths import cluster_paths, make_cluster_dirs, write_private


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving(tmp_path_factory.mktemp("store")) as running:
        yield running


@pytest.fixture
def theirs(api: Api) -> Iterator[JobView]:
    """An ended job of tom's, named ``shared``, of which olga (an operator) has none."""
    with api.client("tom") as tom:
        job = submit(tom, "shared")
        start(api, job)
        write(api, job, "attempt-1/outputs/model.pt", b"x")
        end(api, job)
        yield job
        tom.delete(f"/v1/jobs/{job.id}")


@pytest.fixture
def as_olga(api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home from which olga uses the cluster ``local``."""
    monkeypatch.setenv("RAYLAUNCH_HOME", str(tmp_path / "home"))
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    paths = cluster_paths("local")
    make_cluster_dirs(paths)
    port = int(api.url.rpartition(":")[2])
    record = new_record(ClusterSpec(), paths)
    save_record(paths, record.with_(wanted="running", controller=identify(os.getpid()), ports={"controller": port}))
    write_private(paths.token, token_of("olga"))


def still_there(api: Api, job: JobView) -> bool:
    with api.client("tom") as tom:
        return bool(tom.get(f"/v1/jobs/{job.id}").json()["state"] == "succeeded")


@pytest.mark.parametrize("ref", ["shared", "last"])
@pytest.mark.parametrize("change", ["stop", "remove", "own"])
def test_the_controller_changes_nothing_by_a_name_that_is_not_the_callers(
    api: Api, theirs: JobView, change: str, ref: str
) -> None:
    requests: dict[str, Callable[[httpx2.Client], httpx2.Response]] = {
        "stop": lambda olga: olga.post(f"/v1/jobs/{ref}/stop"),
        "remove": lambda olga: olga.delete(f"/v1/jobs/{ref}"),
        "own": lambda olga: olga.get(f"/v1/jobs/{ref}?own=true"),
    }
    with api.client("olga") as olga:
        status, code, message, hint = error(requests[change](olga))
    assert (status, code) == (409, "not_yours")
    assert theirs.id in message
    assert "tom's" in message
    assert theirs.id in hint
    assert still_there(api, theirs)


def test_by_its_id_an_operator_changes_it(api: Api, theirs: JobView) -> None:
    with api.client("olga") as olga:
        assert olga.delete(f"/v1/jobs/{theirs.id}").json()["removed"] == theirs.id


def test_a_later_job_of_somebody_else_with_that_name_changes_nothing(api: Api, theirs: JobView) -> None:
    with api.client("ada") as ada, api.client("tom") as tom:
        own = submit(ada, "shared")
        later = submit(tom, "shared")
        answer = ada.post("/v1/jobs/shared/stop")
        tom.post(f"/v1/jobs/{later.id}/stop")
        tom.delete(f"/v1/jobs/{later.id}")
        assert answer.json()["id"] == own.id
        assert "x-raylaunch-others-job" not in answer.headers
    assert still_there(api, theirs)


def test_what_reads_is_answered_and_says_whose_it_is_once(api: Api, theirs: JobView) -> None:
    messages: list[str] = []

    async def read() -> JobView:
        async with Client(api.reach("olga"), on_notice=messages.append) as client:
            await client.logs("shared", tail=10)
            await client.files("shared")
            return await client.wait("shared")

    assert asyncio.run(read()).id == theirs.id
    assert len(messages) == 1
    assert theirs.id in messages[0]
    assert "tom's" in messages[0]


def test_ones_own_job_is_read_without_a_word(api: Api, theirs: JobView) -> None:
    messages: list[str] = []

    async def read() -> None:
        async with Client(api.reach("tom"), on_notice=messages.append) as client:
            await client.job("shared")
        async with Client(api.reach("olga"), on_notice=messages.append) as client:
            await client.job(theirs.id)

    asyncio.run(read())
    assert messages == []


@pytest.mark.parametrize("verb", ["stop", "remove", "download"])
def test_a_handle_of_the_sdk_that_a_name_led_to_only_reads(
    api: Api, theirs: JobView, tmp_path: Path, verb: str
) -> None:
    messages: list[str] = []
    with raylaunch.connect("test", reach=api.reach("olga"), on_notice=messages.append) as cluster:
        job = cluster.job("shared")
        assert job.files()
        with pytest.raises(NotYoursError, match=theirs.id):
            job.download(to=tmp_path / "x") if verb == "download" else getattr(job, verb)()
        assert cluster.job(theirs.id).remove() >= 0
    assert "tom's" in messages[0]


@pytest.mark.usefixtures("as_olga")
@pytest.mark.parametrize("command", ["stop shared", "rm shared", "get shared", "stop last"])
def test_a_command_that_changes_refuses_the_name(api: Api, theirs: JobView, command: str) -> None:
    with pytest.raises(NotYoursError, match=theirs.id):
        command_line.main(command.split(), standalone_mode=False)
    assert still_there(api, theirs)
    assert not (Path.cwd() / theirs.id).exists()


@pytest.mark.usefixtures("as_olga", "theirs")
@pytest.mark.parametrize("command", ["show shared", "logs shared", "files shared", "metrics shared", "logs -f shared"])
def test_a_command_that_reads_says_whose_job_it_is(capsys: pytest.CaptureFixture[str], command: str) -> None:
    command_line.main(command.split(), standalone_mode=False)
    assert "tom's" in capsys.readouterr().err


@pytest.mark.usefixtures("as_olga")
def test_tools_refuse_the_name_where_they_change_and_mark_the_job_where_they_read(api: Api, theirs: JobView) -> None:
    async def tell(_news: ToolProgress) -> None:
        pass

    call = ToolCall(restarts=False, tell=tell, roots=roots_of({"HOME": "/nowhere"}, Path.cwd()))
    with pytest.raises(NotYoursError, match=theirs.id):
        asyncio.run(stop_job(StopJob(job="shared"), call))
    with pytest.raises(NotYoursError, match=theirs.id):
        asyncio.run(download_model(DownloadModel(job="shared"), call))
    answers: list[Json] = [
        asyncio.run(monitor_job(MonitorJob(job="shared"), call)),
        asyncio.run(job_logs(JobLogs(job="shared"), call)),
    ]
    for answer in answers:
        assert answer["yours"] is False
        assert "tom" in str(answer)
    assert "yours" not in asyncio.run(monitor_job(MonitorJob(job=theirs.id), call))
    assert still_there(api, theirs)


def test_a_person_reads_and_removes_her_own_by_name(api: Api, theirs: JobView) -> None:
    assert ask(api, lambda client: client.own_job("shared")).id == theirs.id
    assert ask(api, lambda client: client.remove("shared")) >= 0
