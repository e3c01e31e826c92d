"""Clusters that somebody else runs: the command of an invitation, joining, and leaving."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import shlex
import shutil
from dataclasses import replace

from raylaunch.cluster.client_record import (
    ClientRecord,
    TunnelRecord,
    load_client,
    load_tunnel,
    refuse_joined,
    save_client,
)
from raylaunch.cluster.hosts.tunnel_client import START_S, end_tunnel, ensure_tunnel
from raylaunch.cluster.ports import LOOPBACK
from raylaunch.cluster.types import Endpoint
from raylaunch.errors import ClusterDownError, ConflictError, NotFoundError, RaylaunchError
from raylaunch.models.cluster import Admission, Invitation, RayAccess
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.paths import ClusterPaths, cluster_paths, make_private_dir, storage_errors


def join_line(invitation: Invitation, record: ClientRecord, tunnel: TunnelRecord) -> str:
    """Return the command that the invited person runs. Pure. Its code can be used once.

    A host name that only the inviter's SSH configuration knows is replaced by the address.
    """
    head = record.spec.host_specs()[0]
    known = "." in head.host or ":" in head.host
    host = head.host if known or not tunnel.head_address else tunnel.head_address
    host = f"[{host}]" if ":" in host else host
    words = ["raylaunch", "join", invitation.cluster, "--head", f"{host}:{head.port}" if head.port else host]
    words += [word for jump in head.jump if jump != "none" for word in ("--jump", jump)]
    words += ["--port", str(tunnel.head_ports.get("controller", invitation.port))]
    words += ["--fingerprint", tunnel.head_fingerprint] if tunnel.head_fingerprint else []
    return shlex.join([*words, "--code", invitation.code])


def own_records(cluster: str) -> tuple[ClientRecord, TunnelRecord]:
    """Return the records of a cluster that this machine brought up.

    Raises:
        ClusterDownError: there is no such cluster, or its tunnel was never up.
        AccessError: somebody else runs it.
    """
    paths = cluster_paths(cluster)
    record, tunnel = load_client(paths), load_tunnel(paths)
    refuse_joined(record, "opened to others")
    if record is None or tunnel is None or not tunnel.head_ports:
        msg = f"cluster {cluster} was not brought up from this machine, or is down"
        raise ClusterDownError(msg, hint="bring it up: raylaunch up")
    return record, tunnel


class InvitationJoin:
    """One use of an invitation: the tunnel to the head, and the token that is created here.

    Args:
        name: the cluster's name.
        host: the head, as in cluster.yaml.
        port: the controller's, on the head's loopback.

    Raises:
        SpecError: the host is invalid.
        ConflictError: another cluster of this name is known here.
    """

    def __init__(self, name: str, host: dict[str, object], port: int) -> None:
        self.spec = ClusterSpec.model_validate({"name": name, "kind": "ssh", "hosts": [host]})
        self.paths = cluster_paths(name)
        had = load_client(self.paths)
        if had is not None and not had.joined:
            msg = f"a cluster {name} was already brought up from here"
            raise ConflictError(msg, hint="use that one, or set another RAYLAUNCH_HOME for this one")
        self._had = had
        self._token = had.token if had is not None and had.head_ports.get("controller") == port else ""
        self._token = self._token or secrets.token_urlsafe(32)
        self._port = port

    @property
    def sha256(self) -> str:
        """The hash of the token, which is all that the cluster receives."""
        return hashlib.sha256(self._token.encode()).hexdigest()

    async def reach(self, code: str) -> Endpoint:
        """Open the tunnel, and return the controller's URL with the invitation's code as token.

        Raises:
            HostError: the head cannot be reached.
        """
        for folder in (self.paths.home, self.paths.home / "clusters", self.paths.root):
            make_private_dir(folder)
        self._save("?", ports={"controller": self._port})
        tunnel = await ensure_tunnel(self.paths, fresh=True, limit_s=START_S)
        return Endpoint(url=f"http://{LOOPBACK}:{tunnel.ports['controller']}", token=code)

    async def admitted(self, admission: Admission, ray: RayAccess | None) -> None:
        """Save the admission; with `ray`, the tunnel forwards Ray's own ports too."""
        ports = {"controller": self._port}
        address = LOOPBACK
        if ray is not None:
            address, _, gcs = ray.gcs_address.rpartition(":")
            ports |= {"gcs": int(gcs), "dashboard": int(ray.dashboard_url.rpartition(":")[2])}
        self._save(admission.made_by, ports=ports, address=address, cluster_id=admission.cluster_id)
        if ray is not None:
            await ensure_tunnel(self.paths, fresh=True, limit_s=START_S)

    def with_own_token(self, endpoint: Endpoint) -> Endpoint:
        """Return the endpoint with the token that was created here."""
        return replace(endpoint, token=self._token)

    async def undo(self) -> None:
        """Remove what this join saved; a cluster that was joined before stays as it was."""
        with contextlib.suppress(RaylaunchError):
            await end_tunnel(self.paths)
        if self._had is not None:
            save_client(self.paths, self._had)
        else:
            _remove(self.paths)

    def _save(self, owner: str, *, ports: dict[str, int], address: str = LOOPBACK, cluster_id: str = "") -> None:
        head = self.spec.host_specs()[0]
        record = ClientRecord(
            spec=self.spec,
            cluster_id=cluster_id,
            token=self._token,
            head_ports=ports,
            head_address=address,
            head=head.name,
            owner=owner,
        )
        save_client(self.paths, record)


async def leave(name: str) -> None:
    """Forget a cluster that was joined. The cluster and the jobs there continue.

    Raises:
        NotFoundError: no such cluster is known here.
        ConflictError: it was brought up from here.
    """
    paths = cluster_paths(name)
    record = load_client(paths)
    if record is None:
        msg = f"no such cluster: {name!r}"
        raise NotFoundError(msg, hint="list them: raylaunch switch")
    if not record.joined:
        msg = f"cluster {name} was brought up from here and would keep running"
        raise ConflictError(msg, hint="end it: raylaunch down")
    await end_tunnel(paths)
    _remove(paths)


def _remove(paths: ClusterPaths) -> None:
    with storage_errors(paths.root):
        shutil.rmtree(paths.root, ignore_errors=True)
