"""cluster.yaml for hosts: names and objects, defaults and overrides, and what is refused with which words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from raylaunch.config.load import load_cluster_file
from raylaunch.errors import SpecError
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.models.fields import Environment
from raylaunch.models.host_spec import HostDefaults, HostSpec

Written = Callable[[str], ClusterSpec]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Written:
    """Give the spec that a cluster.yaml with a text says."""
    monkeypatch.chdir(tmp_path)

    def read(text: str) -> ClusterSpec:
        Path("cluster.yaml").write_text(text, encoding="utf-8")
        return load_cluster_file(Path("cluster.yaml")).spec

    return read


def refusal(written: Written, text: str) -> str:
    with pytest.raises(SpecError) as caught:
        written(text)
    return str(caught.value)


def test_a_file_with_only_hosts_is_a_cluster_over_ssh_named_after_its_head(written: Written) -> None:
    spec = written("hosts: [dgx-1.example.org, dgx-2.example.org]\n")
    assert (spec.kind, spec.name) == ("ssh", "dgx-1")
    assert [(host.name, host.host) for host in spec.host_specs()] == [
        ("dgx-1", "dgx-1.example.org"),
        ("dgx-2", "dgx-2.example.org"),
    ]


def test_a_host_is_a_name_or_an_object(written: Written) -> None:
    spec = written("""
name: dgx
hosts:
  - dgx-1
  - host: spark
    address: 10.0.0.2
    interface: enp1s0f0np0
    gpus: 1
    labels: {kind: spark}
""")
    plain, spark = spec.hosts
    assert plain == HostSpec(host="dgx-1", name="dgx-1")
    assert (spark.address, spark.interface, spark.gpus) == ("10.0.0.2", "enp1s0f0np0", 1)
    assert spark.labels == {"kind": "spark"}


@pytest.mark.parametrize(
    ("text", "host", "user", "port"),
    [
        ("ml@dgx", "dgx", "ml", None),
        ("dgx:2222", "dgx", "", 2222),
        ("ml@10.0.0.1:22", "10.0.0.1", "ml", 22),
        ("fd00::2", "fd00::2", "", None),
        ("ml@[fd00::2]:2222", "fd00::2", "ml", 2222),
        ("ssh://ml@dgx:2222", "dgx", "ml", 2222),
    ],
)
def test_a_host_may_be_written_as_ssh_has_it(text: str, host: str, user: str, port: int | None) -> None:
    read = HostSpec.model_validate(text)
    assert (read.host, read.user, read.port) == (host, user, port)


def test_an_ipv6_host_has_a_name_that_labels_can_bear() -> None:
    spec = ClusterSpec(name="c", kind="ssh", hosts=(HostSpec(host="fd00::2"), HostSpec(host="10.0.0.1")))
    assert [host.name for host in spec.hosts] == ["fd00--2", "10.0.0.1"]


def test_hosts_with_equal_first_labels_keep_their_full_names(written: Written) -> None:
    spec = written("name: both\nhosts: [dgx.north.example.org, dgx.south.example.org]\n")
    assert [host.name for host in spec.hosts] == ["dgx.north.example.org", "dgx.south.example.org"]


def test_defaults_apply_to_all_hosts_unless_a_host_overrides_them(written: Written) -> None:
    spec = written("""
name: lab
gpus: [0, 1]
labels: {site: north}
defaults:
  user: ml
  jump: gate
  labels: {disk: nvme}
  env: {TMPDIR: /raid/tmp}
hosts:
  - a
  - {host: b, user: root, jump: [], gpus: auto, labels: {disk: hdd}}
""")
    a, b = spec.host_specs()
    assert (a.user, a.jump, a.gpus, a.labels) == ("ml", ("gate",), ("0", "1"), {"site": "north", "disk": "nvme"})
    assert (b.user, b.jump, b.gpus, b.labels) == ("root", (), "auto", {"site": "north", "disk": "hdd"})
    assert a.env == b.env == {"TMPDIR": "/raid/tmp"}


def test_a_variable_that_one_host_overrides_is_stored_per_host(written: Written) -> None:
    spec = written("env: {HF_HOME: /raid/hf, LANG: C}\nhosts:\n  - a\n  - {host: b, env: {HF_HOME: /data/hf}}\n")
    assert spec.job_env == {"LANG": "C"}
    assert [host.env for host in spec.hosts] == [{"HF_HOME": "/raid/hf"}, {"HF_HOME": "/data/hf"}]


def test_a_spec_that_travelled_as_json_is_the_same(written: Written) -> None:
    spec = written("""
name: lab
env: {A: 1}
defaults: {user: ml, gpus: 2, env: {B: x}}
hosts: [a, {host: b, gpus: auto, env: {A: 2}}]
""")
    again = ClusterSpec.model_validate_json(spec.model_dump_json())
    assert again == spec
    assert again.hosts == spec.hosts


def test_python_and_the_file_build_the_same_spec() -> None:
    spec = ClusterSpec(name="lab", hosts=(HostSpec(host="a"),), defaults=HostDefaults(user="ml"))
    assert (spec.kind, spec.hosts[0].user) == ("ssh", "ml")


def test_the_store_of_the_cluster_is_that_of_its_head(written: Written) -> None:
    spec = written("store: /raid/store\nhosts: [a, b]\n")
    assert [host.store for host in spec.hosts] == ["/raid/store", ""]


def test_each_machine_receives_only_its_own_part(written: Written) -> None:
    spec = written("""
name: lab
store: /raid/store
secrets: [HF_TOKEN]
environment: conda:train
hosts: [a, {host: b, gpus: 1, cpus: 8, labels: {disk: hdd}}]
""")
    head, worker = (spec.part_of(host) for host in spec.hosts)
    assert (head.name, head.kind, head.store, head.gpus, head.secrets) == (
        "lab",
        "local",
        "/raid/store",
        "auto",
        ("HF_TOKEN",),
    )
    assert head.environment == Environment(kind="conda", value="train")
    assert (worker.gpus, worker.cpus, worker.labels, worker.store) == (1, 8, {"disk": "hdd"}, "")


def test_one_host_listens_on_loopback_unless_it_may_grow_and_several_on_the_network(written: Written) -> None:
    assert written("hosts: [a]\n").loopback
    assert not written("bind: network\nhosts: [a]\n").loopback
    assert not written("hosts: [a, b]\n").loopback


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        ("hosts: [a, b]\nbind: loopback\n", "cluster.yaml:2: bind", "2 hosts"),
        ("kind: ssh\n", "cluster.yaml:1", "needs hosts"),
        ("kind: local\nhosts: [a]\n", "cluster.yaml:2", "leave kind out"),
        ("name: local\nhosts: [a]\n", "cluster.yaml:1", "'local' is reserved"),
        ("bind: network\n", "cluster.yaml:1: bind", "kind: ssh"),
        ("name: far\naddress: http://ray:8265\ngcs: none\n", "cluster.yaml:3: gcs", "Ray's own ports"),
        ("hosts:\n  - a\n  - b\n  - A\n", "cluster.yaml:4", "host A is given twice"),
        (
            "hosts:\n  - {host: a, name: x}\n  - host: b\n    name: x\n",
            "cluster.yaml:4",
            "name x is given twice (a and b)",
        ),
        (
            "hosts:\n  - {host: a, address: 10.0.0.1}\n  - {host: b, address: 10.0.0.1}\n",
            "cluster.yaml:3",
            "address 10.0.0.1 is given twice (a and b)",
        ),
        ("hosts:\n  - a\n  - host: b\n    store: /raid\n", "cluster.yaml:4", "b is not the head"),
        ("hosts:\n  - host: a\n    adress: 10.0.0.1\n", "cluster.yaml:3", "'adress' in hosts.0 (nearest: address)"),
        ("user: ml\nhosts: [a]\n", "cluster.yaml:1", "'user' (nearest: defaults.user)"),
        (
            "defaults:\n  fingerprint: x\nhosts: [a]\n",
            "cluster.yaml:2",
            "'fingerprint' in defaults (known: user, port, ",
        ),
        ("hosts:\n  - a b\n", "cluster.yaml:2: hosts.0", "'a b' is not a host"),
        ("hosts:\n  - host: ml@a\n    user: root\n", "cluster.yaml:3: hosts.0", "in host (ml) and as user (root)"),
        ("hosts:\n  - a\n  - off\n", "cluster.yaml:3: hosts.1", "needs quotes"),
        ("hosts:\n  - {name: a}\n", "cluster.yaml:2", "'hosts.0.host' is missing"),
        (
            "hosts:\n  - host: a\n    address: a.example.org\n",
            "cluster.yaml:3: hosts.0.address",
            "'a.example.org' is not an IP address",
        ),
        ("hosts:\n  - host: a\n    environment: uv\n", "cluster.yaml:3: hosts.0.environment", "'uv' is for jobs"),
        (
            "hosts:\n  - host: a\n    fingerprint: aa:bb\n",
            "cluster.yaml:3: hosts.0.fingerprint",
            "'aa:bb' is not a fingerprint",
        ),
        (
            "hosts:\n  - host: a\n    labels: {site: north and south}\n",
            "cluster.yaml:3: hosts.0.labels",
            "site has the value 'north and south'",
        ),
        ("env: {CUDA_VISIBLE_DEVICES: 0}\n", "cluster.yaml:1: env", "resources.gpus"),
        ("secrets: [sk-123]\n", "cluster.yaml:1: secrets", "raylaunch secret set NAME"),
    ],
)
def test_an_invalid_cluster_is_refused_with_the_line_and_a_fix(
    written: Written, text: str, where: str, words: str
) -> None:
    refused = refusal(written, text)
    assert refused.startswith(f"{where}: ")
    assert words in refused


def test_errors_of_a_host_and_of_the_defaults_are_both_reported(written: Written) -> None:
    message = refusal(written, "defaults: {port: 99999}\nhosts:\n  - {host: a, gpus: some}\n")
    assert "cluster.yaml:1: defaults.port: 99999 is more than 65535" in message
    assert "cluster.yaml:3: hosts.0.gpus: 'some' is not 'auto', a whole number or a list" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("jump", "-oProxyCommand=touch x"),
        ("jump", "gate -oProxyCommand=x"),
        ("jump", "root;id@gate"),
        ("user", "-oProxyCommand=x"),
        ("user", "ml\nroot"),
        ("interface", "eth0;reboot"),
        ("interface", "eth0\nExecStart=x"),
        ("root", "-rf"),
        ("root", "/raid\nExecStart=/bin/sh"),
        ("key", "-oProxyCommand=x"),
        ("store", "/raid\x1b[2J"),
        ("address", "fe80::1%eth0;reboot"),
        ("address", "10.0.0.1%-x y"),
    ],
)
def test_values_for_ssh_and_unit_files_are_checked_when_the_file_is_read(field: str, value: str) -> None:
    with pytest.raises(ValidationError):
        ClusterSpec.model_validate({"name": "lab", "hosts": [{"host": "gate", field: value}]})


@pytest.mark.parametrize(
    ("field", "value"),
    [("jump", "ml@gate.example.org:2222"), ("user", "ml.smith"), ("root", "~/my files"), ("address", "fe80::1%eth0")],
)
def test_common_values_are_accepted(field: str, value: str) -> None:
    assert ClusterSpec.model_validate({"name": "lab", "hosts": [{"host": "gate", field: value}]})
