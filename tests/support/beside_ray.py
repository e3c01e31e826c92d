"""raylaunch next to a Ray that somebody else runs, in that Ray's home."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from raylaunch.contract import VAR_NODE_ROOT
from raylaunch.paths import cluster_paths
from support.cluster import UP_S, Cluster, argv
from support.ray_head import RayHeadRunning

_DAEMONS = ("gcs_server", "raylet", "dashboard.py", "agent")


class BesideRay(Cluster):
    """A cluster of kind ``existing``, which the client has in its cluster.yaml."""

    def __init__(self, ray: RayHeadRunning, folder: Path, lines: dict[str, str]) -> None:
        work = folder / "work"
        work.mkdir(exist_ok=True)
        super().__init__(folder / "home", work)
        self.ray_head = ray
        self.env["HOME"] = str(folder)
        self.paths = cluster_paths(lines["name"], self.env)
        (work / "cluster.yaml").write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in lines.items()))

    def daemons(self) -> set[int]:
        """Return the pids of that Ray's daemons; its workers come and go."""
        found = {one.pid: " ".join(argv(one)[:4]) for one in self._children()}
        family = {pid for pid, line in found.items() if any(name in line for name in _DAEMONS)}
        return {self.ray_head.process.pid, *family}

    def agents(self) -> list[str]:
        """Return the node agents that Ray runs for this cluster, by their titles; other tests have theirs there."""
        own = (one for one in self._children() if _node_root(one).endswith(f"/nodes/{self.paths.name}"))
        titles = (" ".join(argv(one)) for one in own)
        return [title for title in titles if title.startswith("ray::NodeAgent")]

    def _children(self) -> list[psutil.Process]:
        return psutil.Process(self.ray_head.process.pid).children(recursive=True)


def _node_root(process: psutil.Process) -> str:
    try:
        return process.environ().get(VAR_NODE_ROOT, "")
    except psutil.Error:
        return ""


@contextmanager
def beside_ray(name: str, ray: RayHeadRunning) -> Iterator[BesideRay]:
    """Bring up a cluster of this name on a Ray, and end it."""
    folder = ray.home
    lines = {"name": name, "kind": "existing", "address": ray.dashboard_url}
    lines |= {"gcs": ray.gcs_address, "ray_token_file": "~/.ray/auth_token"}
    (folder / ".ray").mkdir(mode=0o700, exist_ok=True)
    shutil.copy(ray.token_path, folder / ".ray/auth_token")
    cluster = BesideRay(ray, folder, lines)
    try:
        cluster.good("trust")
        cluster.good("up", timeout_s=UP_S)
        yield cluster
    finally:
        cluster.cli("down", "--force", timeout_s=UP_S)
