"""What is asked for: `ClusterSpec` (cluster.yaml) and `JobSpec` (job.yaml, flags, a notebook, an MCP call).

Frozen, validated, no I/O. An unknown field is refused; `raylaunch.config` adds file, line and nearest name.
"""

from __future__ import annotations

import itertools
import re
import shlex
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|min|h|d)?")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}

GPU_VARIABLES = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


def seconds(value: object) -> object:
    """Read a duration: a number of seconds, or ``"90s"``, ``"15m"``, ``"2h"``, ``"1.5d"``, ``"1h30m"``.

    Raises:
        ValueError: the text is not a duration.
    """
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    parts = list(_DURATION.finditer(text))
    if not parts or "".join(part.group(0) for part in parts).replace(" ", "") != text.replace(" ", ""):
        msg = f"{value!r} is not a duration; write seconds, or 90s, 15m, 2h, 1h30m, 2d"
        raise ValueError(msg)
    return sum(float(part.group(1)) * _SECONDS[part.group(2) or "s"] for part in parts)


def size_bytes(value: object) -> object:
    """Read a size: a number of bytes, or ``"8GiB"``, ``"500MB"``, ``"16G"`` (powers of 1024, but of 1000 for KB to TB).

    Raises:
        ValueError: the text is not a size.
    """
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        msg = f"{value!r} is not a size; write bytes, or 512MiB, 8GiB, 16G"
        raise ValueError(msg)
    number, unit = float(match.group(1)), (match.group(2) or "").lower()
    if not unit:
        return int(number)
    decimal = value.strip().lower().endswith("b") and not unit.endswith("i")
    return int(number * (1000 if decimal else 1024) ** ("kmgt".index(unit[0]) + 1))


Seconds = Annotated[float, BeforeValidator(seconds), Field(gt=0)]
Bytes = Annotated[int, BeforeValidator(size_bytes), Field(ge=0)]


class Spec(BaseModel):
    """Base of everything that is asked for: frozen, and strict about unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Resources(Spec):
    """What a job needs, on one node."""

    gpus: Annotated[int, Field(ge=0, description="GPUs on each node")] = 0
    cpus: (
        Annotated[float, Field(ge=0, description="CPU cores; by default 1, or none when GPUs are asked for")] | None
    ) = None
    memory: Annotated[Bytes, Field(description="memory, as 8GiB")] = 0
    custom: Annotated[dict[str, float], Field(description="custom Ray resources, as {scratch: 1}")] = Field(
        default_factory=dict
    )

    @property
    def effective_cpus(self) -> float:
        """CPUs that the job holds: what it asks for, else 1 without GPUs and 0 with them."""
        if self.cpus is not None:
            return self.cpus
        return 0.0 if self.gpus else 1.0


class Where(Spec):
    """Where a job may run. Empty means anywhere."""

    hosts: tuple[str, ...] = ()
    labels: dict[str, str] = Field(default_factory=dict)
    gpu_type: Annotated[str, Field(description="part of the GPU's name, as H100")] = ""
    arch: Literal["", "x86_64", "aarch64"] = ""


class Tracking(Spec):
    """Weights & Biases. ``auto`` is on-line where credentials are found and off-line where not."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = ""
    entity: str = ""
    group: str = ""
    job_type: str = "train"


Launcher = Literal["script", "torchrun", "ray"]

EnvironmentKind = Literal["default", "python", "conda", "venv", "uv", "pip"]


class Environment(Spec):
    """The Python environment of a job, in one of six kinds.

    ==================================  ==============================================================
    ``default``                         the cluster's own (the interpreter that runs Ray there)
    ``/path/to/python``                 that interpreter
    ``venv:PATH``, ``conda:NAME``       activated as a shell would, so that console scripts are found
    ``uv``                              the project's own lock file, synced once per content
    ``pip: [..]`` or ``pip: FILE``      a list, or a requirements file in the working directory
    ==================================  ==============================================================
    """

    kind: EnvironmentKind = "default"
    value: str = ""
    requirements: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _read(cls, data: object) -> object:
        if isinstance(data, str):
            return _environment_from_text(data)
        if isinstance(data, dict) and set(data) == {"pip"}:
            pip = data["pip"]
            if isinstance(pip, str):
                return {"kind": "pip", "value": pip}
            return {"kind": "pip", "requirements": pip}
        return data

    def __str__(self) -> str:
        match self.kind:
            case "default" | "uv":
                return self.kind
            case "python":
                return self.value
            case "pip":
                return f"pip:{self.value}" if self.value else f"pip: {', '.join(self.requirements)}"
            case _:
                return f"{self.kind}:{self.value}"


def _environment_from_text(text: str) -> dict[str, object]:
    if text in {"", "default"}:
        return {"kind": "default"}
    if text == "uv":
        return {"kind": "uv"}
    kind, colon, value = text.partition(":")
    if colon and kind in {"conda", "venv", "pip"}:
        if not value:
            msg = f"{text!r} names no {kind} environment"
            raise ValueError(msg)
        return {"kind": kind, "value": value}
    if "/" in text or text.startswith("python"):
        return {"kind": "python", "value": text}
    msg = f"{text!r} is not an environment; write default, /path/to/python, venv:PATH, conda:NAME, uv, or pip: [...]"
    raise ValueError(msg)


def _as_list(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Words = Annotated[tuple[str, ...], BeforeValidator(_as_list)]


class JobSpec(Spec):
    """One piece of training."""

    name: Annotated[str, Field(description="letters, digits, . _ -; by default made from the entrypoint")] = ""
    entrypoint: Annotated[
        str | tuple[str, ...], Field(description="a shell command (string), or a program with its arguments (list)")
    ]
    launcher: Annotated[
        Launcher,
        Field(
            description="script runs the entrypoint as it is; torchrun starts one rank of it a GPU; "
            "ray is for a Ray Train or Tune program"
        ),
    ] = "script"
    processes: (
        Annotated[int, Field(ge=1, le=1024, description="ranks on the node; by default one a GPU, else 1")] | None
    ) = None
    working_dir: Annotated[str, Field(description="packed and sent at submit; empty for none")] = "."
    resources: Resources = Resources()
    where: Where = Where()
    env: dict[str, str] = Field(default_factory=dict)
    secrets: Annotated[Words, Field(description="names of secrets that become environment variables")] = ()
    environment: Environment = Environment()
    timeout_s: Annotated[Seconds | None, Field(description="longest run of one attempt, as 2h")] = None
    grace_s: Annotated[Seconds, Field(description="between SIGTERM and SIGKILL at a stop")] = 30.0
    outputs: Annotated[
        Words, Field(description="files and globs in the working directory to keep, beside $RAYLAUNCH_OUTPUT_DIR")
    ] = ()
    tags: Words = ()
    tracking: Tracking = Tracking()
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    retries: Annotated[int, Field(ge=0, le=100, description="more attempts when the program fails")] = 0

    @field_validator("entrypoint", mode="before")
    @classmethod
    def _entrypoint_given(cls, value: object) -> object:
        if (isinstance(value, str) and not value.strip()) or value in ((), []):
            msg = "the entrypoint is empty; give a command, as: python train.py"
            raise ValueError(msg)
        return value

    @field_validator("processes")
    @classmethod
    def _processes_of_torchrun(cls, value: int | None, info: ValidationInfo) -> int | None:
        launcher = info.data.get("launcher")
        if value is not None and launcher not in {None, "torchrun"}:
            msg = f"only launcher: torchrun starts ranks, and the launcher is {launcher}; write launcher: torchrun"
            raise ValueError(msg)
        return value

    @field_validator("name")
    @classmethod
    def _name_is_plain(cls, value: str) -> str:
        if value and not _NAME.fullmatch(value):
            msg = f"{value!r} is not a job name; use letters, digits, '.', '_' and '-', at most 63"
            raise ValueError(msg)
        if value == "last":
            msg = "a job cannot be named 'last': that word names the latest job everywhere"
            raise ValueError(msg)
        return value

    @field_validator("env", mode="before")
    @classmethod
    def _env_is_text(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {key: _scalar_text(item) for key, item in value.items()}

    @field_validator("env")
    @classmethod
    def _env_is_allowed(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not _VARIABLE.fullmatch(name):
                msg = f"{name!r} is not an environment variable's name"
                raise ValueError(msg)
            if name in GPU_VARIABLES:
                msg = f"{name} cannot be set: raylaunch gives each job its GPUs; ask for them with resources.gpus"
                raise ValueError(msg)
            if name.startswith("RAYLAUNCH_"):
                msg = f"{name} cannot be set: names that begin with RAYLAUNCH_ are raylaunch's own"
                raise ValueError(msg)
        return value

    @field_validator("secrets")
    @classmethod
    def _secrets_are_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not _VARIABLE.fullmatch(name):
                msg = (
                    f"{name!r} is not a secret's name; list names here, and set values with: raylaunch secret set NAME"
                )
                raise ValueError(msg)
        return value

    @property
    def command(self) -> str:
        """The entrypoint as one line for people."""
        return self.entrypoint if isinstance(self.entrypoint, str) else shlex.join(self.entrypoint)

    @property
    def display_name(self) -> str:
        """The name, or one made from the entrypoint: its script without folder and ending, else its program."""
        return self.name or _name_from(self.command)


def _scalar_text(value: object) -> object:
    """YAML reads ``1`` and ``true`` as numbers and booleans; in an environment they are text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int | float) else value


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


def _gpus_words(value: object) -> object:
    if isinstance(value, list):
        return tuple(str(item) for item in value)
    return value


ClusterGpus = Annotated[Literal["auto"] | Annotated[int, Field(ge=0)] | tuple[str, ...], BeforeValidator(_gpus_words)]


class ClusterSpec(Spec):
    """A cluster, as cluster.yaml describes it. Without a file: the embedded cluster ``local`` on this machine."""

    name: str = "local"
    kind: Literal["local"] = "local"
    gpus: Annotated[
        ClusterGpus, Field(description="auto, a list of ids or UUIDs to use, or a number of logical GPUs")
    ] = "auto"
    cpus: Annotated[float, Field(gt=0, description="CPU cores that jobs may use; by default all")] | None = None
    port: (
        Annotated[int, Field(ge=1024, le=65535, description="the controller's port; by default a free one")] | None
    ) = None
    store: Annotated[str, Field(description="folder for records, logs and outputs")] = ""
    environment: Annotated[Environment, Field(description="environment of jobs that name none")] = Environment()
    env: dict[str, str] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _name_is_plain(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            msg = f"{value!r} is not a cluster name; use letters, digits, '.', '_' and '-'"
            raise ValueError(msg)
        return value
