"""The command ``raylaunch``: its subcommands by name, and the handling of errors."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import NamedTuple, NoReturn

import click

from raylaunch.cli.console import complain, complain_usage, note, sanitise_bugs_and_logs, say_json
from raylaunch.errors import RaylaunchError, SpecError
from raylaunch.version import __version__

INTERRUPTED = 130
_PIPE_CLOSED = 141


class _Lazy(NamedTuple):
    """A command that is imported when it is used."""

    module: str
    attribute: str
    help: str


_SECTIONS: dict[str, dict[str, _Lazy]] = {
    "Cluster": {
        "init": _Lazy("init", "init", "Write a cluster.yaml from the names of hosts."),
        "doctor": _Lazy("doctor", "doctor", "Check the hosts and report problems with fixes."),
        "up": _Lazy("cluster", "up", "Start the cluster, or its missing parts."),
        "down": _Lazy("cluster", "down", "Stop the cluster; jobs, logs and outputs stay on disk."),
        "status": _Lazy("cluster", "status", "Show controller, Ray, nodes, GPUs and queue."),
        "add": _Lazy("hosts", "add", "Add a host to the cluster."),
        "drain": _Lazy("hosts", "drain", "Stop placing new jobs on a host."),
        "remove": _Lazy("hosts", "remove", "Take a host out of the cluster."),
        "env": _Lazy("cluster", "env", "Print environment variables for Ray's own tools."),
        "switch": _Lazy("hosts", "switch", "Choose the default cluster."),
        "ssh": _Lazy("hosts", "ssh", "Open a shell on a host."),
    },
    "Jobs": {
        "run": _Lazy("run", "run", "Submit a job and follow it until it ends."),
        "submit": _Lazy("run", "submit", "Submit a job and print its id."),
        "list": _Lazy("jobs", "list_", "List jobs, newest first."),
        "show": _Lazy("jobs", "show", "Show everything about a job."),
        "follow": _Lazy("logs", "follow", "Follow a job's log and state until it ends."),
        "wait": _Lazy("logs", "wait", "Wait until a job has ended; exit with its status."),
        "stop": _Lazy("jobs", "stop", "Stop jobs."),
        "rm": _Lazy("jobs", "rm", "Delete finished jobs and their files."),
    },
    "Results": {
        "logs": _Lazy("logs", "logs", "Print, follow or search a job's log."),
        "metrics": _Lazy("metrics", "metrics", "Show, plot or export a job's metrics."),
        "files": _Lazy("files", "files", "List a job's files."),
        "get": _Lazy("files", "get", "Download a job's outputs or other files."),
        "du": _Lazy("files", "du", "Show the disk usage of jobs."),
    },
    "More": {
        "trust": _Lazy("access", "trust", "Accept the hosts in a cluster.yaml."),
        "token": _Lazy("access", "token", "Invite people, list and revoke tokens."),
        "join": _Lazy("access", "join", "Use a cluster that somebody else runs."),
        "leave": _Lazy("access", "leave", "Forget a joined cluster."),
        "secret": _Lazy("access", "secret", "Set, list and remove secrets."),
        "demo": _Lazy("demo", "demo", "Train a small real model and download it."),
    },
}
_COMMANDS = {name: lazy for section in _SECTIONS.values() for name, lazy in section.items()}
_ALIASES = {
    "cancel": "stop",
    "kill": "stop",
    "jobs": "list",
    "ls": "list",
    "ps": "list",
    "queue": "list",
    "resume": "run",
    "start": "up",
    "restart": "run",
    "tail": "logs",
    "top": "status",
}
"""Names that other programs use, or the nearest command."""
_DESTRUCTIVE = frozenset({"down", "drain", "leave", "remove", "rm", "stop"})
"""Commands that are not suggested for a similar name."""


class LazyGroup(click.Group):
    """Commands that are imported when they are used: ``raylaunch list`` loads nothing of ``raylaunch run``."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 -- click's signature
        """Return all names."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 -- as above
        """Import the command of that name."""
        lazy = _COMMANDS.get(cmd_name)
        if lazy is None:
            return None
        command = getattr(importlib.import_module(f"raylaunch.cli.{lazy.module}"), lazy.attribute)
        return command if isinstance(command, click.Command) else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Refuse an unknown name with the nearest known one."""
        name = args[0]
        if not name.startswith("-") and name not in _COMMANDS:
            near = _ALIASES.get(name) or _nearest(name)
            ctx.fail(f"no such command {name!r}" + (f" (nearest: {near})" if near else ""))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 -- as above
        """List the commands without importing them."""
        for title, commands in _SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, lazy.help) for name, lazy in commands.items()])


def _nearest(name: str) -> str:
    import difflib  # noqa: PLC0415 -- only for this message

    harmless = [command for command in _COMMANDS if command not in _DESTRUCTIVE]
    return next(iter(difflib.get_close_matches(name, harmless, n=1, cutoff=0.7)), "")


@click.command(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Example:  raylaunch run --gpus 1 -- python train.py --lr 0.1",
)
@click.version_option(__version__, prog_name="raylaunch")
@click.option(
    "-c",
    "--cluster-file",
    type=click.Path(path_type=Path),
    help="Cluster file. Default: $RAYLAUNCH_CLUSTER_FILE, ./cluster.yaml, the one chosen with 'switch', or 'local'.",
)
@click.option("--cluster", metavar="NAME", help="Name of a cluster over SSH that was started from here.")
@click.pass_context
def raylaunch(ctx: click.Context, cluster_file: Path | None, cluster: str | None) -> None:
    """Train on your own GPU machines.

    JOB is an id, a name (your latest job of that name), or 'last'. To stop, remove or download somebody else's job, use
    its id.
    """
    if not {"-h", "--help"}.intersection(sys.argv):
        from raylaunch.operations.connect import refuse_inside_job  # noqa: PLC0415 -- every command needs it, and --version does not

        refuse_inside_job(os.environ)
    if cluster and cluster_file:
        msg = "--cluster and --cluster-file exclude each other"
        raise click.UsageError(msg)
    if cluster:
        from raylaunch.cli.hosts import named_file  # noqa: PLC0415 -- only with --cluster

        cluster_file = named_file(cluster)
    ctx.obj = cluster_file


def main() -> NoReturn:
    """Run the command line and exit with its status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    sanitise_bugs_and_logs()
    sys.exit(_status_of_run())


def _say_error(code: str, message: str, hint: str) -> None:
    """With ``--json``, print an error as JSON too: ``{"error": {"code", "message", "hint"}}``."""
    ours = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    if "--json" in ours:
        say_json({"error": {"code": code, "message": message, "hint": hint}})


def _status_of_run() -> int:
    try:
        done = raylaunch.main(standalone_mode=False, prog_name="raylaunch")
        sys.stdout.flush()
    except click.ClickException as error:
        complain_usage(error)
        _say_error("usage", error.format_message(), "")
        return error.exit_code
    except RaylaunchError as error:
        complain(error)
        _say_error(error.code, error.message, error.hint)
        return 2 if isinstance(error, SpecError) else 1
    except (KeyboardInterrupt, click.Abort):
        note("Interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        with contextlib.suppress(OSError):  # the reader of our output has exited; nothing can be flushed
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    return done if isinstance(done, int) else 0
