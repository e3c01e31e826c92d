"""The states of a job and their reasons, from the two enumerations."""

from __future__ import annotations

from raylaunch.controller.scheduler.diagnose import MAX_FREE_RETRIES, PUT_OFF
from raylaunch.models.states import JobState, Reason, Verdict
from tools.reference import markdown, source

_GROUPS = {
    "Why a job waits": {Verdict.WAIT},
    "Why an attempt ended": {Verdict.FINAL, Verdict.RETRY, Verdict.RETRY_FREE},
}
_VERDICTS = {Verdict.FINAL: "no", Verdict.RETRY: "yes", Verdict.RETRY_FREE: "yes, uncounted"}

_INTRODUCTION = """\
A job has a state; next to it is a reason: a stable word for programs, and a sentence for people with
the numbers of the job. `raylaunch show`, `--json`, Python and the MCP tools all give both."""
_TRIED = f"""\
*Retried* shows whether another attempt follows: `yes` while the job has `retries` left; `uncounted` when a machine
failed, {MAX_FREE_RETRIES} times at most, in addition to `retries`; `always`, without a limit, when the host was drained
or the cluster was taken down. A job that was stopped is not retried."""


def page() -> str:
    """Return the reference of states and reasons."""
    lines = [
        _INTRODUCTION,
        *markdown.heading(2, "States"),
        *markdown.table(
            ("state", "is"), [(markdown.code(JobState[one.name].value), one.text) for one in source.fields(JobState)]
        ),
    ]
    for title, verdicts in _GROUPS.items():
        lines += markdown.heading(2, title)
        lines += _table([reason for reason in Reason if reason.verdict in verdicts])
        if Verdict.RETRY in verdicts:
            lines.append(_TRIED)
    return markdown.page("States and reasons", "raylaunch/models/states.py", lines)


def _table(reasons: list[Reason]) -> list[str]:
    if reasons[0].verdict is Verdict.WAIT:
        rows = [(markdown.code(one.value), one.sentence, one.advice) for one in reasons]
        return markdown.table(("reason", "meaning", "what to do"), rows)
    ended = [(markdown.code(one.value), one.sentence, _tried(one), one.advice) for one in reasons]
    return markdown.table(("reason", "meaning", "retried", "what to do"), ended)


def _tried(reason: Reason) -> str:
    return "always" if reason in PUT_OFF else _VERDICTS[reason.verdict]
