"""Assigns an id to each W&B run that an attempt opens: the first is the job's run, each further one is separate.

`startup/sitecustomize` installs it into ``wandb.sdk.wandb_init`` when a program of the attempt imports wandb (its
``_WandbInit.set_run_id``, where wandb 0.22 to 0.31 choose an id). An id that the program sets is kept, and a
wandb without that function chooses ids itself. Nothing here may break a program: after an error wandb decides. It runs
in any Python from 3.8 on, without the rest of raylaunch.

Ids are assigned through files in one folder of the attempt, for all its processes: the claim ``N`` is created
atomically, so no two processes get the same. A retry continues those runs of the previous attempt that did not finish
with status 0: those with the same project and name, in their order. So does a training that its launcher restarts
within the attempt (`ROUND`).
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
import threading
from typing import Any, NamedTuple

FOLDER = "RAYLAUNCH_WANDB_RUNS"
BASE = "RAYLAUNCH_WANDB_RUN_ID"
ROUND = ("RAYLAUNCH_WANDB_ROUND", "TORCHELASTIC_RESTART_COUNT")
"""Variables with the number of starts of the training in this attempt: Ray Train's, torchrun's."""
ATTEMPT = "attempt.json"
PLACES = "places"
_OPENS_ANOTHER = (True, "finish_previous", "create_new")

_last: dict[int, tuple[Any, Run]] = {}
"""By thread: the latest `wandb.init` that got an id."""
_used: set[str] = set()
"""Ids assigned where the attempt has no folder: on another node than its driver's."""


class Run(NamedTuple):
    """A run's id and name. `resume`: it may exist already, and is then continued."""

    id: str
    name: str
    resume: bool


class RunRequest(NamedTuple):
    """What is known about a run before it is opened.

    Args:
        base: the id of the first run; for rank N it is ``<job's run>-rank-N``.
        project: the run's project.
        name: the name that the program or WANDB_NAME sets.
        round: which start of the training this is.
        may_resume: whether it may be a run of an earlier attempt.
    """

    base: str
    project: str
    name: str
    round: str = "0"
    may_resume: bool = True


def claim(folder: str, request: RunRequest) -> Run:
    """Claim the next run of an attempt.

    Args:
        folder: the folder of the attempt's claims; its `ATTEMPT` has the job's run and name, and earlier runs.
        request: what is known about the run.

    Raises:
        OSError: the folder cannot be read or written.
    """
    attempt = _load(f"{folder}/{ATTEMPT}")
    claims: list[dict[str, Any]] = []
    while True:
        path = f"{folder}/{len(claims) + 1}"
        if os.path.exists(path):  # noqa: PTH110 -- pathlib is not loaded for this
            claims.append(_load(path))
            continue
        run = _choose(attempt, claims, request)
        if _write(path, {"id": run.id, **request._asdict()}):
            return run


def _load(path: str) -> dict[str, Any]:
    with open(path, encoding="utf-8") as file:  # noqa: PTH123 -- as above
        content: dict[str, Any] = json.load(file)
        return content


def _choose(attempt: dict[str, Any], claims: list[dict[str, Any]], request: RunRequest) -> Run:
    rounds: dict[str, list[str]] = {request.round: []}
    for one in claims:
        if (request.base, request.project, request.name) == (one["base"], one["project"], one["name"]):
            rounds.setdefault(one["round"], []).append(one["id"])
    before = len(rounds.pop(request.round))
    name = _name_of(attempt, request, before)
    for ids in reversed(list(rounds.values())):
        if len(ids) > before and request.may_resume:
            return Run(ids[before], name, resume=True)
    taken = {one["id"] for one in claims}
    found = _earlier_run(attempt["earlier"], request, name, before=before if name == request.name else 0)
    if found is not None and not found["finished"] and found["id"] not in taken and request.may_resume:
        return Run(found["id"], name, resume=True)
    unknown = request.base not in taken | {run["id"] for run in attempt["earlier"]}
    if unknown and (request.may_resume or attempt["n"] == 1):
        return Run(request.base, name, resume=request.may_resume)
    return Run(f"{request.base}-{attempt['n']}-{len(claims) + 1}", name, resume=False)


def _name_of(attempt: dict[str, Any], request: RunRequest, before: int) -> str:
    """Return the run's name: the program's, or the job's name with the rank, and from the second one on a number."""
    job, of_job = attempt["id"], attempt["name"]
    rank = request.base[len(job) :] if request.base.startswith(job) else ""
    if not of_job or request.name not in {of_job, of_job + rank}:
        return request.name
    return f"{of_job}{rank}-{before + 1}" if before else f"{of_job}{rank}"


def _earlier_run(
    earlier: list[dict[str, Any]], request: RunRequest, name: str, *, before: int
) -> dict[str, Any] | None:
    """Return the run of the latest earlier attempt with the same position as this one among those of its name."""
    own = re.compile(re.escape(request.base) + r"(-\d+-\d+)?")
    alike: dict[int, list[dict[str, Any]]] = {}
    for run in earlier:
        if (run["project"], run["name"]) == (request.project, name) and own.fullmatch(run["id"]):
            alike.setdefault(run["attempt"], []).append(run)
    return next((alike[n][before] for n in sorted(alike, reverse=True) if len(alike[n]) > before), None)


def _write(path: str, facts: dict[str, Any]) -> bool:
    """Create a claim atomically; False if another process was faster."""
    temporary = f"{path}.{os.getpid()}.{threading.get_ident()}"
    with open(temporary, "w", encoding="utf-8") as file:  # noqa: PTH123 -- as above
        json.dump(facts, file)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        os.unlink(temporary)  # noqa: PTH108 -- as above
    return True


def install(module: Any) -> None:  # noqa: ANN401 -- ``wandb.sdk.wandb_init``, of any version
    """Patch wandb to get the id of each run from here."""
    own = module._WandbInit.set_run_id  # noqa: SLF001 -- wandb has no public place for it

    @functools.wraps(own)
    def set_run_id(self: Any, settings: Any) -> None:  # noqa: ANN401 -- as wandb has it
        try:
            _assign_id(self, settings)
        except Exception as error:  # noqa: BLE001 -- the program must continue with any wandb
            _report(error)
        own(self, settings)
        try:
            _note(settings)
        except Exception as error:  # noqa: BLE001 -- as above
            _report(error)

    module._WandbInit.set_run_id = set_run_id  # noqa: SLF001 -- as above
    _advise_no_sync(module)


def _assign_id(init: Any, settings: Any) -> None:  # noqa: ANN401 -- wandb's own, of any version
    """Set the run's id, name and resume policy where the program has not."""
    if settings._noop or settings.sweep_id or settings.launch or settings.fork_from or settings.resume_from:  # noqa: SLF001
        return
    folder = os.environ.get(FOLDER, "")
    if settings.run_id is not None:
        if settings.resume is None and settings.run_id in _unfinished(folder):
            settings.resume = "allow"
        return
    base = _base()
    if not base or settings.resume == "must" or _returns_another(init, settings):
        return
    if settings.resume == "auto" and os.path.exists(settings.resume_fname):  # noqa: PTH110 -- as above
        return
    run = _retried(init) or _claim(folder, base, settings)
    if run is None:
        return
    _last[threading.get_ident()] = (init, run)
    settings.run_id = run.id
    if run.name:
        settings.run_name = run.name
    if run.resume and settings.resume is None:
        settings.resume = "allow"


def _base() -> str:
    base, rank = os.environ.get(BASE, ""), os.environ.get("RANK", "0")
    return base if not base or rank in {"", "0"} or base.endswith(f"-rank-{rank}") else f"{base}-rank-{rank}"


def _claim(folder: str, base: str, settings: Any) -> Run | None:  # noqa: ANN401 -- as above
    if not os.path.isdir(folder):  # noqa: PTH112 -- as above
        if base in _used:
            return None
        _used.add(base)
        return Run(base, "", resume=True)
    request = RunRequest(base, settings.project or "", settings.run_name or "", _round(), settings.resume != "never")
    return claim(folder, request)


def _round() -> str:
    return next((os.environ[name] for name in ROUND if name in os.environ), "0")


def _retried(init: Any) -> Run | None:  # noqa: ANN401 -- as above
    """Return the run of this thread's previous `wandb.init` if that failed: the program retries."""
    before, run = _last.get(threading.get_ident(), (None, None))
    return run if before is not None and before is not init and getattr(before, "run", init) is None else None


def _returns_another(init: Any, settings: Any) -> bool:  # noqa: ANN401 -- as above
    """Whether this `wandb.init` will return the open run instead of opening one."""
    open_run = getattr(init._wl, "most_recent_active_run", None)  # noqa: SLF001 -- as above
    return open_run is not None and settings.reinit not in _OPENS_ANOTHER and not settings._jupyter  # noqa: SLF001


def _unfinished(folder: str) -> set[str]:
    try:
        return {run["id"] for run in _load(f"{folder}/{ATTEMPT}")["earlier"] if not run["finished"]}
    except OSError:
        return set()


def _note(settings: Any) -> None:  # noqa: ANN401 -- as above
    """Note where the run is written, for the runner, which copies it into the attempt's folder."""
    folder = os.environ.get(FOLDER, "")
    if settings._noop or not os.path.isdir(folder):  # noqa: PTH112, SLF001 -- as above
        return
    line = json.dumps({"id": settings.run_id, "place": os.path.abspath(settings.wandb_dir)})  # noqa: PTH100 -- as above
    notes = os.open(f"{folder}/{PLACES}", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(notes, line.encode() + b"\n")
    finally:
        os.close(notes)


def _advise_no_sync(module: Any) -> None:  # noqa: ANN401 -- as above
    """Suppress the advice to sync an offline run by its path: that folder is removed with the attempt.

    wandb prints it when a run is finished, and its core when a program exits without that.
    """
    footer, to_proto = module.Run._footer_sync_info, module.Settings.to_proto  # noqa: SLF001 -- as above

    @functools.wraps(footer)
    def footer_on_line(*args: Any, **named: Any) -> None:  # noqa: ANN401 -- as wandb has it
        if not getattr(named.get("settings"), "_offline", False):
            footer(*args, **named)

    @functools.wraps(to_proto)
    def for_core(self: Any) -> Any:  # noqa: ANN401 -- as wandb has it
        proto = to_proto(self)
        if getattr(self, "_offline", False):
            proto.silent.value = True
        return proto

    module.Run._footer_sync_info = staticmethod(footer_on_line)  # noqa: SLF001 -- as above
    module.Settings.to_proto = for_core


def _report(error: Exception) -> None:
    sys.stderr.write(f"raylaunch: this wandb chooses the run's id itself ({type(error).__name__}: {error})\n")
