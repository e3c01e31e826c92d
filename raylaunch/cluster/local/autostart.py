"""How a host's part of a cluster is restarted: after a crash by its watchdog, which is started again after a reboot.

The first that works of: a systemd user unit with lingering, a system unit with passwordless sudo, cron's ``@reboot``.
Else the watchdog alone, which does not survive a reboot; the doctor warns about that.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import anyio.to_thread

from raylaunch.cluster.local.ray_head import clean_environment
from raylaunch.cluster.local.watchdog import is_watched, set_watchdog_version, watchdog_version
from raylaunch.cluster.processes import start_apart
from raylaunch.paths import ClusterPaths
from raylaunch.version import __version__

_LIMIT_S = 20
_START_S, _POLL_S = 15.0, 0.1


async def ensure_watchdog(paths: ClusterPaths) -> None:
    """Ensure that a watchdog runs and is started again after a reboot. It may be called again: what exists stays."""
    start = await anyio.to_thread.run_sync(lambda: _user_unit(paths) or _system_unit(paths) or _cron(paths))
    handed_over = watchdog_version(paths) != __version__
    set_watchdog_version(paths)
    if (handed_over or not is_watched(paths)) and not await _started(paths, start or ()):
        env = clean_environment(os.environ, paths)
        await start_apart(watchdog_argv(paths), env=env, cwd=Path("/"), log=paths.root / "keep.log")


async def _started(paths: ClusterPaths, start: tuple[str, ...]) -> bool:
    """Start the watchdog by systemd, which then also restarts it; return whether one runs."""
    if not start or await anyio.to_thread.run_sync(_run, start) is None:
        return False
    with anyio.move_on_after(_START_S):
        while not is_watched(paths):  # noqa: ASYNC110 -- another process
            await anyio.sleep(_POLL_S)
    return is_watched(paths)


async def disable_watchdog(paths: ClusterPaths) -> None:
    """Remove what starts the watchdog at boot. The watchdog itself exits when the cluster should not run."""

    def remove() -> None:
        unit = user_unit_file(paths)
        if unit.exists():
            _run(["systemctl", "--user", "disable", unit.name])
            unit.unlink(missing_ok=True)
        system = system_unit_file(paths)
        if system.exists():
            _run(["sudo", "-n", "systemctl", "disable", system.name])
            _run(["sudo", "-n", "rm", "-f", str(system)])
        table = _crontab()
        left = [line for line in table if not line.endswith(_mark(paths))]
        if left != table:
            _run(["crontab", "-"], text="".join(f"{line}\n" for line in left))

    await anyio.to_thread.run_sync(remove)


def watchdog_argv(paths: ClusterPaths) -> list[str]:
    """Return the watchdog's command line."""
    return [sys.executable, "-m", "raylaunch.cluster.keep", paths.name]


def unit_text(paths: ClusterPaths, *, user: str = "") -> str:
    """Return the systemd unit; with `user` a system unit. It controls only the watchdog: Ray and jobs outlive it."""
    env = clean_environment(os.environ, paths)
    lines = [f"Environment={_quoted(f'{key}={env[key]}')}" for key in ("RAYLAUNCH_HOME", "PYTHONPATH") if key in env]
    return "\n".join(
        [
            "[Unit]",
            f"Description=raylaunch cluster {paths.name}",
            *(["Wants=network-online.target", "After=network-online.target"] if user else []),
            "",
            "[Service]",
            f"ExecStart={' '.join(_quoted(word.replace('$', '$$')) for word in watchdog_argv(paths))}",
            "WorkingDirectory=/",
            *lines,
            *([f"User={user}"] if user else []),
            "KillMode=process",
            "Restart=on-failure",
            "RestartSec=5",
            "",
            "[Install]",
            f"WantedBy={'multi-user' if user else 'default'}.target",
            "",
        ]
    )


def _quoted(word: str) -> str:
    """Quote an argument for systemd, which also expands ``%`` within quotes."""
    escaped = word.replace("\\", r"\\").replace('"', r"\"").replace("%", "%%")
    return f'"{escaped}"'


def user_unit_file(paths: ClusterPaths) -> Path:
    """Return the path of the user unit."""
    config = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    return config / "systemd" / "user" / f"raylaunch-{paths.name}.service"


def system_unit_file(paths: ClusterPaths) -> Path:
    """Return the path of the system unit, whose name contains the user's."""
    return Path("/etc/systemd/system") / f"raylaunch-{getpass.getuser()}-{paths.name}.service"


def _user_unit(paths: ClusterPaths) -> tuple[str, ...] | None:
    """Enable a user unit; return the command that starts it, or None if that is not possible."""
    if not shutil.which("systemctl") or _run(["systemctl", "--user", "show-environment"]) is None:
        return None
    lingers = Path("/var/lib/systemd/linger") / getpass.getuser()
    if not lingers.exists():
        _run(["loginctl", "enable-linger"])
    if not lingers.exists():
        return None
    unit = user_unit_file(paths)
    with contextlib.suppress(OSError):
        unit.parent.mkdir(parents=True, exist_ok=True)
        unit.write_text(unit_text(paths), encoding="utf-8")
        if _run(["systemctl", "--user", "enable", unit.name]) is not None:
            return ("systemctl", "--user", "restart", unit.name)
        unit.unlink()
    return None


def _system_unit(paths: ClusterPaths) -> tuple[str, ...] | None:
    if not Path("/run/systemd/system").is_dir() or _run(["sudo", "-n", "true"]) is None:
        return None
    unit = system_unit_file(paths)
    text = unit_text(paths, user=getpass.getuser())
    if _run(["sudo", "-n", "tee", str(unit)], text=text) is None:
        return None
    if _run(["sudo", "-n", "systemctl", "enable", unit.name]) is None:
        return None
    return ("sudo", "-n", "systemctl", "restart", unit.name)


def _cron(paths: ClusterPaths) -> tuple[str, ...] | None:
    """Use ``@reboot`` in the user's crontab, if a cron daemon runs. It cannot start the watchdog now."""
    if not shutil.which("crontab") or not _cron_runs():
        return None
    table = _crontab()
    env = clean_environment(os.environ, paths)
    settings = [f"{key}={env[key]}" for key in ("RAYLAUNCH_HOME", "PYTHONPATH") if key in env]
    command = shlex.join(["env", *settings, *watchdog_argv(paths)]).replace("%", r"\%")
    log = shlex.quote(str(paths.root / "keep.log"))
    line = f"@reboot cd / && {command} >>{log} 2>&1 {_mark(paths)}"
    wanted = [*(one for one in table if not one.endswith(_mark(paths))), line]
    if wanted == table or _run(["crontab", "-"], text="".join(f"{one}\n" for one in wanted)) is not None:
        return ()
    return None


def _cron_runs() -> bool:
    import psutil  # noqa: PLC0415 -- only here

    return any(process.info["name"] in {"cron", "crond"} for process in psutil.process_iter(["name"]))


def _mark(paths: ClusterPaths) -> str:
    return f"# raylaunch {paths.name}"


def _crontab() -> list[str]:
    return (_run(["crontab", "-l"]) or "").splitlines() if shutil.which("crontab") else []


def _run(argv: Sequence[str], *, text: str | None = None) -> str | None:
    """Run a program without input; return its output, or None if it failed."""
    try:
        done = subprocess.run(argv, input=text or "", capture_output=True, text=True, timeout=_LIMIT_S, check=False)  # noqa: S603 -- fixed programs
    except (OSError, subprocess.TimeoutExpired):
        return None
    return str(done.stdout) if done.returncode == 0 else None
