"""What is asked for of a cluster: cluster.yaml. Frozen, validated, no I/O."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationInfo, field_validator, model_validator

from raylaunch.models.fields import NAME, Environment, PlacedError, Retention, SecretNames, Spec, Variables
from raylaunch.models.host_spec import (
    LARGEST_PORT,
    ClusterGpus,
    Cpus,
    HostDefaults,
    HostSpec,
    merged,
    name_as_written,
    named,
    refuse_doubles,
)

_LOCAL_NAME = "local"
_URL = re.compile(r"https?://[A-Za-z0-9._\[\]:-]+/?")
_HOST_PORT = re.compile(r"[A-Za-z0-9._\[\]:-]+:\d{1,5}")
TUNNEL_HINT = "run raylaunch on a machine that reaches Ray's own ports, for example the Ray head, or in a VPN with it"


class RayTls(Spec):
    """PEM files for a Ray that uses TLS, as its own variables ``RAY_TLS_*`` name them."""

    ca: str
    """The authority's certificate. Example: `~/ray/ca.crt`"""
    certificate: str
    """A certificate of that authority for this machine. Example: `~/ray/node.crt`"""
    key: str
    """The certificate's key. Example: `~/ray/node.key`"""


class ClusterSpec(Spec):
    """A cluster, as cluster.yaml describes it. Without a file: the embedded cluster ``local`` on this machine."""

    name: str = _LOCAL_NAME
    """Its name; several clusters run side by side. Without it `local`, or the first host's name. Example: `scratch`"""
    kind: Literal["local", "ssh", "existing"] = "local"
    """`local`: Ray and the controller on this machine; `ssh`: on `hosts`, which are reached over SSH; `existing`: the
    controller here, and a Ray that somebody else runs at `address`. Without it what fits. Example: `ssh`"""
    gpus: ClusterGpus = "auto"
    """`auto` for all that `nvidia-smi` lists, a list of indices or UUIDs to use only these, or a number: so many of
    them, and where there are none so many logical GPUs, to try GPU jobs out. On each host. Example: `[0, 1]`"""
    cpus: Cpus = None
    """CPU cores that jobs may use on each machine; without it all. Example: `16`"""
    port: Annotated[int, Field(ge=1024, le=LARGEST_PORT)] | None = None
    """The controller's port, on loopback; without it a free one. Example: `8642`"""
    store: str = ""
    """The folder of records, logs and outputs, on the head; without it in the cluster's own folder.
    Example: `/raid/raylaunch`"""
    environment: Environment = Environment()
    """The Python environment of jobs that name none. Example: `venv:/opt/train`"""
    env: Variables = Field(default_factory=dict)
    """Environment variables of all jobs. Example: `{HF_HOME: /raid/hf}`"""
    secrets: SecretNames = ()
    """Names of secrets that every job gets, beside those that it names itself. Example: `[HF_TOKEN]`"""
    retention: Retention = Retention()
    """How long the store keeps what jobs leave behind; without it for ever. Example: `{jobs: 180d}`"""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels of each node, for `where` in jobs. Example: `{disk: nvme}`"""
    bind: Literal["", "loopback", "network"] = ""
    """Where Ray listens: on `loopback`, or on the cluster's `network`, which several hosts need, and one host that
    others may join later. Without it what fits the number of hosts. Example: `network`"""
    tls: bool | None = None
    """Whether the nodes' Rays speak mutual TLS with each other. Without it they do where Ray listens on the network.
    Changed by `raylaunch down`, then `raylaunch up`. Example: `off`"""
    defaults: HostDefaults = HostDefaults()
    """What holds for all hosts. Example: `{user: ml, root: /raid/ml}`"""
    hosts: tuple[HostSpec, ...] = ()
    """The machines; the first is the head, where Ray's head and the controller run. Each is a name, or an object where
    it differs from the others. Example: `[dgx-1, dgx-2]`"""

    address: str = ""
    """Of a Ray that somebody else runs: its dashboard, which takes jobs. With a token, https or a loopback address.
    Example: `https://ray.example.org`"""
    gcs: str = ""
    """Of that Ray: `host:port` of its head; without it port 6379 of the host in `address`.
    This machine must reach it. Example: `ray.example.org:6379`"""
    ray_tls: RayTls | None = None
    """The certificate with which that Ray is spoken to, where it uses TLS.
    Example: `{ca: ~/ray/ca.crt, certificate: ~/ray/node.crt, key: ~/ray/node.key}`"""
    ray_token_file: str = ""
    """The file with the token of that Ray, in `~/.ray` or `~/.raylaunch`; without it the Ray asks for none.
    Example: `~/.ray/auth_token`"""

    @model_validator(mode="before")
    @classmethod
    def _kind_and_name_that_fit(cls, data: object) -> object:
        if not isinstance(data, Mapping):
            return data
        hosts = data.get("hosts")
        filled = dict(data)
        if "kind" not in data and (hosts or data.get("address")):
            filled["kind"] = "ssh" if hosts else "existing"
        if filled.get("kind") == "ssh" and not data.get("name") and isinstance(hosts, list | tuple) and hosts:
            filled["name"] = name_as_written(hosts[0]) or _LOCAL_NAME
        return filled

    @field_validator("name")
    @classmethod
    def _name_is_plain(cls, value: str) -> str:
        if not NAME.fullmatch(value):
            msg = f"{value!r} is not a cluster name; use letters, digits, '.', '_' and '-'"
            raise ValueError(msg)
        return value

    @field_validator("hosts")
    @classmethod
    def _hosts_are_whole(cls, value: tuple[HostSpec, ...], info: ValidationInfo) -> tuple[HostSpec, ...]:
        if not value:
            return value
        hosts = named(value)
        refuse_doubles(hosts)
        for index, host in enumerate(hosts[1:], start=1):
            if host.store:
                msg = f"{host.name} is not the head, and the store is on the head; leave store out here"
                raise PlacedError(msg, (index, "store"))
        defaults = info.data.get("defaults")
        if not isinstance(defaults, HostDefaults):  # what is wrong with them is said already
            return hosts
        overridden = {key for host in (defaults, *hosts) for key in host.env}
        common = {key: text for key, text in info.data.get("env", {}).items() if key in overridden}
        head, *others = (merged(host, defaults, info.data, common) for host in hosts)
        return (head.model_copy(update={"store": head.store or info.data.get("store", "")}), *others)

    @field_validator("address")
    @classmethod
    def _address_is_a_url(cls, value: str) -> str:
        if value and not _URL.fullmatch(value):
            msg = f"{value!r} is not the address of a Ray's dashboard; it looks as http://HOST:8265"
            raise ValueError(msg)
        return value.rstrip("/")

    @field_validator("gcs")
    @classmethod
    def _gcs_is_host_and_port(cls, value: str) -> str:
        if value == "none":
            msg = f"a Ray of which only the dashboard is reached cannot be used; {TUNNEL_HINT}"
            raise ValueError(msg)
        if value and not _HOST_PORT.fullmatch(value):
            msg = f"{value!r} is not the address of a Ray's head, for example ray.example.org:6379"
            raise ValueError(msg)
        return value

    @model_validator(mode="after")
    def _kind_has_what_it_needs(self) -> ClusterSpec:
        for field in ("address", "gcs", "ray_token_file", "ray_tls"):
            if getattr(self, field) and self.kind != "existing":
                msg = f"{field} is for a Ray that somebody else runs; write kind: existing, or leave it out"
                raise PlacedError(msg, (field,))
        if self.kind == "existing":
            return self._of_somebody_else()
        if self.kind == "local":
            if self.hosts:
                msg = "hosts are for kind: ssh; leave kind out, or write kind: ssh"
                raise PlacedError(msg, ("hosts",))
            if self.bind == "network":
                msg = "bind: network is for kind: ssh; the embedded cluster listens on loopback alone"
                raise PlacedError(msg, ("bind",))
            return self
        if not self.hosts:
            msg = "kind: ssh needs hosts; write hosts: [NAME, …], the first is the head"
            raise PlacedError(msg, ("kind",))
        if self.name == _LOCAL_NAME:
            msg = "the name 'local' is that of the embedded cluster, which the head may have too; give it another"
            raise PlacedError(msg, ("name",))
        if self.bind == "loopback" and len(self.hosts) > 1:
            msg = (
                f"bind: loopback cannot be with {len(self.hosts)} hosts: they reach each other over a network; "
                "write bind: network, or leave it out"
            )
            raise PlacedError(msg, ("bind",))
        return self

    def _of_somebody_else(self) -> ClusterSpec:
        if not self.address:
            msg = "kind: existing needs address: the dashboard of that Ray, as http://HOST:8265"
            raise PlacedError(msg, ("kind",))
        for field in ("hosts", "gpus", "cpus", "labels", "bind", "tls"):
            if getattr(self, field) != type(self).model_fields[field].get_default(call_default_factory=True):
                msg = f"{field} is what that Ray was started with, and cannot be changed here; leave it out"
                raise PlacedError(msg, (field,))
        if self.name == _LOCAL_NAME:
            msg = "the name 'local' is that of the embedded cluster; give this one another: name: NAME"
            raise PlacedError(msg, ("name",) if "name" in self.model_fields_set else ("kind",))
        return self

    @property
    def gcs_address(self) -> str:
        """`host:port` of the head of a Ray that somebody else runs."""
        return self.gcs or f"{urlsplit(self.address).hostname}:6379"

    @property
    def loopback(self) -> bool:
        """Whether Ray listens on loopback alone, and not on the cluster's network."""
        return self.bind != "network" and len(self.hosts) <= 1

    @property
    def uses_tls(self) -> bool:
        """Whether the nodes' Rays are to speak mutual TLS with each other."""
        return self.tls if self.tls is not None else self.kind == "ssh" and not self.loopback

    @property
    def job_env(self) -> dict[str, str]:
        """The variables of all jobs. One that some host says differently is in every host's own `env` instead."""
        overridden = {key for host in self.hosts for key in host.env}
        return {key: text for key, text in self.env.items() if key not in overridden}

    def said(self) -> dict[str, object]:
        """Return, for a file, the fields that are not as by default: an older raylaunch may not know the others.

        Hosts are whole: what one leaves out would be taken from the defaults of all.
        """
        whole = self.model_dump(mode="json")
        return {field: whole[field] for field in self.model_dump(exclude_defaults=True)}

    def host_specs(self) -> tuple[HostSpec, ...]:
        """Return the hosts, the head first, each with the defaults of all laid under what it says itself."""
        return self.hosts

    def part_of(self, host: HostSpec) -> ClusterSpec:
        """Return what the machine of one host is told: an embedded cluster, with that host's GPUs, cores and labels."""
        return ClusterSpec(
            name=self.name,
            gpus=host.gpus,
            cpus=host.cpus,
            labels=host.labels,
            store=host.store,
            port=self.port,
            environment=self.environment,
            env=self.job_env,
            secrets=self.secrets,
            retention=self.retention,
            tls=self.uses_tls,
        )
