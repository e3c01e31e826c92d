"""What may be wrong between hosts, and with hosts that cannot be looked at; and that every word is explained."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.facts import SECOND, Changes, disk, facts, only, two_hosts

from raylaunch.cluster.doctor.checks_cluster import problems
from raylaunch.cluster.doctor.problem import CODES
from raylaunch.cluster.hosts.bootstrap import choose_pythons
from raylaunch.errors import (
    HostAuthError,
    HostKeyError,
    HostLostError,
    HostTimeoutError,
    HostUnreachableError,
    RaylaunchError,
)
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.models.host_spec import HostSpec

THIRD: Changes = {**SECOND, "hostname": "dgx-3", "system.boot_id": "0b2f8f1e-0004", "reached_at": "10.0.0.4"}


def test_two_healthy_dgxs_on_infiniband_have_no_problems() -> None:
    assert two_hosts() == ()


UNREACHABLE: tuple[tuple[str, RaylaunchError], ...] = (
    (
        "unreachable",
        HostUnreachableError("dgx-1: nobody listens on port 22", hint="is sshd running there?", host="dgx-1"),
    ),
    ("host_key", HostKeyError("dgx-1: it shows a key that is not known", hint="ssh dgx-1", host="dgx-1")),
    ("login_refused", HostAuthError("dgx-1: it takes none of the keys", hint="ssh-copy-id dgx-1", host="dgx-1")),
    ("connection_lost", HostLostError("dgx-1: the connection broke", hint="run it again", host="dgx-1")),
    ("probe_failed", HostTimeoutError("dgx-1: the probe did not end within 35 s", hint="look there", host="dgx-1")),
)


@pytest.mark.parametrize(("code", "error"), UNREACHABLE, ids=[code for code, _ in UNREACHABLE])
def test_a_host_that_cannot_be_checked_is_blocked_with_its_error(code: str, error: RaylaunchError) -> None:
    spec = ClusterSpec(name="lab", hosts=(HostSpec(host="dgx-1"), HostSpec(host="dgx-2")))
    found = problems(spec, {"dgx-1": error, "dgx-2": facts(changes=SECOND)})
    expected = error.message.removeprefix("dgx-1: ")
    assert [(one.host, one.code, one.level, one.message, one.mend) for one in found if one.host == "dgx-1"] == [
        ("dgx-1", code, "blocking", expected, error.hint)
    ]


def test_two_names_of_one_machine_are_blocked() -> None:
    spec = ClusterSpec(name="lab", hosts=(HostSpec(host="dgx-1"), HostSpec(host="dgx-1.example.org", name="again")))
    found = [one for one in problems(spec, {"dgx-1": facts(), "again": facts()}) if one.code == "same_machine"]
    assert [(one.host, one.level, one.message, one.mend) for one in found] == [
        (
            "again",
            "blocking",
            "dgx-1.example.org is the same machine as dgx-1 (dgx-1)",
            "list each machine once in cluster.yaml",
        )
    ]


def test_a_home_that_two_hosts_share_is_blocked() -> None:
    shared: Changes = {"disks.root": disk(mount="/home", kind="nfs4", source="filer:/home")}
    both = two_hosts({**shared, "disks.store": disk()}, first={**shared, "disks.store": disk()})
    assert only(both) == (
        "root_shared",
        "blocking",
        "dgx-2",
        "its folder /home/ml/.raylaunch is the same as that of dgx-1: both come from filer:/home",
        "set root to a folder on each host's own disk: defaults: {root: /raid/YOU/raylaunch}",
    )


def test_hosts_without_a_common_python_are_advised_which_to_install() -> None:
    found = two_hosts({"pythons": [{"path": "/usr/bin/python3", "version": "3.11.4", "has_venv": True}]})
    (one,) = found
    assert (one.code, one.level) == ("python_differs", "blocking")
    assert re.fullmatch(
        r"it has Python (3\.11|3\.10, 3\.12), others (3\.1[012]); Ray needs the same minor version on all nodes",
        one.message,
    )
    assert one.mend.startswith("without root: uv python install 3.1")


@pytest.mark.parametrize("others", [[], [{"path": "/usr/bin/python3", "version": "3.13.1"}]], ids=["none", "another"])
def test_a_host_without_a_suitable_python_does_not_block_the_others(others: list[dict[str, str]]) -> None:
    spec = ClusterSpec.model_validate({"name": "lab", "hosts": ["dgx-1", "dgx-2", "dgx-3"]})
    seen = {"dgx-1": facts(), "dgx-2": facts(changes=SECOND), "dgx-3": facts(changes={**THIRD, "pythons": others})}
    found = problems(spec, seen)
    assert {one.host for one in found if one.level == "blocking"} == {"dgx-3"}
    assert set(choose_pythons(spec.host_specs(), seen, found)) == {"dgx-1", "dgx-2"}


def test_the_chosen_python_matches_a_named_environment() -> None:
    hosts = [{"host": "dgx-1", "environment": "venv:/raid/venv"}, "dgx-2"]
    spec = ClusterSpec.model_validate({"name": "lab", "hosts": hosts})
    named = [{"path": "/raid/venv/bin/python", "version": "3.10.12", "named": True, "in_environment": True}]
    seen = {"dgx-1": facts(changes={"pythons": named}), "dgx-2": facts(changes=SECOND)}
    chosen = choose_pythons(spec.host_specs(), seen, problems(spec, seen))
    assert {name: one.platform.minor for name, one in chosen.items()} == {"dgx-2": "3.10"}


def test_hosts_with_one_python_in_common_are_well() -> None:
    assert two_hosts({"pythons": [{"path": "/usr/bin/python3", "version": "3.12.1", "has_venv": True}]}) == ()


def test_different_architectures_are_reported_once_per_cluster() -> None:
    found = two_hosts(other="spark")
    assert [only((one,)) for one in found if one.code == "architectures_differ"] == [
        (
            "architectures_differ",
            "warning",
            "",
            (
                "the hosts are of different architectures (dgx-1: x86_64; dgx-2: aarch64): a job runs only on "
                "those that its packages support"
            ),
            "set it in jobs that need one: where: {arch: aarch64}",
        )
    ]


def test_an_address_that_a_host_does_not_have_is_blocked_with_those_that_it_has() -> None:
    code, level, host, message, _mend = only(two_hosts(address="10.9.9.9"))
    assert (code, level, host) == ("network_unclear", "blocking", "dgx-2")
    assert message == "it has no 10.9.9.9; its addresses are: 10.0.0.3 (enp226s0f0), 10.1.0.3 (ibp24s0)"


def test_a_host_with_several_possible_addresses_is_reported() -> None:
    code, level, host, message, _mend = only(two_hosts({"reached_at": "192.0.2.9"}, address=""))
    assert (code, level, host) == ("network_unclear", "blocking", "dgx-2")
    assert message.startswith("it may be reached by the other hosts at more than one address")


def test_addresses_in_different_networks_are_a_warning() -> None:
    found = [one for one in two_hosts(address="10.0.0.3") if one.code == "networks_differ"]
    assert only(tuple(found)) == (
        "networks_differ",
        "warning",
        "dgx-2",
        "its address 10.0.0.3 is in another network than 10.1.0.1 of dgx-1",
        "nothing if the two reach each other; else set address for both to a network that they share",
    )


def test_a_faster_network_that_is_not_used_is_named() -> None:
    spec = ClusterSpec(name="lab", hosts=(HostSpec(host="dgx-1"), HostSpec(host="dgx-2")))
    found = problems(spec, {"dgx-1": facts(), "dgx-2": facts(changes=SECOND)})
    assert only(found) == (
        "slow_network",
        "warning",
        "dgx-1",
        (
            "the hosts share 10.1.0.0/24 at 400 Gb/s, and use 10 Gb/s: training over several hosts is slower than it "
            "could be"
        ),
        "set address for each host to its address there",
    )


def test_infiniband_whose_ports_are_down_is_a_warning() -> None:
    found = two_hosts({"infiniband": [{"device": "mlx5_0", "port": "1"}]})
    assert [only((one,)) for one in found if one.code == "infiniband_down"] == [
        (
            "infiniband_down",
            "warning",
            "dgx-2",
            "none of its InfiniBand ports is up (mlx5_0/1); NCCL uses the slower network",
            "check the cables and the subnet manager: ibstat",
        )
    ]


def test_blocking_problems_are_listed_first_then_by_host() -> None:
    found = two_hosts({"resolves_to": [], "pythons": []}, first={"resolves_to": []})
    assert [(one.level, one.host, one.code) for one in found] == [
        ("blocking", "dgx-2", "python_missing"),
        ("warning", "dgx-1", "hostname_unresolved"),
        ("warning", "dgx-2", "hostname_unresolved"),
    ]


def test_every_code_has_a_test() -> None:
    files = Path(__file__).parent.glob("test_checks_*.py")
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    untested = [code for code in CODES if f'"{code}"' not in text]
    assert not untested


def test_the_troubleshooting_page_explains_every_code() -> None:
    page = (Path(__file__).parent.parent / "docs/troubleshooting.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \|$", page, re.MULTILINE)
    assert {code: meaning for code, meaning, fix in table if fix.strip()} == CODES
    assert [code for code, _, _ in table] == list(CODES)
