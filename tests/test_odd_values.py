"""Values that no model should let in: numbers without an end, half characters, nesting, thousands of names."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import anyio
import httpx2
import pytest
from pydantic import BaseModel, ValidationError, create_model
from pydantic.fields import FieldInfo
from support.api import Api, serving
from support.api_use import submit, write
from support.run_writer import history, run, summary, write_run
from support.store import job_view

from raylaunch.agent.attempt_dir import read_json, sanitize
from raylaunch.client.transport import Response, page_from
from raylaunch.cluster.probe import parse_gpus as probe
from raylaunch.cluster.probe.facts import Clock
from raylaunch.cluster.probe.parse import read_facts
from raylaunch.cluster.probe.parse_gpus import read_gpus
from raylaunch.controller.__main__ import read_attempt_result
from raylaunch.controller.metrics.curves import KEYS_KEPT, ReportReader
from raylaunch.controller.metrics.reader import NAMES_KEPT, MetricsStore
from raylaunch.controller.ray import jobs_api, protocol
from raylaunch.controller.ray.calls import RayNode, node_view
from raylaunch.controller.ray.protocol import exit_from, facts_from, started_from
from raylaunch.controller.scheduler.attempt_context import AttemptResult
from raylaunch.controller.scheduler.finish import with_warnings
from raylaunch.controller.store import journal, record
from raylaunch.controller.store.artifacts import Artifacts, Left
from raylaunch.controller.store.jobs import Records
from raylaunch.controller.store.record import JobRecord
from raylaunch.errors import ClusterError, StorageError
from raylaunch.models import cluster, cluster_spec, fields, host_spec, job, job_spec
from raylaunch.models.fields import size_bytes
from raylaunch.models.job import AttemptView, JobPage, JobView, SubmitRequest
from raylaunch.models.job_spec import JobSpec, Resources
from raylaunch.models.states import Change
from raylaunch.tracking.protobuf import LONGEST_KEY
from raylaunch.tracking.run_file import History

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
    job_spec = value
    for name in reversed(field.split(".")):
        job_spec = f'{{"{name}": {job_spec}}}'
    body = f'{{"spec": {{"entrypoint": "true", {job_spec[1:]}}}'
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


FROM_OUTSIDE = (cluster_spec, cluster, host_spec, journal, protocol, jobs_api, record, job_spec, fields, job)


def models_from_outside() -> Iterator[type[BaseModel]]:
    """Yield every model that a client, a node, an attempt or Ray can fill."""
    for module in FROM_OUTSIDE:
        for one in vars(module).values():
            if isinstance(one, type) and issubclass(one, BaseModel) and one.__module__ == module.__name__:
                yield one


ANY_NUMBER = {("MetricPoint", "value"), ("MetricsPage", "last")}
"""As `last_metrics`. What a training logs may be NaN, and people want to see that; JSON has it as a text."""
READ_LATER = {("JournalLine", "record"), ("JournalLine", "heavy")}
"""JSON that becomes a `JobRecord`."""


ENDS = ("NaN", "Infinity", "-Infinity", "1e300", str(2**80), str(-(2**80)))


def made_of(field: FieldInfo, value: object) -> object:
    """Return what a field makes of a value; nothing where it refuses it."""
    try:
        return vars(create_model("One", x=(field.annotation or str, field))(x=value))["x"]
    except ValidationError:
        return None


def test_every_number_of_every_model_is_finite_and_has_bounds() -> None:
    unbounded = set()
    for model in models_from_outside():
        for name, field in model.model_fields.items():
            if name == "last_metrics" or (model.__name__, name) in ANY_NUMBER | READ_LATER:
                continue
            for place in ("{}", '{{"a": {}}}', "[{}]"):
                if numbers_in(made_of(field, json.loads(place.format(2)))):
                    taken = [end for end in ENDS if numbers_in(made_of(field, json.loads(place.format(end))))]
                    unbounded |= {(model.__name__, name) for _ in taken}
    assert unbounded == set()


def numbers_in(value: object) -> bool:
    """Return whether a value that was made of a number holds one: a text or a model made of it does not."""
    match value:
        case dict():
            return any(map(numbers_in, value.values()))
        case list() | tuple():
            return any(map(numbers_in, value))
        case _:
            return isinstance(value, int | float)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/jobs"),
        ("POST", "/v1/jobs/odd/stop"),
        ("POST", "/v1/quiet"),
        ("POST", "/v1/hosts/h/drain"),
        ("POST", "/v1/tokens"),
        ("POST", "/v1/join"),
        ("PUT", "/v1/secrets/A"),
    ],
)
def test_a_body_of_brackets_is_not_understood(ada: httpx2.Client, method: str, path: str) -> None:
    submit(ada, "odd")
    for body in (DEEP, '{"a": ' * 50_000, HUGE, '"\\ud800"', '{"\\ud800": 1}'):
        assert 400 <= ada.request(method, path, content=body).status_code < 500
    assert ada.get("/v1/health").status_code == 200


@pytest.mark.parametrize("word", ["%ED%A0%80", "%FF", "%00", "%F0%9F%98%80", "a" * 5000])
def test_odd_characters_in_a_path_or_a_question_are_answered(ada: httpx2.Client, word: str) -> None:
    for path in (
        f"/v1/jobs/{word}", f"/v1/jobs/{word}/logs", f"/v1/packages/{word}", f"/v1/hosts/{word}",
        f"/v1/jobs?name={word}", f"/v1/jobs?tag={word}", f"/v1/jobs?cursor={word}", f"/v1/jobs?state={word}",
        f"/v1/jobs?cursor=nan~{word}", f"/v1/events?job={word}", f"/v1/jobs?{word}={word}",
    ):  # fmt: skip
        answer = ada.get(path)
        assert answer.status_code < 500, path
        answer.json()


@pytest.mark.parametrize("name", ["Range", "If-None-Match", "Content-Type", "Authorization", "X-Raylaunch-Api"])
def test_odd_headers_are_answered(api: Api, ada: httpx2.Client, name: str) -> None:
    job = submit(ada, "headed")
    write(api, job, "attempt-1/outputs/a.bin", b"abc")
    for value in (b"\xff", b"\xed\xa0\x80", b"\xc2\xb2", b"9" * 5000, b"bytes=-" + b"9" * 5000, b"=" * 5000):
        for path in (f"/v1/jobs/{job.id}/files/attempt-1/outputs/a.bin", "/v1/status"):
            assert ada.get(path, headers=[(name.encode(), value)]).status_code < 500, value


# -- what is recorded ------------------------------------------------------------------------------------------------


def with_broken(store: Path) -> tuple[str, str]:
    """Make a store with one job that can be read, and one that an older version let in; return their ids."""
    records = Records(store)
    good, bad = (
        records.create(SubmitRequest(spec=JobSpec(entrypoint="true", name=name)), owner="ana", wandb=None)[0].id
        for name in ("good", "bad")
    )
    light = records._db.execute("SELECT light FROM jobs WHERE id = ?", (bad,)).fetchone()[0]  # noqa: SLF001 -- as 0.1.0 did
    reported = {**json.loads(light), "spec": {"entrypoint": "true", "timeout_s": math.inf}}
    records._db.execute("UPDATE jobs SET light = ? WHERE id = ?", (json.dumps(reported), bad))  # noqa: SLF001 -- as above
    records.close()
    return good, bad


def test_a_record_that_cannot_be_read_hides_no_other_and_is_named(tmp_path: Path) -> None:
    good, bad = with_broken(tmp_path)
    records = Records(tmp_path)
    try:
        page = records.page()
        assert ([job.id for job in page.jobs], page.unreadable, page.total) == ([good], (bad,), 2)
        assert [ask.job for ask in records.backlog] == [good]
        assert set(records.unfinished()) == {good, bad}
        assert any(bad in sentence for sentence in records.repairs)
        with pytest.raises(StorageError, match=r"timeout_s"):
            records.get(bad)
        assert {kept.id for kept in records.retention_rows()} == {good, bad}
    finally:
        records.close()


def test_a_list_over_http_names_what_it_leaves_out(api: Api, ada: httpx2.Client) -> None:
    bad = submit(ada, "left-out")
    api.do(lambda: api.records._db.execute("UPDATE jobs SET light = '{}' WHERE id = ?", (bad.id,)))  # noqa: SLF001 -- as above
    page = ada.get("/v1/jobs?name=left-out").json()
    assert (page["jobs"], page["unreadable"]) == ([], [bad.id])


def test_a_loss_that_is_no_number_does_not_stop_retention(tmp_path: Path) -> None:
    records = Records(tmp_path)
    try:
        job, _ = records.create(SubmitRequest(spec=JobSpec(entrypoint="true")), owner="ana", wandb=None)
        records.update(job.id, kind="ended", message="", change=Change.END_STOPPED, last_metrics={"loss": math.nan})
        (kept,) = records.retention_rows()
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


async def leavings_now(records: Records, record: JobRecord) -> AttemptResult:
    store = records.store
    return read_attempt_result(record, records, Artifacts(store), MetricsStore(store))


def test_a_record_keeps_some_of_very_many_metrics_and_says_so_once(tmp_path: Path) -> None:
    records = Records(tmp_path)
    try:
        job, _ = records.create(SubmitRequest(spec=JobSpec(entrypoint="true")), owner="ana", wandb=None)
        records.update(job.id, attempts=(AttemptView(id=f"{job.id}-1", n=1, admitted_at=1),))
        attempt = tmp_path / "jobs" / job.id / "attempt-1"
        rows = [history(n, {f"m{n}.{m}": 1.0 for m in range(500)}) for n in range(3)]
        write_run(attempt, [run(), *rows])
        left = anyio.run(leavings_now, records, records.by_id(job.id))
        assert len(left.last_metrics) == NAMES_KEPT
        (warning,) = left.warnings
        assert "500 metrics" in warning
        records.update(job.id, environment=with_warnings(records.by_id(job.id), left.warnings)["environment"])
        assert with_warnings(records.by_id(job.id), left.warnings) == {}
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
def test_an_impossible_report_is_skipped_and_the_next_is_read(tmp_path: Path, line: str) -> None:
    path = tmp_path / "progress.jsonl"
    path.write_text(f'{line}\n{{"at": 2, "step": 7, "metrics": {{"\\ud800": 1, "loss": NaN}}}}\n')
    report = ReportReader(path)
    (row,) = report.stream()
    assert isinstance(row, History)
    assert sorted(row.values) == ["?", "loss"]
    assert report.progress is not None
    assert (report.progress.step, report.progress.at) == (7, 2)
    assert report.skipped == 1


def test_what_an_attempt_wrote_into_its_records_is_made_plain_or_left_out(tmp_path: Path) -> None:
    path = tmp_path / "exit.json"
    path.write_text('{"message": "\\ud800!", "at": Infinity, "killed": 1e400, "list": [NaN]}')
    assert read_json(path) == {"message": "?!", "at": 0, "killed": 0, "list": [0]}
    path.write_text(DEEP)
    assert read_json(path) is None


def test_whole_numbers_of_hundreds_of_digits_are_made_plain_too() -> None:
    assert sanitize({"exit_code": 10**400, "list": [-(10**400), 7]}) == {"exit_code": 0, "list": [0, 7]}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
def test_a_row_whose_step_is_none_is_passed_over_and_the_next_is_read(tmp_path: Path, value: float) -> None:
    (tmp_path / "jobs" / "odd" / "attempt-1").mkdir(parents=True)
    odd = history(1, {"_step": value, "loss": 1.0})
    late = history(2, {"_timestamp": value, "global_step": 5, "loss": 2.0})
    axis = history(3, {"global_step": value, "loss": 3.0})
    write_run(tmp_path / "jobs" / "odd" / "attempt-1", [run(), odd, late, axis])
    page = MetricsStore(tmp_path).page(job_view("odd"), keys=["loss"])
    assert [(point.step, point.value) for point in page.series[0].points] == [(5, 2.0), (5, 3.0)]
    assert math.isfinite(page.last_step or 0)
    assert page.series[0].points[0].at == 0


def test_names_of_metrics_have_an_end_each_and_together(tmp_path: Path) -> None:
    attempt = tmp_path / "jobs" / "odd" / "attempt-1"
    names = {f"{n}": 1.0 for n in range(11_000)}
    write_run(attempt, [run(), history(0, {"x" * 10_000: 1.0, **names}), summary({f"s{n}": 1 for n in range(11_000)})])
    page = MetricsStore(tmp_path).page(job_view("odd"))
    assert len(page.keys) == len(page.last) == KEYS_KEPT
    assert max(map(len, page.keys)) == LONGEST_KEY


@pytest.mark.parametrize("size", ["Infinity", '"x"', "-1", "[]", HUGE[:400]])
def test_a_size_that_cannot_be_hides_no_other_output_that_was_left(tmp_path: Path, size: str) -> None:
    attempt = tmp_path / "jobs" / "odd" / "attempt-1"
    attempt.mkdir(parents=True)
    (attempt / "facts.json").write_text(f'{{"left": {{"a": {size}, "b": 3}}}}')
    assert Artifacts(tmp_path).left("odd").sizes["b"] == 3
    (attempt / "facts.json").write_text(f'{{"left": {DEEP}}}')
    assert Artifacts(tmp_path).left("odd") == Left(1)


def test_an_end_that_cannot_be_read_is_an_end_all_the_same() -> None:
    odd = exit_from({"ended": 5, "at": "yesterday"}, now=12.0)
    assert odd is not None
    assert (odd["ended"], odd["at"]) == ("runner_error", 12.0)
    assert exit_from(None, now=12.0) is None
    assert started_from({"pid": "x"}) is None
    assert facts_from({"python": ["/usr/bin/python"]}) is None


# -- what nodes and hosts report -------------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", [{"total": {"CPU": math.inf}}, {"total": {"memory": 2**80}}, {"total": {"x": -1}}])
def test_a_node_that_cannot_be_read_is_left_out(odd: dict[str, Any]) -> None:
    row = RayNode(id="a", alive=True, hostname="dgx", address="10.0.0.1", total={}, free={}, labels={}, logs="")
    assert node_view(row, None, agent_responds=False) is not None
    assert node_view(cast("RayNode", {**row, **odd}), None, agent_responds=False) is None


@pytest.mark.parametrize("text", [HUGE, "inf", "nan", "²"])
def test_a_number_of_a_host_that_is_none_is_not_known(text: str) -> None:
    table = f"index, memory.total [MiB], utilization.gpu [%]\n0, {text}, {text}\n"
    answer = probe.ProbeOutput(
        {"gpu_query": probe.Section(table, 0), "limits": probe.Section(rows=(("nofile", text, text),))}, complete=True
    )
    (gpu,) = read_gpus(answer).gpus
    assert read_facts(answer, clock=Clock(), took_s=1.0).nofile is None
    assert (gpu.memory_total, gpu.utilization) == (None, None)


@pytest.mark.parametrize("body", [b"", b"3", b'{"revoked": "x"}', DEEP.encode(), b'{"revoked": [1]}'])
def test_an_answer_of_a_controller_that_cannot_be_read_is_said(body: bytes) -> None:
    answer = Response(httpx2.Response(200, content=body, headers={"X-Have": HUGE}), "GET /")
    with pytest.raises(ClusterError, match="cannot be read"):
        answer.read(dict[str, int])
    assert answer.number("X-Have") == 0
