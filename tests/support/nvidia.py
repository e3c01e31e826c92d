"""A stand-in for nvidia-smi, which a test puts on a PATH: a machine gets the shape of a DGX, or of a Spark."""

from __future__ import annotations

import json
import stat
import sys
from dataclasses import dataclass, field
from pathlib import Path

H100 = "NVIDIA H100 80GB HBM3"

_PROGRAM = """#!{python}
import json, sys, time
shape = json.loads({shape!r})
asked = sys.argv[1] if len(sys.argv) > 1 else ""
if shape["calls"]:
    open(shape["calls"], "a").write(" ".join(sys.argv[1:]) + "\\n")
time.sleep(shape["hangs_s"])
if shape["fails"]:
    print(shape["fails"])
    sys.exit(9)
def table(fields, rows):
    units = dict.fromkeys(["memory.total", "memory.used", "used_gpu_memory"], " [MiB]") | {{"utilization.gpu": " [%]"}}
    names = [field + units.get(field, "") for field in fields]
    if "noheader" not in " ".join(sys.argv):
        print(", ".join(names))
    for row in rows:
        print(", ".join(str(row.get(field, "[N/A]")) for field in fields))
if asked.startswith("--query-gpu="):
    fields = asked.partition("=")[2].split(",")
    for field in fields:
        if field in shape["unknown_fields"]:
            print('Field "%s" is not a valid field to query.' % field)
            sys.exit(2)
    if not shape["gpus"]:
        print("No devices were found")
        sys.exit(6)
    table(fields, shape["gpus"])
elif asked.startswith("--query-compute-apps="):
    fields = ["used_gpu_memory" if field == "used_memory" else field for field in asked.partition("=")[2].split(",")]
    table(fields, shape["apps"])
elif asked == "-L":
    for gpu in shape["gpus"]:
        print("GPU %s: %s (UUID: %s)" % (gpu["index"], gpu["name"], gpu["uuid"]))
        for at in range(gpu.get("slices", 0)):
            print("  MIG 1g.10gb     Device  %d: (UUID: MIG-0000-%d)" % (at, at))
elif asked == "--version" and shape["cuda"]:
    print("NVIDIA-SMI version  : 550.54\\nNVML version        : 550.54\\nDRIVER version      : 550.54")
    print("%s        : %s" % (shape["cuda_words"], shape["cuda"]))
else:
    sys.exit(1)
"""


@dataclass
class NvidiaSmi:
    """The shape: fields of each GPU by nvidia-smi's own names; processes likewise."""

    gpus: list[dict[str, object]] = field(default_factory=list)
    apps: list[dict[str, object]] = field(default_factory=list)
    fails: str = ""
    hangs_s: float = 0
    unknown_fields: tuple[str, ...] = ()
    cuda: str = "12.4"
    cuda_words: str = "CUDA Version"
    calls: str = ""
    """A file that each call writes a line to."""

    def install(self, folder: Path) -> Path:
        """Write the program into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        program = folder / "nvidia-smi"
        program.write_text(_PROGRAM.format(python=sys.executable, shape=json.dumps(self.__dict__)))
        program.chmod(program.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
        return program


def dgx_h100(*, apps: list[dict[str, object]] | None = None) -> NvidiaSmi:
    """Eight H100."""
    gpus: list[dict[str, object]] = [
        {
            "index": index,
            "uuid": f"GPU-{index}aaa1111-0000-0000-0000-00000000000{index}",
            "name": H100,
            "memory.total": 81559,
            "memory.used": 4,
            "utilization.gpu": 0,
            "driver_version": "550.54.15",
            "pci.bus_id": f"00000000:{index}B:00.0",
            "compute_cap": "9.0",
            "compute_mode": "Default",
            "mig.mode.current": "Disabled",
            "ecc.errors.uncorrected.volatile.total": 0,
        }
        for index in range(8)
    ]
    return NvidiaSmi(gpus=gpus, apps=apps or [])


def spark() -> NvidiaSmi:
    """One GB10, which shares the machine's memory and says ``[N/A]`` for most things."""
    gpu: dict[str, object] = {
        "index": 0,
        "uuid": "GPU-5b0c1111-0000-0000-0000-000000000000",
        "name": "NVIDIA GB10",
        "utilization.gpu": 3,
        "driver_version": "580.95.05",
        "pci.bus_id": "0000000F:01:00.0",
        "compute_cap": "12.1",
        "compute_mode": "Default",
    }
    return NvidiaSmi(gpus=[gpu], cuda="13.0")


def sliced() -> NvidiaSmi:
    """A DGX whose first GPU is cut into seven MIG slices."""
    shape = dgx_h100()
    shape.gpus[0] |= {"mig.mode.current": "Enabled", "slices": 7}
    return shape
