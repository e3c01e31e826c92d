"""Wheels for hosts of other platforms: what is chosen, fetched once, and said when there is none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
from support.disks import small_disk
from support.index import Index, index, tiny_sdist, tiny_wheel
from support.waiting import wait_until

from raylaunch.cluster.install.platforms import WheelPlatform, exact_requirements, installed_pins
from raylaunch.cluster.install.resolve import IndexUnreachableError, Wheel
from raylaunch.cluster.install.wheel_store import WheelStore
from raylaunch.errors import ClusterStartError, RaylaunchError, StorageError, VersionError

pytestmark = pytest.mark.slow

DGX = WheelPlatform("x86_64", "2.35", "3.10.12")
SPARK = WheelPlatform("aarch64", "2.39", "3.12.3")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Index]:
    folder = tmp_path / "index"
    folder.mkdir()
    with index(folder) as found:
        yield found


@pytest.fixture
def store(tmp_path: Path, served: Index) -> WheelStore:
    return WheelStore(tmp_path / "home", environ=served.environ(tmp_path))


def gathered(store: WheelStore, *requirements: str, platform: WheelPlatform = DGX, **prefer: str) -> dict[str, Wheel]:
    async def gather() -> tuple[Wheel, ...]:
        return await store.gather(requirements, platform, preferences=prefer)

    return {wheel.name: wheel for wheel in anyio.run(gather)}


def refused(store: WheelStore, *requirements: str, platform: WheelPlatform = DGX) -> RaylaunchError:
    with pytest.raises(RaylaunchError) as caught:
        gathered(store, *requirements, platform=platform)
    return caught.value


def test_everything_that_is_needed_is_gathered_by_its_checksum(store: WheelStore, served: Index) -> None:
    tiny_wheel(served.folder, "engine", "2.1", requires=["screw>=1"])
    tiny_wheel(served.folder, "screw", "1.4")
    found = gathered(store, "engine")
    assert {name: wheel.version for name, wheel in found.items()} == {"engine": "2.1", "screw": "1.4"}
    for wheel in found.values():
        assert store.path(wheel).read_bytes() == (served.folder / wheel.file).read_bytes()
        assert store.path(wheel).parent.name == wheel.sha256


def test_what_was_gathered_once_needs_no_network(store: WheelStore, served: Index) -> None:
    tiny_wheel(served.folder, "engine", "2.1")
    first = gathered(store, "engine")
    served.down = True
    served.asked.clear()
    assert gathered(store, "engine") == first
    assert not served.asked


def test_the_wheels_fit_the_host_not_this_machine(store: WheelStore, served: Index) -> None:
    for tag in (
        "cp310-cp310-manylinux_2_17_x86_64",
        "cp312-cp312-manylinux_2_28_aarch64",
        "cp312-cp312-macosx_11_0_arm64",
    ):
        tiny_wheel(served.folder, "engine", "2.1", tag=tag)
    assert gathered(store, "engine")["engine"].file == "engine-2.1-cp310-cp310-manylinux_2_17_x86_64.whl"
    spark = gathered(store, "engine", platform=SPARK)
    assert spark["engine"].file == "engine-2.1-cp312-cp312-manylinux_2_28_aarch64.whl"


def test_a_wheel_for_a_newer_c_library_than_the_hosts_is_not_taken(store: WheelStore, served: Index) -> None:
    tiny_wheel(served.folder, "engine", "2.2", tag="cp310-cp310-manylinux_2_38_x86_64")
    tiny_wheel(served.folder, "engine", "2.1", tag="cp310-cp310-manylinux_2_28_x86_64")
    assert gathered(store, "engine")["engine"].version == "2.1"


def test_of_several_wheels_the_most_specific_is_taken(store: WheelStore, served: Index) -> None:
    tiny_wheel(served.folder, "engine", "2.1")
    tiny_wheel(served.folder, "engine", "2.1", tag="cp310-cp310-manylinux2014_x86_64")
    assert gathered(store, "engine")["engine"].file == "engine-2.1-cp310-cp310-manylinux2014_x86_64.whl"


def test_the_version_that_is_installed_here_is_preferred_to_a_newer_one(store: WheelStore, served: Index) -> None:
    for version in ("1.0", "1.1", "2.0"):
        tiny_wheel(served.folder, "engine", version)
    assert gathered(store, "engine", engine="1.1")["engine"].version == "1.1"


def test_where_that_version_does_not_fit_the_hosts_python_another_is_taken(store: WheelStore, served: Index) -> None:
    tiny_wheel(served.folder, "engine", "1.0")
    tiny_wheel(served.folder, "engine", "1.1", python=">=3.11")
    assert gathered(store, "engine", engine="1.1")["engine"].version == "1.0"
    assert gathered(store, "engine", platform=SPARK, engine="1.1")["engine"].version == "1.1"


def test_a_mirror_that_has_only_part_of_the_preferred_version_does_not_hide_the_rest(
    served: Index, tmp_path: Path
) -> None:
    tiny_wheel(served.folder, "engine", "1.1", tag="cp310-cp310-manylinux2014_x86_64")
    tiny_wheel(tmp_path / "mirror", "engine", "1.1", tag="cp311-cp311-manylinux2014_x86_64")
    with index(tmp_path / "mirror") as mirror:
        environ = {**served.environ(tmp_path), "PIP_EXTRA_INDEX_URL": mirror.url}
        found = gathered(WheelStore(tmp_path / "home", environ=environ), "engine", engine="1.1")
    assert found["engine"].file == "engine-1.1-cp310-cp310-manylinux2014_x86_64.whl"


def test_what_only_an_older_python_needs_comes_with_it(store: WheelStore, served: Index) -> None:
    tiny_wheel(served.folder, "engine", "1.0", requires=["backport; python_version < '3.11'"])
    tiny_wheel(served.folder, "backport", "1.0")
    assert set(gathered(store, "engine")) == {"engine", "backport"}
    assert set(gathered(store, "engine", platform=SPARK)) == {"engine"}


def test_a_package_without_a_wheel_is_named(store: WheelStore, served: Index) -> None:
    tiny_wheel(served.folder, "engine", "1.0", requires=["screw"])
    tiny_sdist(served.folder, "screw", "1.0")
    error = refused(store, "engine")
    assert isinstance(error, VersionError)
    assert error.message.startswith(f"screw: no wheel for {DGX}")
    assert "find-links" in error.hint


def test_a_package_without_a_wheel_for_the_host_is_named(store: WheelStore, served: Index) -> None:
    tiny_wheel(served.folder, "engine", "1.0", tag="cp310-cp310-manylinux2014_x86_64")
    error = refused(store, "engine", platform=SPARK)
    assert isinstance(error, VersionError)
    assert error.message.startswith(f"engine: no wheel for {SPARK}")


def test_an_unknown_version_is_refused_with_what_the_index_says(store: WheelStore, served: Index) -> None:
    tiny_wheel(served.folder, "engine", "1.0")
    error = refused(store, "engine==7")
    assert isinstance(error, VersionError)
    assert "engine==7" in error.message


@pytest.mark.parametrize("how", ["down", "nobody listens"])
def test_an_index_that_does_not_answer_is_said(store: WheelStore, served: Index, how: str, tmp_path: Path) -> None:
    tiny_wheel(served.folder, "engine", "1.0")
    served.down = True
    if how == "nobody listens":
        gone = {**served.environ(tmp_path), "PIP_INDEX_URL": "http://127.0.0.1:9/simple/"}
        store = WheelStore(tmp_path / "home", environ=gone)
    error = refused(store, "engine")
    assert isinstance(error, IndexUnreachableError)
    assert "cannot be reached from here" in error.message
    assert "pip config list" in error.hint


def test_a_wheel_that_arrives_damaged_is_refused_and_not_kept(store: WheelStore, served: Index) -> None:
    tiny_wheel(served.folder, "engine", "1.0")
    whole = tiny_wheel(served.folder, "screw", "1.0").read_bytes()
    served.damaged.add("screw-1.0-py3-none-any.whl")
    error = refused(store, "engine", "screw")
    assert isinstance(error, ClusterStartError)
    assert "screw" in error.message
    served.damaged.clear()
    assert store.path(gathered(store, "engine", "screw")["screw"]).read_bytes() == whole


def test_what_arrived_before_a_failure_is_not_fetched_again(store: WheelStore, served: Index) -> None:
    tiny_wheel(served.folder, "engine", "1.0")
    tiny_wheel(served.folder, "screw", "1.0")
    served.damaged.add("screw-1.0-py3-none-any.whl")
    refused(store, "engine", "screw")
    served.damaged.clear()
    served.asked.clear()
    gathered(store, "engine", "screw")
    assert served.fetched == ["screw-1.0-py3-none-any.whl"]


def test_two_that_gather_at_once_fetch_once(store: WheelStore, served: Index) -> None:
    tiny_wheel(served.folder, "engine", "1.0")

    async def both() -> None:
        async with anyio.create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(store.gather, ["engine"], DGX)

    anyio.run(both)
    assert served.fetched == ["engine-1.0-py3-none-any.whl"]


def test_a_wheel_of_a_find_links_folder_is_gathered_too(store: WheelStore, served: Index, tmp_path: Path) -> None:
    wheel = tiny_wheel(tmp_path / "own wheels".replace(" ", "-"), "engine", "3.0")
    environ = {**served.environ(tmp_path), "PIP_FIND_LINKS": str(wheel.parent), "PIP_NO_INDEX": "1"}
    store = WheelStore(tmp_path / "home", environ=environ)
    assert store.path(gathered(store, "engine")["engine"]).read_bytes() == wheel.read_bytes()


def test_pips_own_file_says_where_the_index_is(served: Index, tmp_path: Path) -> None:
    tiny_wheel(served.folder, "engine", "1.0")
    environ = {name: value for name, value in served.environ(tmp_path).items() if name != "PIP_INDEX_URL"}
    config = tmp_path / ".config" / "pip" / "pip.conf"
    config.parent.mkdir(parents=True)
    config.write_text(f"[global]\nindex-url = {served.url}\n")
    assert "engine" in gathered(WheelStore(tmp_path / "home", environ=environ), "engine")


def test_a_full_disk_here_is_said_with_its_free_bytes(served: Index, tmp_path: Path) -> None:
    tiny_wheel(served.folder, "engine", "1.0", filler=700_000)
    with small_disk(tmp_path / "small", kib=400) as disk:
        error = refused(WheelStore(disk, environ=served.environ(tmp_path)), "engine")
    assert isinstance(error, StorageError)
    assert "no space left" in error.message


def test_a_gathering_that_was_killed_leaves_nothing_that_counts(
    store: WheelStore, served: Index, tmp_path: Path
) -> None:
    tiny_wheel(served.folder, "engine", "1.0")
    program = (
        "import anyio, os, sys; from pathlib import Path; from raylaunch.cluster.install.wheel_store import WheelStore;"
        "from raylaunch.cluster.install.platforms import WheelPlatform;"
        "anyio.run(WheelStore(Path(sys.argv[1])).gather, ['engine'], WheelPlatform('x86_64', '2.35', '3.10.12'))"
    )
    path = os.pathsep.join(sys.path)
    environ = {**served.environ(tmp_path), "PYTHONPATH": path}
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "home")], env=environ) as gathering:
        wait_until(lambda: served.asked, 30, "the index is asked")
        gathering.send_signal(signal.SIGKILL)
    assert "engine" in gathered(store, "engine")
    assert not list(store.folder.glob(".incoming-*"))


@pytest.mark.parametrize(
    ("arch", "glibc"), [("ppc64le", "2.35"), ("x86_64", "2.12"), ("x86_64", ""), ("armv7l", "2.39")]
)
def test_a_platform_that_ray_is_not_made_for_is_refused(store: WheelStore, arch: str, glibc: str) -> None:
    error = refused(store, "engine", platform=WheelPlatform(arch, glibc, "3.11.2"))
    assert isinstance(error, VersionError)
    assert "there is no Ray for" in error.message
    assert "glibc 2.17" in error.hint


def test_ray_and_wandb_are_pinned_exactly_and_the_rest_is_not() -> None:
    found = exact_requirements(["ray[default]>=2.60,<2.61", "wandb>=0.29", "rich>=13"])
    assert found[0].startswith("ray[default]==2.60.")
    assert found[1].startswith("wandb==")
    assert found[2] == "rich>=13"


def test_the_pins_follow_extras_and_the_hosts_markers() -> None:
    pins = installed_pins(["ray[default]", "tomli; python_version < '3.11'"], DGX)
    assert {"ray", "aiohttp", "grpcio", "virtualenv"} <= pins.keys()
    assert "tomli" not in installed_pins(["tomli; python_version < '3.11'"], SPARK)
    assert not {"mcp", "torch", "pytest"} & pins.keys()
