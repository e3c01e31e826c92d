"""The runner as a process: what it does with real programs, and what it leaves behind."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.running import Attempt
from support.signals import send
from support.waiting import wait_until

from raylaunch import contract
from raylaunch.runner.archive import runner_zip

Make = Callable[..., Attempt]
PYENV = Path("~/.pyenv/versions").expanduser()
WAITS = "echo up; exec sleep 300"


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Make attempts, and end what they left."""
    made: list[Attempt] = []

    def one(entrypoint: str | list[str], **changes: object) -> Attempt:
        made.append(Attempt(tmp_path / str(len(made)), entrypoint, **changes))
        return made[-1]

    yield one
    for attempt in made:
        attempt.close()


def test_the_archive_has_the_bytecode_of_each_module_beside_its_source() -> None:
    with zipfile.ZipFile(io.BytesIO(runner_zip())) as archive:
        sources = {name: archive.read(name) for name in archive.namelist() if name.endswith(".py")}
        hashes = {name: archive.read(f"{name}c")[8:16] for name in sources}
    assert "__main__.py" in sources
    assert hashes == {name: importlib.util.source_hash(source) for name, source in sources.items()}


@pytest.mark.parametrize("version", ["3.8", "3.9", "3.10", "3.12", "3.13"])
def test_it_runs_a_program_under_python(version: str, make: Make) -> None:
    found = sorted(PYENV.glob(f"{version}.*/bin/python"))
    if not found:
        pytest.skip(f"needs a Python {version} under ~/.pyenv")
    attempt = make("python -c 'import raylaunch, sys; print(raylaunch.context().job, sys.version_info[:2])'")
    assert attempt.run(str(found[-1]))["ended"] == "completed"
    assert attempt.log.read_text() == f"job-aaaaaa ({version.replace('.', ', ')})\n"
    assert attempt.facts()["version"].startswith(version)


ODD = """
import json, os, pathlib, time
places = pathlib.Path(os.environ["RAYLAUNCH_WANDB_RUNS"], "places")
folder = pathlib.Path(os.environ["RAYLAUNCH_PROGRESS_FILE"]).parent
places.write_text('{"place": []}' + chr(10))
for text in ("[]", "3", "[" * 100_000):
    places.open("a").write(text + chr(10))
    (folder / "stop.json").write_text(text)
    time.sleep(0.3)
print("not stopped")
"""


def test_what_a_program_writes_into_its_runners_files_is_no_wish_and_ends_nothing(make: Make) -> None:
    attempt = make([sys.executable, "-c", ODD])
    assert attempt.run()["ended"] == "completed"
    assert "not stopped" in attempt.log.read_text()


def test_a_failing_program_gives_its_exit_code_to_the_facts_and_to_ray(make: Make) -> None:
    attempt = make("exit 3")
    end = attempt.run()
    assert (end["ended"], end["exit_code"], end["signal"]) == ("exit_code", 3, "")
    assert attempt.runner is not None
    assert attempt.runner.returncode == 3


def test_a_ray_that_a_program_starts_for_itself_is_reported_while_it_runs(make: Make) -> None:
    attempt = make(["./gcs_server"])
    attempt.file("gcs_server", "#!/bin/sh\nsleep 300\n").chmod(0o755)
    attempt.start()
    wait_until(lambda: contract.PRIVATE_RAY in attempt.facts()["warnings"], 30, "a warning")


def test_a_shell_script_with_windows_line_ends_is_named_when_it_fails(make: Make) -> None:
    attempt = make("bash train.sh")
    attempt.file("train.sh", "python -c 'exit(3)'\r\n")
    end = attempt.run()
    assert (end["ended"], end["exit_code"]) == ("exit_code", 3)
    assert "'train.sh' has Windows line ends" in end["message"]


def test_a_second_claimant_starts_nothing_and_exits_with_success(make: Make) -> None:
    attempt = make("echo once")
    attempt.run()
    assert attempt.start().wait(30) == 0
    assert "already claimed" in attempt.output()
    assert attempt.log.read_text() == "once\n"


def test_a_fenced_attempt_is_not_started(make: Make) -> None:
    attempt = make("echo never")
    (attempt.folder / contract.CLAIM).write_text(json.dumps({"epoch": "fenced", "pid": 1}))
    assert attempt.start().wait(30) == 0
    assert "fenced off" in attempt.output()
    assert not attempt.log.exists()


def test_the_signal_that_killed_the_training_is_named(make: Make) -> None:
    attempt = make(["sleep", "300"])
    attempt.start()
    send(attempt.started_pid())
    end = attempt.exit()
    assert (end["ended"], end["signal"], end["exit_code"]) == ("signal", "SIGKILL", 137)
    assert attempt.runner is not None
    assert attempt.runner.wait(10) == 137


def test_a_signal_inside_a_shell_command_is_named_too(make: Make) -> None:
    attempt = make("sh -c 'kill -9 $$'; exit $?")
    end = attempt.run()
    assert (end["ended"], end["signal"]) == ("signal", "SIGKILL")


def test_a_stop_lets_the_program_end_in_order(make: Make) -> None:
    attempt = make("trap 'echo saved; exit 0' TERM; echo up; while :; do sleep 0.01; done")  # a sleep may end first
    attempt.start()
    attempt.wait_log("up")
    end = attempt.stop()
    assert (end["ended"], end["by_ray"]) == ("stopped", False)
    assert attempt.log.read_text().endswith("saved\n")
    assert attempt.runner is not None
    assert attempt.runner.wait(10) == 143


def test_a_program_that_ignores_the_stop_is_killed_after_the_grace(make: Make) -> None:
    attempt = make(
        [sys.executable, "-c", "import signal; signal.signal(15, signal.SIG_IGN); print('up'); signal.pause()"]
    )
    attempt.start()
    attempt.wait_log("up")
    end = attempt.stop(grace_s=0.5)
    assert (end["ended"], end["signal"]) == ("stopped", "SIGKILL")


def test_a_stop_kills_a_shell_with_a_program_that_ignores_it_and_names_the_signal(make: Make) -> None:
    ignores = "import signal; signal.signal(15, signal.SIG_IGN); print('up', flush=True); signal.pause()"
    attempt = make(f'{sys.executable} -c "{ignores}"; echo next')
    attempt.start()
    attempt.wait_log("up")
    end = attempt.stop(grace_s=0.5)
    assert (end["ended"], end["signal"]) == ("stopped", "SIGKILL")


def test_children_that_left_the_session_are_ended_by_a_stop_and_counted(make: Make) -> None:
    attempt = make("setsid sh -c 'trap \"\" TERM; while :; do sleep 0.1; done' & echo up; exec sleep 300")
    attempt.start()
    attempt.wait_log("up")
    wait_until(lambda: len(attempt.processes()) >= 2, 60, "the child that left the session")
    end = attempt.stop(grace_s=0.5)
    assert end["killed"] >= 1
    assert attempt.processes() == []


def test_children_left_over_at_a_normal_end_are_ended_and_counted(make: Make) -> None:
    attempt = make("setsid sleep 300 & exit 0")
    end = attempt.run()
    assert (end["ended"], end["killed"]) == ("completed", 1)
    assert attempt.processes() == []


def test_a_worker_of_ray_that_has_no_name_yet_is_ended_and_not_counted(make: Make, tmp_path: Path) -> None:
    program = tmp_path / "site-packages/ray/_private/workers/default_worker.py"
    program.parent.mkdir(parents=True)
    program.write_text("import time\nprint('began', flush=True)\ntime.sleep(600)\n")
    code = (
        f"import subprocess, sys; worker = subprocess.Popen([sys.executable, {str(program)!r}], "
        "start_new_session=True, stdout=subprocess.PIPE); worker.stdout.readline()"
    )
    attempt = make(["python", "-c", code])
    end = attempt.run()
    assert (end["ended"], end["killed"]) == ("completed", 0)
    assert attempt.processes() == []


def test_rays_stop_is_told_from_ours(make: Make) -> None:
    attempt = make(WAITS)
    runner = attempt.start()
    attempt.wait_log("up")
    runner.terminate()
    end = attempt.exit()
    assert (end["ended"], end["by_ray"]) == ("stopped", True)
    assert attempt.processes() == []


def test_the_exit_facts_are_written_before_ray_loses_patience(make: Make) -> None:
    ignoring = "import signal; signal.signal(15, signal.SIG_IGN); print('up', flush=True); signal.pause()"
    attempt = make([sys.executable, "-c", ignoring], grace_s=300.0)
    runner = attempt.start(RAY_JOB_STOP_WAIT_TIME_S="3")
    attempt.wait_log("up")
    runner.terminate()
    runner.wait(30)
    assert attempt.exit()["by_ray"]


def test_a_timeout_ends_the_attempt_and_says_so(make: Make) -> None:
    attempt = make(WAITS, timeout_s=0.5)
    end = attempt.run()
    assert end["ended"] == "timed_out"
    assert end["message"] == "it ran longer than its timeout of 0.5 s"


def test_killing_the_runner_ends_all_of_its_training(make: Make) -> None:
    attempt = make("setsid sleep 300 & echo up; exec sleep 300")
    runner = attempt.start()
    attempt.wait_log("up")
    wait_until(lambda: len(attempt.processes()) >= 2, 60, "both processes")
    runner.kill()
    wait_until(lambda: not attempt.processes(), 60, "the training has ended")
    assert not (attempt.folder / contract.EXIT).exists()


def test_killing_the_keeper_ends_the_training_and_is_said(make: Make) -> None:
    attempt = make(["sleep", "300"])
    attempt.start()
    stat = Path(f"/proc/{attempt.started_pid()}/stat").read_text()
    send(int(stat.rpartition(")")[2].split()[1]))
    end = attempt.exit()
    assert end["ended"] == "runner_error"
    assert "was killed" in end["message"]
    assert attempt.processes() == []


def test_the_log_keeps_every_byte_and_the_copy_is_what_rays_tools_bear(make: Make) -> None:
    attempt = make([sys.executable, "bytes.py"])
    attempt.file(
        "bytes.py",
        "import sys\nout = sys.stdout.buffer\nout.write(b'\\xff\\xfe not text\\n')\n"
        "out.write(b'x' * 10_000_000 + b'\\n')\n"
        "for i in range(101): out.write(b'\\r%d%%' % i)\nout.write(b'\\nlast')\n",
    )
    attempt.run()
    data = attempt.log.read_bytes()
    assert data.startswith(b"\xff\xfe not text\n" + b"x" * 10_000_000)
    assert data.count(b"\r") == 101
    lines = attempt.output().split("\n")
    assert lines[0] == "\ufffd\ufffd not text"
    assert len(lines[1]) < 17_000
    assert "9983616 more bytes of this line" in lines[1]
    assert lines[2:4] == ["100%", "last"]


def test_a_flood_of_lines_reaches_the_log_whole_and_the_copy_up_to_its_limit(make: Make) -> None:
    attempt = make([sys.executable, "flood.py"])
    attempt.file("flood.py", "line = 'y' * 99 + '\\n'\nfor _ in range(800): print(line * 1000, end='')\n")
    attempt.run()
    assert attempt.log.stat().st_size == 80_000_000
    assert len(attempt.output()) < contract.RAY_LOG_LIMIT + 1000
    assert attempt.output().endswith("the rest of the output is in: raylaunch logs job-aaaaaa\n")


def test_secrets_reach_the_environment_and_no_other_place(make: Make) -> None:
    attempt = make('printf %s "$TOKEN" | wc -c; cat /proc/$PPID/cmdline', secrets=["TOKEN"])
    (attempt.folder / contract.SECRETS).write_text(json.dumps({"TOKEN": "s3cr3t-planted"}))
    assert attempt.run()["ended"] == "completed"
    assert attempt.log.read_text().startswith(f"{len('s3cr3t-planted')}\n")
    files = [path for path in attempt.folder.parent.parent.rglob("*") if path.is_file()]
    assert [path for path in files if b"s3cr3t-planted" in path.read_bytes()] == []


def test_rays_token_and_addresses_do_not_reach_the_training(make: Make) -> None:
    attempt = make("env", env={"MINE": "yes"})
    attempt.run(RAY_AUTH_MODE="token", RAY_ADDRESS="1.2.3.4:1", OMP_NUM_THREADS="1")
    words = attempt.log.read_text()
    assert "MINE=yes\n" in words
    assert "RAY_ADDRESS=local\n" in words  # ray.init() starts a Ray of its own, and does not hang at the cluster's
    assert "RAY_" not in words.replace("RAY_ADDRESS=local\n", "")
    assert "OMP_NUM_THREADS" not in words


def test_a_job_without_gpus_sees_none_and_one_with_gpus_sees_those_of_ray(make: Make) -> None:
    without = make('echo "[$CUDA_VISIBLE_DEVICES]"')
    without.run(CUDA_VISIBLE_DEVICES="0,1")
    assert without.log.read_text() == "[]\n"
    with_two = make('echo "[$CUDA_VISIBLE_DEVICES]"', gpus=2)
    with_two.run(CUDA_VISIBLE_DEVICES="2,5")
    assert with_two.log.read_text() == "[2,5]\n"
    assert json.loads((with_two.folder / contract.STARTED).read_text())["gpus"] == ["2", "5"]


def test_a_program_that_is_not_there_is_said_with_the_nearest(make: Make) -> None:
    end = make(["slep", "1"]).run()
    assert (end["ended"], end["exit_code"]) == ("entrypoint_not_found", 127)
    assert "'slep' is not on the PATH" in end["message"]
    assert "(did you mean 'sleep'?); its PATH is /" in end["message"]


def test_a_script_that_is_not_there_is_said_with_the_nearest(make: Make) -> None:
    attempt = make("python trian.py --lr 1")
    attempt.file("train.py", "print(1)\n")
    end = attempt.run()
    assert (end["ended"], end["exit_code"]) == ("entrypoint_not_found", 2)
    assert end["message"] == "python did not find 'trian.py' in the working directory; did you mean 'train.py'?"


def test_a_command_that_the_shell_does_not_find_is_said(make: Make) -> None:
    end = make("pyhton train.py").run()
    assert (end["ended"], end["exit_code"]) == ("entrypoint_not_found", 127)
    assert end["message"] == "the shell did not find 'pyhton'"
