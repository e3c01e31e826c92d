"""`ClusterSpec`: a cluster, as cluster.yaml describes it. Frozen, validated, no I/O."""

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
TUNNEL_HINT = "run raylaunch on a machine that reaches Ray's own ports, for example the Ray head or one in its VPN"


class RayTls(Spec):
    """PEM files for a Ray that uses TLS, as in Ray's variables ``RAY_TLS_*``."""

    ca: str
    """The certificate of the authority. Example: `~/ray/ca.crt`"""
    certificate: str
    """A certificate of that authority for this machine. Example: `~/ray/node.crt`"""
    key: str
    """The certificate's key. Example: `~/ray/node.key`"""


class ClusterSpec(Spec):
    """A cluster, as cluster.yaml describes it. Without a file: the embedded cluster ``local`` on this machine."""

    name: str = _LOCAL_NAME
    """The cluster's name; default `local`, or the first host's name. Several clusters can run side by side.
    Example: `scratch`"""
    kind: Literal["local", "ssh", "existing"] = "local"
    """`local`: Ray and the controller on this machine; `ssh`: on `hosts`, over SSH; `existing`: the controller here,
    and a Ray that somebody else runs at `address`. By default derived from `hosts` and `address`. Example: `ssh`"""
    gpus: ClusterGpus = "auto"
    """`auto` for all GPUs that `nvidia-smi` lists, a list of indices or UUIDs to use only these, or a number: that many
    of them; on a host without GPUs, that many logical GPUs, for testing GPU jobs. On each host. Example: `[0, 1]`"""
    cpus: Cpus = None
    """CPU cores that jobs may use on each machine; default all. Example: `16`"""
    port: Annotated[int, Field(ge=1024, le=LARGEST_PORT)] | None = None
    """The controller's port, on loopback; default a free one. Example: `8642`"""
    store: str = ""
    """The folder for records, logs and outputs, on the head; default in the cluster's own folder.
    Example: `/raid/raylaunch`"""
    environment: Environment = Environment()
    """The Python environment of jobs that name none. Example: `venv:/opt/train`"""
    env: Variables = Field(default_factory=dict)
    """Environment variables of all jobs. Example: `{HF_HOME: /raid/hf}`"""
    secrets: SecretNames = ()
    """Names of secrets that every job gets, in addition to its own. Example: `[HF_TOKEN]`"""
    retention: Retention = Retention()
    """How long the store keeps the files of ended jobs; default permanently. Example: `{jobs: 180d}`"""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels of each node, for `where` in jobs. Example: `{disk: nvme}`"""
    bind: Literal["", "loopback", "network"] = ""
    """Where Ray listens: on `loopback`, or on the cluster's `network`, which is required for several hosts, and for one
    host that others join later. By default derived from the number of hosts. Example: `network`"""
    tls: bool | None = None
    """Whether the nodes' Rays use mutual TLS with each other; by default they do if Ray listens on the network.
    To change it: `raylaunch down`, then `raylaunch up`. Example: `off`"""
    defaults: HostDefaults = HostDefaults()
    """Settings for all hosts. Example: `{user: ml, root: /raid/ml}`"""
    hosts: tuple[HostSpec, ...] = ()
    """The machines; the first is the head, which runs Ray's head and the controller. Each is a name, or an object with
    settings of its own. Example: `[dgx-1, dgx-2]`"""

    address: str = ""
    """The dashboard of a Ray that somebody else runs. With a token, https or a loopback address.
    Example: `https://ray.example.org`"""
    gcs: str = ""
    """`host:port` of that Ray's head; default port 6379 of the host in `address`. This machine must reach it.
    Example: `ray.example.org:6379`"""
    ray_tls: RayTls | None = None
    """The certificate for connecting to that Ray, if it uses TLS.
    Example: `{ca: ~/ray/ca.crt, certificate: ~/ray/node.crt, key: ~/ray/node.key}`"""
    ray_token_file: str = ""
    """The file with the token of that Ray, in `~/.ray` or `~/.raylaunch`; default no token.
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
        if not isinstance(defaults, HostDefaults):  # their error is reported already
            return hosts
        overridden = {key for host in (defaults, *hosts) for key in host.env}
        common = {key: text for key, text in info.data.get("env", {}).items() if key in overridden}
        head, *others = (merged(host, defaults, info.data, common) for host in hosts)
        return (head.model_copy(update={"store": head.store or info.data.get("store", "")}), *others)

    @field_validator("address")
    @classmethod
    def _address_is_a_url(cls, value: str) -> str:
        if value and not _URL.fullmatch(value):
            msg = f"{value!r} is not the address of a Ray dashboard, for example http://HOST:8265"
            raise ValueError(msg)
        return value.rstrip("/")

    @field_validator("gcs")
    @classmethod
    def _gcs_is_host_and_port(cls, value: str) -> str:
        if value == "none":
            msg = f"gcs: none is not supported, because raylaunch needs more than Ray's dashboard; {TUNNEL_HINT}"
            raise ValueError(msg)
        if value and not _HOST_PORT.fullmatch(value):
            msg = f"{value!r} is not the address of a Ray head, for example ray.example.org:6379"
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
                msg = "bind: network is for kind: ssh; the embedded cluster listens on loopback only"
                raise PlacedError(msg, ("bind",))
            return self
        if not self.hosts:
            msg = "kind: ssh needs hosts; write hosts: [NAME, …], the first is the head"
            raise PlacedError(msg, ("kind",))
        if self.name == _LOCAL_NAME:
            msg = "the name 'local' is reserved for the embedded cluster, which the head may have too; use another"
            raise PlacedError(msg, ("name",))
        if self.bind == "loopback" and len(self.hosts) > 1:
            msg = (
                f"bind: loopback does not work with {len(self.hosts)} hosts, which reach each other over a network; "
                "write bind: network, or leave it out"
            )
            raise PlacedError(msg, ("bind",))
        return self

    def _of_somebody_else(self) -> ClusterSpec:
        if not self.address:
            msg = "kind: existing needs address: the dashboard of that Ray, for example http://HOST:8265"
            raise PlacedError(msg, ("kind",))
        for field in ("hosts", "gpus", "cpus", "labels", "bind", "tls"):
            if getattr(self, field) != type(self).model_fields[field].get_default(call_default_factory=True):
                msg = f"{field} was set when that Ray was started and cannot be changed here; leave it out"
                raise PlacedError(msg, (field,))
        if self.name == _LOCAL_NAME:
            msg = "the name 'local' is reserved for the embedded cluster; give this one another: name: NAME"
            raise PlacedError(msg, ("name",) if "name" in self.model_fields_set else ("kind",))
        return self

    @property
    def gcs_address(self) -> str:
        """`host:port` of the head of a Ray that somebody else runs."""
        return self.gcs or f"{urlsplit(self.address).hostname}:6379"

    @property
    def loopback(self) -> bool:
        """Whether Ray listens on loopback only, and not on the cluster's network."""
        return self.bind != "network" and len(self.hosts) <= 1

    @property
    def uses_tls(self) -> bool:
        """Whether the nodes' Rays use mutual TLS with each other."""
        return self.tls if self.tls is not None else self.kind == "ssh" and not self.loopback

    @property
    def job_env(self) -> dict[str, str]:
        """The variables of all jobs. One that some host overrides is in every host's own `env` instead."""
        overridden = {key for host in self.hosts for key in host.env}
        return {key: text for key, text in self.env.items() if key not in overridden}

    def non_defaults(self) -> dict[str, object]:
        """Return the fields that differ from their defaults, for a file that an older raylaunch may read.

        Hosts are complete: a field that one leaves out would be taken from `defaults`.
        """
        whole = self.model_dump(mode="json")
        return {field: whole[field] for field in self.model_dump(exclude_defaults=True)}

    def host_specs(self) -> tuple[HostSpec, ...]:
        """Return the hosts, the head first, each merged with the defaults."""
        return self.hosts

    def part_of(self, host: HostSpec) -> ClusterSpec:
        """Return the spec for one host: an embedded cluster, with that host's GPUs, cores and labels."""
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
