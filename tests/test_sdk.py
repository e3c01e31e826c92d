"""The SDK against the real API on a real port, without Ray."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.api import Api, token_of
from support.api_use import end, start, write

import raylaunch
from raylaunch import AsyncCluster, Cluster, Job, JobFailedError, JobState
from raylaunch.cluster.types import Endpoint
from raylaunch.errors import ClusterDownError, ConflictError, NotFoundError, SpecError
from raylaunch.models.job import JobView
from raylaunch.models.job_spec import JobSpec, Resources
from raylaunch.models.states import Change
from raylaunch.sdk.arguments import spec_of

pytest.importorskip("pandas", reason="needs pandas: pip install 'raylaunch[notebook]'")


@pytest.fixture
def cluster(api: Api) -> Iterator[Cluster]:
    with raylaunch.connect("test", reach=api.reach()) as connected:
        yield connected


def submitted(cluster: Cluster, name: str = "digits") -> Job:
    return cluster.submit("python -m train", name=name, working_dir="")


def log(api: Api, job: Job, data: bytes, n: int = 1) -> None:
    write(api, job.view, f"attempt-{n}/logs/rank-0.log", data, mode="ab")
    api.do(lambda: api.desk.grew(f"{job.id}-{n}"))


def report(api: Api, job: Job, change: Change, *, message: str, tail: tuple[str, ...] = ()) -> None:
    """End a job with words and last lines."""

    def over() -> None:
        attempts = tuple(
            each.model_copy(update={"ended_at": 2.0, "replicated": True, "exit_code": 7})
            for each in api.records.get(job.id).attempts
        )
        api.records.update(job.id, kind="ended", message=message, change=change, attempts=attempts, log_tail=tail)

    api.do(over)


def test_importing_raylaunch_loads_nothing_of_the_sdk() -> None:
    code = "import sys, raylaunch; sys.exit(any(name in sys.modules for name in ('pydantic', 'asyncio', 'pandas')))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_connecting_loads_neither_ray_nor_pandas() -> None:
    code = (
        "import sys, raylaunch; raylaunch.connect; sys.exit(any(m in sys.modules for m in ('ray', 'pandas', 'wandb')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_where_there_is_no_cluster_connecting_says_how_to_start_one(home: Path) -> None:
    assert home
    with pytest.raises(ClusterDownError) as caught:
        raylaunch.connect("nowhere", start=False)
    assert str(caught.value) == "there is no cluster here\n  → start it: raylaunch up"


def test_a_name_that_cannot_be_a_clusters_is_said() -> None:
    with pytest.raises(SpecError, match="'a/b' is not a cluster name"):
        raylaunch.connect("a/b")


def test_a_controller_that_does_not_answer_is_an_error_at_once(api: Api) -> None:
    with pytest.raises(ClusterDownError):
        raylaunch.connect(reach=Endpoint("http://127.0.0.1:9", token_of("tom")))
    assert api


def test_a_job_is_submitted_with_keywords_that_are_a_job_files_fields(cluster: Cluster) -> None:
    job = cluster.submit(
        ["python", "-m", "train"],
        gpus=2,
        resources=Resources(cpus=3),
        working_dir="",
        env={"SEED": "1"},
        timeout_s="2h",
        environment="conda:train",
        tags="night",
    )
    spec = job.status().spec
    assert spec == JobSpec(
        entrypoint=("python", "-m", "train"),
        resources=Resources(gpus=2, cpus=3),
        working_dir="",
        env={"SEED": "1"},
        timeout_s=7200,
        environment=JobSpec.model_validate({"entrypoint": "x", "environment": "conda:train"}).environment,
        tags=("night",),
    )


def test_keywords_lie_over_a_spec(tmp_path: Path) -> None:
    base = JobSpec(entrypoint="x", tags=("a",), env={"A": "1"}, resources=Resources(gpus=1, cpus=2), retries=3)
    spec = spec_of(base, {"tags": ["b"], "env": {"B": "2"}, "name": None}, gpus=4, cwd=tmp_path)
    assert (spec.tags, spec.env, spec.retries) == (("a", "b"), {"A": "1", "B": "2"}, 3)
    assert spec.resources == Resources(gpus=4, cpus=2)
    assert base.env == {"A": "1"}


def test_keywords_lie_over_a_job_file_whose_folder_is_packed(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("entrypoint: python train.py\nretries: 1\n")
    spec = spec_of(file, {"retries": 2}, cwd=tmp_path.parent)
    assert (spec.retries, spec.working_dir) == (2, str(tmp_path))


def test_a_value_that_cannot_be_is_said_with_its_field(cluster: Cluster) -> None:
    with pytest.raises(SpecError) as caught:
        cluster.submit("x", working_dir="", resources={"gpu": 1})
    assert str(caught.value) == "unknown key 'gpu' in resources (nearest: gpus)"
    with pytest.raises(SpecError, match="entrypoint: 5 is not text or a list"):
        cluster.submit(5, working_dir="")  # type: ignore[arg-type]  # what a person may pass all the same


def test_the_wandb_key_of_this_python_goes_along_with_its_server_and_is_not_shown(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    view = submitted(cluster).status()
    assert view.spec is not None
    assert view.spec.env == {"WANDB_BASE_URL": "https://wandb.example"}
    assert "k" * 40 not in view.model_dump_json()


def test_a_dry_run_creates_no_job(cluster: Cluster) -> None:
    assert cluster.dry_run("python -m train").message == "train would start on here at once"
    assert cluster.jobs() == ()


def test_jobs_are_listed_newest_first_and_over_pages(cluster: Cluster) -> None:
    jobs = [submitted(cluster, name) for name in ("a", "b", "a")]
    assert [job.id for job in cluster.jobs(limit=2)] == [jobs[2].id, jobs[1].id]
    assert [job.id for job in cluster.jobs(name="a", states=["queued"])] == [jobs[2].id, jobs[0].id]


def test_a_state_that_there_is_not_is_said_with_those_that_there_are(cluster: Cluster) -> None:
    with pytest.raises(SpecError, match=r"'done' is not a state\n  → known: held, queued"):
        cluster.jobs(states=["done"])


def test_a_job_is_found_by_id_name_and_last(cluster: Cluster) -> None:
    job = submitted(cluster)
    assert [cluster.job(ref).id for ref in (job.id, "digits", "last")] == [job.id] * 3
    with pytest.raises(NotFoundError):
        cluster.job("nothing-like-it")


def test_waiting_returns_the_job_however_it_ended(api: Api, cluster: Cluster) -> None:
    job = submitted(cluster)
    start(api, job.view)
    threading.Timer(0, lambda: report(api, job, Change.FAIL, message="the training exited with status 7")).start()
    ended = job.wait(timeout_s=30)
    assert ended.state is JobState.FAILED
    assert job.view == ended


def test_waiting_ends_at_its_limit(cluster: Cluster) -> None:
    job = submitted(cluster)
    with pytest.raises(TimeoutError, match=r"has not ended within 0\.2 s; it is still queued"):
        job.wait(timeout_s=0.2)


def test_the_result_of_a_job_that_failed_is_an_error_with_its_last_lines(api: Api, cluster: Cluster) -> None:
    job = submitted(cluster)
    start(api, job.view)
    report(api, job, Change.FAIL, message="the training exited with status 7", tail=("ab\x1b[31mout", "the end"))
    with pytest.raises(JobFailedError) as caught:
        job.result(timeout_s=30)
    error = caught.value
    assert str(error) == (
        f"{job.id} failed: the training exited with status 7\nits last lines:\n  | about\n  | the end\n"
        "  → print(job.logs()) shows more of its log, job.events() what happened to it"
    )
    assert (error.job, error.state, error.exit_code, error.log_tail) == (job.id, "failed", 7, ("about", "the end"))


def test_the_result_of_a_job_that_succeeded_is_its_outputs_and_they_can_be_fetched(
    api: Api, cluster: Cluster, tmp_path: Path
) -> None:
    job = submitted(cluster)
    start(api, job.view)
    write(api, job.view, "attempt-1/outputs/model.bin", b"weights")
    write(api, job.view, "attempt-1/logs/rank-0.log", b"a line\n")
    end(api, job.view)
    (output,) = job.result(timeout_s=30)
    (fetched,) = job.download(to=tmp_path / "model")
    assert output.bytes == 7
    assert fetched.local == tmp_path / "model" / "model.bin"
    assert fetched.local.read_bytes() == b"weights"


def test_events_are_those_so_far_and_following_ends_with_the_job(api: Api, cluster: Cluster) -> None:
    job = submitted(cluster)
    start(api, job.view)
    before = job.events()
    threading.Timer(0, lambda: end(api, job.view)).start()
    followed = list(job.follow())
    assert [event.kind for event in before] == [event.kind for event in followed[: len(before)]]
    assert followed[-1].state is JobState.SUCCEEDED


def test_the_log_is_read_from_its_end_and_whole(api: Api, cluster: Cluster) -> None:
    job = submitted(cluster)
    start(api, job.view)
    whole = "".join(f"line {n} — ü\n" for n in range(100_000))
    log(api, job, whole.encode())
    assert job.logs(tail=2) == "line 99998 — ü\nline 99999 — ü\n"
    assert job.logs(tail=None) == whole


def test_a_followed_log_comes_in_whole_lines(api: Api, cluster: Cluster) -> None:
    job = submitted(cluster)
    start(api, job.view)
    log(api, job, "one\nt\u00fc".encode()[:-1])
    lines = job.follow_logs()
    assert next(lines) == "one"
    log(api, job, "\u00fc".encode()[-1:] + b"wo\nlast")
    assert next(lines) == "tüwo"
    end(api, job.view)
    api.do(lambda: api.desk.grew(f"{job.id}-1"))
    assert list(lines) == ["last"]


def test_a_log_is_searched(api: Api, cluster: Cluster) -> None:
    job = submitted(cluster)
    start(api, job.view)
    log(api, job, b"good\nbad loss\n")
    found = job.search_logs("LOSS", ignore_case=True)
    assert [(match.offset, match.text) for match in found.matches] == [(5, "bad loss")]


def test_stopping_and_removing(cluster: Cluster) -> None:
    job = submitted(cluster)
    with pytest.raises(ConflictError):
        job.remove()
    assert job.stop(grace_s=1).state is JobState.STOPPED
    assert job.remove() > 0
    with pytest.raises(NotFoundError):
        job.status()


def test_a_job_without_metrics_says_so(cluster: Cluster) -> None:
    job = submitted(cluster)
    metrics = job.metrics()
    assert (metrics.last, repr(metrics)) == ({}, "<Metrics: nothing logged yet>")
    assert job.metrics_frame().empty
    assert metrics.to_pandas().empty


def test_a_blocking_verb_works_where_an_event_loop_runs(cluster: Cluster) -> None:
    async def in_a_notebook() -> JobView:
        return submitted(cluster).status()

    assert asyncio.run(in_a_notebook()).state is JobState.QUEUED


def test_a_blocking_verb_in_a_callback_is_refused_instead_of_waiting_for_itself(
    api: Api, cluster: Cluster, tmp_path: Path
) -> None:
    job = submitted(cluster)
    start(api, job.view)
    write(api, job.view, "attempt-1/outputs/model.bin", b"weights")
    end(api, job.view)

    def called_back(_what: str, _done: int, _total: int) -> None:
        job.status()

    with pytest.raises(RuntimeError, match="callback"):
        job.download(to=tmp_path, on_progress=called_back)


def test_several_threads_may_share_a_cluster(cluster: Cluster) -> None:
    ids: list[str] = []
    threads = [threading.Thread(target=lambda: ids.append(submitted(cluster).id)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(set(ids)) == 8


def test_the_asynchronous_verbs_do_the_same(api: Api) -> None:
    async def walk() -> list[str]:
        async with await raylaunch.aconnect("test", reach=api.reach()) as cluster:
            job = await cluster.submit("x", name="digits", working_dir="")
            await job.stop()
            kinds = [event.kind async for event in job.follow()]
            assert [other.id for other in await cluster.jobs()] == [job.id]
            assert (await job.wait()).state is JobState.STOPPED
            assert repr(job).startswith(f"<AsyncJob {job.id}: stopped")
            assert repr(cluster).startswith("<AsyncCluster test: ")
            return kinds

    assert asyncio.run(asyncio.wait_for(walk(), 60))


def test_an_asynchronous_cluster_that_does_not_answer_leaves_no_connection_open() -> None:
    async def refused() -> None:
        with pytest.raises(ClusterDownError):
            await AsyncCluster.connect(reach=Endpoint("http://127.0.0.1:9", "x"))

    asyncio.run(refused())
