"""Reads Ray's own cluster.yaml (``ray up``) for existing machines (``provider: local``) as a cluster of raylaunch.

Machines and logins are used; each other key is reported, with the reason and what to use instead.
Its format: ``ray/autoscaler/ray-schema.json`` in an installed Ray.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from raylaunch.config.yaml_file import KeyPath, YamlFile
from raylaunch.errors import SpecError

_TAKEN = frozenset({"cluster_name", "provider", "auth", "head_start_ray_commands", "worker_start_ray_commands"})
_NOT_RUN = "it is not run, because raylaunch does not change a host"
_PACKAGES = "a job's packages go into its environment (environment: {pip: [..]}, conda:NAME, uv)"
_DAEMON = "raylaunch neither starts nor stops machines: all of head_ip and worker_ips are used"
_RSYNC = "code travels with each job (working_dir), and .gitignore or .raylaunchignore list what is not sent"

_MEANINGLESS: Mapping[str, str] = {
    "max_workers": _DAEMON,
    "min_workers": _DAEMON,
    "upscaling_speed": _DAEMON,
    "idle_timeout_minutes": _DAEMON,
    "available_node_types": "GPUs and cores are detected on each host, or set with gpus and cpus of a host",
    "head_node_type": "the first host is the head",
    "docker": "jobs run on the host itself, not in a container; set their Python with environment",
    "file_mounts": f"{_RSYNC}; put data into a folder on the hosts, and pass its path with env",
    "cluster_synced_files": _RSYNC,
    "file_mounts_sync_continuously": _RSYNC,
    "rsync_exclude": _RSYNC,
    "rsync_filter": _RSYNC,
    "initialization_commands": f"{_NOT_RUN}; run it once over ssh",
    "setup_commands": f"{_NOT_RUN}; {_PACKAGES}; run everything else once over ssh",
    "head_setup_commands": f"{_NOT_RUN}; {_PACKAGES}; run everything else once over ssh",
    "worker_setup_commands": f"{_NOT_RUN}; {_PACKAGES}; run everything else once over ssh",
    "no_restart": "raylaunch up never restarts a healthy Ray",
    "metadata": "Ray does not read it either",
}
_PROVIDER: Mapping[str, str] = {
    "use_internal_ips": "the addresses are used as written",
    "cache_stopped_nodes": _DAEMON,
    "disable_node_updaters": "raylaunch has none",
}
_AUTH: Mapping[str, str] = {
    "ssh_public_key": "no key is copied to a host",
    "ssh_proxy_use_node_id": "hosts are reached by their addresses",
}
_OF_RAY = ("--address", "--head", "--port", "--autoscaling-config", "--dashboard-host", "--block")
"""Options of ``ray start`` that raylaunch sets itself."""

_PROXY_JUMP = re.compile(r"ssh\s+(?:-W\s+%h:%p\s+(\S+)|(\S+)\s+-W\s+%h:%p)")


class IgnoredKey(NamedTuple):
    """A key that is ignored: its line, and why."""

    line: int
    where: str
    key: str
    why: str

    def __str__(self) -> str:
        return f"{self.where}: {self.key} is ignored: {self.why}"


class RayFile(NamedTuple):
    """Ray's file as data for a `ClusterSpec`; `origins` maps each value to its place in the file."""

    data: dict[str, object]
    notes: tuple[IgnoredKey, ...]
    origins: dict[KeyPath, KeyPath]


def is_ray_yaml(data: Mapping[str, object]) -> bool:
    """Return whether a file is Ray's: it has two keys that Ray requires and raylaunch does not have."""
    return "cluster_name" in data and "provider" in data


def read_ray_yaml(file: YamlFile) -> RayFile:
    """Convert Ray's file.

    Raises:
        SpecError: it is for a cloud, or is invalid for Ray too.
    """
    reader = _Reader(file)
    reader.read()
    return RayFile(reader.data, tuple(sorted(reader.notes)), reader.origins)


class _Reader:
    def __init__(self, file: YamlFile) -> None:
        self.file = file
        self.data: dict[str, object] = {"kind": "ssh"}
        self.notes: list[IgnoredKey] = []
        self.origins: dict[KeyPath, KeyPath] = {("kind",): ("provider",)}

    def read(self) -> None:
        """Convert all keys of the file."""
        self._refuse_unknown()
        self._take(("name",), ("cluster_name",))
        hosts = self._hosts()
        self._auth()
        for key in ("head_start_ray_commands", "worker_start_ray_commands"):
            self._start_commands(key, hosts[:1] if key.startswith("head") else hosts[1:])
        self.data["hosts"] = hosts
        for key, why in _MEANINGLESS.items():
            self._no_meaning((key,), why)

    def _refuse_unknown(self) -> None:
        known = sorted(_TAKEN | _MEANINGLESS.keys())
        for key in self.file.data:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                shown = f" {key!r}" if self.file.quoted else ""
                near = f"nearest: {close[0]}" if close and self.file.quoted else "Ray has none"
                msg = f"unknown key{shown} in Ray's cluster.yaml ({near})"
                raise SpecError(msg, where=self.file.where((key,)), field=key if self.file.quoted else "")

    def _take(self, to: KeyPath, path: KeyPath) -> None:
        holder: object = self.file.data
        for part in path:
            holder = holder.get(part) if isinstance(holder, dict) else None
        if holder is None:
            return
        self.origins[to] = path
        *parents, last = to
        inner: dict[str, object] = self.data
        for parent in parents:
            inner = inner.setdefault(str(parent), {})  # type: ignore[assignment]  # made here, as mappings
        inner[str(last)] = holder

    def _hosts(self) -> list[dict[str, object]]:
        provider = self._mapping("provider")
        kind = provider.get("type")
        if kind != "local" or "coordinator_address" in provider:
            named = f" {kind!r}" if self.file.quoted else ""
            what = f"provider type{named} creates machines" if kind != "local" else "coordinator_address lends machines"
            msg = f"{what}, and raylaunch uses existing machines: type: local with head_ip and worker_ips"
            raise SpecError(msg, where=self.file.where(("provider",)), field="provider")
        head, workers = provider.get("head_ip"), provider.get("worker_ips") or []
        if not isinstance(head, str) or not isinstance(workers, list):
            msg = "provider needs head_ip (one address) and worker_ips (a list of them)"
            raise SpecError(msg, where=self.file.where(("provider",)), field="provider.head_ip")
        self.origins |= {("hosts", 0): ("provider", "head_ip"), ("hosts",): ("provider",)}
        self.origins |= {("hosts", at + 1): ("provider", "worker_ips", at) for at in range(len(workers))}
        for key in provider.keys() - {"type", "head_ip", "worker_ips"}:
            self._no_meaning(("provider", key), _PROVIDER.get(key, "it is of another provider"))
        return [{"host": address} for address in (head, *workers)]

    def _auth(self) -> None:
        auth = self._mapping("auth")
        self._take(("defaults", "user"), ("auth", "ssh_user"))
        self._take(("defaults", "key"), ("auth", "ssh_private_key"))
        command = auth.get("ssh_proxy_command")
        if isinstance(command, str) and command:
            jump = _PROXY_JUMP.fullmatch(command.strip())
            if jump:
                self._take(("defaults", "jump"), ("auth", "ssh_proxy_command"))
                self.data.setdefault("defaults", {})["jump"] = [jump.group(1) or jump.group(2)]  # type: ignore[index]  # made above
            else:
                why = "write it into ~/.ssh/config, which is read; or jump: [NAME] for a machine to go through"
                self._no_meaning(("auth", "ssh_proxy_command"), why)
        for key in auth.keys() - {"ssh_user", "ssh_private_key", "ssh_proxy_command"}:
            self._no_meaning(("auth", key), _AUTH.get(key, "Ray does not know it either"))

    def _start_commands(self, key: str, hosts: Sequence[dict[str, object]]) -> None:
        commands = self.file.data.get(key) or []
        lines = [line for line in commands if isinstance(line, str)] if isinstance(commands, list) else []
        options = dict(option for line in lines for option in _options_of_ray_start(line))
        for option, field in (("--num-gpus", "gpus"), ("--num-cpus", "cpus")):
            text = options.pop(option, "")
            if text.isdigit():
                for host in hosts:
                    host[field] = int(text)
        left = [f"{name}={value}" if value else name for name, value in options.items() if name not in _OF_RAY]
        if lines:
            why = "raylaunch starts Ray itself, with ports and a token of its own"
            if left:
                why += f"; these options of ray start are left out: {' '.join(left)}"
            self._no_meaning((key,), why)

    def _mapping(self, key: str) -> dict[str, object]:
        value = self.file.data.get(key) or {}
        if not isinstance(value, dict):
            msg = f"{key} is a mapping of keys to values in Ray's cluster.yaml"
            raise SpecError(msg, where=self.file.where((key,)), field=key)
        return value

    def _no_meaning(self, path: KeyPath, why: str) -> None:
        value: object = self.file.data
        for part in path:
            value = value.get(part) if isinstance(value, dict) else None
        if value:  # an empty value, 0 or false requests nothing
            line = self.file.lines.get(path, 0)
            self.notes.append(IgnoredKey(line, self.file.where(path), ".".join(str(part) for part in path), why))


def _options_of_ray_start(line: str) -> Iterator[tuple[str, str]]:
    """Yield the options of the ``ray start`` in a shell command, with their values."""
    try:
        words = shlex.split(line)
    except ValueError:
        return
    if "ray" not in words or words[words.index("ray") + 1 :][:1] != ["start"]:
        return
    rest = words[words.index("ray") + 2 :]
    for at, word in enumerate(rest):
        if word in {"&&", ";", "||", "|"}:
            return
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            follows = rest[at + 1] if at + 1 < len(rest) and not rest[at + 1].startswith("-") else ""
            yield name, value if equals else follows
