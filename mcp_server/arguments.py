"""What each tool takes: models whose schemas the model reads, and what is wrong with arguments, in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from raylaunch.config.validation import spec_error
from raylaunch.errors import SpecError
from raylaunch.models.states import JobState

LONGEST_WAIT_S = 50
MOST_LINES = 1000
MOST_JOBS = 100


def _as_list(value: object) -> object:
    """Some clients send a list as text; a single word means a list of one."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return _decoded(value)
    return [value]


def _decoded(value: object) -> object:
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _as_command(value: object) -> object:
    """A list that was sent as text; a shell's own ``[`` is not JSON."""
    found = _decoded(value) if isinstance(value, str) and value.startswith("[") else value
    return found if isinstance(found, list) else value


def _as_environment(value: object) -> object:
    """An object that was sent as text."""
    return _decoded(value) if isinstance(value, str) and value.startswith("{") else value


Words = Annotated[list[str], BeforeValidator(_as_list)]
JobRef = Annotated[
    str, Field(description="id, name (your latest job of that name), or 'last'", min_length=1, max_length=99)
]
Text = Annotated[str, Field(max_length=99)]


class Arguments(BaseModel):
    """Base of what a tool takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TrainJob(Arguments):
    """Arguments of ``train_job``."""

    entrypoint: Annotated[
        str | list[str] | None,
        BeforeValidator(_as_command),
        Field(description="shell command, or list of program and arguments"),
    ] = None
    job_file: Annotated[str, Field(description="a job.yaml instead; other arguments override it")] = ""
    working_dir: Annotated[
        str | None, Field(description="folder to pack and send; default: where this server was started; '' for none")
    ] = None
    name: str | None = None
    gpus: Annotated[int | None, Field(description="on one node")] = None
    launcher: Annotated[str | None, Field(description="script (default), torchrun, ray (Train, Tune)")] = None
    environment: Annotated[
        str | dict[str, object] | None,
        BeforeValidator(_as_environment),
        Field(description="/path/to/python, venv:PATH, conda:NAME, uv, pip:requirements.txt, {'pip': ['numpy']}"),
    ] = None
    packages: Annotated[Words, Field(description="packages added to the environment")] = []
    env: Annotated[dict[str, object] | None, BeforeValidator(_decoded), Field(description="no secrets here")] = None
    secrets: Annotated[Words, Field(description="names of secrets that a person has set")] = []
    outputs: Annotated[Words, Field(description="globs of files to keep; default: new files; or 'none'")] = []
    outputs_size: Annotated[str | int | None, Field(description="size limit of new files, e.g. 5GiB")] = None
    outputs_files: int | None = None
    timeout: Annotated[str | float | None, Field(description="e.g. 2h")] = None
    retries: int | None = None
    more: Annotated[
        dict[str, object] | None,
        BeforeValidator(_decoded),
        Field(description="other keys of job.yaml, e.g. {'resources': {'memory': '32GiB'}, 'tags': ['a']}"),
    ] = None
    request_id: Annotated[
        str, Field(description="idempotency key: a repeated call returns the same job", max_length=200)
    ] = ""
    dry_run: Annotated[bool, Field(description="report what would happen; submit nothing")] = False


class MonitorJob(Arguments):
    """Arguments of ``monitor_job``."""

    job: JobRef = "last"
    wait_s: Annotated[float, Field(ge=0, le=LONGEST_WAIT_S, description="wait up to this long for a change")] = 0
    cursor: Annotated[
        int | None, Field(ge=0, description="of the last answer; a change since then ends the wait at once")
    ] = None
    log_lines: Annotated[int, Field(ge=0, le=200)] = 20


class ListJobs(Arguments):
    """Arguments of ``list_jobs``."""

    states: Annotated[list[JobState], BeforeValidator(_as_list)] = []
    name: Text = ""
    owner: Text = ""
    tag: Text = ""
    limit: Annotated[int, Field(ge=1, le=MOST_JOBS)] = 20
    cursor: Annotated[str, Field(description="of the last answer: the next page", max_length=999)] = ""


class JobLogs(Arguments):
    """Arguments of ``job_logs``."""

    job: JobRef = "last"
    tail: Annotated[int, Field(ge=1, le=MOST_LINES, description="the last lines")] = 100
    search: Annotated[
        str, Field(description="only lines that contain this text, from the start of the log", max_length=999)
    ] = ""
    regex: Annotated[bool, Field(description="search is a regular expression (RE2)")] = False
    ignore_case: bool = False
    cursor: Annotated[str, Field(description="of the last answer: continue there", max_length=99)] = ""
    attempt: Annotated[int | None, Field(ge=1, description="default: the latest")] = None
    rank: Annotated[int, Field(ge=0)] = 0


class StopJob(Arguments):
    """Arguments of ``stop_job``."""

    job: JobRef
    grace_s: Annotated[
        float | None, Field(ge=0, le=86400, description="between SIGTERM and SIGKILL; default: the job's own")
    ] = None


class DownloadModel(Arguments):
    """Arguments of ``download_model``."""

    job: JobRef = "last"
    what: Annotated[
        Literal["outputs", "checkpoint", "all"],
        Field(description="outputs such as the model; the latest attempt's checkpoints; or all files, also logs"),
    ] = "outputs"
    files: Annotated[Words, Field(description="only these: names, folders or globs")] = []
    to: Annotated[str, Field(description="local folder; default: the job's id")] = ""


class ClusterStatusArguments(Arguments):
    """Arguments of ``cluster_status``."""

    doctor: Annotated[
        bool, Field(description="check every host now (up to 50 s), instead of reporting findings of the last hour")
    ] = False


Given = TypeVar("Given", bound=Arguments)


def read(tool: str, model: type[Given], arguments: Mapping[str, object]) -> Given:
    """Return the arguments of a call.

    Raises:
        SpecError: one is unknown or cannot be; the hint names those that there are.
    """
    given = {name: value for name, value in arguments.items() if value is not None}  # null says nothing
    takes = ", ".join(model.model_fields) or "no arguments"
    unknown = [name for name in given if name not in model.model_fields]
    if unknown:
        names = ", ".join(repr(name[:60]) for name in unknown[:5])
        msg = f"{tool} has no argument {names}"
        raise SpecError(msg, hint=f"{tool} takes {takes}", field=unknown[0])
    try:
        return model.model_validate(given)
    except ValidationError as error:
        found = spec_error(error, model, given, lambda _path: "")
        raise SpecError(found.message, hint=f"{tool} takes {takes}", field=found.field) from None


def schema(model: type[Arguments]) -> dict[str, object]:
    """Return the JSON schema of a model, without what only repeats: titles, and the null of what may be left out."""
    made = model.model_json_schema()
    properties = {name: _slim(value, made.get("$defs", {})) for name, value in made.get("properties", {}).items()}
    found: dict[str, object] = {"type": "object", "properties": properties}
    if "required" in made:
        found["required"] = made["required"]
    return {**found, "additionalProperties": False}


def _slim(value: object, definitions: Mapping[str, object]) -> object:
    if isinstance(value, list):
        return [_slim(item, definitions) for item in value]
    if not isinstance(value, dict):
        return value
    if "$ref" in value:
        named = definitions[str(value["$ref"]).rpartition("/")[2]]
        return _slim(named, definitions)
    kept = {
        key: _slim(item, definitions)
        for key, item in value.items()
        if key not in {"title", "default"} or (key == "default" and item not in (None, "", [], False))
    }
    choices = kept.pop("anyOf", None)
    if isinstance(choices, list):
        options = [one for one in choices if one != {"type": "null"}]
        kept |= options[0] if len(options) == 1 else {"anyOf": options}
    if isinstance(kept.get("description"), str) and value.get("enum"):
        kept.pop("description")  # the docstring of an enumeration
    return kept
