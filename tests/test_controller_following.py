"""Following over HTTP: events and logs, by long poll and stream."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from support.api import Api, serving, token_of
from support.api_use import end, error, later, listening, start, submit, write
from support.waiting import wait_until

from raylaunch.models.job import EventPage, LogMatches
from raylaunch.models.states import Change


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving(tmp_path_factory.mktemp("store")) as running:
        yield running


@pytest.fixture
def tom(api: Api) -> Iterator[httpx2.Client]:
    with api.client("tom") as client:
        yield client


# -- events ----------------------------------------------------------------------------------------------------------


def test_events_after_a_cursor_are_returned_immediately(tom: httpx2.Client) -> None:
    job = submit(tom)
    page = EventPage.model_validate_json(tom.get(f"/v1/jobs/{job.id}/events?wait_s=25").content)
    assert [event.kind for event in page.events] == ["submitted"]
    assert page.cursor == job.cursor


def test_a_long_poll_answers_when_something_happens(api: Api, tom: httpx2.Client) -> None:
    job = submit(tom)
    before = listening(api)
    with api.client("vera") as vera:
        answer = later(lambda: vera.get(f"/v1/jobs/{job.id}/events?after={job.cursor}&wait_s=25"))
        wait_until(lambda: listening(api) > before, 60, "the poll waits")
        tom.post(f"/v1/jobs/{job.id}/stop")
        assert [event["kind"] for event in answer().json()["events"]] == ["ended"]


def test_a_long_poll_without_news_answers_empty_with_the_same_cursor(tom: httpx2.Client) -> None:
    job = submit(tom)
    answer = tom.get(f"/v1/jobs/{job.id}/events?after={job.cursor}&wait_s=0.1")
    assert answer.json() == {"events": [], "cursor": job.cursor}


@pytest.mark.parametrize("question", ["events?after=1000000&wait_s=25", "logs?wait_s=25"])
def test_a_request_whose_client_has_disconnected_is_not_held_open(api: Api, tom: httpx2.Client, question: str) -> None:
    job = submit(tom)
    before = listening(api)
    request = f"GET /v1/jobs/{job.id}/{question} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token_of('tom')}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(api.url.rpartition(":")[2]))) as asker:
        asker.sendall(request.encode())
        wait_until(lambda: listening(api) > before, 60, "the question waits")
    wait_until(lambda: listening(api) == before, 20, "it is given up")


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


def test_the_stream_sends_events_as_they_happen_and_continues_from_a_cursor(api: Api, tom: httpx2.Client) -> None:
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
        wait_until(lambda: listening(api) == 3, 60, "all three wait")
        api.stop()
        assert poll().json() == {"events": [], "cursor": cursor}
        assert log().status_code == 200
        assert stream().status_code == 200


# -- logs ------------------------------------------------------------------------------------------------------------


def test_a_log_is_returned_unchanged_with_its_next_offset(api: Api, tom: httpx2.Client) -> None:
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


def test_following_a_log_returns_when_it_grows_and_when_it_is_complete(api: Api, tom: httpx2.Client) -> None:
    job = submit(tom)
    attempt = start(api, job)
    write(api, job, "attempt-1/logs/rank-0.log", b"one\n")
    before = listening(api)
    answer = later(lambda: tom.get(f"/v1/jobs/{job.id}/logs?offset=4&wait_s=25"))
    wait_until(lambda: listening(api) > before, 60, "the follower waits")
    write(api, job, "attempt-1/logs/rank-0.log", b"two\n", mode="ab")
    api.do(lambda: api.desk.grew(attempt.id))
    assert (answer().content, answer().headers["X-Log-Ended"]) == (b"two\n", "0")
    over = later(lambda: tom.get(f"/v1/jobs/{job.id}/logs?offset=8&wait_s=25"))
    wait_until(lambda: listening(api) > before, 60, "the follower waits again")
    end(api, job)
    assert (over().content, over().headers["X-Log-Ended"]) == (b"", "1")


def test_the_log_of_a_job_that_waits_is_empty_until_its_attempt_starts(api: Api, tom: httpx2.Client) -> None:
    job = submit(tom)
    answer = tom.get(f"/v1/jobs/{job.id}/logs")
    assert (answer.content, answer.headers["X-Log-Attempt"], answer.headers["X-Log-Ended"]) == (b"", "0", "0")
    before = listening(api)
    follow = later(lambda: tom.get(f"/v1/jobs/{job.id}/logs?wait_s=25"))
    wait_until(lambda: listening(api) > before, 60, "the follower waits")
    write(api, job, "attempt-1/logs/rank-0.log", b"begun\n")
    start(api, job)
    assert (follow().content, follow().headers["X-Log-Attempt"]) == (b"begun\n", "1")


def test_an_earlier_attempts_log_has_ended_and_an_unknown_attempt_is_an_error(api: Api, tom: httpx2.Client) -> None:
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
