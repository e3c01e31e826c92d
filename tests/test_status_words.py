"""What `raylaunch status` says of a cluster over SSH whose head is away, or that is not up as far as is known here."""

from __future__ import annotations

from raylaunch.cli.cluster import status_lines
from raylaunch.cluster.client_record import ClientRecord
from raylaunch.cluster.hosts.backend import not_up, unanswered
from raylaunch.cluster.types import DownReport
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.models.host_spec import HostSpec


def test_a_head_that_is_away_is_named_and_no_number_of_jobs_is_made_up() -> None:
    spec = ClusterSpec(name="lab", hosts=(HostSpec(host="dgx-1"), HostSpec(host="dgx-2")))
    found = unanswered(ClientRecord(spec=spec, head="dgx-1"), "Remote end closed connection without response")
    output = list(status_lines(found, now=0))
    assert output[0] == "cluster lab is degraded"
    assert output[1].startswith("  ! dgx-1 cannot be reached, or its controller is not responding")
    assert "(Remote end closed" in output[1]
    assert "jobs on other hosts continue" in output[1]
    assert len(output) == 2


def test_an_unknown_cluster_is_not_reported_as_down() -> None:
    output = list(status_lines(not_up("lab", None), now=0))
    assert output[1] == ("  ! not started from this machine; if it is already running, raylaunch up connects to it")
    assert "nothing was ended: cluster lab was not started from this machine" in str(
        DownReport(cluster="lab", ended=(), store="", unknown=True)
    )


def test_leftovers_of_a_killed_up_are_reported_until_down() -> None:
    spec = ClusterSpec(name="lab", hosts=(HostSpec(host="dgx-1", name="dgx-1"),))
    started = ClientRecord(spec=spec, wanted="stopped", hosts={"dgx-1": spec.hosts[0]})
    assert "parts of it may run on dgx-1; raylaunch down ends them" in not_up("lab", started).problems[0]
    assert not_up("lab", started.with_(hosts={})).problems == ()
