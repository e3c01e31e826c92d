"""``trust``: a person accepts the hosts and addresses that a cluster.yaml names."""

from __future__ import annotations

from pathlib import Path

import click
from pydantic import BaseModel, ConfigDict

from raylaunch.cli.console import note, say, say_json
from raylaunch.cli.options import as_json
from raylaunch.cluster.trust import VARIABLE, accept, destinations, fingerprint, unaccepted
from raylaunch.config import load_cluster_file


class _Trust(BaseModel):
    model_config = ConfigDict(frozen=True)

    cluster: str
    fingerprint: str
    connects_to: tuple[str, ...]
    accepted: bool


@click.command(epilog="Example:  raylaunch trust cluster.yaml")
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--show", is_flag=True, help="Print what the file connects to, and accept nothing.")
@as_json
@click.pass_obj
def trust(cluster_file: Path | None, *, file: Path | None, show: bool, as_json: bool) -> None:
    """Accept the hosts and addresses that FILE names; without FILE those of the cluster that applies here.

    raylaunch contacts nothing that a cluster file names before you have accepted it. 'init' and 'add' accept the hosts
    that you type, and 'up' asks in a terminal. Comments, names and other settings may change without a new question.
    """
    spec = load_cluster_file(file or cluster_file).spec
    if not show:
        accept(spec)
    places = destinations(spec)
    code = fingerprint(spec) if places else ""
    accepted = not unaccepted(spec)
    if as_json:
        words = tuple(one.words for one in places)
        say_json(_Trust(cluster=spec.name, fingerprint=code, connects_to=words, accepted=accepted))
        return
    if not places:
        say(f"cluster {spec.name} is on this machine: there is nothing to accept")
        return
    say(f"cluster {spec.name}: {'accepted' if accepted else 'not accepted yet'}")
    for one in places:
        say(f"  {one.words}")
    note(f"in CI: {VARIABLE}={code}")
