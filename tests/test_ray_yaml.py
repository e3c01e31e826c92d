"""Ray's own cluster.yaml: what it says of machines is taken over, of the rest each key is named with why."""

from __future__ import annotations

from pathlib import Path

import pytest

from raylaunch.config.load import ClusterFile, load_cluster_file
from raylaunch.errors import SpecError

# As Ray's documentation has it for on-premise clusters, with what people put there.
EXAMPLE = """\
cluster_name: lab
max_workers: 2
upscaling_speed: 1.0
docker:
    image: rayproject/ray-ml:latest-gpu
    container_name: ray_container
idle_timeout_minutes: 5
provider:
    type: local
    head_ip: 10.0.0.1
    worker_ips: [10.0.0.2, 10.0.0.3]
auth:
    ssh_user: ubuntu
    ssh_private_key: ~/.ssh/id_lab
    ssh_proxy_command: ssh -W %h:%p ubuntu@gate
min_workers: 0
file_mounts: {
    "/home/data": "/data",
}
cluster_synced_files: []
file_mounts_sync_continuously: False
rsync_exclude:
    - "**/.git"
initialization_commands: []
setup_commands:
    - pip install torch
head_setup_commands: []
worker_setup_commands: []
head_start_ray_commands:
    - mkdir -p /tmp/ray
    - ulimit -c unlimited && ray start --head --port=6379 --num-gpus=4 --object-store-memory 1000000000
worker_start_ray_commands:
    - mkdir -p /tmp/ray
    - ray start --address=$RAY_HEAD_IP:6379 --num-gpus 8
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(text: str) -> ClusterFile:
    Path("ray.yaml").write_text(text, encoding="utf-8")
    return load_cluster_file(Path("ray.yaml"))


@pytest.mark.usefixtures("folder")
def test_rays_own_file_is_a_cluster_with_its_machines_and_its_login() -> None:
    spec = read(EXAMPLE).spec
    assert (spec.name, spec.kind) == ("lab", "ssh")
    assert [(host.host, host.gpus) for host in spec.hosts] == [("10.0.0.1", 4), ("10.0.0.2", 8), ("10.0.0.3", 8)]
    assert {(host.user, host.key, host.jump) for host in spec.hosts} == {("ubuntu", "~/.ssh/id_lab", ("ubuntu@gate",))}


@pytest.mark.usefixtures("folder")
def test_each_key_without_a_meaning_here_is_named_with_why_in_the_order_of_the_file() -> None:
    assert [note.split(": ")[:2] for note in read(EXAMPLE).notes] == [
        ["ray.yaml:2", "max_workers is ignored"],
        ["ray.yaml:3", "upscaling_speed is ignored"],
        ["ray.yaml:4", "docker is ignored"],
        ["ray.yaml:7", "idle_timeout_minutes is ignored"],
        ["ray.yaml:17", "file_mounts is ignored"],
        ["ray.yaml:22", "rsync_exclude is ignored"],
        ["ray.yaml:25", "setup_commands is ignored"],
        ["ray.yaml:29", "head_start_ray_commands is ignored"],
        ["ray.yaml:32", "worker_start_ray_commands is ignored"],
    ]


@pytest.mark.usefixtures("folder")
def test_a_note_says_what_to_use_instead() -> None:
    notes = {note.split(" ")[1]: note for note in read(EXAMPLE).notes}
    assert "environment: {pip: [..]}" in notes["setup_commands"]
    assert notes["head_start_ray_commands"].endswith("left out: --object-store-memory=1000000000")
    assert "environment" in notes["docker"]


@pytest.mark.usefixtures("folder")
def test_a_small_file_has_nothing_to_say() -> None:
    found = read("cluster_name: lab\nprovider: {type: local, head_ip: dgx}\n")
    assert found.notes == ()
    assert [host.host for host in found.spec.hosts] == ["dgx"]


@pytest.mark.usefixtures("folder")
def test_a_proxy_command_of_another_kind_belongs_into_the_configuration_of_ssh() -> None:
    auth = "auth: {ssh_user: u, ssh_proxy_command: 'nc -x proxy:1080 %h %p', ssh_public_key: k}"
    notes = read(f"cluster_name: lab\nprovider: {{type: local, head_ip: dgx}}\n{auth}\n").notes
    assert [note.split(" is ignored: ")[0] for note in notes] == [
        "ray.yaml:3: auth.ssh_proxy_command",
        "ray.yaml:3: auth.ssh_public_key",
    ]
    assert "~/.ssh/config" in notes[0]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "cluster_name: lab\nprovider:\n  type: aws\n  region: r\n",
            "ray.yaml:2: provider type 'aws' creates machines",
        ),
        (
            "cluster_name: lab\nprovider: {type: local, coordinator_address: 'a:1'}\n",
            "ray.yaml:2: coordinator_address lends machines",
        ),
        (
            "cluster_name: lab\nprovider: {type: local}\n",
            "ray.yaml:2: provider needs head_ip (one address) and worker_ips (a list of them)",
        ),
        (
            "cluster_name: lab\nprovider: {type: local, head_ip: a}\nsetup_comands: [x]\n",
            "ray.yaml:3: unknown key 'setup_comands' in Ray's cluster.yaml (nearest: setup_commands)",
        ),
        (
            "cluster_name: lab\nprovider:\n  type: local\n  head_ip: a\n  worker_ips:\n    - b\n    - a\n",
            "ray.yaml:7: host a is given twice; list each host once",
        ),
        (
            "cluster_name: my lab\nprovider: {type: local, head_ip: a}\n",
            "ray.yaml:1: name: 'my lab' is not a cluster name; use letters, digits, '.', '_' and '-'",
        ),
        (
            "cluster_name: lab\nprovider: local\n",
            "ray.yaml:2: provider is a mapping of keys to values in Ray's cluster.yaml",
        ),
    ],
)
def test_what_cannot_be_taken_over_is_refused_with_its_line(text: str, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        read(text)
    assert str(caught.value).startswith(words)
