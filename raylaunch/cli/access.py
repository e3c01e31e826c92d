"""``token``, ``join``, ``leave``: other people on a cluster over SSH."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
from pydantic import JsonValue, RootModel, ValidationError

from raylaunch.cli.connect import ClusterCommand, as_json, duration, finish, parse_future_time, request
from raylaunch.cli.console import count, is_terminal, note, say, say_json, say_lines, shown_text, table
from raylaunch.cluster.hosts import joined
from raylaunch.cluster.trust import VARIABLE, accept, destinations, fingerprint, unaccepted
from raylaunch.config.load import load_cluster_file
from raylaunch.config.validation import spec_error
from raylaunch.errors import SpecError
from raylaunch.models.cluster import TokenView
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.operations.invites import choose, invite
from raylaunch.operations.invites import join as join_cluster


@click.group(epilog="Example:  raylaunch secret set HF_TOKEN < token.txt")
def secret() -> None:
    """Set, list and remove secrets. A job requests them by name: --secret NAME."""


@secret.command("set", epilog="Example:  printenv HF_TOKEN | raylaunch secret set HF_TOKEN")
@click.argument("name")
@click.option("--for", "people", multiple=True, metavar="NAME", help="Person whose jobs may use it; may be repeated.")
@click.option("--for-everyone", is_flag=True, help="All jobs may use it; the default for a new secret.")
@click.pass_obj
def set_(cluster_file: Path | None, *, name: str, people: tuple[str, ...], for_everyone: bool) -> None:
    """Set a secret. The value is read from stdin or a prompt, never from the command line, which others can see.

    A new value does not change whose jobs may use the secret, unless --for or --for-everyone is given.
    """
    if people and for_everyone:
        msg = "--for and --for-everyone exclude each other"
        raise click.UsageError(msg)
    value = _value(name)
    if not value and name.isidentifier():  # the controller refuses an invalid name
        msg = f"the value of {name} is empty"
        raise SpecError(msg, hint=f"pass it on stdin: printenv {name} | raylaunch secret set {name}")
    allowed = () if for_everyone else people or None
    request(cluster_file, lambda client: client.secrets_set(name, value, people=allowed))
    note(f"Set {name}")


def _value(name: str) -> str:
    if is_terminal(sys.stdin):
        return str(click.prompt(shown_text(f"Value of {name}"), hide_input=True, err=True))
    return sys.stdin.read().rstrip("\r\n")


@secret.command("list", epilog="Example:  raylaunch secret list")
@as_json
@click.pass_obj
def list_secrets(cluster_file: Path | None, *, as_json: bool) -> None:
    """List the names of the secrets that are set."""
    names = request(cluster_file, lambda client: client.secrets_list())
    if as_json:
        say_json(list(names))
        return
    for name in names:
        say(name)
    if not names:
        note("No secrets")


@secret.command("rm", epilog="Example:  raylaunch secret rm HF_TOKEN")
@click.argument("name")
@click.pass_obj
def rm(cluster_file: Path | None, *, name: str) -> None:
    """Remove a secret."""
    request(cluster_file, lambda client: client.secrets_remove(name))
    note(f"Removed {name}")


@click.command(epilog="Example:  raylaunch trust cluster.yaml")
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--show", is_flag=True, help="Print what the file connects to; accept nothing.")
@as_json
@click.pass_obj
def trust(cluster_file: Path | None, *, file: Path | None, show: bool, as_json: bool) -> None:
    """Accept the hosts and addresses in FILE; by default those of the current cluster.

    raylaunch connects to nothing in a cluster file until you have accepted it. 'init' and 'add' accept the hosts that
    you type, and 'up' asks on a terminal. Changes to comments, names and other settings need no new acceptance.
    """
    spec = load_cluster_file(file or cluster_file).spec
    if not show:
        accept(spec)
    places = destinations(spec)
    code = fingerprint(spec) if places else ""
    accepted = not unaccepted(spec)
    if as_json:
        words: list[JsonValue] = [one.words for one in places]
        say_json({"cluster": spec.name, "fingerprint": code, "connects_to": words, "accepted": accepted})
        return
    if not places:
        say(f"cluster {spec.name} is on this machine: nothing to accept")
        return
    say(f"cluster {spec.name}: {'accepted' if accepted else 'not accepted yet'}")
    for one in places:
        say(f"  {one.words}")
    note(f"in CI: {VARIABLE}={code}")


ROLES = ("viewer", "trainer", "operator", "admin")


@click.group(epilog="Example:  raylaunch token create --for alice --role trainer")
def token() -> None:
    """Manage access: invite people, list and revoke tokens."""


@token.command(epilog="Example:  raylaunch token create --for alice --role trainer --expires 90d")
@click.option(
    "--for", "person", required=True, metavar="NAME", help="Who is invited. The name is shown next to their jobs."
)
@click.option("--role", type=click.Choice(ROLES), default="trainer", show_default=True, help="What they may do.")
@click.option("--expires", metavar="TIME", help="When the token expires: 90d, 2027-01-31. Default: never.")
@click.option("--valid", default="24h", show_default=True, metavar="DURATION", help="How long the invitation is valid.")
@click.pass_obj
def create(cluster_file: Path | None, *, person: str, role: str, expires: str | None, valid: str) -> None:
    """Print a command that gives a person access. It works once; they need their own account on the head."""
    at = parse_future_time(expires, option="--expires")
    valid_s = duration(valid, option="--valid")
    line, expires_at = finish(invite(ClusterCommand(cluster_file), person, role, valid_s=valid_s, token_expires_at=at))
    say(line)
    note(f"{person} runs this once, before {_when(expires_at)}; their `ssh` to the head must work")


@token.command("list", epilog="Example:  raylaunch token list --json")
@as_json
@click.pass_obj
def list_(cluster_file: Path | None, *, as_json: bool) -> None:
    """List tokens and their owners. The tokens themselves are known only to their owners."""
    found = request(cluster_file, lambda client: client.admin.tokens())
    if as_json:
        say_json(RootModel[tuple[TokenView, ...]](found))
        return
    say_lines(table(("ID", "PERSON", "ROLE", "SINCE", "UNTIL", ""), (tuple(_row(one)) for one in found)))


def _row(one: TokenView) -> Iterator[str]:
    yield from (one.id, one.person, one.role)
    yield _when(one.created_at) if one.created_at else ""
    yield _when(one.expires_at) if one.expires_at else ""
    expired = one.expires_at is not None and one.expires_at <= time.time()
    yield "invited" if one.invited else "expired" if expired else "yours" if one.mine else ""


@token.command(epilog="Example:  raylaunch token revoke alice")
@click.argument("who")
@click.pass_obj
def revoke(cluster_file: Path | None, *, who: str) -> None:
    """Revoke a person's tokens and invitations, or one of them by its ID. Their jobs keep running."""
    revoked = request(cluster_file, lambda client: client.admin.revoke(who))
    note(f"Revoked {count(revoked, 'token')} of {who}")


@click.command(epilog="Example:  raylaunch join lab --head dgx-1.example.org --port 41234 --code k7qm2-…")
@click.argument("name")
@click.option("--head", required=True, metavar="HOST", help="The cluster's head, as you would give it to ssh.")
@click.option("--port", type=click.IntRange(1, 65535), required=True, help="Port of the controller on the head.")
@click.option("--code", required=True, help="Code of the invitation; works once.")
@click.option("--fingerprint", help="Expected host key of the head.")
@click.option("--jump", multiple=True, help="Jump host; may be repeated.")
@click.option("--user", help="Your account on the head, unless ~/.ssh/config sets it.")
@click.option("--key", help="Private key for the login.")
def join(  # noqa: PLR0913 -- each is one fact of the line
    *,
    name: str,
    head: str,
    port: int,
    code: str,
    fingerprint: str | None,
    jump: tuple[str, ...],
    user: str | None,
    key: str | None,
) -> None:
    """Use a cluster that somebody else runs: paste the line you were sent (from 'raylaunch token create')."""
    given = {"host": head, "fingerprint": fingerprint, "jump": list(jump), "user": user, "key": key}
    host: dict[str, object] = {field: value for field, value in given.items() if value}
    try:
        ClusterSpec.model_validate({"name": name, "kind": "ssh", "hosts": [host]})
    except ValidationError as error:
        raise spec_error(error, ClusterSpec, {"name": name, "hosts": [host]}, lambda _path: "") from None
    admission = finish(join_cluster(name, host, port=port, code=code))
    say(f"Joined cluster {name} as {admission.person} ({admission.role}); {admission.made_by} runs it")
    if choose(name, cwd=Path.cwd()):
        note(f"{name} is now the default cluster (a cluster.yaml takes precedence); change it: raylaunch switch")
    else:
        note(f"Use it once: raylaunch --cluster {name} list; make it the default: raylaunch switch {name}")


@click.command(epilog="Example:  raylaunch leave lab")
@click.argument("name")
def leave(name: str) -> None:
    """Forget a joined cluster. The cluster and your jobs there keep running."""
    finish(joined.leave(name))
    note(f"Forgot cluster {name}; its owner can revoke your token: raylaunch token revoke")


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))
