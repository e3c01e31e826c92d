"""From what the probe's script printed to `HostFacts`: pure functions, one for each section."""

from __future__ import annotations

import posixpath
import re
import time
from collections.abc import Iterable, Iterator

from pydantic import BaseModel, ValidationError

from raylaunch.cluster.probe.facts import (
    BootServices,
    Clock,
    Disk,
    FoundCluster,
    HostFacts,
    Index,
    InfinibandPort,
    Interface,
    Memory,
    Python,
    RayProcess,
    SharedFolder,
    System,
    is_network_fs,
)
from raylaunch.cluster.probe.parse_gpus import ProbeOutput, Section, read_gpus
from raylaunch.models.fields import Moment, whole

_KIB = 1024
_MEGABIT = 10**6
_WHOLE = re.compile(r"-?[0-9]{1,19}")
_INFINIBAND_TYPE = "32"
"""ARPHRD_INFINIBAND, in /sys/class/net/*/type."""
_NO_LIMIT = 1 << 60
"""Control groups of the first version say "no limit" with a number above this."""
_MAY_BE_UNKNOWN = frozenset({"index", "ntp", "xid"})
"""Sections that fail where nothing there can be asked; the facts say so themselves."""
_UNIFIED = re.compile(r"\b(GB10|GH200|GB200|GB300|Thor|Orin)\b")


def read_facts(answer: ProbeOutput, *, clock: Clock, took_s: float) -> HostFacts:
    """Return the facts in `answer`; what is missing there is not known."""
    user, names, tools, limits = answer["user"], answer["names"], answer["tools"], answer["limits"]
    name, uid, home, shell, _ = user.first("user", width=5)
    disks = _disks(answer)
    gpus = read_gpus(answer)
    ports = answer["ports"]
    uv, uv_version = tools.first("uv", width=2)
    docker = tools.all("tool")
    return HostFacts(
        arch=answer["system"].first("uname", width=3)[2],
        system=_system(answer["system"]),
        hostname=names.one("hostname"),
        resolves_to=_resolves_to(names),
        user=name,
        uid=_whole(uid),
        groups=tuple(user.one("groups").split()),
        home=home,
        shell=shell,
        sudo=next((word for word in ("root", "yes", "password", "no") if word == user.one("sudo")), None),
        root=disks["root"].wanted if "root" in disks else "",
        reached_at=_reached_at(user.one("ssh")),
        pythons=tuple(_pythons(answer["pythons"])),
        uv=uv,
        uv_version=uv_version.removeprefix("uv ").partition(" ")[0],
        tools={row[0]: row[1] for row in tools.all("tool")},
        docker_usable=next(("usable" in row for row in docker if row[0] == "docker"), None),
        gpus=gpus,
        memory=_memory(answer["memory"], unified=any(_UNIFIED.search(gpu.name) for gpu in gpus.gpus)),
        disks=disks,
        shared=tuple(_shared(answer["shared"])),
        clock=clock,
        listening=_listening(ports),
        holders=_holders(ports),
        ephemeral_ports=_pair(ports.one("ephemeral")),
        rays=tuple(_rays(answer["rays"])) if answer["rays"].status == 0 else None,
        clusters=tuple(_clusters(answer["clusters"])),
        index=_index(answer["index"]),
        proxies=_proxies(answer["proxies"]),
        interfaces=tuple(_interfaces(answer["interfaces"])) if answer["interfaces"].rows else None,
        infiniband=tuple(_infiniband(answer["infiniband"])),
        services=_services(answer["services"]),
        nofile=_nofile(limits),
        unanswered=tuple(sorted({*answer.unanswered} - _MAY_BE_UNKNOWN)),
        took_s=took_s,
    )


def _whole(text: str) -> int | None:
    return int(text) if _WHOLE.fullmatch(text.strip()) else None


def _pair(text: str) -> tuple[int, int] | None:
    numbers = [_whole(word) for word in text.split()]
    return (numbers[0], numbers[1]) if len(numbers) == 2 and None not in numbers else None  # type: ignore[return-value]  # noqa: PLR2004 -- a pair; None is excluded beside it


def _nofile(limits: Section) -> tuple[int, int] | None:
    soft, hard = (_NO_LIMIT if word == "unlimited" else _whole(word) for word in limits.first("nofile", width=2)[:2])
    return None if soft is None or hard is None else (soft, hard)


def _assigned(rows: Iterable[tuple[str, ...]]) -> dict[str, str]:
    """Read ``NAME="value"`` as /etc/os-release has it."""
    pairs = (row[0].partition("=") for row in rows if row)
    return {key: value.strip("\"'") for key, _, value in pairs}


def _system(section: Section) -> System:
    kind, release, _ = section.first("uname", width=3)
    release_of = _assigned(section.all("os"))
    dgx = _assigned(section.all("dgx"))
    reboot, packages = section.first("reboot", width=2)
    selinux = section.one("selinux").lower()
    return System(
        kind=kind,
        release=release,
        id=release_of.get("ID", ""),
        version=release_of.get("VERSION_ID", ""),
        name=release_of.get("PRETTY_NAME", ""),
        dgx=dgx.get("DGX_OTA_VERSION") or dgx.get("DGX_SWBUILD_VERSION", ""),
        libc=section.one("libc"),
        boot_id=section.one("boot"),
        machine_id=section.one("machine"),
        container=section.one("container"),
        selinux={"1": "enforcing", "0": "permissive"}.get(selinux, selinux),
        reboot_due={"yes": True, "no": False}.get(reboot),
        reboot_for=tuple(dict.fromkeys(word for word in packages.split() if not word.startswith(("=", "<", "/")))),
    )


def _resolves_to(names: Section) -> tuple[str, ...] | None:
    status = names.one("resolved")
    return None if not status else tuple(row[0] for row in names.all("address") if row)


def _reached_at(connection: str) -> str:
    """Return the server's address in ``SSH_CONNECTION``: client address and port, server address and port."""
    words = connection.split()
    return words[2].partition("%")[0] if len(words) == 4 else ""  # noqa: PLR2004 -- as above


def _pythons(section: Section) -> Iterator[Python]:
    named = section.one("named")
    for row in section.all("python"):
        path, real, version, level, kind, wide, inside, venv, ensurepip, pip, conda, free, platform = (
            *row,
            *([""] * 13),
        )[:13]
        if not version or wide == "0":
            continue
        yield Python(
            path=path,
            real_path=real,
            version=version,
            final=level == "final",
            cpython=kind == "cpython",
            free_threaded=free == "1",
            in_environment=inside == "1",
            has_venv=venv == "1",
            has_ensurepip=ensurepip == "1",
            has_pip=pip == "1",
            conda=conda == "1",
            platform=platform,
            named=bool(named) and named == path,
        )
    for row in section.all("unusable"):
        yield Python(path=row[0], named=bool(named) and named == row[0])


def _memory(section: Section, *, unified: bool) -> Memory:
    def kib(name: str) -> int | None:
        number = _whole(section.one(name))
        return None if number is None else number * _KIB

    total = kib("MemTotal")
    limits = [(*row, "", "")[:2] for row in section.all("limit")]
    bytes_allowed = [number for memory, _ in limits if (number := _whole(memory)) is not None and number < _NO_LIMIT]
    shares = [share for _, cpu in limits if (share := _cpu_share(cpu)) is not None]
    return Memory(
        total=total,
        available=kib("MemAvailable"),
        swap=kib("SwapTotal"),
        limit=min(bytes_allowed, default=None),
        unified=unified,
        cpus=_whole(section.one("cpus")),
        cpu_limit=min(shares, default=None),
    )


def _cpu_share(text: str) -> float | None:
    """Read ``cpu.max``: microseconds allowed in a period, or ``max``."""
    pair = _pair(text)
    return pair[0] / pair[1] if pair and pair[1] else None


def _disks(answer: ProbeOutput) -> dict[str, Disk]:
    section = answer["disks"]
    mounts = _mounts(answer["mounts"].text)
    space = {row[0]: [_whole(cell) for cell in row[1:]] for row in section.all("space") if len(row) == 6}  # noqa: PLR2004 -- as printed
    owners = {row[0]: row[1:] for row in section.all("owner") if len(row) == 4}  # noqa: PLR2004 -- as above
    found = {}
    for label, wanted, path, writable in (row for row in section.all("disk") if len(row) == 4):  # noqa: PLR2004 -- as above
        block, blocks, free, inodes, inodes_free = space.get(path, [None] * 5)
        owner, mode, mount = owners.get(path, ("", "", ""))
        source, kind, options = mounts.get(mount, ("", "", ()))
        found[label] = Disk(
            wanted=wanted,
            exists=wanted == path,
            mount=mount,
            source=source,
            kind=kind,
            options=options,
            total=blocks * block if blocks is not None and block is not None else None,
            free=free * block if free is not None and block is not None else None,
            inodes_free=inodes_free if inodes else None,
            writable={"yes": True, "no": False}.get(writable),
            owner=owner,
            mode=mode,
        )
    return found


def _mounts(text: str) -> dict[str, tuple[str, str, tuple[str, ...]]]:
    """Read /proc/self/mounts: source, kind and options by mount point. Of two on one point the later is seen."""
    rows = (line.split(" ") for line in text.splitlines())
    return {
        row[1].replace("\\040", " "): (row[0], row[2], tuple(row[3].split(",")))
        for row in rows
        if len(row) >= 4  # noqa: PLR2004 -- source, point, kind, options
    }


def _shared(section: Section) -> Iterator[SharedFolder]:
    for row in section.all("shared"):
        kind, source, path, about, writable = (*row, *([""] * 5))[:5]
        if not is_network_fs(kind):
            continue
        owner, group, mode = (*about.split(), "", "", "")[:3]
        yield SharedFolder(
            path=path,
            kind=kind,
            source=source,
            owner=owner,
            group=group,
            mode=mode,
            writable={"yes": True, "no": False}.get(writable),
        )


def _listening(ports: Section) -> tuple[int, ...] | None:
    if ports.status != 0:
        return None
    words = {row[0] for row in ports.all("listens") if row}
    return tuple(sorted({int(word, 16) for word in words if re.fullmatch(r"[0-9A-F]{4}", word)}))


def _holders(ports: Section) -> dict[int, str]:
    """Of a port that several listen on, the one that began first stands for all."""
    rows = [(whole(row[1]), whole(row[0]), row[2]) for row in ports.all("holder") if len(row) == 3]  # noqa: PLR2004 -- port, pid, program
    found = sorted((pid, port, program) for pid, port, program in rows if pid is not None and port is not None)
    return {port: f"{program} (pid {pid})" for pid, port, program in reversed(found)}


def _rays(section: Section) -> Iterator[RayProcess]:
    for row in section.all("ray"):
        pid, comm, user, cluster, said = (*row, *([""] * 5))[:5]
        flags = dict(word.partition("=")[::2] for word in said.split())
        low, high = (_whole(flags.get(f"{end}_worker_port", "")) for end in ("min", "max"))
        numbers = {_whole(value) for key, value in flags.items() if key.endswith("_port") and "worker" not in key}
        yield RayProcess(
            pid=_whole(pid) or 0,
            kind="raylet" if comm == "raylet" else "gcs_server",
            user=user,
            ports=tuple(sorted(number for number in numbers if number)),
            worker_ports=(low, high) if low and high else None,
            temp_dir=flags.get("temp_dir", "") or flags.get("temp-dir", ""),
            cluster_id=cluster,
        )


_DAY_S = 24 * 3600


class _Record(BaseModel):
    """What concerns others in a ``cluster.json`` (`raylaunch.cluster.record`), of whatever version."""

    name: str = ""
    owner: str = ""
    cluster_id: str = ""
    wanted: str = ""
    gpu_uuids: tuple[str, ...] = ()
    tls_until: Moment | None = None


def _clusters(section: Section) -> Iterator[FoundCluster]:
    seen: set[str] = set()
    for row in section.all("cluster"):
        pid, user, folder, text, since = (*row, *([""] * 5))[:5]
        if folder in seen:
            continue
        seen.add(folder)
        try:
            record = _Record.model_validate_json(text) if text else None
        except ValidationError:
            record = None
        yield FoundCluster(
            name=(record.name if record else "") or posixpath.basename(folder),
            user=user or (record.owner if record else ""),
            folder=folder,
            pid=_whole(pid),
            since=_whole(since),
            cluster_id=record.cluster_id if record else "",
            wanted=record.wanted if record else "",
            gpu_uuids=record.gpu_uuids if record else None,
            tls_days=int((record.tls_until - time.time()) // _DAY_S) if record and record.tls_until else None,
        )


def _index(section: Section) -> Index:
    tool, url = section.first("reached", width=2)
    if tool:
        return Index(reachable=True, tool=tool, url=url)
    tool, url, words = section.first("refused", width=3)
    return Index(reachable=False, tool=tool, url=url, words=" ".join(words.split())) if tool else Index()


def _proxies(section: Section) -> dict[str, str]:
    pairs = (row[0].partition("=") for row in section.all("proxy") if row)
    return {name: value for name, _, value in pairs}


def _interfaces(section: Section) -> Iterator[Interface]:
    addresses: dict[str, list[str]] = {}
    for row in section.all("address"):
        name, text = (*row, "", "")[:2]
        if re.fullmatch(r"[0-9A-Fa-f:.]+(/\d+)?", text):
            addresses.setdefault(name, []).append(text)
    defaults = {row[0] for row in section.all("default") if row}
    for row in section.all("interface"):
        name, kind, hardware, state, mtu, speed = (*row, *([""] * 6))[:6]
        megabits = _whole(speed)
        yield Interface(
            name=name,
            kind=kind,
            addresses=tuple(addresses.pop(name, ())),
            up={"up": True, "down": False}.get(state),
            mtu=_whole(mtu),
            bits_per_s=megabits * _MEGABIT if megabits and megabits > 0 else None,
            default_route=name in defaults,
            infiniband=hardware == _INFINIBAND_TYPE,
        )
    for name, left in addresses.items():  # a host without iproute2 says its addresses without their interfaces
        yield Interface(name=name, addresses=tuple(left))


def _infiniband(section: Section) -> Iterator[InfinibandPort]:
    for row in section.all("infiniband"):
        device, port, state, rate, link, interfaces = (*row, *([""] * 6))[:6]
        yield InfinibandPort(
            device=device,
            port=port,
            active="ACTIVE" in state,
            rate=rate,
            link=link,
            interfaces=tuple(interfaces.split()),
        )


def _services(section: Section) -> BootServices:
    lingers = [row[0] for row in section.all("linger") if row and row[0]]
    allowed = section.one("crontab")
    return BootServices(
        init=section.one("init"),
        user_manager=section.one("user_manager"),
        linger="yes" in lingers if lingers else None,
        crontab=None if not allowed else allowed == "yes",
        cron=section.one("cron"),
    )
