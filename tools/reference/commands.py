"""The command line, from click's own description of it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import click

from raylaunch.cli.app import raylaunch
from tools.reference import markdown

_EXAMPLE = "Example:"
_HELP = {"--help", "--version"}


def page() -> str:
    """Return the reference of the command line."""
    commands = list(walk(raylaunch, click.Context(raylaunch, info_name="raylaunch")))
    lines = [
        "The output of `--help` of each command. How they are used: [The command line](../cli.md).",
        *markdown.table(("command", "does"), [(_link(ctx), _short(command)) for command, ctx in commands[1:]]),
    ]
    for command, ctx in commands:
        lines += _section(command, ctx)
    return markdown.page("Commands", "the commands in raylaunch/cli", lines)


def walk(command: click.Command, ctx: click.Context) -> Iterator[tuple[click.Command, click.Context]]:
    """Yield a command and all below it, each with a context that knows its whole name."""
    yield command, ctx
    if isinstance(command, click.Group):
        for name in command.list_commands(ctx):
            below = command.get_command(ctx, name)
            assert below  # noqa: S101 -- a name of `list_commands`
            yield from walk(below, click.Context(below, parent=ctx, info_name=name))


def _link(ctx: click.Context) -> str:
    return f"[`{ctx.command_path}`](#{markdown.anchor(ctx.command_path)})"


def _short(command: click.Command) -> str:
    return command.get_short_help_str(limit=200)


def _section(command: click.Command, ctx: click.Context) -> Iterator[str]:
    yield from markdown.heading(2, ctx.command_path)
    usage = " ".join([ctx.command_path.removesuffix(" "), *command.collect_usage_pieces(ctx)])
    yield from markdown.fence("text", usage)
    yield inspect.cleandoc(command.help or "")
    rows = []
    for param in command.get_params(ctx):
        record = param.get_help_record(ctx)
        if record and not _HELP & set(param.opts):
            rows.append((markdown.code(record[0]), record[1]))
    yield from markdown.table(("option", "is"), rows)
    if command.epilog:
        yield from markdown.fence("sh", command.epilog.removeprefix(_EXAMPLE).strip())
