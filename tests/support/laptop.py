"""Connecting to a host as a test does: a laptop of its own, a person who is asked, an agent that holds keys."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from raylaunch.errors import RaylaunchError
from raylaunch.ssh.host import machine
from raylaunch.ssh.target import Prompt, Target
from support.sshd import Sshd
from support.waiting import wait_until


def empty_laptop(host: Sshd, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the client a home of its own: without keys, agent or configuration of this machine's user. Returns it."""
    host.authorize(host.key)
    host.config()
    home = host.folder / "empty"
    home.mkdir(exist_ok=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("RAYLAUNCH_HOME", str(host.folder / "raylaunch"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return home


async def hello(target: Target, **how: object) -> str:
    """Connect, and let the host say something."""
    async with machine(target, **how) as there:  # type: ignore[arg-type]  # the keywords of `machine`, as they are
        return (await there.run(["echo", "hello"], limit_s=20)).text


async def refusal(target: Target, **how: object) -> RaylaunchError:
    """Connect, which must fail with an error of ours."""
    with pytest.raises(RaylaunchError) as caught:
        await hello(target, **how)
    return caught.value


class Person:
    """Somebody who is asked, and answers what she was told to."""

    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)
        self.asked: list[Prompt] = []

    async def __call__(self, prompt: Prompt) -> str | None:
        self.asked.append(prompt)
        return self.answers.pop(0)


@contextmanager
def agent(folder: Path, *keys: Path) -> Iterator[str]:
    """Run an ssh-agent that holds these keys; yields its socket."""
    path = folder / "agent"
    with subprocess.Popen(["ssh-agent", "-D", "-a", str(path)], stdout=subprocess.DEVNULL) as process:
        try:
            wait_until(path.exists, 20, "the agent listens")
            env = {**os.environ, "SSH_AUTH_SOCK": str(path)}
            for key in keys:
                subprocess.run(["ssh-add", "-q", str(key)], env=env, check=True, timeout=20, capture_output=True)
            yield str(path)
        finally:
            process.terminate()


def program(*words: str) -> None:
    """Run a program to its good end."""
    subprocess.run(words, check=True, capture_output=True, timeout=20)
