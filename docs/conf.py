"""How Sphinx builds the site: the pages as they are read on a code host, README and examples among them.

``make docs`` runs it. The sources start at the repository root, so that a relative link is the same in both places.
Nothing is fetched, neither during the build nor by readers.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from raylaunch.version import __version__  # noqa: E402 -- found by the line above


class Application(Protocol):
    """What of Sphinx's application is used here."""

    def connect(self, event: str, callback: object) -> int:
        """Call a function at an event."""


CHAPTERS = {
    "Guides": ("docs/first-steps", "docs/jobs", "docs/tracking", "docs/cluster", "docs/dgx"),
    "Interfaces": ("docs/cli", "docs/python", "docs/mcp", "docs/ray-cli"),
    "Reference": (
        "docs/reference/cli",
        "docs/reference/job-file",
        "docs/reference/cluster-file",
        "docs/reference/python",
        "docs/reference/reasons",
    ),
    "Operations": ("docs/troubleshooting", "docs/security"),
    "Examples": (),
    "The project": ("README </README>", "docs/architecture", "CONTRIBUTING", "CHANGELOG"),
}
"""The pages by chapter; examples and pages that no chapter names are found."""
FOUND = {"Examples": "examples/*/README.md", "Operations": "docs/*.md"}

project = "raylaunch"
author = "the raylaunch authors"
project_copyright = f"{author}; Apache License 2.0"
release = version = __version__

extensions = ["myst_parser", "sphinx_copybutton"]
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**.md", "examples/**/README.md"]
exclude_patterns = [".*", "**/.*", "build", "dist", "site"]
root_doc = "docs/index"
myst_heading_anchors = 4
copybutton_prompt_text = "$ "  # of a transcript, what is typed is copied
smartquotes = False  # quotes are copied into shells

html_theme = "furo"
html_title = f"raylaunch {__version__}"
html_extra_path = ["_site"]
html_static_path = ["_static"]
html_css_files = ["raylaunch.css"]
html_copy_source = False
html_show_sourcelink = False
html_use_index = False
pygments_style = "default"
pygments_dark_style = "github-dark"


def chapters() -> dict[str, tuple[str, ...]]:
    """Return every page in its chapter, but the first."""
    named = {root_doc, *(page for pages in CHAPTERS.values() for page in pages)}
    return {caption: (*pages, *found(FOUND.get(caption, ""), named)) for caption, pages in CHAPTERS.items()}


def found(pattern: str, without: set[str]) -> list[str]:
    """Return the pages that fit a pattern, by name."""
    paths = ROOT.glob(pattern) if pattern else ()
    return sorted({path.relative_to(ROOT).with_suffix("").as_posix() for path in paths} - without)


def with_chapters(_app: Application, page: str, text: list[str]) -> None:
    """Add the chapters to the first page: they would be noise where the page is read on a code host."""
    if page == root_doc:
        for caption, pages in chapters().items():
            names = "\n".join(name if name.endswith(">") else f"/{name}" for name in pages)
            text[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{names}\n```\n"


def setup(app: Application) -> None:
    """Register with Sphinx, which calls this at its start."""
    app.connect("source-read", with_chapters)
