"""``run`` and ``submit``: the options that describe a job, what is checked before it is sent, and the submission."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import click

from raylaunch.cli.connect import ClusterCommand, as_json, finish
from raylaunch.cli.console import is_terminal, note, say, say_json, say_lines, size
from raylaunch.cli.files import transfer_bar
from raylaunch.cli.job_format import format_dry_run, format_pack, format_wandb
from raylaunch.cli.logs import detachable, follow_to_end, say_end
from raylaunch.client.client import Client
from raylaunch.client.packing import Packed
from raylaunch.client.sensitive import ASKED_ABOVE, Allowances, allowed
from raylaunch.client.submission import check_here, checked, with_wandb
from raylaunch.cluster.types import Plan
from raylaunch.config.load import Flag, job_spec_from_flags
from raylaunch.errors import SpecError, UnsatisfiableError
from raylaunch.models.job import DryRun, JobView, PackReport, SubmitAnswer
from raylaunch.models.job_spec import JobSpec

_Command = TypeVar("_Command", bound=Callable[..., object])


class _Field(NamedTuple):
    """An option that sets a field of the job. Several may be given of a ``list``, and of ``pairs`` NAME=VALUE."""

    option: str
    field: tuple[str, ...]
    help: str
    metavar: str | None = None
    kind: Literal["one", "list", "pairs"] = "one"

    @property
    def name(self) -> str:
        """The name of the command's argument."""
        return self.option[2:].replace("-", "_")


_FIELDS = (
    _Field("--name", ("name",), "Name. Default: derived from the program."),
    _Field("--gpus", ("resources", "gpus"), "GPUs.", "N"),
    _Field("--launcher", ("launcher",), "script, torchrun, or ray (a Ray Train or Tune program).", "KIND"),
    _Field("--processes", ("processes",), "Ranks that torchrun starts. Default: one per GPU.", "N"),
    _Field("--cpus", ("resources", "cpus"), "CPU cores.", "N"),
    _Field("--memory", ("resources", "memory"), "Memory, for example 8GiB.", "SIZE"),
    _Field("--resource", ("resources", "custom"), "A custom Ray resource.", "NAME=N", "pairs"),
    _Field("--env", ("env",), "An environment variable; K alone copies its value from this shell.", "K=V", "pairs"),
    _Field("--secret", ("secrets",), "A secret, passed as an environment variable.", "NAME", "list"),
    _Field("--timeout", ("timeout_s",), "Time limit per attempt, for example 2h.", "TIME"),
    _Field("--grace", ("grace_s",), "Time between SIGTERM and SIGKILL.", "TIME"),
    _Field("--output", ("outputs",), "Files to store: a glob, auto (new files), or none.", "GLOB", "list"),
    _Field("--outputs-size", ("outputs_size",), "Size limit of auto, for example 5GiB. Default: 1GiB.", "SIZE"),
    _Field("--outputs-files", ("outputs_files",), "Limit on the number of files of auto. Default: 10000.", "N"),
    _Field("--tag", ("tags",), "A tag.", kind="list"),
    _Field(
        "--environment", ("environment",), "/path/to/python, venv:PATH, conda:NAME, uv, pip:requirements.txt.", "ENV"
    ),
    _Field("--with", ("packages",), "Add a package to the environment, for example numpy.", "PACKAGE", "list"),
    _Field("--working-dir", ("working_dir",), "Folder to pack ('' for none). Default: this one.", "DIR"),
    _Field("--tracking", ("tracking", "mode"), "W&B: auto, online, offline or disabled.", "MODE"),
    _Field("--project", ("tracking", "project"), "W&B project."),
    _Field("--host", ("where", "hosts"), "Run on this host, or one of these.", kind="list"),
    _Field("--label", ("where", "labels"), "Run on hosts with this label.", "K=V", "pairs"),
    _Field("--gpu-type", ("where", "gpu_type"), "Run on GPUs whose name contains this.", "TEXT"),
    _Field("--priority", ("priority",), "-100 to 100; higher starts earlier.", "N"),
    _Field("--retries", ("retries",), "Further attempts if the program fails.", "N"),
)
_ALIASES = {"--environment": ("--env-python",)}

_JOB_FILE = "job.yaml"
_FILE = click.option(
    "-f",
    "--file",
    type=click.Path(path_type=Path),
    help="Job file. Default: ./job.yaml if no program is given. Flags override it.",
)
_OTHERS = (
    click.option("--shell", metavar="COMMAND", help="A shell command, instead of a program after --."),
    click.option("--allow", multiple=True, metavar="NAME", help="Send this file even though it looks like a secret."),
    click.option("--max-upload", metavar="SIZE", help="Largest upload, for example 5GB. Default: 1GB."),
    click.option("--request-id", default="", help="Idempotency key: submitting it again returns the same job."),
    click.option(
        "--dry-run",
        is_flag=True,
        help="Check everything and print what would be sent and where it would run; submit nothing.",
    ),
    click.argument("command", nargs=-1, type=click.UNPROCESSED),
)


def job_options(command: _Command) -> _Command:
    """Give a command all options that describe a job."""
    for option in reversed((_FILE, *map(_option, _FIELDS), *_OTHERS)):
        command = option(command)
    return command


def _option(one: _Field) -> Callable[[_Command], _Command]:
    names = (one.option, *_ALIASES.get(one.option, ()), one.name)
    return click.option(*names, multiple=one.kind != "one", metavar=one.metavar, help=one.help)


def spec_of(given: Mapping[str, Any], environ: Mapping[str, str]) -> JobSpec:
    """Return the job that the options describe; ``run job.yaml`` and, with a job.yaml here, plain ``run`` work too.

    Raises:
        SpecError: an option or the file is invalid.
    """
    given = _with_file(given)
    return job_spec_from_flags(flags_of(given, environ), file=given.get("file"))


def _with_file(given: Mapping[str, Any]) -> Mapping[str, Any]:
    command = tuple(given.get("command") or ())
    if given.get("file") or given.get("shell") is not None:
        return given
    if not command and Path(_JOB_FILE).is_file():
        return {**given, "file": Path(_JOB_FILE)}
    if command and command[0].endswith((".yaml", ".yml")) and Path(command[0]).is_file():
        if len(command) > 1:
            msg = f"{command[0]} is a job file, but {command[1]} follows it"
            raise SpecError(msg, field="entrypoint", hint=f"put options first: raylaunch run OPTIONS {command[0]}")
        return {**given, "file": Path(command[0]), "command": ()}
    return given


def flag_of(field: tuple[str, ...]) -> str:
    """Return the option that sets a field of a job, or ""."""
    options = {one.field: one.option for one in _FIELDS} | {("entrypoint",): "--shell"}
    return options.get(field, "")


def flags_of(given: Mapping[str, Any], environ: Mapping[str, str]) -> list[Flag]:
    """Return the fields that the options set."""
    flags = []
    for one in _FIELDS:
        value = given.get(one.name)
        if one.kind == "one" and value is not None:
            flags.append(Flag(one.option, one.field, _number(value)))
        elif one.kind == "list" and value:
            flags.append(Flag(one.option, one.field, tuple(value)))
        elif one.kind == "pairs" and value:
            flags.append(Flag(one.option, one.field, _pairs(one.option, value, environ)))
    return [*flags, *_entrypoint(given)]


def _number(value: object) -> object:
    """A priority of ``-5`` is a number; validation rejects other text."""
    return int(value) if isinstance(value, str) and value.lstrip("-").isdigit() else value


def _pairs(option: str, pairs: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals and option == "--env" and name in environ:
            value = environ[name]
        elif not equals or not name:
            hint = f"{name} is not set in this environment" if option == "--env" and name else ""
            msg = f"{option}: {pair!r} is not NAME=VALUE"
            raise SpecError(msg, hint=hint)
        found[name] = value
    return found


def _entrypoint(given: Mapping[str, Any]) -> list[Flag]:
    command, shell = tuple(given.get("command") or ()), given.get("shell")
    if command and shell is not None:
        msg = "--shell and a program after -- exclude each other"
        raise SpecError(msg, field="entrypoint", hint="leave one of them out")
    if shell is not None:
        return [Flag("--shell", ("entrypoint",), shell)]
    if len(command) == 1 and any(letter in command[0] for letter in " |&;<>$"):
        return [Flag("--", ("entrypoint",), command[0])]  # one quoted argument with a space in it is meant for a shell
    return [Flag("--", ("entrypoint",), command)] if command else []


def warn_of_options_after(command: Sequence[str]) -> None:
    """Nothing is parsed after the program's name: warn if one of our own options follows it without ``--``."""
    if "--" in sys.argv:
        return
    ours = {option for one in click.get_current_context().command.params for option in one.opts if option[:2] == "--"}
    for word in command[1:]:
        if word.partition("=")[0] in ours:
            note(f"note: {word} is passed to {command[0]}; put options of raylaunch before --")
            return


_SETTINGS = {"ignore_unknown_options": False, "allow_interspersed_args": False}


def _prepared(given: dict[str, Any]) -> JobSpec:
    """Return the spec, checked as far as can be done without a cluster."""
    spec = spec_of(given, os.environ)
    warn_of_options_after(given["command"])
    check_here(spec)
    return spec


class _Precheck:
    """Checks and prompts before a missing cluster is started, so that the job is not refused afterwards."""

    def __init__(self, place: ClusterCommand, spec: JobSpec, allow: Allowances) -> None:
        self._place = place
        self._spec = spec
        self._allow = allow
        self._asked = False
        self.packed: Packed | None = None

    async def start(self) -> None:
        """Check and pack the job, and ask about its size: the cluster has none of it yet."""
        spec = with_wandb(self._spec, os.environ).spec
        self.packed = (await checked(spec, self._place.spec, allow=self._allow)).packed
        if self.packed:
            await self.upload(self.packed.bytes)

    async def upload(self, size_bytes: int) -> None:
        """Ask once, on a terminal, whether to start a large upload."""
        if size_bytes > ASKED_ABOVE and self._allow.asked and not self._asked and is_terminal(sys.stdin):
            question = f"{size(size_bytes)} to upload. Continue?"
            await asyncio.to_thread(click.confirm, question, abort=True, err=True)
            self._asked = True


async def _submit(
    client: Client, spec: JobSpec, *, request_id: str, allow: Allowances, before: _Precheck
) -> SubmitAnswer:
    spec, secrets, taken = with_wandb(spec, os.environ)
    for line in format_wandb(taken, key=bool(secrets)):
        note(line)

    def packed(report: PackReport, archive_bytes: int) -> None:
        for line in format_pack(report, archive_bytes):
            note(line)

    with transfer_bar() as progress:
        answer = await client.submit(
            spec,
            request_id=request_id,
            secrets=secrets,
            allow=allow,
            packed=before.packed,
            on_packed=packed,
            on_upload=before.upload,
            on_progress=progress,
        )
    job = answer.job
    if job.chosen:
        note(str(job.chosen))
    if not answer.created:
        note(f"{job.id} was already submitted with this request id; it is {job.state.value}")
    else:
        note(f"Submitted {job.id}: {job.state.value}" + (f", {job.why}" if job.why else ""))
    return answer


async def _dry_run(place: ClusterCommand, spec: JobSpec, *, allow: Allowances, as_json: bool) -> int:
    """Print what a submission would do; return the exit status. Nothing is sent or started."""
    spec, secrets, taken = with_wandb(spec, os.environ)
    for line in format_wandb(taken, key=bool(secrets)):
        note(line)
    plan = None
    if await place.would_start():
        found, plan = await _without_cluster(place, spec, allow)
    else:
        async with place.client() as client:
            found = await client.dry_run(spec, secrets=secrets, allow=allow)
    if as_json:
        say_json(found)
    else:
        say_lines([*format_dry_run(found), *(str(plan).split("\n") if plan else ())])
    return 1 if plan and plan.problems else 0


async def _without_cluster(place: ClusterCommand, spec: JobSpec, allow: Allowances) -> tuple[DryRun, Plan]:
    name = place.spec.name
    with await checked(spec, place.spec, allow=allow) as ready:
        plan = await place.plan()
        for what, most in plan.offers.items():
            if (getattr(spec.resources, what) or 0) > most:
                msg = f"{spec.display_name} can never run on cluster {name}, which has {most:g} {what}"
                raise UnsatisfiableError(msg, hint=f"request at most {most:g} {what}")
        return ready.dry_run(f"cluster {name!r} is not running and would be started first"), plan


@click.command(
    context_settings=_SETTINGS,
    epilog="Example:  raylaunch run --gpus 2 --env SEED=1 -- python train.py --lr 0.1",
)
@job_options
@as_json
@click.pass_obj
def run(cluster_file: Path | None, /, *, as_json: bool, **given: Any) -> None:  # noqa: ANN401 -- options of job_options
    """Submit a job and follow it until it ends; start the cluster if there is none.

    Put the program after --. Its log goes to stdout, everything else to stderr. The exit status is the job's own: its
    exit code, 128+N for signal N, or 124 if it timed out. Ctrl-C detaches; the job keeps running.
    """
    spec = _prepared(given)
    allow = allowed(given["allow"], given["max_upload"])
    known: list[str] = []

    async def work() -> JobView:
        place = ClusterCommand(cluster_file)
        before = _Precheck(place, spec, allow)
        async with place.client(start=True, before_start=before.start) as client:
            answer = await _submit(client, spec, request_id=given["request_id"], allow=allow, before=before)
            known.append(answer.job.id)
            return await follow_to_end(client, answer.job.id, log_to_stderr=as_json)

    def ended() -> int:
        if given["dry_run"]:
            return finish(_dry_run(ClusterCommand(cluster_file), spec, allow=allow, as_json=as_json))
        return say_end(finish(work()), as_json=as_json)

    click.get_current_context().exit(detachable(ended, lambda: known[0] if known else ""))


@click.command(
    context_settings=_SETTINGS, epilog="Example:  raylaunch submit -f job.yaml --request-id nightly-2026-03-01"
)
@job_options
@as_json
@click.pass_obj
def submit(cluster_file: Path | None, /, *, as_json: bool, **given: Any) -> None:  # noqa: ANN401 -- as above
    """Submit a job and print its id; start the cluster if there is none."""
    spec = _prepared(given)
    allow = allowed(given["allow"], given["max_upload"])

    async def work() -> int:
        place = ClusterCommand(cluster_file)
        if given["dry_run"]:
            return await _dry_run(place, spec, allow=allow, as_json=as_json)
        before = _Precheck(place, spec, allow)
        async with place.client(start=True, before_start=before.start) as client:
            answer = await _submit(client, spec, request_id=given["request_id"], allow=allow, before=before)
        if as_json:
            say_json(answer)
        else:
            say(answer.job.id)
        return 0

    click.get_current_context().exit(finish(work()))
