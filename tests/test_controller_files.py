"""Metrics, files, packages, secrets and the audit log over HTTP."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from support.api import Api, serving, token_of
from support.api_use import error, start, submit, write

from raylaunch.controller.store.secrets import SecretStore
from raylaunch.models.job import Artifact, MetricsPage, UsagePage


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving(tmp_path_factory.mktemp("store")) as running:
        yield running


@pytest.fixture
def tom(api: Api) -> Iterator[httpx2.Client]:
    with api.client("tom") as client:
        yield client


# -- metrics and files -----------------------------------------------------------------------------------------------


def test_a_job_without_metrics_has_an_empty_page(tom: httpx2.Client) -> None:
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
    api.do(lambda: api.state.artifacts.finalize(job.id))
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


def test_a_suspected_secret_is_sent_only_to_the_jobs_owner(api: Api, tom: httpx2.Client) -> None:
    job = submit(tom)
    write(api, job, "attempt-1/facts.json", b'{"left": {".env": 5, "big": 9}, "withheld": [".env"]}')
    write(api, job, "attempt-1/withheld/.env", b"TOKEN")
    url = f"/v1/jobs/{job.id}/files"
    assert tom.get(f"{url}/.env").content == b"TOKEN"
    for person in ("tina", "olga", "vera"):
        with api.client(person) as other:
            assert error(other.get(f"{url}/attempt-1/outputs/.env"))[:2] == (403, "access")
            assert other.get(f"{url}/attempt-1/withheld/.env").status_code == 404
    with api.client("vera") as vera:
        assert error(vera.get(f"{url}/big"))[:2] == (403, "access"), "a viewer fills no disk"
    assert "node" in error(tom.get(f"{url}/big"))[2]


@pytest.mark.parametrize("path", ["..%2f..%2ftokens.json", "%2e%2e/%2e%2e/tokens.json", "%2fetc%2fpasswd", "a%00b"])
def test_no_file_outside_the_job_is_sent(tom: httpx2.Client, api: Api, path: str) -> None:
    job = submit(tom)
    with socket.create_connection(("127.0.0.1", int(api.url.rpartition(":")[2])), 10) as connection:
        asked = f"GET /v1/jobs/{job.id}/files/{path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token_of('tom')}\r\n"
        connection.sendall(f"{asked}Connection: close\r\n\r\n".encode())
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    assert received.startswith(b"HTTP/1.1 404")
    assert b"has no file" in received


def test_usage_lists_each_job_largest_first(api: Api, tom: httpx2.Client) -> None:
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
    assert error(answer)[:3] == (422, "spec", "the request's body is larger than 8 MiB")


def test_secrets_can_be_set_and_only_their_names_are_returned(api: Api) -> None:
    with api.client("olga") as olga:
        assert olga.put("/v1/secrets/KEY", json={"value": "planted-secret"}).json() == {}
        answer = olga.get("/v1/secrets")
        assert answer.json() == ["KEY"]
        wrong = olga.put("/v1/secrets/KEY", json={"value": ["planted-secret"]})
        assert wrong.status_code == 422
        assert "planted-secret" not in answer.text + wrong.text
        assert olga.delete("/v1/secrets/KEY").json() == {}
        assert error(olga.delete("/v1/secrets/KEY"))[2] == "no such secret: 'KEY'"


def test_a_secret_for_some_people_is_sent_only_to_their_jobs(tmp_path: Path) -> None:
    store = SecretStore(tmp_path)
    store.put("OLD", "everybodys")
    store.put("KEY", "alices", ["alice"])
    assert store.for_job("a-1", ["KEY", "OLD"], "alice") == {"KEY": "alices", "OLD": "everybodys"}
    assert store.for_job("b-1", ["KEY", "OLD"], "bob") == {"OLD": "everybodys"}
    assert (store.withheld(["KEY", "OLD"], "bob"), store.withheld(["KEY"], "alice")) == (("KEY",), ())
    store.put_job("b-1", {"KEY": "bobs own"})
    assert store.for_job("b-1", ["KEY"], "bob") == {"KEY": "bobs own"}
    store.put("KEY", "new")
    assert store.withheld(["KEY"], "bob") == ("KEY",), "a new value changes nobody's access"
    store.put("KEY", "new", [])
    assert store.for_job("c-1", ["KEY"], "bob") == {"KEY": "new"}
    store.put("KEY", "alices", ["alice"])
    store.remove("KEY")
    store.put("KEY", "again")
    assert store.withheld(["KEY"], "bob") == ()
    assert (tmp_path / "secret_people.json").stat().st_mode & 0o777 == 0o600


def test_people_of_a_secret_are_set_over_http(api: Api) -> None:
    with api.client("olga") as olga:
        body = {"value": "v", "people": ["tom"]}
        assert olga.put("/v1/secrets/TOMS", json=body).json() == {}
    assert api.state.secrets.withheld(["TOMS"], "tina") == ("TOMS",)
    assert api.state.secrets.withheld(["TOMS"], "tom") == ()


def test_the_audit_log_has_reads_of_rays_token_and_rejected_requests(tmp_path: Path) -> None:
    with serving(tmp_path) as api:
        with api.client("olga") as olga:
            assert olga.get("/v1/ray").status_code == 200
            assert olga.get("/v1/status").status_code == 200
            assert olga.get("/v1/status", headers={"X-Raylaunch-API": "99"}).status_code == 409
        with api.client("vera") as vera:
            assert vera.get("/v1/ray").status_code == 403
        for _ in range(5):
            assert httpx2.get(f"{api.url}/v1/ray", headers={"Authorization": "Bearer x"}).status_code == 401
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [(line["person"], line["verb"], line["status"]) for line in lines] == [
        ("olga", "ray", 200),
        ("olga", "GET /v1/status", 409),
        ("vera", "ray", 403),
        ("", "GET /v1/ray", 401),
    ]


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
