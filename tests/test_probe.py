"""The probe's real script, run here and over a real sshd: what it finds, and what stands in its way."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import anyio
import psutil
import pytest
from support.nvidia import H100, NvidiaSmi, dgx_h100, sliced, spark
from support.sshd import Sshd, sshd

from raylaunch.cluster.commands import LocalHost, ProgramResult
from raylaunch.cluster.probe.facts import HostFacts
from raylaunch.cluster.probe.probe import probe, script
from raylaunch.errors import HostStepError
from raylaunch.models.host_spec import HostSpec
from raylaunch.ssh.host import machine

pytestmark = [pytest.mark.slow, pytest.mark.skipif(platform.system() != "Linux", reason="hosts run Linux")]

NO_INDEX = {"PYTHONPATH": str(Path(__file__).parent / "data/no_pip")}
"""No Python has a pip: the tests that are not about packages ask nobody outside, and are quick."""


def index_at(url: str) -> dict[str, str]:
    """Return the environment of a machine whose only index is `url`."""
    nothing = {"PIP_CONFIG_FILE": "/dev/null", "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": "", "PYTHONPATH": ""}
    return nothing | {"PIP_INDEX_URL": url, "UV_INDEX_URL": url}


@dataclass(frozen=True)
class Here:
    """This machine, through another shell or environment than the test's own."""

    program: Sequence[str] = ("sh",)
    env: dict[str, str] = field(default_factory=dict)
    name: str = "here"

    async def run(self, argv: Sequence[str], /, *, input: bytes, limit_s: float) -> ProgramResult:  # noqa: A002 -- the product's word
        """Run it as the shell that is asked for."""
        settings = [f"{name}={value}" for name, value in (NO_INDEX | self.env).items()]
        return await LocalHost(self.name).run(
            ["env", *settings, *self.program, *argv[1:]], input=input, limit_s=limit_s
        )


def facts_of(host: Here | None = None, spec: HostSpec | None = None) -> HostFacts:
    async def work() -> HostFacts:
        return await probe(host or Here(), spec)

    return anyio.run(work)


def with_smi(folder: Path, shape: NvidiaSmi) -> Here:
    shape.install(folder)
    return Here(env={"PATH": f"{folder}:{os.environ['PATH']}"})


@pytest.fixture(scope="module")
def here() -> HostFacts:
    return facts_of()


def test_every_part_of_the_probe_answers_on_this_machine(here: HostFacts) -> None:
    assert here.unanswered == ()


def test_the_system_is_the_one_that_python_sees(here: HostFacts) -> None:
    assert (here.arch, here.hostname, here.system.kind) == (platform.machine(), platform.node(), "Linux")
    assert here.system.release == platform.release()
    assert here.system.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    name, version = platform.libc_ver()
    assert here.system.libc == f"{name} {version}"
    assert here.glibc == tuple(int(part) for part in version.split(".")[:2])


def test_the_account_is_the_one_that_runs_this(here: HostFacts) -> None:
    assert (here.user, here.uid, here.home) == (getpass.getuser(), os.getuid(), str(Path.home()))
    assert here.root == f"{Path.home()}/.raylaunch"
    if os.getuid() == 0:
        assert here.sudo == "root"


def test_the_hosts_own_name_means_what_the_resolver_says(here: HostFacts) -> None:
    try:
        expected = {str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None)}
    except OSError:
        expected = set()
    assert set(here.resolves_to or ()) == expected


def test_memory_and_cores_are_those_of_the_machine(here: HostFacts) -> None:
    assert here.memory.total == psutil.virtual_memory().total
    assert here.memory.cpus == len(psutil.Process().cpu_affinity() or ())


def test_disks_have_their_sizes_and_what_may_be_done_there(here: HostFacts) -> None:
    assert set(here.disks) == {"home", "root", "store", "tmp", "raytmp", "shm"}
    home = here.disks["home"]
    usage = os.statvfs(Path.home())
    assert home.total == usage.f_blocks * usage.f_frsize
    assert home.writable is os.access(Path.home(), os.W_OK)
    assert "rw" in home.options
    assert home.kind


def test_pythons_are_found_each_once_with_its_version(here: HostFacts) -> None:
    assert here.pythons
    for one in here.pythons:
        words = "import sys; print('%d.%d.%d' % sys.version_info[:3])"
        output = subprocess.run([one.path, "-c", words], capture_output=True, text=True, timeout=30, check=False)
        assert one.version == output.stdout.strip()
    assert len({one.real_path for one in here.pythons}) == len(here.pythons)


def test_interfaces_have_their_addresses(here: HostFacts) -> None:
    known = {one.name: one for one in here.interfaces or ()}
    stable = ["lo", *(one.name for one in known.values() if one.default_route)]  # other tests make and remove others
    for name in stable:
        expected = {
            address.address.partition("%")[0]
            for address in psutil.net_if_addrs()[name]
            if address.family in {socket.AF_INET, socket.AF_INET6}
        }
        assert {text.partition("/")[0] for text in known[name].addresses} == expected


def test_the_clock_is_compared_with_ours(here: HostFacts) -> None:
    assert here.clock.offset_s is not None
    assert abs(here.clock.offset_s) <= here.clock.uncertain_s


def test_a_clock_that_is_an_hour_ahead_is_seen_as_that(tmp_path: Path) -> None:
    date = tmp_path / "date"
    date.write_text('#!/bin/sh\nexec /bin/date -d "+1 hour" "$@"\n')
    date.chmod(0o755)
    clock = facts_of(Here(env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})).clock
    assert clock.offset_s is not None
    assert abs(clock.offset_s - 3600) <= clock.uncertain_s + 1


def test_ports_that_somebody_listens_on_are_listed_with_who_does() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        facts, port = facts_of(), taken.getsockname()[1]
    assert port in (facts.listening or ())
    assert facts.holders.get(port, "ss is not there").endswith(f"(pid {os.getpid()})") or not shutil.which("ss")


def test_a_named_environment_is_looked_at_as_well(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "v")], check=True, timeout=120)
    for environment in (f"venv:{tmp_path / 'v'}", str(tmp_path / "v"), str(tmp_path / "v/bin/python")):
        found = facts_of(spec=HostSpec(host="h", environment=environment)).pythons
        (named,) = [one for one in found if one.named]
        assert (named.path, named.in_environment) == (str(tmp_path / "v/bin/python"), True)
        assert named.minor == sys.version_info[:2]


def test_a_named_environment_that_is_not_there_is_known_not_to_run() -> None:
    (named,) = [one for one in facts_of(spec=HostSpec(host="h", environment="conda:nope")).pythons if one.named]
    assert named.version == ""


def test_the_folders_that_the_spec_names_are_looked_at(tmp_path: Path) -> None:
    facts = facts_of(spec=HostSpec(host="h", root=str(tmp_path / "not/there"), store=str(tmp_path)))
    assert facts.root == str(tmp_path / "not/there")
    assert (facts.disks["root"].exists, facts.disks["store"].exists) == (False, True)


@pytest.mark.parametrize(("root", "meant"), [("~/rl", "rl"), ("data/rl", "data/rl"), ("~", ""), ("", ".raylaunch")])
def test_a_folder_is_meant_from_the_home_unless_it_is_absolute(root: str, meant: str) -> None:
    assert facts_of(spec=HostSpec(host="h", root=root)).root == str(Path.home() / meant)


def test_a_dgx_has_eight_gpus_with_their_driver(tmp_path: Path) -> None:
    gpus = facts_of(with_smi(tmp_path, dgx_h100())).gpus
    assert [gpu.name for gpu in gpus.gpus] == [H100] * 8
    assert (gpus.driver, gpus.cuda, gpus.problem) == ("550.54.15", "12.4", "")
    first = gpus.gpus[0]
    assert first.memory_total == 81559 * 1024**2
    assert (first.mig, first.ecc_errors, first.compute_mode) == (False, 0, "Default")


def test_a_spark_shares_its_memory_and_what_it_does_not_say_is_not_known(tmp_path: Path) -> None:
    facts = facts_of(with_smi(tmp_path, spark()))
    (gpu,) = facts.gpus.gpus
    assert (gpu.name, gpu.memory_total, gpu.mig, gpu.ecc_errors) == ("NVIDIA GB10", None, None, None)
    assert facts.memory.unified


def test_slices_of_a_gpu_are_counted(tmp_path: Path) -> None:
    gpus = facts_of(with_smi(tmp_path, sliced())).gpus
    assert [gpu.mig for gpu in gpus.gpus[:2]] == [True, False]
    assert gpus.mig_devices == 7


def test_who_computes_on_a_gpu_is_named_and_what_is_ours_is_told_from_others(tmp_path: Path) -> None:
    ours = subprocess.Popen(["sleep", "60"], env={**os.environ, "RAYLAUNCH_NODE_ROOT": "/somewhere"})
    try:
        apps: list[dict[str, object]] = [
            {"gpu_uuid": dgx_h100().gpus[3]["uuid"], "pid": pid, "used_gpu_memory": 1024, "process_name": name}
            for pid, name in ((os.getpid(), "/usr/bin/python3"), (ours.pid, "sleep"))
        ]
        gpus = facts_of(with_smi(tmp_path, dgx_h100(apps=apps))).gpus.gpus
    finally:
        ours.kill()
        ours.wait(timeout=10)
    assert [len(gpu.processes) for gpu in gpus] == [0, 0, 0, 2, 0, 0, 0, 0]
    other, own = gpus[3].processes
    assert (other.pid, other.user, other.command, other.memory) == (
        os.getpid(),
        getpass.getuser(),
        "python3",
        1024**3,
    )
    assert (other.ours, own.ours) == (False, True)


def test_an_older_driver_that_does_not_know_a_field_still_lists_its_gpus(tmp_path: Path) -> None:
    shape = dgx_h100()
    shape.unknown_fields, shape.cuda = ("compute_cap",), ""
    gpus = facts_of(with_smi(tmp_path, shape)).gpus
    assert (len(gpus.gpus), gpus.problem, gpus.gpus[0].compute_capability) == (8, "", "")


def test_a_driver_that_says_it_in_new_words_is_understood(tmp_path: Path) -> None:
    shape = dgx_h100()
    shape.cuda, shape.cuda_words = "13.3", "CUDA UMD Version"
    assert facts_of(with_smi(tmp_path, shape)).gpus.cuda == "13.3"


def test_a_driver_that_fails_is_quoted(tmp_path: Path) -> None:
    expected = "Failed to initialize NVML: Driver/library version mismatch"
    gpus = facts_of(with_smi(tmp_path, NvidiaSmi(fails=expected))).gpus
    assert (gpus.gpus, gpus.problem) == ((), expected)


def test_no_devices_is_no_gpus_and_no_failure(tmp_path: Path) -> None:
    gpus = facts_of(with_smi(tmp_path, NvidiaSmi())).gpus
    assert (gpus.gpus, gpus.problem) == ((), "")


@pytest.mark.slow
def test_a_driver_that_hangs_is_given_up_and_the_rest_is_known(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    facts = facts_of(with_smi(tmp_path, NvidiaSmi(hangs_s=120, calls=str(calls))))
    assert facts.gpus.problem == "it did not answer within 10 s"
    assert len(calls.read_text().splitlines()) == 1, "a driver that hangs is asked once"
    assert facts.hostname == platform.node()
    assert "gpu_query" in facts.unanswered


@contextlib.contextmanager
def started(argv: Sequence[str], **env: str) -> Iterator[int]:
    process = subprocess.Popen(argv, env={**os.environ, **env})
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait(timeout=10)


def test_another_ray_is_seen_with_its_ports_and_whose_it_is(tmp_path: Path) -> None:
    raylet = tmp_path / "raylet"
    raylet.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(120)\n")
    raylet.chmod(0o755)
    flags = ["--node_manager_port=4711", "--min_worker_port=26000", "--max_worker_port=26399", f"--temp_dir={tmp_path}"]
    with started([str(raylet), *flags]) as pid:
        deadline = time.monotonic() + 20
        found = None
        while found is None and time.monotonic() < deadline:  # until the kernel shows it under its own name
            found = next((one for one in facts_of().rays or () if one.pid == pid), None)
    assert found is not None
    assert (found.kind, found.user, found.ports) == ("raylet", getpass.getuser(), (4711,))
    assert (found.worker_ports, found.temp_dir) == ((26000, 26399), str(tmp_path))


def test_clusters_of_raylaunch_are_seen_by_their_controllers_and_by_our_own_records(tmp_path: Path) -> None:
    root, theirs = tmp_path / "root", tmp_path / "theirs/clusters/lab"
    record = {"name": "lab", "owner": "anna", "cluster_id": "c1", "wanted": "running", "gpu_uuids": ["GPU-1"]}
    for folder, name in ((theirs, "lab"), (root / "clusters/mine", "mine")):
        folder.mkdir(parents=True)
        (folder / "cluster.json").write_text(json.dumps(record | {"name": name}, indent=2))
    controller = ["-m", "raylaunch.controller", "--config", str(theirs / "controller.json")]
    with started([sys.executable, "-c", "import time; time.sleep(120)", *controller]) as pid:
        found = {one.folder: one for one in facts_of(spec=HostSpec(host="h", root=str(root))).clusters}
    lab, mine = found[str(theirs)], found[str(root / "clusters/mine")]
    assert (lab.name, lab.pid, lab.gpu_uuids) == ("lab", pid, ("GPU-1",))
    assert lab.since == pytest.approx(time.time(), abs=60)
    assert (mine.name, mine.pid, mine.wanted, mine.user) == ("mine", None, "running", getpass.getuser())


def test_an_index_that_nobody_serves_is_not_reachable_and_the_words_bear_no_password() -> None:
    index = facts_of(Here(env=index_at("http://me:hunter2@127.0.0.1:9/simple"))).index
    if index.reachable is None:
        pytest.skip("no Python here has pip, and there is no uv")
    assert index.reachable is False
    assert index.words
    assert "hunter2" not in index.model_dump_json()


def test_an_index_that_is_served_is_reachable(tmp_path: Path) -> None:
    page = tmp_path / "simple/pip/index.html"
    page.parent.mkdir(parents=True)
    page.write_text('<a href="pip-99.0-py3-none-any.whl">pip-99.0-py3-none-any.whl</a>')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(tmp_path)]
    with started(server):
        deadline = time.monotonic() + 20
        index = None
        while (index is None or index.reachable is False) and time.monotonic() < deadline:  # until it listens
            index = facts_of(Here(env=index_at(f"http://127.0.0.1:{port}/simple"))).index
    assert index is not None
    if index.reachable is None:
        pytest.skip("no Python here has pip, and there is no uv")
    assert index.reachable


def test_proxies_are_told_without_their_passwords() -> None:
    env = {"https_proxy": "http://me:hun/ter2@proxy:3128", "http_proxy": "me:hunter2@proxy", "no_proxy": "localhost"}
    proxies = facts_of(Here(env=env)).proxies
    assert proxies["https_proxy"] == "http://***@proxy:3128"
    assert proxies["http_proxy"] == "***@proxy"
    assert proxies["no_proxy"] == "localhost"


@pytest.mark.parametrize("shell", [("bash",), ("bash", "--posix")])
def test_another_shell_finds_the_same(shell: Sequence[str], here: HostFacts) -> None:
    facts = facts_of(Here(program=shell))
    for name in ("arch", "system", "hostname", "user", "home", "pythons", "tools", "nofile"):
        assert getattr(facts, name) == getattr(here, name), name


def test_what_a_login_shell_prints_is_no_fact(here: HostFacts) -> None:
    gpu = "@@0 begin gpu_query\\nindex, uuid, name\\n0, GPU-0, Fake\\n@@0 end gpu_query 0\\n@@0 complete\\n"
    noise = f"echo WELCOME; printf '{gpu}'; echo x >&2; exec sh \"$@\""
    facts = facts_of(Here(program=("sh", "-c", noise, "sh")))
    assert (facts.system, facts.gpus) == (here.system, here.gpus)


def test_a_script_that_was_cut_off_on_the_way_runs_nothing(tmp_path: Path) -> None:
    text = script()[:-10] + f"\ntouch {tmp_path}/ran\n".encode()
    cut = text[: len(text) - len(b'main "$@"\n') - 30]
    done = subprocess.run(["sh", "-s", "--", "M", "", "", ""], input=cut, capture_output=True, timeout=30, check=False)
    assert b"@@M" not in done.stdout


def test_a_probe_that_ends_in_the_middle_is_an_error_that_says_so() -> None:
    head = "head -c 600; kill $$"
    with pytest.raises(HostStepError) as caught:
        facts_of(Here(program=("sh", "-c", f'sh "$@" | {head}', "sh")))
    assert caught.value.step == "probe"
    assert caught.value.message.startswith("here: the probe's script could not be run: it stopped halfway (")


def test_a_host_without_a_shell_is_an_error_that_says_what_to_try() -> None:
    with pytest.raises(HostStepError) as caught:
        facts_of(Here(program=("false",)))
    assert str(caught.value) == (
        "here: the probe's script could not be run: it did not start, exit status 1\n"
        "  → log in with ssh and run: sh -c 'date'; the account needs a POSIX shell at /bin/sh"
    )


def test_a_program_that_ends_without_reading_its_input_has_ended_and_no_more() -> None:
    ran = anyio.run(partial(LocalHost().run, ["false"], input=bytes(1_000_000), limit_s=20))
    assert (ran.status, ran.out) == (1, b"")


def test_over_ssh_the_same_is_found_and_where_the_login_came_to(tmp_path: Path, here: HostFacts) -> None:
    async def work(host: Sshd) -> HostFacts:
        async with machine(host.target) as connection:
            return await probe(connection)

    with sshd(tmp_path) as host:
        facts = anyio.run(work, host)
    assert facts.reached_at == "127.0.0.1"
    for name in ("arch", "system", "hostname", "user", "home"):
        assert getattr(facts, name) == getattr(here, name), name
    assert facts.clock.offset_s is not None
    assert abs(facts.clock.offset_s) <= facts.clock.uncertain_s
