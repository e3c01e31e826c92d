"""One run of a job, from its folder to its exit facts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from raylaunch import contract
from raylaunch.files import write_atomic
from raylaunch.runner import command, outputs, supervisor, wandb_env
from raylaunch.runner.environments import probe
from raylaunch.runner.environments.build import BuildContext, EnvironmentProblem, PreparedEnvironment
from raylaunch.runner.environments.prepare import prepare
from raylaunch.runner.launchers import ray_driver, torchrun
from raylaunch.runner.launchers.ray_driver import TrainReportFollower
from raylaunch.runner.launchers.torchrun import RankFailure, before_report, rank_failure
from raylaunch.runner.log_relay import LogRelay
from raylaunch.runner.processes import ancestors, attempt_processes, oom_kills, signal_name
from raylaunch.runner.supervisor import ProcessReaper, stop_training
from raylaunch.runner.unpack import broken_links
from raylaunch.runner.wandb_env import RunAddress, hosts_of
from raylaunch.runner.wandb_follow import RunFollower

if TYPE_CHECKING:
    from raylaunch.contract import AttemptSpec, Ended, Exit, Facts, Started
    from raylaunch.runner.control import Heartbeat, StopRequest

_POLL_S = 0.1
_TAIL = 64 * 1024
_RAY_CHECK_S = 2.0
_HEAD_OF_RAY = "gcs_server"
_SHELL_SIGNAL = 128
_FAILED = 1
"""torchrun's exit status when a rank failed, not the rank's own."""
_FATAL = frozenset(
    {
        *(signal.SIGHUP, signal.SIGINT, signal.SIGILL, signal.SIGABRT, signal.SIGBUS),
        *(signal.SIGFPE, signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM),
    }
)


class Attempt:
    """Runs one attempt. `end_everything` may be called at any time, and again."""

    def __init__(self, folder: Path, spec: AttemptSpec, heartbeat: Heartbeat) -> None:
        self._folder = folder
        self._spec = spec
        self._heartbeat = heartbeat
        self._code = folder / contract.CODE
        self._log = folder / contract.RANK_LOG.format(rank=0)
        self._context = BuildContext(
            self._code,
            folder / contract.TMP,
            Path(spec["envs_dir"]),
            folder / contract.LOGS / "setup.log",
            folder / contract.WHEELS,
            heartbeat,
        )
        self._spare = ancestors(os.getpid())
        self._log_relay = LogRelay(self._log, sys.stdout.fileno(), job=spec["job"])
        self._facts: Facts = {"warnings": []}
        self._process: supervisor.ManagedProcess | None = None
        self._exited_in_time = True
        self._before: outputs.Snapshot = {}
        self._launch = torchrun.LaunchPlan(spec["entrypoint"], {}, 1, elastic=False)
        self._driver: ray_driver.DriverPlan | None = None
        self._reports = TrainReportFollower(folder)
        self._reaper = ProcessReaper(spec["tag"], self._spare, heartbeat)
        self._run_follower = RunFollower(folder, spec["tag"])
        self._address = RunAddress(self._log)
        self._next_ray_check = float("inf") if spec["launcher"] == "ray" else 0.0

    def run(self) -> Exit:
        """Prepare, start, watch and end the training.

        Raises:
            EnvironmentProblem: the environment cannot be used.
            EntrypointProblem: the program to run is not there.
            StopRequested: the attempt is to stop before the training has started.
        """
        secrets = _take_secrets(self._folder)
        prepared = self._plan(self._prepare(secrets))
        argv = command.command(self._launch.entrypoint, prepared.env, self._code)
        self._heartbeat.check()
        self._before = outputs.snapshot(self._code)
        oom_before = oom_kills()
        self._start(argv, prepared)
        deadline = time.monotonic() + (self._spec["timeout_s"] or float("inf"))
        request = self._watch(deadline)
        if request is None and self._online and self._wandb_broke():
            self._restart_offline(argv, prepared)
            request = self._watch(deadline)
        self._finish_reports(request)
        self._end_leftovers(request)
        self._finish_runs()
        self._log_relay.finish(5.0)
        self._keep_outputs()
        end = self._exit_facts(request)
        end["oom"] = oom_kills() > oom_before and end["ended"] not in ("completed", "stopped", "timed_out")
        return end

    def end_everything(self) -> None:
        """End what is still running of the attempt, and its supervisor."""
        ray_driver.delete_secrets(self._folder)
        if self._process is not None:
            self._process.kill()
            self._reaper.end_all()
            self._process.release()
            self._process = None

    def _prepare(self, secrets: dict[str, str]) -> PreparedEnvironment:
        spec, folder = self._spec, self._folder
        base = command.base_variables(os.environ, spec, secrets)
        base.update(command.job_variables(spec, folder, os.environ))
        prepared = prepare(spec["environment"], base, self._context)
        gpus = 0 if spec["launcher"] == "ray" else spec["gpus"]
        probed = probe.inspect(prepared, self._context, arch=spec["arch"], gpus=gpus)
        version = probed.packages.get("wandb", "")
        self._facts = {
            "python": probed.python,
            "version": probed.version,
            "torch": probed.packages.get("torch", ""),
            "wandb": version,
            "packages": sorted(f"{name}=={number}" for name, number in probed.packages.items()),
            "warnings": [
                *probed.warnings,
                *wandb_env.version_warnings(version),
                *self._broken_links(),
                *command.moved(spec),
            ],
        }
        mode = wandb_env.find_mode(spec["wandb"], prepared.env, self._context, version=version)
        self._report_mode(mode)
        if spec["launcher"] == "ray":
            self._check_ray(probed)
            self._driver = ray_driver.DriverPlan(
                spec, prepared.env, secrets, probed.python, imports=probed.ray_train, wandb_url=mode.base_url
            )
        own = {**spec["env"], **secrets}
        home = wandb_env.home_of(base)
        env = {
            **prepared.env,
            **wandb_env.variables(spec["wandb"], mode, own, folder=folder, home=home),
        }
        self._address.hosts = hosts_of(mode.base_url, env)
        env.pop("WANDB_RUN_ID", None)  # the first run's alone, and so `WandbSpec.run_id`
        archive = str(folder / contract.RUNNER)
        path = [f"{archive}/{contract.STARTUP}", env.get("PYTHONPATH", ""), "" if probed.raylaunch else archive]
        env["PYTHONPATH"] = os.pathsep.join(part for part in path if part)
        return prepared._replace(env=env)

    def _broken_links(self) -> list[str]:
        """Report broken links, in the log too, where a missing file is noticed."""
        found = broken_links(self._code, self._spec["links"])
        if found:
            with self._log.open("a", encoding="utf-8", errors="surrogateescape") as log:
                log.writelines(f"raylaunch: warning: {one}\n" for one in found)
        return found

    def _check_ray(self, probed: probe.EnvironmentProbe) -> None:
        found = ray_driver.RayVersions(probed.version, probed.packages.get("ray", ray_driver.NO_RAY))
        problem = ray_driver.mismatch(found, ray_driver.of_cluster(), self._spec["environment"], probed.python)
        if problem:
            raise EnvironmentProblem(problem)

    def _plan(self, prepared: PreparedEnvironment) -> PreparedEnvironment:
        """Plan how the training is started; returns its variables with those of its launcher."""
        if not torchrun.starts_ranks(self._spec):
            return prepared
        self._launch = torchrun.plan(
            self._spec,
            env=prepared.env,
            python=prepared.python,
            torch=self._facts["torch"],
            shim=torchrun.make_shim(self._folder),
            node=torchrun.node_resources(),
        )
        return prepared._replace(env={**prepared.env, **self._launch.env})

    @property
    def _online(self) -> bool:
        return self._facts.get("wandb_mode") == "online"

    def _report_mode(self, mode: wandb_env.Mode) -> None:
        self._facts["wandb_mode"] = mode.mode
        self._facts["wandb_why"] = mode.why
        self._write_facts()

    def _write_facts(self) -> None:
        write_json(self._folder / contract.FACTS, self._facts)

    def _start(self, argv: list[str], prepared: PreparedEnvironment) -> None:
        env = prepared.env
        wandb_env.prepare_run_ids(self._spec, self._folder)
        if self._driver is not None:
            self._driver = self._driver._replace(env=env)
            env = ray_driver.prepare(self._driver, self._folder, os.environ)
            if self._facts["wandb"] and self._facts["wandb_mode"] != "disabled":
                self._reports.start(env, self._driver.python)
        try:
            self._process = supervisor.start(
                argv,
                env=env,
                cwd=self._code,
                log=self._log,
                tag=self._spec["tag"],
                spare=self._spare,
            )
        except supervisor.StartError as error:
            msg = f"{argv[0]} could not be started: {error}"
            raise command.EntrypointProblem(msg) from None
        started: Started = {
            "pid": self._process.pid,
            "at": time.time(),
            "gpus": command.gpu_ids(self._spec, prepared.env),
            "ranks": self._launch.ranks,
        }
        write_json(self._folder / contract.STARTED, started)
        self._log_relay.start()

    def _watch(self, deadline: float) -> StopRequest | None:
        """Wait for the training to end; returns the stop request that ended it, or None when it ended by itself."""
        process = self._process
        if process is None:
            return None
        while not process.poll(_POLL_S):
            self._run_follower.poll()
            self._report_runs()
            self._reports.poll()
            self._check_for_private_ray()
            request = self._heartbeat.poll()
            if request is None and time.monotonic() >= deadline:
                request = self._heartbeat.time_out()
            if request is not None:
                self._exited_in_time = stop_training(process, request, self._heartbeat)
                return request
        return None

    def _finish_runs(self) -> None:
        self._run_follower.finish()
        self._report_runs()
        staged = wandb_env.staged_bytes(self._folder)
        if staged:
            self._facts["wandb_staged"] = staged
            self._write_facts()

    def _report_runs(self) -> None:
        ids, run_id = self._run_follower.ids, self._spec["wandb"]["run_id"]
        first = run_id if run_id in ids or not ids else ids[0]
        found = self._online and self._address.poll(first)
        if found or ids[: contract.MANY_RUNS] != self._facts.get("wandb_runs", []):
            self._facts["wandb_run"], self._facts["wandb_url"] = first, self._address.url
            self._facts["wandb_runs"] = ids[: contract.MANY_RUNS]
            self._write_facts()

    def _check_for_private_ray(self) -> None:
        """Report a Ray that a program without `launcher: ray` starts for itself: it has this node's CPUs only."""
        now = time.monotonic()
        if now < self._next_ray_check:
            return
        self._next_ray_check = now + _RAY_CHECK_S
        if any(process.name == _HEAD_OF_RAY for process in attempt_processes(self._spec["tag"])):
            self._next_ray_check = float("inf")
            self._facts["warnings"].append(contract.PRIVATE_RAY)
            self._write_facts()

    def _wandb_broke(self) -> bool:
        process = self._process
        failed = process is not None and process.status is not None and process.status > 0
        return failed and wandb_env.init_broke(self._folder, b"\n".join(self._tail_of(log) for log in self._logs()))

    def _restart_offline(self, argv: list[str], prepared: PreparedEnvironment) -> None:
        why = "wandb.init failed online, so the training was restarted offline"
        self._facts["warnings"].append(why)
        self._report_mode(wandb_env.Mode("offline", why))
        self._finish_reports(None)
        self._end_leftovers(None)
        self._run_follower.finish()
        self._log_relay.finish(5.0)
        if self._process is not None:
            self._process.release()
            self._process = None
        with self._log.open("ab") as log:
            log.write(f"\nraylaunch: {why}\n\n".encode())
        self._start(argv, prepared._replace(env={**prepared.env, "WANDB_MODE": "offline"}))

    def _finish_reports(self, request: StopRequest | None) -> None:
        """Report to the program that logs Ray Train's reports how the training ended."""
        status = self._process.status if self._process is not None else None
        code = self._read_status(status)[0] if request is None else _SHELL_SIGNAL + signal.SIGTERM
        self._reports.finish(1 if code is None else code, request=request, heartbeat=self._heartbeat)

    def _end_leftovers(self, request: StopRequest | None) -> None:
        if request is None:
            self._reaper.after_end(online=self._online)
        else:
            self._reaper.after_stop(request, in_time=self._exited_in_time)

    def _keep_outputs(self) -> None:
        spec = self._spec
        limits = outputs.OutputLimits(spec["outputs_size"], spec["outputs_files"])
        folder = Path(spec["job_dir"] or self._folder)
        collected = outputs.collect(self._code, folder, spec["outputs"], limits, self._before)
        if (folder / contract.COLLECTED).is_file() and folder != self._folder:
            shutil.copyfile(str(folder / contract.COLLECTED), str(self._folder / contract.COLLECTED))
        if collected.warnings:
            self._facts["warnings"] += collected.warnings
            self._facts["left"], self._facts["withheld"] = collected.left, collected.withheld
            self._write_facts()

    def _exit_facts(self, request: StopRequest | None) -> Exit:
        process = self._process
        status = process.status if process is not None else None
        failure = self._failure_of_rank(status) if request is None else None
        code, by_signal = self._read_status(status) if failure is None else _read_status(failure.status)
        who = "the training" if failure is None else f"rank {failure.rank}"
        end = exit_facts("completed", exit_code=code, by_ray=request is not None and request.by_ray)
        end["signal"], end["killed"] = by_signal, self._reaper.killed
        end["failed_rank"] = failure.rank if failure else None
        if request is not None:
            end["ended"] = request.ended
            if request.why == "timed_out":
                end["message"] = f"it ran longer than its timeout of {self._spec['timeout_s'] or 0:g} s"
        elif status is None:
            end["ended"] = "runner_error"
            end["message"] = "the supervisor of the training was killed, and the training with it"
        elif by_signal:
            end["ended"] = "signal"
            end["message"] = f"{who} was ended by {by_signal}"
        elif code:
            end["ended"] = "exit_code"
            end["message"] = f"{who} exited with status {code}" if failure else ""
            tail = self._last_output(failure)
            missing = command.explain_missing(self._spec["entrypoint"], code, tail, self._code)
            if missing:
                end["ended"], end["message"] = "entrypoint_not_found", missing
            elif windows := command.shell_line_ends(self._spec["entrypoint"], self._code):
                end["message"] = f"{who} exited with status {code}; {windows}"
        return end

    def _read_status(self, status: int | None) -> tuple[int | None, str]:
        """Return exit code and signal. A shell exits with 128+N when its program was ended by signal N."""
        if status is not None and isinstance(self._spec["entrypoint"], str) and status - _SHELL_SIGNAL in _FATAL:
            return status, signal_name(status - _SHELL_SIGNAL)
        return _read_status(status)

    def _failure_of_rank(self, status: int | None) -> RankFailure | None:
        """Return which rank failed, where torchrun has ended with its report; else the command's own status counts."""
        if not self._launch.elastic or status != _FAILED:
            return None
        return rank_failure(self._tail_of(self._log).decode("utf-8", "replace"))

    def _last_output(self, failure: RankFailure | None) -> str:
        log = self._folder / contract.RANK_LOG.format(rank=failure.rank if failure else 0)
        text = self._tail_of(log).decode("utf-8", "replace")
        return before_report(text) if self._launch.elastic else text

    def _logs(self) -> list[Path]:
        return sorted((self._folder / contract.LOGS).glob(contract.RANK_LOG.rpartition("/")[2].format(rank="*")))

    @staticmethod
    def _tail_of(path: Path) -> bytes:
        try:
            with path.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL))
                return log.read()
        except FileNotFoundError:
            return b""


def _read_status(status: int | None) -> tuple[int | None, str]:
    return (_SHELL_SIGNAL - status, signal_name(-status)) if status is not None and status < 0 else (status, "")


def exit_facts(ended: Ended, message: str = "", *, exit_code: int | None = None, by_ray: bool = False) -> Exit:
    """Return the exit facts of an attempt that ends now."""
    return {
        "ended": ended,
        "exit_code": exit_code,
        "signal": "",
        "message": message,
        "failed_rank": None,
        "at": time.time(),
        "by_ray": by_ray,
        "killed": 0,
        "oom": False,
    }


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON file so that a reader sees all of it or nothing."""
    write_atomic(path, json.dumps(content))


def _take_secrets(folder: Path) -> dict[str, str]:
    """Read ``secrets.json`` and delete it; without the file there are none."""
    path = folder / contract.SECRETS
    try:
        secrets = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    path.unlink()
    return {str(name): str(value) for name, value in secrets.items()}
