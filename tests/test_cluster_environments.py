"""The kinds of environment on a real cluster, each with what makes it: interpreters, venvs, pip, uv."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.cluster import Cluster
from support.index import index, tiny_wheel
from support.sshd import free_port

from raylaunch.models.job import JobView
from raylaunch.models.states import JobState

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PACKAGE = "iniconfig"
WHERE = f"import sys, {PACKAGE}; print(sys.prefix, {PACKAGE}.__file__)"
PROJECT = f"""
[project]
name = "tiny"
version = "0.1.0"
requires-python = ">=3.10"
dependencies = ["{PACKAGE}"]
"""
REPORTS = (
    "import sys, raylaunch\n"
    "print(sys.version_info[:2], raylaunch.__file__, raylaunch.context().attempt)\n"
    "raylaunch.report({'accuracy': 0.5}, step=2, total=4)\n"
)
OTHER_PYTHONS = ("3.10", *(pytest.param(newer, marks=pytest.mark.long) for newer in ("3.12", "3.13")))  # the oldest


def python_of(version: str) -> str:
    """Return an interpreter of this version on this machine: from pyenv, or from PATH."""
    own = sorted(Path("~/.pyenv/versions").expanduser().glob(f"{version}.*/bin/python{version}"))
    found = str(own[-1]) if own else shutil.which(f"python{version}")
    if found is None:
        pytest.skip(f"needs Python {version}")
    return found


def make_venv(folder: Path) -> Path:
    """Make a virtual environment without pip, with a console script of its own."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=120)
    script = folder / "bin" / "train-tiny"
    script.write_text("#!/bin/sh\nexec python -c 'import sys; print(\"tiny\", sys.prefix)'\n")
    script.chmod(0o755)
    return folder


def project(cluster: Cluster, name: str, **files: str) -> Path:
    """Make a working directory; ``__`` in a file's name stands for a dot."""
    folder = cluster.work / name
    folder.mkdir()
    for file, text in files.items():
        (folder / file.replace("__", ".")).write_text(text)
    return folder


def succeeded(cluster: Cluster, job: str, timeout_s: float = 120) -> JobView:
    """Wait for a job's end, which must be a success."""
    done = cluster.ended(job, timeout_s)
    assert done.state is JobState.SUCCEEDED, f"{done.message}\n{cluster.log(job).decode(errors='replace')}"
    return done


def packages_of(job: JobView) -> tuple[str, ...]:
    """Return the packages that the node found in the job's environment."""
    assert job.environment is not None
    return job.environment.packages


def built(cluster: Cluster, kind: str) -> list[str]:
    """Return the environments of a kind that were made on the node."""
    envs = cluster.paths.node / "envs"
    return sorted(path.name for path in envs.glob(f"{kind}-*") if path.is_dir())


def setup_log(cluster: Cluster, job: str) -> bytes:
    """Return what was said while the job's environment was made."""
    path = cluster.paths.default_store / "jobs" / job / "attempt-1" / "logs" / "setup.log"
    return path.read_bytes() if path.exists() else b""


def test_python_in_a_job_is_the_interpreter_of_the_given_path(cluster: Cluster, tmp_path: Path) -> None:
    python = make_venv(tmp_path / "env") / "bin" / "python"
    job = cluster.python("import sys; print(sys.prefix)", "--environment", str(python))
    done = succeeded(cluster, job)
    assert cluster.log(job).decode().strip() == str(tmp_path / "env")
    assert done.environment is not None
    assert done.environment.python == str(python)
    assert done.environment.version == ".".join(str(part) for part in sys.version_info[:3])


def test_a_venv_is_activated_so_that_its_console_scripts_are_found(cluster: Cluster, tmp_path: Path) -> None:
    folder = make_venv(tmp_path / "env")
    job = cluster.submit("--working-dir", "", "--environment", f"venv:{folder}", "--", "train-tiny")
    succeeded(cluster, job)
    assert cluster.log(job).decode().strip() == f"tiny {folder}"


@pytest.mark.long
def test_equal_pip_requirements_are_installed_once_for_all_jobs(cluster: Cluster) -> None:
    spec = {"entrypoint": ["python", "-c", WHERE], "environment": {"pip": [PACKAGE]}, "working_dir": ""}
    folder = project(cluster, "pip_list", job__yaml=json.dumps(spec))
    first = cluster.submit("-f", "job.yaml", cwd=folder)
    done = succeeded(cluster, first)
    made = built(cluster, "pip")
    second = cluster.submit("-f", "job.yaml", cwd=folder)
    succeeded(cluster, second)
    assert built(cluster, "pip") == made
    assert PACKAGE.encode() in setup_log(cluster, first)
    assert setup_log(cluster, second) == b""
    assert cluster.log(first) == cluster.log(second)
    assert any(one.startswith(f"{PACKAGE}==") for one in packages_of(done))


@pytest.mark.long
def test_a_requirements_file_of_the_working_directory_is_installed(cluster: Cluster) -> None:
    folder = project(cluster, "pip_file", requirements__txt=f"{PACKAGE}>=1\n", train__py=WHERE)
    words = ("--environment", "pip:requirements.txt", "--", "python", "train.py")
    job = cluster.submit(*words, cwd=folder)
    done = succeeded(cluster, job)
    prefix, file = cluster.log(job).decode().split()
    assert Path(prefix).name in built(cluster, "pip")
    assert file.startswith(prefix)
    assert any(one.startswith(f"{PACKAGE}==") for one in packages_of(done))


@pytest.mark.long
def test_a_missing_requirement_fails_the_job_with_the_installers_message(cluster: Cluster) -> None:
    folder = project(cluster, "pip_wrong", requirements__txt="./no-such-package-here\n", train__py="print(1)")
    job = cluster.submit("--environment", "pip:requirements.txt", "--", "python", "train.py", cwd=folder)
    failed = cluster.ended(job, 120)
    assert failed.state is JobState.FAILED
    assert failed.message.startswith("the installation of the requirements failed: ")
    assert "no-such-package-here" in failed.message


def test_uv_syncs_the_projects_lock_once_for_all_jobs_with_the_same(cluster: Cluster) -> None:
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if uv is None:
        pytest.skip("needs uv")
    folder = project(cluster, "uv_project", pyproject__toml=PROJECT, train__py=WHERE)
    lock = [uv, "lock", "--python", sys.executable]
    locked = subprocess.run(lock, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert locked.returncode == 0, locked.stderr
    jobs = []
    for _ in range(2):
        jobs.append(cluster.submit("--environment", "uv", "--", "python", "train.py", cwd=folder))
        done = succeeded(cluster, jobs[-1])
    assert len(built(cluster, "uv")) == 1
    assert setup_log(cluster, jobs[0]) != b""
    assert setup_log(cluster, jobs[1]) == b""
    assert Path(cluster.log(jobs[1]).decode().split()[0]).name == built(cluster, "uv")[0]
    assert any(one.startswith(f"{PACKAGE}==") for one in packages_of(done))


@pytest.mark.parametrize("version", OTHER_PYTHONS)
def test_a_job_can_report_under_another_python_that_has_no_raylaunch(version: str, cluster: Cluster) -> None:
    job = cluster.python(REPORTS, "--environment", python_of(version))
    done = succeeded(cluster, job)
    output = cluster.log(job).decode()
    assert output.startswith(f"({version.replace('.', ', ')})")
    assert "runner.pyz" in output
    assert done.last_metrics == {"accuracy": 0.5}
    assert done.progress is not None
    assert (done.progress.step, done.progress.total) == (2, 4)


def test_the_package_list_is_kept_with_the_job_and_shown(cluster: Cluster) -> None:
    job = cluster.python("print('ready')")
    done = succeeded(cluster, job)
    shown = json.loads(cluster.good("show", "--json", job))
    assert shown["environment"]["packages"] == list(packages_of(done))
    assert any(one.startswith("ray==") for one in packages_of(done))


def test_wheels_are_sent_with_a_job_whose_node_cannot_reach_an_index(cluster: Cluster, tmp_path: Path) -> None:
    tiny_wheel(tmp_path / "index", "alpha", "1.0", requires=["beta"])
    tiny_wheel(tmp_path / "index", "beta", "2.0")
    code = tmp_path / "code"
    code.mkdir()
    (code / "requirements.txt").write_text("alpha\n")
    words = ["--environment", "pip:requirements.txt", "--env", f"PIP_INDEX_URL=http://127.0.0.1:{free_port()}/simple"]
    program = ["python", "-c", "import alpha, beta; print('made of', alpha.__version__, beta.__version__)"]
    with_rays_own = [*program[:2], f"import ray; {program[2]}"]
    with index(tmp_path / "index") as served:
        own = {name: value for name, value in served.environ(tmp_path).items() if name not in {"PATH", "HOME"}}
        output = cluster.good("submit", "--dry-run", *words, "--", *program, cwd=code, env=own)
        assert "cannot reach a package index" in output
        job = cluster.submit(*words, "--", *program, cwd=code, env=own)
        again = cluster.submit(*words, "--", *program, cwd=code, env=own)
        added = cluster.submit("--with", "alpha", *words[2:], "--", *with_rays_own, cwd=code, env=own)
    assert served.fetched.count("alpha-1.0-py3-none-any.whl") == 1
    for one in (job, again, added):
        done = succeeded(cluster, one)
        assert b"made of 1.0 2.0" in cluster.log(one)
    assert done.chosen is not None
    assert str(done.chosen).endswith(", with alpha")
