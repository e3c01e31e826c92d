"""The types of fields: durations, sizes, bounded numbers, names and variables; the base of specs, and `Environment`."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
KEYS = {"timeout_s": "timeout", "grace_s": "grace", "jobs_s": "jobs", "checkpoints_s": "checkpoints"}
"""The keys that people write for fields whose names have a unit; the field's own name is accepted too."""
GPU_VARIABLES = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
MOST_SECONDS = 10 * 366 * 86400.0

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|min|h|d)?")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)
_WHOLE = re.compile(r"[0-9]{1,18}")
_REQUIREMENT = re.compile(r"[A-Za-z0-9]")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_LAST_MOMENT = 253_402_300_799.0
_MOST_SIZE = 1e18
_MOST_BYTES = 1 << 60
_MOST_AMOUNT = 1_000_000.0


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


def point_in_time(text: str, *, now: datetime) -> datetime:
    """Read a future time: ``18:00`` (today, or tomorrow if that is past), ``2026-11-28T18:00``, or ``2h`` from now.

    Args:
        text: what a person wrote.
        now: the current time, in the person's time zone.

    Raises:
        ValueError: it is none of these, or is in the past.
    """
    if clock := re.fullmatch(r"(\d{1,2}):(\d{2})", text.strip()):
        at = now.replace(hour=int(clock[1]), minute=int(clock[2]), second=0, microsecond=0)
        return at if at > now else at + timedelta(days=1)
    try:
        return now + timedelta(seconds=float(str(seconds(text))))
    except ValueError:
        pass
    try:
        at = datetime.fromisoformat(text.strip())
    except ValueError:
        msg = f"{text!r} is not a time; write 18:00, 2026-11-28T18:00, or a duration from now: 90m, 2h, 3d"
        raise ValueError(msg) from None
    at = at if at.tzinfo else at.replace(tzinfo=now.tzinfo)
    if at <= now:
        msg = f"{text!r} is in the past"
        raise ValueError(msg)
    return at


def whole(text: str) -> int | None:
    """Return a whole number of at most 18 ASCII digits from untrusted text; None for anything else.

    `int` alone accepts digits of other scripts, and fails for more than 4,300.
    """
    return int(text) if _WHOLE.fullmatch(text) else None


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
    if number > _MOST_SIZE:
        msg = f"{value[:40]!r} is more than any disk holds"
        raise ValueError(msg)
    if not unit:
        return int(number)
    decimal = value.strip().lower().endswith("b") and not unit.endswith("i")
    return int(number * (1000 if decimal else 1024) ** ("kmgt".index(unit[0]) + 1))


# Every number from outside is finite and bounded: JSON cannot represent others, and they would reach arithmetic, a
# database and other people's lists.
Seconds = Annotated[float, BeforeValidator(seconds), Field(gt=0, le=MOST_SECONDS, allow_inf_nan=False)]
"""A duration of more than 0, at most ten years."""
SomeSeconds = Annotated[float, Field(ge=0, le=MOST_SECONDS, allow_inf_nan=False)]
"""A duration that may be 0."""
Moment = Annotated[float, Field(ge=0, le=_LAST_MOMENT, allow_inf_nan=False)]
"""Seconds since the epoch, up to the year 9999."""
Bytes = Annotated[int, BeforeValidator(size_bytes), Field(ge=0, le=_MOST_BYTES)]
Amount = Annotated[float, Field(ge=0, le=_MOST_AMOUNT, allow_inf_nan=False)]
"""How much of a resource a job requests."""
Capacity = Annotated[float, Field(ge=0, le=1e24, allow_inf_nan=False)]
"""How much of a resource a node has."""
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
"""A number of things, or of bytes."""
Whole = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
"""A whole number that is checked where it is used."""
ExitCode = Annotated[int, Field(ge=-(1 << 31), lt=1 << 32)]
Port = Annotated[int, Field(ge=0, lt=1 << 16)]
StepNumber = Annotated[float, Field(ge=-1e24, le=1e24, allow_inf_nan=False)]
"""A step of a program, in its own unit, which may be nanoseconds since the epoch."""


class Spec(BaseModel):
    """Base of specs: frozen, and strict about unknown fields.

    The string below a field, with its example, is the field's description in the reference (``make docs-reference``).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _keys_as_fields(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        for field, key in KEYS.items():
            if field in cls.model_fields and key in data:
                if field in data:
                    msg = f"{key} and {field} are the same setting; leave {field} out"
                    raise ValueError(msg)
                data = {field if name == key else name: value for name, value in data.items()}
        return data


EnvironmentKind = Literal["auto", "default", "ray", "python", "conda", "venv", "uv", "pip"]

OF_THE_CLUSTER: frozenset[EnvironmentKind] = frozenset({"auto", "default"})
"""Kinds with which the cluster chooses the environment. The client replaces `auto` when it submits."""

ENVIRONMENTS: tuple[tuple[str | dict[str, object], str], ...] = (
    (
        "auto",
        (
            "The default: `environment` in cluster.yaml, else `uv.lock` in the working directory, else the active venv "
            "or conda environment (on a cluster on this machine), else the interpreter that runs Ray."
        ),
    ),
    ("default", "The cluster's own: `environment` in cluster.yaml, else the interpreter that runs Ray there."),
    ("ray", "The interpreter that runs Ray there, whatever cluster.yaml says."),
    ("/opt/train/bin/python", "That interpreter; a path on the node."),
    ("venv:/opt/train", "A virtual environment on the node, activated as a shell would."),
    ("conda:train", "A conda environment on the node, activated as a shell would."),
    ("uv", "The project's own `uv.lock`, synced once for each content."),
    ({"pip": ["numpy", "torch==2.13.0"]}, "Packages, installed once for each content."),
    ({"pip": "requirements.txt"}, "A requirements file in the working directory; `pip:requirements.txt` is the same."),
)
"""How each kind of environment is written, and what it is."""


class Environment(Spec):
    """The Python environment of a job; `ENVIRONMENTS` shows how each kind is written."""

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
            case "auto" | "default" | "ray" | "uv":
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
    if text in {"auto", "ray", "uv"}:
        return {"kind": text}
    kind, colon, value = text.partition(":")
    if kind == "pip" and value.strip().startswith("["):
        return {"kind": "pip", "requirements": _listed(value.strip())}
    if colon and kind in {"conda", "venv", "pip"}:
        if not value:
            msg = f"{text!r} names no {kind} environment"
            raise ValueError(msg)
        return {"kind": kind, "value": value}
    if "/" in text or text.startswith("python"):
        return {"kind": "python", "value": text}
    package = text if re.fullmatch(r"[A-Za-z0-9._-]+", text) else "numpy"
    msg = (
        f"{text!r} is not an environment; write default, ray, /path/to/python, venv:PATH, conda:NAME, uv, "
        f"pip:requirements.txt or pip: [{package}]; or add the package to the environment: --with {package}"
    )
    raise ValueError(msg)


def _listed(text: str) -> tuple[str, ...]:
    """Read ``[numpy, torch==2.13.0]`` as YAML would. A comma inside brackets or before an operator is a version's."""
    if not text.endswith("]"):
        msg = f"pip: {text} has no closing bracket; write pip: [numpy, torch==2.13.0]"
        raise ValueError(msg)
    words = re.split(r",\s*(?![<>=!~\d])(?![^\[]*\])", text[1:-1])
    return tuple(word.strip().strip("'\"") for word in words if word.strip())


class Retention(Spec):
    """How long the store keeps the files of ended jobs. Without a setting, permanently."""

    jobs_s: Seconds | None = None
    """How long an ended job is kept, with its record and all of its files. Example: `180d`"""
    checkpoints_s: Seconds | None = None
    """How long the checkpoints of an ended job are kept; outputs, logs and metrics stay. Example: `14d`"""


def as_list(value: object) -> object:
    """Read one text as a list of one."""
    return (value,) if isinstance(value, str) else value


Words = Annotated[tuple[str, ...], BeforeValidator(as_list)]


def _requirements(value: tuple[str, ...]) -> tuple[str, ...]:
    for text in value:
        if not _REQUIREMENT.match(text):
            msg = f"{text!r} is not a package; name it as pip does: numpy, or torch==2.13.0"
            raise ValueError(msg)
    return value


Requirements = Annotated[Words, AfterValidator(_requirements)]


def _as_text(value: object) -> object:
    """Return numbers and booleans as text, which is what variables are; YAML reads ``1`` and ``true`` as such."""
    return {key: _scalar_text(item) for key, item in value.items()} if isinstance(value, dict) else value


def _scalar_text(value: object) -> object:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int | float) else value


def _variables(value: dict[str, str]) -> dict[str, str]:
    for name in value:
        if not _VARIABLE.fullmatch(name):
            msg = f"{name!r} is not an environment variable's name"
            raise ValueError(msg)
        if name in GPU_VARIABLES:
            msg = f"{name} cannot be set: raylaunch gives each job its GPUs; ask for them with resources.gpus"
            raise ValueError(msg)
        if name.startswith("RAYLAUNCH_"):
            msg = f"{name} cannot be set: names that start with RAYLAUNCH_ are reserved"
            raise ValueError(msg)
    return value


Variables = Annotated[dict[str, str], BeforeValidator(_as_text), AfterValidator(_variables)]
"""Environment variables that a person may set for jobs."""


def _secret_names(value: tuple[str, ...]) -> tuple[str, ...]:
    for name in value:
        if not _VARIABLE.fullmatch(name):
            shown = repr(name) if "=" not in name else "text with = in it"  # most likely the value
            msg = f"{shown} is not a secret's name; list names here, and set values with: raylaunch secret set NAME"
            raise ValueError(msg)
    return value


SecretNames = Annotated[Words, AfterValidator(_secret_names)]


class PlacedError(ValueError):
    """What is wrong with a value; `inside` is the path to the part whose line number the message shows."""

    def __init__(self, message: str, inside: tuple[str | int, ...]) -> None:
        super().__init__(message)
        self.inside = inside
