"""What docs/dgx.md shows of a terminal is what a terminal shows, on hosts with the shape of DGXs and Sparks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import transcripts
from support.cluster import ROOT
from support.fittings import DGX_H100, DGX_SPARK, add_user, bare_python, give_gpus
from support.host import Host, authorize
from support.hosts import World, world
from support.terminal import Laptop

pytestmark = [pytest.mark.machines, pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(1300)]

DGX_OS = 'DGX_NAME="DGX Server"\nDGX_PRETTY_NAME="NVIDIA DGX Server"\nDGX_SWBUILD_VERSION="6.2.1"\n'
LIMIT_S = 1200


@pytest.fixture
def lab() -> Iterator[World]:
    with world() as made:
        for name in ("dgx-1", "dgx-2", "dgx-3", "dgx-4"):
            dgx = made.host(name)
            dgx.write("/etc/dgx-release", DGX_OS)
            give_gpus(dgx, DGX_H100, users=[(3, 1, "python3")] if name == "dgx-4" else ())
        for name in ("spark-1", "spark-2"):
            give_gpus(made.host(name), DGX_SPARK)
        for host in made.hosts:
            bare_python(host)
        let_in(made.hosts[3], "anna")
        yield made


def let_in(host: Host, user: str) -> None:
    """Let the laptop's own key in at an ordinary account."""
    add_user(host, user)
    authorize(host.path(f"/home/{user}"), host.world.key)


def test_commands_on_dgxs_and_sparks_print_what_the_page_shows(lab: World, tmp_path: Path) -> None:
    laptop = Laptop(lab, tmp_path / "laptop", "")
    differences = transcripts.run(ROOT / "docs/dgx.md", laptop.folder, laptop.env, limit_s=LIMIT_S)
    assert not differences, "\n\n".join(differences)
