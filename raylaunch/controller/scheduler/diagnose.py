"""Evidence → reason, sentence, verdict. Pure: what an attempt left behind goes in, what it means comes out."""

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
_TRIED = 20
"""How many names of a log's end are looked at; the last are tried first."""


def rule_against(text: str, rules: Sequence[str]) -> str:
    """Return a sentence that names the rule by which what `text` did not find was left out; empty when there is none.

    Args:
        text: what a program said at its end.
        rules: those that left something out of its package, as in `raylaunch.models.job.PackReport.ignored_by`.
    """
    for path in _missing(text):
        for rule in rules:
            if _matches(path, rule):
                return f"{path} is not sent: {rule}"
    return ""


def _missing(text: str) -> Iterator[str]:
    found = [(match.start(), tuple(_of_module(match[1]))) for match in _MODULE.finditer(text)]
    found += [(match.start(), (_relative(match[1]),)) for match in _FILE.finditer(text)]
    for _, paths in sorted(found, reverse=True)[:_TRIED]:
        yield from (path for path in paths if not path.startswith(("/", "../")))


def _relative(name: str) -> str:
    return _IN_CODE.sub("", name).removeprefix("./")


def _of_module(name: str) -> Iterator[str]:
    """Yield the files that a module may be: of ``utils.logging`` first ``utils/logging.py``, last ``utils/``."""
    parts = name.split(".")
    for depth in range(len(parts), 0, -1):
        path = "/".join(parts[:depth])
        yield from (f"{path}.py", f"{path}/", f"src/{path}.py", f"src/{path}/")


def _matches(path: str, rule: str) -> bool:
    """Whether a rule, which is written as ``FILE: PATTERN``, leaves out `path`."""
    file, _, pattern = rule.partition(": ")
    if file == "built in":
        pattern = pattern.partition(" (")[0]
    folder = file.rpartition("/")[0]
    if folder.startswith(".."):
        return "/" not in pattern.rstrip("/") and GitIgnoreSpec.from_lines([pattern]).match_file(path)
    inside = path.removeprefix(f"{folder}/") if folder else path
    return (not folder or inside != path) and GitIgnoreSpec.from_lines([pattern]).match_file(inside)


MAX_FREE_RETRIES = 3
"""Attempts that are made anew without counting when the machines failed, not the program."""

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
"""What training says whose ``ray.init()`` does not fit how it was started, and what to do."""
_DISK_FULL = re.compile(r"No space left on device|ENOSPC")
_MEMORY = re.compile(r"\bMemoryError\b|Cannot allocate memory")


@dataclass(frozen=True)
class Evidence:
    """What is known of an attempt that is over.

    Attributes:
        exit: the runner's exit facts, or None when it left none.
        claimed: whether a runner ever claimed the attempt.
        stop_wanted: a person or the controller had asked to stop it.
        node_alive: whether its node is still in the cluster.
        ray_message: what Ray says of the submission.
        ray_lost: whether Ray itself was restarted meanwhile.
        log_tail: last lines of the training's output; of the rank that failed, where that is known.
        left_out_by: the rules that left something out of its package.
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
    """How an attempt ended: the change to the job, why, a sentence, and the exit as numbers."""

    change: Change
    reason: Reason
    message: str
    exit_code: int | None = None
    signal: str = ""
    failed_rank: int | None = None


_RAY_LOST = Finding(Change.LOSE, Reason.RAY_LOST, "Ray was restarted under it, which ended its processes")
_RAY_GOING_DOWN = ("SIGTERM", "SIGKILL")


def diagnose(evidence: Evidence) -> Finding:
    """Classify an attempt that is over. Exit facts outrank everything else."""
    exit_ = evidence.exit
    if exit_ is None:
        return _without_exit(evidence)
    if evidence.ray_lost and not evidence.stop_wanted and (exit_["by_ray"] or exit_["signal"] in _RAY_GOING_DOWN):
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
        return Finding(Change.LOSE, Reason.NODE_LOST, "its node is gone, and with it the attempt")
    if evidence.ray_lost:
        return _RAY_LOST
    if not evidence.claimed:
        return Finding(Change.FAIL, Reason.RAY_REFUSED, _refusal_message(evidence.ray_message))
    message = "raylaunch's runner was killed (SIGKILL?); its training was ended with it"
    return Finding(Change.FAIL, Reason.RUNNER_DIED, message)


def _refusal_message(message: str) -> str:
    detail = f": {message.strip()}" if message.strip() else ""
    return f"Ray ended the submission before it began{detail}"


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
    killed = f"; {exit_['killed']} processes were left over and ended" if exit_["killed"] else ""
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


PUT_OFF = frozenset({Reason.HOST_DRAINED, Reason.CLUSTER_DOWN})
"""Why an attempt is stopped and its job queued again, however often."""


def after_drain(finding: Finding, why: Reason | None) -> Finding:
    """Return what the end of an attempt means that was stopped so that another follows.

    Args:
        finding: how it ended.
        why: the job's reason while it was stopped.
    """
    if finding.change is not Change.END_STOPPED or finding.reason is not Reason.STOP_REQUESTED:
        return finding
    reason = why if why in PUT_OFF else Reason.HOST_DRAINED
    return finding._replace(reason=reason, message=f"stopped because {reason.sentence}")


def retry_follows(reason: Reason, *, attempts: int, free_retries: int, retries: int) -> bool:
    """Whether another attempt is made. `attempts` of the job have ended; `free_retries` of those did not count."""
    match reason.verdict:
        case Verdict.RETRY_FREE:
            return free_retries < MAX_FREE_RETRIES
        case Verdict.RETRY:
            return attempts - free_retries <= retries
        case Verdict.FINAL | Verdict.WAIT:
            return False
