"""Hosts for tests, made of namespaces: own address, name, files and processes, and a real sshd. Needs root.

A host sees this machine's system (`/usr`, `/etc`) and writes into its own layer; of homes, this repository, virtual
environments and whatever else is not the system's, it sees nothing. It has no route out: an air-gapped DGX. The test
itself stays outside, on the bridge's other side, and reaches the hosts through `World.config` as a laptop would.

::

    with world(2) as lab:
        head, worker = lab.hosts
        async with machine(head.target()) as there: ...
        worker.power_off()
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from support.host import Host, Network, run_ip
from support.sshd import make_key, sshd_program

__all__ = ["Host", "Network", "World", "world"]

LOCK = Path("/run/lock/raylaunch-test-hosts")
PREFIX = "rlw-"

_FIRST = 11


class World:
    """Some hosts, and the laptop that reaches them: `home` is its home folder, with ``.ssh`` in it."""

    def __init__(self, folder: Path, slot: int) -> None:
        self.folder = folder
        self.slot = slot
        self.hosts: list[Host] = []
        self.links = f"rl{folder.name.removeprefix(PREFIX).replace('-', 'x')}"
        self.front = Network(f"{self.links}f", f"10.77.{slot}", f"fd77:{slot:x}")
        self.back = Network(f"{self.links}b", f"10.78.{slot}", f"fd78:{slot:x}")
        self.home = folder / "laptop"
        (self.home / ".ssh").mkdir(parents=True, mode=0o700)
        self.config = self.home / ".ssh/config"
        self.known_hosts = self.home / ".ssh/known_hosts"
        self.key = make_key(self.home / ".ssh/id_ed25519")

    def host(  # noqa: PLR0913 -- what hosts may differ in
        self,
        name: str = "",
        *,
        networks: Sequence[str] = ("front",),
        jump: str = "",
        disk_mib: int | None = None,
        shm_mib: int = 2048,
        share: Mapping[Path, Path] | None = None,
        boot: bool = True,
        kind: type[Host] = Host,
    ) -> Host:
        """Add a host and switch it on.

        Args:
            name: its name; by default ``h1``, ``h2``, …
            networks: ``front``, ``back`` or both, the first being its eth0. This machine is on ``front`` only.
            jump: name of the host by way of which the laptop's configuration reaches it.
            disk_mib: size of the disk that ``/root`` and ``/home`` lie on; None for no limit of its own.
            shm_mib: size of ``/dev/shm``.
            share: folders of this machine, and where the host sees them, read-only.
            boot: whether it is switched on at once.
            kind: what it is, where it is not a plain one.
        """
        number = _FIRST + len(self.hosts)
        known = {"front": self.front, "back": self.back}
        made = kind(
            self,
            name or f"h{len(self.hosts) + 1}",
            number=number,
            networks={one: known[one] for one in networks},
            disk_mib=disk_mib,
            shm_mib=shm_mib,
            share=share or {},
        )
        self.hosts.append(made)
        self._write_names(made, jump)
        if boot:
            made.boot()
        return made

    def close(self) -> None:
        """Switch everything off and remove it."""
        for host in self.hosts:
            host.unplug()
        for host in self.hosts:
            host.power_off()
        for network in (self.front, self.back):
            run_ip("link", "del", network.bridge, check=False)
        _remove(self.folder)

    def _write_names(self, new: Host, jump: str) -> None:
        lines = [f"{host.address} {host.name}\n" for host in self.hosts]
        for host in self.hosts:
            text = f"127.0.0.1 localhost\n::1 localhost\n{''.join(lines)}"
            (host.path("/etc/hosts") if host.is_on else host.folder / "upper/etc/hosts").write_text(text)
        entry = [f"Host {new.name}", f"  HostName {new.address}", "  User root", f"  IdentityFile {self.key}"]
        entry += [f"  ProxyJump {jump}"] if jump else []
        entry += [f"  UserKnownHostsFile {self.known_hosts}"]
        with self.config.open("a") as config:
            config.write("\n".join(entry) + "\n")
        public = Path(f"{new.host_key}.pub").read_text().rsplit(" ", 2)[0]
        with self.known_hosts.open("a") as known:
            known.write(f"{new.address},{new.address6},{new.name} {public}\n")


@contextmanager
def world(hosts: int = 0) -> Iterator[World]:
    """Make a world with so many hosts on ``front``, named ``h1``, ``h2``, …; everything is gone at the end.

    Skips the test where hosts cannot be made. What a killed test run has left behind is removed first.
    """
    _can_make_hosts()
    made = _make_world()
    try:
        for _ in range(hosts):
            made.host(boot=False)
        for host in made.hosts:
            host.boot()
        yield made
    finally:
        made.close()


def _can_make_hosts() -> None:
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("needs root on Linux to make hosts out of namespaces")
    for program, package in (
        ("ip", "iproute2"),
        ("bridge", "iproute2"),
        ("unshare", "util-linux"),
        ("nsenter", "util-linux"),
    ):
        if shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
            pytest.skip(f"needs {program} (Debian: apt-get install {package})")
    sshd_program()
    tried = subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"needs to make namespaces: {tried.stderr.strip()}")


def _make_world() -> World:
    LOCK.parent.mkdir(parents=True, exist_ok=True)
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _sweep()
        links = subprocess.run(["ip", "-o", "addr"], capture_output=True, text=True, check=True).stdout
        slot = next(one for one in range(256) if f" 10.77.{one}.1/" not in links)
        count = next(one for one in range(1000) if not (Path("/tmp") / f"{PREFIX}{os.getpid()}-{one}").exists())  # noqa: S108 -- short, because Unix socket paths are
        folder = Path("/tmp") / f"{PREFIX}{os.getpid()}-{count}"  # noqa: S108 -- as above
        folder.mkdir(mode=0o711)
        (folder / "owner").write_text(f"{os.getpid()} {psutil.Process().create_time()}")
        made = World(folder, slot)
        for network, mine in ((made.front, True), (made.back, False)):
            run_ip("link", "add", network.bridge, "type", "bridge")
            if mine:
                run_ip("addr", "add", f"{network.four}.1/24", "dev", network.bridge)
                run_ip("addr", "add", f"{network.six}::1/64", "dev", network.bridge, "nodad", check=False)
            run_ip("link", "set", network.bridge, "up")
        # Nobody answers for the back network here. Without this, its packets would leave by the default route.
        run_ip("route", "add", f"{made.back.four}.0/24", "dev", made.front.bridge)
    return made


def _sweep() -> None:
    """Remove what test runs have left that were killed."""
    alive = set()
    for folder in Path("/tmp").glob(f"{PREFIX}*"):  # noqa: S108 -- as above
        with contextlib.suppress(OSError, ValueError, psutil.NoSuchProcess):
            pid, started = (folder / "owner").read_text().split()
            if abs(psutil.Process(int(pid)).create_time() - float(started)) < 1:
                alive.add(f"rl{folder.name.removeprefix(PREFIX).replace('-', 'x')}")
                continue
        _remove(folder)
    for link in Path("/sys/class/net").glob("rl*x*"):
        if not link.name.startswith(tuple(alive)) if alive else True:
            run_ip("link", "del", link.name, check=False)


def _remove(folder: Path) -> None:
    mounted = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for place in sorted((one for one in mounted if one.startswith(f"{folder}/")), reverse=True):
        subprocess.run(["umount", "-l", place], check=False)
    shutil.rmtree(folder, ignore_errors=True)
