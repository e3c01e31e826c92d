"""Wheels that go along with a job, for nodes that reach no package index: on the wire between client and controller."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class _View(BaseModel):
    model_config = ConfigDict(frozen=True)


class BuildPlatform(_View):
    """What decides which wheels fit a node."""

    arch: Annotated[str, Field(pattern=r"^[a-z0-9_]{1,20}$")]
    """As ``uname -m`` says."""
    glibc: Annotated[str, Field(pattern=r"^([0-9]{1,3}\.[0-9]{1,3})?$")]
    """Its version, as ``2.35``; empty for another C library."""
    python: Annotated[str, Field(pattern=r"^[0-9]\.[0-9]{1,3}(\.[0-9]{1,3})?[a-z0-9+]{0,8}$")]
    """The full version of the Python that environments are made from there."""

    @property
    def minor(self) -> str:
        """Python's version without the last number."""
        return ".".join(self.python.split(".")[:2])

    def __str__(self) -> str:
        return f"Python {self.minor} on {self.arch}"


class WheelFile(_View):
    """One wheel; its bytes are a package of the cluster, by their sha256."""

    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.+!-]+\.whl$", max_length=255)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    build: bool = False
    """Whether a project of the working directory is built with it, and nothing of it is installed."""
    added: bool = False
    """Whether it is for packages that a job adds to the cluster's own environment, whose wheels the cluster has."""


class WheelSet(_View):
    """All wheels of an environment, for one platform."""

    platform: BuildPlatform
    wheels: tuple[WheelFile, ...]
