"""The sections of the probe's output, and its GPUs: ``nvidia-smi``'s tables, the PCI bus and the kernel's log."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from raylaunch.agent.node_info import smi_bytes, smi_number
from raylaunch.cluster.probe.facts import GpuProcess, Gpus, HostGpu
from raylaunch.models.fields import whole

_CUDA = re.compile(r"CUDA (?:UMD )?Version\s*:\s*([0-9.]+)")
"""Drivers from 610 on say "CUDA UMD Version"."""
_MODULE = re.compile(r"Module\s+(?:for \S+\s+)?([0-9.]+)")
_MIG_DEVICE = re.compile(r"^\s+MIG .*\(UUID: MIG-", re.MULTILINE)
_NO_DEVICES = "No devices were found"


@dataclass(frozen=True)
class Section:
    """What one part of the script printed, and its exit status: 124 when it did not end in time, None when cut off."""

    text: str = ""
    status: int | None = None
    rows: tuple[tuple[str, ...], ...] = field(default=(), repr=False)
    """Its lines, cut at tabs."""

    def all(self, name: str) -> list[tuple[str, ...]]:
        """Return what stands behind `name` in each line that begins with it."""
        return [row[1:] for row in self.rows if row[0] == name]

    def first(self, name: str, *, width: int = 1) -> tuple[str, ...]:
        """Return what stands behind `name` in the first such line: `width` texts, empty where there are none."""
        found = next(iter(self.all(name)), ())
        return (*found, *([""] * width))[: max(width, len(found))]

    def one(self, name: str) -> str:
        """Return the text behind `name`."""
        return self.first(name)[0].strip()


@dataclass(frozen=True)
class ProbeOutput:
    """All sections by name. `complete` when the script came to its end."""

    sections: Mapping[str, Section]
    complete: bool

    def __getitem__(self, name: str) -> Section:
        return self.sections.get(name, Section())

    @property
    def unanswered(self) -> tuple[str, ...]:
        """Sections that failed with no words, were ended by their limit, or cut off."""
        return tuple(
            name for name, one in self.sections.items() if one.status in {None, 124} or (one.status and not one.rows)
        )


def read_answer(output: bytes, mark: str) -> ProbeOutput:
    """Cut `output` into sections at the lines that bear `mark`."""
    text = output.decode("utf-8", errors="replace").replace("\r\n", "\n")
    marked = re.compile(rf"^@@{re.escape(mark)} (begin|end|complete) ?(\w*) ?(\d*)$", re.MULTILINE)
    sections: dict[str, Section] = {}
    complete = False
    begun: tuple[str, int] | None = None
    for found in marked.finditer(text):
        what, name, status = found.groups()
        if what == "begin":
            begun = (name, found.end() + 1)
            sections[name] = Section()
        elif what == "end" and begun and begun[0] == name:
            sections[name] = _section(text[begun[1] : found.start()], int(status or 0))
            begun = None
        elif what == "complete":
            complete = True
    return ProbeOutput(sections, complete)


def _section(text: str, status: int) -> Section:
    rows = tuple(tuple(line.split("\t")) for line in text.splitlines() if line.strip())
    return Section(text.strip("\n"), status, rows)


def read_gpus(answer: ProbeOutput) -> Gpus:
    """Return the host's GPUs; of a driver that does not work, what it said."""
    hardware, query = answer["gpu_hardware"], answer["gpu_query"]
    rows = _table(query.text) if query.status == 0 and _NO_DEVICES not in query.text else []
    users = _processes(answer["gpu_apps"])
    found = tuple(_gpu(row, users.get(row.get("uuid", ""), ())) for row in rows)
    module = _MODULE.search(hardware.one("module"))
    cuda = _CUDA.search(answer["gpu_version"].text)
    return Gpus(
        hardware=len(hardware.all("pci")) if hardware.status == 0 else None,
        nvidia_smi=hardware.one("smi"),
        problem=_problem(query),
        driver=next(
            (row["driver_version"] for row in rows if row.get("driver_version")), module.group(1) if module else ""
        ),
        cuda=cuda.group(1) if cuda else "",
        gpus=found,
        mig_devices=len(_MIG_DEVICE.findall(answer["gpu_list"].text)),
        xids=tuple(answer["xid"].text.splitlines()) if answer["xid"].status == 0 else None,
    )


def _problem(query: Section) -> str:
    if query.status == 0 or (not query.rows and query.status is None) or _NO_DEVICES in query.text:
        return ""
    if query.status == 124:  # noqa: PLR2004 -- what `timeout` says
        return "it did not answer within 10 s"
    return " ".join(query.text.split()) or f"exit status {query.status}"


def _table(text: str) -> list[dict[str, str]]:
    """Read CSV with its header; ``memory.total [MiB]`` is called ``memory.total``."""
    lines = list(csv.reader(text.splitlines(), skipinitialspace=True))
    header = next((at for at, row in enumerate(lines) if row and row[0].strip() in {"index", "gpu_uuid"}), None)
    if header is None:
        return []
    names = [cell.partition(" [")[0].strip() for cell in lines[header]]
    return [
        dict(zip(names, (cell.strip() for cell in row), strict=True))
        for row in lines[header + 1 :]
        if len(row) == len(names)
    ]


def _gpu(row: Mapping[str, str], processes: Iterable[GpuProcess]) -> HostGpu:
    ecc = smi_number(row.get("ecc.errors.uncorrected.volatile.total", ""))
    return HostGpu(
        index=row.get("index", ""),
        uuid=row.get("uuid", ""),
        name=row.get("name", ""),
        memory_total=smi_bytes(row.get("memory.total", "")),
        memory_used=smi_bytes(row.get("memory.used", "")),
        utilization=smi_number(row.get("utilization.gpu", "")),
        bus_id=row.get("pci.bus_id", ""),
        compute_capability=row.get("compute_cap", ""),
        compute_mode=row.get("compute_mode", ""),
        mig={"Enabled": True, "Disabled": False}.get(row.get("mig.mode.current", "")),
        ecc_errors=None if ecc is None else int(ecc),
        processes=tuple(processes),
    )


def _processes(section: Section) -> dict[str, list[GpuProcess]]:
    """Return who computes on which GPU, by its UUID."""
    about = {row[0]: (*row[1:], "", "")[:2] for row in section.all("pid") if row}
    found: dict[str, list[GpuProcess]] = {}
    for row in _table("\n".join(line[0] for line in section.all("app") if line)):
        pid = whole(row.get("pid", ""))
        if pid is None:
            continue
        user, ours = about.get(row["pid"], ("", ""))
        process = GpuProcess(
            pid=pid,
            user=user,
            command=row.get("process_name", "").rsplit("/", 1)[-1].strip("[]"),
            memory=smi_bytes(row.get("used_gpu_memory", row.get("used_memory", ""))),
            ours=ours == "yes",
        )
        found.setdefault(row.get("gpu_uuid", ""), []).append(process)
    return found
