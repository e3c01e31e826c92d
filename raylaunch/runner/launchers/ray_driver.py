"""``launcher: ray``: the driver's Ray and variables, how its workers start, and what logs Ray Train's reports.

Ray's workers inherit nothing of their driver. They get the variables of its runtime environment, which anybody with
Ray's token can read, and start with the cluster's own interpreter. So the runner writes into the driver's job config:
what the job's environment and raylaunch have set, never a secret; and ``py_executable``, a script in the attempt's
folder that sets the secrets and becomes the interpreter of the job's environment.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import select
import shlex
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from raylaunch import contract
from raylaunch.files import write_atomic
from raylaunch.runner.control import Heartbeat, StopRequest

if TYPE_CHECKING:
    from raylaunch.contract import AttemptSpec, EnvironmentSpec

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""The variable with which Ray Jobs passes runtime environment and metadata to `ray.init`."""
NO_RAY = "none"
_MINOR = re.compile(r"(\d+)\.(\d+)")
_WRITER = "raylaunch.tracking.train_writer"
_REPORT = b'"event": "report"'
_POLL_S = 0.1
_FINISH_S = 60.0
"""For uploads; and offline for a machine that is so busy that wandb starts slowly."""
_ADDRESS = "RAY_ADDRESS"
_CALLBACKS = "RAY_TRAIN_CALLBACKS"
_CALLBACK = "raylaunch.tracking.train_callback.TrainReports"
_WANDB_KEY = "WANDB_API_KEY"
_HIDES_GPUS = "RAY_EXPERIMENTAL_NOSET_"
_GPU_VARIABLES = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
_DRIVER_ONLY = (JOB_CONFIG, _CALLBACKS, "RAY_OVERRIDE_JOB_RUNTIME_ENV", "RAY_AUTH_TOKEN", *_GPU_VARIABLES)
"""What workers must not get: Ray gives each its GPUs, and a setting of ours would win over them."""
_DEFAULTS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # Train takes one report in each: by default every two seconds
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # with it each line that a worker prints appears twice
    "RAY_DEDUP_LOGS": "0",  # equal lines of several ranks are several lines
    "RAY_COLOR_PREFIX": "0",  # a log is not a terminal
    "RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL": "minor",  # driver and workers are one interpreter anyway
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",  # what the program gives to ray.init wins over ours, instead of a refusal
}
_ON_OTHER_NODE = """
import os, runpy, sys, tempfile

for name, value in list(os.environ.items()):
    if name.startswith(("WANDB_", "NETRC", "RAYLAUNCH_WANDB_")) and value.startswith(FOLDER):
        del os.environ[name]
note = ""
key = "WANDB_API_KEY" in os.environ or os.path.exists(os.environ.get("NETRC") or os.path.expanduser("~/.netrc"))
if os.environ.get("WANDB_MODE") == "online" and not key:
    os.environ["WANDB_MODE"] = "offline"
    note = "; they are offline, because there is no W&B key here"


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "wandb.sdk.wandb_init":
            sys.meta_path.remove(self)
            place = os.environ.setdefault("WANDB_DIR", tempfile.mkdtemp(prefix="raylaunch-wandb-"))
            sys.stderr.write(
                "raylaunch: this worker is on %s, not on its driver's node: raylaunch neither reads nor keeps its W&B "
                "runs; W&B chooses their ids, and writes them to %s%s\\n" % (os.uname().nodename, place, note)
            )


sys.meta_path.insert(0, Finder())
del sys.argv[0]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Start-up code of a worker on another node, where the attempt's folder does not exist; it changes W&B's settings."""


class RayVersions(NamedTuple):
    """Of Python and Ray; empty where it is not known. ``none`` is a Ray that is not there."""

    python: str
    ray: str


class DriverPlan(NamedTuple):
    """What a driver is made from.

    Args:
        spec: the attempt's.
        env: the variables of the training so far.
        secrets: those that must not be seen in Ray's runtime environment; `env` has them too.
        python: interpreter of the job's environment.
        imports: whether that environment has a raylaunch which knows Ray Train.
        wandb_url: W&B's server, when the attempt tracks online.
    """

    spec: AttemptSpec
    env: Mapping[str, str]
    secrets: Mapping[str, str]
    python: str
    imports: bool
    wandb_url: str


def prepare(driver: DriverPlan, folder: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the driver's variables, and write what its workers start with into the attempt's folder.

    Args:
        driver: what it is made from.
        folder: the attempt's.
        environ: the runner's own variables: Ray's for this job among them.
    """
    scratch = folder / contract.TMP / "ray"
    scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
    env = _variables(driver, folder, environ)
    env.update(_wandb_key(driver, scratch, env))
    hidden = {name: value for name, value in driver.secrets.items() if name != _WANDB_KEY}
    start = scratch / "worker"
    write_atomic(start, _worker_start(driver, hidden, folder), mode=0o700, durable=False)
    return {**env, **_job_config(driver, env, environ, start)}


def delete_secrets(folder: Path) -> None:
    """Delete the files with secrets at the end of the attempt."""
    for name in ("worker", "netrc"):
        (folder / contract.TMP / "ray" / name).unlink(missing_ok=True)


class TrainReportFollower:
    """Starts the program that logs an attempt's reports to W&B, once there are any."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / contract.TRAIN_REPORTS
        self._size = 0
        self._log = folder / contract.RANK_LOG.format(rank=0)
        self._cwd = folder / contract.TMP / "ray"
        self._env: Mapping[str, str] = {}
        self._python = ""
        self._control = -1
        self._done = -1

    def start(self, env: Mapping[str, str], python: str) -> None:
        """Check for reports from now on; those of an earlier training are dropped.

        Args:
            env: the training's variables.
            python: interpreter of the job's environment.
        """
        self._env, self._python, self._size = env, python, 0
        for file in self._file.parent.glob(f"{self._file.name}*"):
            file.unlink()

    def poll(self) -> None:
        """Start the program if there are reports and it is not running yet."""
        if not self._python or self._control >= 0 or not self._has_reports():
            return
        control, self._control = os.pipe()
        self._done, done = os.pipe()
        with self._log.open("ab") as log:
            child = subprocess.Popen(  # noqa: S603 -- a list of ours, no shell
                [self._python, "-m", _WRITER, str(self._file)],
                env=dict(self._env),
                cwd=str(self._cwd),  # `-m` puts it on sys.path: no user file is there
                stdin=control,
                stdout=log,
                stderr=log,
                pass_fds=[done],
            )
        os.close(control)
        os.close(done)
        child.wait()

    def finish(self, exit_code: int, *, request: StopRequest | None, heartbeat: Heartbeat) -> None:
        """Send how the training ended, and wait until all is written, at most as long as a stop request allows."""
        self.poll()
        if self._control < 0:
            return
        limit_s = _FINISH_S if request is None else request.remaining_s / 2
        with contextlib.suppress(BrokenPipeError):  # it exited by itself: its output is in the log
            os.write(self._control, json.dumps({"exit_code": exit_code}).encode() + b"\n")
        os.close(self._control)
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline and not select.select([self._done], [], [], _POLL_S)[0]:
            heartbeat.poll()
        os.close(self._done)
        self._control = self._done = -1

    def _has_reports(self) -> bool:
        try:
            size = self._file.stat().st_size
        except FileNotFoundError:
            return False
        if size == self._size:
            return False
        self._size = size
        return _REPORT in self._file.read_bytes()


def _variables(driver: DriverPlan, folder: Path, environ: Mapping[str, str]) -> dict[str, str]:
    own = {**driver.spec["env"], **driver.secrets}
    of_ray = {
        name: value
        for name, value in environ.items()
        if name.startswith("RAY_") and not name.startswith(_HIDES_GPUS) and name not in own
    }
    env = {**_DEFAULTS, **of_ray, **driver.env, "CUDA_VISIBLE_DEVICES": ""}
    for name, value in _DEFAULTS.items():
        env[name] = own.get(name, value)
    if _WANDB_KEY in driver.secrets:
        del env[_WANDB_KEY]
    env[contract.VAR_WANDB_RUN] = driver.spec["wandb"]["run_id"]
    env[contract.VAR_TRAIN_REPORTS] = str(folder / contract.TRAIN_REPORTS)
    env[_CALLBACKS] = ",".join(filter(None, [own.get(_CALLBACKS, ""), _CALLBACK]))
    first, last = _python_path(driver, folder)
    ours = {*first, *last}
    theirs = [part for part in env.get("PYTHONPATH", "").split(os.pathsep) if part and part not in ours]
    env["PYTHONPATH"] = os.pathsep.join([*first, *theirs, *last])
    for of_tune, is_wandb_helper in (("WANDB_PROJECT_NAME", "WANDB_PROJECT"), ("WANDB_GROUP_NAME", "WANDB_RUN_GROUP")):
        if of_tune not in own and env.get(is_wandb_helper):
            env[of_tune] = env[is_wandb_helper]
    return env


def _python_path(driver: DriverPlan, folder: Path) -> tuple[list[str], list[str]]:
    """Return what goes to both ends of PYTHONPATH.

    First the archive's start-up folder, with its one module; last the archive, where raylaunch is missing. An empty
    part, which would be the current folder with the person's scripts, never comes into it.
    """
    archive = str(folder / contract.RUNNER)
    return [f"{archive}/{contract.STARTUP}"], [] if driver.imports else [archive]


def _wandb_key(driver: DriverPlan, scratch: Path, env: Mapping[str, str]) -> dict[str, str]:
    """Give W&B its key in a file: Tune's callback would copy the variable into a runtime environment."""
    key = driver.secrets.get(_WANDB_KEY, "")
    if not key or not driver.wandb_url:
        return {}
    theirs = Path(env.get("NETRC") or Path(env.get("HOME") or "~") / ".netrc").expanduser()
    try:
        content = theirs.read_text(encoding="utf-8").rstrip() + "\n"
    except (OSError, UnicodeDecodeError):
        content = ""
    machine = f"machine {urlsplit(driver.wandb_url).netloc}\n  login user\n  password {key}\n"
    write_atomic(scratch / "netrc", content + machine, durable=False)
    return {"NETRC": str(scratch / "netrc")}


def _worker_start(driver: DriverPlan, secrets: Mapping[str, str], folder: Path) -> str:
    """Return the script that becomes a worker's interpreter. What Ray or the program set for the worker wins."""
    first, last = _python_path(driver, folder)
    lines = ["#!/bin/sh", "# raylaunch: a worker of this attempt starts here"]
    lines += [f'[ -n "${{{name}+set}}" ] || export {name}={shlex.quote(value)}' for name, value in secrets.items()]
    for part in [*first, *last]:
        quoted = shlex.quote(part)
        joined = (
            f'{quoted}"${{PYTHONPATH:+:$PYTHONPATH}}"' if part in first else f'"${{PYTHONPATH:+$PYTHONPATH:}}"{quoted}'
        )
        lines.append(f'case ":${{PYTHONPATH-}}:" in *:{quoted}:*) ;; *) export PYTHONPATH={joined} ;; esac')
    here, code = shlex.quote(str(Path.cwd())), shlex.quote(str(folder / contract.CODE))
    lines.append(f'[ "$(pwd -P)" != {here} ] || cd {code} || exit 1')
    lines.append(f'exec {shlex.quote(driver.python)} "$@"')
    return "\n".join(lines) + "\n"


def _job_config(driver: DriverPlan, env: Mapping[str, str], environ: Mapping[str, str], start: Path) -> dict[str, str]:
    try:
        config = json.loads(environ[JOB_CONFIG])
    except (KeyError, ValueError):
        return {}  # not in a Ray job
    runtime_env = config.setdefault("runtime_env", {})
    runtime_env["env_vars"] = {**(runtime_env.get("env_vars") or {}), **_worker_variables(driver, env, environ)}
    runtime_env["py_executable"] = _command(start, driver.python, start.parent.parent.parent)
    return {JOB_CONFIG: json.dumps(config)}


def _command(start: Path, python: str, folder: Path) -> str:
    """Return what Ray puts before a worker's arguments, in bash. Where the script is not, the interpreter may be.

    That is on another node than the driver's. The first argument is Ray's own program, which `_ON_OTHER_NODE` runs.
    """
    elsewhere = shlex.quote(_ON_OTHER_NODE.replace("FOLDER", repr(str(folder))))
    python = shlex.quote(python)
    become = f'[ -x "$0" ] && exec "$0" "$@"; [[ $1 == -* ]] && exec {python} "$@"; exec {python} -c {elsewhere} "$@"'
    return f"bash -c {shlex.quote(become)} {shlex.quote(str(start))}"


def _worker_variables(driver: DriverPlan, env: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """Return what the driver has beyond that with which Ray starts its workers, without secrets."""
    hidden = {*driver.secrets, *_DRIVER_ONLY}
    found = {
        name: value
        for name, value in env.items()
        if name not in hidden and (environ.get(name) != value or name in driver.spec["env"])
    }
    found["PYTHONPATH"] = env["PYTHONPATH"]
    if environ.get(_ADDRESS):
        found[_ADDRESS] = environ[_ADDRESS]  # a worker that queries Ray's state must not guess among several Rays
    return found


def of_cluster() -> RayVersions:
    """Return the versions of the interpreter that runs this, which is the one that runs Ray on this node."""
    try:
        return RayVersions(platform.python_version(), importlib.metadata.version("ray"))
    except importlib.metadata.PackageNotFoundError:
        return RayVersions(platform.python_version(), "")


def mismatch(found: RayVersions, needed: RayVersions, environment: EnvironmentSpec, python: str) -> str:
    """Return what does not match and the command that fixes it, or an empty text.

    Driver and workers speak Ray's inner protocol: only the same Ray, under the same minor version of Python, may join.

    Args:
        found: what the job's environment has.
        needed: what the cluster has.
        environment: the job's.
        python: its interpreter.
    """
    minor, theirs = _minor(needed.python), _minor(found.python)
    wanted = f"ray[default]=={needed.ray}"
    if found.python and needed.python and minor != theirs:
        what = f"launcher: ray needs Python {minor}, like the cluster, but {python} is Python {found.python}"
        return f"{what}: {_python_fix(environment, minor, wanted, python)}"
    if found.ray and needed.ray and found.ray != needed.ray:
        has = "has no Ray" if found.ray == NO_RAY else f"has Ray {found.ray}"
        what = f"launcher: ray needs Ray {needed.ray}, like the cluster, but {python} {has}"
        return f"{what}: {_ray_fix(environment, wanted, python)}"
    return ""


def _ray_fix(environment: EnvironmentSpec, wanted: str, python: str) -> str:
    kind = environment["kind"]
    if kind == "uv":
        return f"uv add '{wanted}', then submit again"
    if kind == "pip":
        return f"add {wanted} to its requirements"
    return f"uv pip install --python {python} '{wanted}'"


def _python_fix(environment: EnvironmentSpec, minor: str, wanted: str, python: str) -> str:
    kind, value = environment["kind"], environment["value"]
    if kind == "uv":
        return f"uv python pin {minor} && uv lock, then submit again"
    if kind == "conda":
        return f"conda create -n {value}-py{minor} python={minor}, and in it: pip install '{wanted}'"
    place = value if kind == "venv" else str(Path(python).parent.parent)
    return f"uv venv --python {minor} {place}-py{minor} && uv pip install --python {place}-py{minor} '{wanted}'"


def _minor(version: str) -> str:
    found = _MINOR.match(version)
    return found.group() if found else version
