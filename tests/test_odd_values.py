"""Values that no model should let in: numbers without an end, half characters, nesting, thousands of names."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from pydantic import ValidationError
from support.api import Api, serving
from support.api_use import submit, write

from raylaunch.controller.link_events import exit_from, facts_from, started_from
from raylaunch.controller.records import Records
from raylaunch.controller.report_file import ReportFile
from raylaunch.errors import ClusterError, StorageError
from raylaunch.job_page import page_from
from raylaunch.node.folder import read_json
from raylaunch.spec import JobSpec, Resources
from raylaunch.state import Change, JobPage, JobView, SubmitRequest
from raylaunch.tracking.run_file import History
from raylaunch.units import size_bytes

DEEP = "[" * 200_000
HUGE = "9" * 5000


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving(tmp_path_factory.mktemp("store")) as running:
        yield running


@pytest.fixture
def ada(api: Api) -> Iterator[httpx2.Client]:
    with api.client("ada") as client:
        yield client


# -- what is asked for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", ["Infinity", "-Infinity", "NaN", "1e999", "1e300", HUGE, "-1", '"Infinity"', '"9e9d"']
)
@pytest.mark.parametrize("field", ["timeout_s", "grace_s", "resources.cpus", "resources.memory", "resources.custom.x"])
def test_a_number_without_an_end_is_refused_in_every_field(ada: httpx2.Client, field: str, value: str) -> None:
    spec = value
    for name in reversed(field.split(".")):
        spec = f'{{"{name}": {spec}}}'
    body = f'{{"spec": {{"entrypoint": "true", {spec[1:]}}}'
    assert ada.post("/v1/jobs", content=body).status_code == 422
    assert ada.get("/v1/jobs").json()["jobs"] == []


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/jobs/last/stop", '{"grace_s": Infinity}'),
        ("POST", "/v1/hosts/h/drain", '{"until": NaN}'),
        ("POST", "/v1/quiet", '{"limit_s": NaN}'),
        ("POST", "/v1/tokens", '{"person": "eve", "role": "viewer", "token_expires_at": Infinity}'),
        ("POST", "/v1/jobs", '{"spec": {"entrypoint": "\\ud800"}}'),
        ("POST", "/v1/jobs", '{"spec": {"entrypoint": "true", "env": {"A": "\\udfff"}}}'),
        ("GET", "/v1/jobs?since=nan", ""),
        ("GET", "/v1/jobs?since=inf", ""),
        ("GET", f"/v1/events?after={2**70}", ""),
        ("PUT", f"/v1/packages/{'0' * 64}?offset={2**70}&total={2**71}", ""),
    ],
)
def test_a_request_with_such_a_value_is_not_understood(ada: httpx2.Client, method: str, path: str, body: str) -> None:
    submit(ada, "odd")
    assert ada.request(method, path, content=body.encode()).status_code == 422


@pytest.mark.parametrize("query", [f"after={2**70}", f"wait_s={HUGE}", "wait_s=nan"])
def test_a_question_for_events_or_logs_with_such_a_number_is_not_understood(ada: httpx2.Client, query: str) -> None:
    job = submit(ada, "odd")
    assert ada.get(f"/v1/jobs/{job.id}/events?{query}").status_code == 422
    assert ada.get(f"/v1/jobs/{job.id}/logs?{query.replace('after', 'offset')}").status_code == 422
    assert ada.get(f"/v1/jobs/{job.id}/logs?rank={2**70}").status_code == 422


def test_a_range_of_thousands_of_digits_is_no_range(api: Api, ada: httpx2.Client) -> None:
    job = submit(ada, "ranged")
    write(api, job, "attempt-1/outputs/a.bin", b"abc")
    answer = ada.get(f"/v1/jobs/{job.id}/files/attempt-1/outputs/a.bin", headers={"Range": f"bytes={HUGE}-"})
    assert (answer.status_code, answer.content) == (200, b"abc")


def test_a_size_of_hundreds_of_digits_is_no_size() -> None:
    with pytest.raises(ValueError, match="more than any disk holds"):
        size_bytes(f"{HUGE}GiB")
    with pytest.raises(ValidationError):
        JobSpec(entrypoint="true", timeout_s=f"{HUGE}d")
    with pytest.raises(ValidationError):
        Resources(cpus=math.inf)


# -- what is recorded ------------------------------------------------------------------------------------------------


def with_broken(store: Path) -> tuple[str, str]:
    """Make a store with one job that can be read, and one that an older version let in; return their ids."""
    records = Records(store)
    good, bad = (
        records.create(SubmitRequest(spec=JobSpec(entrypoint="true", name=name)), owner="ana", wandb=None)[0].id
        for name in ("good", "bad")
    )
    light = records._db.execute("SELECT light FROM jobs WHERE id = ?", (bad,)).fetchone()[0]  # noqa: SLF001 -- as 0.1.0 did
    told = {**json.loads(light), "spec": {"entrypoint": "true", "timeout_s": math.inf}}
    records._db.execute("UPDATE jobs SET light = ? WHERE id = ?", (json.dumps(told), bad))  # noqa: SLF001 -- as above
    records.close()
    return good, bad


def test_a_record_that_cannot_be_read_hides_no_other_and_is_named(tmp_path: Path) -> None:
    good, bad = with_broken(tmp_path)
    records = Records(tmp_path)
    try:
        page = records.page()
        assert ([job.id for job in page.jobs], page.unreadable, page.total) == ([good], (bad,), 2)
        assert [record.id for record in records.unfinished()] == [good]
        assert any(bad in sentence for sentence in records.healed)
        with pytest.raises(StorageError, match=r"timeout_s"):
            records.get(bad)
        assert {kept.id for kept in records.kept()} == {good, bad}
    finally:
        records.close()


def test_a_loss_that_is_no_number_does_not_stop_retention(tmp_path: Path) -> None:
    records = Records(tmp_path)
    try:
        job, _ = records.create(SubmitRequest(spec=JobSpec(entrypoint="true")), owner="ana", wandb=None)
        records.update(job.id, kind="ended", message="", change=Change.END_STOPPED, last_metrics={"loss": math.nan})
        (kept,) = records.kept()
        assert kept.ended_at is not None
    finally:
        records.close()


def test_a_list_has_some_of_thousands_of_metrics_and_the_job_has_more(tmp_path: Path) -> None:
    records = Records(tmp_path)
    try:
        job, _ = records.create(SubmitRequest(spec=JobSpec(entrypoint="true")), owner="ana", wandb=None)
        records.update(job.id, last_metrics={f"m{n:05}": 1.0 for n in range(10_000)})
        (listed,) = records.page().jobs
        assert len(listed.last_metrics) < 100
    finally:
        records.close()


# -- what a client is told -------------------------------------------------------------------------------------------


def page_with(*jobs: object) -> bytes:
    return json.dumps({"jobs": jobs, "total": len(jobs)}).encode()


def test_a_client_leaves_out_what_it_cannot_read_and_names_it() -> None:
    good = JobView(id="a", name="a", owner="ana", state="queued", created_at=1, updated_at=1).model_dump(mode="json")
    odd = {**good, "id": "b", "spec": {"entrypoint": "true", "timeout_s": "Infinity"}}
    newer = {**good, "id": "c", "state": "paused"}
    page = page_from(page_with(good, odd, newer))
    assert ([job.id for job in page.jobs], page.unreadable) == (["a"], ("b", "c"))
    assert page_from(page_with(good)) == JobPage(jobs=(JobView.model_validate(good),), total=1)


@pytest.mark.parametrize("body", [b"", b"[]", b'{"jobs": 3}', b'{"jobs": [3]}', DEEP.encode()])
def test_what_is_no_page_of_jobs_is_said(body: bytes) -> None:
    with pytest.raises(ClusterError, match="not a page"):
        page_from(body)


# -- what attempts write ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", [DEEP, '{"at": Infinity, "step": 1}', '{"at": 1, "step": 1, "total": NaN}', HUGE])
def test_a_report_that_cannot_be_is_passed_over_and_the_next_is_read(tmp_path: Path, line: str) -> None:
    path = tmp_path / "progress.jsonl"
    path.write_text(f'{line}\n{{"at": 2, "step": 7, "metrics": {{"\\ud800": 1, "loss": NaN}}}}\n')
    report = ReportFile(path)
    (row,) = report.stream()
    assert isinstance(row, History)
    assert sorted(row.values) == ["?", "loss"]
    assert report.progress is not None
    assert (report.progress.step, report.progress.at) == (7, 2)
    assert report.problems


def test_what_an_attempt_wrote_into_its_records_is_made_plain_or_left_out(tmp_path: Path) -> None:
    path = tmp_path / "exit.json"
    path.write_text('{"message": "\\ud800!", "at": Infinity, "killed": 1e400, "list": [NaN]}')
    assert read_json(path) == {"message": "?!", "at": 0, "killed": 0, "list": [0]}
    path.write_text(DEEP)
    assert read_json(path) is None


def test_an_end_that_cannot_be_read_is_an_end_all_the_same() -> None:
    odd = exit_from({"ended": 5, "at": "yesterday"}, now=12.0)
    assert odd is not None
    assert (odd["ended"], odd["at"]) == ("runner_error", 12.0)
    assert exit_from(None, now=12.0) is None
    assert started_from({"pid": "x"}) is None
    assert facts_from({"python": ["/usr/bin/python"]}) is None
