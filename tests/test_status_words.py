"""What `raylaunch status` says of a cluster over SSH whose head is away."""

from __future__ import annotations

from raylaunch.cli.cluster import status_lines
from raylaunch.cluster.client_record import ClientRecord
from raylaunch.cluster.ssh_backend import unanswered
from raylaunch.spec import ClusterSpec, HostSpec


def test_a_head_that_is_away_is_named_and_no_number_of_jobs_is_made_up() -> None:
    spec = ClusterSpec(name="lab", hosts=(HostSpec(host="dgx-1"), HostSpec(host="dgx-2")))
    found = unanswered(ClientRecord(spec=spec, head="dgx-1"), "Remote end closed connection without response")
    said = list(status_lines(found, now=0))
    assert said[0] == "cluster lab is degraded"
    assert said[1].startswith("  ! dgx-1 cannot be reached, or its controller does not answer (Remote end closed")
    assert "jobs on other hosts go on meanwhile" in said[1]
    assert len(said) == 2
