"""The controller's settings: ``controller.json`` in the cluster's folder."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from raylaunch.models.fields import OF_THE_CLUSTER, Environment, Retention
from raylaunch.models.job_spec import JobSpec


class Settings(BaseModel):
    """``controller.json``, written by what starts the controller. It contains paths of secrets, never a secret."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    cluster: str
    cluster_id: str
    store: Path
    port: int
    gcs_address: str
    dashboard_url: str
    ray_token_path: Path
    ray_env: dict[str, str] = Field(default_factory=dict)
    """Variables with which a process connects to Ray, for example the path of its certificate if Ray uses TLS."""
    log_path: Path | None = None
    """The file with the controller's own output; None if unknown."""
    default_environment: Environment = Environment()
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of every job of the cluster; a job's own take precedence."""
    secrets: tuple[str, ...] = ()
    """Names of secrets that every job of the cluster gets."""
    retention: Retention = Retention()
    revive: tuple[str, ...] = ()
    """Command that restarts Ray when it does not respond; empty if somebody else runs Ray."""
    revive_limit_s: float = 600.0
    """Timeout of that command."""

    carries_stewards: bool = False
    """Whether somebody else runs Ray: raylaunch is not installed on its nodes, and agents bring their code."""

    def environment_of(self, spec: JobSpec) -> Environment:
        """Return the environment of a job: its own, or the cluster's."""
        return self.default_environment if spec.environment.kind in OF_THE_CLUSTER else spec.environment

    @property
    def namespace(self) -> str:
        """Ray's namespace of the agents. It is constant if raylaunch runs Ray itself."""
        return f"raylaunch-{self.cluster_id}" if self.carries_stewards else "raylaunch"

    @property
    def ray_token(self) -> str:
        """Ray's token, read from its 0600 file."""
        return self.ray_token_path.read_text().strip()
