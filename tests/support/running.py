"""Attempts as a node agent would lay them out, run by the real runner as a real process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any, cast

from raylaunch import contract
from raylaunch.contract import Exit, Facts
from raylaunch.runner.archive import runner_zip
from support.attempts import attempt_spec
from support.signals import send
from support.waiting import wait_until


class Attempt:
    """One attempt's folder below `root`, and the runner that was started in it."""

    def __init__(self, root: Path, entrypoint: str | list[str], **changes: object) -> None:
        self.folder = root / "attempts" / "job-aaaaaa-1"
        self.code = self.folder / contract.CODE
        self.code.mkdir(parents=True)
        self.log = self.folder / "logs/rank-0.log"
        self.tag = f"test/{uuid.uuid4().hex}"
        self.runner: subprocess.Popen[bytes] | None = None
        spec = {
            **attempt_spec("job-aaaaaa-1"),
            "tag": self.tag,
            "entrypoint": entrypoint,
            "envs_dir": str(root / "envs"),
            "grace_s": 5.0,
            "wandb": {
                "mode": "auto",
                "run_id": "run1",
                "project": "tests",
                "entity": "",
                "group": "job",
                "job_type": "train",
                "name": "job",
                "tags": [],
                "notes": "job-aaaaaa",
                "earlier": [],
            },
        }
        (self.folder / contract.ATTEMPT).write_text(json.dumps({**spec, **changes}))
        (self.folder / contract.RUNNER).write_bytes(runner_zip())

    def file(self, name: str, text: str) -> Path:
        """Write a file of the working directory."""
        path = self.code / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def start(self, python: str = sys.executable, **env: str) -> subprocess.Popen[bytes]:
        """Start the runner; its output goes into a file beside the folder."""
        with (self.folder.parent / "out").open("wb") as out:
            self.runner = subprocess.Popen(
                [python, "-I", str(self.folder / contract.RUNNER), str(self.folder)],
                env={**_plain_environment(), **env},
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        return self.runner

    def run(self, python: str = sys.executable, *, timeout_s: float = 60, **env: str) -> Exit:
        """Run the runner to its end; returns the exit facts."""
        self.start(python, **env).wait(timeout_s)
        return self.exit()

    def exit(self, timeout_s: float = 30) -> Exit:
        """Wait for the exit facts."""
        return cast("Exit", self._read(contract.EXIT, timeout_s))

    def started_pid(self) -> int:
        """Wait for the training to start; returns its pid."""
        pid = self._read(contract.STARTED, 30)["pid"]
        assert isinstance(pid, int)
        return pid

    def facts(self) -> Facts:
        """Return what the runner found."""
        return cast("Facts", self._read(contract.FACTS, 30))

    def output(self) -> str:
        """Return what the runner printed: Ray's log of the job. It must be UTF-8."""
        return (self.folder.parent / "out").read_bytes().decode("utf-8")

    def wait_log(self, text: str, timeout_s: float = 30) -> None:
        """Wait until the training has printed `text`."""
        wait_until(lambda: self.log.exists() and text.encode() in self.log.read_bytes(), timeout_s, f"log has {text!r}")

    def stop(self, *, grace_s: float = 5.0) -> Exit:
        """Wish the attempt to stop, as a node agent does; returns the exit facts."""
        beside = self.folder / "stop.part"
        beside.write_text(json.dumps({"why": "stopped", "grace_s": grace_s}))
        beside.rename(self.folder / contract.STOP)
        return self.exit()

    def processes(self) -> list[int]:
        """Return the living processes of the attempt."""
        mark = f"{contract.VAR_ATTEMPT}={self.tag}".encode()
        return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and _carries(entry, mark)]

    def close(self) -> None:
        """End whatever a failed test has left."""
        if self.runner is not None and self.runner.poll() is None:
            self.runner.kill()
            self.runner.wait(10)
        for pid in self.processes():
            send(pid)

    def _read(self, name: str, timeout_s: float) -> dict[str, Any]:
        path = self.folder / name
        wait_until(path.exists, timeout_s, f"{name} is there")
        content: dict[str, Any] = json.loads(path.read_text())
        return content


def _carries(entry: Path, mark: bytes) -> bool:
    try:
        return mark in (entry / "environ").read_bytes().split(b"\0")
    except OSError:
        return False


def _plain_environment() -> dict[str, str]:
    kept = ("PATH", "LANG", "TMPDIR", "PIP_INDEX_URL", "UV_INDEX_URL")
    return {"HOME": "/nonexistent", **{name: os.environ[name] for name in kept if name in os.environ}}
