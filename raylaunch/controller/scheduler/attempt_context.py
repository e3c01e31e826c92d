"""What launching, following and finishing an attempt share; and, as a pure function, the spec that its runner gets."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from raylaunch.contract import AttemptSpec, EarlierRun, EnvironmentSpec, WandbSpec
from raylaunch.controller.ray.bridge import RayBridge
from raylaunch.controller.ray.jobs_api import RayJobs
from raylaunch.controller.scheduler.observed import ObservedState
from raylaunch.controller.settings import Settings
from raylaunch.controller.store.jobs import Records
from raylaunch.controller.store.record import JobRecord
from raylaunch.controller.store.secrets import SecretStore
from raylaunch.models.fields import OF_THE_CLUSTER, Environment
from raylaunch.models.job import AttemptView, LinkFact, Progress, WandbLink
from raylaunch.models.job_spec import JobSpec
from raylaunch.models.states import Reason

STEP_S = 1.0
"""Longest time between two checks."""
NODE_LEASE_S = 60.0
"""How long an attempt whose node was lost may reappear on another (a restarted Ray gives its node a new id)."""
DEFAULT_PROJECT = "raylaunch"


@dataclass(frozen=True)
class AttemptResult:
    """What an attempt left in the store, as its job's record keeps it."""

    log_tail: tuple[str, ...]
    outputs: int
    output_bytes: int
    last_metrics: dict[str, float]
    progress: Progress | None = None
    warnings: tuple[str, ...] = ()
    """About what the record leaves out."""


@dataclass(frozen=True)
class AttemptContext:
    """The parts of the controller that launching, following and finishing use."""

    settings: Settings
    records: Records
    secrets: SecretStore
    bridge: RayBridge
    ray: RayJobs
    observed: ObservedState
    read_result: Callable[[JobRecord], Awaitable[AttemptResult]]

    def set_message(self, record: JobRecord, reason: Reason | None, message: str) -> None:
        """Set the job's reason and message, unless they are the same already."""
        now = self.records.light(record.id)
        if now.message != message or now.reason != reason:
            self.records.update(record.id, kind="", message=message, reason=reason)

    def node_lost(self, record: JobRecord) -> bool:
        """Whether Ray is connected and does not list the attempt's node."""
        return self.observed.bridge_up and bool(self.observed.nodes) and not self.observed.node_of(latest(record))


def latest(record: JobRecord) -> AttemptView:
    """Return the job's latest attempt."""
    return record.attempts[-1]


def replaced(record: JobRecord, **fields: object) -> tuple[AttemptView, ...]:
    """Return the attempts, with `fields` changed in the latest."""
    return (*record.attempts[:-1], record.attempts[-1].model_copy(update=fields))


def attempt_tag(settings: Settings, attempt: str) -> str:
    """Return the tag that every process of the attempt has in its environment."""
    return f"{settings.cluster_id}/{attempt}"


def wandb_link(spec: JobSpec, *, job: str, cluster_id: str) -> WandbLink:
    """Return the W&B run that a job's program opens first. The node decides whether it is online.

    The run id is the user's WANDB_RUN_ID, or a hash of cluster and job, so that every attempt gets the same.
    """
    run_id = spec.env.get("WANDB_RUN_ID") or "rl" + hashlib.sha256(f"{cluster_id}/{job}".encode()).hexdigest()[:10]
    tracking = spec.tracking
    mode = "offline" if tracking.mode == "auto" else tracking.mode
    why = "" if tracking.mode == "auto" else "set in the job's spec"
    return WandbLink(
        mode=mode, run_id=run_id, project=tracking.project or DEFAULT_PROJECT, entity=tracking.entity, why=why
    )


def attempt_spec(  # noqa: PLR0913 -- each is one fact, and all are named
    spec: JobSpec,
    *,
    job: str,
    n: int,
    epoch: str,
    settings: Settings,
    links: Sequence[LinkFact] = (),
    earlier: Sequence[EarlierRun] = (),
) -> AttemptSpec:
    """Return the spec for the runner of attempt `n` of `job`.

    `links` are the links that lead out of its code, `earlier` the W&B runs of earlier attempts.
    """
    attempt = f"{job}-{n}"
    environment = settings.environment_of(spec)
    return AttemptSpec(
        attempt=attempt,
        tag=attempt_tag(settings, attempt),
        job=job,
        name=spec.display_name,
        n=n,
        cluster=settings.cluster,
        epoch=epoch,
        entrypoint=spec.entrypoint if isinstance(spec.entrypoint, str) else list(spec.entrypoint),
        launcher=spec.launcher,
        processes=spec.processes,
        cpus=spec.resources.cpus,
        env={**settings.env, **spec.env},
        secrets=list(dict.fromkeys((*settings.secrets, *spec.secrets))),
        environment=_environment(environment, spec.packages),
        envs_dir="",
        wheels=[],
        links=[link.path for link in links],
        gpus=spec.resources.gpus,
        arch=spec.where.arch,
        timeout_s=spec.timeout_s,
        grace_s=spec.grace_s,
        outputs=list(spec.outputs),
        outputs_size=spec.outputs_size,
        outputs_files=spec.outputs_files,
        wandb=_wandb(spec, job=job, n=n, settings=settings, earlier=earlier),
        job_dir="",
        moved_from="",
    )


def _environment(environment: Environment, packages: Sequence[str]) -> EnvironmentSpec:
    kind = "default" if environment.kind in OF_THE_CLUSTER else environment.kind
    return EnvironmentSpec(
        kind=kind, value=environment.value, requirements=list(environment.requirements), packages=list(packages)
    )


def _wandb(spec: JobSpec, *, job: str, n: int, settings: Settings, earlier: Sequence[EarlierRun]) -> WandbSpec:
    tracking = spec.tracking
    link = wandb_link(spec, job=job, cluster_id=settings.cluster_id)
    return WandbSpec(
        mode=tracking.mode,
        run_id=link.run_id,
        project=link.project,
        entity=tracking.entity,
        group=tracking.group or spec.display_name,
        job_type=tracking.job_type,
        name=job,
        tags=[*spec.tags, "raylaunch"],
        notes=f"raylaunch job {job} on cluster {settings.cluster} (attempt {n}): raylaunch show {job}",
        earlier=list(earlier),
    )
