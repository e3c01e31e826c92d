"""What is asked for of a cluster: cluster.yaml. Frozen, validated, no I/O."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from raylaunch.spec_parts import NAME, Environment, Spec


def _gpus_words(value: object) -> object:
    if isinstance(value, list):
        return tuple(str(item) for item in value)
    return value


ClusterGpus = Annotated[Literal["auto"] | Annotated[int, Field(ge=0)] | tuple[str, ...], BeforeValidator(_gpus_words)]


class ClusterSpec(Spec):
    """A cluster, as cluster.yaml describes it. Without a file: the embedded cluster ``local`` on this machine."""

    name: str = "local"
    """Its name; several clusters run side by side. Example: `scratch`"""
    kind: Literal["local"] = "local"
    """`local`: Ray and the controller on this machine. Example: `local`"""
    gpus: ClusterGpus = "auto"
    """`auto` for all that `nvidia-smi` lists, a list of indices or UUIDs to use only these, or a number of logical
    GPUs, to try GPU jobs out on a machine without one. Example: `[0, 1]`"""
    cpus: Annotated[float, Field(gt=0)] | None = None
    """CPU cores that jobs may use; without it all. Example: `16`"""
    port: Annotated[int, Field(ge=1024, le=65535)] | None = None
    """The controller's port, on loopback; without it a free one. Example: `8642`"""
    store: str = ""
    """The folder of records, logs and outputs; without it in the cluster's own folder. Example: `/raid/raylaunch`"""
    environment: Environment = Environment()
    """The Python environment of jobs that name none. Example: `venv:/opt/train`"""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of all jobs. Example: `{HF_HOME: /raid/hf}`"""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels of this node, for `where` in jobs. Example: `{disk: nvme}`"""

    @field_validator("name")
    @classmethod
    def _name_is_plain(cls, value: str) -> str:
        if not NAME.fullmatch(value):
            msg = f"{value!r} is not a cluster name; use letters, digits, '.', '_' and '-'"
            raise ValueError(msg)
        return value
