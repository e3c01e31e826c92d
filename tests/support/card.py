"""A real GPU as ``nvidia-smi`` tells of it, and a program that asks CUDA's driver itself, without PyTorch."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

GIB = 1024**3

PROGRAM = """
import ctypes, json, os, sys, time, uuid

size, seconds = int(float(sys.argv[1]) * 2**30), float(sys.argv[2])
cuda = ctypes.CDLL("libcuda.so.1")


def call(name, *args):
    status = getattr(cuda, name)(*args)
    if status:
        sys.exit(f"{name}: {status}")


began = cuda.cuInit(0)
seen = []
if began == 0:
    count = ctypes.c_int()
    call("cuDeviceGetCount", ctypes.byref(count))
    for n in range(count.value):
        device, name, its = ctypes.c_int(), ctypes.create_string_buffer(100), ctypes.create_string_buffer(16)
        call("cuDeviceGet", ctypes.byref(device), n)
        call("cuDeviceGetName", name, 100, device)
        call("cuDeviceGetUuid", its, device)
        seen.append({"uuid": f"GPU-{uuid.UUID(bytes=its.raw)}", "name": name.value.decode()})
if seen:
    context, there, back = ctypes.c_void_p(), ctypes.c_uint64(), ctypes.create_string_buffer(16)
    call("cuDeviceGet", ctypes.byref(device), 0)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    call("cuCtxSetCurrent", context)
    call("cuMemAlloc_v2", ctypes.byref(there), ctypes.c_size_t(size))
    call("cuMemsetD8_v2", there, ctypes.c_ubyte(7), ctypes.c_size_t(size))
    call("cuMemcpyDtoH_v2", back, ctypes.c_uint64(there.value + size - 16), ctypes.c_size_t(16))
    assert back.raw == bytes([7]) * 16
print(json.dumps({"status": began, "visible": os.environ.get("CUDA_VISIBLE_DEVICES"), "gpus": seen}), flush=True)
print("ready", flush=True)
time.sleep(seconds)
"""
"""Arguments: GiB to take on the first GPU that it sees, and the seconds for which it keeps them. Writes what it saw, as
one line of JSON: ``cuInit``'s status (0 is well, 100 is no device), CUDA_VISIBLE_DEVICES, and the GPUs."""
NO_DEVICE = 100


@dataclass(frozen=True)
class Card:
    """One GPU of this machine; sizes are bytes."""

    uuid: str
    name: str
    memory_total: int
    memory_used: int


def cards() -> tuple[Card, ...]:
    """Return what ``nvidia-smi`` lists now; nothing where there is no such program, or no GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    fields = "--query-gpu=uuid,name,memory.total,memory.used"
    asked = subprocess.run(
        [program, fields, "--format=csv,noheader,nounits"], capture_output=True, text=True, check=False, timeout=60
    )
    if asked.returncode:
        return ()
    rows = [[word.strip() for word in line.split(",")] for line in asked.stdout.splitlines()]
    return tuple(Card(uuid, name, _bytes(total), _bytes(used)) for uuid, name, total, used in rows)


def _bytes(mib: str) -> int:
    return int(mib) * 1024**2 if mib.isdigit() else 0  # [N/A] where memory is unified
