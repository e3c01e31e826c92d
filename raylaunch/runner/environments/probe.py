"""Inspecting an environment before training: does its interpreter run, what is installed, does torch see the GPUs.

One child of that interpreter reports, and its result is cached in the node's folder of environments until something is
installed or removed: the next start costs nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import NamedTuple, cast
from urllib.parse import unquote, urlsplit

from raylaunch.files import write_atomic
from raylaunch.runner.control import run_program
from raylaunch.runner.environments.build import BuildContext, EnvironmentProblem, PreparedEnvironment, failure_line

_PROBE_S = 60.0
_ELF_MACHINES = {62: "x86_64", 183: "aarch64"}
_ALIASES = {"arm64": "aarch64", "amd64": "x86_64"}

_INSPECT = """
import json, platform, sys
packages, editable = {}, {}
try:
    from importlib import metadata
    for one in metadata.distributions():
        name = one.metadata["Name"]
        if name and name not in packages:
            packages[name] = one.version
            origin = json.loads(one.read_text("direct_url.json") or "{}")
            if origin.get("dir_info", {}).get("editable"):
                editable[name] = origin["url"]
except ImportError:
    pass
try:
    import importlib.util
    raylaunch = importlib.util.find_spec("raylaunch") is not None
    ray_train = raylaunch and importlib.util.find_spec("raylaunch.tracking.train_callback") is not None
except Exception:
    raylaunch = ray_train = False
print("\\n@raylaunch " + json.dumps({"python": sys.executable, "version": platform.python_version(),
    "machine": platform.machine(), "packages": packages, "editable": editable,
    "raylaunch": raylaunch, "ray_train": ray_train}))
"""

_INSPECT_GPUS = """
import json, torch
print("\\n@raylaunch " + json.dumps({"built_for": torch.version.cuda or getattr(torch.version, "hip", None) or "",
    "seen": torch.cuda.device_count() if torch.cuda.is_available() else 0}))
"""


class EnvironmentProbe(NamedTuple):
    """What was found in an environment."""

    python: str
    version: str
    packages: dict[str, str]
    raylaunch: bool
    """Whether the environment has a raylaunch of its own."""
    ray_train: bool
    """Whether that one can track Ray Train."""
    warnings: tuple[str, ...]


def inspect(prepared: PreparedEnvironment, context: BuildContext, *, arch: str, gpus: int) -> EnvironmentProbe:
    """Inspect an environment.

    Args:
        prepared: the environment.
        arch: the architecture that the spec requires, or empty.
        gpus: how many GPUs the attempt has.
        context: the attempt's folders and heartbeat.

    Raises:
        EnvironmentProblem: its interpreter does not run here, or is for another architecture.
        StopRequested: the attempt is to stop.
    """
    host = _architecture(os.uname().machine)
    if arch and arch != host:
        msg = f"the job needs {arch}, but this node is {host}"
        raise EnvironmentProblem(msg)
    if not prepared.python:
        return EnvironmentProbe(
            "", "", {}, raylaunch=False, ray_train=False, warnings=("the environment has no python",)
        )
    seen = _cached(prepared, _INSPECT, "", context)
    machine = _architecture(str(seen["machine"]))
    if machine != host:
        msg = f"{prepared.python} is built for {machine}, but this node is {host}: create the environment on {host}"
        raise EnvironmentProblem(msg)
    packages = cast("dict[str, str]", seen["packages"])
    warnings = _editable_warnings(cast("dict[str, str]", seen["editable"]), context)
    if gpus and "torch" in packages and _has_gpus():
        warnings += _torch_warnings(prepared, packages["torch"], gpus, context)
    return EnvironmentProbe(
        str(seen["python"]),
        str(seen["version"]),
        packages,
        raylaunch=bool(seen["raylaunch"]),
        ray_train=bool(seen["ray_train"]),
        warnings=tuple(warnings),
    )


def ask(python: str, program: str, env: dict[str, str], context: BuildContext) -> dict[str, object]:
    """Run a program with an interpreter, in an empty folder; return the JSON that it prints after ``@raylaunch``.

    Raises:
        EnvironmentProblem: the interpreter does not run here.
    """
    nowhere = context.tmp / "nowhere"
    nowhere.mkdir(parents=True, exist_ok=True)
    try:
        with (context.tmp / "probe.out").open("w+b") as output:
            ran = run_program(
                [python, "-c", program],
                env=env,
                cwd=nowhere,
                timeout_s=_PROBE_S,
                heartbeat=context.heartbeat,
                output=output,
            )
    except OSError as error:
        raise EnvironmentProblem(_explain_exec_error(python, error)) from None
    match = re.search(r"^@raylaunch (\{.*\})$", ran.output, re.MULTILINE)
    if ran.status != 0 or match is None:
        msg = f"the interpreter {python} does not run on this node: {failure_line(ran)}"
        raise EnvironmentProblem(msg)
    result: dict[str, object] = json.loads(match.group(1))
    return result


def _editable_warnings(editable: dict[str, str], context: BuildContext) -> list[str]:
    """Name what runs from a folder that may be edited, unless that is the attempt's own code."""
    paths = {name: unquote(urlsplit(url).path) for name, url in editable.items() if name != "raylaunch"}
    return [
        f"{name} is installed editable: later edits in {path} reach this job"
        for name, path in sorted(paths.items())
        if Path(path) != context.code and context.code not in Path(path).parents
    ]


def _torch_warnings(prepared: PreparedEnvironment, version: str, gpus: int, context: BuildContext) -> list[str]:
    try:
        driver = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        driver = ""
    visible = prepared.env.get("CUDA_VISIBLE_DEVICES", "")
    try:
        seen = _cached(prepared, _INSPECT_GPUS, f"{driver}\0{visible}", context)
    except EnvironmentProblem as problem:
        return [f"torch {version} does not import here: {problem}"]
    if not seen["built_for"]:
        return [f"torch {version} in this environment is built without CUDA: it cannot use the {gpus} GPU(s)"]
    if int(str(seen["seen"])) < gpus:
        built_for = f"it is built for CUDA {seen['built_for']}"
        return [f"torch {version} sees {seen['seen']} of {gpus} GPU(s); {built_for}; check the driver with nvidia-smi"]
    return []


def _has_gpus() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


def _cached(prepared: PreparedEnvironment, program: str, extra: str, context: BuildContext) -> dict[str, object]:
    file = context.envs / f"probe-{_key(prepared, program, extra)}.json"
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = None
    if isinstance(known, dict):
        return known
    result = ask(prepared.python, program, prepared.env, context)
    if context.tmp in Path(prepared.python).parents:
        return result  # the attempt's own
    try:
        context.envs.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(result), mode=0o666, durable=False)
    except OSError:
        return result  # a cache that cannot be written costs the next start a second
    return result


def _key(prepared: PreparedEnvironment, program: str, extra: str) -> str:
    """Name the content of an environment: its interpreter, and when something was last installed or removed."""
    python = Path(prepared.python)
    real = python.resolve()
    places = [python, real, python.parent.parent / "pyvenv.cfg"]
    for root in (
        python.parent.parent,
        real.parent.parent,
        Path("/usr"),
        Path("/usr/local"),
        Path("~/.local").expanduser(),
    ):
        for kind in ("site-packages", "dist-packages"):
            places += sorted(root.glob(f"lib*/python3*/{kind}"))
    places += map(Path, prepared.sites)
    places += [Path(path) for path in prepared.env.get("PYTHONPATH", "").split(os.pathsep) if path]
    content = (program, extra, [(str(path), _mtime_ns(path)) for path in places])
    return hashlib.sha256(repr(content).encode()).hexdigest()[:24]


def _mtime_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _explain_exec_error(python: str, error: OSError) -> str:
    built = _elf_machine(python)
    host = _architecture(os.uname().machine)
    if built and built != host:
        return f"{python} is built for {built}, but this node is {host}: create the environment on {host}"
    return f"the interpreter {python} cannot be executed on this node: {error.strerror or error}"


def _elf_machine(path: str) -> str:
    """Return the architecture that an ELF file's header names, or an empty text."""
    try:
        with Path(path).open("rb") as file:
            head = file.read(20)
    except OSError:
        return ""
    if head[:4] != b"\x7fELF":
        return ""
    number = int.from_bytes(head[18:20], "little" if head[5] == 1 else "big")
    return _ELF_MACHINES.get(number, f"machine {number}")


def _architecture(name: str) -> str:
    return _ALIASES.get(name.lower(), name)
