"""Problems of one host: its system, Python, disks, memory, clock and name. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from raylaunch.cluster.doctor.problem import Problem, blocking, warning
from raylaunch.cluster.probe.choices import is_own, usable_pythons
from raylaunch.cluster.probe.facts import Disk, HostFacts
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.models.host_spec import HostSpec

GIB = 1024**3

ARCHITECTURES = ("x86_64", "aarch64")
OLDEST_GLIBC = (2, 28)
"""What Ray's wheels are built for (manylinux2014)."""
ROOT_NEEDS, ROOT_WANTS = 2 * GIB, 10 * GIB
"""An environment with Ray and wandb takes 0.9 GB, its wheels temporarily as much; packages of jobs are added."""
TMP_NEEDS, TMP_WANTS = GIB // 2, 5 * GIB
"""Ray's sockets, logs, and objects that do not fit into /dev/shm."""
STORE_WANTS = 10 * GIB
FEW_INODES = 100_000
"""One environment with PyTorch has 30 000 files."""
MEMORY_NEEDS, MEMORY_WANTS = 2 * GIB, 8 * GIB
SHM_WANTS = GIB
"""NCCL takes some tens of MB for each GPU, Ray's objects the rest; containers give 64 MB by default."""
CLOCK_WARNS_S, CLOCK_BLOCKS_S = 60.0, 300.0
"""Logs and leases of different machines are compared; TLS certificates fail at hours."""
OPEN_FILES = 8192
_SHOWN = 160


def size(number: int) -> str:
    """Format bytes for people."""
    return f"{number / GIB:.1f} GiB" if number >= GIB // 10 else f"{number / 1024**2:.0f} MiB"


def problems_of_host(spec: ClusterSpec, host: HostSpec, facts: HostFacts) -> Iterator[Problem]:
    """Yield problems of the machine itself."""
    yield from _system(host, facts)
    yield from _python(host, facts)
    yield from _root(host, facts)
    yield from _space(spec, host, facts)
    yield from _memory(host, facts)
    yield from _clock(host, facts)
    yield from _name(host, facts)
    yield from _after_reboot(host, facts)
    if facts.nofile and facts.nofile[1] < OPEN_FILES:
        message = f"a process may have {facts.nofile[1]} files open, but Ray needs {OPEN_FILES}"
        fix = f"sudo tee /etc/security/limits.d/ray.conf <<< '{facts.user} - nofile 65536', and log in again"
        yield warning(host.name, "few_open_files", message, fix)
    if facts.unanswered:
        message = f"these parts of the probe did not answer: {', '.join(facts.unanswered)}"
        yield warning(host.name, "not_answered", message, "they are not checked; run raylaunch doctor again")


def _system(host: HostSpec, facts: HostFacts) -> Iterator[Problem]:
    system = facts.system
    old = facts.glibc is not None and facts.glibc < OLDEST_GLIBC
    if system.kind != "Linux" or old or (system.libc and facts.glibc is None):
        what = system.name or f"{system.kind} {system.release}".strip() or "something unknown"
        libc = f" with {system.libc}" if system.libc else ""
        message = f"it runs {what}{libc}; raylaunch needs Linux with glibc 2.28 or newer"
        yield blocking(host.name, "system_unsupported", message, "use a host with Ubuntu, Debian, RHEL, or their like")
    if facts.arch and facts.arch not in ARCHITECTURES:
        message = f"it is {facts.arch}; Ray is built for {' and '.join(ARCHITECTURES)}"
        yield blocking(host.name, "architecture_unsupported", message, "leave this host out of cluster.yaml")
    if system.container:
        message = f"it is a {system.container} container: files outside of volumes are lost with it"
        yield warning(host.name, "container", message, "set root and store to folders on a volume")
    if system.reboot_due:
        packages = f" for {', '.join(system.reboot_for[:3])}" if system.reboot_for else ""
        fix = "reboot it before jobs run; a driver that was updated may fail until then"
        yield warning(host.name, "reboot_due", f"it waits for a reboot{packages}", fix)


def _python(host: HostSpec, facts: HostFacts) -> Iterator[Problem]:
    if host.environment:
        named = next((one for one in facts.pythons if one.named), None)
        if named is None or not named.version:
            message = f"its environment {host.environment} does not exist, or its Python does not run"
            yield blocking(host.name, "environment_missing", message, "create it on the host, or remove environment")
        return
    if not usable_pythons(facts):  # neither venv nor pip is needed: environments are made with a pushed uv
        others = ", ".join(sorted({one.version for one in facts.pythons if one.version}))
        message = f"it has no Python from 3.10 to 3.14{f' (it has {others})' if others else ''}"
        fix = "install one: sudo apt install python3; or without root: uv python install 3.12"
        yield blocking(host.name, "python_missing", message, fix)
    if facts.index.reachable is False:
        message = f"it fetches no packages ({facts.index.tool}: {_short(facts.index.words)})"
        fix = (
            "nothing to do: wheels are downloaded here and pushed; or set its index or proxy (pip config, https_proxy)"
        )
        yield warning(host.name, "index_unreachable", message, fix)


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _root(host: HostSpec, facts: HostFacts) -> Iterator[Problem]:
    root = facts.disks.get("root")
    if root is None:
        return
    if root.writable is False or "ro" in root.options:
        how = "is mounted read-only" if "ro" in root.options else f"cannot be written by {facts.user or 'this account'}"
        owner = f" (of {root.owner}, mode {root.mode})" if root.owner and "ro" not in root.options else ""
        where = root.wanted if root.exists else f"{root.wanted}, or its nearest existing parent,"
        fix = "set root for this host to your own folder, for example /raid/YOU/raylaunch"
        yield blocking(host.name, "root_not_writable", f"{where} {how}{owner}", fix)
    if root.noexec:
        fix = "set root for this host to a folder on another disk"
        message = f"{root.mount}, which contains {root.wanted}, is mounted noexec: no environment there could run"
        yield blocking(host.name, "root_noexec", message, fix)
    tmp = facts.disks.get("tmp")
    if tmp is not None and tmp.noexec:
        message = f"{tmp.mount} is mounted noexec: builds of packages fail there, and some programs of jobs"
        yield warning(
            host.name, "tmp_noexec", message, "set env: {TMPDIR: …} for this host to a folder on another disk"
        )


def _space(spec: ClusterSpec, host: HostSpec, facts: HostFacts) -> Iterator[Problem]:
    root, tmp, store = (facts.disks.get(label) for label in ("root", "raytmp", "store"))
    is_head = spec.kind == "local" or host.name == spec.hosts[0].name
    if root is not None:
        fix = "free some, or set root for this host to a folder on a larger disk"
        installed = any(is_own(cluster, spec, facts) for cluster in facts.clusters)
        yield from _disk(host, root, 0 if installed else ROOT_NEEDS, ROOT_WANTS, "raylaunch's folder", fix)
    if tmp is not None and (root is None or tmp.mount != root.mount):
        fix = "free some: Ray keeps its sockets, logs and spilled objects there"
        yield from _disk(host, tmp, TMP_NEEDS, TMP_WANTS, "Ray's temporary files", fix)
    if not is_head or store is None:
        return
    if root is None or store.mount != root.mount:
        fix = "free some, or set store to a folder on a larger disk"
        yield from _disk(host, store, 0, STORE_WANTS, "the store", fix)
    if store.over_network:
        message = f"the store {store.wanted} is on {store.kind} ({store.source}), where SQLite's locks are not safe"
        yield warning(host.name, "store_over_network", message, "set store to a folder on a local disk of the head")
    for folder in facts.shared:
        if not folder.mode:
            message = f"{folder.path} ({folder.kind} from {folder.source}) did not answer within 2 s"
            fix = "check its server, or unmount it: jobs that use it hang"
            yield warning(host.name, "shared_folder_down", message, fix)


def _disk(host: HostSpec, disk: Disk, needs: int, wants: int, what: str, fix: str) -> Iterator[Problem]:  # noqa: PLR0913, PLR0917 -- private, and the same order at each use
    if disk.free is not None and disk.free < wants:
        message = f"{size(disk.free)} are free on {disk.mount or disk.wanted} for {what}"
        if disk.free < needs:
            yield blocking(host.name, "disk_low", f"only {message}, and {size(needs)} are needed", fix)
        else:
            yield warning(host.name, "disk_low", f"{message}; {size(wants)} are recommended", fix)
    if disk.inodes_free is not None and disk.inodes_free < FEW_INODES:
        message = (
            f"{disk.mount or disk.wanted} can hold {disk.inodes_free} more files; one environment has tens of thousands"
        )
        yield warning(host.name, "inodes_low", message, "remove folders with many small files, or use another disk")


def _memory(host: HostSpec, facts: HostFacts) -> Iterator[Problem]:
    memory, shm = facts.memory.usable, facts.disks.get("shm")
    if memory is not None and memory < MEMORY_WANTS:
        limited = " (a limit of this account; the machine has more)" if memory == facts.memory.limit else ""
        if memory < MEMORY_NEEDS:
            message = f"it has {size(memory)} of memory{limited}, and Ray alone takes {size(MEMORY_NEEDS)}"
            yield blocking(host.name, "memory_low", message, "use a larger host")
        else:
            message = f"it has {size(memory)} of memory{limited}; Ray itself takes about {size(MEMORY_NEEDS)} of it"
            yield warning(host.name, "memory_low", message, "keep jobs on this host small")
    if shm is not None and shm.total is not None and shm.total < SHM_WANTS:
        message = (
            f"its shared memory, /dev/shm, has {size(shm.total)}: NCCL fails without enough, Ray's objects go to a disk"
        )
        fix = "sudo mount -o remount,size=50% /dev/shm; a container needs --shm-size or --ipc=host"
        yield warning(host.name, "shm_small", message, fix)


def _clock(host: HostSpec, facts: HostFacts) -> Iterator[Problem]:
    clock = facts.clock
    fix = "sudo timedatectl set-ntp true; or set it: sudo date -s @$(date +%s), with this machine's time"
    if clock.offset_s is not None and abs(clock.offset_s) - clock.uncertain_s > CLOCK_WARNS_S:
        direction = "ahead of" if clock.offset_s > 0 else "behind"
        message = f"its clock is {_span(abs(clock.offset_s))} {direction} this machine's"
        make = blocking if abs(clock.offset_s) - clock.uncertain_s > CLOCK_BLOCKS_S else warning
        yield make(host.name, "clock_off", message, f"{fix} (if this machine's clock is right)")
    elif clock.synced is False:
        message = "no time server keeps its clock, which will drift"
        yield warning(host.name, "clock_not_synced", message, "sudo timedatectl set-ntp true")


def _span(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours} h {minutes} m" if hours else f"{minutes} m {whole % 60} s" if minutes else f"{whole} s"


def _name(host: HostSpec, facts: HostFacts) -> Iterator[Problem]:
    if facts.resolves_to == () and facts.hostname:
        message = f"it cannot resolve its own name {facts.hostname}: each start of Ray takes half a minute longer"
        fix = f"echo '127.0.1.1 {facts.hostname}' | sudo tee -a /etc/hosts"
        yield warning(host.name, "hostname_unresolved", message, fix)


def _after_reboot(host: HostSpec, facts: HostFacts) -> Iterator[Problem]:
    """Check what can start the cluster after a reboot; unknown facts are no problem, `up` tries each way."""
    services = facts.services
    by_user = services.linger is True and services.user_manager not in {"", "offline"}
    by_root = services.init == "systemd" and facts.sudo in {"root", "yes"}
    by_cron = services.crontab is True and bool(services.cron)
    if by_user or by_root or by_cron or not services.init:
        return
    if services.init == "systemd":
        fix = f"sudo loginctl enable-linger {facts.user}"
    else:
        fix = "install and start cron; or run raylaunch up after a reboot"
    message = "after a reboot nothing would start the cluster again: no lingering account, no sudo, no cron"
    yield warning(host.name, "no_start_after_reboot", message, fix)
