"""The GPUs of this machine as ``nvidia-smi`` reports them, and which of them a cluster uses."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio
import psutil

from raylaunch.agent.node_info import smi_bytes, smi_rows
from raylaunch.cluster.processes import CONTROLLER
from raylaunch.cluster.record import ClusterRecord
from raylaunch.errors import ClusterStartError, ConflictError, SpecError
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.paths import user_name

_QUERY = "--query-gpu=index,uuid,name,memory.total"
_LIMIT_S = 20
_SHORTEST_UUID = len("GPU-") + 4


@dataclass(frozen=True)
class Gpu:
    """One GPU. `memory_total` is in bytes; None where ``nvidia-smi`` reports ``[N/A]`` (unified memory)."""

    index: str
    uuid: str
    name: str
    memory_total: int | None = None

    def __str__(self) -> str:
        memory = "" if self.memory_total is None else f", {self.memory_total / 1024**3:.0f} GiB"
        return f"{self.index} ({self.name}{memory}, {self.uuid})"


@dataclass(frozen=True)
class GpuChoice:
    """The GPUs for Ray: how many, and which real ones (none when they are only logical)."""

    count: int
    gpus: tuple[Gpu, ...] = ()
    logical: bool = False

    @property
    def visible(self) -> str:
        """Value of ``CUDA_VISIBLE_DEVICES`` for Ray."""
        return ",".join(gpu.index for gpu in self.gpus)

    @property
    def uuids(self) -> tuple[str, ...]:
        """The UUIDs of the real GPUs, which do not change over reboots."""
        return tuple(gpu.uuid for gpu in self.gpus)

    def __str__(self) -> str:
        if self.logical:
            return f"{self.count} logical GPU{'s' if self.count != 1 else ''}"
        if not self.gpus:
            return "no GPUs"
        return f"{self.count} GPU{'s' if self.count != 1 else ''}: " + ", ".join(str(gpu) for gpu in self.gpus)


async def detect_gpus() -> list[Gpu]:
    """Return the GPUs of this machine; empty without ``nvidia-smi``.

    Raises:
        ClusterStartError: ``nvidia-smi`` exists but fails (an incompatible driver, a GPU that fell off the bus).
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    argv = [program, _QUERY, "--format=csv,noheader,nounits"]
    try:
        with anyio.fail_after(_LIMIT_S):
            done = await anyio.run_process(argv, check=False)
    except TimeoutError:
        msg = f"nvidia-smi did not answer within {_LIMIT_S} s"
        raise ClusterStartError(msg, hint="the GPU driver hangs; or start without GPUs: gpus: 0", step="gpus") from None
    text, err = done.stdout.decode(errors="replace").strip(), done.stderr.decode(errors="replace").strip()
    if "No devices were found" in text + err:
        return []
    if done.returncode:
        words = (text or err).splitlines()
        msg = f"nvidia-smi failed with exit status {done.returncode}: {words[0] if words else 'it printed nothing'}"
        raise ClusterStartError(msg, hint="repair the GPU driver; or start without GPUs: gpus: 0", step="gpus")
    return parse_gpus(text)


def parse_gpus(rows: str) -> list[Gpu]:
    """Read the CSV of ``nvidia-smi --query-gpu``, without units."""
    return [
        Gpu(index=index, uuid=uuid, name=name, memory_total=smi_bytes(total))
        for index, uuid, name, total in smi_rows(rows, columns=4)
    ]


async def gpus_for(spec: ClusterSpec, own_config: Path) -> GpuChoice:
    """Return the GPUs for a cluster that is about to start here; `own_config` is its controller's configuration.

    Raises:
        ClusterStartError: see `detect_gpus`.
        ConflictError: see `check_gpus`.
        SpecError: see `choose_gpus`.
    """
    choice = choose_gpus(spec, [] if isinstance(spec.gpus, int) else await detect_gpus(), os.environ)
    if choice.gpus:
        check_gpus(spec, choice, other_clusters(own_config))
    return choice


def choose_gpus(spec: ClusterSpec, gpus: Sequence[Gpu], environ: Mapping[str, str]) -> GpuChoice:
    """Return which GPUs the cluster uses: all, those that the spec lists, or a number of logical ones.

    ``auto`` respects ``CUDA_VISIBLE_DEVICES`` if that is set, as every CUDA program does.

    Raises:
        SpecError: the spec lists a GPU that does not exist, or one twice.
    """
    match spec.gpus:
        case int(count):
            return GpuChoice(count=count, logical=count > 0)
        case "auto":
            limit = environ.get("CUDA_VISIBLE_DEVICES")
            wanted = [word.strip() for word in limit.split(",")] if limit is not None else [gpu.index for gpu in gpus]
            chosen = tuple(gpu for word in wanted if (gpu := _find(word, gpus)) is not None)
            return GpuChoice(count=len(chosen), gpus=chosen)
        case words:
            return _listed(words, gpus)


def _listed(words: Sequence[str], gpus: Sequence[Gpu]) -> GpuChoice:
    chosen: list[Gpu] = []
    for word in words:
        gpu = _find(word, gpus)
        if gpu is None:
            has = "; it has " + ", ".join(str(one) for one in gpus) if gpus else "; it has none (no nvidia-smi found)"
            msg = f"gpus: this machine has no GPU {word!r}{has}"
            raise SpecError(
                msg, hint="list ids or UUIDs from: nvidia-smi -L; or give a number of logical GPUs", field="gpus"
            )
        if gpu in chosen:
            msg = f"gpus: GPU {gpu.index} is listed twice ({word!r})"
            raise SpecError(msg, hint="list each GPU once", field="gpus")
        chosen.append(gpu)
    return GpuChoice(count=len(chosen), gpus=tuple(chosen))


def _find(word: str, gpus: Sequence[Gpu]) -> Gpu | None:
    """Find a GPU by its id, its UUID, or a unique prefix of its UUID."""
    exact = next((gpu for gpu in gpus if word in (gpu.index, gpu.uuid)), None)
    if exact is not None or len(word) < _SHORTEST_UUID:
        return exact
    close = [gpu for gpu in gpus if gpu.uuid.startswith(word)]
    return close[0] if len(close) == 1 else None


@dataclass(frozen=True)
class OtherCluster:
    """Another cluster that runs here. `gpu_uuids` is None if its record may not be read."""

    name: str
    user: str
    folder: str
    pid: int
    gpu_uuids: tuple[str, ...] | None

    def __str__(self) -> str:
        return f"cluster {self.name} of user {self.user} (controller pid {self.pid}, {self.folder})"


def other_clusters(own_config: Path) -> list[OtherCluster]:
    """Return the clusters whose controllers run on this machine, except the one configured by `own_config`."""
    found = []
    for process in psutil.process_iter():
        try:
            config = config_of(process.cmdline())
            if config is None or config == own_config or process.status() == psutil.STATUS_ZOMBIE:
                continue
            found.append(_other_cluster(config, user=user_name(process.uids().real), pid=process.pid))
        except psutil.Error:  # it has exited meanwhile, or may not be inspected
            continue
    return found


def config_of(argv: list[str]) -> Path | None:
    """Return the configuration file of a controller's command line; None for another program."""
    for at, word in enumerate(argv[:-3]):
        if word == "-m" and argv[at + 1] == CONTROLLER and argv[at + 2] == "--config":
            return Path(argv[at + 3])
    return None


def _other_cluster(config: Path, *, user: str, pid: int) -> OtherCluster:
    try:
        record = ClusterRecord.model_validate_json((config.parent / "cluster.json").read_bytes())
    except (OSError, ValueError):
        return OtherCluster(name=config.parent.name, user=user, folder=str(config.parent), pid=pid, gpu_uuids=None)
    return OtherCluster(name=record.name, user=user, folder=str(config.parent), pid=pid, gpu_uuids=record.gpu_uuids)


def check_gpus(spec: ClusterSpec, choice: GpuChoice, others: Iterable[OtherCluster]) -> None:
    """Refuse to use a GPU that another cluster uses. Logical GPUs never conflict.

    A cluster whose record may not be read is assumed to use all GPUs, unless the spec lists which ones to use.

    Raises:
        ConflictError: another cluster uses one of them; the message names its owner and the GPUs.
    """
    for other in others:
        shared = [gpu for gpu in choice.gpus if other.gpu_uuids is None or gpu.uuid in other.gpu_uuids]
        if not shared or (other.gpu_uuids is None and spec.gpus != "auto"):
            continue
        which = ", ".join(gpu.index for gpu in shared)
        word = "uses" if other.gpu_uuids is not None else "may use"
        msg = f"{other} {word} GPU{'s' if len(shared) > 1 else ''} {which} of this machine"
        me = user_name(os.getuid())
        ask = "" if other.user == me else f" (ask {other.user} for: raylaunch token create --for {me})"
        hint = f"use that cluster{ask}, or list other GPUs in cluster.yaml (gpus: [..]; gpus: 0 for none)"
        raise ConflictError(msg, hint=hint)
