"""What the environment of a submission says about Weights & Biases, and what of it goes along with the job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from raylaunch.errors import SpecError
from raylaunch.spec import JobSpec

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
