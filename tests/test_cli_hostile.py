"""Whatever a head, a job or a person puts into a field, the command line prints nothing that acts on a terminal."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from pydantic import BaseModel, RootModel
from support.any_head import any_head
from support.hostile import HOSTILE, bad_in, hostile, model

from raylaunch.cli.app import main, raylaunch
from raylaunch.cli.cluster import export_lines, say_status
from raylaunch.cli.connect import show_step
from raylaunch.cli.console import (
    complain,
    complain_bug,
    complain_usage,
    note,
    say,
    say_lines,
    shown_text,
    styled,
)
from raylaunch.cli.demo import progress_line
from raylaunch.cli.doctor import doctor_lines
from raylaunch.cli.hosts import say_removed
from raylaunch.cli.job_format import format_dry_run, format_pack
from raylaunch.cli.logs import say_end
from raylaunch.cluster.doctor.examine import Findings
from raylaunch.cluster.processes import identify
from raylaunch.cluster.record import new_record, save_record
from raylaunch.cluster.types import DownReport, Ended, Plan, Step
from raylaunch.errors import RaylaunchError
from raylaunch.models.cluster import ClusterPython, ClusterStatus, HostJobs, Invitation, RayAccess, TokenView
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.models.job import (
    Artifact,
    DryRun,
    EventPage,
    JobPage,
    JobView,
    LogMatches,
    MetricsPage,
    PackReport,
    SubmitAnswer,
    UsagePage,
)
from raylaunch.models.safe_text import CleanFormatter
from raylaunch.paths import cluster_paths, make_cluster_dirs, write_private

_JOB = "digits-k3f9qa"


def check(capsys: pytest.CaptureFixture[str]) -> str:
    found = capsys.readouterr()
    text = found.out + found.err
    assert not bad_in(text)
    assert not [line for line in text.split("\n") if line.startswith("FAKE")]
    assert "FAKE" in text, "nothing hostile was printed: the test proves nothing"
    return text


def job(**facts: object) -> JobView:
    return model(JobView, id=_JOB, attempts=[hostile(JobView.model_fields["attempts"].annotation)[0]] * 2, **facts)  # type: ignore[index]


_DOWN = DownReport(HOSTILE, (Ended(HOSTILE, 7, HOSTILE), Ended(HOSTILE)), HOSTILE, notes=(HOSTILE,))


def _logged(text: str) -> None:
    record = logging.LogRecord("x", logging.WARNING, "", 1, "%s", (text,), None)
    print(CleanFormatter().format(record))  # noqa: T201 -- what a handler writes


PRINTED: dict[str, Callable[[], object]] = {
    "status": lambda: say_status(model(ClusterStatus), as_json=False),
    "status --json": lambda: say_status(model(ClusterStatus), as_json=True),
    "doctor": lambda: say_lines(doctor_lines(model(Findings))),
    "end of a job": lambda: say_end(job(), as_json=True),
    "packed": lambda: say_lines(format_pack(model(PackReport), 1)),
    "dry run": lambda: say_lines(format_dry_run(model(DryRun, wheels_for=[], wheels_there=[]))),
    "step": lambda: show_step(Step(HOSTILE, "done", HOSTILE)),
    "error": lambda: complain(RaylaunchError(HOSTILE, hint=HOSTILE)),
    "note": lambda: note(HOSTILE),
    "plan": lambda: say_lines(str(Plan(HOSTILE, (HOSTILE,), (HOSTILE,), (HOSTILE,))).split("\n")),
    "plan that would fail": lambda: say_lines(str(Plan(HOSTILE, (), problems=(HOSTILE,))).split("\n")),
    "down": lambda: say_lines(str(_DOWN).split("\n")),
    "down of what was not up": lambda: say_lines(str(DownReport(HOSTILE, (), HOSTILE)).split("\n")),
    "remove": lambda: say_removed(_DOWN, HOSTILE, reached=False),
    "exports": lambda: say_lines(export_lines(model(RayAccess, gcs_address="127.0.0.1:1"))),
    "demo: state": lambda: note(progress_line(job(), model(MetricsPage))),
    "a mistake in the arguments": lambda: complain_usage(click.UsageError(HOSTILE, ctx=click.Context(raylaunch))),
    "a mistake in an option": lambda: complain_usage(click.BadParameter(HOSTILE, param_hint=HOSTILE)),
    "a bug": lambda: complain_bug(ValueError, ValueError(HOSTILE), None),
    "a logged warning": lambda: _logged(HOSTILE),
    "result": lambda: say(HOSTILE),
}


@pytest.mark.parametrize("what", PRINTED)
def test_no_printed_field_controls_the_terminal(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    PRINTED[what]()
    check(capsys)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A home whose cluster ``local`` is a head that fills every field with hostile text."""
    monkeypatch.setenv("RAYLAUNCH_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    base = f"/v1/jobs/{_JOB}"
    models: dict[str, BaseModel] = {
        "/v1/jobs": model(JobPage),
        base: job(state="failed"),
        f"{base}/files": RootModel[list[Artifact]]([model(Artifact), model(Artifact, link="", left=False)]),
        f"{base}/events": model(EventPage),
        f"{base}/metrics": model(MetricsPage),
        f"{base}/logs/search": model(LogMatches, more=False),
        "/v1/usage": model(UsagePage),
        "/v1/tokens": RootModel[list[TokenView]]([model(TokenView)]),
        "/v1/hosts/gpu-1/drain": model(HostJobs),
        f"{base}/stop": model(JobView, state="stopping"),
        "/v1/python": model(ClusterPython),
        "/v1/ray": model(RayAccess, gcs_address="127.0.0.1:1"),
        "/v1/secrets": RootModel[list[str]]([HOSTILE]),
    }
    answers = {path: one.model_dump_json().encode() for path, one in models.items()}
    answers[f"{base}/metrics.csv"] = HOSTILE.encode()
    answers[f"DELETE {base}"] = b'{"removed": "x", "bytes": 1}'
    answers["POST /v1/jobs"] = model(SubmitAnswer, job=job()).model_dump_json().encode()
    answers["POST /v1/tokens"] = model(Invitation, expires_at=2e9, cluster="c").model_dump_json().encode()
    with any_head(answers, missing=HOSTILE) as reach:
        paths = cluster_paths("local")
        make_cluster_dirs(paths)
        record = new_record(ClusterSpec(), paths)
        port = int(reach.url.rpartition(":")[2])
        save_record(paths, record.with_(wanted="running", controller=identify(os.getpid()), ports={"controller": port}))
        write_private(paths.token, "any")
        yield


COMMANDS = [
    "list",
    "list --json",
    f"show {_JOB}",
    f"show {_JOB} --json",
    f"wait {_JOB}",
    f"files {_JOB}",
    f"get {_JOB} --all",
    "du",
    f"metrics {_JOB}",
    f"metrics {_JOB} --keys",
    f"metrics {_JOB} --plot",
    f"metrics {_JOB} --json",
    f"logs {_JOB} --search x",
    f"logs {_JOB} --search x --json",
    "secret list",
    "token list",
    "token list --json",
    "show no-such-job",
    "drain gpu-1",
    "drain gpu-1 --json",
    "drain gpu-1 --off",
    f"stop {_JOB}",
    f"stop {_JOB} --json",
    "submit --working-dir= -- true",
    "submit --working-dir= --json -- true",
    "env",
    "stop no-such-job",
    "rm no-such-job",
]


WRONG = [
    [HOSTILE],
    ["list", HOSTILE],
    ["list", f"--{HOSTILE}"],
    ["list", "--limit", HOSTILE],
    ["files", "--kind", HOSTILE],
    ["show", _JOB, HOSTILE],
    ["list", "--state", HOSTILE],
    ["--cluster", HOSTILE, "list"],
    ["-c", HOSTILE.replace("\x00", ""), "list"],
    ["run", "-f", HOSTILE],
    ["run", "--env", HOSTILE, "--", "true"],
    ["list", "--json", "--limit", HOSTILE],
    ["up", HOSTILE],
]


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("words", WRONG, ids=range(len(WRONG)))
def test_invalid_arguments_are_quoted_without_control_characters(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("train.py").write_text("")
    monkeypatch.setattr(sys, "argv", ["raylaunch", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in {1, 2}
    check(capsys)


def test_a_traceback_of_the_program_is_sanitised(tmp_path: Path) -> None:
    code = "from raylaunch.cli.console import sanitise_bugs_and_logs as s; s(); import logging, sys\n"
    code += f"logging.getLogger('x').warning('%s', {HOSTILE!r})\nraise RuntimeError({HOSTILE!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "RuntimeError: a" in done.stderr
    assert done.stderr.count("FAKE") >= 2
    assert not bad_in(done.stderr)
    assert not [line for line in done.stderr.split("\n") if line.startswith("FAKE")]


def test_exports_for_a_shell_have_no_names_but_rays_own() -> None:
    tls = {"x=1; touch /tmp/x #": "1", "LD_PRELOAD": "/x", "RAY_USE_TLS": "1"}
    lines = export_lines(model(RayAccess, gcs_address="127.0.0.1:1", tls=tls))
    assert [line for line in lines if "TLS" in line] == ["export RAY_USE_TLS=1"]
    assert not [line for line in lines if "PRELOAD" in line or "touch" in line]


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_prints_control_characters(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raylaunch.main(command.split(), standalone_mode=False, prog_name="raylaunch")
    except RaylaunchError as error:
        complain(error)
    check(capsys)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_styles_are_put_on_after_the_text_was_sanitised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    text = shown_text(f"{styled(HOSTILE, 'red', _Terminal())} {HOSTILE}")
    assert text.startswith("\x1b[31ma")
    assert text.count("\x1b") == 2
    assert not bad_in(text.replace("\x1b[31m", "").replace("\x1b[0m", ""))


def test_a_model_of_the_wire_is_hostile_in_every_text_field() -> None:
    answer = model(SubmitAnswer).model_dump(mode="json")
    assert answer["job"]["message"] == HOSTILE
    assert answer["job"]["environment"]["packages"] == [HOSTILE]
