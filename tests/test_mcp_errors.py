"""Every MCP tool and every kind of error, with the words that a model reads."""

from __future__ import annotations

import http.server
import os
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from mcp.client import Client
from mcp.server import Server
from mcp.types import TextContent
from support.agent import HASTY, Agent, Answer, agent_at, cluster_of_paper, keep
from support.api import Api, token_of
from support.api_use import foreign, start, write
from support.disks import fill, small_disk

from mcp_server import arguments
from mcp_server.bounds import Json
from mcp_server.call import Call
from mcp_server.policy import Audit
from mcp_server.server import Desk
from mcp_server.tools import Tool
from raylaunch.cluster.home import cluster_paths, write_private
from raylaunch.cluster.record import load_record, save_record
from raylaunch.state import Change
from raylaunch.version import API

pytestmark = pytest.mark.slow

# One call of each tool that would be in order.
GOOD: dict[str, dict[str, object]] = {
    "train_job": {"entrypoint": "true", "working_dir": ""},
    "monitor_job": {"job": "digits"},
    "list_jobs": {},
    "job_logs": {"job": "digits"},
    "stop_job": {"job": "digits"},
    "download_model": {"job": "digits", "to": "out"},
    "cluster_status": {},
}
TOOLS = sorted(GOOD)
ABOUT_A_JOB = ["monitor_job", "job_logs", "stop_job", "download_model"]
TAKES = {
    "train_job": "entrypoint, job_file, working_dir, name, gpus, launcher, environment, env, secrets, outputs, "
    "timeout, retries, more, request_id, dry_run",
    "monitor_job": "job, wait_s, cursor, log_lines",
    "list_jobs": "states, name, owner, tag, limit, cursor",
    "job_logs": "job, tail, search, regex, ignore_case, cursor, attempt, rank",
    "stop_job": "job, grace_s",
    "download_model": "job, what, files, to",
    "cluster_status": "doctor",
}


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rl-", dir="/tmp") as folder:
        (Path(folder) / "work").mkdir()
        yield Path(folder)


@pytest.fixture(scope="module")
def api(place: Path) -> Iterator[Api]:
    with cluster_of_paper(place, place / "store") as running:
        yield running


@pytest.fixture(scope="module")
def agent(place: Path, api: Api) -> Iterator[Agent]:
    assert api
    with agent_at(place, place / "work") as opened:
        yield opened


@pytest.fixture(scope="module")
def lonely() -> Iterator[Agent]:
    """An agent where there is no cluster."""
    with tempfile.TemporaryDirectory(prefix="rl-", dir="/tmp") as folder, agent_at(Path(folder), Path(folder)) as one:
        yield one


def submitted(agent: Agent, **given: object) -> str:
    answer = agent.call_with("train_job", {"entrypoint": "true", "working_dir": "", **given})
    assert not answer.error, answer.text
    return str(answer.facts["job"]["id"])


@pytest.mark.parametrize("tool", TOOLS)
def test_an_unknown_argument_is_refused_with_those_that_there_are(agent: Agent, tool: str) -> None:
    answer = agent.call_with(tool, {**GOOD[tool], "jobb": "x"})
    assert answer.error
    assert answer.text == f"{tool} has no argument 'jobb'\n  → {tool} takes {TAKES[tool]}"


WRONG: list[tuple[str, dict[str, object], str]] = [
    ("train_job", {}, "there is nothing to run: neither entrypoint nor job_file was given"),
    ("train_job", {"entrypoint": " "}, "the entrypoint is empty"),
    ("train_job", {"entrypoint": [""]}, "the entrypoint is empty"),
    ("train_job", {"entrypoint": {"a": 1}}, "entrypoint: a mapping is not text or a list"),
    ("train_job", {"entrypoint": "true", "gpus": -1}, "resources.gpus: -1 is less than 0"),
    ("train_job", {"entrypoint": "true", "gpus": "many"}, "gpus: 'many' is not a whole number"),
    ("train_job", {"entrypoint": "true", "timeout": "soon"}, "'soon' is not a duration; write seconds, or 90s, 15m"),
    ("train_job", {"entrypoint": "true", "name": "a b"}, "'a b' is not a job name"),
    ("train_job", {"entrypoint": "true", "environment": "x"}, "'x' is not an environment; write default"),
    ("train_job", {"entrypoint": "true", "env": {"CUDA_VISIBLE_DEVICES": "0"}}, "ask for them with resources.gpus"),
    ("train_job", {"entrypoint": "true", "env": {"RAYLAUNCH_X": "0"}}, "RAYLAUNCH_X cannot be set"),
    ("train_job", {"entrypoint": "true", "env": [1]}, "env: a list is not a mapping"),
    ("train_job", {"entrypoint": "true", "secrets": ["a=b"]}, "values with: raylaunch secret set NAME"),
    ("train_job", {"entrypoint": "true", "retries": 101}, "retries: 101 is more than 100"),
    ("train_job", {"entrypoint": "true", "more": {"resorces": {}}}, "unknown key 'resorces' (nearest: resources)"),
    ("train_job", {"entrypoint": "true", "name": "a", "more": {"name": "b"}}, "name is given twice"),
    ("train_job", {"entrypoint": "true", "more": {"working_dir": "/"}}, "working_dir is an argument of its own"),
    ("train_job", {"entrypoint": "true", "working_dir": "/"}, "working_dir: / as a whole is not what is meant"),
    ("train_job", {"entrypoint": "true", "working_dir": "~"}, "as a whole is not what is meant"),
    ("train_job", {"entrypoint": "true", "working_dir": "gone"}, "/gone does not exist"),
    ("train_job", {"entrypoint": "true", "working_dir": "a\0b"}, "cannot be a path here"),
    ("train_job", {"job_file": "gone.yaml"}, "gone.yaml"),
    ("train_job", {"entrypoint": "true", "dry_run": "perhaps"}, "dry_run: 'perhaps' is not true or false"),
    ("monitor_job", {"job": 5}, "job: 5 is not text"),
    ("monitor_job", {"wait_s": 51}, "wait_s: 51 is more than 50"),
    ("monitor_job", {"cursor": "x"}, "cursor: 'x' is not a whole number"),
    ("monitor_job", {"log_lines": 201}, "log_lines: 201 is more than 200"),
    ("list_jobs", {"states": ["done"]}, "states.0: 'done': input should be 'held', 'queued', 'starting'"),
    ("list_jobs", {"limit": 0}, "limit: 0 is less than 1"),
    ("list_jobs", {"cursor": "zzz"}, "cursor"),
    ("job_logs", {"tail": 1001}, "tail: 1001 is more than 1000"),
    ("job_logs", {"cursor": "zzz"}, "'zzz' is not a cursor of job_logs\n  → pass the cursor of an earlier answer"),
    ("job_logs", {"cursor": "1:5", "attempt": 2}, "attempt 2 and the cursor 1:5 name different attempts"),
    ("job_logs", {"rank": -1}, "rank: -1 is less than 0"),
    ("cluster_status", {"doctor": "perhaps"}, "doctor: 'perhaps' is not true or false"),
    ("stop_job", {}, "the key 'job' is missing\n  → stop_job takes job, grace_s"),
    ("stop_job", {"job": "a", "grace_s": "x"}, "grace_s: 'x' is not a number"),
    ("download_model", {"what": "weights"}, "what: 'weights' is not one of outputs, checkpoint, all"),
    ("download_model", {"to": "/"}, "to: / as a whole is not what is meant\n  → name a folder inside it"),
    ("download_model", {"to": "~"}, "as a whole is not what is meant"),
    ("download_model", {"to": "~no-such-user/x"}, "cannot be a path here"),
    ("download_model", {"to": "x" * 5000}, "cannot be a path here"),
]


@pytest.mark.parametrize(("tool", "given", "words"), WRONG, ids=[f"{n}-{one[0]}" for n, one in enumerate(WRONG)])
def test_what_cannot_be_is_refused_in_words(agent: Agent, tool: str, given: dict[str, object], words: str) -> None:
    answer = agent.call_with(tool, given)
    assert answer.error, answer.text
    assert words in answer.text
    assert "Traceback" not in answer.text
    assert "pydantic" not in answer.text


@pytest.mark.parametrize("tool", ABOUT_A_JOB)
def test_a_job_that_there_is_not_is_answered_with_the_nearest(agent: Agent, tool: str) -> None:
    job = submitted(agent, name="mistyped")
    answer = agent.call_with(tool, {"job": "mistpyed"})
    assert answer.error
    assert answer.text.startswith("there is no job 'mistpyed'\n  → did you mean mistyped or mistyped-")
    api_wide = agent.call_with(tool, {"job": "zzzzzzzz"})
    assert api_wide.text == "there is no job 'zzzzzzzz'\n  → see what there is: raylaunch list"
    assert agent.call("monitor_job", job=job).facts["job"]["state"] == "queued"


@pytest.mark.parametrize("tool", ABOUT_A_JOB)
def test_a_name_that_several_jobs_bear_means_the_latest(agent: Agent, api: Api, tool: str) -> None:
    first, last = (submitted(agent, name=f"twice-{tool[:4]}") for _ in range(2))
    keep(api, api.do(lambda: api.records.get(last).view()), "attempt-1/outputs/model.pt", b"weights")
    answer = agent.call_with(tool, {"job": f"twice-{tool[:4]}"})
    assert not answer.error, answer.text
    assert last in answer.text
    assert first not in answer.text


@pytest.mark.parametrize("tool", [tool for tool in TOOLS if tool != "cluster_status"])
def test_without_a_cluster_the_command_to_type_is_named(lonely: Agent, tool: str) -> None:
    answer = lonely.call_with(tool, GOOD[tool])
    assert answer.error
    assert answer.text == "there is no cluster here\n  → start it: raylaunch up"


@contextmanager
def answering(headers: Mapping[str, str], *, status: int = 200) -> Iterator[int]:
    """Answer every request on a free port with these headers and a body that is no JSON; yield the port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"hello")

        do_POST = do_PUT = do_HEAD = do_GET  # noqa: N815 -- names that the server calls

        def log_message(self, *_words: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join(10)


@contextmanager
def moved(home: Path, port: int) -> Iterator[None]:
    """Let the cluster's record name another port for its controller."""
    paths = cluster_paths("local", {"RAYLAUNCH_HOME": str(home)})
    record = load_record(paths)
    assert record
    save_record(paths, record.with_(ports={"controller": port}))
    yield
    save_record(paths, record)


STRANGERS: dict[str, tuple[dict[str, str], int, tuple[str, str]]] = {
    "no controller": ({}, 200, ("is not the controller of a raylaunch cluster", "raylaunch up starts it")),
    "a newer one": (
        {"X-Raylaunch-Api": "999", "X-Raylaunch-Version": "9.9"},
        200,
        ("they do not speak the same protocol", "pip install raylaunch==9.9"),
    ),
    "an older one": (
        {"X-Raylaunch-Api": "0", "X-Raylaunch-Version": "0.0.1"},
        200,
        ("the controller of cluster 'local' is raylaunch 0.0.1", "raylaunch up starts a controller of this version"),
    ),
    "a broken one": (
        {"X-Raylaunch-Api": str(API), "X-Raylaunch-Version": "0.1.0"},
        500,
        ("answered 500 to", "its log says more"),
    ),
}


@pytest.fixture(params=sorted(STRANGERS))
def stranger(
    request: pytest.FixtureRequest, place: Path, api: Api, agent: Agent
) -> Iterator[tuple[Agent, tuple[str, str]]]:
    """An agent that finds something else than its controller; and the words that say so."""
    assert api
    headers, status, words = STRANGERS[request.param]
    with answering(headers, status=status) as port, moved(place, port):
        yield agent, words


@pytest.mark.parametrize("tool", TOOLS)
def test_what_answers_and_is_not_our_controller_is_said(stranger: tuple[Agent, tuple[str, str]], tool: str) -> None:
    agent, words = stranger
    answer = agent.call_with(tool, GOOD[tool])
    assert answer.error
    assert words[0] in answer.text
    assert words[1] in answer.text


def all_at_once(agent: Agent, tools: Sequence[str]) -> dict[str, Answer]:
    """Call tools at the same time: each waits as long as the others."""
    with ThreadPoolExecutor(len(tools)) as pool:
        return dict(zip(tools, pool.map(lambda tool: agent.call_with(tool, GOOD[tool]), tools), strict=True))


def test_a_controller_that_does_not_answer_is_said_to_a_viewer_who_starts_nothing(place: Path, silent: Agent) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with moved(place, port):
        answers = all_at_once(silent, ["monitor_job", "list_jobs", "job_logs", "cluster_status"])
    words = f"cluster 'local' does not answer at http://127.0.0.1:{port}"
    status = answers.pop("cluster_status")
    assert (status.error, status.facts["problems"][0]) == (False, words)
    for answer in answers.values():
        assert answer.error
        assert answer.text == f"{words}\n  → raylaunch up starts what is missing; raylaunch status shows what runs"


def test_a_controller_that_hangs_is_said_by_every_tool(place: Path, hasty: Agent) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=100) as mute, moved(place, mute.getsockname()[1]):
        answers = all_at_once(hasty, TOOLS)
        words = f"cluster 'local' did not answer within 3 s at http://127.0.0.1:{mute.getsockname()[1]}"
    status = answers.pop("cluster_status")
    assert (status.error, status.facts["problems"][0]) == (False, words)
    for tool, answer in answers.items():
        assert answer.error, tool
        assert answer.text.startswith(f"{words}\n  → raylaunch up starts what is missing"), tool


@pytest.fixture(scope="module")
def hasty(place: Path, api: Api) -> Iterator[Agent]:
    assert api
    with agent_at(place, place / "work", program=HASTY) as opened:
        yield opened


@pytest.fixture(scope="module")
def silent(place: Path, api: Api) -> Iterator[Agent]:
    assert api
    with agent_at(place, place / "work", extra={"RAYLAUNCH_ROLE": "viewer"}, program=HASTY) as opened:
        yield opened


@contextmanager
def as_person(home: Path, token: str) -> Iterator[None]:
    """Let the cluster be asked with another token."""
    path = cluster_paths("local", {"RAYLAUNCH_HOME": str(home)}).token
    before = path.read_text()
    write_private(path, token)
    yield
    write_private(path, before)


@pytest.mark.parametrize("tool", TOOLS)
def test_an_unknown_token_is_said(place: Path, agent: Agent, tool: str) -> None:
    with as_person(place, "of-nobody"):
        answer = agent.call_with(tool, GOOD[tool])
    assert answer.error
    assert "token" in answer.text
    assert "of-nobody" not in answer.text


@pytest.mark.parametrize(
    ("tool", "words"),
    [
        ("train_job", "vera is a viewer and may not submit jobs\n  → it takes the role trainer"),
        ("stop_job", "vera is a viewer and may not stop"),
    ],
)
def test_what_the_tokens_role_may_not_do_the_controller_refuses(
    place: Path, agent: Agent, tool: str, words: str
) -> None:
    job = submitted(agent)
    with as_person(place, token_of("vera")):
        answer = agent.call_with(tool, {**GOOD[tool], "job": job} if tool == "stop_job" else GOOD[tool])
    assert answer.error
    assert words in answer.text


@pytest.mark.parametrize("tool", TOOLS)
def test_a_broken_cluster_file_is_named_with_its_line(home: Path, broken: Agent, tool: str) -> None:
    assert home
    answer = broken.call_with(tool, GOOD[tool])
    assert answer.error
    assert "cluster.yaml:2: unknown key 'gpu' (nearest: gpus)" in answer.text


@pytest.fixture(scope="module")
def broken() -> Iterator[Agent]:
    with tempfile.TemporaryDirectory(prefix="rl-", dir="/tmp") as folder:
        (Path(folder) / "cluster.yaml").write_text("kind: local\ngpu: 4\n")
        with agent_at(Path(folder), Path(folder)) as opened:
            yield opened


def test_a_key_that_was_used_for_something_else_is_refused(agent: Agent) -> None:
    submitted(agent, request_id="used", name="one")
    answer = agent.call("train_job", entrypoint="true", working_dir="", request_id="used", name="two")
    assert answer.error
    assert "used" in answer.text
    assert "→" in answer.text


def test_a_broken_job_file_is_named_with_its_line(agent: Agent, place: Path) -> None:
    (place / "work" / "bad.yaml").write_text("entrypoint: true.sh\nretrys: 2\n")
    answer = agent.call("train_job", job_file="bad.yaml")
    assert answer.error
    assert "bad.yaml:2: unknown key 'retrys' (nearest: retries)" in answer.text


def test_a_pattern_that_is_no_regular_expression_is_refused(agent: Agent, api: Api) -> None:
    job = submitted(agent)
    start(api, api.do(lambda: api.records.get(job).view()))
    answer = agent.call("job_logs", job=job, search="(", regex=True)
    assert answer.error
    assert "is not a regular expression" in answer.text


def test_an_attempt_that_there_is_not_is_refused(agent: Agent, api: Api) -> None:
    job = submitted(agent)
    start(api, api.do(lambda: api.records.get(job).view()))
    answer = agent.call("job_logs", job=job, attempt=7)
    assert answer.error
    assert "attempt" in answer.text


@pytest.mark.parametrize("what", ["outputs", "checkpoint"])
def test_of_a_job_without_files_it_is_said_what_to_do(agent: Agent, what: str) -> None:
    job = submitted(agent)
    answer = agent.call("download_model", job=job, what=what)
    assert answer.error
    assert f"{job} has left no {what.rstrip('s')}s" in answer.text
    assert f"monitor_job job={job} wait_s=50" in answer.text


def with_output(agent: Agent, api: Api) -> str:
    job = submitted(agent)
    keep(api, api.do(lambda: api.records.get(job).view()), "attempt-1/outputs/model.pt", b"weights")
    return job


def test_a_file_that_there_is_not_is_answered_with_the_nearest(agent: Agent, api: Api) -> None:
    answer = agent.call("download_model", job=with_output(agent, api), files=["modle.pt"])
    assert answer.error
    assert answer.text.startswith("the job has left no file 'modle.pt'\n  → nearest: model.pt")


def test_a_file_of_the_users_is_never_replaced(agent: Agent, api: Api, place: Path) -> None:
    mine = place / "work" / "mine"
    mine.mkdir()
    (mine / "model.pt").write_text("mine")
    answer = agent.call("download_model", job=with_output(agent, api), to="mine")
    assert answer.error
    assert "model.pt is there already, and is something else\n  → choose another folder" in answer.text
    assert (mine / "model.pt").read_text() == "mine"


def test_a_folder_that_is_a_file_is_said(agent: Agent, api: Api, place: Path) -> None:
    (place / "work" / "plain").write_text("")
    answer = agent.call("download_model", job=with_output(agent, api), to="plain")
    assert answer.error
    assert "cannot be written to" in answer.text
    assert "choose another folder" in answer.text


def test_a_disk_that_is_full_is_said(agent: Agent, api: Api, tmp_path: Path) -> None:
    job = submitted(agent)
    write(api, api.do(lambda: api.records.get(job).view()), "attempt-1/outputs/model.pt", os.urandom(1_000_000))
    with small_disk(tmp_path / "small", kib=64) as disk:
        answer = agent.call("download_model", job=job, to=str(disk / "here"))
    assert answer.error
    assert "the disk is full\n  → free some space" in answer.text


def test_a_folder_that_may_not_be_written_is_said(agent: Agent, api: Api, tmp_path: Path) -> None:
    job = with_output(agent, api)
    with small_disk(tmp_path / "fixed", kib=64, options="ro") as disk:
        answer = agent.call("download_model", job=job, to=str(disk / "here"))
    assert answer.error
    assert f"cannot be written to {disk / 'here' / 'model.pt'}: Read-only file system\n  → choose" in answer.text


def test_a_store_that_is_full_is_said_and_nothing_is_recorded(home: Path, tmp_path: Path) -> None:
    with (
        small_disk(tmp_path / "disk", kib=512) as disk,
        cluster_of_paper(home, disk / "store") as api,
        agent_at(home, tmp_path) as opened,
    ):
        fill(disk)
        answer = opened.call("train_job", **GOOD["train_job"])
        assert answer.error
        assert "No space left on device" in answer.text or "disk is full" in answer.text
        assert "→" in answer.text
        assert not api.do(api.records.unfinished)


@pytest.mark.parametrize("tool", ["job_logs", "download_model"])
def test_what_cannot_be_had_of_a_job_of_plain_ray_is_said(agent: Agent, api: Api, tool: str) -> None:
    job = foreign(api, f"raysubmit_{tool}")
    answer = agent.call_with(tool, {"job": job.id})
    assert answer.error
    assert (  # there is no Ray behind this API
        f"when asked for the log of {job.id} (ConnectError)\n  → raylaunch up"
        if tool == "job_logs"
        else f"{job.id} was submitted with plain ray job submit: raylaunch keeps no files of it\n  → its log: "
    ) in answer.text


def test_bytes_that_did_not_arrive_as_they_were_sent_are_refused(agent: Agent, api: Api, place: Path) -> None:
    job = with_output(agent, api)
    (facts,) = agent.call("download_model", job=job, to="good").facts["files"]
    part = place / "work" / "torn" / f".model.pt.{facts['sha256'][:12]}.part"
    part.parent.mkdir()
    part.write_bytes(b"wrong!!")
    answer = agent.call("download_model", job=job, to="torn")
    assert answer.error
    assert "did not arrive as it was sent" in answer.text
    assert "repeat the command" in answer.text


def test_what_the_controller_itself_gets_wrong_is_said_without_its_traceback(agent: Agent, api: Api) -> None:
    job = submitted(agent)
    api.do(lambda: api.records.update(job, kind="ended", change=Change.END_STOPPED))
    answer = agent.call("stop_job", job=job)  # the stand-in for the verbs fails here, as a bug would
    assert answer.error
    assert "the controller failed at POST" in answer.text
    assert "Traceback" not in answer.text


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_bug_of_ours_is_called_one_and_ends_nothing(tmp_path: Path, anyio_backend: str) -> None:
    assert anyio_backend

    async def broken_tool(_given: arguments.ClusterStatus, _call: Call) -> Json:
        key = "a secret value"
        raise KeyError(key)

    tool = Tool(arguments.ClusterStatus, broken_tool, title="", description="", answers={})
    desk = Desk({"broken_tool": tool}, Audit(tmp_path), heals=False)
    made = Server("bug", on_list_tools=desk.list_tools, on_call_tool=desk.call_tool)
    async with Client(made) as client:
        for _ in range(2):
            (content,) = (await client.call_tool("broken_tool", {})).content
            assert isinstance(content, TextContent)
            assert content.text.startswith("broken_tool failed inside raylaunch; this is a bug")
            assert "secret" not in content.text
