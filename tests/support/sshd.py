"""A real OpenSSH sshd of the test's own on a loopback port: own host keys, own authorized_keys, no root needed."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from raylaunch.ssh.target import Target
from support.waiting import wait_until

LOOPBACK = "127.0.0.1"


def sshd_program() -> str:
    """Return the path of sshd; skip the test where there is none."""
    program = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if program is None:
        pytest.skip("needs OpenSSH's sshd (Debian: apt-get install openssh-server)")
    return program


def make_key(path: Path, *, kind: str = "ed25519", passphrase: str = "") -> Path:
    """Make a key pair with ``ssh-keygen``; return the private key's path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    words = ["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-C", f"test {path.name}", "-f", str(path)]
    subprocess.run(words, check=True, capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
    return path


def fingerprint(key: Path) -> str:
    """Return a key's fingerprint as ``ssh-keygen`` shows it."""
    words = ["ssh-keygen", "-lf", str(key)]
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout.split()[1]


class Sshd:
    """One sshd on 127.0.0.1. `home` is a home folder of the client's own, with ``.ssh`` in it."""

    def __init__(
        self, folder: Path, *, port: int = 0, extra: Sequence[str] = (), kinds: Sequence[str] = ("ed25519",)
    ) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.program = sshd_program()
        self.port = port or free_port()
        self.user = getpass.getuser()
        self.home = folder / "client"
        self.client = self.home / ".ssh"
        self.client.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.known_hosts = self.client / "known_hosts"
        self.key = (
            make_key(self.client / "id_ed25519")
            if not (self.client / "id_ed25519").exists()
            else self.client / "id_ed25519"
        )
        self.host_keys = [make_key(folder / f"host_{kind}", kind=kind) for kind in kinds]
        self.authorized = folder / "authorized_keys"
        self.authorize(self.key)
        self.config()
        self.extra = list(extra)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def target(self) -> Target:
        """The way there, with key and known_hosts in place."""
        self.trust()
        return Target(
            name="here",
            host=LOOPBACK,
            port=self.port,
            user=self.user,
            key=str(self.key),
            ssh_config=self.client / "config",
            known_hosts=self.known_hosts,
        )

    @property
    def stranger(self) -> Target:
        """The way there, of a client that has never seen this host."""
        return replace(self.target, known_hosts=self.folder / "no_known_hosts")

    def config(self, text: str = "") -> Path:
        """Write the client's configuration, empty by default."""
        path = self.client / "config"
        path.write_text(text)
        return path

    def authorize(self, *keys: Path) -> None:
        """Let in exactly these keys."""
        self.authorized.write_text("".join(Path(f"{key}.pub").read_text() for key in keys))
        self.authorized.chmod(0o600)

    def trust(self, *, host: str = LOOPBACK, keys: Sequence[Path] | None = None, file: Path | None = None) -> None:
        """Write the client's known_hosts anew, with this host's keys."""
        lines = [
            f"[{host}]:{self.port} {Path(f'{key}.pub').read_text().rsplit(' ', 2)[0]}\n"
            for key in (self.host_keys if keys is None else keys)
        ]
        (file or self.known_hosts).write_text("".join(lines))

    def start(self) -> None:
        """Start it, and wait until it answers."""
        lines = [
            f"Port {self.port}",
            f"ListenAddress {LOOPBACK}",
            *(f"HostKey {key}" for key in self.host_keys),
            f"AuthorizedKeysFile {self.authorized}",
            "PidFile none",
            "UsePAM no",
            "StrictModes no",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "PermitRootLogin yes",
            "PrintMotd no",
            "Subsystem sftp internal-sftp",
        ]
        config = self.folder / "sshd_config"
        config.write_text("\n".join([*self.extra, *lines]) + "\n")
        Path("/run/sshd").mkdir(exist_ok=True, mode=0o755) if os.geteuid() == 0 else None
        with (self.folder / "sshd.log").open("ab") as log:
            self.process = subprocess.Popen([self.program, "-D", "-e", "-f", str(config)], stderr=log, stdout=log)
        wait_until(lambda: listening(self.port) or self.process_died(), 20, "sshd listens")
        assert not self.process_died(), self.log()

    def process_died(self) -> bool:
        """Whether it has ended by itself."""
        return self.process is not None and self.process.poll() is not None

    def log(self) -> str:
        """Return what sshd wrote."""
        return (self.folder / "sshd.log").read_text(errors="replace")

    def connections(self) -> list[psutil.Process]:
        """Return the processes that serve connections now."""
        assert self.process is not None
        with suppress(psutil.NoSuchProcess):
            return [
                one
                for one in psutil.Process(self.process.pid).children(recursive=True)
                if one.name().startswith("sshd")
            ]
        return []

    def freeze(self) -> None:
        """Stop everything of sshd (SIGSTOP): the kernel still answers, nobody else does."""
        assert self.process is not None
        for one in [psutil.Process(self.process.pid), *self.connections()]:
            one.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on (SIGCONT)."""
        assert self.process is not None
        for one in [psutil.Process(self.process.pid), *self.connections()]:
            one.send_signal(signal.SIGCONT)

    def drop(self) -> None:
        """Kill what serves the connections, as a crash would."""
        for one in self.connections():
            with suppress(psutil.NoSuchProcess):
                one.kill()

    def stop(self) -> None:
        """End it and its connections."""
        if self.process is None:
            return
        self.drop()
        self.process.kill()
        self.process.wait(10)
        self.process = None


def listening(port: int) -> bool:
    """Say whether somebody accepts connections on a loopback port."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((LOOPBACK, port)) == 0


def free_port() -> int:
    """Return a port that nobody has now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


@contextmanager
def sshd(folder: Path, *, extra: Sequence[str] = (), kinds: Sequence[str] = ("ed25519",)) -> Iterator[Sshd]:
    """Run an sshd for a test. `extra` are further lines of its configuration; they win."""
    served = Sshd(folder, extra=extra, kinds=kinds)
    served.start()
    try:
        yield served
    finally:
        served.stop()
