"""``secret``: values that jobs find in their environment, and that no other place shows."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from raylaunch.cli.connect import Place, finish
from raylaunch.cli.console import is_terminal, note, say, say_json, shown_text
from raylaunch.cli.options import as_json
from raylaunch.errors import SpecError


@click.group(epilog="Example:  raylaunch secret set HF_TOKEN < token.txt")
def secret() -> None:
    """Set, list and remove secrets. A job names those that it needs: --secret NAME."""


@secret.command("set", epilog="Example:  printenv HF_TOKEN | raylaunch secret set HF_TOKEN")
@click.argument("name")
@click.option("--for", "people", multiple=True, metavar="NAME", help="Whose jobs may have it; may be repeated.")
@click.option("--for-everyone", is_flag=True, help="Everybody's jobs may have it, as without --for at first.")
@click.pass_obj
def set_(cluster_file: Path | None, *, name: str, people: tuple[str, ...], for_everyone: bool) -> None:
    """Set a secret. The value is read from stdin, or asked for; never from the command line, which others can see.

    A new value leaves it as it is whose jobs may have the secret, unless --for or --for-everyone changes that.
    """
    if people and for_everyone:
        msg = "--for names people, and --for-everyone all; give one"
        raise click.UsageError(msg)
    value = _value(name)
    if not value and name.isidentifier():  # what is no name is the controller's to refuse
        msg = f"the value of {name} is empty"
        raise SpecError(msg, hint=f"give it on stdin: printenv {name} | raylaunch secret set {name}")

    async def work() -> None:
        async with Place(cluster_file).client() as client:
            await client.secrets_set(name, value, people=() if for_everyone else people or None)

    finish(work())
    note(f"{name} is set")


def _value(name: str) -> str:
    if is_terminal(sys.stdin):
        return str(click.prompt(shown_text(f"Value of {name}"), hide_input=True, err=True))
    return sys.stdin.read().rstrip("\r\n")


@secret.command("list", epilog="Example:  raylaunch secret list")
@as_json
@click.pass_obj
def list_(cluster_file: Path | None, *, as_json: bool) -> None:
    """List the names of the secrets that are set."""

    async def work() -> tuple[str, ...]:
        async with Place(cluster_file).client() as client:
            return await client.secrets_list()

    names = finish(work())
    if as_json:
        say_json(list(names))
        return
    for name in names:
        say(name)
    if not names:
        note("no secrets are set")


@secret.command("rm", epilog="Example:  raylaunch secret rm HF_TOKEN")
@click.argument("name")
@click.pass_obj
def rm(cluster_file: Path | None, *, name: str) -> None:
    """Remove a secret."""

    async def work() -> None:
        async with Place(cluster_file).client() as client:
            await client.secrets_remove(name)

    finish(work())
    note(f"{name} is removed")
