"""What is asked for of a cluster: cluster.yaml. Frozen, validated, no I/O."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from raylaunch.spec_parts import NAME, Environment, PlacedError, Retention, SecretNames, Spec, Variables, Words

_LOCAL_NAME = "local"
_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")
_URL = re.compile(r"http://[A-Za-z0-9._\[\]:-]+/?")
_HOST_PORT = re.compile(r"[A-Za-z0-9._\[\]:-]+:\d{1,5}")
NO_GCS = "none"
_LARGEST_PORT = 65535


def _gpus_words(value: object) -> object:
    if isinstance(value, list):
        return tuple(str(item) for item in value)
    return value


ClusterGpus = Annotated[Literal["auto"] | Annotated[int, Field(ge=0)] | tuple[str, ...], BeforeValidator(_gpus_words)]
Cpus = Annotated[float, Field(gt=0)] | None


class HostDefaults(Spec):
    """What holds for every host of the cluster, unless the host says otherwise."""

    user: str = ""
    """The account to log in as; without it what `~/.ssh/config` says, else yours. It need not be root. Example: `ml`"""
    port: Annotated[int, Field(ge=1, le=_LARGEST_PORT)] | None = None
    """The port of its sshd; without it what `~/.ssh/config` says, else 22. Example: `2222`"""
    key: str = ""
    """The private key to log in with; without it ssh-agent, `~/.ssh/config` and the usual files. It is never copied.
    Example: `~/.ssh/id_dgx`"""
    jump: Words = ()
    """The machines to go through, in order, as `ProxyJump` has them. Example: `[gate.example.org]`"""
    interface: str = ""
    """The network interface on the cluster's network, for Ray, NCCL and Gloo; without it the one that bears the
    address. Example: `ens1f0np0`"""
    gpus: ClusterGpus = "auto"
    """As for the cluster: `auto`, a list of indices or UUIDs, or a number. Example: `[0, 1, 2, 3]`"""
    cpus: Cpus = None
    """CPU cores that jobs may use there; without it all. Example: `64`"""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels of the node, for `where` in jobs; added to those of all hosts. Example: `{disk: nvme}`"""
    root: str = ""
    """raylaunch's folder on the host; without it `~/.raylaunch`. Example: `/raid/ml/raylaunch`"""
    environment: str = ""
    """The Python environment that runs Ray there, which raylaunch then does not make itself: `venv:PATH`, `conda:NAME`,
    or an interpreter's path. Example: `conda:ray`"""
    env: Variables = Field(default_factory=dict)
    """Environment variables of all that runs there; added to those of all hosts. Example: `{HF_HOME: /raid/hf}`"""

    @field_validator("environment")
    @classmethod
    def _environment_is_one_that_is_there(cls, value: str) -> str:
        if value and Environment.model_validate(value).kind not in {"python", "venv", "conda"}:
            msg = f"{value!r} is made for a job; a host needs one that is there: venv:PATH, conda:NAME, /path/to/python"
            raise ValueError(msg)
        return value

    @field_validator("labels")
    @classmethod
    def _labels_are_plain(cls, value: dict[str, str]) -> dict[str, str]:
        for key, text in value.items():
            if text and not _LABEL.fullmatch(text):
                msg = f"{key} has the value {text!r}; a label's value is letters, digits, '.', '_' and '-', at most 63"
                raise ValueError(msg)
        return value


class HostSpec(HostDefaults):
    """One host: a name, or an object with `host` and what differs from the others."""

    host: str
    """Its name for ssh, from `~/.ssh/config` or DNS, or its address; `user@host:port` is understood.
    Example: `dgx-1.example.org`"""
    name: str = ""
    """What it is called here and in `where`; without it the first part of `host`. Example: `dgx-1`"""
    address: str = ""
    """Its address on the cluster's network, where that is not the one that ssh reaches. Example: `10.0.0.1`"""
    fingerprint: str = ""
    """The host key that it must show; without it known_hosts decides.
    Example: `SHA256:uNiVztksCsDhcc0u9e8BgrJXVGbmkfEyjFn8WEgbPGI`"""
    store: str = ""
    """The folder of records, logs and outputs; the first host alone has one. Example: `/raid/ml/store`"""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, data: object) -> object:
        if isinstance(data, str):
            return _host_from_text(data)
        if isinstance(data, dict) and isinstance(data.get("host"), str):
            parsed = _host_from_text(data["host"])
            for key in ("user", "port"):
                if key in parsed and data.get(key) not in (None, "", parsed[key]):
                    msg = f"{key} is given twice, in host ({parsed[key]}) and as {key} ({data[key]})"
                    raise ValueError(msg)
            return data | parsed
        if isinstance(data, bool | int | float | list) or data is None:
            msg = "this is not a host: write a name, or a mapping; a name that is a number or yes needs quotes"
            raise ValueError(msg)
        return data

    @field_validator("name")
    @classmethod
    def _name_is_plain(cls, value: str) -> str:
        if value and not _LABEL.fullmatch(value):
            msg = f"{value!r} is not a host's name; use letters, digits, '.', '_' and '-', at most 63"
            raise ValueError(msg)
        return value

    @field_validator("address")
    @classmethod
    def _address_is_one(cls, value: str) -> str:
        if value and not _is_address(value):
            msg = f"{value!r} is not an IP address; names are for host, and what Ray binds to is an address"
            raise ValueError(msg)
        return value

    @field_validator("fingerprint")
    @classmethod
    def _fingerprint_is_one(cls, value: str) -> str:
        if value and not _FINGERPRINT.fullmatch(value):
            msg = f"{value!r} is not a fingerprint; it looks as SHA256:… in the output of: ssh-keygen -lf KEY"
            raise ValueError(msg)
        return value


def _host_from_text(text: str) -> dict[str, object]:
    """Read ``[ssh://][user@]host[:port]``; an IPv6 address with a port stands in brackets."""
    user, _, rest = text.strip().removeprefix("ssh://").rstrip("/").rpartition("@")
    host, port = rest, ""
    if rest.startswith("["):
        host, _, port = rest[1:].partition("]")
        port = port.removeprefix(":")
    elif rest.count(":") == 1:
        host, _, port = rest.partition(":")
    if not (_HOST.fullmatch(host) or _is_address(host)) or (port and not port.isdigit()):
        msg = f"{text!r} is not a host; write a name from ~/.ssh/config, a DNS name or an address, as user@host:port"
        raise ValueError(msg)
    return {"host": host} | ({"user": user} if user else {}) | ({"port": int(port)} if port else {})


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    return True


def _short_name(host: str) -> str:
    return host.replace(":", "-").replace("%", "-") if _is_address(host) else host.partition(".")[0]


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
    port: Annotated[int, Field(ge=1024, le=_LARGEST_PORT)] | None = None
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
    """How long the store keeps what jobs leave behind; without it for ever. Example: `{jobs_s: 180d}`"""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels of each node, for `where` in jobs. Example: `{disk: nvme}`"""
    bind: Literal["", "loopback", "network"] = ""
    """Where Ray listens: on `loopback`, or on the cluster's `network`, which several hosts need, and one host that
    others may join later. Without it what fits the number of hosts. Example: `network`"""
    defaults: HostDefaults = HostDefaults()
    """What holds for all hosts. Example: `{user: ml, root: /raid/ml}`"""
    hosts: tuple[HostSpec, ...] = ()
    """The machines; the first is the head, where Ray's head and the controller run. Each is a name, or an object where
    it differs from the others. Example: `[dgx-1, dgx-2]`"""

    address: str = ""
    """Of a Ray that somebody else runs: its dashboard, which takes jobs. Example: `http://ray.example.org:8265`"""
    gcs: str = ""
    """Of that Ray: `host:port` of its head; without it port 6379 of the host in `address`. `none` where nothing but
    `address` is reached: jobs run, and only their logs come back. Example: `ray.example.org:6379`"""
    ray_token_file: str = ""
    """The file with the token of that Ray; without it the Ray asks for none. Example: `~/.ray/auth_token`"""

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
            filled["name"] = _name_of_raw(hosts[0])
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
        named = _named(value)
        _refuse_doubles(named)
        for index, host in enumerate(named[1:], start=1):
            if host.store:
                msg = f"{host.name} is not the head, and the store is on the head; leave store out here"
                raise PlacedError(msg, (index, "store"))
        defaults = info.data.get("defaults")
        if not isinstance(defaults, HostDefaults):  # what is wrong with them is said already
            return named
        overridden = {key for host in (defaults, *named) for key in host.env}
        common = {key: text for key, text in info.data.get("env", {}).items() if key in overridden}
        head, *others = (_merged(host, defaults, info.data, common) for host in named)
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
        if value not in {"", NO_GCS} and not _HOST_PORT.fullmatch(value):
            msg = f"{value!r} is not the address of a Ray's head; it looks as HOST:6379, or is {NO_GCS}"
            raise ValueError(msg)
        return value

    @model_validator(mode="after")
    def _kind_has_what_it_needs(self) -> ClusterSpec:
        for field in ("address", "gcs", "ray_token_file"):
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
        for field in ("hosts", "gpus", "cpus", "labels", "bind"):
            if getattr(self, field) != type(self).model_fields[field].get_default(call_default_factory=True):
                msg = f"{field} is what that Ray was started with, and cannot be changed here; leave it out"
                raise PlacedError(msg, (field,))
        if self.name == _LOCAL_NAME:
            msg = "the name 'local' is that of the embedded cluster; give this one another: name: NAME"
            raise PlacedError(msg, ("name",) if "name" in self.model_fields_set else ("kind",))
        return self

    @property
    def jobs_only(self) -> bool:
        """Whether of a Ray that somebody else runs only the dashboard's address is used."""
        return self.gcs == NO_GCS

    @property
    def gcs_address(self) -> str:
        """`host:port` of the head of a Ray that somebody else runs; empty where that is not reached."""
        if self.jobs_only:
            return ""
        return self.gcs or f"{urlsplit(self.address).hostname}:6379"

    @property
    def loopback(self) -> bool:
        """Whether Ray listens on loopback alone, and not on the cluster's network."""
        return self.bind != "network" and len(self.hosts) <= 1

    @property
    def job_env(self) -> dict[str, str]:
        """The variables of all jobs. One that some host says differently is in every host's own `env` instead."""
        overridden = {key for host in self.hosts for key in host.env}
        return {key: text for key, text in self.env.items() if key not in overridden}

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
        )


def _name_of_raw(host: object) -> str:
    """Return what the first host of a file would be called; `local` where that cannot be said yet."""
    if isinstance(host, HostSpec):
        return host.name or _short_name(host.host)
    if isinstance(host, Mapping):
        return str(host.get("name") or "") or _name_of_raw(host.get("host"))
    try:
        return _short_name(str(_host_from_text(str(host))["host"]))
    except ValueError:
        return _LOCAL_NAME


def _named(hosts: Sequence[HostSpec]) -> tuple[HostSpec, ...]:
    """Give a name to each host that has none: the first part of its own, or all of it where that is another's."""
    short = Counter(host.name or _short_name(host.host) for host in hosts)

    def name(host: HostSpec) -> str:
        chosen = host.name or _short_name(host.host)
        return chosen if host.name or short[chosen] == 1 else host.host

    return tuple(host.model_copy(update={"name": name(host)}) for host in hosts)


def _refuse_doubles(hosts: Sequence[HostSpec]) -> None:
    seen: dict[tuple[str, str], int] = {}
    for index, host in enumerate(hosts):
        where = f"{host.host} port {host.port}" if host.port else host.host
        for field, value in (("host", where), ("name", host.name), ("address", host.address)):
            if not value:
                continue
            first = seen.setdefault((field, value.lower()), index)
            if first != index:
                other = "" if field == "host" else f" ({hosts[first].host} and {host.host})"
                msg = f"{field} {value} is given twice{other}; list each host once"
                raise PlacedError(msg, (index, field))


def _merged(
    host: HostSpec, defaults: HostDefaults, cluster: Mapping[str, object], common_env: Mapping[str, str]
) -> HostSpec:
    changes: dict[str, object] = {}
    said = host.model_fields_set
    for field in HostDefaults.model_fields:
        if field in said or field in {"labels", "env"}:
            continue
        if field in defaults.model_fields_set:
            changes[field] = getattr(defaults, field)
        elif field in {"gpus", "cpus"}:
            changes[field] = cluster.get(field, getattr(host, field))
    labels = cluster.get("labels")
    changes["labels"] = {**(labels if isinstance(labels, dict) else {}), **defaults.labels, **host.labels}
    changes["env"] = {**common_env, **defaults.env, **host.env}
    return host.model_copy(update=changes)
