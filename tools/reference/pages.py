"""Which pages are written from code."""

from __future__ import annotations

from pathlib import Path

from tools.reference import commands, mcp, python, reasons, specs

ROOT = Path(__file__).resolve().parents[2]
UPDATE = "make docs-reference"
"""The command that brings the pages up to date."""


def pages() -> dict[Path, str]:
    """Return every page that is written from code, as it should be."""
    folder = ROOT / "docs" / "reference"
    return {
        folder / "cli.md": commands.page(),
        folder / "job-file.md": specs.job_page(),
        folder / "cluster-file.md": specs.cluster_page(),
        folder / "python.md": python.page(),
        folder / "reasons.md": reasons.page(),
        mcp.PAGE: mcp.page(mcp.PAGE.read_text(encoding="utf-8")),
    }
