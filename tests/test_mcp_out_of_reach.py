"""What every MCP tool says, to a model, where its cluster is not, does not answer, or does not let it in."""

from __future__ import annotations

import http.server
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.agent import GOOD, HASTY, Agent, Answer, agent_at, submitted
from support.api import Api, token_of

from raylaunch.cluster.record import load_record, save_record
from raylaunch.paths import cluster_paths, write_private
from raylaunch.version import API

pytestmark = pytest.mark.slow


TOOLS = sorted(GOOD)


@pytest.fixture(scope="module")
def lonely() -> Iterator[Agent]:
    """An agent where there is no cluster."""
    with tempfile.TemporaryDirectory(prefix="rl-", dir="/tmp") as folder, agent_at(Path(folder), Path(folder)) as one:
        yield one


@pytest.mark.parametrize("tool", [tool for tool in TOOLS if tool != "cluster_status"])
def test_without_a_cluster_the_command_to_type_is_named(lonely: Agent, tool: str) -> None:
    answer = lonely.call_with(tool, GOOD[tool])
    assert answer.error
    assert answer.text.endswith("\n| there is no cluster here\n  → start it: raylaunch up")


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
        ("protocols differ", "pip install raylaunch==9.9"),
    ),
    "an older one": (
        {"X-Raylaunch-Api": "0", "X-Raylaunch-Version": "0.0.1"},
        200,
        ("the controller of cluster 'local' is raylaunch 0.0.1", "raylaunch up starts a controller of this version"),
    ),
    "a broken one": (
        {"X-Raylaunch-Api": str(API), "X-Raylaunch-Version": "0.1.0"},
        500,
        ("answered 500 to", "see the controller's log"),
    ),
}


@pytest.fixture(params=sorted(STRANGERS))
def stranger(
    request: pytest.FixtureRequest, place: Path, paper: Api, agent: Agent
) -> Iterator[tuple[Agent, tuple[str, str]]]:
    """An agent that finds something else than its controller; and the words that say so."""
    assert paper
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


@pytest.fixture(scope="module")
def hasty(place: Path, paper: Api) -> Iterator[Agent]:
    assert paper
    with agent_at(place, place / "work", program=HASTY) as opened:
        yield opened


@pytest.fixture(scope="module")
def silent(place: Path, paper: Api) -> Iterator[Agent]:
    assert paper
    with agent_at(place, place / "work", extra={"RAYLAUNCH_ROLE": "viewer"}, program=HASTY) as opened:
        yield opened


def test_a_controller_that_does_not_answer_is_said_to_a_viewer_who_starts_nothing(place: Path, silent: Agent) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with moved(place, port):
        answers = all_at_once(silent, ["monitor_job", "list_jobs", "job_logs", "cluster_status"])
    words = f"cluster 'local' does not answer at http://127.0.0.1:{port}"
    status = answers.pop("cluster_status")
    assert (status.error, status.facts["reported"]["problems"][0]) == (False, words)
    for answer in answers.values():
        assert answer.error
        assert f"\n| {words}\n| → raylaunch up starts what is missing; raylaunch status shows" in answer.text


def test_a_controller_that_hangs_is_said_by_every_tool(place: Path, hasty: Agent) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=100) as mute, moved(place, mute.getsockname()[1]):
        answers = all_at_once(hasty, TOOLS)
        words = f"cluster 'local' did not answer within 3 s at http://127.0.0.1:{mute.getsockname()[1]}"
    status = answers.pop("cluster_status")
    assert (status.error, status.facts["reported"]["problems"][0]) == (False, words)
    for tool, answer in answers.items():
        assert answer.error, tool
        assert f"\n| {words}\n| → raylaunch up starts what is missing" in answer.text, tool


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
        ("train_job", "vera is a viewer and may not submit jobs\n| → this requires the role trainer"),
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


@pytest.fixture(scope="module")
def broken() -> Iterator[Agent]:
    with tempfile.TemporaryDirectory(prefix="rl-", dir="/tmp") as folder:
        (Path(folder) / "cluster.yaml").write_text("kind: local\ngpu: 4\n")
        with agent_at(Path(folder), Path(folder)) as opened:
            yield opened


@pytest.mark.parametrize("tool", TOOLS)
def test_a_broken_cluster_file_is_named_with_its_line(home: Path, broken: Agent, tool: str) -> None:
    assert home
    answer = broken.call_with(tool, GOOD[tool])
    assert answer.error
    assert "cluster.yaml:2: unknown key (known: " in answer.text
