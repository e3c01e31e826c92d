"""Environments that take code from the working directory: what runs is what was packed, in every attempt."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from support.index import tiny_wheel
from support.running import Attempt
from support.sshd import free_port
from support.tiny_project import tiny_project

from raylaunch.runner.environments.local_sources import local_exports, local_packages, read_requirements

Make = Callable[..., Attempt]
UV = str(Path(sys.executable).parent / "uv")
INDEX = f"http://127.0.0.1:{free_port()}/simple"
"""Nobody answers there: what these tests build needs nothing from elsewhere."""


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Make attempts that share the node's folder of environments, each with files of its own."""
    made: list[Attempt] = []

    def one(entrypoint: str | list[str], environment: Mapping[str, object], files: Mapping[str, str]) -> Attempt:
        spec = {"kind": "pip", "value": "", "requirements": [], "packages": [], **environment}
        made.append(Attempt(tmp_path / str(len(made)), entrypoint, envs_dir=str(tmp_path / "envs"), environment=spec))
        for name, text in files.items():
            made[-1].file(name, text)
        return made[-1]

    yield one
    for attempt in made:
        attempt.close()


def ran(attempt: Attempt) -> str:
    """Run an attempt where no index answers; return what it printed. It must succeed."""
    end = attempt.run(timeout_s=120, PIP_INDEX_URL=INDEX, UV_DEFAULT_INDEX=INDEX, UV_OFFLINE="1")
    setup = attempt.folder / "logs" / "setup.log"
    assert (end["ended"], end["exit_code"]) == ("completed", 0), f"{end['message']}\n{setup.read_text()}"
    return attempt.log.read_text()


def below(folder: str, files: Mapping[str, str]) -> dict[str, str]:
    """Return files with their names below a folder."""
    return {f"{folder}/{name}": text for name, text in files.items()}


def locked(folder: Path, files: Mapping[str, str]) -> dict[str, str]:
    """Return a project's files with its ``uv.lock``."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    lock = [UV, "lock", "--quiet", "--offline", "--python", sys.executable]
    subprocess.run(lock, cwd=folder, check=True, timeout=60)
    return {**files, "uv.lock": (folder / "uv.lock").read_text()}


@pytest.mark.slow
def test_a_second_job_with_other_code_in_its_required_folders_runs_that_code(make: Make, tmp_path: Path) -> None:
    program = ["python", "-c", "import lib, own; print(lib.value, own.value); print(lib.__file__); print(own.__file__)"]
    messages = []
    for value in (1, 2):
        projects = {**below("lib", tiny_project("lib", value)), **below("own", tiny_project("own", value))}
        attempt = make(program, {"value": "requirements.txt"}, {"requirements.txt": "./lib\n-e ./own\n", **projects})
        messages.append(ran(attempt).splitlines())
    assert [one[0] for one in messages] == ["1 1", "2 2"]
    assert ["/code/" in place for one in messages for place in one[1:]] == [False, True] * 2
    assert len([path for path in (tmp_path / "envs").glob("pip-*") if path.is_dir()]) == 1


@pytest.mark.slow
def test_a_second_job_with_another_wheel_of_the_same_name_runs_its_code(make: Make) -> None:
    messages = []
    for value in (1, 2):
        attempt = make(
            ["python", "-c", "import x; print(x.value)"],
            {"value": "requirements.txt"},
            {"requirements.txt": "./wheels/x-1.0-py3-none-any.whl\n"},
        )
        tiny_wheel(attempt.code / "wheels", "x", "1.0", body=f"value = {value}")
        messages.append(ran(attempt))
    assert messages == ["1\n", "2\n"]


@pytest.mark.slow
def test_uv_installs_the_project_and_its_workspace_as_uv_run_does(make: Make, tmp_path: Path) -> None:
    workspace = '\n[tool.uv.workspace]\nmembers = ["libs/*"]\n[tool.uv.sources]\nlib = { workspace = true }\n'
    unused = below("libs/unused", {**tiny_project("unused", 0), "backend.py": "raise SystemExit('it is not wanted')\n"})
    shared = {**tiny_project("app", 7, needs=("lib",), more=workspace), **unused}
    files = locked(tmp_path / "project", {**shared, **below("libs/lib", tiny_project("lib", 1))})
    program = "app-run && python -c 'import lib; print(lib.value)'"
    assert ran(make(program, {"kind": "uv"}, files)) == "app 7 1.0\n1\n"
    changed = {**files, **below("libs/lib", tiny_project("lib", 2))}
    assert ran(make(program, {"kind": "uv"}, changed)) == "app 7 1.0\n2\n"
    assert len([path for path in (tmp_path / "envs").glob("uv-*") if path.is_dir()]) == 1


@pytest.mark.slow
def test_a_project_whose_package_is_named_src_imports_it(make: Make, tmp_path: Path) -> None:
    virtual = {"pyproject.toml": '[project]\nname = "p"\nversion = "1"\nrequires-python = ">=3.10"\n'}
    files = {
        "src/__init__.py": "",
        "src/model.py": "value = 3\n",
        "scripts/train.py": "import src.model as m; print(m.value)\n",
    }
    project = locked(tmp_path / "project", {**virtual, **files})
    assert ran(make(["python", "scripts/train.py"], {"kind": "uv"}, project)) == "3\n"


@pytest.mark.slow
def test_console_scripts_of_the_lock_see_the_project_too(make: Make, tmp_path: Path) -> None:
    tool = tiny_project("tool", 5)
    tool["tool.py"] = "def main():\n    import app\n    print('tool found', app.value)\n"
    sources = '\n[tool.uv.sources]\ntool = { path = "tool" }\n'
    files = locked(
        tmp_path / "project", {**tiny_project("app", 7, needs=("tool",), more=sources), **below("tool", tool)}
    )
    assert ran(make(["tool-run"], {"kind": "uv"}, files)) == "tool found 7\n"


@pytest.mark.slow
def test_packages_are_added_over_a_venv_that_stays_as_it_is_and_its_scripts_see_them(
    make: Make, tmp_path: Path
) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True, timeout=60)
    (venv / "bin" / "greet").write_text(f"#!{venv}/bin/python\nimport extra\nprint('greet', extra.__version__)\n")
    (venv / "bin" / "greet").chmod(0o755)
    info = next(venv.glob("lib/python3*/site-packages")) / "edited-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: edited\nVersion: 1.0\n")
    (info / "direct_url.json").write_text(f'{{"url": "file://{tmp_path}/edited", "dir_info": {{"editable": true}}}}')
    extra = str(tiny_wheel(tmp_path, "extra", "3.0"))
    added = {"kind": "venv", "value": str(venv), "packages": [extra]}
    first = make(["greet"], added, {})
    assert ran(first) == "greet 3.0\n"
    assert "extra==3.0" in first.facts()["packages"]
    assert first.facts()["warnings"][:1] == [
        f"edited is installed editable: later edits in {tmp_path}/edited reach this job"
    ]
    second = make(["greet"], added, {})
    assert ran(second) == "greet 3.0\n"
    assert not (second.folder / "logs" / "setup.log").exists()  # made once
    assert make(["greet"], {**added, "packages": []}, {}).run(timeout_s=120)["exit_code"] == 1


@pytest.mark.slow
def test_packages_are_added_to_rays_own_python_with_all_that_it_has(make: Make, tmp_path: Path) -> None:
    extra = str(tiny_wheel(tmp_path, "extra", "3.0", requires=["psutil"]))
    program = ["python", "-c", "import extra, psutil; print(extra.__version__, psutil.__file__)"]
    version, place = ran(make(program, {"kind": "default", "packages": [extra]}, {})).split()
    assert version == "3.0"
    assert place.startswith(sys.prefix)  # it was there, and is not installed again


def test_what_a_lock_takes_from_the_folder_is_known_by_its_source() -> None:
    lock = (
        '[[package]]\nname = "app"\nversion = "1"\nsource = { editable = "." }\n\n'
        '[[package]]\nname = "numpy"\nversion = "2"\nsource = { registry = "https://index.example.org/simple" }\n\n'
        '[[package]]\nname = "dyn"\nsource = { directory = "dyn" }\n'
    )
    assert local_packages(lock) == (["app", "dyn"], True)
    assert local_packages(lock.replace("editable", "virtual").partition('[[package]]\nname = "dyn"')[0]) == (
        ["app"],
        False,
    )
    assert local_exports("-e .\n./dyn ; os_name == 'posix'\nnumpy==2\n", Path("/code")) == (
        "-e .",
        "./dyn ; os_name == 'posix'",
    )


def test_requirements_are_read_with_their_files_and_what_is_here_is_told_apart(tmp_path: Path) -> None:
    for name, text in {
        **below("lib", tiny_project("lib", 1)),
        "more/base.txt": "alpha\n-c ../limits.txt\n",
        "limits.txt": "beta<3\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    text = "numpy>=2 # a comment\n-r more/base.txt\n-e ./lib[train]\nlib2 @ https://example.org/lib2-1.whl\n--index-url https://example.org/simple\n"
    found = read_requirements(text, parent=tmp_path, code=tmp_path)
    assert found.lines == (
        "numpy>=2",
        "alpha",
        f"-c {tmp_path}/more/../limits.txt",
        f"{tmp_path}/lib[train]",
        "lib2 @ https://example.org/lib2-1.whl",
        "--index-url https://example.org/simple",
    )
    assert found.local == (f"-e {tmp_path}/lib[train]",)


def test_the_key_of_requirements_changes_with_what_decides_on_other_packages_alone(tmp_path: Path) -> None:
    def key() -> str:
        return read_requirements("./lib\n-c limits.txt\n", parent=tmp_path, code=tmp_path).key

    (tmp_path / "lib").mkdir()
    for name, text in tiny_project("lib", 1).items():
        (tmp_path / "lib" / name).write_text(text)
    (tmp_path / "limits.txt").write_text("alpha<2\n")
    first = key()
    (tmp_path / "lib" / "lib.py").write_text("value = 2\n")
    assert key() == first
    (tmp_path / "limits.txt").write_text("alpha<3\n")
    second = key()
    assert second != first
    wheel = tiny_wheel(tmp_path, "own", "1.0")
    of_wheel = read_requirements(wheel.name, parent=tmp_path, code=tmp_path).key
    tiny_wheel(tmp_path, "own", "1.0", body="value = 2")
    assert read_requirements(wheel.name, parent=tmp_path, code=tmp_path).key != of_wheel
    static = (tmp_path / "lib" / "pyproject.toml").read_text()
    (tmp_path / "lib" / "pyproject.toml").write_text(static.replace("dependencies = []", 'dynamic = ["dependencies"]'))
    third = key()
    assert third != second
    (tmp_path / "lib" / "lib.py").write_text("value = 3\n")
    assert key() != third  # a dynamic project may read any of its files
