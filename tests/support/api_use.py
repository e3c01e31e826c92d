"""What tests do with a running API: submit, let jobs go on, wait in the background."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx2

from raylaunch.files import sha256_of
from raylaunch.models.job import AttemptView, JobView, SubmitAnswer
from raylaunch.models.states import Change, JobState
from support.api import Api


def submit(client: httpx2.Client, name: str = "digits", **fields: object) -> JobView:
    """Submit a job over HTTP."""
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
    """Let the job's latest attempt and the job end."""

    def over() -> None:
        attempts = api.records.get(job.id).attempts
        last = tuple(each.model_copy(update={"ended_at": 2.0, "replicated": True}) for each in attempts)
        api.records.update(job.id, kind="ended", message="it ended", change=change, attempts=last)

    api.do(over)


def write(api: Api, job: JobView, path: str, content: bytes, *, mode: str = "wb") -> None:
    """Put a file into the job's folder, as the bridge would."""
    file = api.store / "jobs" / job.id / path
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open(mode) as opened:
        opened.write(content)


def foreign(api: Api, submission: str, state: JobState = JobState.RUNNING) -> JobView:
    """Let Ray have a job that somebody submitted to it alone."""
    attempt = AttemptView(id=submission, n=1, node="dgx", node_id="aa" * 28, admitted_at=1.0)
    view = JobView(
        id=submission,
        name="plain",
        owner="",
        state=state,
        foreign=True,
        created_at=1.0,
        updated_at=1.0,
        attempts=(attempt,),
    )
    return api.do(lambda: api.records.put_foreign(view).view())


def large(api: Api, job: JobView, path: str, size: int) -> str:
    """Put a file of `size` zeros that is complete into the job's folder; return its checksum."""
    file = api.store / "jobs" / job.id / path
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as opened:
        opened.truncate(size)
    sha256 = sha256_of(file)
    api.do(lambda: api.state.artifacts.note(job.id, path, size=size, sha256=sha256))
    return sha256


def error(answer: httpx2.Response) -> tuple[int, str, str, str]:
    """Return status, code, message and hint of an error."""
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
    changed = api.records._changed  # noqa: SLF001 -- that a request has begun to wait shows nowhere else
    return api.do(lambda: sum(map(len, changed.values())))
