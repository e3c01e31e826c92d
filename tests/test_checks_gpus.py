"""What may be wrong with GPUs, and with what else runs on a host: the facts, the words, and the mend."""

from __future__ import annotations

import pytest
from support.facts import BLOCKING, SOMEBODY, WARNING, Case, check_alone, check_words, facts, one_host

from raylaunch.cluster.doctor.checks_cluster import problems
from raylaunch.cluster.probe.choices import with_chosen_gpus
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.models.host_spec import HostSpec

LAB2 = {"name": "lab2", "user": "anna", "folder": "/home/anna/.raylaunch/clusters/lab2", "pid": 77, "wanted": "running"}
GPU0 = "GPU-0aaa1111-0000-0000-0000-000000000000"
MINE = {"name": "lab", "user": "ml", "folder": "/home/ml/.raylaunch/clusters/lab", "pid": 99, "gpu_uuids": [GPU0]}
OURS = "/tmp/raylaunch-1001/abc"  # noqa: S108 -- where raylaunch keeps a Ray's files
RAYLET = {"pid": 31, "kind": "raylet", "user": "anna", "worker_ports": [10002, 19999], "temp_dir": "/scratch/ray"}

WAY_IN = (
    "ask anna for: raylaunch token create --for ml; paste the line that it prints; raylaunch up starts yours next to it"
)
CASES = (
    Case(
        "driver_missing",
        BLOCKING,
        "8 NVIDIA GPUs are on its bus, and no nvidia-smi",
        "install the NVIDIA driver (sudo apt install nvidia-driver-…-server); gpus: 0 does not use the GPUs",
        {"gpus": {"hardware": 8}},
    ),
    Case(
        "driver_broken",
        BLOCKING,
        "nvidia-smi fails: Failed to initialize NVML: Driver/library version mismatch",
        "reboot if the driver was updated, else reinstall the driver; gpus: 0 does not use the GPUs",
        {
            "gpus": {
                "hardware": 8,
                "nvidia_smi": "/usr/bin/nvidia-smi",
                "problem": "Failed to initialize NVML: Driver/library version mismatch",
            }
        },
    ),
    Case(
        "gpus_missing",
        BLOCKING,
        "16 GPUs are requested, but it has 8: " + ", ".join(f"{i} (NVIDIA H100 80GB HBM3)" for i in range(8)),
        "write gpus: 8, or find the others: lspci",
        host={"gpus": 16},
    ),
    Case(
        "gpus_missing",
        BLOCKING,
        ("it has no GPU 9, GPU-ffff; it has " + ", ".join(f"{i} (NVIDIA H100 80GB HBM3)" for i in range(8))),
        "list ids or UUIDs from: nvidia-smi -L",
        host={"gpus": [0, 9, "GPU-ffff"]},
    ),
    Case(
        "gpus_missing",
        WARNING,
        "nvidia-smi lists 8 of the 9 NVIDIA GPUs on its bus",
        "check sudo dmesg | grep -i nvrm: one may have failed",
        {"gpus.hardware": 9},
    ),
    Case(
        "gpus_logical",
        WARNING,
        "it has no GPU: its 8 are logical ones, which jobs are given but cannot compute on",
        "leave gpus out for a host without GPUs",
        {"gpus": {"hardware": 0}},
        {"gpus": 8},
    ),
    Case(
        "gpus_busy",
        WARNING,
        "GPU 0 (NVIDIA H100 80GB HBM3) is used by python3 (pid 4711, user anna)",
        "jobs wait for that GPU until it is free; to leave it out, list the others: gpus: [..]",
        {"gpus.gpus.0.processes": [SOMEBODY]},
    ),
    Case(
        "gpus_of_another_cluster",
        BLOCKING,
        "anna runs cluster lab2 there (controller pid 77; /home/anna/.raylaunch/clusters/lab2), and it uses GPU 0",
        "ask anna for: raylaunch token create --for ml; paste the line that it prints; or list other GPUs: gpus: [..]",
        {"clusters": [LAB2 | {"gpu_uuids": [GPU0]}]},
    ),
    Case(
        "gpus_of_another_cluster",
        BLOCKING,
        (
            "anna runs cluster lab2 there (controller pid 77; /home/anna/.raylaunch/clusters/lab2), and it may use "
            "GPUs 0, 1, 2, 3, 4, 5, 6, 7: its record cannot be read"
        ),
        "ask anna for: raylaunch token create --for ml; paste the line that it prints; or list other GPUs: gpus: [..]",
        {"clusters": [LAB2]},
    ),
    Case(
        "gpus_of_another_cluster",
        WARNING,
        (
            "anna runs cluster lab2 there (controller pid 77; /home/anna/.raylaunch/clusters/lab2), and it may use "
            "GPU 5: its record cannot be read, but you list yours"
        ),
        "ask anna which they are",
        {"clusters": [LAB2]},
        {"gpus": [5]},
    ),
    Case(
        "mig_enabled",
        WARNING,
        ("MIG is on for GPU 0 (7 slices): a job is given the whole GPU's number, and CUDA then shows it one slice"),
        "sudo nvidia-smi -i 0 -mig 0, while nobody uses it",
        {"gpus.gpus.0.mig": True, "gpus.mig_devices": 7},
    ),
    Case(
        "gpu_not_for_compute",
        BLOCKING,
        "the compute mode of GPU 0 is Prohibited: no program may use it",
        "sudo nvidia-smi -i 0 -c DEFAULT",
        {"gpus.gpus.0.compute_mode": "Prohibited"},
    ),
    Case(
        "gpu_errors",
        WARNING,
        "GPU 0 (NVIDIA H100 80GB HBM3) has 3 uncorrected memory errors since the driver start",
        "reset it while nobody uses it: sudo nvidia-smi -i 0 -r; if they return it is failing",
        {"gpus.gpus.0.ecc_errors": 3},
    ),
    Case(
        "gpu_xid",
        WARNING,
        ("the driver reported 2 errors since the boot, last Xid 79 of PCI:0000:1b:00; Xid 79 is: fallen off the bus"),
        "reset the GPU or reboot the host; if they return it is failing",
        {
            "gpus.xids": [
                "[  812.1] NVRM: Xid (PCI:0000:1b:00): 31, pid=9, name=python, MMU Fault: ENGINE GRAPHICS",
                "[ 1812.1] NVRM: Xid (PCI:0000:1b:00): 79, pid='<unknown>', GPU has fallen off the bus.",
            ]
        },
    ),
    Case(
        "gpu_xid",
        WARNING,
        "the driver reported 1 error since the boot, last Xid 13 of PCI:0000:1b:00",
        "these are mostly bugs of programs; look up the numbers if jobs fail without a reason",
        {"gpus.xids": ["NVRM: Xid (PCI:0000:1b:00): 13, pid=9, Graphics Exception"]},
    ),
    Case(
        "no_free_ports",
        BLOCKING,
        (
            "Ray's ports do not fit: it needs 10 from 20000 to 25999 (6000 are free), and a block of 896 from 26000 to "
            "32699"
        ),
        "end what holds them: ss -ltnp",
        {
            "clusters": [LAB2 | {"gpu_uuids": [], "pid": None}],
            "rays": [RAYLET | {"worker_ports": [25000, 32767], "temp_dir": OURS}],
        },
    ),
    Case(
        "other_ray",
        WARNING,
        (
            "another Ray runs there (pid 31 of anna); raylaunch does not touch it, and does not know which GPUs "
            "it has assigned"
        ),
        "list GPUs that it does not use (gpus: [..]), or end that one by its process ids; Ray's command ends all",
        {"rays": [RAYLET]},
    ),
    Case(
        "certificate_expiring",
        WARNING,
        "the certificate of this host's Ray expires in 12 days; without it the host cannot join the others",
        "raylaunch down, then raylaunch up creates new ones",
        {"clusters": [MINE | {"wanted": "running"} | {"tls_days": 12}]},
    ),
    Case(
        "certificate_expiring",
        WARNING,
        "the certificate of this host's Ray has expired; without it the host cannot join the others",
        "raylaunch down, then raylaunch up creates new ones",
        {"clusters": [MINE | {"wanted": "running"} | {"tls_days": -1}]},
    ),
    Case(
        "same_name_cluster",
        WARNING,
        (
            "anna runs cluster lab there (since 2026-11-20 09:00 UTC, controller pid 77; "
            "/home/anna/.raylaunch/clusters/lab)"
        ),
        WAY_IN,
        {
            "clusters": [
                LAB2
                | {"name": "lab", "since": 1795165200, "folder": "/home/anna/.raylaunch/clusters/lab", "gpu_uuids": []}
            ]
        },
    ),
    Case(
        "other_cluster",
        WARNING,
        "anna runs cluster lab2 there (controller pid 77; /home/anna/.raylaunch/clusters/lab2)",
        WAY_IN,
        {"clusters": [LAB2]},
        {"gpus": 0},
    ),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.code}-{case.level}")
def test_a_problem_has_its_message_and_its_fix(case: Case) -> None:
    check_words(case)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.code}-{case.level}")
def test_one_fault_is_reported_as_one_problem(case: Case) -> None:
    check_alone(case)


def test_a_used_controller_port_blocks_the_head() -> None:
    spec = ClusterSpec(name="lab", port=8642, hosts=(HostSpec(host="dgx-1"),))
    (found,) = problems(spec, {"dgx-1": facts(changes={"listening": [22, 8642]})})
    assert (found.code, found.level) == ("port_taken", "blocking")
    assert found.message == "port 8642, which cluster.yaml sets for the controller, is taken there"
    assert found.mend == "leave port out of cluster.yaml; or see who has it: ss -ltnp sport = :8642"
    (found,) = problems(
        spec, {"dgx-1": facts(changes={"listening": [22, 8642], "holders": {8642: "python3 (pid 4711)"}})}
    )
    assert found.message.endswith("is taken there by python3 (pid 4711)")
    assert found.mend == "leave port out of cluster.yaml; or end that"


def test_resources_held_by_this_cluster_are_not_a_problem() -> None:
    own = facts(
        changes={
            "clusters": [MINE],
            "listening": [22, 8642, *range(26000, 32700)],
            "rays": [RAYLET | {"user": "ml", "temp_dir": OURS}],
            "gpus.gpus.0.processes": [SOMEBODY | {"user": "ml", "ours": True}],
        }
    )
    spec = ClusterSpec(name="lab", port=8642, hosts=(HostSpec(host="dgx-1"),))
    assert problems(spec, {"dgx-1": own}) == ()


def test_a_stopped_cluster_holds_no_gpus() -> None:
    stopped = LAB2 | {"pid": None, "wanted": "stopped", "gpu_uuids": [GPU0]}
    assert one_host({"clusters": [stopped]}) == ()


def test_excluded_gpus_are_not_checked() -> None:
    assert one_host({"gpus": {"hardware": 8, "problem": "No NVML", "nvidia_smi": "/x"}}, gpus=0) == ()
    assert one_host({"gpus.gpus.0.processes": [SOMEBODY]}, gpus=[1, 2]) == ()


def test_a_number_of_gpus_means_those_that_no_other_cluster_has_and_stays_the_same() -> None:
    spec = ClusterSpec(name="lab", hosts=(HostSpec(host="dgx-1", gpus=2),))
    (host,) = spec.hosts
    seen = facts(changes={"clusters": [LAB2 | {"gpu_uuids": [GPU0]}]})
    uuids = [gpu.uuid for gpu in seen.gpus.gpus]
    assert with_chosen_gpus(spec, host, seen).gpus == (uuids[1], uuids[2])
    assert problems(spec, {"dgx-1": seen}) == ()
    has = facts(changes={"clusters": [MINE | {"gpu_uuids": [uuids[5], uuids[6]]}]})
    assert with_chosen_gpus(spec, host, has).gpus == (uuids[5], uuids[6])


def test_a_number_of_gpus_on_a_host_without_any_stays_a_number() -> None:
    spec = ClusterSpec(name="lab", hosts=(HostSpec(host="dgx-1", gpus=8),))
    assert with_chosen_gpus(spec, spec.hosts[0], facts(changes={"gpus": {"hardware": 0}})).gpus == 8


def test_a_cluster_of_the_same_name_and_account_in_another_folder_is_another_one() -> None:
    elsewhere = MINE | {"folder": "/scratch/home/clusters/lab"}
    (found,) = one_host({"clusters": [elsewhere]})
    assert (found.code, found.level) == ("gpus_of_another_cluster", "blocking")
