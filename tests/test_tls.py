"""Certificates of a cluster's Rays: who issues them, what they cover, and which of them a node has."""

from __future__ import annotations

import ipaddress
import json
import ssl
import stat
import subprocess
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from cryptography import x509

from raylaunch.cluster import tls
from raylaunch.cluster.local.controller_process import write_config
from raylaunch.cluster.local.existing import check_certificates
from raylaunch.cluster.local.inspect import differences
from raylaunch.cluster.ports import own_addresses
from raylaunch.cluster.record import new_record
from raylaunch.controller.ray.protocol import child_environment
from raylaunch.errors import SpecError
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.paths import ClusterPaths, cluster_paths, make_cluster_dirs


@pytest.fixture
def paths(home: Path) -> ClusterPaths:
    paths = cluster_paths("lab", {"RAYLAUNCH_HOME": str(home)})
    make_cluster_dirs(paths)
    return paths


def addresses(certificate: str) -> set[str]:
    loaded = x509.load_pem_x509_certificate(certificate.encode())
    names = loaded.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {str(one) for one in names.get_values_for_type(x509.IPAddress)}


def test_a_certificate_covers_the_nodes_addresses_and_loopback_for_ten_years(paths: ClusterPaths) -> None:
    found = tls.issue(paths, "dgx-2", ["10.0.0.2", "fd00::2"])
    assert addresses(found.certificate) == {"10.0.0.2", "fd00::2", "127.0.0.1"}
    for text in (found.certificate, found.authority):
        until = x509.load_pem_x509_certificate(text.encode()).not_valid_after_utc
        assert until - datetime.now(timezone.utc) > timedelta(days=3650)


def test_one_authority_issues_all_and_openssl_agrees(paths: ClusterPaths, tmp_path: Path) -> None:
    one, two = (tls.issue(paths, name, ["10.0.0.9"]) for name in ("dgx-1", "dgx-2"))
    assert one.authority == two.authority
    assert one.key != two.key
    (tmp_path / "ca.crt").write_text(one.authority)
    for purpose in ("sslserver", "sslclient"):
        (tmp_path / "node.crt").write_text(two.certificate)
        words = ["openssl", "verify", "-purpose", purpose, "-CAfile", "ca.crt", "node.crt"]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=30)
        assert done.returncode == 0, done.stderr


def test_keys_can_be_read_by_nobody_else_and_load(paths: ClusterPaths) -> None:
    until = tls.keep(paths, tls.issue(paths, "head", []))
    assert until > datetime.now(timezone.utc).timestamp() + 3650 * 24 * 3600
    assert stat.S_IMODE(paths.tls.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in paths.tls.iterdir()} == {0o600}
    found = tls.variables_of(paths)
    context = ssl.create_default_context(cafile=found["RAY_TLS_CA_CERT"])
    context.load_cert_chain(found["RAY_TLS_SERVER_CERT"], found["RAY_TLS_SERVER_KEY"])
    assert found["RAY_USE_TLS"] == "1"


def test_the_secret_key_is_in_no_repr(paths: ClusterPaths) -> None:
    assert "PRIVATE KEY" not in repr(tls.issue(paths, "head", []))


def test_a_client_on_the_head_itself_has_files_of_its_own(paths: ClusterPaths) -> None:
    assert tls.variables_of(paths, client=True) == {}
    tls.keep(paths, tls.issue(paths, "head", []))
    tls.keep(paths, tls.issue(paths, "client", []), client=True)
    node, client = tls.variables_of(paths), tls.variables_of(paths, client=True)
    assert Path(node["RAY_TLS_SERVER_KEY"]).read_text() != Path(client["RAY_TLS_SERVER_KEY"]).read_text()


def test_a_node_knows_whether_its_certificate_is_of_the_heads_authority(home: Path, paths: ClusterPaths) -> None:
    other = cluster_paths("other", {"RAYLAUNCH_HOME": str(home)})
    make_cluster_dirs(other)
    ours = tls.issue(paths, "dgx-2", [])
    assert not tls.has_authority(other, ours)
    tls.keep(other, ours)
    assert tls.has_authority(other, tls.issue(paths, "dgx-2", []))
    assert not tls.has_authority(other, tls.issue(other, "dgx-2", []))


@pytest.mark.parametrize(
    ("facts", "uses"),
    [
        ({"hosts": ["a", "b"]}, True),
        ({"hosts": ["a", "b"], "tls": False}, False),
        ({"hosts": ["a"]}, False),
        ({"hosts": ["a"], "bind": "network"}, True),
        ({}, False),
        ({"tls": True}, True),
    ],
    ids=["several hosts", "switched off", "one host", "one that may grow", "this machine", "switched on"],
)
def test_ray_on_the_network_uses_tls_by_default(facts: dict[str, object], *, uses: bool) -> None:
    spec = ClusterSpec.model_validate({"name": "lab", **facts})
    assert spec.uses_tls is uses
    for host in spec.host_specs():
        assert spec.part_of(host).uses_tls is uses


def test_a_cluster_without_tls_reports_how_to_turn_it_on(paths: ClusterPaths) -> None:
    """As one that 0.1.0 started: its record says nothing of TLS."""
    spec = ClusterSpec(name="lab", tls=True)
    had = new_record(ClusterSpec(name="lab"), paths).with_(wanted="running")
    (output,) = [line for line in differences(spec, had) if "tls" in line]
    assert "raylaunch down, then raylaunch up" in output
    assert differences(ClusterSpec(name="lab"), had) == ()


def test_addresses_of_this_machine_are_such_as_a_certificate_can_have() -> None:

    assert all(ipaddress.ip_address(one) for one in own_addresses())


def test_a_ray_that_somebody_else_runs_with_tls_is_spoken_to_with_the_files_that_are_named(
    paths: ClusterPaths, tmp_path: Path
) -> None:
    files = {name: str(tmp_path / name) for name in ("ca", "certificate", "key")}
    spec = ClusterSpec.model_validate({"name": "theirs", "address": "http://ray:8265", "ray_tls": files})
    with pytest.raises(SpecError, match="cannot be read") as refused:
        check_certificates(spec)
    assert refused.value.field == "ray_tls.ca"
    for file in files.values():
        Path(file).touch()
    check_certificates(spec)
    write_config(paths, new_record(spec, paths).with_(ports={"controller": 1}))
    reported = json.loads(paths.controller_config.read_bytes())["ray_env"]
    assert reported == tls.ray_variables(files["ca"], files["certificate"], files["key"])
    env = child_environment({"RAY_USE_TLS": "0"}, paths.ray_token, reported)
    assert env.items() >= reported.items()
