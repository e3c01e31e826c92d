"""Records what Ray Train's workers report, for the job's W&B run. The only module that knows Ray Train.

``RAY_TRAIN_CALLBACKS`` names `TrainReports`: Ray Train V2 creates one in the driver of each training run and calls it
in the run's controller, a process of its own on the driver's node. Its base classes are internal to Ray
(ray/train/v2/_internal/execution/callback.py, read in Ray 2.60).

Nothing here waits for W&B: a controller that waits delays its training, and one that is killed reports nothing more.
Reports are appended to a file of the attempt, and `raylaunch.tracking.train_writer`, which outlives controller
and driver, logs its content. Each also becomes a line of ``progress.jsonl``, as `raylaunch.report` would write
it, so it is available when W&B is disabled too.

Only reports of rank 0 count; a report's step is its number. After a restart of the workers the number returns to their
latest checkpoint, where they resume; repeated steps are recorded once.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
from ray.train.v2._internal.execution.callback import ControllerCallback, ReportCallback, WorkerGroupCallback

from raylaunch import contract
from raylaunch.tracking import wandb_runs

if TYPE_CHECKING:
    from typing_extensions import ParamSpec

    _Params = ParamSpec("_Params")

_log = logging.getLogger(__name__)
_Done = TypeVar("_Done")

_LONGEST_TEXT = 1000
_LONGEST_LIST = 1000
_MANY_RUNS = 1000
_FINISH_S = 20.0
"""How long the workers' own W&B runs may take to finish."""


def _never_fails(hook: Callable[_Params, _Done]) -> Callable[_Params, _Done | None]:
    """Log an exception of a hook: Ray Train would end the training for it."""

    @functools.wraps(hook)
    def guarded(*args: _Params.args, **named: _Params.kwargs) -> _Done | None:
        try:
            return hook(*args, **named)
        except Exception:  # noqa: BLE001 -- reporting must not end the training
            _log.exception("raylaunch could not record the training's report (%s)", hook.__name__)
            return None

    return guarded


class TrainReports(ControllerCallback, ReportCallback, WorkerGroupCallback):  # type: ignore[misc]  # ray has no types
    """Records the reports of one training run. Outside a raylaunch job it does nothing."""

    def __init__(self) -> None:
        environ = os.environ
        self._file = environ.get(contract.VAR_TRAIN_REPORTS, "")
        self._progress = environ.get(contract.VAR_PROGRESS, "")
        self._run = self._base = environ.get(contract.VAR_WANDB_RUN, "")
        self._label = environ.get("WANDB_NAME", "")
        self._next = 0
        """The step of the next report."""
        self._written = 0
        """Steps below this are recorded."""
        self._resumes_at = 0
        """The step after the latest checkpoint."""
        self._own: bool | None = None
        """Whether rank 0 tracks with W&B itself; None until its first report."""
        self._workers: Any = None
        self._starts = 0
        """How often the workers were started."""
        self._facts: dict[str, object] = {}
        """What the run is opened with, if it is opened for the reports."""

    # -- hooks of Ray Train ----------------------------------------------------------------------------------------

    @_never_fails
    def after_controller_start(self, train_run_context: Any) -> None:  # noqa: ANN401 -- Ray's own, without a public type
        """Name the W&B run; find where a run that continues in the same storage stopped."""
        if not self._file:
            return
        run_config = train_run_context.get_run_config()
        n = self._claim_number()
        if n > 1:
            self._run = self._base = f"{self._base}-{n}"
            self._label = f"{self._label}-{run_config.name}"
        self._next = self._written = self._resumes_at = _reports_before(run_config.storage_context)
        config = train_run_context.train_loop_config
        self._facts = {
            "config": plain_row(config) if isinstance(config, Mapping) else {},
            "workers": train_run_context.scaling_config.num_workers,
        }

    @_never_fails
    def after_worker_group_start(self, worker_group: Any) -> None:  # noqa: ANN401 -- as above
        """Assign a W&B run to each rank that opens one; rank 0's is the job's."""
        super().after_worker_group_start(worker_group)
        if not self._file:
            return
        self._workers = worker_group
        self._next = self._resumes_at
        worker_group.execute(_run_namer(self._base, self._label, self._starts))
        self._starts += 1

    @_never_fails
    def after_report(self, training_report: Any, metrics: Sequence[Mapping[str, Any]]) -> None:  # noqa: ANN401 -- as above
        """Record what rank 0 reports."""
        if not self._file or not metrics:
            return
        step = self._next
        self._next += 1
        if training_report.checkpoint is not None:
            self._resumes_at = self._next
        if step < self._written:
            return
        self._written = self._next
        if self._own is None:
            self._own = bool(self._workers.execute_single(0, _own_run_check()))
            if not self._own:
                self._open_run()
        row = plain_row(metrics[0])
        if not self._own:
            self._write_event(event="report", step=step, row=row)
        self._write_progress(step, row)

    @_never_fails
    def before_worker_group_shutdown(self, worker_group: Any) -> None:  # noqa: ANN401 -- as above
        """Finish the W&B runs that workers have opened, since workers are killed before they can."""
        super().before_worker_group_shutdown(worker_group)
        if not self._file:
            return
        status = worker_group.get_latest_poll_status()
        finishing = worker_group.execute_async(_run_finisher(1 if status is not None and status.errors else 0))
        ray.wait(finishing, num_returns=len(finishing), timeout=_FINISH_S)

    @_never_fails
    def after_controller_finish(self, result: Any) -> None:  # noqa: ANN401 -- as above
        """Record that the run has ended, and whether it failed."""
        if self._file:
            self._write_event(event="end", exit_code=1 if result.error else 0)

    @_never_fails
    def before_controller_abort(self) -> None:
        """Record that the run was interrupted."""
        if self._file:
            self._write_event(event="end", exit_code=contract.INTERRUPTED)

    # -- what is written -------------------------------------------------------------------------------------------

    def _open_run(self) -> None:
        """Request a run for the reports: the attempt's next, which is the job's if the program opened none."""
        with contextlib.suppress(OSError, ValueError, KeyError):  # where ids are not assigned it is the job's run
            request = wandb_runs.RunRequest(self._base, os.environ.get("WANDB_PROJECT", ""), self._label)
            self._run, self._label, _ = wandb_runs.claim(os.environ.get(contract.VAR_WANDB_RUNS, ""), request)
        self._write_event(event="start", name=self._label, **self._facts)

    def _claim_number(self) -> int:
        """Return which training run of the attempt this is, from 1. No two get the same."""
        for n in range(1, _MANY_RUNS):
            with contextlib.suppress(FileExistsError):
                os.close(os.open(f"{self._file}.{n}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
                return n
        return _MANY_RUNS

    def _write_event(self, **facts: object) -> None:
        _append(self._file, {"at": time.time(), "run": self._run, **facts})

    def _write_progress(self, step: int, row: Mapping[str, object]) -> None:
        numbers = {
            name: float(value)
            for name, value in row.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        if self._progress:
            _append(self._progress, {"at": time.time(), "step": step, "metrics": numbers, "source": "ray.train"})


def _append(path: str, facts: Mapping[str, object]) -> None:
    """Append one line with one write, so that lines of several processes do not mix."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, json.dumps(facts).encode() + b"\n")
    finally:
        os.close(fd)


def _reports_before(storage: Any) -> int:  # noqa: ANN401 -- Ray's own, without a public type
    """Return how many reports precede the checkpoint from which a run in this storage continues; 0 for a new run."""
    place = Path(storage.experiment_fs_path, CHECKPOINT_MANAGER_SNAPSHOT_FILENAME).as_posix()
    try:
        with storage.storage_filesystem.open_input_stream(place) as file:
            snapshot = json.loads(file.read())
    except (OSError, ValueError):
        return 0
    return int(snapshot.get("current_report_index", 0)) if isinstance(snapshot, dict) else 0


# -- what runs in workers. Nested functions are pickled by value: a worker needs no raylaunch. ------------------------


def _run_namer(run: str, label: str, starts: int) -> Callable[[], None]:
    base, round_ = contract.VAR_WANDB_RUN, wandb_runs.ROUND[0]

    def name_the_run() -> None:
        from ray.train import get_context  # noqa: PLC0415 -- in the worker

        rank = get_context().get_world_rank()
        os.environ[base] = f"{run}-rank-{rank}" if rank else run
        os.environ[round_] = str(starts)
        if label:
            os.environ["WANDB_NAME"] = f"{label}-rank-{rank}" if rank else label

    return name_the_run


def _run_finisher(exit_code: int) -> Callable[[], None]:
    def finish_own_run() -> None:
        run = getattr(sys.modules.get("wandb"), "run", None)
        if run is not None:
            run.finish(exit_code=exit_code)

    return finish_own_run


def _own_run_check() -> Callable[[], bool]:
    def has_own_run() -> bool:
        """Whether this process has opened a W&B run."""
        return getattr(sys.modules.get("wandb"), "run", None) is not None

    return has_own_run


# -- values ----------------------------------------------------------------------------------------------------------


def plain_row(values: Mapping[Any, Any]) -> dict[str, object]:
    """Return a mapping as JSON data: ``a/b`` for the value ``b`` of a mapping ``a``, numbers as numbers."""
    row: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            row.update({f"{name}/{inner}": found for inner, found in plain_row(value).items()})
        else:
            row[str(name)] = plain(value)
    return row


def plain(value: Any) -> object:  # noqa: ANN401 -- whatever a person reports
    """Return a value as JSON data. Anything but a number, text or list of these becomes text."""
    if value is None or isinstance(value, bool | int | float | str):
        return value[:_LONGEST_TEXT] if isinstance(value, str) else value
    if isinstance(value, list | tuple):
        return [plain(item) for item in value[:_LONGEST_LIST]]
    with contextlib.suppress(TypeError, ValueError, RuntimeError):
        number = float(value)  # numpy's scalars, and tensors with one element
        return int(number) if math.isfinite(number) and number == int(number) and _is_whole(value) else number
    return str(value)[:_LONGEST_TEXT]


def _is_whole(value: object) -> bool:
    return "int" in str(getattr(value, "dtype", ""))
