"""Diagnosis of an ended attempt: evidence → change of state, reason and message; and whether a retry follows. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pathspec import GitIgnoreSpec

from raylaunch.contract import PRIVATE_RAY, Exit
from raylaunch.models.states import Change, Reason, Verdict

_MODULE = re.compile(r"No module named '?([\w.]+)'?")
_FILE = re.compile(r"(?:No such file or directory: |can't open file |did not find |the program )'([^'\n]{1,4096})'")
_IN_CODE = re.compile(r"^/.*/attempts/[^/]+/code/")
_MAX_NAMES = 20
"""How many names in the end of a log are checked; the last ones first."""
MAX_FREE_RETRIES = 3
"""How many retries do not count, because the machines failed and not the program."""
_GPU_MEMORY = re.compile(r"CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED|OutOfMemoryError: CUDA")
_RAY_INIT = (
    (
        re.compile(r"connecting to an existing cluster, num_cpus and num_gpus must not be provided"),
        ": under launcher: ray, ray.init() uses the cluster's Ray and takes no num_cpus or num_gpus; leave them out",
    ),
    (
        re.compile(r"Started a local Ray instance"),
        f": {PRIVATE_RAY}",
    ),
)
"""Output of programs whose ``ray.init()`` does not fit their launcher, and what to do."""
_DISK_FULL = re.compile(r"No space left on device|ENOSPC")
_MEMORY = re.compile(r"\bMemoryError\b|Cannot allocate memory")
_SHUTDOWN_SIGNALS = ("SIGTERM", "SIGKILL")
PUT_OFF = frozenset({Reason.HOST_DRAINED, Reason.CLUSTER_DOWN})
"""Reasons for which an attempt is stopped and its job queued again, without limit."""


def rule_against(text: str, rules: Sequence[str]) -> str:
    """Return which rule excluded a file from the package that `text` reports as missing; empty if none did.

    Args:
        text: the last output of a program.
        rules: the rules that excluded files from its package, as in `raylaunch.models.job.PackReport.ignored_by`.
    """
    for path in _missing(text):
        for rule in rules:
            if _matches(path, rule):
                return f"{path} is not sent: {rule}"
    return ""


def _missing(text: str) -> Iterator[str]:
    found = [(match.start(), tuple(_of_module(match[1]))) for match in _MODULE.finditer(text)]
    found += [(match.start(), (_relative(match[1]),)) for match in _FILE.finditer(text)]
    for _, paths in sorted(found, reverse=True)[:_MAX_NAMES]:
        yield from (path for path in paths if not path.startswith(("/", "../")))


def _relative(name: str) -> str:
    return _IN_CODE.sub("", name).removeprefix("./")


def _of_module(name: str) -> Iterator[str]:
    """Yield the files that may define a module: for ``utils.logging`` first ``utils/logging.py``, last ``utils/``."""
    parts = name.split(".")
    for depth in range(len(parts), 0, -1):
        path = "/".join(parts[:depth])
        yield from (f"{path}.py", f"{path}/", f"src/{path}.py", f"src/{path}/")


def _matches(path: str, rule: str) -> bool:
    """Whether a rule, written as ``FILE: PATTERN``, excludes `path`."""
    file, _, pattern = rule.partition(": ")
    if file == "built in":
        pattern = pattern.partition(" (")[0]
    folder = file.rpartition("/")[0]
    if folder.startswith(".."):
        return "/" not in pattern.rstrip("/") and GitIgnoreSpec.from_lines([pattern]).match_file(path)
    inside = path.removeprefix(f"{folder}/") if folder else path
    return (not folder or inside != path) and GitIgnoreSpec.from_lines([pattern]).match_file(inside)


@dataclass(frozen=True)
class Evidence:
    """What is known about an ended attempt.

    Attributes:
        exit: the runner's exit facts, or None if it left none.
        claimed: whether a runner ever claimed the attempt.
        stop_wanted: whether a person or the controller had requested a stop.
        node_alive: whether its node is still in the cluster.
        ray_message: Ray's message about the submission.
        ray_lost: whether Ray was restarted meanwhile.
        log_tail: last lines of the output; those of the failed rank if it is known.
        left_out_by: the rules that excluded files from its package.
    """

    exit: Exit | None
    claimed: bool
    stop_wanted: bool
    node_alive: bool = True
    ray_message: str = ""
    ray_lost: bool = False
    log_tail: tuple[str, ...] = ()
    left_out_by: tuple[str, ...] = ()


class Finding(NamedTuple):
    """How an attempt ended: the change of the job's state, reason, message, and exit code or signal."""

    change: Change
    reason: Reason
    message: str
    exit_code: int | None = None
    signal: str = ""
    failed_rank: int | None = None


_RAY_LOST = Finding(Change.LOSE, Reason.RAY_LOST, "Ray was restarted, which ended the job's processes")


def diagnose(evidence: Evidence) -> Finding:
    """Classify an ended attempt. The runner's exit facts outrank everything else."""
    exit_ = evidence.exit
    if exit_ is None:
        return _without_exit(evidence)
    if evidence.ray_lost and not evidence.stop_wanted and (exit_["by_ray"] or exit_["signal"] in _SHUTDOWN_SIGNALS):
        return _RAY_LOST
    found = _from_exit(exit_, evidence.log_tail)
    if found.change is Change.FAIL:
        not_sent = rule_against("\n".join((*evidence.log_tail, found.message)), evidence.left_out_by)
        found = found._replace(message=f"{found.message}; {not_sent}" if not_sent else found.message)
    return found._replace(failed_rank=exit_.get("failed_rank"))


def _without_exit(evidence: Evidence) -> Finding:
    if evidence.stop_wanted:
        return Finding(Change.END_STOPPED, Reason.STOP_REQUESTED, "stopped on request")
    if not evidence.node_alive:
        return Finding(Change.LOSE, Reason.NODE_LOST, "its node was lost while it was running")
    if evidence.ray_lost:
        return _RAY_LOST
    if not evidence.claimed:
        return Finding(Change.FAIL, Reason.RAY_REFUSED, _refusal_message(evidence.ray_message))
    message = "raylaunch's runner was killed (SIGKILL?), and the program with it"
    return Finding(Change.FAIL, Reason.RUNNER_DIED, message)


def _refusal_message(message: str) -> str:
    detail = f": {message.strip()}" if message.strip() else ""
    return f"Ray ended the submission before it started{detail}"


def _from_exit(exit_: Exit, log_tail: tuple[str, ...]) -> Finding:
    code, signal, text = exit_["exit_code"], exit_["signal"], exit_["message"]
    match exit_["ended"]:
        case "completed":
            change, reason, text = Change.SUCCEED, Reason.COMPLETED, text or "completed"
        case "stopped":
            return _stopped(exit_)
        case "timed_out":
            change, reason, text = Change.TIME_OUT, Reason.TIMEOUT, text or "ran longer than its timeout"
        case "environment":
            change, reason = Change.FAIL, Reason.ENVIRONMENT
        case "entrypoint_not_found":
            change, reason = Change.FAIL, Reason.ENTRYPOINT_NOT_FOUND
        case "runner_error":
            change, reason, text = Change.FAIL, Reason.RUNNER_DIED, f"raylaunch's runner failed: {text}"
        case "exit_code" | "signal":
            return _program_failed(exit_, log_tail)
    return Finding(change, reason, text, code, signal)


def _stopped(exit_: Exit) -> Finding:
    code, signal = exit_["exit_code"], exit_["signal"]
    if exit_["by_ray"]:
        return Finding(Change.END_STOPPED, Reason.STOPPED_BY_RAY, "stopped with Ray's own tools", code, signal)
    killed = f"; {exit_['killed']} remaining processes were killed" if exit_["killed"] else ""
    return Finding(Change.END_STOPPED, Reason.STOP_REQUESTED, f"stopped on request{killed}", code, signal)


def _program_failed(exit_: Exit, log_tail: tuple[str, ...]) -> Finding:
    code, signal = exit_["exit_code"], exit_["signal"]
    how = exit_["message"] or (
        f"the training was ended by {signal}" if signal else f"the training exited with status {code}"
    )
    tail = "\n".join(log_tail)
    if exit_["oom"]:
        message = f"{how}: the machine ran out of memory, and the kernel ended it"
        return Finding(Change.FAIL, Reason.OUT_OF_MEMORY, message, code, signal)
    if _GPU_MEMORY.search(tail):
        return Finding(Change.FAIL, Reason.GPU_OUT_OF_MEMORY, f"{how}: the GPU ran out of memory", code, signal)
    if _DISK_FULL.search(tail):
        return Finding(Change.FAIL, Reason.DISK_FULL, f"{how}: no space left on the node's disk", code, signal)
    if _MEMORY.search(tail):
        return Finding(Change.FAIL, Reason.OUT_OF_MEMORY, f"{how}: it could not allocate memory", code, signal)
    hint = next((hint for pattern, hint in _RAY_INIT if pattern.search(tail)), "")
    return Finding(Change.FAIL, Reason.SIGNAL if signal else Reason.EXIT_CODE, f"{how}{hint}", code, signal)


def after_drain(finding: Finding, why: Reason | None) -> Finding:
    """Return the finding for an attempt that was stopped in order to be retried.

    Args:
        finding: how it ended.
        why: the job's reason while it was stopping.
    """
    if finding.change is not Change.END_STOPPED or finding.reason is not Reason.STOP_REQUESTED:
        return finding
    reason = why if why in PUT_OFF else Reason.HOST_DRAINED
    return finding._replace(reason=reason, message=f"stopped because {reason.sentence}")


def retry_follows(reason: Reason, *, attempts: int, free_retries: int, retries: int) -> bool:
    """Whether the job is retried. `attempts` of it have ended; `free_retries` of those did not count."""
    match reason.verdict:
        case Verdict.RETRY_FREE:
            return free_retries < MAX_FREE_RETRIES
        case Verdict.RETRY:
            return attempts - free_retries <= retries
        case Verdict.FINAL | Verdict.WAIT:
            return False
