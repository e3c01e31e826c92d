"""``raylaunch init``: the cluster.yaml that it writes, and what it says."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from support.cli import run_cli

from raylaunch.cli.init import cluster_text
from raylaunch.config.load import load_cluster_file
from raylaunch.models.cluster_spec import ClusterSpec


def init(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run_cli(words, cwd=folder, env={"HOME": str(folder), "PATH": "/usr/bin:/bin"})


def test_a_file_is_written_that_says_the_hosts_as_they_were_given(tmp_path: Path) -> None:
    done = init(tmp_path, "init", "lab", "dgx-1.example.org", "ml@dgx-2.example.org:2222", "10.0.0.3")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "cluster.yaml: cluster lab of 3 hosts: dgx-1 (the head), dgx-2, 10.0.0.3\n"
        "Next: raylaunch doctor, then raylaunch up\n"
    )
    spec = load_cluster_file(tmp_path / "cluster.yaml").spec
    assert (spec.name, spec.kind) == ("lab", "ssh")
    assert [(host.host, host.user, host.port) for host in spec.hosts] == [
        ("dgx-1.example.org", "", None),
        ("dgx-2.example.org", "ml", 2222),
        ("10.0.0.3", "", None),
    ]


def test_a_single_word_is_a_host_and_the_clusters_name(tmp_path: Path) -> None:
    assert init(tmp_path, "init", "ml@dgx.example.org").returncode == 0
    spec = load_cluster_file(tmp_path / "cluster.yaml").spec
    assert (spec.name, [host.host for host in spec.hosts]) == ("dgx", ["dgx.example.org"])


@pytest.mark.parametrize(
    "word", ["dgx", "ml@dgx:2222", "[fd00::1]:22", "fd00::1", "no", "1", "10.0.0.1", "a_b", "ssh://ml@dgx"]
)
def test_what_is_written_is_read_back_as_it_was_meant(tmp_path: Path, word: str) -> None:
    (tmp_path / "cluster.yaml").write_text(cluster_text("lab", [word]))
    assert load_cluster_file(tmp_path / "cluster.yaml").spec == ClusterSpec.model_validate(
        {"name": "lab", "hosts": [word]}
    )


def test_everything_in_its_comments_is_understood_where_it_stands(tmp_path: Path) -> None:
    lines = []
    for line in cluster_text("lab", ["dgx-1.example.org"]).splitlines():
        field = re.match(r"# ?((  - |  +)?\w+:( .*)?)$", line)
        lines.append((line[1:] if line.startswith("#  ") else line[2:]) if field else line)
    (tmp_path / "cluster.yaml").write_text("\n".join(lines))
    spec = load_cluster_file(tmp_path / "cluster.yaml").spec
    assert spec.model_fields_set >= {"name", "hosts", "defaults", "store", "environment", "env", "secrets", "bind"}
    assert spec.defaults.model_fields_set == {"user", "key", "jump", "root"}
    assert {"gpus", "address", "interface", "labels"} <= spec.hosts[1].model_fields_set


def test_a_file_that_is_there_stays_unless_it_is_forced(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("name: mine\n")
    done = init(tmp_path, "init", "lab", "10.0.0.1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: cluster.yaml already exists\n  → replace it: --force; or write another one: raylaunch -c FILE init …\n"
    )
    assert (tmp_path / "cluster.yaml").read_text() == "name: mine\n"
    assert init(tmp_path, "init", "lab", "10.0.0.1", "--force").returncode == 0
    assert load_cluster_file(tmp_path / "cluster.yaml").spec.name == "lab"


def test_another_file_is_named_as_everywhere(tmp_path: Path) -> None:
    assert init(tmp_path, "-c", "lab.yaml", "init", "lab", "10.0.0.1").returncode == 0
    assert load_cluster_file(tmp_path / "lab.yaml").spec.name == "lab"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            (),
            (
                "error: no host was given\n"
                "  → name the cluster and its hosts, the head first: raylaunch init lab dgx-1 dgx-2\n"
            ),
        ),
        (("lab", "10.0.0.1", "10.0.0.1"), "error: host 10.0.0.1 is given twice; list each host once\n"),
        (
            ("lab", "a b"),
            (
                "error: hosts.0: 'a b' is not a host; write [user@]HOST[:port] with a name from ~/.ssh/config or DNS, "
                "or an address\n"
            ),
        ),
        (
            ("my lab", "10.0.0.1"),
            "error: name: 'my lab' is not a cluster name; use letters, digits, '.', '_' and '-'\n",
        ),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    tmp_path: Path, words: tuple[str, ...], expected: str
) -> None:
    done = init(tmp_path, "init", *words)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)
    assert not (tmp_path / "cluster.yaml").exists()


def test_rays_own_file_becomes_one_of_ours_with_what_was_left_out_in_comments(tmp_path: Path) -> None:
    (tmp_path / "ray.yaml").write_text(
        "cluster_name: lab\nprovider: {type: local, head_ip: 10.0.0.1, worker_ips: [10.0.0.2]}\n"
        "auth: {ssh_user: ubuntu, ssh_private_key: ~/.ssh/id}\nsetup_commands: [pip install torch]\n"
        "head_start_ray_commands: [ray start --head --num-gpus=4]\n"
    )
    done = init(tmp_path, "init", "--from", "ray.yaml")
    assert done.returncode == 0, done.stderr
    spec = load_cluster_file(tmp_path / "cluster.yaml").spec
    assert [(host.host, host.gpus, host.user, host.key) for host in spec.hosts] == [
        ("10.0.0.1", 4, "ubuntu", "~/.ssh/id"),
        ("10.0.0.2", "auto", "ubuntu", "~/.ssh/id"),
    ]
    assert "#   ray.yaml:4: setup_commands is ignored" in (tmp_path / "cluster.yaml").read_text()
