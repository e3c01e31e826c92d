"""raylaunch's own wheel for hosts: the same from everywhere, without what only clients need, and well-formed."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from raylaunch.cluster.install.resolve import find_uv
from raylaunch.cluster.install.wheel_store import OwnWheel, own_wheel
from raylaunch.version import __version__

ROOT = Path(__file__).parent.parent
REPORT = (
    "import json; from raylaunch.cluster.install.wheel_store import own_wheel; one = own_wheel();"
    "print(json.dumps([one.digest, one.sha256, one.requirements]))"
)


@pytest.fixture(scope="module")
def wheel() -> OwnWheel:
    return own_wheel()


def names(wheel: OwnWheel) -> set[str]:
    return set(zipfile.ZipFile(io.BytesIO(wheel.content)).namelist())


def text(wheel: OwnWheel, name: str) -> str:
    return zipfile.ZipFile(io.BytesIO(wheel.content)).read(f"raylaunch-{__version__}.dist-info/{name}").decode()


def made_in(folder: Path, *, python: str = sys.executable) -> tuple[str, str, list[str]]:
    """Make the wheel with the package in a folder, in a process of its own."""
    packages = json.dumps([path for path in sys.path if "site-packages" in path])
    program = f"import sys; sys.path[:0] = [{str(folder)!r}]; sys.path += {packages}; {REPORT}"
    done = subprocess.run(
        [python, "-I", "-c", program], cwd="/", capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    digest, sha256, requirements = json.loads(done.stdout)
    return digest, sha256, requirements


def checkout(folder: Path) -> Path:
    """Copy what a clone has of the package."""
    shutil.copytree(ROOT / "raylaunch", folder / "raylaunch", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "examples" / "digits", folder / "examples" / "digits")
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def test_it_holds_the_package_and_the_demo_and_nothing_else(wheel: OwnWheel) -> None:
    found = names(wheel)
    assert {"raylaunch/cli/app.py", "raylaunch/py.typed", "raylaunch/demo/digits/train.py"} <= found
    assert all(name.startswith(("raylaunch/", f"raylaunch-{__version__}.dist-info/")) for name in found)
    assert not [name for name in found if name.endswith(".pyc") or "__pycache__" in name]


def test_hosts_are_not_asked_to_install_what_only_clients_need(wheel: OwnWheel) -> None:
    needed = {one.split(">")[0].split("[")[0].split("<")[0] for one in wheel.requirements}
    assert {"ray", "wandb", "uv", "pydantic"} <= needed
    assert not needed & {"mcp", "asyncssh", "scikit-learn", "pytest"}
    assert "Requires-Dist: mcp" not in text(wheel, "METADATA")


def test_its_program_is_raylaunch_alone(wheel: OwnWheel) -> None:
    assert text(wheel, "entry_points.txt") == "[console_scripts]\nraylaunch = raylaunch.cli:main\n"


def test_its_record_lists_every_file(wheel: OwnWheel) -> None:
    listed = {row[0] for row in csv.reader(io.StringIO(text(wheel, "RECORD")))}
    assert listed == names(wheel)


def test_a_changed_file_makes_another_wheel(tmp_path: Path) -> None:
    folder = checkout(tmp_path)
    before = made_in(folder)
    assert made_in(folder) == before
    with (folder / "raylaunch" / "version.py").open("a") as file:
        file.write("# a word more\n")
    assert made_in(folder)[0] != before[0]


def test_a_changed_requirement_makes_another_wheel(tmp_path: Path) -> None:
    folder = checkout(tmp_path)
    before = made_in(folder)
    project = folder / "pyproject.toml"
    project.write_text(project.read_text().replace('"rich>=13"', '"rich>=13.1"'))
    digest, _, requirements = made_in(folder)
    assert digest != before[0]
    assert "rich>=13.1" in requirements


def test_caches_and_editors_files_do_not_matter(tmp_path: Path) -> None:
    folder = checkout(tmp_path)
    before = made_in(folder)
    (folder / "raylaunch" / "__pycache__").mkdir(exist_ok=True)
    (folder / "raylaunch" / "__pycache__" / "spec.cpython-311.pyc").write_bytes(b"?")
    (folder / "raylaunch" / ".spec.py.swp").write_bytes(b"?")
    assert made_in(folder) == before


@pytest.mark.slow
def test_an_installed_wheel_makes_the_same_as_the_checkout(tmp_path: Path) -> None:
    folder = checkout(tmp_path / "clone")
    shutil.copytree(ROOT / "mcp_server", folder / "mcp_server")
    for name in ("README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(folder)]
    subprocess.run(build, check=True, timeout=120, stdout=subprocess.DEVNULL)
    (built,) = tmp_path.glob("*.whl")
    target = tmp_path / "installed"
    uv = [find_uv(os.environ), "pip", "install", "--quiet", "--no-deps", "--no-config", "--offline", "--no-index"]
    subprocess.run([*uv, "--python", sys.executable, "--target", str(target), str(built)], check=True, timeout=120)
    assert made_in(target) == made_in(folder)
