"""`JobSpec`: what a person asks for in job.yaml, with options, in Python or through an MCP tool.

Frozen, validated, no I/O. An unknown field is refused; `raylaunch.config.load` adds file, line and nearest name.
"""

from __future__ import annotations

import itertools
import re
import shlex
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from raylaunch.contract import AUTO, NONE
from raylaunch.entrypoint import pasted, problem_of
from raylaunch.models.fields import (
    NAME,
    Amount,
    Bytes,
    Count,
    Environment,
    Requirements,
    Seconds,
    SecretNames,
    Spec,
    Variables,
    Words,
)

_BUILT_IN = frozenset({"gpu", "gpus", "cpu", "cpus", "memory", "object_store_memory"})
_OF_RAY = ("node:", "accelerator_type:", "bundle_")


class Resources(Spec):
    """What a job holds on its node while it runs. A request that no node could ever satisfy is refused at submit."""

    gpus: Annotated[int, Field(ge=0, le=100_000)] = 0
    """GPUs. Example: `1`"""
    cpus: Amount | None = None
    """CPU cores; default 1, or 0 for a job with GPUs. Example: `4`"""
    memory: Bytes = 0
    """Memory; used for placement, not enforced. Example: `16GiB`"""
    custom: dict[str, Amount] = Field(default_factory=dict)
    """Custom Ray resources. Example: `{scratch: 1}`"""

    @field_validator("gpus", mode="before")
    @classmethod
    def _gpus_are_whole(cls, value: object) -> object:
        try:
            part = float(str(value)) % 1
        except ValueError:
            return value
        if part and not isinstance(value, bool):
            msg = f"{value} is a part of a GPU, and a job gets whole GPUs; to share one, run the programs in one job"
            raise ValueError(msg)
        return value

    @field_validator("custom")
    @classmethod
    def _custom_is_not_built_in(cls, value: dict[str, float]) -> dict[str, float]:
        for name in value:
            if name.lower() in _BUILT_IN:
                msg = f"{name!r} is not a custom resource; write gpus, cpus or memory in resources"
                raise ValueError(msg)
            if name.startswith(_OF_RAY):
                msg = f"{name!r} is a resource of Ray's own; write hosts, labels or gpu_type in where"
                raise ValueError(msg)
        return value

    @property
    def effective_cpus(self) -> float:
        """CPUs that the job holds: as requested, else 1 without GPUs and 0 with GPUs."""
        if self.cpus is not None:
            return self.cpus
        return 0.0 if self.gpus else 1.0


class Where(Spec):
    """Which nodes a job may run on; by default any."""

    hosts: tuple[str, ...] = ()
    """Hostnames; one of them. Example: `[dgx-1]`"""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels that the node must have. Example: `{disk: nvme}`"""
    gpu_type: str = ""
    """Part of the GPU's name. Example: `H100`"""
    arch: Literal["", "x86_64", "aarch64"] = ""
    """The node's architecture. Example: `aarch64`"""


class Tracking(Spec):
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto` is online if credentials are found, else offline. Example: `offline`"""
    project: str = ""
    """The W&B project; default the one that the script names, else `raylaunch`. Example: `mnist`"""
    entity: str = ""
    """The W&B team or user; default your own. Example: `my-team`"""
    group: str = ""
    """Groups runs in W&B. Example: `ablation`"""
    job_type: str = "train"
    """The W&B job type. Example: `finetune`"""


Launcher = Literal["script", "torchrun", "ray"]


class JobSpec(Spec):
    """One job."""

    name: str = ""
    """Letters, digits, `.`, `_` and `-`, at most 63; by default made from the entrypoint. A name may be used again; it
    then means your latest job of that name. `last` is reserved. Example: `digits`"""
    entrypoint: str | tuple[str, ...]
    """What to run. Text is a shell command for `bash -eo pipefail`: it fails as soon as one part fails. A list is a
    program with its arguments: no shell, no quoting.
    Example: `python train.py --epochs 30`"""
    launcher: Launcher = "script"
    """How the entrypoint is started: `script` runs it unchanged, `torchrun` starts one rank per GPU, `ray` is for a Ray
    Train or Tune program. Example: `torchrun`"""
    processes: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Number of ranks with `launcher: torchrun`; default one per GPU, else 1. Example: `2`"""
    working_dir: str = "."
    """The folder to pack and send, relative to the file; empty for none. The job runs in a copy of it.
    Example: `src`"""
    resources: Resources = Resources()
    """What the job holds while it runs. Example: `{gpus: 1, memory: 16GiB}`"""
    where: Where = Where()
    """Which nodes it may run on. Example: `{gpu_type: H100}`"""
    env: Variables = Field(default_factory=dict)
    """Environment variables. Names that start with `RAYLAUNCH_` and those that select GPUs are refused: raylaunch
    gives each job its GPUs. Example: `{DATA: /raid/digits}`"""
    secrets: SecretNames = ()
    """Names of secrets to set as environment variables; `raylaunch secret set NAME` stores one.
    Example: `[HF_TOKEN]`"""
    environment: Environment = Environment(kind="auto")
    """The Python environment. `auto` uses the first that applies: `environment` in cluster.yaml, `uv.lock` in the
    working directory, the active environment (on a cluster on this machine), the cluster's own.
    Example: `conda:train`"""
    packages: Requirements = ()
    """Packages to add for this job; the environment itself is not changed. Example: `[numpy, pandas==2.3.3]`"""
    timeout_s: Seconds | None = None
    """Time limit per attempt; waiting does not count. Example: `6h`"""
    grace_s: Seconds = 30.0
    """Time from SIGTERM to SIGKILL when the job is stopped or times out. Example: `60s`"""
    outputs: Words = (AUTO,)
    """What to keep of the working directory, in addition to all of `$RAYLAUNCH_OUTPUT_DIR`: `auto` for new and changed
    files, `none`, or globs. Example: `["results/*.csv"]`"""
    outputs_size: Bytes = 1 << 30
    """How much `auto` keeps, small files first; the rest stays on the node for 7 days. Example: `5GiB`"""
    outputs_files: Count = 10_000
    """How many files `auto` keeps. Example: `500`"""
    tags: Words = ()
    """Words to find the job by; they are W&B tags too. Example: `[baseline]`"""
    tracking: Tracking = Tracking()
    """Weights & Biases. Example: `{project: digits}`"""
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    """Higher runs first; equal priorities run by age. Example: `10`"""
    retries: Annotated[int, Field(ge=0, le=100)] = 0
    """Additional attempts if the program fails. Attempts that failed because of a machine are repeated and not counted.
    Example: `2`"""

    @field_validator("entrypoint", mode="before")
    @classmethod
    def _entrypoint_given(cls, value: object) -> object:
        program = value[0] if isinstance(value, list | tuple) and value else value
        if (isinstance(program, str) and not program.strip()) or program in ((), []):
            msg = "the entrypoint is empty; give a command, for example: python train.py"
            raise ValueError(msg)
        return value

    @field_validator("launcher")
    @classmethod
    def _torchrun_can_start_it(cls, value: Launcher, info: ValidationInfo) -> Launcher:
        problem = problem_of(info.data.get("entrypoint") or "python -c pass") if value == "torchrun" else ""
        if problem:
            raise ValueError(problem)
        return value

    @field_validator("processes")
    @classmethod
    def _processes_of_torchrun(cls, value: int | None, info: ValidationInfo) -> int | None:
        launcher = info.data.get("launcher")
        if value is not None and launcher not in {None, "torchrun"}:
            msg = f"only launcher: torchrun starts ranks, and the launcher is {launcher}; write launcher: torchrun"
            raise ValueError(msg)
        found = pasted(info.data.get("entrypoint") or "")
        if value is not None and found is not None and found.ranks:
            msg = f"the entrypoint sets the number of ranks itself ({found.ranks}); leave one of the two out"
            raise ValueError(msg)
        return value

    @field_validator("outputs")
    @classmethod
    def _none_stands_alone(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if NONE in value and len(value) > 1:
            msg = "outputs: none keeps nothing of the working directory; leave out either none or the others"
            raise ValueError(msg)
        return value

    @field_validator("name")
    @classmethod
    def _name_is_plain(cls, value: str) -> str:
        if value and not NAME.fullmatch(value):
            msg = f"{value!r} is not a job name; use letters, digits, '.', '_' and '-', at most 63"
            raise ValueError(msg)
        if value == "last":
            msg = "a job cannot be named 'last': that word names the latest job everywhere"
            raise ValueError(msg)
        return value

    @property
    def command(self) -> str:
        """The entrypoint as one line for people."""
        return self.entrypoint if isinstance(self.entrypoint, str) else shlex.join(self.entrypoint)

    @property
    def display_name(self) -> str:
        """The name, or one made from the entrypoint: its script without folder and extension, else its program."""
        return self.name or _name_from(self.command)


def _name_from(command: str) -> str:
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    script = next((word for word in words if word.endswith((".py", ".sh"))), "")
    module = next((after for word, after in itertools.pairwise(words) if word == "-m"), "")
    chosen = script.rsplit("/", 1)[-1].rsplit(".", 1)[0] or module or (words[0].rsplit("/", 1)[-1] if words else "")
    cleaned = re.sub(r"[^A-Za-z0-9_.-]+", "-", chosen).strip("-._")[:63]
    return cleaned if cleaned and cleaned != "last" else "job"
