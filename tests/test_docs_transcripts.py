"""What the pages show of a terminal is what a terminal shows."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import pages, transcripts
from support.cluster import ROOT, Cluster

ALONE = {"docs/cli.md"}
"""Pages whose commands are typed where there is no cluster."""
ON_HOSTS = {"docs/dgx.md"}
"""Pages whose commands need hosts: tests/test_docs_dgx.py types them."""
SHOWING = [page for page in pages.pages() if pages.blocks(page, "console")]
WITH_CLUSTER = [page for page in SHOWING if pages.name(page) not in ALONE | ON_HOSTS]


def test_a_transcript_that_is_not_true_is_found() -> None:
    assert transcripts.fits("train-k3f9qa succeeded, 6 s\n…\nend\n", "train-aaaaaa succeeded, 12 s\na\nb\nend\n")
    assert not transcripts.fits("train-k3f9qa succeeded\n", "train-aaaaaa failed\n")
    assert not transcripts.fits("one\n", "one\ntwo\n")
    assert not transcripts.fits("one\n…\nthree\n", "one\ntwo\n")


@pytest.mark.parametrize("page", sorted(ALONE))
def test_commands_without_a_cluster_print_what_the_page_shows(page: str, home: Path, tmp_path: Path) -> None:
    environ = {**os.environ, "RAYLAUNCH_HOME": str(home), "NO_COLOR": "1"}
    differences = transcripts.run(ROOT / page, tmp_path, environ)
    assert not differences, "\n\n".join(differences)


@pytest.mark.ray
@pytest.mark.wandb
@pytest.mark.parametrize("page", WITH_CLUSTER, ids=pages.name)
def test_commands_on_a_cluster_print_what_the_page_shows(page: Path, cluster: Cluster, tmp_path: Path) -> None:
    differences = transcripts.run(page, tmp_path, cluster.env)
    assert not differences, "\n\n".join(differences)
