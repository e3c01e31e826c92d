"""One host of a test world: see `support.hosts`."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from raylaunch.ssh.target import Target
from support.sshd import make_key
from support.waiting import wait_until

if TYPE_CHECKING:
    from support.hosts import World

ROOT = Path(__file__).resolve().parents[2]
BOOT = Path(__file__).with_name("hosts_boot.sh")
WIRE = Path(__file__).with_name("slow_link.py")

# What a system has in its root folder. Anything else there (a repository, a data disk) is this machine's own business.
_SYSTEM = frozenset(
    {"bin", "boot", "dev", "etc", "home", "lib", "lib32", "lib64", "libx32", "lost+found", "proc", "root"}
)
_SYSTEM |= {"run", "sbin", "sys", "tmp", "usr", "var"}
_COVERED = ("/root/", "/home/", "/tmp/", "/run/")  # noqa: S108 -- where a host has its own
_BOOT_S = 30.0


@dataclass(frozen=True)
class Ended:
    """What a command on a host printed, and its exit status."""

    status: int
    out: str
    err: str


@dataclass(frozen=True)
class Network:
    """A bridge. On `front` this machine has an address too; on `back` only hosts have one."""

    bridge: str
    four: str
    six: str

    def addresses(self, number: int) -> tuple[str, str]:
        """Return the addresses of the host with this number."""
        return f"{self.four}.{number}", f"{self.six}::{number:x}"


class Host:
    """One host. `address` is where the outside (or, on `back` alone, its jump host) finds it."""

    def __init__(  # noqa: PLR0913 -- what hosts may differ in
        self,
        world: World,
        name: str,
        *,
        number: int,
        networks: Mapping[str, Network],
        disk_mib: int | None,
        shm_mib: int,
        share: Mapping[Path, Path],
    ) -> None:
        self.world = world
        self.name = name
        self.number = number
        self.folder = world.folder / name
        self.users: dict[str, Path] = {"root": world.key}
        self._networks = networks
        self._shm_mib = shm_mib
        self._share = dict(share)
        self._leash: subprocess.Popen[bytes] | None = None
        self._wire: subprocess.Popen[bytes] | None = None
        self.pid = 0
        self._lay_out(disk_mib)

    @property
    def addresses(self) -> dict[str, str]:
        """Its address on each network that it is on."""
        return {name: network.addresses(self.number)[0] for name, network in self._networks.items()}

    @property
    def address(self) -> str:
        """Its address on the first network."""
        return next(iter(self.addresses.values()))

    @property
    def address6(self) -> str:
        """Its IPv6 address on the first network."""
        return next(iter(self._networks.values())).addresses(self.number)[1]

    @property
    def host_key(self) -> Path:
        """Its private host key."""
        return self.folder / "upper/etc/ssh/ssh_host_ed25519_key"

    @property
    def is_on(self) -> bool:
        """Whether it runs."""
        return self._leash is not None

    def target(self, user: str = "root") -> Target:
        """Return the way there for a user of it, through the world's configuration."""
        target = Target(name=self.name, ssh_config=self.world.config, known_hosts=self.world.known_hosts)
        return target if user == "root" else replace(target, user=user, key=str(self.users[user]))

    def boot(self) -> None:
        """Switch it on, with the files that it had; ready when its sshd listens."""
        assert not self.is_on, f"{self.name} is on"
        (self.folder / "pid").unlink(missing_ok=True)
        links = []
        for order, network in enumerate(self._networks.values()):
            four, six = network.addresses(self.number)
            links.append(f"eth{order}={four}/24,{six}/64")
        share = " ".join(f"{outside}={inside}" for outside, inside in self._share.items())
        words = [str(self.folder), self.name, str(self._shm_mib), " ".join(links), " ".join(hidden_folders()), share]
        # The leash: when this process ends, however it ends, its stdin does too, and the host with it.
        leash = (
            "setpriv --pdeathsig KILL unshare --net --mount --uts --pid --ipc --fork --kill-child "
            f"bash {shlex.quote(str(BOOT))} {shlex.join(words)} </dev/null & child=$!\n"
            "until read -t 0.5 -r _ || [ $? -le 128 ]; do kill -0 $child || exit 1; done; kill -9 $child; wait"
        )
        with (self.folder / "boot.log").open("ab") as log:
            self._leash = subprocess.Popen(["bash", "-c", leash], stdin=subprocess.PIPE, stdout=log, stderr=log)
        wait_until(lambda: (self.folder / "pid").exists() or self._died(), _BOOT_S, f"{self.name} has its namespaces")
        self.pid = int((self.folder / "pid").read_text())
        for order, network in enumerate(self._networks.values()):
            link = self._link(order)
            run_ip(
                "link",
                "add",
                link,
                "type",
                "veth",
                "peer",
                "name",
                f"eth{order}",
                "address",
                self._mac(order),
                "netns",
                str(self.pid),
            )
            run_ip("link", "set", link, "master", network.bridge, "up")
        wait_until(lambda: self.path("/run/sshd.pid").exists() or self._died(), _BOOT_S, f"{self.name} has its sshd")

    def power_off(self) -> None:
        """Pull its plug: nothing on it ends in order, and nobody hears of it. Its disk keeps what it had."""
        self.unplug()
        wait_until(lambda: not self.pid or not psutil.pid_exists(self.pid), 30, f"{self.name} is off")

    def unplug(self) -> None:
        """Pull its plug without waiting until the kernel has taken its namespaces apart."""
        if self._leash is None:
            return
        if self._wire is not None:
            self._wire.kill()
            self._wire.wait(10)
            self._wire = None
        for order in range(len(self._networks)):
            run_ip("link", "del", self._link(order), check=False)  # first, so that no process's end is seen on the wire
        assert self._leash.stdin is not None
        self._leash.stdin.close()
        self._leash.wait(20)
        self._leash = None

    def reboot(self) -> None:
        """Power off and on again: ``/tmp``, ``/run`` and all processes are gone, the disk is not."""
        self.power_off()
        self.boot()

    def slow(self, *, rtt_ms: float = 50, mbit_per_s: float = 0) -> None:
        """Make its link to the first network long (added round-trip time) or narrow (0: as wide as it is)."""
        self.fast()
        link, tap = self._link(0), self._tap
        run_ip("link", "set", link, "nomaster")
        run_ip("link", "set", link, "arp", "off")  # this machine must not answer on it in the bridge's place
        with Path(f"/proc/sys/net/ipv6/conf/{link}/disable_ipv6").open("w", encoding="ascii") as switch:
            switch.write("1")
        words = [sys.executable, str(WIRE), link, tap, str(rtt_ms / 2), str(mbit_per_s)]
        self._wire = subprocess.Popen(words, stdout=subprocess.PIPE)
        assert self._wire.stdout is not None
        assert self._wire.stdout.readline() == b"ready\n", "the slow link did not start"
        bridge = next(iter(self._networks.values())).bridge
        run_ip("link", "set", tap, "master", bridge, "up")

    def fast(self) -> None:
        """Undo `slow`."""
        if self._wire is None:
            return
        self._wire.kill()
        self._wire.wait(10)
        self._wire = None
        link = self._link(0)
        run_ip("link", "set", link, "arp", "on", check=False)
        run_ip("link", "set", link, "master", next(iter(self._networks.values())).bridge, check=False)

    def cut(self) -> None:
        """Cut its link to the first network: frames vanish in both directions, and no end notices at once."""
        self._port("0")

    def restore(self) -> None:
        """Restore the link, and wait until the host is reached again: this machine has given up on its address."""
        self._port("3")
        wait_until(self._is_reached, 30, f"{self.name} is reached again")

    def run(self, command: str, *, user: str = "root", timeout_s: float = 60, check: bool = True) -> Ended:
        """Run a line of bash on it, from outside: without SSH, and whatever state its link and sshd are in."""
        inside = ["bash", "-c", command] if user == "root" else ["runuser", "-u", user, "--", "bash", "-c", command]
        words = ["nsenter", "-t", str(self.pid), "-m", "-u", "-i", "-n", "-p", "-r", "-w", "--", *inside]
        env = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
            "LC_ALL": "C.UTF-8",
        }
        done = subprocess.run(
            words, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False, env=env
        )
        ended = Ended(done.returncode, done.stdout, done.stderr)
        assert not check or ended.status == 0, f"on {self.name}: {command!r} ended with {ended}"
        return ended

    def out(self, command: str, *, user: str = "root", timeout_s: float = 60) -> str:
        """Run a line of bash on it from outside, and return what it printed, stripped."""
        return self.run(command, user=user, timeout_s=timeout_s).out.strip()

    def path(self, inside: str) -> Path:
        """Return where a file of it lies, seen from outside; for a host that is off, only what is on its disk."""
        if self.is_on:
            return Path(f"/proc/{self.pid}/root{inside}")
        for folder in ("root", "home"):
            if inside.startswith(f"/{folder}/"):
                return self.folder / "disk" / inside.lstrip("/")
        return self.folder / "upper" / inside.lstrip("/")

    def write(self, inside: str, text: str, *, mode: int = 0o644) -> None:
        """Write a file of it, making its folder."""
        path = self.path(inside)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)

    def processes(self) -> list[psutil.Process]:
        """Return all its processes, by the pids that the outside knows."""
        space = Path(f"/proc/{self.pid}/ns/pid").readlink()
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{process.pid}/ns/pid").readlink() == space:
                    found.append(process)
        return found

    def signal_sshd(self, number: signal.Signals) -> None:
        """Send a signal to its sshd and all that serve connections: SIGSTOP makes it hang, SIGCONT go on."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name().startswith("sshd"):
                    process.send_signal(number)

    def reload_sshd(self) -> None:
        """Let its sshd read its configuration again; connections stay."""
        before = self.out("grep -c listening /var/log/sshd.log || true")
        self.run("kill -HUP $(cat /run/sshd.pid)")
        wait_until(lambda: self.out("grep -c listening /var/log/sshd.log || true") != before, 20, "sshd listens again")

    def _lay_out(self, disk_mib: int | None) -> None:
        """Make its folders, and write what a fresh installation has."""
        for name in ("upper", "work", "root", "disk"):
            (self.folder / name).mkdir(parents=True)
        if disk_mib:
            size = f"size={disk_mib}m,mode=755"
            subprocess.run(["mount", "-t", "tmpfs", "-o", size, "disk", str(self.folder / "disk")], check=True)
        for name, mode in (("root", 0o700), ("home", 0o755)):
            (self.folder / "disk" / name).mkdir(mode=mode)
        for name in (".bashrc", ".profile"):
            if (skeleton := Path("/etc/skel") / name).exists():
                shutil.copy(skeleton, self.folder / "disk/root" / name)
        etc = self.folder / "upper/etc"
        (etc / "ssh/test.d").mkdir(parents=True)
        for path in (self.folder / "upper", etc, etc / "ssh", etc / "ssh/test.d"):
            path.chmod(0o755)
        make_key(self.host_key)
        (etc / "hostname").write_text(f"{self.name}\n")
        (etc / "resolv.conf").write_text("")
        (etc / "machine-id").write_text(f"{os.getpid():016x}{self.number:016x}\n")
        (etc / "ssh/sshd_config").write_text(_SSHD_CONFIG)
        authorize(self.folder / "disk/root", self.world.key)

    def _link(self, order: int) -> str:
        return f"{self.world.links}h{self.number}{'ab'[order]}"

    @property
    def _tap(self) -> str:
        return f"{self.world.links}t{self.number}"

    def _mac(self, order: int) -> str:
        return f"02:52:4c:{order:02x}:{self.world.slot:02x}:{self.number:02x}"

    def _port(self, state: str) -> None:
        subprocess.run(
            ["bridge", "link", "set", "dev", self._tap if self._wire else self._link(0), "state", state],
            check=True,
            capture_output=True,
        )

    def _is_reached(self) -> bool:
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex((self.address, 22)) in {0, errno.ECONNREFUSED}

    def _died(self) -> bool:
        assert self._leash is not None
        if self._leash.poll() is None:
            return False
        log = (self.folder / "boot.log").read_text(errors="replace")
        msg = f"{self.name} did not boot: {log[-2000:]}"
        raise AssertionError(msg)


_SSHD_CONFIG = """\
Include /etc/ssh/test.d/*.conf
Port 22
HostKey /etc/ssh/ssh_host_ed25519_key
PidFile /run/sshd.pid
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
PrintMotd no
Subsystem sftp /usr/lib/openssh/sftp-server
"""


def hidden_folders() -> list[str]:
    """Return the folders that a host must not see, outermost first."""
    own = [str(place) for place in sorted(Path("/").iterdir()) if place.name not in _SYSTEM and place.is_dir()]
    own += [str(place) for place in (ROOT, Path(sys.prefix), Path(sys.base_prefix))]
    kept = {"/", "/usr", "/usr/local"}
    return [place for place in own if place not in kept and not place.startswith(_COVERED) and " " not in place]


def authorize(home: Path, key: Path) -> None:
    """Let a key in at the account with this home."""
    (home / ".ssh").mkdir(mode=0o700, exist_ok=True)
    (home / ".ssh/authorized_keys").write_text(Path(f"{key}.pub").read_text())
    (home / ".ssh/authorized_keys").chmod(0o600)


def run_ip(*words: str, check: bool = True) -> None:
    """Run `ip`."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, f"ip {' '.join(words)}: {done.stderr}"
