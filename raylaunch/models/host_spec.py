"""`HostSpec` and `HostDefaults`: one host of cluster.yaml, and the settings of all. Frozen, validated, no I/O."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from raylaunch.models.fields import Environment, PlacedError, Spec, Variables, as_list

_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_USER = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.@+\\-]{0,63}\$?")
_INTERFACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,14}")
_FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")
LARGEST_PORT = 65535


def _gpus_words(value: object) -> object:
    if isinstance(value, list):
        return tuple(str(item) for item in value)
    return value


_GpuCount = Annotated[int, Field(ge=0, le=100_000)]
ClusterGpus = Annotated[Literal["auto"] | _GpuCount | tuple[str, ...], BeforeValidator(_gpus_words)]
Cpus = Annotated[float, Field(gt=0, le=1_000_000, allow_inf_nan=False)] | None


def _unless(fits: Callable[[str], object], words: str) -> AfterValidator:
    """Return a validator that refuses non-empty text that does not fit; `words` follow the text in the message."""

    def check(value: str) -> str:
        if value and not fits(value):
            msg = f"{value!r} {words}"
            raise ValueError(msg)
        return value

    return AfterValidator(check)


def _is_address(text: str) -> bool:
    address, percent, interface = text.partition("%")
    if percent and not _INTERFACE.fullmatch(interface):
        return False
    try:
        ipaddress.ip_address(address)
    except ValueError:
        return False
    return True


def _is_path(text: str) -> bool:
    return text.isprintable() and not text.startswith("-")


def _is_jump(text: str) -> bool:
    if text == "none":
        return True
    try:
        hop = _host_from_text(text)
    except ValueError:
        return False
    return not text.startswith("ssh://") and bool(_USER.fullmatch(str(hop.get("user", "x"))))


_Name = Annotated[
    str,
    _unless(_LABEL.fullmatch, "is not a host's name; use letters, digits, '.', '_' and '-', at most 63"),
]
_Address = Annotated[str, _unless(_is_address, "is not an IP address, which Ray needs to bind to; names go into host")]
_Fingerprint = Annotated[
    str,
    _unless(_FINGERPRINT.fullmatch, "is not a fingerprint; copy SHA256:… from the output of: ssh-keygen -lf KEY"),
]
_User = Annotated[str, _unless(_USER.fullmatch, "is not an account's name; use letters, digits, '.', '_', '-' and '@'")]
_Interface = Annotated[str, _unless(_INTERFACE.fullmatch, "is not the name of a network interface, for example eth0")]
_Path = Annotated[str, _unless(_is_path, "is not a path: it starts with - or contains control characters")]
_Jump = Annotated[str, _unless(_is_jump, "is not a jump host; write host, user@host or user@host:port, or none")]


class HostDefaults(Spec):
    """Settings for every host of the cluster; a host may override them."""

    user: _User = ""
    """The account to log in as; default from `~/.ssh/config`, else yours. It need not be root. Example: `ml`"""
    port: Annotated[int, Field(ge=1, le=LARGEST_PORT)] | None = None
    """The port of sshd; default from `~/.ssh/config`, else 22. Example: `2222`"""
    key: _Path = ""
    """The private key to log in with; default ssh-agent, `~/.ssh/config` and the usual files. It is never copied.
    Example: `~/.ssh/id_dgx`"""
    jump: Annotated[tuple[_Jump, ...], BeforeValidator(as_list)] = ()
    """The jump hosts, in order, as in `ProxyJump`. Example: `[gate.example.org]`"""
    interface: _Interface = ""
    """The network interface for Ray, NCCL and Gloo; default the one that has the host's address on the cluster's
    network. Example: `ens1f0np0`"""
    gpus: ClusterGpus = "auto"
    """As for the cluster: `auto`, a list of indices or UUIDs, or a number. Example: `[0, 1, 2, 3]`"""
    cpus: Cpus = None
    """CPU cores that jobs may use there; default all. Example: `64`"""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels of the node, for `where` in jobs; added to those of all hosts. Example: `{disk: nvme}`"""
    root: _Path = ""
    """raylaunch's folder on the host; default `~/.raylaunch`. Example: `/raid/ml/raylaunch`"""
    environment: str = ""
    """An existing Python environment to run Ray in, instead of one that raylaunch makes: `venv:PATH`, `conda:NAME`, or
    the path of an interpreter. Example: `conda:ray`"""
    env: Variables = Field(default_factory=dict)
    """Environment variables of all programs there; added to those of all hosts. Example: `{HF_HOME: /raid/hf}`"""

    @field_validator("environment")
    @classmethod
    def _environment_is_one_that_is_there(cls, value: str) -> str:
        if value and Environment.model_validate(value).kind not in {"python", "venv", "conda"}:
            msg = f"{value!r} is for jobs; a host needs an existing environment: venv:PATH, conda:NAME, /path/to/python"
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
    """One host: a name, or an object with `host` and settings of its own."""

    host: str
    """Its name for ssh, from `~/.ssh/config` or DNS, or its address; `user@host:port` works too.
    Example: `dgx-1.example.org`"""
    name: _Name = ""
    """Its name here and in `where`; default the first part of `host`. Example: `dgx-1`"""
    address: _Address = ""
    """Its address on the cluster's network, if that is not the one that ssh connects to. Example: `10.0.0.1`"""
    fingerprint: _Fingerprint = ""
    """The expected host key; default as in known_hosts.
    Example: `SHA256:uNiVztksCsDhcc0u9e8BgrJXVGbmkfEyjFn8WEgbPGI`"""
    store: _Path = ""
    """The folder for records, logs and outputs; only for the first host. Example: `/raid/ml/store`"""

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


def _host_from_text(text: str) -> dict[str, object]:
    """Read ``[ssh://][user@]host[:port]``; an IPv6 address with a port needs brackets."""
    user, _, rest = text.strip().removeprefix("ssh://").rstrip("/").rpartition("@")
    host, port = rest, ""
    if rest.startswith("["):
        host, _, port = rest[1:].partition("]")
        port = port.removeprefix(":")
    elif rest.count(":") == 1:
        host, _, port = rest.partition(":")
    if not (_HOST.fullmatch(host) or _is_address(host)) or (port and not port.isdigit()):
        msg = f"{text!r} is not a host; write [user@]HOST[:port] with a name from ~/.ssh/config or DNS, or an address"
        raise ValueError(msg)
    return {"host": host} | ({"user": user} if user else {}) | ({"port": int(port)} if port else {})


def _short_name(host: str) -> str:
    return host.replace(":", "-").replace("%", "-") if _is_address(host) else host.partition(".")[0]


def name_as_written(host: object) -> str:
    """Return the name that a host will get, from its entry in the file; empty if the entry is invalid."""
    if isinstance(host, HostSpec):
        return host.name or _short_name(host.host)
    if isinstance(host, Mapping):
        return str(host.get("name") or "") or name_as_written(host.get("host"))
    try:
        return _short_name(str(_host_from_text(str(host))["host"]))
    except ValueError:
        return ""


def named(hosts: Sequence[HostSpec]) -> tuple[HostSpec, ...]:
    """Give a name to each host that has none: the first part of `host`, or all of it if the part is not unique."""
    short = Counter(host.name or _short_name(host.host) for host in hosts)

    def name(host: HostSpec) -> str:
        chosen = host.name or _short_name(host.host)
        return chosen if host.name or short[chosen] == 1 else host.host

    return tuple(host.model_copy(update={"name": name(host)}) for host in hosts)


def refuse_doubles(hosts: Sequence[HostSpec]) -> None:
    """Refuse two hosts with the same host, name or address.

    Raises:
        PlacedError: there are two.
    """
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


def merged(
    host: HostSpec, defaults: HostDefaults, cluster: Mapping[str, object], common_env: Mapping[str, str]
) -> HostSpec:
    """Return a host with the settings that it leaves out: from the defaults, else from the cluster."""
    changes: dict[str, object] = {}
    for field in HostDefaults.model_fields:
        if field in host.model_fields_set or field in {"labels", "env"}:
            continue
        if field in defaults.model_fields_set:
            changes[field] = getattr(defaults, field)
        elif field in {"gpus", "cpus"}:
            changes[field] = cluster.get(field, getattr(host, field))
    labels = cluster.get("labels")
    changes["labels"] = {**(labels if isinstance(labels, dict) else {}), **defaults.labels, **host.labels}
    changes["env"] = {**common_env, **defaults.env, **host.env}
    return host.model_copy(update=changes)
