"""On a real GPU: what Ray and a job see of it, whose it is, and what is left on it. ``make gpu-check`` runs these.

Everywhere else GPUs are logical: Ray counts them, and nothing looks at a card.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.card import GIB, NO_DEVICE, PROGRAM, Card, cards
from support.cluster import ROOT, Cluster, running_cluster
from support.waiting import wait_until

from raylaunch.models.cluster import NodeView
from raylaunch.models.states import JobState, Reason

CARDS = cards()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.ray,
    pytest.mark.skipif(not CARDS, reason="needs a GPU: nvidia-smi lists none"),
]
FREED_S = 30


@pytest.fixture(scope="module")
def lab() -> Iterator[Cluster]:
    """A cluster with this machine's own GPUs."""
    with running_cluster({"gpus": "auto", "cpus": 8}) as cluster:
        yield cluster


def node_of(cluster: Cluster) -> NodeView:
    """Return the cluster's one node as the controller sees it."""
    (node,) = cluster.ask(lambda client: client.status()).nodes
    return node


def takes(cluster: Cluster, gib: float, seconds: float, *options: str) -> str:
    """Submit a job that takes memory of the first GPU that it sees, for so long; return its id."""
    return cluster.submit("--working-dir", "", *options, "--", "python", "-c", PROGRAM, str(gib), str(seconds))


def saw(cluster: Cluster, job: str) -> dict[str, object]:
    """Wait until such a job has ended well; return what it saw."""
    assert cluster.ended(job).state is JobState.SUCCEEDED, cluster.log(job).decode()
    reported: dict[str, object] = json.loads(cluster.log(job).decode().splitlines()[0])
    return reported


def of_uuid(uuid: str) -> Card:
    """Return a GPU as it is now."""
    return next(card for card in cards() if card.uuid == uuid)


def test_ray_has_as_many_as_there_are_and_the_cluster_knows_them_by_name(lab: Cluster) -> None:
    node = node_of(lab)
    assert node.gpus == len(CARDS)
    assert [(gpu.uuid, gpu.name) for gpu in node.gpu] == [(card.uuid, card.name) for card in CARDS]
    assert CARDS[0].name in lab.good("status")


def test_a_job_computes_on_the_one_gpu_it_requested(lab: Cluster) -> None:
    job = takes(lab, 1, 0, "--gpus", "1")
    reported = saw(lab, job)
    assert isinstance(reported["gpus"], list)
    assert len(reported["gpus"]) == 1, "it sees the others as well"
    assert reported["gpus"][0] in [{"uuid": card.uuid, "name": card.name} for card in CARDS]


def test_a_job_without_gpus_sees_none(lab: Cluster) -> None:
    reported = saw(lab, takes(lab, 1, 0))
    assert (reported["status"], reported["visible"], reported["gpus"]) == (NO_DEVICE, "", [])


def test_a_job_waits_with_a_reason_when_all_gpus_are_in_use(lab: Cluster) -> None:
    everything = ("--gpus", str(len(CARDS)))
    first = takes(lab, 1, 600, *everything)
    lab.ready(first)
    second = takes(lab, 1, 0, *everything)
    waiting = lab.until(second, lambda job: job.reason is Reason.WAITING_FOR_GPUS, 30, "it waits")
    assert "GPU" in waiting.message
    lab.good("stop", first, "--wait")
    assert saw(lab, second)["status"] == 0


def test_the_gpus_of_a_stopped_job_are_free(lab: Cluster) -> None:
    before = {card.uuid: card.memory_used for card in cards()}
    job = takes(lab, 4, 600, "--gpus", "1")
    lab.ready(job)
    uuid = json.loads(lab.log(job).decode().splitlines()[0])["gpus"][0]["uuid"]
    assert of_uuid(uuid).memory_used - before[uuid] >= 4 * GIB
    lab.good("stop", job, "--wait")
    wait_until(lambda: of_uuid(uuid).memory_used - before[uuid] < GIB // 4, FREED_S, "its memory is free")


@pytest.fixture
def outside() -> Iterator[subprocess.Popen[bytes]]:
    """A program of this account, outside the cluster, that computes on the first GPU."""
    with subprocess.Popen([sys.executable, "-c", PROGRAM, "1", "600"], stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert b"GPU-" in program.stdout.readline()
        yield program
        program.kill()


def test_a_job_waits_for_a_gpu_used_by_another_program_and_names_its_user(
    lab: Cluster, outside: subprocess.Popen[bytes]
) -> None:
    named = f":{outside.pid}:"
    wait_until(lambda: any(named in who for gpu in node_of(lab).gpu for who in gpu.processes), 60, "it is listed")
    job = takes(lab, 1, 0, "--gpus", str(len(CARDS)))
    waiting = lab.until(job, lambda job: job.reason is Reason.GPU_BUSY_OUTSIDE, 30, "it waits")
    assert "used by processes outside raylaunch" in waiting.message
    outside.kill()
    assert saw(lab, job)["status"] == 0


@pytest.fixture(scope="module")
def pytorch() -> None:
    """PyTorch in the environment of these tests, with CUDA."""
    asks = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    if subprocess.run([sys.executable, "-c", asks], capture_output=True, check=False).returncode:
        pytest.skip("needs PyTorch with CUDA: make gpu-check TORCH=torch")


@pytest.mark.usefixtures("pytorch")
def test_pytorch_trains_on_a_gpu_and_the_model_can_be_downloaded(lab: Cluster, tmp_path: Path) -> None:
    job = lab.submit("-f", str(ROOT / "examples/torch_script/job.yaml"), "--gpus", "1")
    assert lab.ended(job, 300).state is JobState.SUCCEEDED, lab.log(job).decode()
    assert f"device: {CARDS[0].name}" in lab.log(job).decode()
    lab.good("get", job, "--to", str(tmp_path / "model"))
    assert (tmp_path / "model" / "model.pt").stat().st_size


@pytest.mark.usefixtures("pytorch")
def test_torchrun_trains_with_nccl_on_all_of_them(lab: Cluster) -> None:
    job = lab.submit(
        "-f", str(ROOT / "examples/torchrun/job.yaml"), "--gpus", str(len(CARDS)), "--processes", str(len(CARDS))
    )
    assert lab.ended(job, 300).state is JobState.SUCCEEDED, lab.log(job).decode()
