"""A Python that is interrupted, killed, forked or ends while it uses the SDK: its jobs go on, nothing is left over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.api import Api, token_of
from support.api_use import large, listening
from support.waiting import wait_until

import raylaunch
from raylaunch import Cluster, JobState
from raylaunch.errors import ConflictError


@pytest.fixture
def cluster(api: Api) -> Iterator[Cluster]:
    with raylaunch.connect("test", reach=api.reach()) as connected:
        yield connected


def of_tom(api: Api) -> tuple[str, str]:
    """Return what a program is told to reach the API."""
    return api.url, token_of("tom")


SCRIPT = """
import sys, raylaunch
from typing import NamedTuple

class Endpoint(NamedTuple):
    url: str
    token: str

cluster = raylaunch.connect(reach=Endpoint(*sys.argv[1:3]))
job = cluster.submit("python -m train", working_dir="", request_id="night")
print(job.id, flush=True)
try:
    job.wait()
except KeyboardInterrupt:
    print("interrupted", job.status().state.value, flush=True)
"""


def waiting_python(api: Api) -> subprocess.Popen[str]:
    """Start a Python that has submitted a job and waits for it."""
    script = [sys.executable, "-c", SCRIPT, *of_tom(api)]
    python = subprocess.Popen(script, stdout=subprocess.PIPE, text=True)
    wait_until(lambda: listening(api), 30, "it waits for its job")
    return python


def test_ctrl_c_ends_the_waiting_and_the_job_goes_on(api: Api) -> None:
    with waiting_python(api) as python:
        python.send_signal(signal.SIGINT)
        out, _ = python.communicate(timeout=30)
        assert out.splitlines()[1:] == ["interrupted queued"]
        assert python.returncode == 0
    wait_until(lambda: not listening(api), 30, "the question was taken back")


def test_a_killed_python_leaves_its_job_and_the_same_request_id_finds_it(api: Api, cluster: Cluster) -> None:
    with waiting_python(api) as python:
        python.kill()
        out, _ = python.communicate(timeout=30)
    again = cluster.submit("python -m train", working_dir="", request_id="night")
    assert again.id == out.strip()
    with pytest.raises(ConflictError):
        cluster.submit("another", working_dir="", request_id="night")
    assert again.status().state is JobState.QUEUED


def test_a_python_killed_while_it_sends_its_code_can_send_it_again(api: Api, cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "noise.bin").write_bytes(os.urandom(64 * 1024 * 1024))
    script = SCRIPT.replace('working_dir=""', f"working_dir={str(folder)!r}")
    packages = api.store / "packages"
    with subprocess.Popen([sys.executable, "-c", script, *of_tom(api)], stdout=subprocess.PIPE) as python:
        wait_until(lambda: [file for file in packages.rglob("*") if file.is_file()], 60, "some of it has arrived")
        python.kill()
        python.communicate(timeout=30)
    job = cluster.submit("python -m train", working_dir=folder, request_id="night")
    assert [other.id for other in cluster.jobs()] == [job.id]


DOWNLOAD = """
import sys
from typing import NamedTuple
import raylaunch

class Endpoint(NamedTuple):
    url: str
    token: str

raylaunch.connect(reach=Endpoint(*sys.argv[1:3])).job("heavy").download(to=sys.argv[3])
"""


def test_a_download_that_was_killed_is_completed_by_the_next_and_leaves_nothing_else(
    api: Api, cluster: Cluster, tmp_path: Path
) -> None:
    size = 150_000_000
    job = cluster.submit("python -m train", name="heavy", working_dir="")
    sha256 = large(api, job.view, "attempt-1/outputs/model.pt", size)
    folder = tmp_path / "here"
    with subprocess.Popen([sys.executable, "-c", DOWNLOAD, *of_tom(api), str(folder)]) as python:
        wait_until(lambda: any(part.stat().st_size for part in folder.glob(".*.part")), 60, "some of it is here")
        python.kill()
        python.wait(30)
    (file,) = job.download(to=folder)
    assert (file.sha256, file.bytes, file.verified) == (sha256, size, True)
    assert sorted(left.name for left in folder.iterdir()) == [".raylaunch", "model.pt"]


def test_a_python_that_ends_with_open_connections_ends_in_silence(api: Api) -> None:
    script = SCRIPT.split("try:", maxsplit=1)[0] + "lines = job.follow()\nprint(next(lines).kind)\n"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *of_tom(api)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_forked_child_has_a_loop_of_its_own(api: Api) -> None:
    script = SCRIPT.split("try:", maxsplit=1)[0] + (
        "import os\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    print(raylaunch.connect(reach=Endpoint(*sys.argv[1:3])).job('last').id, flush=True)\n"
        "    sys.exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *of_tom(api)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    first, second = done.stdout.split()
    assert (done.returncode, first) == (0, second), done.stderr
