"""Which hosts and addresses of cluster files a person has accepted: a file each in ``$RAYLAUNCH_HOME/trusted``.

A cluster.yaml may come with a checked-out repository. Nothing that it names is contacted before a person has accepted
it, brought it up or joined it from here. Only the fields that decide where a connection goes and with which secret are
remembered, not the file's path or the rest of its text.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from raylaunch.cluster.client_record import load_client
from raylaunch.cluster.record import load_record
from raylaunch.errors import ConflictError, StorageError, UntrustedError
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.models.host_spec import HostSpec
from raylaunch.paths import cluster_paths, make_private_dir, raylaunch_home, write_private
from raylaunch.ssh.target import OnPrompt, Prompt

VARIABLE = "RAYLAUNCH_TRUST"
"""Holds the fingerprint of a cluster that is accepted for this process, if nobody can be asked, as in CI."""

OF_A_HOST = ("host", "port", "user", "key", "jump", "fingerprint", "address")
OF_A_RAY = ("address", "gcs", "ray_token_file", "ray_tls")
"""The fields that decide where a connection goes and with which secret."""


@dataclass(frozen=True)
class Destination:
    """Where a connection goes: `words` are shown, and `fingerprint` is remembered."""

    words: str
    fingerprint: str


def destinations(spec: ClusterSpec) -> tuple[Destination, ...]:
    """Return where a cluster's connections go; an embedded cluster has none. Pure."""
    match spec.kind:
        case "local":
            return ()
        case "ssh":
            return tuple(_of_host(host) for host in spec.host_specs())
        case "existing":
            return (_of_ray(spec),)


def fingerprint(spec: ClusterSpec) -> str:
    """Return a fingerprint of all destinations of a cluster, in any order. Pure."""
    return _digest(sorted(one.fingerprint for one in destinations(spec)))


def _of_host(host: HostSpec) -> Destination:
    said = host.model_dump(mode="json", include=set(OF_A_HOST), exclude_defaults=True)
    more = [f"port {host.port}"] if host.port else []
    more += [f"key {host.key}"] if host.key else []
    more += [f"through {', '.join(host.jump)}"] if host.jump else []
    more += [f"on the cluster's network {host.address}"] if host.address else []
    more += [f"host key {host.fingerprint}"] if host.fingerprint else []
    name = f"{host.user}@{host.host}" if host.user else host.host
    return Destination(f"{name} ({'; '.join(more)})" if more else name, _digest({"kind": "ssh", **said}))


def _of_ray(spec: ClusterSpec) -> Destination:
    said = {"kind": "existing", **spec.model_dump(mode="json", include=set(OF_A_RAY), exclude_defaults=True)}
    with_token = f" (with the token in {spec.ray_token_file})" if spec.ray_token_file else ""
    gcs = f" and {spec.gcs_address}" if spec.gcs_address else ""
    return Destination(f"{spec.address}{gcs}{with_token}", _digest(said))


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def accept(spec: ClusterSpec) -> None:
    """Remember all destinations of a cluster as accepted.

    Raises:
        StorageError: they cannot be written.
    """
    folder = _folder(os.environ)
    make_private_dir(folder.parent)
    make_private_dir(folder)
    for one in destinations(spec):
        write_private(folder / one.fingerprint, f"{one.words}\n")


def unaccepted(spec: ClusterSpec, environ: Mapping[str, str] = os.environ) -> tuple[Destination, ...]:
    """Return the destinations of a cluster that nobody has accepted here."""
    left = [one for one in destinations(spec) if not (_folder(environ) / one.fingerprint).is_file()]
    if not left or environ.get(VARIABLE, "") == fingerprint(spec):
        return ()
    known = set(_brought_up(environ))
    return tuple(one for one in left if one.fingerprint not in known)


def _folder(environ: Mapping[str, str]) -> Path:
    return raylaunch_home(environ) / "trusted"


def _brought_up(environ: Mapping[str, str]) -> Iterator[str]:
    """Yield the fingerprints of what was brought up, or joined, from here, also by an older raylaunch."""
    for folder in (raylaunch_home(environ) / "clusters").glob("*"):
        paths = cluster_paths(folder.name, environ)
        try:
            client, record = load_client(paths), load_record(paths)
        except (ConflictError, StorageError):
            continue
        for spec in (found.spec for found in (client, record) if found is not None):
            yield from (one.fingerprint for one in destinations(spec))
        if client is not None:
            yield from (_of_host(host).fingerprint for host in client.hosts.values())


async def check_accepted(spec: ClusterSpec, *, on_prompt: OnPrompt | None = None) -> None:
    """Check that a person has accepted what a cluster connects to; ask them if they are there.

    Everything that connects to what a cluster file names calls this first.

    Raises:
        UntrustedError: nobody has accepted it, and nobody is there or the answer is no.
    """
    missing = unaccepted(spec)
    if not missing:
        return
    listed = "\n".join(f"  {one.words}" for one in missing)
    code = fingerprint(spec)
    if on_prompt is not None:
        text = f"Cluster {spec.name} connects to addresses that have not been used from here before:\n{listed}\n"
        answer = await on_prompt(Prompt("trust", spec.name, f"{text}Connect? It will be remembered. [yes/no]: "))
        if (answer or "").strip().lower() == "yes":
            accept(spec)
            return
    msg = f"cluster {spec.name} connects to what nobody has accepted on this machine:\n{listed}"
    hint = f"if that is right: raylaunch trust FILE, with its cluster.yaml; or in CI: {VARIABLE}={code}"
    raise UntrustedError(msg, hint=hint, fingerprint=code)
