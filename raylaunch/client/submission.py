"""From a job to its submission: choose its environment, check and pack its code, send what the cluster lacks.

Whatever can be checked on this machine is checked first: before anything is sent, and before a cluster is started.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import platform
import secrets as random_source
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from pydantic import BaseModel

from raylaunch.client.environment_choice import active_python, choose
from raylaunch.client.git_facts import git_facts
from raylaunch.client.packing import Contents, Packed, checked_working_dir, pack_in_thread, upload
from raylaunch.client.sensitive import NO_MORE, Allowances
from raylaunch.client.transport import OnProgress, Retry, Transport, allow_upload, no_progress
from raylaunch.entrypoint import script_of, started_itself
from raylaunch.errors import SpecError, VersionError, WheelsNeededError
from raylaunch.models.cluster import ClusterPython, EnvironmentWheels
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.models.fields import OF_THE_CLUSTER, Environment
from raylaunch.models.job import DryRun, EnvironmentChoice, PackReport, SubmitAnswer, SubmitRequest, WheelSet
from raylaunch.models.job_spec import JobSpec
from raylaunch.runner.command import line_ends_of, nearest_file
from raylaunch.version import __version__

_Model = TypeVar("_Model", bound=BaseModel)

_MISSING = 404
_UNKNOWN_TO_OLDER = ("packages", "outputs_size", "outputs_files")
_NOT_RESOLVED = (
    "nodes reach no package index, and this machine does not resolve packages that the cluster lists; name them in the "
    "job (environment: {pip: [..]}), or run raylaunch up where the cluster's cluster.yaml is: that sends their wheels"
)

WANDB_KEY = "WANDB_API_KEY"
_SERVER = "WANDB_BASE_URL"
_MODE = "WANDB_MODE"
_DISABLED = "WANDB_DISABLED"
_TAGS = "WANDB_TAGS"
_MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}
_TRACKING = {
    "WANDB_PROJECT": "project",
    "WANDB_ENTITY": "entity",
    "WANDB_RUN_GROUP": "group",
    "WANDB_JOB_TYPE": "job_type",
}
_AS_THEY_ARE = ("WANDB_NAME", "WANDB_NOTES")


class Checked(NamedTuple):
    """A job that was checked as far as possible without its cluster, and its code. A context manager."""

    spec: JobSpec
    chosen: EnvironmentChoice | None
    packed: Packed | None

    def dry_run(self, message: str) -> DryRun:
        """Return the answer to a dry run."""
        packed = {"pack": self.packed.report, "package_bytes": self.packed.bytes} if self.packed else {}
        found = DryRun(fits=(), message=message, environment=self.spec.environment, chosen=self.chosen)
        return found.model_copy(update=packed)

    def __enter__(self) -> Checked:  # noqa: PYI034 -- a tuple's own type
        return self

    def __exit__(self, *_exception: object) -> None:
        if self.packed:
            self.packed.file.close()


async def checked(spec: JobSpec, cluster: ClusterSpec, *, allow: Allowances = NO_MORE, prefix: str = "") -> Checked:
    """Check a job for a cluster that does not run, as `Submitter.submit` would, and pack its code.

    Args:
        spec: the job.
        cluster: what would be started.
        allow: files and sizes that are refused otherwise.
        prefix: `sys.prefix` if the interpreter is the person's own.

    Raises:
        SpecError: a file that the job needs is missing, or is not sent.
        WithheldError: files look like secrets, or the upload is too large.
    """
    local = cluster.kind == "local"
    chosen = choose(spec, _python_of(cluster), active_python(os.environ, prefix=prefix), here=local)
    spec = _with(spec, chosen)
    return Checked(spec, chosen, await packed_job(spec, allow))


def _with(spec: JobSpec, chosen: EnvironmentChoice | None) -> JobSpec:
    environment = chosen.environment if chosen else spec.environment
    if environment.kind == "auto":
        environment = Environment(kind="default")
    return spec.model_copy(update={"environment": environment})


def _python_of(cluster: ClusterSpec) -> ClusterPython:
    """Return the Pythons that a cluster would have; on this machine, this interpreter runs its Ray."""
    if cluster.kind != "local":
        return ClusterPython(environment=cluster.environment)
    try:
        ray = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        ray = ""
    version = platform.python_version()
    return ClusterPython(environment=cluster.environment, version=version, prefix=sys.prefix, ray=ray)


class Submitter:
    """Submits jobs to one cluster; the arguments are those of `raylaunch.client.client.Client`."""

    def __init__(  # noqa: PLR0913 -- as for `Client`
        self,
        transport: Transport,
        *,
        retry: Retry,
        on_notice: Callable[[str], None],
        here: bool,
        prefix: str,
        environment: Environment | None,
    ) -> None:
        self._transport = transport
        self._retry = retry
        self._notice = on_notice
        self._here, self._prefix = here, prefix
        self._environment = environment
        self._older = ""

    async def submit(  # noqa: PLR0913 -- what to run, and callbacks
        self,
        spec: JobSpec,
        *,
        request_id: str = "",
        secrets: Mapping[str, str] | None = None,
        allow: Allowances = NO_MORE,
        packed: Packed | None = None,
        on_packed: Callable[[PackReport, int], None] | None = None,
        on_upload: Callable[[int], Awaitable[None]] = allow_upload,
        on_progress: OnProgress = no_progress,
    ) -> SubmitAnswer:
        """Submit a job, as `raylaunch.client.client.Client.submit` does."""
        chosen = await self._choose(spec)
        spec = _with(spec, chosen)
        key = request_id or random_source.token_hex(16)
        request = SubmitRequest(spec=spec, request_id=key, chosen=chosen, secrets=dict(secrets or {}))
        if packed is None:
            packed = await packed_job(spec, allow)
        else:
            await asyncio.to_thread(check_here, spec)
            check_sent(spec, packed.contents)
        if packed is None:
            return await self._submit(request, on_progress)
        with packed:
            if on_packed:
                on_packed(packed.report, packed.bytes)
            git = await asyncio.to_thread(git_facts, Path(spec.working_dir), sent=packed.contents.paths)
            code = {"package": packed.sha256, "pack": packed.report, "git": git}
            await upload(self._transport, packed, retry=self._retry, on_start=on_upload, on_progress=on_progress)
            return await self._submit(request.model_copy(update=code), on_progress)

    async def dry_run(
        self, spec: JobSpec, *, secrets: Mapping[str, str] | None = None, allow: Allowances = NO_MORE
    ) -> DryRun:
        """Return what `submit` would send, and where the job could run; send nothing."""
        chosen = await self._choose(spec)
        spec = _with(spec, chosen)
        with Checked(spec, chosen, await packed_job(spec, allow)) as ready:
            found = await self._placement(spec, secrets)
            if found.wheels_for:
                await self._wheels(spec, found, send=False, on_progress=no_progress)
            kept = {"pack", "package_bytes", "chosen"}
            ours = ready.dry_run("")
            return found.model_copy(update={name: getattr(ours, name) for name in kept})

    async def _choose(self, spec: JobSpec) -> EnvironmentChoice | None:
        """Return which Python environment a job gets, and why; None if a controller of 0.1.0 chooses it."""
        answer = await self._retry(lambda: self._transport.request("GET", "/v1/python", allowed=(_MISSING,)))
        active = active_python(os.environ, prefix=self._prefix)
        if answer.status != _MISSING:
            self._older = ""
            return choose(spec, answer.read(ClusterPython), active, here=self._here)
        self._older = answer.header("X-Raylaunch-Version", "an older version")
        if spec.environment.kind == "auto":
            self._notice(
                f"cluster {self._transport.cluster!r} runs raylaunch {self._older}, which does not report its "
                f"environments: the job gets the default one. raylaunch up replaces it; running jobs continue"
            )
        return None

    async def _submit(self, request: SubmitRequest, on_progress: OnProgress) -> SubmitAnswer:
        try:
            return await self._post(SubmitAnswer, request)
        except WheelsNeededError:
            without = request.spec.model_copy(update={"secrets": ()})  # their values are in the submission
            there = await self._placement(without)
            wheels = await self._wheels(without, there, send=True, on_progress=on_progress)
        update = {"wheels": wheels, "wheels_sought": True}
        return await self._post(SubmitAnswer, request.model_copy(update=update))

    async def _wheels(
        self, spec: JobSpec, there: DryRun, *, send: bool, on_progress: OnProgress
    ) -> tuple[WheelSet, ...]:
        """Gather the environment's wheels for nodes that reach no package index, and send them."""
        from raylaunch.client.job_wheels import check_wheels, resolved_here, send_wheels  # noqa: PLC0415 -- rarely needed, and it loads a resolver

        added = False
        if spec.environment.kind in OF_THE_CLUSTER:
            environment = resolved_here(there.environment, self._environment)
            added = environment is None and there.environment.kind == "pip"
            if added and not set(there.wheels_for) <= set(there.wheels_there):
                self._notice(_NOT_RESOLVED)
                return ()
            spec = spec.model_copy(update={"environment": environment or spec.environment})
        if not send:
            await check_wheels(spec, there.wheels_for, on_notice=self._notice)
            return ()
        return await send_wheels(
            self._transport,
            spec,
            there.wheels_for,
            retry=self._retry,
            on_progress=on_progress,
            on_notice=self._notice,
            added=added,
        )

    async def send_environment(self, *, on_progress: OnProgress) -> tuple[WheelSet, ...]:
        """Send the wheels of the packages that cluster.yaml lists; the cluster keeps them for all of its jobs."""
        environment = self._environment
        if environment is None or not environment.requirements:
            return ()
        from raylaunch.client.job_wheels import send_wheels  # noqa: PLC0415 -- as above

        own = JobSpec(entrypoint="true", working_dir="", environment=Environment(kind="default"))
        there = await self._placement(own)
        if not there.wheels_for:
            return ()
        sets = await send_wheels(
            self._transport,
            own.model_copy(update={"environment": environment}),
            there.wheels_for,
            retry=self._retry,
            on_progress=on_progress,
            on_notice=self._notice,
        )
        body = EnvironmentWheels(environment=environment, sets=sets)
        await self._retry(lambda: self._transport.request("PUT", "/v1/python/wheels", body=body))
        return sets

    async def _placement(self, spec: JobSpec, secrets: Mapping[str, str] | None = None) -> DryRun:
        request = SubmitRequest(spec=spec, secrets=dict(secrets or {}))
        return await self._post(DryRun, request, dry_run=True)

    async def _post(self, kind: type[_Model], request: SubmitRequest, *, dry_run: bool = False) -> _Model:
        body = _for_older(request, self._older) if self._older else request
        params = {"dry_run": "true"} if dry_run else None
        answer = await self._retry(lambda: self._transport.request("POST", "/v1/jobs", params=params, body=body))
        return answer.read(kind)


def _for_older(request: SubmitRequest, version: str) -> dict[str, object]:
    """Return a request that a controller of 0.1.0 accepts.

    Raises:
        VersionError: the job uses fields that it does not know.
    """
    body = request.model_dump(mode="json", exclude={"chosen"}, exclude_defaults=True)
    unknown = [name for name in _UNKNOWN_TO_OLDER if name in body["spec"]]
    if unknown:
        msg = f"the cluster's controller is raylaunch {version}, which does not know {', '.join(unknown)}"
        hint = f"upgrade it to {__version__}: run raylaunch up where its cluster.yaml is; running jobs continue"
        raise VersionError(msg, hint=hint)
    return body


# -- what a job needs of its working directory


class _Needed(NamedTuple):
    """A file that a job needs, relative to its working directory; what needs it, and what to do if it is missing."""

    path: str
    by: str
    field: str
    hint: str


async def packed_job(spec: JobSpec, allow: Allowances) -> Packed | None:
    """Check a job as far as possible here, and pack its code; None if it has none.

    Raises:
        SpecError: as `check_here`, `raylaunch.client.packing.pack` and `check_sent`.
    """
    await asyncio.to_thread(check_here, spec)
    if not spec.working_dir:
        return None
    packed = await pack_in_thread(Path(spec.working_dir), allow)
    try:
        check_sent(spec, packed.contents)
    except SpecError:
        packed.file.close()
        raise
    return packed


def check_here(spec: JobSpec) -> None:
    """Check what needs no packing: the working directory, the script, the environment's files.

    Raises:
        SpecError: something is missing.
    """
    folder = checked_working_dir(spec.working_dir) if spec.working_dir else None
    for need in _required_files(spec):
        if folder is None:
            msg = f"{need.by} needs {need.path}, and the job has no working directory"
            raise SpecError(
                msg, field=need.field, hint="name the folder that it is in: --working-dir DIR, or working_dir"
            )
        if need.path.startswith("../"):
            msg = f"{need.by} needs {need.path}, which is outside the working directory {folder} and is not sent"
            raise SpecError(msg, field=need.field, hint="submit from the folder above, or name it with --working-dir")
        if not os.path.lexists(folder / need.path) and not _is_behind_link(folder, need.path):
            near = nearest_file(need.path, folder) if need.field == "entrypoint" else ""
            msg = f"{need.by} needs {need.path}, which is not in {folder}{near}"
            raise SpecError(msg, field=need.field, hint=need.hint)
    script = script_of(spec.entrypoint)
    if folder and started_itself(spec.entrypoint, script) and (windows := line_ends_of(folder / script, folder)):
        raise SpecError(windows, field="entrypoint")


def check_sent(spec: JobSpec, contents: Contents) -> None:
    """Check that the files that a job needs are in its package.

    Raises:
        SpecError: the package is empty, or a rule leaves out a needed file.
    """
    folder = Path(spec.working_dir)
    if not contents.paths:
        rules = sorted(set(contents.left_out.values()))
        why = f"all that is in it is left out ({'; '.join(rules)})" if rules else "it is empty"
        msg = f"the working directory {folder} has nothing to send: {why}"
        hint = "submit from the project, or name it: --working-dir PROJECT; --working-dir '' sends no files"
        raise SpecError(msg, field="working_dir", hint=hint)
    for need in _required_files(spec):
        if need.path not in contents.paths and (rule := _rule_against(need.path, contents)):
            msg = f"{need.by} needs {need.path}, which is not sent: {rule}"
            raise SpecError(msg, field=need.field, hint=f"send it with a line in .raylaunchignore: !{need.path}")


def _required_files(spec: JobSpec) -> Iterator[_Needed]:
    kind, value = spec.environment.kind, spec.environment.value
    if kind == "uv":
        for name, hint in (("pyproject.toml", "make it with: uv init"), ("uv.lock", "make it with: uv lock")):
            yield _Needed(name, "environment: uv", "environment", hint)
    if kind == "pip" and value and not os.path.isabs(value):  # noqa: PTH117 -- text, as it was given
        hint = "name a requirements file in the working directory: environment: pip:FILE"
        yield _Needed(os.path.normpath(value), f"environment: pip:{value}", "environment", hint)
    script = script_of(spec.entrypoint)
    if script:
        hint = "check the name and the folder (--working-dir)"
        yield _Needed(os.path.normpath(script), "the command", "entrypoint", hint)


def _is_behind_link(folder: Path, path: str) -> bool:
    """Whether a path leads through a link, whose target may exist only on the node."""
    return any((folder / parent).is_symlink() for parent in Path(path).parents)


def _rule_against(path: str, contents: Contents) -> str:
    return next(
        (contents.left_out[str(one)] for one in (Path(path), *Path(path).parents) if str(one) in contents.left_out), ""
    )


# -- W&B


class WithWandb(NamedTuple):
    """A job with the W&B settings of an environment: its spec, and secrets for this job only.

    `taken` lists the variables that were used, as ``NAME=VALUE``; never the key.
    """

    spec: JobSpec
    secrets: dict[str, str]
    taken: tuple[str, ...] = ()


def with_wandb(spec: JobSpec, environ: Mapping[str, str]) -> WithWandb:
    """Return the job with the W&B settings in `environ`; settings in the spec take precedence.

    The key is sent unless the job tracks offline or not at all, or names a secret of the cluster. The server is sent
    only with the key, so that no server sees the key of another.

    Raises:
        SpecError: ``WANDB_MODE`` is not a mode.
    """
    taken: dict[str, str] = {}
    stated = spec.tracking.model_fields_set
    tracking: dict[str, object] = {}
    mode = "" if "mode" in stated or _MODE in spec.env or _DISABLED in spec.env else _mode(environ, taken)
    if mode:
        tracking["mode"] = mode
    for name, field in _TRACKING.items():
        if environ.get(name) and field not in stated and name not in spec.env:
            tracking[field] = taken[name] = environ[name]
    update: dict[str, object] = {"tracking": spec.tracking.model_copy(update=tracking)} if tracking else {}
    env = {name: environ[name] for name in _AS_THEY_ARE if environ.get(name) and name not in spec.env}
    taken.update(env)
    tags = tuple(word for part in environ.get(_TAGS, "").split(",") if (word := part.strip()))
    if tags and not spec.tags and _TAGS not in spec.env:
        update["tags"], taken[_TAGS] = tags, environ[_TAGS]
    key = _key(spec, mode, environ)
    if key and environ.get(_SERVER) and _SERVER not in spec.env:
        env[_SERVER] = taken[_SERVER] = environ[_SERVER]
    if env:
        update["env"] = {**spec.env, **env}
    shown = tuple(f"{name}={value}" for name, value in taken.items())
    return WithWandb(spec.model_copy(update=update) if update else spec, {WANDB_KEY: key} if key else {}, shown)


def _mode(environ: Mapping[str, str], taken: dict[str, str]) -> str:
    asked = environ.get(_MODE, "")
    if not asked and environ.get(_DISABLED, "").lower() in {"true", "1", "yes"}:
        taken[_DISABLED] = environ[_DISABLED]
        return "disabled"
    if asked and asked not in _MODES:
        msg = f"{_MODE}={asked} in the environment is not a mode of W&B"
        raise SpecError(msg, field="tracking.mode", hint=f"set it to one of {', '.join(_MODES)}, or unset it")
    if asked:
        taken[_MODE] = asked
    return _MODES.get(asked, "")


def _key(spec: JobSpec, mode: str, environ: Mapping[str, str]) -> str:
    off = (mode or spec.tracking.mode) in {"offline", "disabled"}
    return "" if off or WANDB_KEY in spec.secrets or WANDB_KEY in spec.env else environ.get(WANDB_KEY, "")
