"""The HTTP API as a client meets it: real sockets, real stores."""

from __future__ import annotations

import hashlib
import json
import math
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from support.api import Api, serving, token_of, write_tokens
from support.waiting import wait_until

from raylaunch.state import (
    Artifact,
    AttemptView,
    Change,
    EventPage,
    JobPage,
    JobView,
    LogMatches,
    MetricsPage,
    SubmitAnswer,
    UsagePage,
)
from raylaunch.version import __version__


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving(tmp_path_factory.mktemp("store")) as running:
        yield running


@pytest.fixture
def tom(api: Api) -> Iterator[httpx2.Client]:
    with api.client("tom") as client:
        yield client


def submit(client: httpx2.Client, name: str = "digits", **fields: object) -> JobView:
    body = {"spec": {"name": name, "entrypoint": "python train.py"}, **fields}
    answer = client.post("/v1/jobs", json=body)
    assert answer.status_code == 200, answer.text
    return SubmitAnswer.model_validate_json(answer.content).job


def start(api: Api, job: JobView, n: int = 1) -> AttemptView:
    """Let the job have a running attempt."""
    attempt = AttemptView(id=f"{job.id}-{n}", n=n, admitted_at=1.0)

    def admit() -> None:
        earlier = api.records.get(job.id).attempts
        api.records.update(job.id, kind="admitted", change=Change.ADMIT, attempts=(*earlier, attempt))
        api.records.update(job.id, kind="started", change=Change.START)

    api.do(admit)
    return attempt


def end(api: Api, job: JobView, change: Change = Change.SUCCEED) -> None:
    def over() -> None:
        attempts = api.records.get(job.id).attempts
        last = tuple(each.model_copy(update={"ended_at": 2.0, "replicated": True}) for each in attempts)
        api.records.update(job.id, kind="ended", message="it ended", change=change, attempts=last)

    api.do(over)


def write(api: Api, job: JobView, path: str, content: bytes, *, mode: str = "wb") -> None:
    file = api.store / "jobs" / job.id / path
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open(mode) as opened:
        opened.write(content)


def error(answer: httpx2.Response) -> tuple[int, str, str, str]:
    body = answer.json()["error"]
    return answer.status_code, body["code"], body["message"], body["hint"]


def later(work: Callable[[], httpx2.Response]) -> Callable[[], httpx2.Response]:
    """Begin a request in a thread; the returned function waits for its answer."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(work)
    pool.shutdown(wait=False)
    return lambda: future.result(40)


def listening(api: Api) -> int:
    """Return how many requests wait for news."""
    return api.do(lambda: len(api.records._changed))  # noqa: SLF001 -- that a request has begun to wait shows nowhere else


# -- the gate --------------------------------------------------------------------------------------------------------

PATHS = ("/", "/v1/status", "/v1/openapi.json", "/openapi.json", "/docs", "/redoc", "/v1/jobs", "/v1/events", "/none")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "BREW"])
def test_without_a_token_every_path_answers_401(api: Api, method: str, path: str) -> None:
    answer = httpx2.request(method, api.url + path, trust_env=False)
    assert error(answer) == (
        401,
        "access",
        "the request carries no token",
        "send 'Authorization: Bearer TOKEN'; raylaunch's own commands take it from the cluster's folder",
    )
    assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_with_an_unknown_token_every_path_answers_401(api: Api) -> None:
    for path in PATHS:
        answer = httpx2.get(api.url + path, headers={"Authorization": "Bearer wrong"}, trust_env=False)
        assert error(answer)[:3] == (401, "access", "the token is not one of this cluster's")


def test_a_websocket_without_a_token_is_refused(api: Api) -> None:
    with socket.create_connection(("127.0.0.1", int(api.url.rpartition(":")[2])), 10) as connection:
        connection.sendall(
            b"GET /v1/status HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 401")


def test_tokens_that_change_are_believed_at_once(tmp_path: Path) -> None:
    with serving(tmp_path) as api, api.client("tom") as tom, api.client("nora") as nora:
        assert (tom.get("/v1/status").status_code, nora.get("/v1/status").status_code) == (200, 401)
        write_tokens(tmp_path, {"nora": "viewer"})
        assert (tom.get("/v1/status").status_code, nora.get("/v1/status").status_code) == (401, 200)
        (tmp_path / "tokens.json").write_text("{")
        assert nora.get("/v1/status").status_code == 200


def test_every_answer_says_version_and_protocol(tom: httpx2.Client) -> None:
    for path in ("/v1/status", "/v1/jobs/none", "/none"):
        headers = tom.get(path).headers
        assert (headers["X-Raylaunch-Version"], headers["X-Raylaunch-Api"]) == (__version__, "1")


@pytest.mark.parametrize(
    ("protocol", "hint"),
    [
        ("2", "raylaunch up starts a controller of the client's version; running jobs go on"),
        ("0", f"install the controller's version on the client's side: pip install raylaunch=={__version__}"),
    ],
)
def test_a_client_of_another_protocol_is_told_what_to_do(api: Api, protocol: str, hint: str) -> None:
    headers = {"X-Raylaunch-Api": protocol, "X-Raylaunch-Version": "9.9"}
    with api.client("tom", **headers) as client:
        assert error(client.get("/v1/status")) == (
            409,
            "version",
            (
                f"the client is raylaunch 9.9 and the controller {__version__}: "
                f"they do not speak the same protocol ({protocol} there, 1 here)"
            ),
            hint,
        )


def test_the_api_describes_itself(tom: httpx2.Client) -> None:
    described = tom.get("/v1/openapi.json").json()
    assert set(described["paths"]) >= {"/v1/jobs", "/v1/jobs/{ref}/logs", "/v1/packages/{sha}", "/v1/events"}
    assert "JobView" in described["components"]["schemas"]


def test_a_path_and_a_method_that_do_not_exist_answer_in_the_same_form(tom: httpx2.Client) -> None:
    hint = "GET /v1/openapi.json lists what there is"
    assert error(tom.get("/none")) == (404, "not_found", "there is no /none here", hint)
    assert error(tom.delete("/v1/status")) == (405, "error", "DELETE /v1/status: Method Not Allowed", hint)


def test_what_is_not_understood_is_said_without_repeating_a_secret(tom: httpx2.Client) -> None:
    body = {"spec": {"entrypoint": "true"}, "secrets": {"KEY": ["planted-secret"]}, "colour": "planted-secret"}
    answer = tom.post("/v1/jobs", json=body)
    assert error(answer)[:3] == (
        422,
        "spec",
        (
            "the request is not understood: secrets.KEY: Input should be a valid string; "
            "colour: Extra inputs are not permitted"
        ),
    )
    assert "planted-secret" not in answer.text


def test_a_body_that_is_too_large_is_refused_before_it_is_read(tom: httpx2.Client) -> None:
    answer = tom.post("/v1/jobs", content=b"x" * (17 * 1024 * 1024))
    assert error(answer)[:3] == (422, "spec", "the request's body is larger than 16 MiB")


# -- roles -----------------------------------------------------------------------------------------------------------


def test_a_viewer_reads_and_may_not_submit(api: Api, tom: httpx2.Client) -> None:
    job = submit(tom)
    with api.client("vera") as vera:
        for path in ("", "/events", "/logs", "/metrics", "/files"):
            assert vera.get(f"/v1/jobs/{job.id}{path}").status_code == 200
        assert error(vera.post("/v1/jobs", json={"spec": {"entrypoint": "true"}})) == (
            403,
            "access",
            "vera is a viewer and may not submit jobs",
            "it takes the role trainer; ask whoever runs this cluster for such a token",
        )


def test_a_trainer_stops_own_jobs_and_an_operator_anybodys(api: Api, tom: httpx2.Client) -> None:
    job = submit(tom)
    with api.client("tina") as tina, api.client("olga") as olga:
        assert error(tina.post(f"/v1/jobs/{job.id}/stop")) == (
            403,
            "access",
            f"tina may not stop {job.id}, which is tom's",
            "its owner may, and whoever has the role operator",
        )
        assert error(tina.delete(f"/v1/jobs/{job.id}"))[2] == f"tina may not remove {job.id}, which is tom's"
        stopped = olga.post(f"/v1/jobs/{job.id}/stop", json={"grace_s": 3})
        assert stopped.json()["message"] == "olga asked to stop it, grace 3.0"
        assert tom.post(f"/v1/jobs/{submit(tom).id}/stop").json()["state"] == "stopped"


@pytest.mark.parametrize(
    ("method", "path", "what"),
    [
        ("GET", "/v1/ray", "use Ray's own tools"),
        ("GET", "/v1/secrets", "see the names of secrets"),
        ("PUT", "/v1/secrets/A", "set secrets"),
        ("DELETE", "/v1/secrets/A", "delete secrets"),
    ],
)
def test_ray_and_secrets_take_an_operator(tom: httpx2.Client, method: str, path: str, what: str) -> None:
    answer = tom.request(method, path, json={"value": "x"} if method == "PUT" else None)
    assert error(answer)[:3] == (403, "access", f"tom is a trainer and may not {what}")


def test_an_admin_may_everything(api: Api) -> None:
    with api.client("ada") as ada:
        assert ada.get("/v1/ray").json()["dashboard_url"] == "http://127.0.0.1:2"
        assert ada.get("/v1/status").json()["role"] == "admin"
        assert submit(ada).owner == "ada"


# -- jobs ------------------------------------------------------------------------------------------------------------


def test_a_job_is_submitted_found_and_listed(tom: httpx2.Client) -> None:
    job = submit(tom, "found")
    for ref in (job.id, "found", "last"):
        assert JobView.model_validate_json(tom.get(f"/v1/jobs/{ref}").content) == job
    page = JobPage.model_validate_json(tom.get("/v1/jobs", params={"name": "found", "state": "queued,running"}).content)
    assert [listed.id for listed in page.jobs] == [job.id]


def test_last_is_the_callers_own(api: Api, tom: httpx2.Client) -> None:
    with api.client("tina") as tina:
        mine = submit(tina)
        submit(tom)
        assert tina.get("/v1/jobs/last").json()["id"] == mine.id


def test_a_request_id_makes_one_job(tom: httpx2.Client) -> None:
    body = {"spec": {"entrypoint": "true"}, "request_id": "once"}
    answers = [tom.post("/v1/jobs", json=body).json() for _ in range(2)]
    assert [answer["created"] for answer in answers] == [True, False]
    assert answers[0]["job"]["id"] == answers[1]["job"]["id"]
    other = {"spec": {"entrypoint": "false"}, "request_id": "once"}
    assert error(tom.post("/v1/jobs", json=other))[:2] == (409, "conflict")


def test_a_dry_run_says_where_and_takes_nothing_in(tom: httpx2.Client) -> None:
    before = tom.get("/v1/jobs").json()["total"]
    answer = tom.post("/v1/jobs?dry_run=true", json={"spec": {"name": "dry", "entrypoint": "true"}})
    assert answer.json() == {"fits": ["here"], "message": "dry would start on here at once"}
    assert tom.get("/v1/jobs").json()["total"] == before


def test_an_unknown_job_and_an_unknown_state_say_what_there_is(tom: httpx2.Client) -> None:
    submit(tom, "nearby")
    assert error(tom.get("/v1/jobs/naerby")) == (
        404, "not_found", "there is no job 'naerby'", "did you mean nearby?"
    )  # fmt: skip
    assert error(tom.get("/v1/jobs?state=dead")) == (
        422,
        "spec",
        "there is no state 'dead'",
        "states are held, queued, starting, running, stopping, succeeded, failed, stopped, timed_out, lost",
    )


def test_removing_a_job_deletes_its_files_and_one_that_runs_stays(api: Api, tom: httpx2.Client) -> None:
    job = submit(tom)
    write(api, job, "attempt-1/outputs/model.pt", b"x" * 1000)
    assert error(tom.delete(f"/v1/jobs/{job.id}"))[:2] == (409, "conflict")
    tom.post(f"/v1/jobs/{job.id}/stop")
    removed = tom.delete(f"/v1/jobs/{job.id}").json()
    assert removed["removed"] == job.id
    assert removed["bytes"] > 1000
    assert tom.get(f"/v1/jobs/{job.id}").status_code == 404
    wait_until(lambda: not (api.store / "trash").exists(), 10, "the job's files are deleted")
    assert not (api.store / "jobs" / job.id).exists()


def test_a_loss_that_is_not_a_number_reaches_the_client(api: Api, tom: httpx2.Client) -> None:
    job = submit(tom)
    api.do(lambda: api.records.update(job.id, last_metrics={"loss": math.nan, "best": -math.inf}))
    answer = tom.get(f"/v1/jobs/{job.id}")
    assert json.loads(answer.text, parse_constant=pytest.fail)["last_metrics"]["loss"] == "NaN"
    metrics = JobView.model_validate_json(answer.content).last_metrics
    assert math.isnan(metrics["loss"])
    assert metrics["best"] == -math.inf


# -- events ----------------------------------------------------------------------------------------------------------


def test_events_after_a_cursor_come_at_once(tom: httpx2.Client) -> None:
    job = submit(tom)
    page = EventPage.model_validate_json(tom.get(f"/v1/jobs/{job.id}/events?wait_s=25").content)
    assert [event.kind for event in page.events] == ["submitted"]
    assert page.cursor == job.cursor


def test_a_long_poll_answers_when_something_happens(api: Api, tom: httpx2.Client) -> None:
    job = submit(tom)
    before = listening(api)
    with api.client("vera") as vera:
        answer = later(lambda: vera.get(f"/v1/jobs/{job.id}/events?after={job.cursor}&wait_s=25"))
        wait_until(lambda: listening(api) > before, 10, "the poll waits")
        tom.post(f"/v1/jobs/{job.id}/stop")
        assert [event["kind"] for event in answer().json()["events"]] == ["ended"]


def test_a_long_poll_without_news_answers_empty_with_the_same_cursor(tom: httpx2.Client) -> None:
    job = submit(tom)
    answer = tom.get(f"/v1/jobs/{job.id}/events?after={job.cursor}&wait_s=0.1")
    assert answer.json() == {"events": [], "cursor": job.cursor}


def messages(lines: Iterator[str], count: int) -> list[dict[str, str]]:
    """Read events off a stream."""
    found: list[dict[str, str]] = []
    fields: dict[str, str] = {}
    for line in lines:
        if not line:
            if "id" in fields:
                found.append(fields)
            if len(found) == count:
                return found
            fields = {}
            continue
        name, _, value = line.partition(": ")
        fields[name] = value
    pytest.fail(f"the stream ended after {len(found)} events")


def test_the_stream_tells_events_as_they_happen_and_goes_on_from_a_cursor(api: Api, tom: httpx2.Client) -> None:
    first = submit(tom)
    with api.client("vera") as vera:
        with vera.stream("GET", f"/v1/events?after={first.cursor - 1}") as stream:
            assert stream.headers["Content-Type"].startswith("text/event-stream")
            lines = stream.iter_lines()
            (seen,) = messages(lines, 1)
            assert (seen["id"], seen["event"]) == (str(first.cursor), "submitted")
            assert json.loads(seen["data"])["job"] == first.id
            second = submit(tom)
            assert json.loads(messages(lines, 1)[0]["data"])["job"] == second.id
        with vera.stream("GET", "/v1/events?after=0", headers={"Last-Event-ID": str(first.cursor)}) as stream:
            assert messages(stream.iter_lines(), 1)[0]["id"] == str(second.cursor)


def test_waiting_requests_end_at_once_when_the_server_stops(tmp_path: Path) -> None:
    with serving(tmp_path) as api, api.client("tom") as tom, api.client("vera") as vera, api.client("tina") as tina:
        job = submit(tom)
        start(api, job)
        cursor = api.do(lambda: api.records.cursor)
        poll = later(lambda: tom.get(f"/v1/jobs/{job.id}/events?after={cursor}&wait_s=25"))
        log = later(lambda: vera.get(f"/v1/jobs/{job.id}/logs?wait_s=25"))
        stream = later(lambda: tina.get("/v1/events"))
        wait_until(lambda: listening(api) == 3, 10, "all three wait")
        api.stop()
        assert poll().json() == {"events": [], "cursor": cursor}
        assert log().status_code == 200
        assert stream().status_code == 200


# -- logs ------------------------------------------------------------------------------------------------------------


def test_a_log_comes_as_it_was_written_with_where_to_go_on(api: Api, tom: httpx2.Client) -> None:
    job = submit(tom)
    start(api, job)
    content = b"\xff\xfe no text\n10%\r20%\r\nlast"
    write(api, job, "attempt-1/logs/rank-0.log", content)
    answer = tom.get(f"/v1/jobs/{job.id}/logs?limit=5")
    assert answer.content == content[:5]
    names = ("Offset", "Next", "Size", "Attempt", "Ended")
    assert [answer.headers[f"X-Log-{name}"] for name in names] == ["0", "5", str(len(content)), "1", "0"]
    assert tom.get(f"/v1/jobs/{job.id}/logs?offset=5").content == content[5:]
    assert tom.get(f"/v1/jobs/{job.id}/logs?tail=1").content == b"last"


def test_following_a_log_answers_when_it_grows_and_when_it_is_over(api: Api, tom: httpx2.Client) -> None:
    job = submit(tom)
    attempt = start(api, job)
    write(api, job, "attempt-1/logs/rank-0.log", b"one\n")
    before = listening(api)
    answer = later(lambda: tom.get(f"/v1/jobs/{job.id}/logs?offset=4&wait_s=25"))
    wait_until(lambda: listening(api) > before, 10, "the follower waits")
    write(api, job, "attempt-1/logs/rank-0.log", b"two\n", mode="ab")
    api.do(lambda: api.desk.grew(attempt.id))
    assert (answer().content, answer().headers["X-Log-Ended"]) == (b"two\n", "0")
    over = later(lambda: tom.get(f"/v1/jobs/{job.id}/logs?offset=8&wait_s=25"))
    wait_until(lambda: listening(api) > before, 10, "the follower waits again")
    end(api, job)
    assert (over().content, over().headers["X-Log-Ended"]) == (b"", "1")


def test_the_log_of_a_job_that_waits_is_empty_until_its_attempt_starts(api: Api, tom: httpx2.Client) -> None:
    job = submit(tom)
    answer = tom.get(f"/v1/jobs/{job.id}/logs")
    assert (answer.content, answer.headers["X-Log-Attempt"], answer.headers["X-Log-Ended"]) == (b"", "0", "0")
    before = listening(api)
    follow = later(lambda: tom.get(f"/v1/jobs/{job.id}/logs?wait_s=25"))
    wait_until(lambda: listening(api) > before, 10, "the follower waits")
    write(api, job, "attempt-1/logs/rank-0.log", b"begun\n")
    start(api, job)
    assert (follow().content, follow().headers["X-Log-Attempt"]) == (b"begun\n", "1")


def test_an_earlier_attempts_log_is_over_and_one_that_never_was_is_said(api: Api, tom: httpx2.Client) -> None:
    job = submit(tom)
    start(api, job)
    write(api, job, "attempt-1/logs/rank-0.log", b"first\n")

    def retry() -> None:
        (attempt,) = api.records.get(job.id).attempts
        ended = attempt.model_copy(update={"ended_at": 2.0})
        api.records.update(job.id, kind="retry", change=Change.REQUEUE, attempts=(ended,))

    api.do(retry)
    start(api, job, 2)
    answer = tom.get(f"/v1/jobs/{job.id}/logs?attempt=1&wait_s=25")
    assert (answer.content, answer.headers["X-Log-Ended"]) == (b"first\n", "1")
    assert error(tom.get(f"/v1/jobs/{job.id}/logs?attempt=3")) == (
        404,
        "not_found",
        f"{job.id} has no attempt 3",
        "it has 2",
    )


def test_a_log_is_searched(api: Api, tom: httpx2.Client) -> None:
    job = submit(tom)
    start(api, job)
    write(api, job, "attempt-1/logs/rank-0.log", b"loss 1\nacc 2\nLOSS 3\n")
    answer = tom.get(f"/v1/jobs/{job.id}/logs/search", params={"pattern": "^loss", "regex": 1, "ignore_case": 1})
    found = LogMatches.model_validate_json(answer.content)
    assert [match.text for match in found.matches] == ["loss 1", "LOSS 3"]
    assert error(tom.get(f"/v1/jobs/{job.id}/logs/search", params={"pattern": ""}))[1] == "spec"


def test_a_log_from_tail_and_offset_at_once_is_refused(tom: httpx2.Client) -> None:
    job = submit(tom)
    assert error(tom.get(f"/v1/jobs/{job.id}/logs?tail=1&offset=0"))[2] == (
        "a log is read from its tail or from an offset, not both"
    )


# -- metrics and files -----------------------------------------------------------------------------------------------


def test_metrics_of_a_job_that_has_none_are_empty(tom: httpx2.Client) -> None:
    job = submit(tom)
    page = MetricsPage.model_validate_json(tom.get(f"/v1/jobs/{job.id}/metrics?key=loss").content)
    assert page.keys == ()
    csv = tom.get(f"/v1/jobs/{job.id}/metrics.csv?key=loss")
    assert csv.headers["Content-Type"].startswith("text/csv")
    assert csv.text.splitlines() == ["step,at,key,value"]


def test_files_are_listed_and_sent_with_their_checksum(api: Api, tom: httpx2.Client) -> None:
    job = submit(tom)
    content = bytes(range(256)) * 10_000
    write(api, job, "attempt-1/outputs/a folder/größe.bin", content)
    api.do(lambda: api.services.artifacts.seal(job.id))
    listed = [Artifact.model_validate(item) for item in tom.get(f"/v1/jobs/{job.id}/files").json()]
    (output,) = [artifact for artifact in listed if artifact.kind == "output"]
    answer = tom.get(f"/v1/jobs/{job.id}/files/{output.path}")
    assert answer.content == content
    assert answer.headers["X-Sha256"] == output.sha256 == hashlib.sha256(content).hexdigest()
    assert tom.get(f"/v1/jobs/{job.id}/files/a folder/größe.bin").content == content
    head = tom.head(f"/v1/jobs/{job.id}/files/{output.path}")
    assert (head.headers["Content-Length"], head.content) == (str(len(content)), b"")


@pytest.mark.parametrize(
    ("span", "status", "content", "where"),
    [
        ("bytes=2-4", 206, b"234", "bytes 2-4/10"),
        ("bytes=7-", 206, b"789", "bytes 7-9/10"),
        ("bytes=7-99", 206, b"789", "bytes 7-9/10"),
        ("bytes=-3", 206, b"789", "bytes 7-9/10"),
        ("bytes=0-0", 206, b"0", "bytes 0-0/10"),
        ("bytes=0-1,3-4", 200, b"0123456789", None),
        ("lines=1-2", 200, b"0123456789", None),
    ],
)
def test_a_range_of_a_file(  # noqa: PLR0913, PLR0917 -- each is one column of the table
    api: Api, tom: httpx2.Client, span: str, status: int, content: bytes, where: str | None
) -> None:
    job = submit(tom)
    write(api, job, "attempt-1/outputs/f", b"0123456789")
    answer = tom.get(f"/v1/jobs/{job.id}/files/f", headers={"Range": span})
    assert (answer.status_code, answer.content, answer.headers.get("Content-Range")) == (status, content, where)


def test_a_range_beyond_the_end_is_416_and_a_changed_file_is_sent_whole(api: Api, tom: httpx2.Client) -> None:
    job = submit(tom)
    write(api, job, "attempt-1/outputs/f", b"0123456789")
    url = f"/v1/jobs/{job.id}/files/f"
    beyond = tom.get(url, headers={"Range": "bytes=10-"})
    assert (beyond.status_code, beyond.headers["Content-Range"]) == (416, "bytes */10")
    etag = tom.get(url).headers["ETag"]
    assert tom.get(url, headers={"Range": "bytes=5-", "If-Range": etag}).status_code == 206
    write(api, job, "attempt-1/outputs/f", b"abcdefghijk")
    assert tom.get(url, headers={"Range": "bytes=5-", "If-Range": etag}).content == b"abcdefghijk"


@pytest.mark.parametrize("path", ["..%2f..%2ftokens.json", "%2e%2e/%2e%2e/tokens.json", "%2fetc%2fpasswd", "a%00b"])
def test_no_file_outside_the_job_is_sent(tom: httpx2.Client, api: Api, path: str) -> None:
    job = submit(tom)
    with socket.create_connection(("127.0.0.1", int(api.url.rpartition(":")[2])), 10) as connection:
        asked = f"GET /v1/jobs/{job.id}/files/{path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token_of('tom')}\r\n"
        connection.sendall(f"{asked}Connection: close\r\n\r\n".encode())
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    assert received.startswith(b"HTTP/1.1 404")
    assert b"has no file" in received


def test_usage_says_what_each_job_takes_largest_first(api: Api, tom: httpx2.Client) -> None:
    small, large = submit(tom), submit(tom)
    write(api, small, "attempt-1/outputs/f", b"x")
    write(api, large, "attempt-1/logs/rank-0.log", b"x" * 500_000)
    page = UsagePage.model_validate_json(tom.get("/v1/usage").content)
    ours = [usage for usage in page.jobs if usage.job in {small.id, large.id}]
    assert [(usage.job, usage.logs, usage.outputs) for usage in ours] == [(large.id, 500_000, 0), (small.id, 0, 1)]
    assert [usage.bytes for usage in page.jobs] == sorted((usage.bytes for usage in page.jobs), reverse=True)
    assert page.total >= 500_001
    assert page.free > 0


# -- packages, secrets, audit ----------------------------------------------------------------------------------------


def test_a_package_is_sent_in_pieces_and_resumed(tom: httpx2.Client) -> None:
    data = b"package" * 100_000
    url = f"/v1/packages/{hashlib.sha256(data).hexdigest()}"
    head = tom.head(url)
    assert (head.status_code, head.headers["X-Have"], head.headers["X-Complete"]) == (200, "0", "0")
    total = len(data)
    first = tom.put(f"{url}?offset=0&total={total}", content=data[:1000])
    assert first.json() == {"have": 1000, "complete": False}
    wrong = tom.put(f"{url}?offset=500&total={total}", content=data[500:1000])
    assert (wrong.status_code, wrong.headers["X-Have"], wrong.json()["error"]["code"]) == (409, "1000", "conflict")
    done = tom.put(f"{url}?offset=1000&total={total}", content=data[1000:])
    assert done.json() == {"have": total, "complete": True}
    assert tom.head(url).headers["X-Complete"] == "1"


def test_a_damaged_package_is_refused(tom: httpx2.Client) -> None:
    answer = tom.put(f"/v1/packages/{'a' * 64}?offset=0&total=4", content=b"data")
    assert error(answer)[:2] == (502, "transfer")
    assert tom.head(f"/v1/packages/{'a' * 64}").headers["X-Have"] == "0"


def test_a_piece_that_is_too_large_is_refused(tom: httpx2.Client) -> None:
    answer = tom.put(f"/v1/packages/{'b' * 64}?offset=0&total=9999999", content=b"x" * (8 * 1024 * 1024 + 1))
    assert error(answer)[:3] == (422, "spec", "a piece of a package is larger than 8388608 bytes")


def test_secrets_go_in_and_only_their_names_come_out(api: Api) -> None:
    with api.client("olga") as olga:
        assert olga.put("/v1/secrets/KEY", json={"value": "planted-secret"}).json() == {}
        answer = olga.get("/v1/secrets")
        assert answer.json() == ["KEY"]
        wrong = olga.put("/v1/secrets/KEY", json={"value": ["planted-secret"]})
        assert wrong.status_code == 422
        assert "planted-secret" not in answer.text + wrong.text
        assert olga.delete("/v1/secrets/KEY").json() == {}
        assert error(olga.delete("/v1/secrets/KEY"))[2] == "there is no secret 'KEY'"


def test_every_write_is_in_the_audit_log_and_no_secret_is(tmp_path: Path) -> None:
    with serving(tmp_path) as api, api.client("tom") as tom, api.client("vera") as vera, api.client("olga") as olga:
        job = submit(tom, secrets={"KEY": "planted-secret"})
        vera.post("/v1/jobs", json={"spec": {"entrypoint": "true"}})
        olga.put("/v1/secrets/KEY", json={"value": "planted-secret"})
        tom.get(f"/v1/jobs/{job.id}")
        tom.post(f"/v1/jobs/{job.id}/stop")
        tom.delete(f"/v1/jobs/{job.name}")
    audit = tmp_path / "audit.jsonl"
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    assert [(line["person"], line["verb"], line["job"], line["ok"]) for line in lines] == [
        ("tom", "submit", job.id, True),
        ("vera", "submit", "", False),
        ("olga", "set_secret", "KEY", True),
        ("tom", "stop", job.id, True),
        ("tom", "remove", job.id, True),
    ]
    assert "planted-secret" not in audit.read_text()
    assert audit.stat().st_mode & 0o777 == 0o600


def test_many_readers_at_once_are_served(api: Api, tom: httpx2.Client) -> None:
    job = submit(tom)
    start(api, job)
    write(api, job, "attempt-1/logs/rank-0.log", b"line\n" * 100_000)
    answers: list[int] = []

    def read() -> None:
        with api.client("vera") as vera:
            answers.extend(
                vera.get(f"/v1/jobs/{job.id}{path}").status_code for path in ("", "/logs", "/files", "/events")
            )

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == [200] * 32
