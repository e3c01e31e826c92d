"""The runner and Weights & Biases: online or offline, and that no point is lost. The wandb package is the real one."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support.running import Attempt
from support.signals import send
from support.waiting import wait_until

from raylaunch import contract

pytestmark = [
    pytest.mark.wandb,
    pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs the wandb package"),
]

Make = Callable[..., Attempt]
KEY = "k" * 40
POINTS_PER_S = 50
LOGS_FOR_EVER = """
import time, wandb
run = wandb.init()
for point in range(100_000):
    run.log({"pt": point})
    print("logged", point, flush=True)
    time.sleep(0.02)
"""
LOGS_AN_ARTIFACT = """
import wandb
run = wandb.init()
artifact = wandb.Artifact("m", "model")
artifact.add_file("train.py")
run.log_artifact(artifact)
"""


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Make attempts that run train.py, and end what they left."""
    made: list[Attempt] = []

    def one(program: str, **changes: object) -> Attempt:
        made.append(Attempt(tmp_path / str(len(made)), ["python", "train.py"], **changes))
        made[-1].file("train.py", program)
        return made[-1]

    yield one
    for attempt in made:
        attempt.close()


class _Refuses(BaseHTTPRequestHandler):
    """A W&B server that is there and refuses whatever is asked."""

    def do_POST(self) -> None:
        self.send_response(403)
        self.end_headers()

    def do_HEAD(self) -> None:
        self.send_response(404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- the base class names it so
        pass


@pytest.fixture
def refusing_server() -> Iterator[str]:
    """The address of a server that answers, and refuses."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Refuses)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def points_on_disk(attempt: Attempt) -> set[int]:
    """Return the points of history in the attempt's .wandb file that no block's edge cuts."""
    files = list((attempt.folder / "wandb").glob("wandb/*run-*/run-*.wandb"))
    return {int(word) for file in files for word in re.findall(rb"\x02pt\x82\x01.(\d+)", file.read_bytes())}


def logged(attempt: Attempt) -> int:
    """Return the last point that the training has logged, in a line that is whole."""
    return int(re.findall(r"logged (\d+)\n", attempt.log.read_text())[-1])


def test_without_credentials_a_script_tracks_off_line_and_it_is_said_why(make: Make) -> None:
    attempt = make("import wandb\nrun = wandb.init()\nrun.log({'pt': 7})\nprint('id', run.id, run.project)\n")
    assert attempt.run()["ended"] == "completed"
    assert "id run1 tests" in attempt.log.read_text()
    assert points_on_disk(attempt) == {7}
    facts = attempt.facts()
    assert facts["wandb_mode"] == "offline"
    assert facts["wandb_why"].startswith("no W&B credentials: neither WANDB_API_KEY nor a netrc entry for ")


def test_points_that_are_a_second_old_survive_the_sigkill_of_everything(make: Make) -> None:
    attempt = make(LOGS_FOR_EVER)
    attempt.start()
    attempt.wait_log("logged 60\n", 60)
    wait_until(lambda: max(points_on_disk(attempt), default=-1) >= 60, 5, "a point that is a second old is on disk")
    for pid in attempt.processes():
        send(pid)
    assert attempt.exit()["signal"] == "SIGKILL"
    assert max(points_on_disk(attempt)) >= 60


@pytest.mark.parametrize("by", ["stop", "ray", "kill", "timeout"])
def test_no_point_older_than_a_second_is_lost_when_the_training_is_ended_by(by: str, make: Make) -> None:
    attempt = make(LOGS_FOR_EVER, timeout_s=10.0 if by == "timeout" else None)
    runner = attempt.start()
    attempt.wait_log("logged 20\n", 60)
    if by == "stop":
        attempt.stop(grace_s=2.0)
    elif by == "ray":
        runner.terminate()
    elif by == "kill":
        send(attempt.started_pid())
    attempt.exit()
    assert max(points_on_disk(attempt)) >= logged(attempt) - POINTS_PER_S
    assert attempt.processes() == []


def test_a_server_that_does_not_answer_makes_the_run_off_line(make: Make) -> None:
    attempt = make("import wandb\nwandb.init().log({'pt': 1})\n", env={"WANDB_BASE_URL": "http://127.0.0.1:9"})
    attempt.run(WANDB_API_KEY=KEY)
    facts = attempt.facts()
    assert facts["wandb_mode"] == "offline"
    assert "W&B at http://127.0.0.1:9 did not answer within 10 s" in facts["wandb_why"]
    assert points_on_disk(attempt) == {1}


def test_an_init_that_breaks_on_line_is_started_again_off_line(make: Make, refusing_server: str) -> None:
    attempt = make(
        "import wandb\nwandb.init().log({'pt': 1})\nprint('trained')\n", env={"WANDB_BASE_URL": refusing_server}
    )
    assert attempt.run(timeout_s=120, WANDB_API_KEY=KEY)["ended"] == "completed"
    assert "\nraylaunch: wandb.init failed online, so the training was restarted offline\n" in attempt.log.read_text()
    assert attempt.log.read_text().rstrip().rpartition("trained")[1] == "trained"
    assert attempt.facts()["wandb_mode"] == "offline"
    assert points_on_disk(attempt) == {1}


def test_a_training_that_fails_for_another_reason_is_not_started_again(make: Make, refusing_server: str) -> None:
    attempt = make("print('once')\nraise ValueError('mine')\n", env={"WANDB_BASE_URL": refusing_server})
    end = attempt.run(WANDB_API_KEY=KEY)
    assert (end["ended"], end["exit_code"]) == ("exit_code", 1)
    assert attempt.log.read_text().count("once") == 1


def test_a_netrc_entry_for_the_server_and_its_port_are_credentials(
    make: Make, refusing_server: str, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine {refusing_server.rpartition('/')[2]}\n  login user\n  password {KEY}\n")
    attempt = make("import os\nprint('mode', os.environ['WANDB_MODE'])\n", env={"WANDB_BASE_URL": refusing_server})
    attempt.run(NETRC=str(netrc))
    assert attempt.log.read_text() == "mode online\n"


def test_what_the_person_set_wins_but_for_the_folder_and_an_id_for_every_run(make: Make) -> None:
    own = {"WANDB_PROJECT": "mine", "WANDB_RUN_ID": "other", "WANDB_DIR": "/nowhere"}
    attempt = make("import json, os\nprint(json.dumps(dict(os.environ)))\n", env=own)
    attempt.run()
    seen = json.loads(attempt.log.read_text())
    assert (seen["WANDB_PROJECT"], seen.get("WANDB_RUN_ID")) == ("mine", None)
    assert seen["WANDB_DIR"] == str(attempt.folder / contract.WANDB)


def test_nothing_of_wandb_lands_in_the_home_folder(make: Make, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    attempt = make(LOGS_AN_ARTIFACT)
    attempt.run(HOME=str(home))
    assert sorted(str(path.relative_to(home)) for path in home.rglob("*")) == []
    assert sys.executable in attempt.facts()["python"]
