"""The terminal of a person's laptop: a home of its own, a cluster.yaml, and ``raylaunch`` typed as a program."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from support.cli import run_cli
from support.hosts import World
from support.trust import trusted


@dataclass(frozen=True)
class WatchedRun:
    """What a command printed, and when.

    Args:
        status: its exit status; that of a killed one is below zero.
        out: what it printed as its result.
        lines: each line on stderr, with the seconds since the command began.
        took_s: how long it ran.
    """

    status: int
    out: str
    lines: tuple[tuple[float, str], ...]
    took_s: float

    @property
    def err(self) -> str:
        """All lines on stderr."""
        return "\n".join(line for _, line in self.lines)

    @property
    def silence_s(self) -> float:
        """The longest time in which it said nothing, its beginning and its end included."""
        times = [0.0, *(at for at, _ in self.lines), self.took_s]
        return max(after - before for before, after in itertools.pairwise(times))


class Laptop:
    """A person's machine, from which the hosts of a world are reached.

    Args:
        lab: the world.
        folder: where she works.
        text: her cluster.yaml.
        code: the folder of another raylaunch than the one under test, which she has installed.
        python: the interpreter of an environment with another raylaunch.
    """

    def __init__(
        self, lab: World, folder: Path, text: str, *, code: Path | None = None, python: str = sys.executable
    ) -> None:
        self.lab = lab
        self.folder = folder
        self.code = code
        self.python = python
        self.home = folder / "raylaunch-home"
        folder.mkdir(exist_ok=True)
        self.write(text)

    def write(self, text: str) -> None:
        """Write her cluster.yaml anew."""
        (self.folder / "cluster.yaml").write_text(text)

    @property
    def env(self) -> dict[str, str]:
        """The environment of what she types: no key but those of the world."""
        without = {"SSH_AUTH_SOCK", "RAYLAUNCH_CLUSTER_FILE"}
        env = {key: value for key, value in os.environ.items() if key not in without}
        if self.code is not None:
            env["PYTHONPATH"] = str(self.code)
        accepted = trusted(self.folder / "cluster.yaml")
        return env | {"HOME": str(self.lab.home), "RAYLAUNCH_HOME": str(self.home), "NO_COLOR": "1"} | accepted

    def call(self, *words: str, limit_s: float = 120, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run ``raylaunch WORDS`` there."""
        done = run_cli(words, cwd=self.folder, env=self.env, timeout_s=limit_s, python=self.python)
        assert not check or done.returncode == 0, f"{words}: {done.stdout}\n{done.stderr}"
        return done

    def watch(self, *words: str, limit_s: float = 120, kill_at: Callable[[str], bool] = lambda _: False) -> WatchedRun:
        """Run ``raylaunch WORDS`` there, and note when it says what.

        Args:
            words: the command.
            limit_s: after which it is killed, and the test has failed.
            kill_at: told each line of stderr as it comes; the command is killed (SIGKILL) where it says True.
        """
        started = time.monotonic()
        lines: list[tuple[float, str]] = []
        with subprocess.Popen(
            self._argv(words),
            cwd=self.folder,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            late = threading.Timer(limit_s, process.kill)
            late.start()
            assert process.stderr is not None
            assert process.stdout is not None
            try:
                for line in process.stderr:
                    lines.append((time.monotonic() - started, line.rstrip("\n")))
                    if kill_at(lines[-1][1]):
                        process.kill()
                out = process.stdout.read()
            finally:
                late.cancel()
        took_s = time.monotonic() - started
        output = WatchedRun(process.returncode, out, tuple(lines), took_s)
        assert took_s < limit_s, f"{words} took longer than {limit_s} s: {output.err}"
        return output

    def status(self) -> dict[str, object]:
        """Return what ``raylaunch status --json`` says."""
        found = json.loads(self.call("status", "--json").stdout)
        assert isinstance(found, dict)
        return found

    def living(self) -> set[str]:
        """Return the hosts that Ray lists as alive and whose agent responds; none where nothing answers."""
        done = self.call("status", "--json", check=False)
        nodes = json.loads(done.stdout)["nodes"] if done.stdout.startswith("{") else []
        return {str(node["hostname"]) for node in nodes if node["alive"] and node["steward"]}

    def _argv(self, words: tuple[str, ...]) -> list[str]:
        return [self.python, "-m", "raylaunch", *words]
