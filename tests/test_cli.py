"""The command line as processes: exit statuses, stdout and stderr, and the exact words of errors."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import click
import pytest
from support.api import Api, serving, token_of
from support.cli import run_cli
from support.waiting import wait_until

from raylaunch.cli.app import LazyGroup, raylaunch
from raylaunch.cluster.processes import identify
from raylaunch.cluster.record import new_record, save_record
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.models.job import AttemptView
from raylaunch.models.states import Change
from raylaunch.paths import cluster_paths, make_cluster_dirs, write_private

COMMANDS = sorted(LazyGroup().list_commands(click.Context(raylaunch)))


def environment(home: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    other = ("RAYLAUNCH_", "WANDB_", "VIRTUAL_ENV", "CONDA_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(other)}
    return {**kept, "RAYLAUNCH_HOME": str(home), "COLUMNS": "100", **(extra or {})}


def cli(
    home: Path, *words: str, cwd: Path | None = None, text: str = "", extra: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return run_cli(words, cwd=cwd or home, env=environment(home, extra), text=text)


@pytest.fixture
def api(home: Path, tmp_path: Path) -> Iterator[Api]:
    """A cluster whose controller is the API of this test: its record names a process that does nothing."""
    paths = cluster_paths("local")
    make_cluster_dirs(paths)
    with (
        serving(tmp_path / "store") as running,
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stand_in,
    ):
        record = new_record(ClusterSpec(), paths)
        port = int(running.url.rpartition(":")[2])
        save_record(
            paths, record.with_(wanted="running", controller=identify(stand_in.pid), ports={"controller": port})
        )
        write_private(paths.token, token_of("olga"))
        assert home
        try:
            yield running
        finally:
            stand_in.kill()


@pytest.fixture
def code(tmp_path: Path) -> Path:
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "train.py").write_text("print(1)\n")
    return folder


def submitted(home: Path, code: Path) -> str:
    done = cli(home, "submit", "--name", "digits", "--", "python", "train.py", cwd=code)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def with_log(api: Api, job: str, data: bytes) -> None:
    log = api.store / "jobs" / job / "attempt-1" / "logs" / "rank-0.log"
    log.parent.mkdir(parents=True)
    log.write_bytes(data)
    attempts = (AttemptView(id=f"{job}-1", n=1, admitted_at=1.0),)
    api.do(lambda: api.records.update(job, kind="starting", message="starts", change=Change.ADMIT, attempts=attempts))


def end_with(api: Api, job: str, *, exit_code: int) -> None:
    def end() -> None:
        facts = {"replicated": True, "ended_at": 2.0, "exit_code": exit_code}
        attempts = tuple(one.model_copy(update=facts) for one in api.records.get(job).attempts)
        change = Change.FAIL if exit_code else Change.SUCCEED
        api.records.update(job, kind="ended", message=f"exited with {exit_code}", change=change, attempts=attempts)

    api.do(end)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(home: Path, command: str) -> None:
    done = cli(home, command, "--help")
    assert done.returncode == 0
    assert "Example:  " in done.stdout


def test_the_help_lists_every_command_without_loading_them(home: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "raylaunch", "--help"],
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert all(f"  {command} " in done.stdout for command in COMMANDS)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"raylaunch.client.client", "raylaunch.cli.run", "httpx2", "rich", "ray", "wandb"}


def test_list_does_not_import_modules_that_only_submit_needs(home: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "raylaunch", "list"],
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "raylaunch.client.client" in loaded
    assert not loaded & {"ray", "wandb", "asyncssh", "fastapi", "rich", "pathspec", "tarfile", "raylaunch.cli.run"}


def test_a_mistyped_command_is_a_usage_error_with_the_nearest(home: Path) -> None:
    done = cli(home, "lits")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "Error: no such command 'lits' (nearest: list)"


@pytest.mark.parametrize(
    ("name", "near"), [("resume", "run"), ("top", "status"), ("remov", ""), ("stp", ""), ("delete", "")]
)
def test_a_destructive_command_is_not_suggested_for_a_typo(home: Path, name: str, near: str) -> None:
    ending = f" (nearest: {near})" if near else ""
    assert cli(home, name).stderr.splitlines()[-1] == f"Error: no such command {name!r}{ending}"


def test_with_json_an_error_is_json_too(home: Path, api: Api) -> None:
    assert api.url
    done = cli(home, "show", "nope", "--json")
    assert (done.returncode, json.loads(done.stdout)["error"]["code"]) == (1, "not_found")
    usage = cli(home, "list", "--json", "--limit", "many")
    assert (usage.returncode, json.loads(usage.stdout)["error"]["code"]) == (2, "usage")


def test_json_is_given_by_every_command_that_shows_state(home: Path, api: Api, code: Path) -> None:
    job = submitted(home, code)
    with_log(api, job, b"")
    api.do(lambda: api.records.update(job, kind="ended", message="done", change=Change.FAIL))
    assert json.loads(cli(home, "switch", "--json").stdout) == {"chosen": "local", "clusters": ["local"]}
    assert json.loads(cli(home, "get", job, "--json", "--to", "here").stdout) == []
    assert json.loads(cli(home, "rm", job, "--json").stdout)["removed"] == job


@pytest.mark.parametrize("words", [("list",), ("show", "x"), ("logs",), ("env",), ("stop", "x"), ("get",), ("du",)])
def test_without_a_cluster_a_command_shows_how_to_start_one(home: Path, words: tuple[str, ...]) -> None:
    done = cli(home, *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: there is no cluster here\n  → start it: raylaunch up\n"


def test_the_status_of_no_cluster_is_stopped(home: Path) -> None:
    done = cli(home, "status", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["state"] == "stopped"


def test_a_wrong_job_file_is_a_usage_error_before_anything_is_started(home: Path) -> None:
    (home / "job.yaml").write_text("entrypoint: x\nresorces: {}\n")
    done = cli(home, "run", "-f", "job.yaml")
    assert (done.returncode, done.stderr) == (2, "error: job.yaml:2: unknown key 'resorces' (nearest: resources)\n")
    assert not (home / "clusters").exists()


def test_a_missing_working_directory_is_reported_before_anything_starts(home: Path) -> None:
    done = cli(home, "run", "--working-dir", "/nowhere", "--", "true")
    assert (done.returncode, done.stderr) == (
        2,
        (
            "error: the working directory /nowhere does not exist\n"
            "  → give another with --working-dir, or working_dir: in job.yaml\n"
        ),
    )
    assert not (home / "clusters").exists()


def test_submit_prints_the_id_and_reports_the_packing_on_stderr(home: Path, api: Api, code: Path) -> None:
    assert api.url
    (code / "a.pyc").write_text("")
    done = cli(home, "submit", "--name", "digits", "--", "python", "train.py", "--gpus", "4", cwd=code)
    assert done.returncode == 0
    assert done.stdout.startswith("digits-")
    assert done.stderr.splitlines()[0].startswith("Packed 1 file (9 B, ")
    assert done.stderr.splitlines()[1:] == [
        "Skipped 1 file or folder (built in: *.pyc)",
        "Largest: train.py 9 B",
        f"Python {sys.version_info[0]}.{sys.version_info[1]} that runs Ray ({sys.prefix})",
        f"Submitted {done.stdout.strip()}: queued",
    ]
    spec = json.loads(cli(home, "show", "--json").stdout)["spec"]
    assert spec["entrypoint"] == ["python", "train.py", "--gpus", "4"]


def test_an_option_behind_the_program_without_dashes_is_pointed_out(home: Path, api: Api, code: Path) -> None:
    assert api.url
    for option in ("--gpus", "--dry-run", "--json"):
        done = cli(home, "submit", "train.py", option, "4", cwd=code)
        assert f"note: {option} is passed to train.py; put options of raylaunch before --" in done.stderr


def test_the_same_request_id_is_the_same_job_and_with_another_spec_an_error(home: Path, api: Api, code: Path) -> None:
    assert api.url
    first, again, other = (cli(home, "submit", "--request-id", "night", "--", word, cwd=code) for word in "xxy")
    assert first.stdout == again.stdout
    assert "request id" in again.stderr
    assert other.returncode == 1
    assert "'night'" in other.stderr


def test_the_wandb_key_of_the_environment_is_sent_and_mentioned_but_not_shown(home: Path, api: Api, code: Path) -> None:
    key = "0123456789" * 4
    done = cli(home, "submit", "--", "x", cwd=code, extra={"WANDB_API_KEY": key})
    assert "Sending the W&B key of this environment (WANDB_API_KEY), for this job only" in done.stderr
    assert key not in done.stdout + done.stderr + cli(home, "show", "--json").stdout
    assert not [path for path in (api.store / "jobs").rglob("*") if path.is_file() and key in path.read_text()]


def test_the_job_uses_the_active_environment_and_every_interface_shows_it(
    home: Path, api: Api, code: Path, tmp_path: Path
) -> None:
    assert api.url
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "pyvenv.cfg").write_text("version_info = 3.12.1\n")
    active = {"VIRTUAL_ENV": str(tmp_path / "venv")}
    expected = f"Python 3.12 from the active environment (venv:{tmp_path}/venv)"
    done = cli(home, "submit", "--", "x", cwd=code, extra=active)
    assert expected in done.stderr.splitlines()
    assert json.loads(cli(home, "show", "--json").stdout)["spec"]["environment"]["value"] == f"{tmp_path}/venv"
    assert f"environment  {expected}" in cli(home, "show").stdout
    assert expected in cli(home, "run", "--dry-run", "--", "x", cwd=code, extra=active).stdout
    script = "import raylaunch; print(raylaunch.connect().submit('x', working_dir='').view.chosen)"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(home, active), capture_output=True, text=True, check=True
    )
    own = f"Python {sys.version_info[0]}.{sys.version_info[1]} from the active environment (venv:{sys.prefix})"
    assert done.stdout.strip() == own  # whose interpreter runs the script


def test_a_dry_run_submits_nothing(home: Path, api: Api, code: Path) -> None:
    assert api.url
    done = cli(home, "run", "--dry-run", "--", "python", "train.py", cwd=code)
    assert (done.returncode, done.stdout.splitlines()) == (
        0,
        [
            "Packed 1 file (9 B, 156 B compressed)",
            "Largest: train.py 9 B",
            f"Python {sys.version_info[0]}.{sys.version_info[1]} that runs Ray ({sys.prefix})",
            "train would start on here at once",
        ],
    )
    assert json.loads(cli(home, "list", "--json").stdout)["total"] == 0


def test_a_refused_job_does_not_start_a_missing_cluster(home: Path, code: Path) -> None:
    odd = cli(home, "submit", "--", "x", cwd=code, extra={"WANDB_MODE": "sometimes"})
    assert (odd.returncode, odd.stdout, "WANDB_MODE" in odd.stderr) == (2, "", True)
    (code / ".env").write_text("TOKEN=1")
    for words in (["submit"], ["run"], ["run", "--dry-run"]):
        done = cli(home, *words, "--", "python", "train.py", cwd=code)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: these files look like secrets: .env")
    assert not (home / "clusters").exists()


def test_a_dry_run_starts_no_cluster_and_checks_all_it_can(home: Path, code: Path) -> None:
    (code / "cluster.yaml").write_text("gpus: 2\n")
    done = cli(home, "run", "--gpus", "2", "--dry-run", "--", "python", "train.py", cwd=code)
    python = f"Python {sys.version_info[0]}.{sys.version_info[1]} that runs Ray ({sys.prefix})"
    output = done.stdout.splitlines()
    assert (done.returncode, output[0].startswith("Packed 2 files"), python in output) == (0, True, True)
    assert "cluster 'local' is not running and would be started first" in output
    assert "cluster local: would start" in output
    found = json.loads(cli(home, "submit", "--json", "--dry-run", "--", "python", "train.py", cwd=code).stdout)
    assert (found["fits"], found["pack"]["files"], found["chosen"]["source"]) == ([], 2, "own")
    never = cli(home, "run", "--gpus", "3", "--dry-run", "--", "python", "train.py", cwd=code)
    assert (never.returncode, never.stdout, "can never run" in never.stderr) == (2, "", True)
    assert not (home / "clusters").exists()


@pytest.mark.slow
@pytest.mark.long
def test_an_upload_over_100_mb_is_confirmed_once_in_a_terminal(
    home: Path, code: Path, request: pytest.FixtureRequest
) -> None:
    (code / "data.bin").write_bytes(os.urandom(100_100_000))
    status, output = at_terminal(home, "submit", "--", "true", cwd=code, answer="n")
    assert (status, output.count("MiB to upload. Continue?")) == (130, 1), output
    assert not (home / "clusters").exists()
    request.getfixturevalue("api")
    status, output = at_terminal(home, "submit", "--", "true", cwd=code, answer="y")
    assert (status, output.count("MiB to upload. Continue?")) == (0, 1), output
    assert json.loads(cli(home, "list", "--json").stdout)["total"] == 1


def at_terminal(home: Path, *words: str, cwd: Path, answer: str) -> tuple[int, str]:
    """Run a command in a terminal whose person answers its question; return its status and all that was shown."""
    ours, theirs = os.openpty()
    program = [sys.executable, "-m", "raylaunch", *words]
    with subprocess.Popen(
        program, cwd=cwd, env=environment(home), stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    ) as process:
        os.close(theirs)
        seen = bytearray()

        def ended() -> bool:
            with contextlib.suppress(OSError):  # EIO: nobody has it open any more
                while select.select([ours], [], [], 0)[0] and (data := os.read(ours, 4096)):
                    seen.extend(data)
                    if seen.endswith(b"Continue? [y/N]: "):
                        os.write(ours, f"{answer}\n".encode())
            return process.poll() is not None

        wait_until(ended, 180, "the command ends")
    os.close(ours)
    return process.returncode, seen.decode()


def test_lists_and_shows_are_the_models_json(home: Path, api: Api, code: Path) -> None:
    assert api.url
    job = submitted(home, code)
    page = json.loads(cli(home, "list", "--json", "--state", "queued,running", "--name", "digits").stdout)
    assert [one["id"] for one in page["jobs"]] == [job]
    assert json.loads(cli(home, "show", "digits", "--json").stdout)["id"] == job
    assert cli(home, "list").stdout.splitlines()[1].startswith(f"{job}  queued  olga")


def test_a_page_shows_how_to_get_the_next_and_all_gets_every_page(home: Path, api: Api, code: Path) -> None:
    assert api.url
    jobs = [submitted(home, code) for _ in range(3)]
    page = cli(home, "list", "--limit", "2")
    assert page.stderr.startswith("Showing 2 of 3. Next page: raylaunch list --cursor ")
    cursor = page.stderr.split()[-1]
    assert cli(home, "list", "--cursor", cursor).stdout.splitlines()[1].startswith(jobs[0])
    assert len(json.loads(cli(home, "list", "--limit", "1", "--all", "--json").stdout)["jobs"]) == 3


def test_an_unknown_job_is_an_error_on_stderr(home: Path, api: Api) -> None:
    assert api.url
    done = cli(home, "show", "nope")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: no such job: 'nope'")


def test_logs_show_the_last_lines_and_raw_gives_the_bytes(home: Path, api: Api, code: Path) -> None:
    job = submitted(home, code)
    with_log(api, job, b"one\ntwo \xff\nthree\n")
    assert cli(home, "logs", "--tail", "2").stdout == "two \ufffd\nthree\n"
    assert cli(home, "logs", job, "--offset", "4").stdout == "two \ufffd\nthree\n"
    raw = subprocess.run(
        [sys.executable, "-m", "raylaunch", "logs", "--raw", "--tail", "2"],
        env=environment(home),
        cwd=home,
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert raw.stdout == b"two \xff\nthree\n"


def test_a_search_of_a_log_prints_numbered_lines_as_grep_does_and_the_last_of_them_with_tail(
    home: Path, api: Api, code: Path
) -> None:
    job = submitted(home, code)
    with_log(api, job, b"one\ntwo\nthree\n" * 60)
    found = cli(home, "logs", "--search", "t.*e", "--regex").stdout.splitlines()
    assert (len(found), found[0], found[-1]) == (60, "3:three", "180:three")
    assert cli(home, "logs", "--search", "two", "--tail", "1").stdout == "179:two\n"
    (match,) = json.loads(cli(home, "logs", "--search", "two", "--tail", "1", "--json").stdout)["matches"]
    assert match["line"] == 179
    refused = cli(home, "logs", "--since", "10s")
    assert refused.returncode == 2
    assert "no timestamps" in refused.stderr


def test_a_log_larger_than_one_answer_is_printed_whole(home: Path, api: Api, code: Path) -> None:
    job = submitted(home, code)
    lines = b"".join(b"line %d\n" % n for n in range(300_000))
    with_log(api, job, lines)
    assert cli(home, "logs", "--tail", "1000000").stdout.encode() == lines


def test_wait_exits_with_the_jobs_own_status(home: Path, api: Api, code: Path) -> None:
    job = submitted(home, code)
    with_log(api, job, b"")
    end_with(api, job, exit_code=7)
    done = cli(home, "wait")
    assert (done.returncode, done.stdout) == (7, f"{job} failed: exited with 7\n")


def test_wait_gives_up_after_its_timeout(home: Path, api: Api, code: Path) -> None:
    assert api.url
    job = submitted(home, code)
    done = cli(home, "wait", job, "--timeout", "200ms")
    assert (done.returncode, done.stderr) == (124, f"{job} did not end within 0.2 s\n")


def started(home: Path, code: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "raylaunch", *words],
        cwd=code,
        env=environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def only_job(api: Api) -> str:
    def ids() -> list[str]:
        return api.do(lambda: [record.id for record in api.records.page().jobs])

    return wait_until(ids, 30, "the job is submitted")[0]


def test_run_prints_the_log_to_stdout_and_exits_with_the_jobs_status(home: Path, api: Api, code: Path) -> None:
    with started(home, code, "run", "--name", "digits", "--", "python", "train.py") as process:
        job = only_job(api)
        with_log(api, job, b"epoch 1\n")
        end_with(api, job, exit_code=3)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (3, "epoch 1\n")
    assert err.splitlines()[-1] == f"{job} failed: exited with 3"
    assert "· starts" in err


def test_run_with_json_gives_the_job_on_stdout_and_the_log_on_stderr(home: Path, api: Api, code: Path) -> None:
    with started(home, code, "run", "--json", "--", "python", "train.py") as process:
        job = only_job(api)
        with_log(api, job, b"epoch 1\n")
        end_with(api, job, exit_code=0)
        out, err = process.communicate(timeout=60)
    assert json.loads(out)["state"] == "succeeded"
    assert "epoch 1\n" in err


def test_ctrl_c_while_following_detaches_and_leaves_the_job_alone(home: Path, api: Api, code: Path) -> None:
    with started(home, code, "run", "--", "python", "train.py") as process:
        job = only_job(api)
        with_log(api, job, b"epoch 1\n")
        assert process.stdout is not None
        assert process.stdout.readline() == "epoch 1\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert err.splitlines()[-1] == f"Detached; the job keeps running. Follow it again: raylaunch follow {job}"
    assert json.loads(cli(home, "show", job, "--json").stdout)["state"] == "starting"


def test_get_prints_the_destination_and_skips_files_that_are_present(home: Path, api: Api, code: Path) -> None:
    job = submitted(home, code)
    output = api.store / "jobs" / job / "attempt-1" / "outputs" / "model.pt"
    output.parent.mkdir(parents=True)
    output.write_bytes(b"weights")
    api.state.artifacts.finalize(job)
    first, again = (cli(home, "get", "digits", "--to", "here") for _ in range(2))
    assert (first.stdout, first.stderr) == ("here/model.pt\n", "Downloaded 1 file, 7 B; checksums verified\n")
    assert again.stderr == "Downloaded 0 files, 0 B, 1 file already present; checksums verified\n"
    assert (home / "here" / "model.pt").read_bytes() == b"weights"
    assert cli(home, "get", "digits").stdout == f"{job}/model.pt\n"
    (home / "here" / "model.pt").write_bytes(b"my own")
    kept = cli(home, "get", "digits", "--to", "here", "--json")
    assert kept.returncode == 1
    assert "model.pt" in json.loads(kept.stdout)["error"]["message"]


def test_secrets_are_read_from_stdin_and_only_their_names_are_shown(home: Path, api: Api) -> None:
    assert api.url
    assert cli(home, "secret", "set", "HF_TOKEN", text="hunter2\n").stderr == "Set HF_TOKEN\n"
    assert cli(home, "secret", "list").stdout == "HF_TOKEN\n"
    assert cli(home, "secret", "rm", "HF_TOKEN").returncode == 0
    assert cli(home, "secret", "set", "EMPTY").returncode == 2
    assert "'A=b' is not a valid name for a secret" in cli(home, "secret", "set", "A=b").stderr


def test_env_prints_lines_that_a_shell_evaluates(home: Path, api: Api) -> None:
    assert api.url
    lines = cli(home, "env").stdout
    shell = subprocess.run(["sh", "-c", f"{lines}\necho $RAY_AUTH_TOKEN"], capture_output=True, text=True, check=True)
    assert shell.stdout == "ray-token\n"


def test_an_output_pipe_that_closes_is_no_traceback(home: Path, api: Api, code: Path) -> None:
    job = submitted(home, code)
    with_log(api, job, b"line\n" * 300_000)
    command = f"{sys.executable} -m raylaunch logs --tail 1000000 | head -1"
    done = subprocess.run(
        ["sh", "-c", command], env=environment(home), cwd=home, capture_output=True, text=True, timeout=60, check=True
    )
    assert (done.stdout, done.stderr) == ("line\n", "")


def test_stop_and_rm_accept_several_jobs(home: Path, api: Api, code: Path) -> None:
    assert api.url
    one, other = submitted(home, code), submitted(home, code)
    stopped = cli(home, "stop", one, other, "--wait")
    assert stopped.stdout == f"{one} stopped\n{other} stopped\n"
    assert cli(home, "rm", one, other).stdout.startswith(f"removed {one} (")
    assert cli(home, "list").stderr == "No jobs\n"


def test_a_dry_run_of_up_fails_where_up_would(home: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        ports = one.getsockname()[1], other.getsockname()[1]
    hosts = "".join(f"  - {{host: 127.0.0.1, name: dgx-{port}, port: {port}}}\n" for port in ports)
    (tmp_path / "lab.yaml").write_text(f"name: lab\nhosts:\n{hosts}")
    assert cli(home, "trust", str(tmp_path / "lab.yaml")).returncode == 0
    done = cli(home, "-c", str(tmp_path / "lab.yaml"), "up", "--dry-run")
    assert (done.returncode, done.stdout.splitlines()[0]) == (1, "cluster lab: up would fail")
    assert all(f"dgx-{port}: " in done.stdout for port in ports)
