"""Processes of this machine, read from /proc. A process belongs to an attempt if its environment has the attempt's id.

Where there is no /proc (macOS) nothing is found, and only the training's own process group can be ended.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from raylaunch.contract import VAR_ATTEMPT

_PROC = Path("/proc")


class AttemptProcess(NamedTuple):
    """One process of the attempt. `wandb` marks W&B's own helpers, which write what the training has logged.

    `ray` marks Ray's workers, which end with their driver, or, detached, only when they are ended. One that has just
    started has not set its name yet, and is recognised by its program.
    """

    pid: int
    ticks: int
    name: str
    wandb: bool
    ray: bool


def boot_id() -> str:
    """Return the id of this boot of the machine and of the pid namespace, as a container has one; or an empty text.

    Process ids and start ticks mean nothing after another boot, and in another namespace.
    """
    try:
        return f"{kernel_boot_id()}:{os.stat('/proc/self/ns/pid').st_ino}"  # noqa: PTH116 -- Path.stat does the same
    except OSError:
        return ""


def kernel_boot_id() -> str:
    """Return the id of this boot of the machine, the same in all namespaces.

    Raises:
        OSError: there is no /proc.
    """
    return (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def is_this_boot(boot: str) -> bool:
    """Return whether a claim's `boot_id` is this machine's; 0.1.0 wrote it without the namespace."""
    here = boot_id()
    return boot in {here, here.partition(":")[0]}


def started_ticks(pid: int) -> int:
    """Return field 22 of /proc/PID/stat, or 0. With the pid it names one process until a reboot."""
    fields = read_stat(pid)
    return int(fields[19]) if fields else 0


def read_stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the name; the first is the state. Empty when it has exited."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def is_alive(pid: int, ticks: int) -> bool:
    """Whether exactly this process lives; a zombie has exited."""
    fields = read_stat(pid)
    return bool(fields) and fields[0] not in "ZX" and int(fields[19]) == ticks


def is_wandb_helper(name: str, argv: Sequence[str]) -> bool:
    """Whether a process is one of W&B's own helpers."""
    return name.startswith("wandb-") or (bool(argv) and "/wandb/bin/" in argv[0])


def ancestors(pid: int) -> frozenset[int]:
    """Return `pid` and all that it descends from."""
    found = set()
    while pid > 0 and pid not in found:
        found.add(pid)
        fields = read_stat(pid)
        pid = int(fields[1]) if fields else 0
    return frozenset(found)


def attempt_processes(tag: str, spare: frozenset[int] = frozenset()) -> list[AttemptProcess]:
    """Return the living processes whose environment carries the attempt's tag, without those in `spare`."""
    mark = f"{VAR_ATTEMPT}={tag}".encode()
    found = []
    for entry in process_ids():
        if int(entry) in spare:
            continue
        try:
            environ = (_PROC / entry / "environ").read_bytes()
            if mark not in environ.split(b"\0"):
                continue
            name = (_PROC / entry / "comm").read_text(encoding="utf-8", errors="replace").strip()
            words = [os.fsdecode(word) for word in (_PROC / entry / "cmdline").read_bytes().split(b"\0")]
        except OSError:
            continue  # it ended meanwhile, or belongs to another user
        fields = read_stat(int(entry))
        if fields and fields[0] not in "ZX":
            ray = name.startswith("ray::") or any("/ray/_private/workers/" in word for word in words)
            found.append(AttemptProcess(int(entry), int(fields[19]), name, wandb=is_wandb_helper(name, words), ray=ray))
    return found


def open_wandb_files(tag: str) -> list[str]:
    """Return the files that the attempt's ``wandb-core`` processes, which write its W&B runs, hold open."""
    found: set[str] = set()
    for process in attempt_processes(tag):
        if process.name == "wandb-core":
            with contextlib.suppress(OSError):  # it ended meanwhile
                found.update(os.readlink(str(path)) for path in (_PROC / str(process.pid) / "fd").iterdir())  # noqa: PTH115 -- 3.8
    return sorted(found)


def process_ids() -> list[str]:
    """Return the ids of all processes."""
    return [name for name in os.listdir(str(_PROC)) if name.isdigit()] if _PROC.is_dir() else []  # noqa: PTH208 -- a Path for each of thousands is slow


def send_signal(process: AttemptProcess, number: int) -> bool:
    """Send a signal to exactly this process; False when it has exited, or its pid was reused."""
    if started_ticks(process.pid) != process.ticks:
        return False
    try:
        os.kill(process.pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def signal_name(number: int) -> str:
    """Return a signal's name, as ``SIGKILL``."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def oom_kills() -> int:
    """Return how often the kernel's out-of-memory killer ended a process of this cgroup (else: of this machine)."""
    for path in _oom_counters():
        try:
            match = re.search(r"^oom_kill (\d+)$", path.read_text(encoding="ascii"), re.MULTILINE)
        except OSError:
            continue
        if match:
            return int(match.group(1))
    return 0


def _oom_counters() -> list[Path]:
    """Return the files that may count: cgroup v2, cgroup v1, the whole machine."""
    found = []
    try:
        lines = (_PROC / "self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers == "":
            found.append(Path("/sys/fs/cgroup" + place) / "memory.events")
        elif "memory" in controllers.split(","):
            found.append(Path("/sys/fs/cgroup/memory" + place) / "memory.oom_control")
    return [*found, _PROC / "vmstat"]
