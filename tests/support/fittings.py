"""What a test host is fitted with: users, GPUs, Pythons, a noisy shell, a wrong clock, a full disk, somebody's Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.host import Host, authorize
from support.hosts import World, world
from support.sshd import make_key
from support.waiting import wait_until

SMI = Path(__file__).with_name("nvidia_smi.sh")
_FAKETIME = "*/faketime/libfaketime.so.1"


@dataclass(frozen=True)
class Gpus:
    """Some GPUs of one kind, as ``nvidia-smi`` shows them. `memory_mib` None is ``[N/A]``: unified memory."""

    count: int
    name: str
    memory_mib: int | None
    driver: str = "570.133.20"
    cuda: str = "12.8"
    capability: str = "9.0"
    ecc_errors: str = "0"
    mig: str = "Disabled"


DGX_H100 = Gpus(8, "NVIDIA H100 80GB HBM3", 81559)
DGX_B200 = Gpus(8, "NVIDIA B200", 183359, driver="580.65.06", cuda="13.0", capability="10.0")
DGX_SPARK = Gpus(
    1, "NVIDIA GB10", None, driver="580.95.05", cuda="13.0", capability="12.1", ecc_errors="[N/A]", mig="[N/A]"
)


def add_user(host: Host, name: str) -> None:
    """Make an ordinary user with a home folder, without sudo; ``host.target(name)`` is her way in, with her own key."""
    key = host.world.home / ".ssh" / f"id_{name}"
    if not key.exists():
        make_key(key)
    host.users[name] = key
    host.run(f"useradd -m -s /bin/bash {name} && usermod -p '*' {name}")
    home = host.path(f"/home/{name}")
    authorize(home, key)
    host.run(f"chown -R {name}: /home/{name}/.ssh")


def gpu_uuid(host: Host, index: int) -> str:
    """Return the UUID of one of its GPUs."""
    return f"GPU-{host.number:08x}-0000-4000-8000-{index:012x}"


def give_gpus(host: Host, gpus: Gpus, *, users: Sequence[tuple[int, int, str]] = ()) -> None:
    """Put a stand-in for ``nvidia-smi`` on its PATH that shows these GPUs.

    Args:
        host: the host.
        gpus: what it shows.
        users: processes that compute: index of the GPU, pid on the host, name.
    """
    memory = "[N/A]" if gpus.memory_mib is None else f"{gpus.memory_mib} MiB"
    used = "[N/A]" if gpus.memory_mib is None else "4 MiB"
    rows = [
        {
            "index": str(index),
            "uuid": gpu_uuid(host, index),
            "name": gpus.name,
            "memory.total": memory,
            "memory.used": used,
            "memory.free": memory,
            "utilization.gpu": "0 %",
            "utilization.memory": "0 %",
            "driver_version": gpus.driver,
            "pci.bus_id": f"00000000:{index + 1:02X}:00.0",
            "compute_cap": gpus.capability,
            "compute_mode": "Default",
            "mig.mode.current": gpus.mig,
            "ecc.mode.current": "[N/A]" if gpus.ecc_errors == "[N/A]" else "Enabled",
            "ecc.errors.uncorrected.volatile.total": gpus.ecc_errors,
            "ecc.errors.uncorrected.aggregate.total": gpus.ecc_errors,
            "persistence_mode": "Enabled",
            "temperature.gpu": "31",
            "power.draw": "70.00 W",
            "count": str(gpus.count),
        }
        for index in range(gpus.count)
    ]
    apps = [
        {"gpu_uuid": gpu_uuid(host, index), "pid": str(pid), "process_name": name, "used_memory": "512 MiB"}
        for index, pid, name in users
    ]
    _table(host, "gpus.csv", rows, list(rows[0]) if rows else ["index", "uuid", "name"])
    _table(host, "apps.csv", apps, ["gpu_uuid", "pid", "process_name", "used_memory"])
    listed = "".join(f"GPU {row['index']}: {row['name']} (UUID: {row['uuid']})\n" for row in rows)
    host.write("/etc/nvidia-smi/list", listed)
    host.write(
        "/etc/nvidia-smi/plain",
        f"| NVIDIA-SMI {gpus.driver}   Driver Version: {gpus.driver}   CUDA Version: {gpus.cuda} |\n",
    )
    version = (
        f"NVIDIA-SMI version  : {gpus.driver}\nDRIVER version      : {gpus.driver}\nCUDA Version        : {gpus.cuda}\n"
    )
    host.write("/etc/nvidia-smi/version", version)
    host.write("/usr/bin/nvidia-smi", SMI.read_text(), mode=0o755)


def break_gpus(host: Host, says: str, status: int = 9) -> None:
    """Let ``nvidia-smi`` fail with these words, as after an update of the driver without a reboot."""
    host.write("/etc/nvidia-smi/says", f"{says}\n")
    host.write("/etc/nvidia-smi/status", str(status))
    host.write("/usr/bin/nvidia-smi", SMI.read_text(), mode=0o755)


def hang_gpus(host: Host) -> None:
    """Let ``nvidia-smi`` hang, as with a broken driver."""
    host.write("/etc/nvidia-smi/hangs", "")
    host.write("/usr/bin/nvidia-smi", SMI.read_text(), mode=0o755)


def find_python(version: str) -> Path:
    """Return the prefix of a Python of this minor version on this machine; skip the test where there is none."""
    roots = [os.environ.get("PYENV_ROOT", "~/.pyenv") + "/versions", "~/.local/share/uv/python", "/opt", "/usr/local"]
    for root in (Path(one).expanduser() for one in roots):
        for found in (*sorted(root.glob(f"*/bin/python{version}")), root / f"bin/python{version}"):
            if found.is_file():
                return found.resolve().parent.parent
    pytest.skip(f"needs a Python {version} from pyenv or uv, to be another host's only one")


def only_python(prefix: Path | None, host: Host) -> None:
    """Take every Python away from the host's system; `prefix` (shared as ``/opt/python``) becomes ``python3``.

    ::

        prefix = find_python("3.10")
        host = lab.host(share={prefix: PYTHON})
        only_python(prefix, host)
    """
    host.run("rm -rf /usr/bin/python* /usr/bin/pip* /usr/local/bin/python* /usr/local/bin/pip* /usr/local/bin/uv*")
    if prefix is not None:
        real = next(
            path.name for path in sorted((prefix / "bin").glob("python3.*")) if path.name[len("python3.") :].isdigit()
        )
        host.write(
            "/etc/ld.so.conf.d/python.conf", f"{PYTHON}/lib\n"
        )  # for a libpython that was built for another place
        host.run(f"ln -s {PYTHON}/bin/{real} /usr/bin/{real} && ln -s {real} /usr/bin/python3 && ldconfig")


PYTHON = Path("/opt/python")


def no_python(host: Host) -> None:
    """Take every Python away from the host."""
    only_python(None, host)


def hide_python(host: Host) -> None:
    """Let the host be without any Python, until `show_python`."""
    host.run("mkdir /usr/hidden && mv /usr/bin/python* /usr/hidden/")


def show_python(host: Host) -> None:
    """Undo `hide_python`, as installing one would."""
    host.run("mv /usr/hidden/* /usr/bin/ && rmdir /usr/hidden")


def bare_python(host: Host) -> None:
    """Let the host's Python be that of a minimal Debian: without pip, ensurepip and venv."""
    host.run("rm -rf /usr/lib/python3*/{ensurepip,venv} /usr/lib/python3/dist-packages/pip* /usr/bin/pip*")


@contextmanager
def bare_world(hosts: int) -> Iterator[World]:
    """Make a world of so many hosts as they come: with sshd, and the Python of a minimal Debian."""
    with world(hosts) as made:
        for host in made.hosts:
            bare_python(host)
        yield made


def noisy_shell(host: Host, user: str = "root") -> None:
    """Let the user's start-up file print on both outputs, as such files do."""
    home = "/root" if user == "root" else f"/home/{user}"
    path = host.path(f"{home}/.bashrc")
    noise = "echo Welcome to the cluster; printf 'no newline'; echo 'module: loaded cuda/12' >&2\n"
    path.write_text(noise + (path.read_text() if path.exists() else ""))


def shift_clock(host: Host, offset: str = "+1h") -> None:
    """Let every process that is started over SSH from now on see another time, as ``+1h`` or ``-90s``.

    The kernel's clock is everybody's; this goes by way of libfaketime. Times of files stay right, and so does the
    monotonic clock. What `Host.run` starts sees the right time.
    """
    found = sorted(Path("/usr/lib").glob(_FAKETIME))
    if not found:
        pytest.skip("needs libfaketime (Debian: apt-get install libfaketime)")
    line = f"SetEnv LD_PRELOAD={found[0]} FAKETIME={offset} FAKETIME_DONT_FAKE_MONOTONIC=1"
    host.write("/etc/ssh/test.d/clock.conf", f"{line}\n")
    host.reload_sshd()


def right_clock(host: Host) -> None:
    """Undo `shift_clock`."""
    host.path("/etc/ssh/test.d/clock.conf").unlink()
    host.reload_sshd()


def resize_disk(host: Host, mib: float) -> bool:
    """Give the disk of ``/root`` and ``/home`` (made with ``disk_mib``) this size; say whether what is on it fits."""
    size = f"remount,size={int(mib * 1024)}k"
    return not subprocess.run(
        ["mount", "-o", size, str(host.folder / "disk")], capture_output=True, check=False
    ).returncode


def crowd_disk(host: Host, *, but_mib: float = 2) -> None:
    """Fill that disk at once, also while others write to it, but for some MiB; `resize_disk` makes room again."""

    def crowded() -> bool:
        disk = os.statvfs(host.folder / "disk")
        return resize_disk(host, (disk.f_blocks - disk.f_bfree) * disk.f_frsize / 1024**2 + but_mib)

    wait_until(crowded, 10, f"the disk of {host.name} is full")


def fill_disk(host: Host, *, but_mib: float = 0) -> None:
    """Fill the disk of ``/root`` and ``/home`` (made with ``disk_mib``), but for some MiB."""
    free_kib = int(host.out("df -Pk /root | tail -n 1").split()[3])
    host.run(f"head -c {(free_kib - int(but_mib * 1024)) * 1024} /dev/zero >/root/ballast")


def this_python() -> dict[Path, Path]:
    """Return what a host must share to run this test's own Python with all its packages, at the same paths."""
    return {place: place for place in dict.fromkeys((Path(sys.base_prefix), Path(sys.prefix)))}


def start_foreign_ray(host: Host, *, user: str = "root", gpus: int = 0, port: int = 6379) -> None:
    """Start somebody else's Ray on a host that was made with ``share=this_python()``; it has nothing to do with us."""
    if user != "root":
        host.run("chmod 711 /root")  # the interpreter may lie below it
    ray = Path(sys.prefix) / "bin/ray"
    words = f"{ray} start --head --port={port} --num-cpus=1 --num-gpus={gpus} --include-dashboard=false"
    host.run(f"cd /; {words} >/tmp/foreign-ray.log 2>&1 </dev/null", user=user, timeout_s=180)


def ray_processes(host: Host) -> list[int]:
    """Return the pids (as the host counts) of the GCS and raylets that run on it."""
    return [int(pid) for pid in host.out("pgrep -f '([g]cs_server|[r]aylet/raylet)' || true").split()]


def _table(host: Host, name: str, rows: Sequence[dict[str, str]], fields: Sequence[str]) -> None:
    lines = [", ".join(fields), *(", ".join(row[field] for field in fields) for row in rows)]
    host.write(f"/etc/nvidia-smi/{name}", "\n".join(lines) + "\n")
