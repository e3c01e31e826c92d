"""The repository itself: what it promises in text is there, and what must not be in it is not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from raylaunch.config.load import job_spec_from_flags, load_cluster_file
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.version import __version__

ROOT = Path(__file__).parent.parent
HERE = Path(__file__).resolve()

# Hosts from which packages are installed are the machine's setting, not the project's.
REGISTRIES = re.compile(
    r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|registry\.npmjs|registry\.yarnpkg|deb\.debian\.org"
    r"|conda\.anaconda\.org|--(?:extra-)?index-url|--find-links[= ]\S*://|_authToken"
)
OF_OTHERS = {
    "raylaunch/client/job_wheels.py": "an index that uv's settings name, as pip says it",
    "raylaunch/client/local_projects.py": "options of requirements files, by name",
    "tests/test_requirement_lines.py": "as above, with addresses that do not exist",
    "tests/test_runner_local_sources.py": "as above",
}
"""Files in which such words are other programs', and why."""
TOO_SHORT_TO_TELL = 2  # a clone in /raylaunch: that is a word of the project too
LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)#\s]+)(?:#[^)]*)?\)")


def _tracked() -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    paths = (ROOT / name for name in done.stdout.split("\0") if name)
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "replace")


def test_no_registry_is_named_in_the_repository() -> None:
    named = [
        f"{path.relative_to(ROOT)}: {found.group()}"
        for path in _tracked()
        if path != HERE and str(path.relative_to(ROOT)) not in OF_OTHERS
        for found in REGISTRIES.finditer(_text(path))
    ]
    assert not named, "\n".join(named)


def test_no_path_of_the_machine_it_was_written_on_is_in_the_repository() -> None:
    folder = re.compile(rf"(?<![\w.-]){re.escape(str(ROOT))}(?![\w-])")
    named = [str(file.relative_to(ROOT)) for file in _tracked() if folder.search(_text(file))]
    assert not named or len(ROOT.parts) <= TOO_SHORT_TO_TELL, named


def test_the_version_is_the_same_in_the_package_its_metadata_and_the_changelog() -> None:
    assert f'\nversion = "{__version__}"\n' in _text(ROOT / "pyproject.toml")
    assert f"## {__version__}" in _text(ROOT / "CHANGELOG.md")


@pytest.mark.parametrize("page", sorted(str(path.relative_to(ROOT)) for path in _tracked() if path.suffix == ".md"))
def test_every_link_of_a_page_leads_somewhere(page: str) -> None:
    path = ROOT / page
    missing = [target for target in LINK.findall(_text(path)) if not (path.parent / target).exists()]
    assert not missing


def test_every_make_target_that_the_readme_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", _text(ROOT / "Makefile"), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)\b", _text(ROOT / "README.md")))
    assert {"demo", "test"} <= named <= targets


@pytest.mark.parametrize("name", ["ruff.lint", "ruff.lint.per-file-ignores"])
def test_every_exception_from_the_linter_has_a_reason_beside_it(name: str) -> None:
    section = _text(ROOT / "pyproject.toml").split(f"[tool.{name}]\n")[1].split("\n[")[0]
    lines = [line for line in section.splitlines() if re.search(r'"[A-Z]+\d+"', line)]
    assert lines
    assert not [line for line in lines if "#" not in line]


def test_the_program_of_continuous_integration_can_be_run() -> None:
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_the_jobs_of_the_examples_are_valid() -> None:
    files = sorted((ROOT / "examples").glob("*/job.yaml"))
    assert files
    for file in files:
        assert job_spec_from_flags((), file=file).name


def test_the_cluster_file_of_a_clone_is_the_embedded_cluster() -> None:
    assert load_cluster_file(ROOT / "cluster.yaml").spec == ClusterSpec()


@pytest.mark.slow
def test_the_wheel_carries_the_demo_and_the_types(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        timeout=120,
        stdout=subprocess.DEVNULL,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"raylaunch/demo/digits/{name}" for name in ("train.py", "evaluate.py", "job.yaml")} <= names
    assert {"raylaunch/py.typed", "mcp_server/__init__.py"} <= names
    assert {f"raylaunch/cluster/probe/{part}.sh" for part in ("gpus", "python", "script")} <= names
    assert not [name for name in names if name.startswith(("tests/", "examples/"))]


def test_a_run_in_which_more_than_two_tests_needed_a_second_try_fails(tmp_path: Path) -> None:
    conftest = (ROOT / "tests/conftest.py").read_text(encoding="utf-8")
    (tmp_path / "conftest.py").write_text(re.sub(r"^pytest_plugins = .*$", "", conftest, flags=re.MULTILINE))
    (tmp_path / "test_shaky.py").write_text(
        "import pytest\n\nSEEN = set()\n\n\n"
        "@pytest.mark.ray\n@pytest.mark.parametrize('n', range(3))\n"
        "def test_it(n):\n    first = n not in SEEN\n    SEEN.add(n)\n    assert not first\n"
    )
    setting = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path), "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *setting], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert "3 passed" in done.stdout
    assert "second try" in done.stdout
