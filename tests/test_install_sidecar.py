"""raylaunch beside an environment that the user names, which is left as it was."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support.bare_host import PYTHON, VERSIONS, BareHost, runs, versions_of
from support.index import Index, tiny_wheel

from raylaunch.cluster.install.platforms import EXACT
from raylaunch.cluster.install.resolve import find_uv
from raylaunch.cluster.install.wheel_store import own_wheel
from raylaunch.errors import HostStepError, VersionError

pytestmark = pytest.mark.slow


@pytest.fixture
def named(tmp_path: Path, wheel_index: Index) -> Path:
    """Make an environment as a user has it: with what is needed, and a package of his own."""
    folder = tmp_path / "named"
    tiny_wheel(tmp_path / "own", "colours", "3.0")
    links = ["--find-links", str(wheel_index.folder), "--find-links", str(tmp_path / "own")]
    names = [*(f"{name}=={VERSIONS[name]}" for name in EXACT), *own_wheel().requirements, "colours"]
    uv = find_uv(os.environ)
    environ = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "UV_CACHE_DIR": str(tmp_path / "uv")}
    for words in (
        ["venv", "--python", PYTHON.path, str(folder)],
        ["pip", "install", "--python", str(folder), "--no-index", *links, *names],
    ):
        subprocess.run([uv, *words, "--quiet", "--no-config"], env=environ, check=True, timeout=120)
    return folder


def listing(folder: Path) -> dict[str, int]:
    paths = (path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {str(path): path.lstat().st_mtime_ns for path in paths if not path.is_dir()}


def test_raylaunch_is_put_beside_an_environment_that_the_user_names(stocked_host: BareHost, named: Path) -> None:
    before = listing(named)
    python = stocked_host.ensure_beside(str(named))
    assert versions_of(python) == VERSIONS
    assert runs(python, "import colours, raylaunch.cluster.on_host; print(colours.__version__)") == "3.0"
    assert (python.parent / "uv").exists()  # programs of the named environment are found beside it
    assert listing(named) == before
    assert stocked_host.ensure_beside(f"{named}/bin/python") != python  # another name, another environment
    assert stocked_host.ensure_beside(str(named)) == python
    assert [step.state for step in stocked_host.steps] == ["kept"]


def test_the_environment_beside_runs_isolated_as_well(stocked_host: BareHost, named: Path) -> None:
    python = stocked_host.ensure_beside(str(named))
    argv = [str(python), "-I", "-c", "import ray, colours, raylaunch.cluster.on_host, sys; print(sys.prefix)"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == str(python.parent.parent)


def test_an_environment_that_lacks_something_is_refused_with_the_command_that_mends_it(
    stocked_host: BareHost, named: Path
) -> None:
    (packages,) = named.glob("lib/*/site-packages")
    (info,) = packages.glob("wandb-*.dist-info")
    info.rename(packages / "wandb-0.1.dist-info")
    metadata = packages / "wandb-0.1.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace(f"Version: {VERSIONS['wandb']}", "Version: 0.1"))
    (psutil,) = packages.glob("psutil-*.dist-info")
    shutil.rmtree(psutil)
    error = stocked_host.refused(lambda: stocked_host.ensure_beside(str(named)))
    assert isinstance(error, VersionError)
    assert f"it has wandb 0.1, not =={VERSIONS['wandb']}" in error.message
    assert "it has no psutil" in error.message
    assert f"{named}/bin/python -m pip install" in error.hint
    assert f"'wandb=={VERSIONS['wandb']}'" in error.hint


def test_an_environment_without_ray_is_refused(stocked_host: BareHost) -> None:
    error = stocked_host.refused(lambda: stocked_host.ensure_beside(PYTHON.path))
    assert isinstance(error, VersionError)
    assert "it has no ray" in error.message


def test_a_missing_environment_is_reported(stocked_host: BareHost) -> None:
    error = stocked_host.refused(lambda: stocked_host.ensure_beside("/nowhere/env"))
    assert isinstance(error, HostStepError)
    assert "/nowhere/env is neither a Python interpreter nor an environment" in error.message


def test_of_a_named_environment_too_a_later_change_is_noticed(stocked_host: BareHost, named: Path) -> None:
    stocked_host.ensure_beside(str(named))
    (packages,) = named.glob("lib/*/site-packages")
    (info,) = packages.glob("ray-*.dist-info")
    shutil.rmtree(info)
    assert "it has no ray" in stocked_host.refused(lambda: stocked_host.ensure_beside(str(named))).message
