"""A host of a test world that a real systemd has booted, in a container of systemd-nspawn.

Its files and its place on the network are those of any other host (`support.host`); it is its own first process that
differs: units start, accounts have a manager and sessions, and logind says what of them stays.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import psutil
import pytest

from support.host import Host, hidden_folders
from support.hosts import World
from support.signals import send
from support.waiting import wait_until

_BOOT_S = 90.0
_UNITS = Path("etc/systemd/system")
_WANTS = _UNITS / "multi-user.target.wants"
_MASKED = (
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "console-getty.service",
    "getty.target",
    "postgresql.service",
    "systemd-networkd.service",
    "systemd-resolved.service",
    "systemd-timesyncd.service",
)
_NETWORK = """\
[Unit]
Before=ssh.service
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'ip addr add {address}/24 dev host0 && ip link set host0 up'
[Install]
WantedBy=multi-user.target
"""


class BootedHost(Host):
    """A host with systemd as its first process."""

    def boot(self) -> None:
        """Switch it on; ready when its sshd listens."""
        assert not self.is_on, f"{self.name} is on"
        root = self.folder / "root"
        layers = f"lowerdir=/,upperdir={self.folder / 'upper'},workdir={self.folder / 'work'}"
        if not root.is_mount():
            subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, str(root)], check=True)
            self._fit(root)
        hidden = [f"--tmpfs={folder}:mode=755" for folder in hidden_folders() if Path(folder).is_dir()]
        words = [f"--directory={root}", f"--machine={self.name}", f"--network-bridge={self._bridge}", *hidden]
        words += [f"--bind={self.folder / 'disk' / one}:/{one}" for one in ("root", "home")]
        nspawn = ["systemd-nspawn", "--boot", "--register=no", "--keep-unit", "--quiet", "--resolv-conf=off", *words]
        with (self.folder / "boot.log").open("ab") as log:
            self._leash = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *nspawn], stdin=subprocess.PIPE, stdout=log, stderr=log
            )
        wait_until(lambda: self._find() or self._died(), _BOOT_S, f"{self.name} has its first process")
        wait_until(lambda: self.path("/run/sshd.pid").exists() or self._died(), _BOOT_S, f"{self.name} has its sshd")

    def unplug(self) -> None:
        """Pull its plug."""
        if self._leash is None:
            return
        send(self.pid)  # which ends all that is in its space of pids
        self._leash.kill()
        self._leash.wait(20)
        self._leash = None

    @property
    def _bridge(self) -> str:
        return next(iter(self._networks.values())).bridge

    def _find(self) -> bool:
        """Note its first process, the child that systemd-nspawn has in a space of pids of its own."""
        assert self._leash is not None
        for child in psutil.Process(self._leash.pid).children(recursive=True):
            if Path(f"/proc/{child.pid}/ns/pid").readlink() != Path("/proc/self/ns/pid").readlink():
                self.pid = child.pid
                return True
        return False

    def _fit(self, root: Path) -> None:
        (root / "etc/ssh/test.d/pam.conf").write_text("UsePAM yes\n")  # which makes sessions of logins
        (root / _UNITS / "test-network.service").write_text(_NETWORK.format(address=self.address))
        for name, unit in (("test-network", root / _UNITS), ("ssh", Path("/lib/systemd/system"))):
            target = Path("/") / unit.relative_to(root) if unit.is_relative_to(root) else unit
            (root / _WANTS).mkdir(exist_ok=True)
            (root / _WANTS / f"{name}.service").unlink(missing_ok=True)
            (root / _WANTS / f"{name}.service").symlink_to(target / f"{name}.service")
        for name in _MASKED:
            (root / _UNITS / name).unlink(missing_ok=True)
            (root / _UNITS / name).symlink_to("/dev/null")


def booted_host(made: World) -> BootedHost:
    """Add such a host to a world and switch it on. Skips the test where there is no systemd-nspawn."""
    if shutil.which("systemd-nspawn") is None:
        pytest.skip("needs systemd-nspawn (Debian: apt-get install systemd-container)")
    host = made.host(boot=False, kind=BootedHost)
    assert isinstance(host, BootedHost)
    host.boot()
    return host
