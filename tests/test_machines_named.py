"""`raylaunch up` on a host whose Ray environment the person has made and names: nothing is installed into it."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from support.fittings import this_python
from support.hosts import World, world
from support.terminal import Laptop

pytestmark = [pytest.mark.machines, pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(600)]

FILE = f"name: lab\ncpus: 2\ngpus: 2\nhosts:\n  - {{host: h1, environment: 'venv:{sys.prefix}'}}\n"


@pytest.fixture
def lab() -> Iterator[World]:
    with world() as made:
        made.host(share=this_python())
        yield made


def test_a_cluster_runs_in_an_environment_that_was_there(lab: World, tmp_path_factory: pytest.TempPathFactory) -> None:
    laptop = Laptop(lab, tmp_path_factory.mktemp("laptop"), FILE)
    result = laptop.watch("up", limit_s=300)
    assert result.status == 0, result.err
    assert "wheels:" not in result.err, "Ray and wandb are there"
    job = laptop.call("submit", "--gpus", "1", "--", "python -c 'import ray; print(ray.__file__)'").stdout.strip()
    assert laptop.call("wait", job).returncode == 0
    assert laptop.call("logs", job).stdout.startswith(sys.prefix)
    laptop.call("down", limit_s=120)
