"""Which addresses in a log are taken for the page of a W&B run."""

from __future__ import annotations

from pathlib import Path

import pytest

from raylaunch.controller.scheduler.follow import _address
from raylaunch.runner.wandb_env import RunAddress, hosts_of


def found(folder: Path, line: str, server: str = "https://api.wandb.ai") -> str:
    (folder / "log").write_text(f"{line}\n")
    address = RunAddress(folder / "log")
    address.hosts = hosts_of(server, {})
    address.poll("rl1")
    return address.url


@pytest.mark.parametrize(
    ("server", "url"),
    [
        ("https://api.wandb.ai", "https://wandb.ai/team/digits/runs/rl1"),
        ("https://api.forge.coreweave.com", "https://wandb.ai/team/digits/runs/rl1"),
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080/team/digits/runs/rl1"),
        ("https://wandb.lab.example.org", "https://wandb.lab.example.org/team/digits/runs/rl1"),
        ("https://api.lab.example.org", "https://app.lab.example.org/team/digits/runs/rl1"),
    ],
)
def test_an_address_at_the_runs_own_server_is_taken(tmp_path: Path, server: str, url: str) -> None:
    assert found(tmp_path, f"wandb: View run at {url}", server) == url


@pytest.mark.parametrize(
    "url",
    [
        "https://evil.example.org/team/digits/runs/rl1",
        "https://wandb.ai.evil.example.org/team/digits/runs/rl1",
        "https://wandb.ai@evil.example.org/team/digits/runs/rl1",
        "https://evil.example.org/https://wandb.ai/team/digits/runs/rl1x",
        "https://wandb.ai/team/digits/runs/rl1-other",
        "https://wandb.ai/team/dig?its/runs/rl1",
    ],
)
def test_another_address_is_not(tmp_path: Path, url: str) -> None:
    assert found(tmp_path, url) == ""


def test_an_address_that_a_job_writes_into_its_facts_is_a_plain_one() -> None:
    good = "https://wandb.ai/team/digits/runs/rl1"
    assert _address(good) == good
    for bad in (
        "javascript:alert(1)",
        "https://a@evil.org/x/y/runs/z",
        "https://a/b/c/runs/d\x1b[8m",
        "file:///etc/passwd",
    ):
        assert _address(bad) == ""
