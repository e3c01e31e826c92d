"""Which processes of a training receive SIGTERM, and what the others do until those have exited.

The program receives it: each rank where a launcher started ranks, else the topmost process that handles it. What that
process has forked (DataLoader workers above all) is left to it: a signal to the whole process group would kill its
workers before it can save. Where nothing handles SIGTERM it goes to the topmost program, which ends as by ``kill``.

What started the program (shells, ``uv run``, torchrun) must not act meanwhile: a shell would go on with its next
command, torchrun ends the sessions of all ranks as soon as it receives the signal, or the first rank exits.
They are held, and released one after the other when the program has exited. Only the main thread is held, with
ptrace(2), because another thread of torchrun serves the ranks' store (torch's TCPStore). Where ptrace is forbidden,
SIGSTOP is used.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from raylaunch import entrypoint
from raylaunch.runner.processes import is_alive, is_wandb_helper, process_ids, read_stat

_PROC = Path("/proc")
_FILTERS = ("tee", "cat", "grep", "sed", "awk", "gawk", "mawk", "ts", "tr", "cut", "head", "tail")
"""Filters of a program's output: they exit on their own when the program has exited and everything is written."""
_PYTHON = re.compile(r"(?:python|pypy)[\d.]*")
_RANKS = (b"RANK=", b"OMPI_COMM_WORLD_RANK=")
_WORKER = "pt_data_worker"
_EACH_S = 3.0
_ROUNDS = 5
_SEIZE, _INTERRUPT, _DETACH = 0x4206, 0x4207, 17
_WALL = 0x40000000
_STOPPED_S = 0.5


def _bit(number: int) -> int:
    """Return a signal's bit in the masks of /proc/PID/status."""
    return 1 << (number - 1)


_TERM = _bit(signal.SIGTERM)
_CRASHES = _bit(signal.SIGBUS) | _bit(signal.SIGSEGV) | _bit(signal.SIGFPE)
_OTHER_CRASHES = _bit(signal.SIGABRT) | _bit(signal.SIGILL)


class Process(NamedTuple):
    """One living process. `handles` is the mask of the signals that it catches, or waits for with them blocked."""

    pid: int
    parent: int
    ticks: int
    name: str
    argv: tuple[str, ...]
    handles: int
    rank: bool
    """Whether its environment has a rank."""

    @property
    def program(self) -> str:
        """The name of the program, of a Python script the script's."""
        words = [word.rpartition("/")[2] for word in self.argv if not word.startswith("-") or word == self.argv[0]]
        if len(words) > 1 and _PYTHON.fullmatch(words[0]):
            return words[1]
        return words[0].lstrip("-") if words else self.name

    @property
    def shell(self) -> bool:
        """Whether it is a shell."""
        return self.program in entrypoint.SHELLS

    @property
    def wrapper(self) -> bool:
        """Whether it only runs another program, and ends with it."""
        return self.program in entrypoint.WRAPPERS

    @property
    def handler(self) -> bool:
        """Whether it handles SIGTERM by itself. The handler of a DataLoader's worker only checks its parent.

        https://github.com/pytorch/pytorch/blob/main/torch/csrc/DataLoader.cpp
        """
        of_worker = self.handles & _CRASHES == _CRASHES and not self.handles & _OTHER_CRASHES
        return bool(self.handles & _TERM) and not (of_worker or self.name == _WORKER)


class SignalPlan(NamedTuple):
    """Who receives SIGTERM, and who is held meanwhile, the innermost first."""

    targets: list[Process]
    held: list[Process]


def choose(processes: Iterable[Process], root: int) -> SignalPlan:
    """Choose among the processes of a training, whose first is `root`. Pure."""
    known = {process.pid: process for process in processes}
    if root not in known:
        return SignalPlan([], [])
    children: dict[int, list[Process]] = {}
    for process in known.values():
        children.setdefault(process.parent, []).append(process)
    ranks = [
        process
        for process in known.values()
        if process.rank and process.parent in known and not known[process.parent].rank
    ]
    above_ranks = {above.pid for rank in ranks for above in _ancestors(rank, known)}

    def passed_over(process: Process) -> bool:
        return process.pid in above_ranks or process.shell or process.wrapper or process.program in _FILTERS

    def topmost(process: Process, *, handlers: bool) -> Iterator[Process]:
        if is_wandb_helper(process.name, process.argv):
            return
        if not passed_over(process) and (process.handler or not handlers):
            yield process
            return
        for child in children.get(process.pid, []):
            yield from topmost(child, handlers=handlers)

    targets = []
    for unit in ranks or [known[root]]:
        found = list(topmost(unit, handlers=True)) or list(topmost(unit, handlers=False)) or [unit]
        targets += [process for process in found if process not in targets]
    pids = {process.pid for process in targets}
    depths = {
        above.pid: depth for process in targets for depth, above in enumerate(reversed(_ancestors(process, known)))
    }
    held = [known[pid] for pid in sorted(depths, key=lambda pid: -depths[pid]) if pid not in pids]
    return SignalPlan(targets, held)


def _ancestors(process: Process, known: Mapping[int, Process]) -> list[Process]:
    """Return the ancestors of a process among those that are known, the nearest first."""
    found = []
    while process.parent in known:
        process = known[process.parent]
        found.append(process)
    return found


def descendants(root: int) -> list[Process]:
    """Return a process and all that descends from it, as /proc shows them; zombies are left out."""
    parents: dict[int, list[int]] = {}
    stats: dict[int, list[str]] = {}
    for name in process_ids():
        fields = read_stat(int(name))
        if fields and fields[0] not in "ZX":
            stats[int(name)] = fields
            parents.setdefault(int(fields[1]), []).append(int(name))
    found: list[Process] = []
    waiting = [root] if root in stats else []
    while waiting:
        pid = waiting.pop()
        waiting += parents.get(pid, [])
        found += _read(pid, stats[pid])
    return found


def _read(pid: int, stat: list[str]) -> Iterator[Process]:
    folder = _PROC / str(pid)
    try:
        status = (folder / "status").read_text(encoding="utf-8", errors="replace")
        words = (folder / "cmdline").read_bytes().split(b"\0")
        environ = (folder / "environ").read_bytes().split(b"\0")
    except OSError:
        return
    masks = dict(re.findall(r"^(SigCgt|SigBlk):\t([0-9a-f]+)$", status, re.MULTILINE))
    name = re.search(r"^Name:\t(.*)$", status, re.MULTILINE)
    yield Process(
        pid,
        int(stat[1]),
        int(stat[19]),
        name.group(1) if name else "",
        tuple(os.fsdecode(word) for word in words if word),
        int(masks.get("SigCgt", "0"), 16) | int(masks.get("SigBlk", "0"), 16),
        any(entry.startswith(_RANKS) for entry in environ),
    )


class Shutdown:
    """A training that is being stopped, from SIGTERM until all of it has exited. `step` is called repeatedly."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._stopped: dict[int, Process] = {}
        self._by_signal: set[int] = set()
        self._free_at = 0.0
        self._released: Process | None = None
        self._plan = self._hold()
        for process in self._plan.targets:
            _send(process, signal.SIGTERM)
        held = {process.pid for process in self._plan.held}
        for process in [process for process in self._stopped.values() if process.pid not in held]:
            self._resume(process)  # what it ran has exited meanwhile

    def step(self) -> None:
        """Release what is held, one after the other, when the program has exited."""
        if any(is_alive(process.pid, process.ticks) for process in self._plan.targets):
            return
        now = time.monotonic()
        self._free_at = self._free_at or now + _EACH_S
        if now < self._free_at and self._still_running():
            return
        if not self._plan.held:
            return
        process = self._plan.held.pop(0)
        self._free_at = now + _EACH_S
        self._released = process
        if not process.wrapper:
            _send(process, signal.SIGTERM)
        self._resume(process)

    def end(self) -> None:
        """SIGKILL to all of it but W&B's core, which still writes."""
        for process in descendants(self._root):
            if not is_wandb_helper(process.name, process.argv):
                _send(process, signal.SIGKILL)
        for process in self._stopped.values():
            self._reap(process)

    def _still_running(self) -> bool:
        """Whether something still runs that exits on its own: what was released last, or a filter of the output."""
        if self._released is not None:
            return is_alive(self._released.pid, self._released.ticks)
        held = {process.pid for process in self._plan.held}
        return any(process.pid not in held for process in descendants(self._root))

    def _hold(self) -> SignalPlan:
        """Hold what has started the program; repeat until nothing new was started."""
        plan = choose(descendants(self._root), self._root)
        for _ in range(_ROUNDS):
            new = [process for process in plan.held if process.pid not in self._stopped]
            for process in reversed(new):
                self._stop(process)
            if not new:
                break
            plan = choose(descendants(self._root), self._root)
        return plan

    def _stop(self, process: Process) -> None:
        self._stopped[process.pid] = process
        if _trace(_SEIZE, process.pid) and _trace(_INTERRUPT, process.pid):
            deadline = time.monotonic() + _STOPPED_S
            with contextlib.suppress(ChildProcessError):  # it has exited meanwhile
                while os.waitpid(process.pid, os.WNOHANG | _WALL)[0] == 0 and time.monotonic() < deadline:
                    time.sleep(0.001)
        else:
            self._by_signal.add(process.pid)
            _send(process, signal.SIGSTOP)

    def _resume(self, process: Process) -> None:
        self._stopped.pop(process.pid, None)
        if process.pid in self._by_signal:
            _send(process, signal.SIGCONT)
        elif not _trace(_DETACH, process.pid):
            self._reap(process)

    def _reap(self, process: Process) -> None:
        """Let the parent of a held process learn that it has died; the tracer learns it first.

        The exit status of our own child is left to the supervisor, which reports it.
        """
        if process.pid != self._root:
            with contextlib.suppress(OSError):
                os.waitpid(process.pid, os.WNOHANG | _WALL)


def _trace(request: int, pid: int) -> bool:
    ptrace = ctypes.CDLL(None).ptrace
    ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    ptrace.restype = ctypes.c_long
    return int(ptrace(request, pid, None, None)) == 0


def _send(process: Process, number: int) -> None:
    if is_alive(process.pid, process.ticks):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process.pid, number)
