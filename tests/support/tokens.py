"""People with tokens of their own, on a cluster that runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import raylaunch
from raylaunch.cluster.types import Endpoint
from support.cluster import Cluster


@contextmanager
def people(cluster: Cluster, **roles: str) -> Iterator[None]:
    """Give people tokens, each the name itself, beside those there are."""
    path = Path(cluster.record().store) / "tokens.json"
    before = path.read_text()
    book = cast("dict[str, list[dict[str, str]]]", json.loads(before))
    book["tokens"] += [
        {"sha256": hashlib.sha256(name.encode()).hexdigest(), "person": name, "role": role}
        for name, role in roles.items()
    ]
    path.write_text(json.dumps(book))
    try:
        yield
    finally:
        path.write_text(before)


def person_of(cluster: Cluster, name: str) -> raylaunch.Cluster:
    """Return the cluster as that person sees it."""
    return raylaunch.connect(reach=Endpoint(cluster.reach().url, name))
