"""``init``: a commented cluster.yaml from the names of hosts, or from Ray's own cluster.yaml."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
from pydantic import ValidationError

from raylaunch.cli.console import count, say
from raylaunch.cluster.trust import accept
from raylaunch.config.load import CLUSTER_FILE, load_cluster_file
from raylaunch.config.validation import spec_error
from raylaunch.errors import ConflictError, SpecError, StorageError
from raylaunch.models.cluster_spec import ClusterSpec

_PLAIN = re.compile(r"[A-Za-z/~][\w./@~-]*")


@click.command(epilog="Example:  raylaunch init lab dgx-1 dgx-2   then:  raylaunch doctor && raylaunch up")
@click.argument("name", required=False, default="")
@click.argument("hosts", nargs=-1, metavar="[HOST]...")
@click.option("--from", "ray_file", type=click.Path(path_type=Path), help="Convert Ray's own cluster.yaml.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.pass_obj
def init(cluster_file: Path | None, name: str, hosts: tuple[str, ...], *, ray_file: Path | None, force: bool) -> None:
    """Write cluster.yaml for the cluster NAME on HOSTs; the first is the head.

    Write a HOST as you would for ssh: a name from ~/.ssh/config, a DNS name or an address, with user@ and :port if
    needed. A single argument is a host, and the cluster gets its name.
    """
    if ray_file is not None:
        text, spec = _from_ray(ray_file, name)
    else:
        spec = _spec_of(name, hosts)
        text = cluster_text(spec.name, [word for word in (hosts or (name,)) if word])
    target = cluster_file or Path(CLUSTER_FILE)
    _write(target, text, force=force)
    if ray_file is None:  # a person has typed these hosts
        accept(spec)
    names = [f"{host.name} (the head)" if at == 0 else host.name for at, host in enumerate(spec.hosts)]
    say(f"{target}: cluster {spec.name} of {count(len(names), 'host')}: {', '.join(names)}")
    say("Next: raylaunch doctor, then raylaunch up")


def _spec_of(name: str, hosts: Sequence[str]) -> ClusterSpec:
    if not name:
        msg = "no host was given"
        raise SpecError(msg, hint="name the cluster and its hosts, the head first: raylaunch init lab dgx-1 dgx-2")
    data: dict[str, object] = {"name": name, "hosts": list(hosts)} if hosts else {"hosts": [name]}
    try:
        return ClusterSpec.model_validate(data)
    except ValidationError as error:
        raise spec_error(error, ClusterSpec, data, lambda _path: "") from None


def cluster_text(name: str, hosts: Sequence[str]) -> str:
    """Return the text of a cluster.yaml for these hosts, with further settings in comments."""
    return _text(name, [{"host": host} for host in hosts], {}, ())


def _from_ray(path: Path, name: str) -> tuple[str, ClusterSpec]:
    if name:
        msg = "hosts and --from exclude each other"
        raise SpecError(msg, hint="leave one of them out")
    file = load_cluster_file(path)
    if file.spec.kind != "ssh":
        msg = f"{path} does not describe a cluster of hosts"
        raise SpecError(msg, hint="name Ray's own cluster.yaml, with provider: {type: local, …}")
    spec = file.spec
    defaults = spec.defaults.model_dump(exclude_defaults=True, mode="json")
    own = {"gpus", "cpus"} - defaults.keys()
    hosts = [{"host": host.host} | host.model_dump(include=own, exclude_defaults=True) for host in spec.hosts]
    return _text(spec.name, hosts, defaults, file.notes), spec


def _text(
    name: str, hosts: Sequence[Mapping[str, object]], defaults: Mapping[str, object], notes: Sequence[str]
) -> str:
    lines = [
        "# A cluster of hosts over SSH, for raylaunch: `raylaunch doctor` checks them, `raylaunch up` starts it.",
        "# Lines that start with # show further settings. Reference: docs/cluster.md",
        "",
        f"name: {_scalar(name)}",
        "",
        "# The first is the head: Ray's head and raylaunch's controller run there, and job results are stored there.",
        "hosts:",
        *(f"  - {_host_words(host)}" for host in hosts),
        "# A host that differs from the others is an object:",
        "#  - host: dgx-2.example.org",
        "#    gpus: [0, 1, 2, 3]            # only these, by index or UUID; or a number",
        "#    address: 10.0.0.2             # on the cluster's network, if ssh uses another one",
        "#    interface: ens1f0np0          # for NCCL and Gloo; by default the one that has the address",
        "#    labels: {kind: spark}         # for `where` in jobs",
        "",
        "# Settings of all hosts. ~/.ssh/config and ssh-agent are used as well; no key is copied to a host.",
        *(["defaults:"] if defaults else ["# defaults:"]),
        *(f"  {key}: {_scalar(value)}" for key, value in defaults.items()),
        *(line for key, line in _DEFAULTS.items() if key not in defaults),
        "",
        "# store: /raid/ml/store           # on the head: records, logs, outputs; by default in ~/.raylaunch",
        "# environment: conda:train        # the default Python environment of jobs",
        "# env: {HF_HOME: /raid/hf}        # environment variables of all jobs",
        "# secrets: [HF_TOKEN]             # secrets that all jobs get: raylaunch secret set HF_TOKEN",
        *(["# bind: network                   # so that other hosts can join later"] if len(hosts) == 1 else []),
    ]
    if notes:
        lines += ["", "# These settings of Ray's file have no counterpart:", *(f"#   {one}" for one in notes)]
    return "\n".join(lines) + "\n"


_DEFAULTS = {
    "user": "#  user: ml                       # need not be root, and needs no sudo",
    "key": "#  key: ~/.ssh/id_ed25519",
    "jump": "#  jump: [gate.example.org]       # jump hosts, as in ProxyJump",
    "root": "#  root: /raid/ml/raylaunch       # raylaunch's folder on each host, instead of ~/.raylaunch",
}


def _host_words(host: Mapping[str, object]) -> str:
    if set(host) == {"host"}:
        return _scalar(host["host"])
    return "{" + ", ".join(f"{key}: {_scalar(value)}" for key, value in host.items()) + "}"


def _scalar(value: object) -> str:
    """Return a value as YAML; text that YAML could read as something else is quoted."""
    plain = isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _YAML_WORDS
    return str(value) if plain else json.dumps(value, ensure_ascii=False)


_YAML_WORDS = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null", "~"})


def _write(target: Path, text: str, *, force: bool) -> None:
    try:
        with target.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        msg = f"{target} already exists"
        raise ConflictError(msg, hint="replace it: --force; or write another one: raylaunch -c FILE init …") from None
    except OSError as error:
        msg = f"{target} cannot be written: {error.strerror}"
        raise StorageError(msg) from None
