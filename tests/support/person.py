"""A person at a machine of her own: a home folder, a folder that she works in, and the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from raylaunch.cluster.client_record import ClientRecord, TunnelRecord, load_tunnel, save_client
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.paths import ClusterPaths
from support.cli import run_cli
from support.signals import send
from support.sshd import LOOPBACK, Sshd


class Person:
    """Somebody with an SSH configuration that knows one host, ``head``."""

    def __init__(self, folder: Path, host: Sshd, *, trusts: bool = True) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.raylaunch_home = folder / "raylaunch"
        (self.home / ".ssh").mkdir(parents=True, mode=0o700)
        known = self.home / ".ssh/known_hosts"
        if trusts:
            host.trust(file=known)
        login = [f"  User {host.user}", f"  IdentityFile {host.key}", f"  UserKnownHostsFile {known}"]
        head = ["Host head", f"  HostName {LOOPBACK}", f"  Port {host.port}", *login]
        (self.home / ".ssh/config").write_text("\n".join([*head, f"Host {LOOPBACK}", *login]) + "\n")

    def environ(self) -> dict[str, str]:
        """Return the environment of her programs."""
        env = {
            key: value
            for key, value in os.environ.items()
            if key not in {"SSH_AUTH_SOCK", "RAYLAUNCH_CLUSTER_FILE"} and not key.startswith("RAY_")
        }
        return env | {"HOME": str(self.home), "RAYLAUNCH_HOME": str(self.raylaunch_home)}

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start ``raylaunch WORDS`` as she does, and go on."""
        return subprocess.Popen(
            [sys.executable, "-m", "raylaunch", *words],
            cwd=self.folder,
            env=self.environ(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def call(
        self, *words: str, limit_s: float = 60, check: bool = True, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run ``raylaunch WORDS`` as she does."""
        done = run_cli(words, cwd=self.folder, env=self.environ(), text=stdin, timeout_s=limit_s)
        assert not check or done.returncode == 0, f"{words}: {done.stdout}\n{done.stderr}"
        return done

    def paths(self, cluster: str) -> ClusterPaths:
        """Return where her machine keeps a cluster."""
        root = self.raylaunch_home / "clusters" / cluster
        return ClusterPaths(name=cluster, home=self.raylaunch_home, root=root)

    def tunnel(self, cluster: str) -> TunnelRecord:
        """Return what her tunnel to a cluster last said."""
        record = load_tunnel(self.paths(cluster))
        assert record is not None
        return record

    def runs(self, cluster: str, *, token: str, port: int) -> None:
        """Let her have brought up a cluster on ``head``, whose controller is on a port there."""
        paths = self.paths(cluster)
        paths.root.mkdir(parents=True, mode=0o700)
        spec = ClusterSpec.model_validate({"name": cluster, "hosts": ["head"]})
        ports = {"controller": port, "dashboard": port, "gcs": port}
        save_client(paths, ClientRecord(spec=spec, token=token, head_ports=ports, head="head"))

    def leaves(self) -> None:
        """End her tunnels, by their pids."""
        for folder in (self.raylaunch_home / "clusters").glob("*"):
            if record := load_tunnel(self.paths(folder.name)):
                send(record.process)
