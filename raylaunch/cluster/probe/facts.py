"""What the probe found of one host. None, or an empty text, is what is not known. Sizes are bytes, times seconds."""

from __future__ import annotations

import ipaddress
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from raylaunch.models.fields import whole


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True)


class System(_Facts):
    """The operating system."""

    kind: str = ""
    """``Linux``, ``Darwin``, …"""
    release: str = ""
    """The kernel's."""
    id: str = ""
    """As in /etc/os-release: ``ubuntu``."""
    version: str = ""
    name: str = ""
    """For people: ``Ubuntu 22.04.4 LTS``."""
    dgx: str = ""
    """DGX OS's version, where it is one."""
    libc: str = ""
    """``glibc 2.35``, or what else it says of itself."""
    boot_id: str = ""
    machine_id: str = ""
    container: str = ""
    """The engine whose container the host is."""
    selinux: str = ""
    reboot_due: bool | None = None
    reboot_for: tuple[str, ...] = ()
    """The packages that want it."""


class Python(_Facts):
    """One Python of the host."""

    path: str
    real_path: str = ""
    version: str = ""
    """``3.12.3``; empty where it does not run."""
    final: bool = True
    """No alpha, beta or release candidate."""
    cpython: bool = True
    free_threaded: bool = False
    in_environment: bool = False
    """It belongs to a virtual environment."""
    has_venv: bool = False
    has_ensurepip: bool = False
    has_pip: bool = False
    conda: bool = False
    platform: str = ""
    """``linux-aarch64``: a Python may be of another architecture than its machine."""
    named: bool = False
    """The one that cluster.yaml names as the host's environment."""

    @property
    def minor(self) -> tuple[int, int]:
        """``(3, 12)``; ``(0, 0)`` where it does not run."""
        return _two(self.version) or (0, 0)


class GpuProcess(_Facts):
    """A process that computes on a GPU."""

    pid: int
    user: str = ""
    command: str = ""
    memory: int | None = None
    ours: bool = False
    """It belongs to a raylaunch cluster of this account."""

    def __str__(self) -> str:
        return f"{self.command or 'a process'} (pid {self.pid}{f', user {self.user}' if self.user else ''})"


class HostGpu(_Facts):
    """One GPU as ``nvidia-smi`` shows it."""

    index: str
    uuid: str
    name: str
    memory_total: int | None = None
    """None where it says ``[N/A]``: the GPU shares the machine's memory."""
    memory_used: int | None = None
    utilization: float | None = None
    """Percent."""
    bus_id: str = ""
    compute_capability: str = ""
    compute_mode: str = ""
    mig: bool | None = None
    ecc_errors: int | None = None
    """Uncorrected ones since the driver was loaded."""
    processes: tuple[GpuProcess, ...] = ()

    def __str__(self) -> str:
        return f"{self.index} ({self.name})"


class Gpus(_Facts):
    """The host's GPUs and their driver."""

    hardware: int | None = None
    """NVIDIA GPUs on the PCI bus, whatever the driver says."""
    nvidia_smi: str = ""
    """Its path; empty where there is none."""
    problem: str = ""
    """What ``nvidia-smi`` said when it failed."""
    driver: str = ""
    cuda: str = ""
    """The newest CUDA that the driver can run."""
    gpus: tuple[HostGpu, ...] = ()
    mig_devices: int = 0
    xids: tuple[str, ...] | None = None
    """The driver's error reports in the kernel's log; None where that may not be read."""


class Memory(_Facts):
    """Memory and cores."""

    total: int | None = None
    available: int | None = None
    swap: int | None = None
    limit: int | None = None
    """What the control group of this login allows; None for no limit."""
    unified: bool = False
    """CPU and GPU share it (GB10, GH200 and their like)."""
    cpus: int | None = None
    """Cores that this login may use."""
    cpu_limit: float | None = None
    """Cores' worth of time that the control group allows."""

    @property
    def usable(self) -> int | None:
        """Bytes that processes of this login can have."""
        if self.total is None:
            return self.limit
        return self.total if self.limit is None else min(self.total, self.limit)


class Disk(_Facts):
    """The file system that holds a folder."""

    wanted: str
    """The folder asked about, whether it is there or not."""
    exists: bool = True
    mount: str = ""
    source: str = ""
    kind: str = ""
    """``ext4``, ``nfs4``, ``tmpfs``, …"""
    options: tuple[str, ...] = ()
    total: int | None = None
    free: int | None = None
    inodes_free: int | None = None
    """None too where the file system does not count them."""
    writable: bool | None = None
    owner: str = ""
    mode: str = ""

    @property
    def noexec(self) -> bool:
        """Whether programs there cannot be started."""
        return "noexec" in self.options

    @property
    def over_network(self) -> bool:
        """Whether other machines may have the same files."""
        return is_network_fs(self.kind)


_NETWORK_FS = frozenset(
    [
        *("nfs", "nfs4", "lustre", "gpfs", "cifs", "smb3", "ceph", "glusterfs", "wekafs", "panfs", "orangefs", "afs"),
        *("9p", "virtiofs", "fuse.sshfs", "fuse.glusterfs", "fuse.juicefs", "fuse.ceph", "fuse.ceph-fuse"),
    ]
)


def is_network_fs(kind: str) -> bool:
    """Return whether a kind of file system is one that machines share."""
    return kind in _NETWORK_FS or kind.startswith("beegfs")


class SharedFolder(_Facts):
    """A folder that comes over the network. `owner` and `mode` are empty where its server did not answer."""

    path: str
    kind: str
    source: str
    owner: str = ""
    group: str = ""
    mode: str = ""
    writable: bool | None = None


class Clock(_Facts):
    """The host's clock against this machine's."""

    offset_s: float | None = None
    """Positive where the host's is ahead."""
    uncertain_s: float = 0.0
    """The true offset lies so far from it at most: half of what the journey took."""
    synced: bool | None = None
    """Whether a time server keeps it."""


class RayProcess(_Facts):
    """A Ray that runs there: a raylet, or the GCS of a head."""

    pid: int
    kind: Literal["raylet", "gcs_server"]
    user: str = ""
    ports: tuple[int, ...] = ()
    worker_ports: tuple[int, int] | None = None
    temp_dir: str = ""
    cluster_id: str = ""
    """raylaunch's, where the environment of the process may be read and says so."""


class FoundCluster(_Facts):
    """A cluster of raylaunch of which the host is a part: its controller runs there, or its record lies there."""

    name: str
    user: str
    folder: str
    pid: int | None = None
    """The controller's; None where only the record was found."""
    since: float | None = None
    """When the controller was started; seconds since the epoch, by the host's clock."""
    cluster_id: str = ""
    wanted: str = ""
    gpu_uuids: tuple[str, ...] | None = None
    """None where the record may not be read."""
    tls_days: int | None = None
    """In how many days its certificate on this host expires; None where its Ray uses no TLS."""

    def __str__(self) -> str:
        runs = f"controller pid {self.pid}, " if self.pid else ""
        return f"cluster {self.name} of user {self.user} ({runs}{self.folder})"


class Index(_Facts):
    """Whether packages can be fetched from an index; asked as `tool` would, with its settings."""

    reachable: bool | None = None
    """None where there is no tool to ask."""
    tool: str = ""
    url: str = ""
    """The index, without credentials; empty where only `tool` knows."""
    words: str = ""
    """What it said when it could not."""


class Interface(_Facts):
    """One network interface."""

    name: str
    kind: str = ""
    """``physical``, ``virtual``, ``bridge``, ``bond``, ``wireless``."""
    addresses: tuple[str, ...] = ()
    """With their prefix: ``10.0.0.1/24``."""
    up: bool | None = None
    mtu: int | None = None
    bits_per_s: int | None = None
    default_route: bool = False
    infiniband: bool = False

    @property
    def networks(self) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
        """The networks that its addresses lie in; without loopback and link-local ones."""
        found = [ipaddress.ip_interface(text) for text in self.addresses]
        return tuple(one.network for one in found if not (one.ip.is_loopback or one.ip.is_link_local))


class InfinibandPort(_Facts):
    """One port of an RDMA device."""

    device: str
    port: str
    active: bool = False
    rate: str = ""
    """``400 Gb/sec (4X NDR)``."""
    link: str = ""
    """``InfiniBand`` or ``Ethernet`` (RoCE)."""
    interfaces: tuple[str, ...] = ()


class BootServices(_Facts):
    """What could start raylaunch again after a reboot."""

    init: str = ""
    """Name of process 1."""
    user_manager: str = ""
    """``running``, ``degraded``, ``offline``, …: what systemd says of this account's manager."""
    linger: bool | None = None
    """Whether the account's services run without a login."""
    crontab: bool | None = None
    """Whether this account may have a crontab; None without the program."""
    cron: str = ""
    """The cron that runs."""


class HostFacts(_Facts):
    """One host, as its probe saw it."""

    arch: str = ""
    """As ``uname -m`` says: ``x86_64``, ``aarch64``."""
    system: System = System()
    hostname: str = ""
    resolves_to: tuple[str, ...] | None = None
    """What the host's own name means on the host; empty: nothing."""
    user: str = ""
    uid: int | None = None
    groups: tuple[str, ...] = ()
    home: str = ""
    shell: str = ""
    sudo: Literal["root", "yes", "password", "no"] | None = None
    """Whether it becomes root: is it, without a password, with one, or not. None where asking would be reported."""
    root: str = ""
    """raylaunch's folder, absolute."""
    reached_at: str = ""
    """The host's own address to which this login came; empty where it did not come over SSH."""
    pythons: tuple[Python, ...] = ()
    uv: str = ""
    uv_version: str = ""
    tools: dict[str, str] = Field(default_factory=dict)
    """Programs that were looked for and found, with their paths."""
    docker_usable: bool | None = None
    gpus: Gpus = Gpus()
    memory: Memory = Memory()
    disks: dict[str, Disk] = Field(default_factory=dict)
    """``home``, ``root``, ``store``, ``tmp``, ``raytmp`` (Ray's sockets and logs), ``shm``."""
    shared: tuple[SharedFolder, ...] = ()
    clock: Clock = Clock()
    listening: tuple[int, ...] | None = None
    """TCP ports that somebody listens on, on any address."""
    holders: dict[int, str] = Field(default_factory=dict)
    """By port who listens there, as ``python3 (pid 4711)``, where this account may see it."""
    ephemeral_ports: tuple[int, int] | None = None
    rays: tuple[RayProcess, ...] | None = None
    clusters: tuple[FoundCluster, ...] = ()
    index: Index = Index()
    proxies: dict[str, str] = Field(default_factory=dict)
    """By variable's name; without credentials."""
    interfaces: tuple[Interface, ...] | None = None
    infiniband: tuple[InfinibandPort, ...] = ()
    services: BootServices = BootServices()
    nofile: tuple[int, int] | None = None
    """Open files: the limit, and how far it may be raised."""
    unanswered: tuple[str, ...] = ()
    """Sections of the probe that failed or did not end in time."""
    took_s: float = 0.0

    @property
    def glibc(self) -> tuple[int, int] | None:
        """``(2, 35)``; None for another C library, or where it is not known."""
        word, _, version = self.system.libc.partition(" ")
        return _two(version) if word == "glibc" else None


def _two(version: str) -> tuple[int, int] | None:
    """Return the first two numbers of a version."""
    major, minor, *_ = (whole(part) for part in (*version.split("."), ""))
    return None if major is None or minor is None else (major, minor)
