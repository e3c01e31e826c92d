"""What a job needs from its working directory, checked before it is submitted: the same in every interface."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from raylaunch.client.packing import Contents, Packed, checked_working_dir, pack_in_thread
from raylaunch.client.sensitive import Allowances
from raylaunch.entrypoint import script_of, started_itself
from raylaunch.errors import SpecError
from raylaunch.models.job_spec import JobSpec
from raylaunch.runner.command import line_ends_of, nearest_file

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


class WithWandb(NamedTuple):
    """A job with what the environment says of W&B: the spec, secrets for this job alone, and what was taken.

    `taken` has the variables that count, as ``NAME=VALUE``; never the key.
    """

    spec: JobSpec
    secrets: dict[str, str]
    taken: tuple[str, ...] = ()


def with_wandb(spec: JobSpec, environ: Mapping[str, str]) -> WithWandb:
    """Return the job with W&B as a script would find it that is started in `environ`; what the spec states comes first.

    The key goes along unless the job tracks offline or not at all, or names the cluster's own secret. The server goes
    along with the key only, so that a key for one server is never shown to another.

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


class _Needed(NamedTuple):
    """A file that a job cannot do without, relative to its working directory; what needs it, and what to do."""

    path: str
    by: str
    field: str
    hint: str


async def packed_job(spec: JobSpec, allow: Allowances) -> Packed | None:
    """Pack the code of a job, which is checked as far as can be done here; None when it has none.

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
    """Check what can be known without packing: the working directory, the script, the files of the environment.

    Raises:
        SpecError: something is not there.
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
    """Check that what the job needs is in its package.

    Raises:
        SpecError: nothing is, or a rule leaves out what it needs.
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
        hint = "check the name, and that this is the folder that is meant (--working-dir)"
        yield _Needed(os.path.normpath(script), "the command", "entrypoint", hint)


def _is_behind_link(folder: Path, path: str) -> bool:
    """Whether a path leads through a link, which may lead to something on the node only."""
    return any((folder / parent).is_symlink() for parent in Path(path).parents)


def _rule_against(path: str, contents: Contents) -> str:
    return next(
        (contents.left_out[str(one)] for one in (Path(path), *Path(path).parents) if str(one) in contents.left_out), ""
    )
