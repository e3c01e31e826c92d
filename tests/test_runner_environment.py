"""The kinds of environments, prepared by the real runner on this machine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.running import Attempt

from raylaunch import contract

Make = Callable[..., Attempt]
WHICH = "import sys; print(sys.prefix)"


def kind(name: str, value: str = "", *requirements: str) -> dict[str, object]:
    return {"kind": name, "value": value, "requirements": list(requirements), "packages": []}


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Make attempts that share the node's folder of environments, and end what they left."""
    made: list[Attempt] = []

    def one(entrypoint: str | list[str], **changes: object) -> Attempt:
        made.append(Attempt(tmp_path / str(len(made)), entrypoint, **{"envs_dir": str(tmp_path / "envs"), **changes}))
        return made[-1]

    yield one
    for attempt in made:
        attempt.close()


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """A virtual environment with a console script of its own."""
    prefix = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(prefix)], check=True, timeout=60)
    script = prefix / "bin" / "greet"
    script.write_text("#!/bin/sh\necho greetings from $VIRTUAL_ENV\n")
    script.chmod(0o755)
    return prefix


def test_a_venv_is_activated_so_that_its_console_scripts_are_found(make: Make, venv: Path) -> None:
    attempt = make(["greet"], environment=kind("venv", str(venv)))
    assert attempt.run(PYTHONHOME="")["ended"] == "completed"
    assert attempt.log.read_text() == f"greetings from {venv}\n"
    assert attempt.facts()["python"] == str(venv / "bin" / "python")


def test_a_venv_that_is_not_there_is_an_environment_problem_with_its_path(make: Make) -> None:
    end = make("true", environment=kind("venv", "/nowhere/venv")).run()
    assert end["ended"] == "environment"
    assert end["message"] == "the environment venv:/nowhere/venv does not exist on this node: no folder /nowhere/venv"


def test_an_interpreter_by_path_is_the_jobs_python(make: Make, venv: Path) -> None:
    attempt = make(["python", "-c", WHICH], environment=kind("python", str(venv / "bin" / "python3")))
    attempt.run()
    assert attempt.log.read_text() == f"{venv}\n"


def test_the_python_that_runs_ray_can_be_asked_for_by_name(make: Make) -> None:
    attempt = make(["python", "-c", "import sys; print(sys.executable)"], environment=kind("ray"))
    attempt.start().wait(60)
    assert attempt.log.read_text().strip() == sys.executable


def test_an_interpreter_that_is_not_there_is_said(make: Make) -> None:
    end = make("true", environment=kind("python", "/nowhere/bin/python3")).run()
    assert (end["ended"], end["exit_code"]) == ("environment", None)
    assert end["message"] == "the interpreter /nowhere/bin/python3 does not exist on this node"


def test_an_interpreter_for_another_architecture_is_said(make: Make, tmp_path: Path) -> None:
    foreign = tmp_path / "python3"
    header = bytearray(Path(sys.executable).resolve().read_bytes()[:64])
    header[18:20] = (183 if header[18] == 62 else 62).to_bytes(2, "little")
    foreign.write_bytes(bytes(header))
    foreign.chmod(0o755)
    end = make("true", environment=kind("python", str(foreign))).run()
    assert end["ended"] == "environment"
    assert "is built for " in end["message"]


def test_an_interpreter_that_does_not_run_is_said_with_its_words(make: Make, tmp_path: Path) -> None:
    broken = tmp_path / "python3"
    broken.write_text("#!/bin/sh\necho libpython3.so: cannot open shared object file >&2\nexit 127\n")
    broken.chmod(0o755)
    end = make("true", environment=kind("python", str(broken))).run()
    assert end["message"].endswith("does not run on this node: libpython3.so: cannot open shared object file")


def test_a_job_for_another_architecture_is_refused(make: Make) -> None:
    other = "aarch64" if __import__("platform").machine() == "x86_64" else "x86_64"
    end = make("true", arch=other).run()
    assert end["ended"] == "environment"
    assert end["message"].startswith(f"the job needs {other}")


def test_conda_is_activated_as_a_shell_would(make: Make, tmp_path: Path, venv: Path) -> None:
    conda = tmp_path / "conda"
    conda.write_text(
        f'#!/bin/sh\ncat <<\'X\'\nconda() {{ [ "$2" = known ] || {{ echo "NotFound: $2" >&2; return 1; }}\n'
        f"export CONDA_PREFIX={venv} MULTILINE=$'a\\nb' PATH={venv}/bin:$PATH; }}\nX\n"
    )
    conda.chmod(0o755)
    attempt = make('greet; echo "$MULTILINE"', environment=kind("conda", "known"))
    attempt.run(CONDA_EXE=str(conda))
    assert attempt.log.read_text() == "greetings from\na\nb\n"
    end = make("true", environment=kind("conda", "other")).run(CONDA_EXE=str(conda))
    assert end["message"].startswith("conda activate other failed: NotFound: other")


@pytest.mark.slow
def test_pip_requirements_are_installed_once_per_content(make: Make, tmp_path: Path) -> None:
    package = tmp_path / "tiny"
    package.mkdir()
    (package / "tiny_rl.py").write_text("value = 42\n")
    wheel = _wheel(tmp_path)
    entry = ["python", "-c", "import tiny_rl; print(tiny_rl.value)"]
    first = make(entry, environment=kind("pip", "", str(wheel)))
    end = first.run(timeout_s=120)
    assert (end["ended"], end["message"]) == ("completed", "")
    assert first.log.read_text() == "42\n"
    assert "tiny-rl==1.0" in [package.replace("_", "-") for package in first.facts()["packages"]]
    wheel.unlink()
    second = make(entry, environment=kind("pip", "", str(wheel)))
    assert second.run(timeout_s=120)["ended"] == "completed"


@pytest.mark.slow
def test_requirements_that_cannot_be_installed_are_said_with_pips_words(make: Make, tmp_path: Path) -> None:
    attempt = make("true", environment=kind("pip", "", f"{tmp_path}/missing-1.0-py3-none-any.whl"))
    end = attempt.run(timeout_s=120)
    assert end["ended"] == "environment"
    assert "missing-1.0" in end["message"]
    assert (attempt.folder / "logs/setup.log").stat().st_size > 0


def test_a_stop_while_the_environment_is_made_starts_nothing(make: Make, tmp_path: Path) -> None:
    slow = tmp_path / "python3"
    slow.write_text("#!/bin/sh\nexec sleep 300\n")
    slow.chmod(0o755)
    attempt = make("echo never", environment=kind("python", str(slow)))
    attempt.start()
    end = attempt.stop()
    assert end["ended"] == "stopped"
    assert not attempt.log.exists()


def test_uv_syncs_the_projects_own_lock_and_lets_it_import_itself(make: Make) -> None:
    if shutil.which("uv", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("needs uv")
    attempt = make(["python", "-c", "import mine; print(mine.value)"], environment=kind("uv"))
    attempt.file("src/mine.py", "value = 7\n")
    attempt.file("pyproject.toml", '[project]\nname = "mine"\nversion = "1"\nrequires-python = ">=3.8"\n')
    attempt.file(
        "uv.lock",
        'version = 1\nrequires-python = ">=3.8"\n\n'
        '[[package]]\nname = "mine"\nversion = "1"\nsource = { virtual = "." }\n',
    )
    end = attempt.run(timeout_s=120)
    assert (end["ended"], end["message"]) == ("completed", "")
    assert attempt.log.read_text() == "7\n"


def test_uv_without_a_lock_says_how_to_make_it(make: Make) -> None:
    attempt = make("true", environment=kind("uv"))
    attempt.file("pyproject.toml", "")
    assert (
        attempt.run()["message"] == "the environment uv needs uv.lock in the working directory; create it with: uv lock"
    )


def test_what_was_seen_of_an_environment_is_kept_until_something_is_installed(
    make: Make, venv: Path, tmp_path: Path
) -> None:
    make("true", environment=kind("venv", str(venv))).run()
    (known,) = (tmp_path / "envs").glob("probe-*.json")
    known.write_text(json.dumps({**json.loads(known.read_text()), "packages": {"kept": "1"}}))
    again = make("true", environment=kind("venv", str(venv)))
    again.run()
    assert again.facts()["packages"] == ["kept==1"]
    next(venv.glob("lib/python3*/site-packages")).joinpath("new-1.dist-info").mkdir()
    later = make("true", environment=kind("venv", str(venv)))
    later.run()
    assert "kept==1" not in later.facts()["packages"]
    assert later.folder.joinpath(contract.EXIT).exists()


def _wheel(folder: Path) -> Path:
    """Write a wheel with one module, without any tool."""
    import zipfile  # noqa: PLC0415 -- only here

    path = folder / "tiny_rl-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_rl.py", "value = 42\n")
        archive.writestr("tiny_rl-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-rl\nVersion: 1.0\n")
        archive.writestr(
            "tiny_rl-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_rl-1.0.dist-info/RECORD", "")
    return path
