"""Which Python a job gets when it names none: the order, what is passed over, and what a missing module's hint says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from raylaunch.cli.run import spec_of
from raylaunch.client.environment_choice import (
    ActivePython,
    active_python,
    choose,
    editable_in,
    has_module,
    import_hint,
    missing_module,
)
from raylaunch.errors import SpecError
from raylaunch.models.cluster import ClusterPython
from raylaunch.models.fields import Environment
from raylaunch.models.job import EnvironmentChoice, EnvironmentFacts, JobView
from raylaunch.models.job_spec import JobSpec
from raylaunch.models.states import JobState

RAYS = ClusterPython(version="3.11.2", prefix="/opt/ray", ray="2.60.0")
LOCK = 'version = 1\n\n[[package]]\nname = "numpy"\nversion = "2.4.0"\n'


def venv(folder: Path, *, python: str = "3.11.9", packages: Mapping[str, str] | None = None) -> Path:
    """Make what looks like a virtual environment, with packages by name and version."""
    site = folder / "lib" / f"python{python.rpartition('.')[0]}" / "site-packages"
    site.mkdir(parents=True)
    (folder / "pyvenv.cfg").write_text(f"home = /usr/bin\nversion_info = {python}\n")
    for name, version in (packages or {}).items():
        (site / name).mkdir()
        (site / f"{name}-{version}.dist-info").mkdir()
    return folder


def conda(folder: Path) -> Path:
    """Make what looks like a conda environment."""
    (folder / "conda-meta").mkdir(parents=True)
    (folder / "conda-meta" / "python-3.12.4-h955ad1f_1.json").write_text("{}")
    return folder


def active(prefix: Path) -> ActivePython:
    """Return an environment as `source bin/activate` makes it the active one."""
    found = active_python({"VIRTUAL_ENV": str(prefix)})
    assert found is not None
    return found


def project(folder: Path, lock: str = LOCK) -> JobSpec:
    """Make a folder with a lock, and a job in it."""
    folder.mkdir()
    (folder / "pyproject.toml").write_text('[project]\nname = "p"\nversion = "0"\n')
    (folder / "uv.lock").write_text(lock)
    return JobSpec(entrypoint="python train.py", working_dir=str(folder))


def test_a_venv_or_a_conda_environment_that_is_active_is_found_by_its_variable(tmp_path: Path) -> None:
    made, other = venv(tmp_path / "venv"), conda(tmp_path / "train")
    assert active_python({"VIRTUAL_ENV": str(made)}) == (Environment(kind="venv", value=str(made)), made, "3.11.9")
    assert active_python({"CONDA_PREFIX": str(other)}) == (Environment(kind="conda", value=str(other)), other, "3.12.4")
    assert active_python({}) is None
    assert active_python({"VIRTUAL_ENV": str(tmp_path / "gone")}) is None


def test_of_two_active_environments_the_first_on_path_is_used(tmp_path: Path) -> None:
    both = {"VIRTUAL_ENV": str(venv(tmp_path / "venv")), "CONDA_PREFIX": str(conda(tmp_path / "train"))}
    path = [f"{tmp_path}/train/bin", f"{tmp_path}/venv/bin", "/usr/bin"]
    first = active_python({**both, "PATH": ":".join(path)})
    second = active_python({**both, "PATH": ":".join([path[1], path[0], path[2]])})
    assert first is not None
    assert second is not None
    assert (first.environment.kind, second.environment.kind) == ("conda", "venv")


def test_condas_base_and_environments_with_only_raylaunch_are_ignored(tmp_path: Path) -> None:
    base = conda(tmp_path / "miniforge3")
    (base / "condabin").mkdir()
    assert active_python({"CONDA_PREFIX": str(base)}) is None
    assert active_python({"CONDA_PREFIX": str(conda(tmp_path / "root")), "CONDA_DEFAULT_ENV": "base"}) is None
    tool = venv(tmp_path / "tool")
    (tool / "uv-receipt.toml").write_text("")
    assert active_python({"VIRTUAL_ENV": str(tool)}) is None
    own = venv(tmp_path / "home" / "versions" / "1")
    assert active_python({"VIRTUAL_ENV": str(own), "RAYLAUNCH_HOME": str(tmp_path / "home")}) is None


def test_a_notebooks_kernel_counts_by_its_prefix_whatever_started_its_server(tmp_path: Path) -> None:
    server, kernel = venv(tmp_path / "server"), venv(tmp_path / "kernel")
    found = active_python({"VIRTUAL_ENV": str(server)}, prefix=str(kernel))
    assert found is not None
    assert found.prefix == kernel
    fallen = active_python({"VIRTUAL_ENV": str(server)}, prefix="/usr")
    assert fallen is not None
    assert fallen.prefix == server


def test_the_temporary_layer_of_uv_run_is_ignored_and_the_environment_below_is_used(tmp_path: Path) -> None:
    below, over = venv(tmp_path / "venv"), venv(tmp_path / "cache" / "over")
    (over / "pyvenv.cfg").write_text(f"home = /usr/bin\nextends-environment = {below}\n")
    assert active(over).prefix == below


def test_the_order_is_job_cluster_lock_active_and_rays_own(tmp_path: Path) -> None:
    mine = active(venv(tmp_path / "venv"))
    locked, plain = project(tmp_path / "locked"), JobSpec(entrypoint="x", working_dir=str(tmp_path))
    of_cluster = RAYS.model_copy(update={"environment": Environment(kind="conda", value="train")})
    named = locked.model_copy(update={"environment": Environment(kind="pip", requirements=("numpy",))})
    own = locked.model_copy(update={"environment": Environment(kind="default")})

    def chosen(spec: JobSpec, cluster: ClusterPython = RAYS, *, here: bool = True) -> tuple[str, str]:
        found = choose(spec, cluster, mine, here=here)
        return found.source, str(found.environment)

    assert chosen(named, of_cluster) == ("job", "pip: numpy")
    assert chosen(locked, of_cluster) == ("cluster", "default")
    assert chosen(locked) == ("lock", "uv")
    assert chosen(plain) == ("active", f"venv:{tmp_path}/venv")
    assert chosen(plain, here=False) == ("own", "default")
    assert chosen(own) == ("own", "default")
    assert chosen(own, of_cluster) == ("cluster", "default")
    assert chosen(locked.model_copy(update={"working_dir": ""}), here=False) == ("own", "default")


def test_a_choice_reports_its_version_its_source_and_what_was_skipped(tmp_path: Path) -> None:
    locked = project(tmp_path / "locked")
    of_cluster = RAYS.model_copy(update={"environment": Environment(kind="conda", value="train")})
    assert str(choose(locked, of_cluster, None, here=True)) == (
        "Python from cluster.yaml (conda:train); this folder has a uv.lock: --environment uv"
    )
    (tmp_path / "locked" / ".python-version").write_text("3.12\n")
    assert str(choose(locked, RAYS, None, here=True)) == "Python 3.12 from uv.lock"
    plain = JobSpec(entrypoint="x", working_dir="")
    assert str(choose(plain, RAYS, None, here=True)) == "Python 3.11 that runs Ray (/opt/ray)"
    mine = active(venv(tmp_path / "venv"))
    assert str(choose(plain, RAYS, mine, here=True)) == f"Python 3.11 from the active environment (venv:{mine.prefix})"


def test_editable_installs_in_the_environment_are_named_with_their_folders(tmp_path: Path) -> None:
    made = venv(tmp_path / "venv", packages={"lib": "1.0", "raylaunch": "0.2.0", "numpy": "2.4.0"})
    for name, editable in (("lib-1.0", True), ("raylaunch-0.2.0", True), ("numpy-2.4.0", False)):
        origin = {"url": f"file://{tmp_path}/my%20lib", "dir_info": {"editable": True} if editable else {}}
        (next(made.glob("lib/*/site-packages")) / f"{name}.dist-info" / "direct_url.json").write_text(
            json.dumps(origin)
        )
    assert editable_in(made) == {"lib": f"{tmp_path}/my lib"}
    expected = f"installed editable, so later edits reach the job: lib ({tmp_path}/my lib)"
    plain = JobSpec(entrypoint="x", working_dir="")
    assert choose(plain, RAYS, active(made), here=True).note == expected
    for named in (f"venv:{made}", f"{made}/bin/python"):
        spec = plain.model_copy(update={"environment": Environment.model_validate(named)})
        found = choose(spec, RAYS, None, here=True)
        assert (found.source, found.python, found.note) == ("job", "3.11.9", expected)
        of_cluster = RAYS.model_copy(update={"environment": spec.environment})
        assert choose(plain, of_cluster, None, here=True).note == expected
        assert choose(spec, RAYS, None, here=False).note == ""  # that path is another machine's


@pytest.mark.parametrize("wrong", ["numpy", "scikit-learn", "no such thing"])
def test_each_way_on_that_a_wrong_environment_names_is_one(wrong: str) -> None:
    def spec(**given: object) -> JobSpec:
        return spec_of({"command": ("python", "train.py"), **given}, {})

    with pytest.raises(SpecError) as caught:
        spec(environment=wrong)
    package = "numpy" if " " in wrong else wrong
    assert f"pip: [{package}]; or add the package to the environment: --with {package}" in caught.value.message
    assert spec(environment=f"pip: [{package}]").environment.requirements == (package,)
    added = spec(**{"with": (package, "pandas==2.3.3")})
    assert (added.environment.kind, added.packages) == ("auto", (package, "pandas==2.3.3"))
    assert str(choose(added, RAYS, None, here=True)).endswith(f"(/opt/ray), with {package}, pandas==2.3.3")
    for written in ("default", "ray", "/path/to/python", "venv:PATH", "conda:NAME", "uv", "pip:requirements.txt"):
        assert written in caught.value.message
        assert str(spec(environment=written).environment) == written


def test_a_list_of_packages_in_brackets_is_read_as_yaml_would(tmp_path: Path) -> None:
    text = "pip: [numpy>=2,<3, 'torch==2.13.0', ray[train,tune]]"
    assert Environment.model_validate(text).requirements == ("numpy>=2,<3", "torch==2.13.0", "ray[train,tune]")
    (tmp_path / "job.yaml").write_text("entrypoint: x\nenvironment: {pip: [numpy, pandas]}\npackages: [torch]\n")
    spec = spec_of({"file": tmp_path / "job.yaml", "with": ("wandb",)}, {})
    assert (spec.environment.requirements, spec.packages) == (("numpy", "pandas"), ("torch", "wandb"))
    with pytest.raises(SpecError, match="is not a package"):
        spec_of({"command": ("x",), "with": ("-r /etc/passwd",)}, {})


def test_a_ray_driver_skips_environments_without_the_clusters_ray(tmp_path: Path) -> None:
    fits = active(venv(tmp_path / "fits", python="3.11.4", packages={"ray": "2.60.0"}))
    older = active(venv(tmp_path / "older", python="3.11.4", packages={"ray": "2.50.0"}))
    newer_python = active(venv(tmp_path / "newer", python="3.12.1", packages={"ray": "2.60.0"}))
    plain = JobSpec(entrypoint="x", working_dir="", launcher="ray")
    assert choose(plain, RAYS, fits, here=True).source == "active"
    found = choose(plain, RAYS, older, here=True)
    assert (found.source, "has Ray 2.50.0" in found.note) == ("own", True)
    assert choose(plain, RAYS, newer_python, here=True).source == "own"
    driver = project(tmp_path / "locked").model_copy(update={"launcher": "ray"})
    found = choose(driver, RAYS, fits, here=True)
    assert found.source == "active"
    assert found.note == "uv.lock has no Ray, and launcher: ray needs the cluster's (2.60.0)"
    with_ray = project(tmp_path / "ray", LOCK + '\n[[package]]\nname = "ray"\nversion = "2.60.0"\n')
    assert choose(with_ray.model_copy(update={"launcher": "ray"}), RAYS, fits, here=True).source == "lock"


@pytest.mark.parametrize(
    ("last", "module"),
    [
        ("ModuleNotFoundError: No module named 'numpy'", "numpy"),
        ("[rank0]: ModuleNotFoundError: No module named 'yaml.nodes'", "yaml"),
        ("/opt/ray/bin/python: No module named pytest", "pytest"),
        ("RuntimeError: boom", ""),
    ],
)
def test_the_module_that_was_not_found_is_read_from_the_last_lines(last: str, module: str) -> None:
    assert missing_module(("Traceback (most recent call last):", last)) == module


def failed(spec: JobSpec, chosen: EnvironmentChoice, module: str) -> JobView:
    """Return a job that did not find a module."""
    return JobView(
        id="train-aaaaaa",
        name="train",
        owner="tom",
        state=JobState.FAILED,
        spec=spec.model_copy(update={"environment": chosen.environment}),
        created_at=0,
        updated_at=0,
        chosen=chosen,
        environment=EnvironmentFacts(python="/opt/ray/bin/python"),
        log_tail=("Traceback (most recent call last):", f"ModuleNotFoundError: No module named '{module}'"),
    )


def test_a_missing_module_names_the_active_environment_the_lock_or_the_package(tmp_path: Path) -> None:
    mine = active(venv(tmp_path / "venv", packages={"numpy": "2.4.0"}))
    assert has_module(mine.prefix, "numpy")
    plain = JobSpec(entrypoint="x", working_dir=str(tmp_path), environment=Environment(kind="default"))
    own = choose(plain, RAYS, mine, here=True)
    ran = "it ran in /opt/ray/bin/python, without"
    assert import_hint(failed(plain, own, "numpy"), mine) == (
        f"{ran} numpy; your active environment has numpy: --environment venv:{mine.prefix}"
    )
    assert import_hint(failed(plain, own, "yaml"), mine) == f"{ran} yaml; add it: --with pyyaml"
    elsewhere = choose(plain, RAYS, mine, here=False)
    assert import_hint(failed(plain, elsewhere, "numpy"), mine) == f"{ran} numpy; add it: --with numpy"
    locked = project(tmp_path / "locked")
    assert import_hint(failed(locked, own, "numpy"), mine) == f"{ran} numpy; uv.lock has numpy: --environment uv"
    (tmp_path / "helpers.py").touch()
    assert import_hint(failed(plain, own, "helpers"), mine) == ""
