"""Facts about a node: machine, disk, GPUs, and who outside this cluster uses those."""

from __future__ import annotations

import csv
import os
import platform
import pwd
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, TypedDict

from raylaunch.agent.attempt_dir import attempts_in, read_json
from raylaunch.agent.processes import environment_of
from raylaunch.contract import ATTEMPT, VAR_ATTEMPT, VAR_NODE_ROOT

_MIB = 1024 * 1024
_LARGEST = 1e12
_NVIDIA_SMI_S = 15
_GPU_QUERY = ("index", "uuid", "name", "memory.total", "memory.used", "utilization.gpu")
_PROCESS_QUERY = ("gpu_uuid", "pid", "process_name")


class GpuFacts(TypedDict):
    """One GPU; the fields of `raylaunch.models.cluster.GpuView`."""

    index: str
    uuid: str
    name: str
    memory_total: int | None
    memory_used: int | None
    utilization: float | None
    processes: list[str]


class NodeFacts(NamedTuple):
    """What a node agent reports of its node."""

    arch: str
    disk_free: int
    gpus: list[GpuFacts]
    gpu_problem: str
    """Why GPUs could not be inspected; empty when they could, or without ``nvidia-smi``."""


def describe(root: Path) -> NodeFacts:
    """Inspect this node. Takes as long as ``nvidia-smi`` does, at most 30 s."""
    problem = ""
    gpus: list[GpuFacts] = []
    try:
        gpus = list_gpus(is_ours=_membership(root))
    except (OSError, subprocess.SubprocessError) as error:
        problem = f"nvidia-smi failed: {error}"
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    return NodeFacts(platform.machine(), shutil.disk_usage(root).free, gpus, problem)


def list_gpus(*, is_ours: Callable[[int], bool]) -> list[GpuFacts]:
    """List the GPUs that ``nvidia-smi`` reports; none without that program.

    Args:
        is_ours: Whether a process belongs to this cluster.

    Raises:
        OSError: ``nvidia-smi`` cannot be started.
        subprocess.SubprocessError: It failed, or took longer than 15 s.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    users: dict[str, list[str]] = defaultdict(list)
    for uuid, pid, name in _rows(program, "--query-compute-apps", _PROCESS_QUERY):
        if pid.isdigit() and not is_ours(int(pid)):
            users[uuid].append(f"{_user(int(pid))}:{pid}:{name.rsplit('/', 1)[-1]}")
    return [
        GpuFacts(
            index=index,
            uuid=uuid,
            name=name,
            memory_total=smi_bytes(total),
            memory_used=smi_bytes(used),
            utilization=smi_number(utilization),
            processes=sorted(users[uuid]),
        )
        for index, uuid, name, total, used, utilization in _rows(program, "--query-gpu", _GPU_QUERY)
    ]


def _rows(program: str, query: str, fields: tuple[str, ...]) -> Iterable[list[str]]:
    command = [program, f"{query}={','.join(fields)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(  # noqa: S603 -- fixed words
        command, capture_output=True, text=True, errors="replace", timeout=_NVIDIA_SMI_S, check=True
    )
    return smi_rows(done.stdout, columns=len(fields))


def smi_rows(text: str, *, columns: int) -> list[list[str]]:
    """Return the rows of ``nvidia-smi --format=csv,noheader,nounits`` that have this many columns."""
    rows = csv.reader(text.splitlines(), skipinitialspace=True)
    return [[cell.strip() for cell in row] for row in rows if len(row) == columns]


def smi_number(text: str) -> float | None:
    """Return a number of ``nvidia-smi``; None for ``[N/A]`` (GPUs that share the machine's memory) and the like."""
    try:
        number = float(text)
    except ValueError:  # [N/A], [Not Supported], [Unknown Error]
        return None
    return number if 0 <= number <= _LARGEST else None


def smi_bytes(mebibytes: str) -> int | None:
    """Return a size that ``nvidia-smi`` gives in MiB, in bytes."""
    number = smi_number(mebibytes)
    return None if number is None else int(number * _MIB)


def _user(pid: int) -> str:
    try:
        uid = Path(f"/proc/{pid}").stat().st_uid
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
    except OSError:
        return "?"


def _membership(root: Path) -> Callable[[int], bool]:
    """Return a function: whether a process was started by this Ray, or by an attempt below this node root."""
    entries = {f"{VAR_NODE_ROOT}={root}".encode()}
    if raylet := os.environ.get("RAY_RAYLET_PID"):
        entries.add(f"RAY_RAYLET_PID={raylet}".encode())
    for attempt in attempts_in(root):
        spec = read_json(root / "attempts" / attempt / ATTEMPT)
        if spec is not None:
            entries.add(f"{VAR_ATTEMPT}={spec['tag']}".encode())
    return lambda pid: not entries.isdisjoint(environment_of(pid))
