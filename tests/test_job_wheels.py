"""A job's own needs where nodes reach no package index: what is gathered, how it travels, what a runner makes of it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.api import Api, settings_of
from support.bridges import UnconnectedBridge
from support.index import Index, index, tiny_sdist, tiny_wheel
from support.running import Attempt
from support.sshd import free_port
from support.tiny_project import tiny_project

from raylaunch.agent import index_check
from raylaunch.agent.packages import COMPLETE, WHOLE, Packages, choose_wheels, link_wheels, platform_of, this_platform
from raylaunch.client.client import Client
from raylaunch.client.job_wheels import needed_by, requirements_of, send_wheels
from raylaunch.client.transport import Response, Transport, no_progress
from raylaunch.contract import WHEELS, Exit, WheelSpec
from raylaunch.controller.scheduler.observed import ObservedState
from raylaunch.controller.scheduler.preflight import WheelPreflight
from raylaunch.controller.store.packages import ClusterWheels
from raylaunch.controller.store.retention import plan_sweep
from raylaunch.errors import ConflictError, SpecError, VersionError, WheelsNeededError
from raylaunch.models.cluster import EnvironmentWheels, NodeView
from raylaunch.models.fields import Environment, Retention
from raylaunch.models.job import BuildPlatform, DryRun, SubmitRequest, WheelFile, WheelSet
from raylaunch.models.job_spec import JobSpec

pytestmark = pytest.mark.slow

HERE = BuildPlatform.model_validate(this_platform())
PYENV = Path("~/.pyenv/versions").expanduser()
OTHER = BuildPlatform(arch="aarch64", glibc="2.39", python="3.12.3")
IMPORTS = [
    "python",
    "-c",
    "import sys, alpha, beta; print(alpha.__version__, beta.__version__, sys.prefix != sys.base_prefix)",
]
PROJECT = '[project]\nname = "tiny"\nversion = "0"\nrequires-python = ">=3.10"\ndependencies = ["alpha"]\n'


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """An index that this machine alone reaches: ``alpha``, which needs ``beta``; ``native`` for this platform alone."""
    folder = tmp_path / "index"
    tiny_wheel(folder, "alpha", "1.0", requires=["beta"])
    tiny_wheel(folder, "beta", "2.0")
    native = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    tiny_wheel(folder, "native", "1.0", tag=f"{native}-{native}-manylinux_2_17_{platform.machine()}")
    monkeypatch.setenv("RAYLAUNCH_HOME", str(tmp_path / "home"))
    with index(folder) as found:
        for name, value in found.environ(tmp_path).items():
            monkeypatch.setenv(name, os.environ["PATH"] if name == "PATH" else value)
        monkeypatch.delenv("UV_DEFAULT_INDEX", raising=False)
        monkeypatch.delenv("UV_INDEX_URL", raising=False)
        yield found


@dataclass
class Sent:
    """What went along, and what was said."""

    sets: tuple[WheelSet, ...]
    notices: list[str]

    @property
    def files(self) -> set[str]:
        return {wheel.file for one in self.sets for wheel in one.wheels}


def sent(
    api: Api,
    environment: object,
    folder: Path,
    platforms: Sequence[BuildPlatform] = (HERE,),
    packages: Sequence[str] = (),
) -> Sent:
    """Gather and send the wheels of an environment, as `Client.submit` does."""
    spec = JobSpec.model_validate(
        {"entrypoint": "x", "working_dir": str(folder), "environment": environment, "packages": packages}
    )
    notices: list[str] = []

    async def work() -> tuple[WheelSet, ...]:
        async with Transport(api.reach(), cluster="test") as wire:

            async def once(call: Callable[[], Awaitable[Response]]) -> Response:
                return await call()

            return await send_wheels(
                wire, spec, platforms, retry=once, on_progress=no_progress, on_notice=notices.append
            )

    return Sent(asyncio.run(work()), notices)


def attempt_with(api: Api, sets: Sequence[WheelSet], root: Path, environment: Environment, **files: str) -> Attempt:
    """Lay an attempt out as a node agent does that got these wheels from the bridge."""
    packages, wheels = Packages(root), list[WheelSpec]()
    for one in (wheel for found in sets for wheel in found.wheels):
        data = (api.store / "packages" / f"{one.sha256}.tar.gz").read_bytes()
        assert packages.put(one.sha256, 0, len(data), data) == COMPLETE
        wheels.append({"file": one.file, "sha256": one.sha256, "build": one.build, "added": one.added})
    attempt = Attempt(
        root,
        IMPORTS,
        environment={**environment.model_dump(), "requirements": list(environment.requirements), "packages": []},
    )
    link_wheels(root / "packages", wheels, attempt.folder / WHEELS)
    for name, text in files.items():
        attempt.file(name.replace("__", "."), text)
    return attempt


def test_packages_are_added_to_an_environment_of_another_python_from_wheels_that_fit_it(
    api: Api, served: Index, tmp_path: Path
) -> None:
    other = [one for one in sorted(PYENV.glob("3.1[0-2].*/bin/python3")) if f"/{HERE.minor}." not in str(one)]
    if not other:
        pytest.skip("needs another Python under ~/.pyenv")
    subprocess.run([other[-1], "-m", "venv", "--without-pip", tmp_path / "venv"], check=True, timeout=60)
    named = Environment(kind="venv", value=str(tmp_path / "venv"))
    its = BuildPlatform.model_validate(platform_of(named.model_dump(), {}))
    assert its.minor == other[-1].parent.parent.name.rpartition(".")[0]
    tag = f"cp{its.minor.replace('.', '')}"
    tiny_wheel(served.folder, "native", "1.0", tag=f"{tag}-{tag}-manylinux_2_17_{platform.machine()}")
    ended = {}
    for fits in (its, HERE):
        found = sent(api, str(named), tmp_path, [fits], packages=["native"])
        attempt = attempt_with(api, found.sets, tmp_path / fits.minor, named)
        reported = json.loads((attempt.folder / "attempt.json").read_text())
        reported["environment"]["packages"] = ["native"]
        (attempt.folder / "attempt.json").write_text(
            json.dumps({**reported, "entrypoint": ["python", "-c", "import native"]})
        )
        ended[fits] = run_without_index(attempt)
    assert ended[its]["exit_code"] == 0
    assert f"the wheels are for python{HERE.minor}, but the environment has python{its.minor}" in str(ended[HERE])


def test_the_python_of_a_named_environment_that_cannot_be_asked_is_taken_for_the_nodes(tmp_path: Path) -> None:
    folder = tmp_path / "venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "python").write_text("#!/bin/sh\necho no version\n")
    (folder / "python").chmod(0o755)
    for kind, value in (
        ("venv", str(tmp_path / "venv")),
        ("venv", ".venv"),
        ("conda", "no-such-environment"),
        ("python", "/nowhere/python3"),
        ("default", ""),
    ):
        assert platform_of({"kind": kind, "value": value}, {"PATH": "/nowhere"}) == this_platform()


def made_in(root: Path) -> list[str]:
    """Return the kinds of the environments that were made on a node."""
    return [path.name.partition("-")[0] for path in (root / "envs").iterdir() if path.is_dir()]


def run_without_index(attempt: Attempt) -> Exit:
    """Run an attempt where nobody answers at the index that pip and uv are told."""
    url = f"http://127.0.0.1:{free_port()}/simple"
    attempt.start(PIP_INDEX_URL=url, UV_DEFAULT_INDEX=url, PIP_RETRIES="1", UV_HTTP_RETRIES="0").wait(120)
    return attempt.exit()


@pytest.mark.long
def test_what_pip_needs_is_made_from_the_wheels_alone(api: Api, served: Index, tmp_path: Path) -> None:
    found = sent(api, {"pip": ["alpha"]}, tmp_path)
    assert found.files == {"alpha-1.0-py3-none-any.whl", "beta-2.0-py3-none-any.whl"}
    served.down = True
    environment = Environment(kind="pip", requirements=("alpha",))
    attempt = attempt_with(api, found.sets, tmp_path / "node", environment)
    assert run_without_index(attempt)["exit_code"] == 0, attempt.output()
    assert attempt.log.read_text() == "1.0 2.0 True\n"
    assert made_in(tmp_path / "node") == ["wheels"]


@pytest.mark.long
def test_what_uv_locks_is_made_from_the_wheels_alone_without_uv_on_the_node(
    api: Api, served: Index, tmp_path: Path
) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "pyproject.toml").write_text(PROJECT)
    uv = str(Path(sys.executable).parent / "uv")
    subprocess.run([uv, "lock", "--quiet", "--default-index", served.url], cwd=project, check=True, timeout=60)
    found = sent(api, "uv", project)
    assert found.files == {"alpha-1.0-py3-none-any.whl", "beta-2.0-py3-none-any.whl"}
    served.down = True
    lock = (project / "uv.lock").read_text()
    files = {"pyproject__toml": PROJECT, "uv__lock": lock}
    attempt = attempt_with(api, found.sets, tmp_path / "node", Environment(kind="uv"), **files)
    assert run_without_index(attempt)["exit_code"] == 0, attempt.output()
    assert attempt.log.read_text() == "1.0 2.0 True\n"
    assert made_in(tmp_path / "node") == ["wheels"]


@pytest.mark.parametrize("kind", ["pip", pytest.param("uv", marks=pytest.mark.long)])
def test_projects_of_the_working_directory_are_built_where_no_index_is_reached(
    api: Api, served: Index, tmp_path: Path, kind: str
) -> None:
    own = tiny_project("lib", 4, needs=("alpha",), requires=("gamma",))
    tiny_wheel(served.folder, "gamma", "5.0")
    folder, below = tmp_path / "project", "" if kind == "uv" else "lib/"
    files = {f"{below}{name}": text for name, text in own.items()} | {"requirements.txt": "-e ./lib\n"}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    if kind == "uv":
        uv = [str(Path(sys.executable).parent / "uv"), "lock", "--quiet", "--default-index", served.url]
        subprocess.run(uv, cwd=folder, check=True, timeout=60)
        files["uv.lock"] = (folder / "uv.lock").read_text()
    environment = Environment.model_validate("uv" if kind == "uv" else "pip:requirements.txt")
    found = sent(api, environment, folder)
    assert {wheel.file.partition("-")[0]: wheel.build for one in found.sets for wheel in one.wheels} == {
        "alpha": False,
        "beta": False,
        "gamma": True,
    }
    served.down = True
    attempt = attempt_with(api, found.sets, tmp_path / "node", environment)
    for name, text in files.items():
        attempt.file(name, text)
    spec = json.loads((attempt.folder / "attempt.json").read_text())
    (attempt.folder / "attempt.json").write_text(
        json.dumps({**spec, "entrypoint": "lib-run && python -c 'import alpha'"})
    )
    assert run_without_index(attempt)["exit_code"] == 0, (attempt.folder / "logs/setup.log").read_text()
    assert attempt.log.read_text() == "lib 4 1.0\n"
    assert made_in(tmp_path / "node") == ["wheels"]


def test_a_project_whose_needs_only_its_build_knows_is_refused_where_no_index_is_reached(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "setup.py").write_text("from setuptools import setup\nsetup(name='lib')\n")
    (tmp_path / "requirements.txt").write_text("./lib\n")
    spec = JobSpec(
        entrypoint="x", working_dir=str(tmp_path), environment=Environment(kind="pip", value="requirements.txt")
    )
    with pytest.raises(SpecError, match="does not list its dependencies"):
        asyncio.run(needed_by(spec, tmp_path))


def test_packages_that_a_job_adds_are_gathered_whatever_its_environment_is(
    api: Api, served: Index, tmp_path: Path
) -> None:
    assert sent(api, "venv:/opt/train", tmp_path, packages=["alpha"]).files == {
        "alpha-1.0-py3-none-any.whl",
        "beta-2.0-py3-none-any.whl",
    }
    assert served.asked


def test_what_the_cluster_has_is_not_sent_again(api: Api, served: Index, tmp_path: Path) -> None:
    first = sent(api, {"pip": ["alpha"]}, tmp_path)
    files = {path.name: path.stat().st_mtime_ns for path in (api.store / "packages").iterdir()}
    fetched = len(served.fetched)
    assert sent(api, {"pip": ["alpha"]}, tmp_path).sets == first.sets
    assert {path.name: path.stat().st_mtime_ns for path in (api.store / "packages").iterdir()} == files
    assert len(served.fetched) == fetched


def test_a_package_without_a_wheel_for_a_nodes_platform_is_refused_by_name(
    api: Api, served: Index, tmp_path: Path
) -> None:
    with pytest.raises(VersionError) as caught:
        sent(api, {"pip": ["native"]}, tmp_path, [HERE, OTHER])
    assert "native" in caught.value.message
    assert "no wheel for Python 3.12 on Linux aarch64 with glibc 2.39" in caught.value.message
    assert "name an environment that has it" in caught.value.hint
    tiny_sdist(served.folder, "source", "1.0")
    with pytest.raises(VersionError, match="source"):
        sent(api, {"pip": ["source"]}, tmp_path)


def test_where_this_machine_reaches_no_index_either_that_is_said_and_nothing_goes_along(
    api: Api, served: Index, tmp_path: Path
) -> None:
    served.down = True
    found = sent(api, {"pip": ["alpha"]}, tmp_path)
    assert found.sets == ()
    assert "the job can only start where an earlier one has made its environment" in found.notices[0]


def test_an_environment_that_cannot_be_fetched_says_that_the_node_reaches_no_index_and_what_to_do(
    tmp_path: Path,
) -> None:
    environment = Environment(kind="pip", requirements=("alpha",))
    attempt = Attempt(
        tmp_path, IMPORTS, environment={**environment.model_dump(), "requirements": ["alpha"], "packages": []}
    )
    ended = run_without_index(attempt)
    assert ended["ended"] == "environment"
    assert "cannot reach a package index" in ended["message"]


def test_a_project_that_needs_another_python_than_the_nodes_is_refused(api: Api, served: Index, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "pyproject.toml").write_text(PROJECT.replace(">=3.10", ">=3.10,<3.12"))
    uv = str(Path(sys.executable).parent / "uv")
    subprocess.run([uv, "lock", "--quiet", "--default-index", served.url], cwd=project, check=True, timeout=60)
    with pytest.raises(
        SpecError, match=r"needs Python >=3\.10,<3\.12; nodes that reach no package index have 3\.12\.3"
    ):
        sent(api, "uv", project, [OTHER])


def test_other_files_of_a_requirements_file_are_found_and_their_change_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "requirements.txt").write_text("alpha\n-r more/base.txt\n-c limits.txt\n")
    (tmp_path / "more" / "base.txt").write_text("beta\n")
    (tmp_path / "limits.txt").write_text("beta<3\n")
    of_file = Environment(kind="pip", value="requirements.txt")
    before = asyncio.run(requirements_of(of_file, tmp_path))
    assert before[0] == "alpha"
    assert before[1].startswith(f"-r {tmp_path}/more/base.txt")
    (tmp_path / "limits.txt").write_text("beta<2\n")
    assert asyncio.run(requirements_of(of_file, tmp_path)) != before
    with pytest.raises(SpecError, match=r"gone\.txt cannot be read"):
        asyncio.run(requirements_of(Environment(kind="pip", value="gone.txt"), tmp_path))


def test_a_node_takes_the_wheels_of_its_own_platform() -> None:
    wheels: list[WheelSpec] = [{"file": "a-1-py3-none-any.whl", "sha256": "0" * 64, "build": False, "added": False}]
    here, other = this_platform(), OTHER.model_dump()
    assert choose_wheels([{"platform": here, "wheels": wheels}], here) == wheels
    assert choose_wheels([{"platform": other, "wheels": wheels}], here) == []  # type: ignore[typeddict-item]  # plain data


def test_a_wheel_is_kept_whole_on_a_node_and_a_damaged_one_is_not(tmp_path: Path) -> None:
    packages, wheel = Packages(tmp_path), tiny_wheel(tmp_path, "alpha", "1.0", filler=1000).read_bytes()
    sha256 = hashlib.sha256(wheel).hexdigest()
    assert packages.put(sha256, 0, len(wheel), wheel[:500]) == 500
    assert packages.put(sha256, 500, len(wheel), wheel[500:]) == COMPLETE
    assert (packages.path(sha256) / WHOLE).read_bytes() == wheel
    with pytest.raises(Exception, match="arrived damaged"):
        packages.put("0" * 64, 0, len(wheel), wheel)


def test_a_wheels_name_cannot_lead_anywhere(tmp_path: Path) -> None:
    for name in ("../x.whl", "/x.whl", "x", "a b.whl"):
        with pytest.raises(ValueError, match="pattern"):
            SubmitRequest.model_validate(
                {
                    "spec": {"entrypoint": "x"},
                    "wheels": [{"platform": OTHER.model_dump(), "wheels": [{"file": name, "sha256": "0" * 64}]}],
                }
            )
    link_wheels(
        tmp_path / "packages",
        [{"file": "../../x.whl", "sha256": "0" * 64, "build": False, "added": False}],
        tmp_path / WHEELS,
    )
    assert [path.name for path in (tmp_path / WHEELS).iterdir()] == ["x.whl"]


def test_whether_an_index_is_reached_is_what_pip_would_find(served: Index, tmp_path: Path) -> None:
    closed = f"http://127.0.0.1:{free_port()}/simple"

    def reached(kind: str = "pip", **env: str) -> bool:
        return index_check.reaches_index({"HOME": str(tmp_path / "nobody"), **env}, kind=kind)

    assert reached(PIP_INDEX_URL=served.url)
    assert not reached(PIP_INDEX_URL=closed)
    assert not reached(PIP_INDEX_URL="http://no-such-host.invalid/simple")
    assert reached(PIP_INDEX_URL=closed, PIP_NO_INDEX="1")
    assert reached("uv", PIP_INDEX_URL=closed, UV_DEFAULT_INDEX=served.url)
    assert not reached("pip", PIP_INDEX_URL=closed, UV_DEFAULT_INDEX=served.url)
    served.down = True  # it answers, and what it answers is pip's to say
    assert reached(PIP_INDEX_URL=served.url)
    (tmp_path / "pip.conf").write_text(f"[global]\nindex-url = {closed}\n")
    assert not reached(PIP_CONFIG_FILE=str(tmp_path / "pip.conf"))


def test_the_record_keeps_the_wheels_for_later_attempts_and_lists_leave_them_out(
    api: Api, served: Index, tmp_path: Path
) -> None:
    found = sent(api, {"pip": ["alpha"]}, tmp_path)
    request = SubmitRequest(spec=JobSpec(entrypoint="x", working_dir=""), wheels=found.sets)
    record, _ = api.do(lambda: api.records.create(request, owner="tom", wandb=None))
    assert api.do(lambda: api.records.get(record.id)).wheels == found.sets
    assert "wheels" not in json.loads(record.view().model_dump_json())
    (kept,) = api.do(api.records.retention_rows)
    sent_files = {wheel.sha256 for one in found.sets for wheel in one.wheels}
    later = plan_sweep([kept], Retention(), dict.fromkeys([*sent_files, "unused"], 0.0), now=1e9)
    assert later.packages == ("unused",)
    assert served.asked


# -- the cluster's environment ---------------------------------------------------------------------------------------

INDEX = "https://index.example.org/simple"
PLAIN = JobSpec(entrypoint="x", working_dir="")
"""A job that names no environment."""


async def submitted(api: Api, folder: Path, notices: list[str], known: Environment | None = None) -> str:
    """Submit a job that names no environment, where cluster.yaml says `known` of it; return its id."""
    async with Client(api.reach(), cluster="test", on_notice=notices.append, environment=known) as client:
        return (await client.submit(PLAIN.model_copy(update={"working_dir": str(folder)}))).job.id


def test_the_wheels_of_the_clusters_own_environment_go_along_too(api: Api, served: Index, tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "requirements.txt").write_text("alpha\n")
    own = Environment(kind="pip", value="requirements.txt")
    api.desk.air_gapped = DryRun(fits=("h1",), message="", wheels_for=(HERE,), environment=own)
    notices: list[str] = []
    job = asyncio.run(submitted(api, tmp_path / "code", notices))
    (found,) = api.do(lambda: api.records.get(job)).wheels
    assert {wheel.file for wheel in found.wheels} == {"alpha-1.0-py3-none-any.whl", "beta-2.0-py3-none-any.whl"}
    assert (served.asked != [], notices) == (True, [])


def test_where_no_index_is_reached_from_here_either_the_job_is_taken_and_that_is_said(
    api: Api, served: Index, tmp_path: Path
) -> None:
    served.down = True
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "requirements.txt").write_text("alpha\n")
    own = Environment(kind="pip", value="requirements.txt")
    api.desk.air_gapped = DryRun(fits=("h1",), message="", wheels_for=(HERE,), environment=own)
    notices: list[str] = []
    job = asyncio.run(submitted(api, tmp_path / "code", notices))
    assert api.do(lambda: api.records.get(job)).wheels == ()
    assert "wheels for them could not be gathered" in notices[0]


def code_in(folder: Path) -> Path:
    """Make a working directory with something to send."""
    (folder / "code").mkdir()
    (folder / "code" / "train.py").write_text("print()")
    return folder / "code"


def test_lines_that_the_head_names_are_not_resolved_here(
    api: Api, served: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET", "hunter2")
    lines = ("alpha", f"leak @ {served.url}/${{AWS_SECRET}}/leak-1-py3-none-any.whl", "-r /etc/hostname")
    named = Environment(kind="pip", requirements=lines)
    api.desk.air_gapped = DryRun(fits=("h1",), message="", wheels_for=(HERE,), environment=named)
    notices: list[str] = []
    job = asyncio.run(submitted(api, code_in(tmp_path), notices))
    assert api.do(lambda: api.records.get(job)).wheels == ()
    assert (served.asked, served.fetched) == ([], [])
    assert "does not resolve" in notices[0]


@pytest.mark.parametrize("same", [True, False])
def test_packages_that_the_cluster_lists_are_resolved_where_cluster_yaml_here_lists_the_same(
    api: Api, served: Index, tmp_path: Path, *, same: bool
) -> None:
    known = Environment(kind="pip", requirements=("alpha",))
    there = known if same else Environment(kind="pip", requirements=("alpha", "native"))
    api.desk.air_gapped = DryRun(fits=("h1",), message="", wheels_for=(HERE,), environment=there)
    job = asyncio.run(submitted(api, code_in(tmp_path), [], known))
    assert bool(api.do(lambda: api.records.get(job)).wheels) is same
    assert bool(served.asked) is same


def test_up_gathers_the_wheels_of_what_cluster_yaml_lists_and_sends_them_to_the_cluster(
    api: Api, served: Index
) -> None:
    listed = Environment(kind="pip", requirements=("alpha",))
    api.desk.air_gapped = DryRun(fits=("h1",), message="", wheels_for=(HERE,), environment=listed)

    async def up(environment: Environment) -> None:
        async with Client(api.reach("olga"), cluster="test", environment=environment) as client:
            await client.send_environment()

    asyncio.run(up(Environment(kind="uv")))  # what each job's own folder has
    assert api.desk.kept == []
    asyncio.run(up(listed))
    (kept,) = api.desk.kept
    assert (kept.environment, [one.platform for one in kept.sets]) == (listed, [HERE])
    assert {wheel.file for wheel in kept.sets[0].wheels} == {"alpha-1.0-py3-none-any.whl", "beta-2.0-py3-none-any.whl"}
    assert all((api.store / "packages" / f"{wheel.sha256}.tar.gz").is_file() for wheel in kept.sets[0].wheels)
    assert served.asked


def test_a_dry_run_finds_out_that_wheels_cannot_be_gathered_and_downloads_none(api: Api, served: Index) -> None:
    async def dry(package: str, platform: BuildPlatform) -> DryRun:
        own = Environment(kind="pip", requirements=(package,))
        api.desk.air_gapped = DryRun(fits=("h1",), message="", wheels_for=(platform,), environment=own)
        async with Client(api.reach(), cluster="test") as client:
            return await client.dry_run(PLAIN.model_copy(update={"environment": own}))

    assert asyncio.run(dry("alpha", HERE)).wheels_for == (HERE,)
    with pytest.raises(VersionError, match="native"):
        asyncio.run(dry("native", OTHER))
    assert (served.asked != [], served.fetched) == (True, [])


def test_who_has_no_cluster_yaml_resolves_what_they_add_alone(api: Api, served: Index, tmp_path: Path) -> None:
    listed = Environment(kind="pip", requirements=("alpha",))
    there = DryRun(fits=("h1",), message="", wheels_for=(HERE,), wheels_there=(HERE,), environment=listed)
    api.desk.air_gapped = there
    job = PLAIN.model_copy(update={"working_dir": str(code_in(tmp_path)), "packages": ("native",)})

    async def work() -> str:
        async with Client(api.reach(), cluster="test") as client:
            return (await client.submit(job)).job.id

    made = asyncio.run(work())
    (found,) = api.do(lambda: api.records.get(made)).wheels
    assert [(wheel.file.split("-")[0], wheel.added) for wheel in found.wheels] == [("native", True)]
    assert {name for name in served.asked if "alpha" in name} == set()


@pytest.mark.parametrize("file", ["../requirements.txt", "/etc/hostname", "~/requirements.txt"])
def test_a_file_outside_the_working_folder_that_the_head_names_is_not_read(
    api: Api, served: Index, tmp_path: Path, file: str
) -> None:
    (tmp_path / "requirements.txt").write_text("alpha\n")
    own = Environment(kind="pip", value=file)
    api.desk.air_gapped = DryRun(fits=("h1",), message="", wheels_for=(HERE,), environment=own)
    with pytest.raises(SpecError, match="leads out of the working directory"):
        asyncio.run(submitted(api, code_in(tmp_path), []))
    assert served.asked == []


class Looks(UnconnectedBridge):
    """A link to nodes, each with the address of the package index that it reaches; empty for none."""

    def __init__(self, folder: Path, indexes: Sequence[str]) -> None:
        super().__init__(folder)
        self._indexes = indexes
        self.kinds: list[object] = []

    async def call_agent(self, node_id: str, method: str, *args: object, timeout_s: float) -> object:
        assert (method, timeout_s) == ("index_look", 20)
        self.kinds.append(args[1])
        return {"index": self._indexes[int(node_id)], **HERE.model_dump()}


def needs(folder: Path, *indexes: str, kind: str | Environment) -> tuple[WheelPreflight, Looks]:
    own = Environment.model_validate(kind if isinstance(kind, Environment) else {"kind": kind})
    settings = settings_of(folder, 9).model_copy(update={"default_environment": own})
    nodes = tuple(
        NodeView(id=str(n), hostname=f"h{n}", address="10.0.0.1", alive=True, steward=True, cpus=4, cpus_free=4)
        for n in range(len(indexes))
    )
    link = Looks(folder, indexes)
    kept = ClusterWheels(settings)
    return WheelPreflight(settings=settings, observed=ObservedState(nodes=nodes), bridge=link, kept=kept), link


def test_wheels_of_the_clusters_environment_reach_the_jobs_that_use_it_and_stay_while_it_is_the_same(
    tmp_path: Path,
) -> None:
    listed = Environment(kind="pip", requirements=("alpha",))
    alpha, native = (WheelFile(file=f"{name}-1-py3-none-any.whl", sha256=name[0] * 64) for name in ("aa", "ff"))
    sets = (WheelSet(platform=HERE, wheels=(alpha,)),)
    wheels, _ = needs(tmp_path, INDEX, "", kind=listed)
    assert asyncio.run(wheels.of(PLAIN)) == (HERE,)
    with pytest.raises(ConflictError):
        asyncio.run(wheels.kept.keep(EnvironmentWheels(environment=Environment(kind="uv"), sets=sets)))
    asyncio.run(wheels.kept.keep(EnvironmentWheels(environment=listed, sets=sets)))

    again, _ = needs(tmp_path, INDEX, "", kind=listed)  # as after a restart
    asyncio.run(again.check(SubmitRequest(spec=PLAIN)))
    assert again.complete(SubmitRequest(spec=PLAIN)).wheels == sets
    with_more = PLAIN.model_copy(update={"packages": ("native",)})
    assert (asyncio.run(again.of(with_more)), again.there(with_more)) == ((HERE,), (HERE,))
    more = WheelSet(platform=HERE, wheels=(native.model_copy(update={"added": True}),))
    (both,) = again.complete(SubmitRequest(spec=with_more, wheels=(more,))).wheels
    assert both.wheels == (alpha, *more.wheels)
    assert again.complete(SubmitRequest(spec=with_more)).wheels == ()  # its nodes reach an index
    own = PLAIN.model_copy(update={"environment": Environment(kind="pip", requirements=("native",))})
    assert again.complete(SubmitRequest(spec=own)).wheels == ()
    assert plan_sweep([], Retention(), {"a" * 64: 0.0}, now=1e9, also=again.kept.packages).packages == ()

    other, _ = needs(tmp_path, INDEX, "", kind=Environment(kind="pip", requirements=("alpha", "beta")))
    assert asyncio.run(other.of(PLAIN)) == (HERE,)
    assert other.complete(SubmitRequest(spec=PLAIN)).wheels == ()


@pytest.mark.parametrize("own", [Environment(), Environment(kind="pip", requirements=("alpha",))])
def test_a_job_is_refused_until_the_wheels_of_its_environment_were_sought(tmp_path: Path, own: Environment) -> None:
    wheels, link = needs(tmp_path, INDEX, "", kind="uv")
    job, kind = PLAIN.model_copy(update={"environment": own}), "uv" if own.kind == "default" else "pip"
    with pytest.raises(WheelsNeededError, match=r"needs wheels: nodes with Python .* cannot reach"):
        asyncio.run(wheels.check(SubmitRequest(spec=job)))
    assert link.kinds == [kind, kind]
    asyncio.run(wheels.check(SubmitRequest(spec=job, wheels_sought=True)))
    assert len(link.kinds) == 2


def test_a_job_that_wants_rays_own_python_has_no_need(tmp_path: Path) -> None:
    wheels, link = needs(tmp_path, "", kind="uv")
    asyncio.run(wheels.check(SubmitRequest(spec=PLAIN.model_copy(update={"environment": Environment(kind="ray")}))))
    assert link.kinds == []


@pytest.mark.parametrize(("reached", "kind"), [(INDEX, "uv"), ("", "default")])
def test_nothing_is_refused_where_an_index_is_reached_or_nothing_is_made(
    tmp_path: Path, reached: str, kind: str
) -> None:
    wheels, _ = needs(tmp_path, reached, kind=kind)
    asyncio.run(wheels.check(SubmitRequest(spec=PLAIN)))
