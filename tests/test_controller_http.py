"""The HTTP API as a client meets it: the gate, roles and jobs, over real sockets and stores."""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from support.api import Api, serving, token_of, write_tokens
from support.api_use import error, start, submit, write
from support.waiting import wait_until

from raylaunch.models.job import JobPage, JobView
from raylaunch.models.states import Change
from raylaunch.version import __version__


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving(tmp_path_factory.mktemp("store")) as running:
        yield running


@pytest.fixture
def tom(api: Api) -> Iterator[httpx2.Client]:
    with api.client("tom") as client:
        yield client


# -- the gate --------------------------------------------------------------------------------------------------------

PATHS = ("/", "/v1/status", "/v1/openapi.json", "/openapi.json", "/docs", "/redoc", "/v1/jobs", "/v1/events", "/none")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "BREW"])
def test_without_a_token_every_path_answers_401(api: Api, method: str, path: str) -> None:
    answer = httpx2.request(method, api.url + path, trust_env=False)
    assert error(answer) == (
        401,
        "access",
        "the request has no token",
        "send 'Authorization: Bearer TOKEN'; raylaunch's own commands take it from the cluster's folder",
    )
    assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_with_an_unknown_token_every_path_answers_401(api: Api) -> None:
    for path in PATHS:
        answer = httpx2.get(api.url + path, headers={"Authorization": "Bearer wrong"}, trust_env=False)
        assert error(answer)[:3] == (401, "access", "the token is not valid for this cluster")


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


def test_every_response_has_version_and_protocol(tom: httpx2.Client) -> None:
    for path in ("/v1/status", "/v1/jobs/none", "/none"):
        headers = tom.get(path).headers
        assert (headers["X-Raylaunch-Version"], headers["X-Raylaunch-Api"]) == (__version__, "1")


@pytest.mark.parametrize(
    ("protocol", "hint"),
    [
        ("2", "raylaunch up starts a controller of the client's version; running jobs continue"),
        ("0", f"install the controller's version on the client: pip install raylaunch=={__version__}"),
    ],
)
def test_a_client_of_another_protocol_gets_a_hint(api: Api, protocol: str, hint: str) -> None:
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


def test_an_invalid_request_is_reported_without_repeating_a_secret(tom: httpx2.Client) -> None:
    body = {"spec": {"entrypoint": "true"}, "secrets": {"KEY": ["planted-secret"]}, "colour": "planted-secret"}
    answer = tom.post("/v1/jobs", json=body)
    assert error(answer)[:3] == (
        422,
        "spec",
        ("invalid request: secrets.KEY: Input should be a valid string; colour: Extra inputs are not permitted"),
    )
    assert "planted-secret" not in answer.text


def test_a_body_that_is_too_large_is_refused_before_it_is_read(tom: httpx2.Client) -> None:
    answer = tom.post("/v1/jobs", content=b"x" * (17 * 1024 * 1024))
    assert error(answer)[:3] == (422, "spec", "the request's body is larger than 16 MiB")


class Endless:
    """A body without an end and without a length; counts what was taken of it."""

    def __init__(self) -> None:
        self.sent = 0

    def __iter__(self) -> Iterator[bytes]:
        while True:
            self.sent += 1024 * 1024
            yield b"x" * (1024 * 1024)


@pytest.mark.parametrize(
    ("method", "path", "most"),
    [
        ("POST", "/v1/jobs", 16),
        ("POST", "/v1/jobs?dry_run=1", 16),
        ("PUT", f"/v1/packages/{'0' * 64}?offset=0&total=1", 8),
        ("PUT", "/v1/secrets/KEY", 1),
        ("POST", "/v1/quiet", 0),
        ("POST", "/v1/tokens", 0),
        ("GET", "/v1/jobs", 0),
    ],
)
def test_bytes_are_counted_while_they_arrive_and_each_route_has_its_limit(
    api: Api, method: str, path: str, most: int
) -> None:
    with api.client("ada") as ada:
        assert taken(ada, method, path) < (most + 32) * 1024 * 1024  # what is on its way counts too


def test_a_role_is_checked_before_the_body_is_read(api: Api) -> None:
    with api.client("vera") as vera:
        answer = vera.post("/v1/jobs", content=b"x" * (17 * 1024 * 1024))
        assert error(answer)[0] == 403
        answer = vera.post("/v1/jobs", content=b"not JSON")
        assert error(answer)[0] == 403
        assert error(vera.put("/v1/secrets/KEY", content=b"x" * 1000))[0] == 403


def taken(client: httpx2.Client, method: str, path: str) -> int:
    """Send a body without an end; return how many bytes were taken before the controller had enough."""
    body = Endless()
    try:
        answer = client.request(method, path, content=iter(body))
    except httpx2.TransportError:  # it closed the connection while we were still sending
        return body.sent
    assert error(answer)[1] == "spec"
    return body.sent


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
            "this requires the role trainer; ask an admin of this cluster for such a token",
        )


def test_a_trainer_stops_own_jobs_and_an_operator_anybodys(api: Api, tom: httpx2.Client) -> None:
    job = submit(tom)
    with api.client("tina") as tina, api.client("olga") as olga:
        assert error(tina.post(f"/v1/jobs/{job.id}/stop")) == (
            403,
            "access",
            f"tina may not stop {job.id}, which is tom's",
            "its owner and operators may",
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
def test_ray_and_secrets_require_an_operator(tom: httpx2.Client, method: str, path: str, what: str) -> None:
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


def test_a_request_id_creates_one_job(tom: httpx2.Client) -> None:
    body = {"spec": {"entrypoint": "true"}, "request_id": "once"}
    answers = [tom.post("/v1/jobs", json=body).json() for _ in range(2)]
    assert [answer["created"] for answer in answers] == [True, False]
    assert answers[0]["job"]["id"] == answers[1]["job"]["id"]
    other = {"spec": {"entrypoint": "false"}, "request_id": "once"}
    assert error(tom.post("/v1/jobs", json=other))[:2] == (409, "conflict")


def test_a_dry_run_returns_the_placement_and_stores_nothing(tom: httpx2.Client) -> None:
    before = tom.get("/v1/jobs").json()["total"]
    answer = tom.post("/v1/jobs?dry_run=true", json={"spec": {"name": "dry", "entrypoint": "true"}})
    assert answer.json() == {
        "fits": ["here"],
        "message": "dry would start on here at once",
        "wheels_for": [],
        "wheels_there": [],
        "environment": {"kind": "default", "value": "", "requirements": []},
        "chosen": None,
        "pack": None,
        "package_bytes": 0,
    }
    assert tom.get("/v1/jobs").json()["total"] == before


def test_errors_for_an_unknown_job_and_state_list_alternatives(tom: httpx2.Client) -> None:
    submit(tom, "nearby")
    assert error(tom.get("/v1/jobs/naerby")) == (
        404, "not_found", "no such job: 'naerby'", "did you mean nearby?"
    )  # fmt: skip
    assert error(tom.get("/v1/jobs?state=dead")) == (
        422,
        "spec",
        "no such state: 'dead'",
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
    wait_until(lambda: not any((api.store / "trash").iterdir()), 60, "the job's files are deleted")
    assert not (api.store / "jobs" / job.id).exists()


def test_a_job_that_runs_has_the_last_lines_of_its_current_attempt(api: Api, tom: httpx2.Client) -> None:
    job = submit(tom)
    start(api, job)
    write(api, job, "attempt-1/logs/rank-0.log", b"the first attempt\n")
    assert tom.get(f"/v1/jobs/{job.id}").json()["log_tail"] == ["the first attempt"]
    api.do(lambda: api.records.update(job.id, change=Change.REQUEUE, kind="retry", log_tail=("the first attempt",)))
    start(api, job, 2)
    assert tom.get(f"/v1/jobs/{job.id}").json()["log_tail"] == []
    write(api, job, "attempt-2/logs/rank-0.log", b"step\n" * 50 + b"the second\n")
    assert tom.get(f"/v1/jobs/{job.id}").json()["log_tail"] == [*(["step"] * 9), "the second"]


def test_a_loss_that_is_not_a_number_reaches_the_client(api: Api, tom: httpx2.Client) -> None:
    job = submit(tom)
    api.do(lambda: api.records.update(job.id, last_metrics={"loss": math.nan, "best": -math.inf}))
    answer = tom.get(f"/v1/jobs/{job.id}")
    assert json.loads(answer.text, parse_constant=pytest.fail)["last_metrics"]["loss"] == "NaN"
    metrics = JobView.model_validate_json(answer.content).last_metrics
    assert math.isnan(metrics["loss"])
    assert metrics["best"] == -math.inf


def test_small_answers_do_not_wait_for_acknowledgements(api: Api) -> None:
    def nodelay() -> list[int]:
        connections = [protocol.transport.get_extra_info("socket") for protocol in api.server.server_state.connections]
        return [connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for connection in connections]

    with api.client("tom") as tom:
        tom.get("/v1/status")
        options = api.do(nodelay)
    assert options
    assert all(options)


def test_a_secret_on_a_slow_disk_delays_no_other_request(tmp_path: Path) -> None:
    with serving(tmp_path / "store") as api, ThreadPoolExecutor(1) as pool:
        fifo = api.store / "secrets.json"
        os.mkfifo(fifo)  # opening it waits for somebody who writes
        with api.client("olga") as olga, api.client("vera") as vera:
            setting = pool.submit(olga.put, "/v1/secrets/KEY", json={"value": "v"})
            descriptor = wait_until(lambda: _writer_of(fifo), 30, "the secrets are being read")
            try:
                assert vera.get("/v1/health", timeout=10).status_code == 200
            finally:
                os.write(descriptor, b"{}")
                os.close(descriptor)
            assert setting.result(30).status_code == 200
            assert olga.get("/v1/secrets").json() == ["KEY"]


def test_half_a_body_is_not_passed_on(api: Api) -> None:
    path = f"/v1/packages/{'a' * 64}"
    head = f"PUT {path}?offset=0&total=100 HTTP/1.1\r\nHost: raylaunch\r\nAuthorization: Bearer {token_of('tom')}\r\n"
    with socket.create_connection(("127.0.0.1", int(api.url.rpartition(":")[2]))) as connection:
        connection.sendall(f"{head}Content-Length: 100\r\n\r\n".encode() + b"x" * 10)
    audit = api.store / "audit.jsonl"
    wait_until(lambda: audit.exists() and "put_package" in audit.read_text(), 30, "the request has ended")
    with api.client() as tom:
        assert tom.head(path).headers["X-Have"] == "0"


def _writer_of(fifo: Path) -> int:
    """Open a FIFO for writing; 0 if nobody reads it."""
    try:
        return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return 0
