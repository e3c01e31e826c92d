"""Draw the README's picture: commands typed into a terminal, run on a cluster made for them, saved as SVG.

``python -m tools.picture`` writes docs/_static/terminal.svg. The terminal is a pseudo-terminal, so the output looks as
it does to a person. The picture names neither this machine nor its folders, and needs no font from elsewhere.
"""

from __future__ import annotations

import io
import os
import pty
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs/_static/terminal.svg"
JOB = """\
name: digits
entrypoint: python train.py --epochs 10
env: {WANDB_SILENT: "true"}
tracking: {project: digits, mode: offline}
retries: 1
"""
COMMANDS = (
    "cat job.yaml",
    "raylaunch run -f job.yaml",
    "raylaunch list",
    "raylaunch metrics last --key loss --plot",
    "raylaunch get last --to model",
)
WIDTH = 100
LIMIT_S = 600
_PARTS = re.compile(
    r"\r*\n|\r|\x1b\[(?P<up>\d*)A|(?P<erase>\x1b\[\d*K)|\x1b\[\?\d+[hl]|(?P<text>(?:\x1b\[[\d;]*m|[^\x1b\r\n])+)"
)
_WEB_FONT = re.compile(r"\s*@font-face \{.*?\}", re.DOTALL)


def main() -> None:
    """Run the commands and write the picture."""
    with tempfile.TemporaryDirectory(prefix="picture-") as home:
        folder = Path(home, "digits")
        shutil.copytree(ROOT / "examples/digits", folder, ignore=shutil.ignore_patterns("README.md", "__pycache__"))
        (folder / "job.yaml").write_text(JOB, encoding="utf-8")
        venv = Path(home, ".venv")
        venv.symlink_to(sys.prefix)
        environ = environment(Path(home), venv)
        try:
            run("raylaunch up", folder, environ)
            seen = "".join(f"\x1b[32m$\x1b[0m \x1b[1m{one}\x1b[0m\n{run(one, folder, environ)}\n\n" for one in COMMANDS)
        finally:
            run("raylaunch down --stop", folder, environ)
    seen = re.sub(rf"\b{re.escape(socket.gethostname())}\b", "gpu-1", seen.replace(home, "~"))
    PICTURE.write_text(svg(seen.rstrip("\n")), encoding="utf-8")
    print(PICTURE.relative_to(ROOT))


def environment(home: Path, venv: Path) -> dict[str, str]:
    """Return the variables of the terminal: a virtual environment is active, and W&B has no settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "RAYLAUNCH_", "NO_"))}
    own = {"RAYLAUNCH_HOME": str(home / ".raylaunch"), "VIRTUAL_ENV": str(venv)}
    terminal = {"TERM": "xterm-256color", "COLUMNS": str(WIDTH)}
    return {**kept, **own, **terminal, "PATH": f"{venv / 'bin'}:{kept['PATH']}"}


def run(command: str, folder: Path, environ: Mapping[str, str]) -> str:
    """Run a command in a pseudo-terminal; return the lines that the terminal shows at its end."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(  # noqa: S603 -- a command of COMMANDS
        ["timeout", str(LIMIT_S), "bash", "-c", command],  # noqa: S607 -- found on PATH, as in a terminal
        cwd=folder,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        received = b"".join(iter(lambda: _read(ours), b"")).decode()
    os.close(ours)
    print(f"$ {command}\n{received}", file=sys.stderr)
    if process.returncode:
        msg = f"{command} exited with status {process.returncode}"
        raise SystemExit(msg)
    return screen(received)


def _read(terminal: int) -> bytes:
    """Return what has arrived; nothing once the last program has closed the terminal."""
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""


def screen(received: str) -> str:
    """Return the lines that are left when a terminal has followed returns, upward moves and erasures."""
    lines, row, overwrite = [""], 0, False
    for found in _PARTS.finditer(received):
        part = found[0]
        if part.endswith("\n"):
            row, overwrite = row + 1, False
            lines += [""] * (row == len(lines))
        elif part == "\r":
            overwrite = True
        elif found["up"] is not None:
            row = max(0, row - int(found["up"] or 1))
        elif found["erase"]:
            lines[row] = ""
        elif found["text"]:
            lines[row] = part if overwrite else lines[row] + part
            overwrite = False
    return "\n".join(lines).rstrip("\n")


def svg(text: str) -> str:
    """Return a terminal with this text, in the fixed-width font that the reader has."""
    console = Console(width=WIDTH, record=True, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.from_ansi(text))
    drawn = console.export_svg(title="raylaunch", unique_id="terminal", theme=MONOKAI)
    return _WEB_FONT.sub("", drawn).replace("Fira Code", "Menlo, Consolas, DejaVu Sans Mono")


if __name__ == "__main__":
    main()
