"""What may be wrong with one host: the facts that show it, the words, and the mend."""

from __future__ import annotations

import pytest
from support.facts import BLOCKING, GIB, SOMEBODY, WARNING, Case, check_alone, check_words, disk, facts, one_host

from raylaunch.cluster.doctor.checks_cluster import problems
from raylaunch.cluster.probe.facts import HostFacts
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.models.host_spec import HostSpec

CASES = (
    Case(
        "system_unsupported",
        BLOCKING,
        "it runs Alpine Linux v3.20 with musl libc (x86_64); raylaunch needs Linux with glibc 2.28 or newer",
        "use a host with Ubuntu, Debian, RHEL, or their like",
        {"system.name": "Alpine Linux v3.20", "system.libc": "musl libc (x86_64)"},
    ),
    Case(
        "system_unsupported",
        BLOCKING,
        "it runs Darwin 24.1.0; raylaunch needs Linux with glibc 2.28 or newer",
        "use a host with Ubuntu, Debian, RHEL, or their like",
        {"system": {"kind": "Darwin", "release": "24.1.0"}},
    ),
    Case(
        "architecture_unsupported",
        BLOCKING,
        "it is ppc64le; Ray is built for x86_64 and aarch64",
        "leave this host out of cluster.yaml",
        {"arch": "ppc64le"},
    ),
    Case(
        "container",
        WARNING,
        "it is a docker container: files outside of volumes are lost with it",
        "set root and store to folders on a volume",
        {"system.container": "docker"},
    ),
    Case(
        "reboot_due",
        WARNING,
        "it waits for a reboot for linux-base, nvidia-driver-550-server",
        "reboot it before jobs run; a driver that was updated may fail until then",
        {"system.reboot_due": True, "system.reboot_for": ["linux-base", "nvidia-driver-550-server"]},
    ),
    Case(
        "no_start_after_reboot",
        WARNING,
        "after a reboot nothing would start the cluster again: no lingering account, no sudo, no cron",
        "sudo loginctl enable-linger ml",
        {"services.linger": False, "services.crontab": False, "sudo": "no"},
    ),
    Case(
        "few_open_files",
        WARNING,
        "a process may have 4096 files open, but Ray needs 8192",
        "sudo tee /etc/security/limits.d/ray.conf <<< 'ml - nofile 65536', and log in again",
        {"nofile": [1024, 4096]},
    ),
    Case(
        "not_answered",
        WARNING,
        "these parts of the probe did not answer: disks, rays",
        "they are not checked; run raylaunch doctor again",
        {"unanswered": ["disks", "rays"]},
    ),
    Case(
        "python_missing",
        BLOCKING,
        "it has no Python from 3.10 to 3.14 (it has 3.8.10)",
        "install one: sudo apt install python3; or without root: uv python install 3.12",
        {"pythons": [{"path": "/usr/bin/python3", "version": "3.8.10", "has_venv": True}]},
    ),
    Case(
        "python_missing",
        BLOCKING,
        "it has no Python from 3.10 to 3.14",
        "install one: sudo apt install python3; or without root: uv python install 3.12",
        {"pythons": []},
    ),
    Case(
        "environment_missing",
        BLOCKING,
        "its environment conda:ray does not exist, or its Python does not run",
        "create it on the host, or remove environment",
        {"pythons": [{"path": "/opt/conda/envs/ray/bin/python", "named": True}]},
        {"environment": "conda:ray"},
    ),
    Case(
        "index_unreachable",
        WARNING,
        "it fetches no packages (pip: ERROR: No matching distribution found for pip)",
        "nothing to do: wheels are downloaded here and pushed; or set its index or proxy (pip config, https_proxy)",
        {"index": {"reachable": False, "tool": "pip", "words": "ERROR: No matching distribution found for pip"}},
    ),
    Case(
        "root_not_writable",
        BLOCKING,
        "/raid/ml, or its nearest existing parent, cannot be written by ml (of root, mode 755)",
        "set root for this host to your own folder, for example /raid/YOU/raylaunch",
        {"disks.root": disk(wanted="/raid/ml", exists=False, writable=False, owner="root", mode="755")},
    ),
    Case(
        "root_not_writable",
        BLOCKING,
        "/home/ml/.raylaunch is mounted read-only",
        "set root for this host to your own folder, for example /raid/YOU/raylaunch",
        {"disks.root": disk(options=["ro"], writable=False, owner="ml")},
    ),
    Case(
        "root_noexec",
        BLOCKING,
        "/home, which contains /home/ml/.raylaunch, is mounted noexec: no environment there could run",
        "set root for this host to a folder on another disk",
        {"disks.root": disk(mount="/home", options=["rw", "noexec"])},
    ),
    Case(
        "tmp_noexec",
        WARNING,
        "/scratch is mounted noexec: builds of packages fail there, and some programs of jobs",
        "set env: {TMPDIR: …} for this host to a folder on another disk",
        {"disks.tmp": disk(wanted="/scratch/tmp", mount="/scratch", options=["rw", "noexec"])},
    ),
    Case(
        "disk_low",
        BLOCKING,
        "only 1.5 GiB are free on / for raylaunch's folder, and 2.0 GiB are needed",
        "free some, or set root for this host to a folder on a larger disk",
        {"disks.root": disk(free=int(1.5 * GIB))},
    ),
    Case(
        "disk_low",
        WARNING,
        "5.0 GiB are free on / for raylaunch's folder; 10.0 GiB are recommended",
        "free some, or set root for this host to a folder on a larger disk",
        {"disks.root": disk(free=5 * GIB)},
    ),
    Case(
        "disk_low",
        BLOCKING,
        "only 20 MiB are free on /tmp for Ray's temporary files, and 0.5 GiB are needed",
        "free some: Ray keeps its sockets, logs and spilled objects there",
        {"disks.raytmp": disk(wanted="/tmp", mount="/tmp", free=20 * 1024**2)},  # noqa: S108 -- a fact
    ),
    Case(
        "inodes_low",
        WARNING,
        "/ can hold 1200 more files; one environment has tens of thousands",
        "remove folders with many small files, or use another disk",
        {"disks.root": disk(inodes_free=1200)},
    ),
    Case(
        "store_over_network",
        WARNING,
        "the store /mnt/lab is on nfs4 (filer:/export), where SQLite's locks are not safe",
        "set store to a folder on a local disk of the head",
        {"disks.store": disk(wanted="/mnt/lab", mount="/mnt", kind="nfs4", source="filer:/export")},
    ),
    Case(
        "shared_folder_down",
        WARNING,
        "/data (nfs from filer:/data) did not answer within 2 s",
        "check its server, or unmount it: jobs that use it hang",
        {"shared": [{"path": "/data", "kind": "nfs", "source": "filer:/data"}]},
    ),
    Case(
        "shm_small",
        WARNING,
        "its shared memory, /dev/shm, has 64 MiB: NCCL fails without enough, Ray's objects go to a disk",
        "sudo mount -o remount,size=50% /dev/shm; a container needs --shm-size or --ipc=host",
        {"disks.shm.total": 64 * 1024**2},
    ),
    Case(
        "memory_low",
        BLOCKING,
        "it has 1.0 GiB of memory, and Ray alone takes 2.0 GiB",
        "use a larger host",
        {"memory.total": GIB},
    ),
    Case(
        "memory_low",
        WARNING,
        (
            "it has 4.0 GiB of memory (a limit of this account; the machine has more); "
            "Ray itself takes about 2.0 GiB of it"
        ),
        "keep jobs on this host small",
        {"memory.limit": 4 * GIB},
    ),
    Case(
        "clock_off",
        BLOCKING,
        "its clock is 1 h 0 m ahead of this machine's",
        (
            "sudo timedatectl set-ntp true; or set it: sudo date -s @$(date +%s), with this machine's time "
            "(if this machine's clock is right)"
        ),
        {"clock.offset_s": 3600.4},
    ),
    Case(
        "clock_off",
        WARNING,
        "its clock is 1 m 30 s behind this machine's",
        (
            "sudo timedatectl set-ntp true; or set it: sudo date -s @$(date +%s), with this machine's time "
            "(if this machine's clock is right)"
        ),
        {"clock.offset_s": -90.0},
    ),
    Case(
        "clock_not_synced",
        WARNING,
        "no time server keeps its clock, which will drift",
        "sudo timedatectl set-ntp true",
        {"clock.synced": False},
    ),
    Case(
        "hostname_unresolved",
        WARNING,
        "it cannot resolve its own name dgx-1: each start of Ray takes half a minute longer",
        "echo '127.0.1.1 dgx-1' | sudo tee -a /etc/hosts",
        {"resolves_to": []},
    ),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.code}-{case.level}")
def test_a_problem_has_its_message_and_its_fix(case: Case) -> None:
    check_words(case)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.code}-{case.level}")
def test_one_fault_is_reported_as_one_problem(case: Case) -> None:
    check_alone(case)


def test_a_healthy_dgx_has_no_problems() -> None:
    assert one_host() == ()


def test_a_healthy_spark_has_no_problems() -> None:
    spec = ClusterSpec(name="lab", hosts=(HostSpec(host="spark-1"),))
    assert problems(spec, {"spark-1": facts("spark")}) == ()


def test_a_python_without_venv_and_pip_is_enough() -> None:
    assert one_host({"pythons": [{"path": "/usr/bin/python3", "version": "3.12.3"}], "uv": ""}) == ()


def test_unknown_facts_are_not_a_problem() -> None:
    blank = HostFacts.model_validate({"system": {"kind": "Linux"}, "pythons": [{"path": "p", "version": "3.12.1"}]})
    spec = ClusterSpec(name="lab", hosts=(HostSpec(host="a"),))
    assert problems(spec, {"a": blank}) == ()


def test_an_embedded_cluster_is_checked_only_for_what_it_needs() -> None:
    here = facts(changes={"pythons": [], "system.kind": "Darwin", "index": {"reachable": False, "tool": "pip"}})
    assert problems(ClusterSpec(), {"here": here}) == ()
    busy = facts(changes={"gpus.gpus.0.processes": [SOMEBODY]})
    assert [one.code for one in problems(ClusterSpec(), {"here": busy})] == ["gpus_busy"]


def test_a_full_disk_does_not_block_the_repair_of_a_running_cluster() -> None:
    cluster = {"name": "lab", "user": "ml", "folder": "/home/ml/.raylaunch/clusters/lab"}
    (found,) = one_host({"disks.root": disk(free=GIB), "clusters": [cluster]})
    assert (found.code, found.level) == ("disk_low", "warning")
