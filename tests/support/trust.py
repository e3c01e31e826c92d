"""A person who has accepted what a cluster.yaml connects to, as CI does it: by the variable."""

from __future__ import annotations

from pathlib import Path

from raylaunch.cluster.trust import VARIABLE, fingerprint
from raylaunch.config.load import load_cluster_file
from raylaunch.errors import SpecError


def trusted(file: Path) -> dict[str, str]:
    """Return the environment in which that file is accepted; empty where it is none, or says something wrong."""
    try:
        return {VARIABLE: fingerprint(load_cluster_file(file).spec)}
    except SpecError:
        return {}
