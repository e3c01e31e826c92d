"""What goes along with a submission: the person's W&B credentials."""

from __future__ import annotations

from collections.abc import Mapping

from raylaunch.spec import JobSpec

WANDB_KEY = "WANDB_API_KEY"
_WANDB_SERVER = "WANDB_BASE_URL"


def with_wandb(spec: JobSpec, environ: Mapping[str, str]) -> tuple[JobSpec, dict[str, str]]:
    """Return the spec and the secrets that give a job the W&B credentials of `environ`.

    Nothing travels when the job tracks off-line or not at all, or names the cluster's own secret. The server goes along
    with the key, so that a key for one server is never shown to another.
    """
    key = environ.get(WANDB_KEY, "")
    off = spec.tracking.mode in {"offline", "disabled"} or environ.get("WANDB_MODE") in {"offline", "disabled"}
    if not key or off or WANDB_KEY in spec.secrets or WANDB_KEY in spec.env:
        return spec, {}
    server = environ.get(_WANDB_SERVER, "")
    if server and _WANDB_SERVER not in spec.env:
        spec = spec.model_copy(update={"env": {**spec.env, _WANDB_SERVER: server}})
    return spec, {WANDB_KEY: key}
