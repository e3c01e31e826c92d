"""Launchers on a real cluster, as a person uses them."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from support.cluster import ROOT, Cluster
from support.waiting import wait_until

from raylaunch.models.states import JobState

pytestmark = [
    pytest.mark.ray,
    pytest.mark.wandb,
    pytest.mark.skipif(
        importlib.util.find_spec("torch") is None, reason="needs PyTorch, which could not be installed here"
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("sklearn") is None, reason="needs scikit-learn: pip install 'raylaunch[demo]'"
    ),
]


def example(cluster: Cluster, name: str) -> Path:
    folder = cluster.work / "examples" / name
    shutil.copytree(ROOT / "examples" / name, folder, dirs_exist_ok=True)
    return folder


@pytest.mark.long
def test_the_torchrun_example_trains_on_two_ranks(cluster: Cluster) -> None:
    import torch  # noqa: PLC0415 -- only where it is installed

    folder = example(cluster, "torchrun")
    result = cluster.cli("run", "-f", "job.yaml", cwd=folder, timeout_s=240)
    assert result.status == 0, result.err
    assert "rank 0 of 2 on " in result.out

    assert "rank 1 of 2 on " in cluster.good("logs", "digits-ddp", "--rank", "1", cwd=folder)
    metrics = json.loads(cluster.good("metrics", "digits-ddp", "--json", cwd=folder))
    assert sorted(metrics["last"]) == ["accuracy", "epoch", "loss"]
    assert metrics["last"]["accuracy"] > 0.9

    cluster.good("get", "digits-ddp", "--to", "model", cwd=folder)
    weights = torch.load(folder / "model" / "model.pt", weights_only=True)
    assert weights["2.weight"].shape == (10, 128)
    files = json.loads(cluster.good("files", "digits-ddp", "--json", cwd=folder))
    assert any(file["path"].endswith("checkpoints/latest.pt") for file in files)


def test_a_rank_is_read_while_it_runs_and_its_failure_is_the_jobs(cluster: Cluster) -> None:
    script = (
        "import os, pathlib, sys, time\n"
        "rank = os.environ['RANK']\n"
        "print('up', rank, flush=True)\n"
        "while not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.05)\n"
        "if rank == '1': raise MemoryError('CUDA out of memory')\n"
        "time.sleep(600)\n"
    )
    folder = cluster.work / "failing-rank"
    folder.mkdir(exist_ok=True)
    (folder / "train.py").write_text(script)
    words = ("--name", "failing-rank", "--launcher", "torchrun", "--processes", "2", "--", "train.py", "go")
    job = cluster.submit(*words[:-1], str(folder / "go"), cwd=folder)
    wait_until(lambda: cluster.cli("logs", job, "--rank", "1").out == "up 1\n", 120, "the second rank's log is read")
    refused = cluster.cli("logs", job, "--rank", "2")
    assert (refused.status, refused.out) == (1, "")
    assert f"attempt 1 of {job} has no rank 2" in refused.err
    (folder / "go").touch()
    ended = cluster.ended(job)
    assert ended.attempt is not None
    assert (ended.state, ended.attempt.failed_rank, ended.attempt.exit_code) == (JobState.FAILED, 1, 1)
    assert ended.message == "rank 1 exited with status 1: the GPU ran out of memory"
    assert ended.log_tail[-1] == "MemoryError: CUDA out of memory"
    assert not cluster.of_attempt(f"{job}-1")
