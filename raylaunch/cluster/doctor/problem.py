"""What the doctor can find: one problem of one host, its severity, and its fix."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Level = Literal["blocking", "warning"]


class Problem(BaseModel):
    """One thing that is wrong with one host."""

    model_config = ConfigDict(frozen=True)

    host: str
    """Its name in cluster.yaml; empty for the cluster as a whole."""
    code: str
    """Its code, from `CODES`."""
    level: Level
    """``blocking``: `up` does not start on this host. ``warning``: it does, with a limitation."""
    message: str
    mend: str = ""


CODES: dict[str, str] = {
    # No facts at all.
    "unreachable": "ssh cannot reach the host: its name, address, port, or the network",
    "host_key": "the host's key is unknown, or has changed",
    "login_refused": "the host accepts none of the offered keys",
    "connection_lost": "the connection was lost during the check",
    "probe_failed": "the host cannot be checked: its shell does not run the probe, or takes too long",
    # The system.
    "system_unsupported": "the host does not run Linux with glibc 2.28 or newer, which Ray and its packages need",
    "architecture_unsupported": "Ray is built for x86-64 and aarch64 only",
    "container": "the host is a container: files outside of volumes are lost with it",
    "reboot_due": "the host waits for a reboot",
    "no_start_after_reboot": "nothing on the host could start the cluster again after a reboot",
    "few_open_files": "the limit of open files is too low for Ray",
    "not_answered": "a part of the probe did not end in time, or failed",
    # Python and packages.
    "python_missing": "no Python from 3.10 to 3.14 was found",
    "environment_missing": "the environment that cluster.yaml names does not exist",
    "index_unreachable": "packages cannot be fetched on the host itself",
    # Disks, memory, clock, name.
    "root_not_writable": "raylaunch's folder cannot be made or written",
    "root_noexec": "programs cannot be started from the disk of raylaunch's folder",
    "tmp_noexec": "programs cannot be started from /tmp",
    "disk_low": "a disk is nearly full",
    "inodes_low": "a file system can hold hardly any more files",
    "store_over_network": "the store would lie on a network file system, where SQLite is not safe",
    "shared_folder_down": "a network folder does not respond",
    "shm_small": "shared memory, /dev/shm, is too small for Ray's objects and NCCL",
    "memory_low": "there is little memory",
    "clock_off": "the host's clock is off",
    "clock_not_synced": "no time server keeps the host's clock",
    "hostname_unresolved": "the host cannot resolve its own name",
    # GPUs.
    "driver_missing": "the host has NVIDIA GPUs but no nvidia-smi",
    "driver_broken": "nvidia-smi fails",
    "gpus_missing": "a GPU that cluster.yaml lists does not exist, or there are fewer than it requests",
    "gpus_logical": "the host has no GPU; the number in cluster.yaml makes logical ones",
    "gpus_busy": "a process outside raylaunch uses a GPU",
    "gpus_of_another_cluster": "another raylaunch cluster uses the GPUs",
    "mig_enabled": "a GPU is divided into MIG slices",
    "gpu_not_for_compute": "a GPU's compute mode allows no program",
    "gpu_errors": "a GPU has uncorrected memory errors",
    "gpu_xid": "the driver has reported errors (Xid)",
    # Other programs.
    "port_taken": "the controller's port is taken",
    "no_free_ports": "there is no block of free ports for Ray",
    "other_ray": "another Ray runs there",
    "other_cluster": "another account runs a cluster there",
    "certificate_expiring": "a certificate of Ray's TLS expires soon, or has expired",
    "same_name_cluster": "another account runs a cluster of the same name there",
    # Between hosts.
    "same_machine": "two names are the same machine",
    "root_shared": "two hosts have the same folder for raylaunch, over the network",
    "python_differs": "the hosts have no minor version of Python in common",
    "architectures_differ": "the hosts are of different architectures",
    "network_unclear": "the host's address on the cluster's network is ambiguous",
    "networks_differ": "the hosts' addresses are in no common network",
    "slow_network": "the hosts have a faster network in common than the one that is used",
    "infiniband_down": "the host has InfiniBand, and none of its ports is up",
}
"""The meaning of each code; docs/troubleshooting.md has the same list."""


def blocking(host: str, code: str, message: str, fix: str = "") -> Problem:
    """Return a problem that keeps `up` from starting there."""
    return Problem(host=host, code=code, level="blocking", message=message, mend=fix)


def warning(host: str, code: str, message: str, fix: str = "") -> Problem:
    """Return a problem that does not stop `up`."""
    return Problem(host=host, code=code, level="warning", message=message, mend=fix)
