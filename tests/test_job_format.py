"""What the command line shows: logs, plots, jobs in words, exit statuses, flags. No process, no cluster."""

from __future__ import annotations

import time

import pytest

from raylaunch.cli.cluster import export_lines, status_lines
from raylaunch.cli.console import count, size, span, table
from raylaunch.cli.job_format import exit_status, format_end, format_job, format_pack, jobs_table
from raylaunch.cli.jobs import since_time
from raylaunch.cli.metrics import chart
from raylaunch.cli.run import flags_of
from raylaunch.config.load import Flag, job_spec_from_flags
from raylaunch.errors import SpecError
from raylaunch.models.cluster import ClusterStatus, ProcessView, RayAccess
from raylaunch.models.job import AttemptView, FileFact, JobView, MetricPoint, MetricSeries, PackReport, format_metrics
from raylaunch.models.safe_text import LINE_LIMIT, LogView, clean
from raylaunch.models.states import JobState, Reason

NOW = 1_800_000_000.0


def shown(*pieces: bytes, terminal: bool = False, colour: bool = False) -> str:
    view = LogView(terminal=terminal, colour=colour)
    return "".join([*(view.feed(piece) for piece in pieces), view.finish()])


def job(state: JobState = JobState.SUCCEEDED, *, attempt: AttemptView | None = None, **facts: object) -> JobView:
    return JobView.model_validate(
        {
            "id": "digits-k3f9qa",
            "name": "digits",
            "owner": "ada",
            "state": state,
            "created_at": NOW - 100,
            "updated_at": NOW,
            "attempts": [attempt] if attempt else [],
            **facts,
        }
    )


def attempt(**facts: object) -> AttemptView:
    return AttemptView.model_validate({"id": "digits-k3f9qa-1", "n": 1, "admitted_at": NOW - 90, **facts})


def series(*values: float) -> MetricSeries:
    points = tuple(MetricPoint(step=step, value=value, at=NOW) for step, value in enumerate(values))
    return MetricSeries(key="loss", points=points, total=len(points))


def test_bytes_that_are_not_utf8_are_replaced() -> None:
    assert shown(b"a\xffb\n") == "a\ufffdb\n"


def test_a_character_that_arrives_in_two_pieces_is_one_character() -> None:
    assert shown("é".encode()[:1], "é".encode()[1:] + b"\n") == "é\n"


def test_control_characters_are_written_out_and_tabs_stay() -> None:
    assert shown(b"bell\x07\tback\x08\n") == "bell\\x07\tback\\x08\n"


def test_a_sequence_that_sets_the_clipboard_or_title_reaches_no_terminal() -> None:
    assert shown(b"\x1b]52;c;aGk=\x07\n", terminal=True, colour=True) == "\\x1b]52;c;aGk=\\x07\n"


def test_colour_stays_on_a_terminal_only() -> None:
    red = b"\x1b[31mred\x1b[0m\n"
    assert shown(red, terminal=True, colour=True) == red.decode()
    assert shown(red) == "red\n"
    assert shown(red, terminal=True) == "red\n"


def test_a_colour_that_arrives_in_two_pieces_stays_a_colour() -> None:
    assert shown(b"\x1b[3", b"1mred\n", terminal=True, colour=True) == "\x1b[31mred\x1b[0m\n"


def test_sequences_that_move_the_cursor_are_dropped() -> None:
    assert shown(b"\x1b[2J\x1b[Hhere\x1b[K\n", terminal=True, colour=True) == "here\n"


@pytest.mark.parametrize("hiding", ["8", "7", "40", "48;5;16", "38;2;0;0;0", "30", "1;8"])
def test_a_style_that_hides_text_is_dropped(hiding: str) -> None:
    found = shown(f"\x1b[{hiding}mhidden\n".encode(), terminal=True, colour=True)
    assert found in {"hidden\n", "\x1b[1mhidden\x1b[0m\n"}


def test_a_colour_ends_with_its_line() -> None:
    found = shown(b"\x1b[31mred\nplain\n", terminal=True, colour=True)
    assert found == "\x1b[31mred\x1b[0m\nplain\n"


@pytest.mark.parametrize("char", ["\U000e0041", "\U000e0101", "\u200b", "\u2066", "\u2028", "\ufeff", "\xad", "\x9b"])
def test_characters_that_are_not_seen_are_written_out(char: str) -> None:
    assert clean(f"a{char}b", colour=True).isascii()


def test_letters_emoji_and_joiners_stay() -> None:
    text = "naïve Ω 中文 👩\u200d💻 ❤\ufe0f"
    assert clean(text, colour=False) == text


def test_text_that_turns_the_direction_of_reading_is_written_out() -> None:
    assert clean("a\u202eb", colour=True) == "a\\u202eb"


def test_only_the_last_state_of_a_progress_bar_is_given_where_nobody_looks() -> None:
    assert shown(b" 10%\r 20%", b"\r 30%\nnext\n") == " 30%\nnext\n"


def test_a_progress_bar_moves_on_a_terminal() -> None:
    assert shown(b" 10%", b"\r 20%\n", terminal=True) == " 10%\r 20%\n"


def test_windows_line_ends_are_line_ends() -> None:
    assert shown(b"a\r", b"\nb\r\n") == "a\nb\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_a_very_long_line_is_cut_and_says_how_long_it_is(terminal: bool) -> None:  # noqa: FBT001 -- a parameter of pytest
    found = shown(*[b"x" * 1_000_000] * 10, b"\nnext\n", terminal=terminal)
    assert found == "x" * LINE_LIMIT + "… (10,000,000 bytes)\nnext\n"


def test_a_last_line_without_an_end_is_given_with_one() -> None:
    assert shown(b"a\nb") == "a\nb\n"
    assert shown(b"a\n") == "a\n"


def test_an_empty_line_stays() -> None:
    assert shown(b"a\n\nb\n") == "a\n\nb\n"


def test_a_chart_has_the_height_and_width_it_was_given() -> None:
    lines = chart(series(*(1 / (1 + n) for n in range(200))), width=60, height=8).splitlines()
    assert lines[0] == "loss  (200 points)"
    assert len(lines) == 8 + 3
    assert all(len(line) <= 60 for line in lines)
    assert lines[1].lstrip().startswith("1 ┤")
    assert lines[-1].strip() == "last 0.005, lowest 0.005, highest 1"


def test_a_falling_series_begins_at_the_top_left_and_ends_at_the_bottom_right() -> None:
    rows = [line.partition("┤")[2] for line in chart(series(3, 2, 1, 0), width=40, height=4).splitlines()[1:5]]
    assert rows[0][0] != "\u2800"
    assert rows[3][-1] != "\u2800"
    assert rows[0][-1] == rows[3][0] == "\u2800"


def test_charts_of_one_point_of_equal_values_and_of_none_are_drawn() -> None:
    assert "last 5, lowest 5, highest 5" in chart(series(5))
    assert "last 5, lowest 5, highest 5" in chart(series(5, 5, 5))
    assert chart(series(float("nan"))) == "loss  (1 points)\n  nothing to plot: no finite values"


@pytest.mark.parametrize(
    ("view", "status"),
    [
        (job(), 0),
        (job(JobState.FAILED, attempt=attempt(exit_code=3)), 3),
        (job(JobState.FAILED, attempt=attempt(signal="SIGKILL")), 137),
        (job(JobState.FAILED, attempt=attempt(signal="SIGSEGV")), 139),
        (job(JobState.FAILED), 1),
        (job(JobState.TIMED_OUT, attempt=attempt(signal="SIGTERM")), 124),
        (job(JobState.STOPPED, attempt=attempt(exit_code=0)), 143),
        (job(JobState.STOPPED), 143),
        (job(JobState.LOST), 1),
    ],
)
def test_a_shell_sees_the_jobs_own_status(view: JobView, status: int) -> None:
    assert exit_status(view) == status


def test_the_end_of_a_failed_job_shows_its_reason_and_last_lines() -> None:
    failed = job(JobState.FAILED, reason=Reason.EXIT_CODE, message="exited with status 3", log_tail=["one", "two"])
    assert format_end(failed) == [
        "digits-k3f9qa failed: exited with status 3",
        "last lines of its log:",
        "  │ one",
        "  │ two",
    ]


def test_the_end_of_a_job_that_succeeded_says_what_there_is_and_how_to_get_it() -> None:
    done = job(last_metrics={"loss": 0.25}, outputs=2, output_bytes=2048)
    assert format_end(done) == [
        "digits-k3f9qa succeeded",
        "metrics: loss 0.25   (raylaunch metrics digits-k3f9qa --plot)",
        "outputs: 2 files, 2.0 KiB   (raylaunch get digits-k3f9qa)",
    ]


def test_the_end_says_why_a_run_tracked_off_line_and_what_the_environment_does_less_well() -> None:
    done = job(
        last_metrics={"loss": 0.25},
        wandb={"mode": "offline", "run_id": "r", "project": "p", "why": "no W&B credentials"},
        environment={"warnings": ["wandb 0.30.0 writes its file in blocks"]},
    )
    assert format_end(done)[2:] == [
        "W&B: offline (no W&B credentials)",
        "warning: wandb 0.30.0 writes its file in blocks",
    ]


def test_a_foreign_job_is_marked_in_the_list() -> None:
    lines = jobs_table((job(foreign=True, started_at=NOW - 60, ended_at=NOW - 30),), now=NOW)
    assert lines == [
        "JOB                      STATE      OWNER  GPUS  SUBMITTED     RAN   WHY",
        "digits-k3f9qa (ray job)  succeeded  ada       -  1 m 40 s ago  30 s",
    ]


def test_an_unreachable_job_says_so() -> None:
    assert "running (unreachable)" in jobs_table((job(JobState.RUNNING, unreachable=True),), now=NOW)[1]
    assert "state      running (unreachable)" in format_job(job(JobState.RUNNING, unreachable=True), now=NOW)


def test_many_metrics_are_cut_and_counted() -> None:
    assert format_metrics({f"m{n}": n for n in range(10)}, limit=2) == "m0 0, m1 1, … 8 more"


def test_what_was_packed_left_out_and_largest_is_said() -> None:
    report = PackReport(
        files=3,
        bytes=3072,
        ignored=2,
        ignored_by=(".gitignore: *.pt", "built in: .venv/"),
        largest=(FileFact(path="data.csv", bytes=2048),),
    )
    assert format_pack(report, 1024) == [
        "Packed 3 files (3.0 KiB, 1.0 KiB compressed)",
        "Skipped 2 files and folders (.gitignore: *.pt; built in: .venv/)",
        "Largest: data.csv 2.0 KiB",
    ]


def test_export_lines_are_quoted_for_a_shell() -> None:
    access = RayAccess(gcs_address="127.0.0.1:6379", dashboard_url="http://127.0.0.1:8265", token="a'b $c")  # noqa: S106
    assert export_lines(access) == [
        "export RAY_ADDRESS=127.0.0.1:6379",
        "export RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265",
        "export RAY_AUTH_MODE=token",
        "export RAY_AUTH_TOKEN='a'\"'\"'b $c'",
        "export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0",
    ]


def test_rays_tools_may_look_beyond_loopback_for_a_cluster_that_is_there() -> None:
    access = RayAccess(gcs_address="10.0.0.1:6379", dashboard_url="http://127.0.0.1:8265", token="t")  # noqa: S106
    assert not any("RAY_ENABLE" in line for line in export_lines(access))


def test_the_status_shows_pids_ports_and_problems() -> None:
    status = ClusterStatus(
        name="local",
        kind="local",
        state="degraded",
        problems=("Ray (pid 7) is dead",),
        controller=ProcessView(pid=5, started_at=NOW - 70, alive=True, port=1, url="http://127.0.0.1:1"),
        ray=ProcessView(pid=7, started_at=NOW, alive=False, log="/x/ray.log"),
    )
    assert list(status_lines(status, now=NOW)) == [
        "cluster local is degraded",
        "  ! Ray (pid 7) is dead",
        "  controller  pid 5, http://127.0.0.1:1, up 1 m 10 s",
        "  ray         dead (was pid 7), log /x/ray.log",
        "  jobs        0 running, 0 queued",
    ]


def test_sizes_spans_and_counts_read_well() -> None:
    assert [size(number) for number in (0, 1023, 1536, 5 * 1024**3, 3 * 1024**4)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 GiB",
        "3.0 TiB",
    ]
    assert [span(seconds) for seconds in (-1, 8.4, 200, 18_120, 273_600)] == [
        "0 s",
        "8 s",
        "3 m 20 s",
        "5 h 2 m",
        "3 d 4 h",
    ]
    assert (count(1, "file"), count(1200, "file"), count(2, "process", "processes")) == (
        "1 file",
        "1,200 files",
        "2 processes",
    )
    assert table(("A", "N"), [("x", "1"), ("yy", "22")], right=(1,)) == ["A    N", "x    1", "yy  22"]


def test_since_is_a_duration_ago_or_a_date() -> None:
    assert since_time("2h", now=NOW) == NOW - 7200
    assert since_time("2026-03-01T00:00+00:00", now=NOW) == 1772323200.0
    assert since_time("2026-03-01", now=NOW) == time.mktime((2026, 3, 1, 0, 0, 0, 0, 0, -1))
    with pytest.raises(SpecError, match="--since: 'soon' is neither a duration nor a date"):
        since_time("soon", now=NOW)


def test_all_flags_together_make_a_job() -> None:
    given = {
        "name": "digits",
        "gpus": "2",
        "memory": "8GiB",
        "env": ("A=1", "HOME"),
        "secret": ("HF_TOKEN",),
        "timeout": "2h",
        "grace": "10s",
        "output": ("*.pt",),
        "outputs_size": "5GiB",
        "outputs_files": "20",
        "tag": ("x",),
        "environment": "venv:.venv",
        "tracking": "offline",
        "project": "p",
        "host": ("dgx",),
        "label": ("zone=a",),
        "resource": ("scratch=1",),
        "gpu_type": "H100",
        "priority": "-5",
        "retries": "1",
        "command": ("python", "train.py", "--lr", "0.1"),
    }
    spec = job_spec_from_flags(flags_of(given, {"HOME": "/root"}))
    assert spec.entrypoint == ("python", "train.py", "--lr", "0.1")
    assert (spec.resources.gpus, spec.resources.memory, spec.resources.custom) == (2, 8 * 1024**3, {"scratch": 1.0})
    assert spec.env == {"A": "1", "HOME": "/root"}
    assert (spec.timeout_s, spec.grace_s, spec.priority, spec.retries) == (7200, 10, -5, 1)
    assert (spec.where.hosts, spec.where.labels, spec.where.gpu_type) == (("dgx",), {"zone": "a"}, "H100")
    assert (str(spec.environment), spec.tracking.mode, spec.tracking.project) == ("venv:.venv", "offline", "p")
    assert (spec.outputs_size, spec.outputs_files) == (5 * 1024**3, 20)
    assert (spec.secrets, spec.outputs, spec.tags) == (("HF_TOKEN",), ("*.pt",), ("x",))


def test_one_quoted_word_with_blanks_is_for_a_shell_and_a_bare_word_is_a_program() -> None:
    assert flags_of({"command": ("python a.py | tee log",)}, {}) == [
        Flag("--", ("entrypoint",), "python a.py | tee log")
    ]
    assert flags_of({"command": ("./train",)}, {}) == [Flag("--", ("entrypoint",), ("./train",))]
    assert flags_of({"shell": "a && b"}, {}) == [Flag("--shell", ("entrypoint",), "a && b")]


def test_a_shell_command_and_a_program_together_are_refused() -> None:
    with pytest.raises(SpecError, match="--shell"):
        flags_of({"shell": "a", "command": ("b",)}, {})


def test_an_env_flag_that_is_no_pair_is_refused() -> None:
    with pytest.raises(SpecError) as caught:
        flags_of({"env": ("NOPE",)}, {})
    assert str(caught.value) == "--env: 'NOPE' is not NAME=VALUE\n  → NOPE is not set in this environment"
