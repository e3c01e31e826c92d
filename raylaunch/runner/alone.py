"""Running an attempt where no steward is: its folder is made here, of what Ray brought. Standard library only.

Nobody carries files from such a node, so what the controller has to know stands in Ray's log of the job, in lines that
begin with `contract.TOLD`; and what the training leaves behind stays in the folder, which a line names.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raylaunch.runner import contract

_LOOK_S = 0.2
_RAYS_PYTHON = "--python_worker_command="
_KEPT = (contract.LOGS, contract.OUTPUTS, contract.CHECKPOINTS, contract.WANDB)


def main(arguments: Sequence[str]) -> int:
    """Run the attempt that was brought into the folder ``arguments[1]``; returns its runner's status."""
    brought = Path(arguments[1]).resolve()
    spec = json.loads((brought / contract.ATTEMPT).read_text(encoding="utf-8"))
    folder = make_folder(brought, spec)
    told = _Told(spec["epoch"])
    told.say("begin", {"folder": str(folder), "epoch": spec["epoch"]})
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave_it_to_the_runner)
    argv = [_python(), "-I", str(folder / contract.RUNNER), str(folder)]
    runner = subprocess.Popen(argv)  # noqa: S603 -- our own program
    over = threading.Event()
    looking = threading.Thread(target=told.follow, args=(folder, over), daemon=True)
    looking.start()
    status = runner.wait()
    over.set()
    looking.join()
    left = _tidy(folder)
    told.say("left", {"folder": str(folder) if left else "", "what": left})
    told.file(folder, "exit", contract.EXIT)
    if not left:
        shutil.rmtree(str(folder), ignore_errors=True)
    return status if status >= 0 else 128 - status


def make_folder(brought: Path, spec: Mapping[str, Any]) -> Path:
    """Make the attempt's folder below the account's home, else in the folder for scratch."""
    cluster = spec["tag"].partition("/")[0]
    try:
        root = Path.home() / ".raylaunch" / "alone" / cluster
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=spec["attempt"] + ".", dir=str(root)))
    except OSError:
        root = Path(tempfile.gettempdir())
        folder = Path(tempfile.mkdtemp(prefix=spec["attempt"] + ".", dir=str(root)))
    for name in (contract.LOGS, contract.WANDB, contract.OUTPUTS, contract.CHECKPOINTS, contract.TMP):
        (folder / name).mkdir(mode=0o700)
    _unpack(brought / contract.PACKAGE, folder / contract.CODE)
    shutil.copyfile(str(brought / contract.RUNNER), str(folder / contract.RUNNER))
    with (folder / contract.ATTEMPT).open("w", encoding="utf-8") as file:
        json.dump({**spec, "envs_dir": spec["envs_dir"] or str(root / "envs")}, file)
    return folder


def _unpack(package: Path, code: Path) -> None:
    code.mkdir(mode=0o700)
    if package.stat().st_size:
        with tarfile.open(str(package)) as tar:
            if hasattr(tarfile, "data_filter"):
                tar.extractall(str(code), filter="data")
            else:
                tar.extractall(str(code))  # noqa: S202 -- an old Python; the controller checked what it took in


class _Told:
    """What is said in Ray's log, each thing once for each new content."""

    def __init__(self, epoch: str) -> None:
        self._epoch = epoch
        self._said: dict[str, str] = {}

    def say(self, what: str, content: Mapping[str, Any]) -> None:
        line = json.dumps(content)
        if self._said.get(what) != line:
            self._said[what] = line
            os.write(1, f"{contract.TOLD}{self._epoch} {what} {line}\n".encode())

    def file(self, folder: Path, what: str, name: str) -> None:
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        self.say(what, content)

    def follow(self, folder: Path, over: threading.Event) -> None:
        last = False
        while not last:
            last = over.wait(_LOOK_S)
            self.file(folder, "facts", contract.FACTS)
            self.file(folder, "started", contract.STARTED)


def _tidy(folder: Path) -> list[str]:
    """Delete all but what the training left behind, and the small files that say how it went; return what is left."""
    for name in (contract.CODE, contract.TMP, contract.WHEELS):
        shutil.rmtree(str(folder / name), ignore_errors=True)
    log = folder / contract.RANK_LOG.format(rank=0)
    if log.is_file() and log.stat().st_size <= contract.RAY_LOG_LIMIT:
        log.unlink()  # all of it stands in Ray's log
    return [name for name in _KEPT if any(path.is_file() for path in (folder / name).rglob("*"))]


def _leave_it_to_the_runner(_number: int, _frame: object) -> None:
    """Ray signals all processes of a job: the runner ends the training, and this one waits for that."""


def _python() -> str:
    """Return the Python that Ray runs its workers in, found in the command line of the raylet above us; else ours."""
    pid = os.getppid()
    while pid > 1:
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace")
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
        except OSError:
            break
        if _RAYS_PYTHON in line:
            python = line.partition(_RAYS_PYTHON)[2].replace("\0", " ").split(" ")[0]
            return python if os.access(python, os.X_OK) else sys.executable
        pid = int(stat.rpartition(")")[2].split()[1])
    return sys.executable
