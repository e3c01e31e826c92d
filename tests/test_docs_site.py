"""The site: it builds without a warning, a broken link stops it, and who reads it asks nobody else for anything."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cluster import ROOT
from support.pages import pages

FOREIGN = re.compile(r"""<(?:script|img|iframe|link)\b[^>]*?(?:src|href)\s*=\s*["']?(?:https?:)?//[^>]*>""")
FETCHED = re.compile(r"""(?:@import|url\()\s*["']?(?:https?:)?//[^"')\s]+""")


def build(source: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Build the site as ``make docs`` does."""
    options = ["--fail-on-warning", "--keep-going", "--quiet", "-c", str(source / "docs"), "-b", "html"]
    return subprocess.run(
        [sys.executable, "-m", "sphinx", *options, "-d", str(site.parent / "doctrees"), str(source), str(site)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The site, built from the repository as it stands."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    yield folder
    shutil.rmtree(folder)


def test_every_page_is_in_the_site(site: Path) -> None:
    missing = [page for page in pages() if not (site / page.relative_to(ROOT).with_suffix(".html")).exists()]
    assert not missing


def test_the_first_page_of_the_site_leads_to_the_documentation(site: Path) -> None:
    target = re.search(r"url=([\w/.]+)", (site / "index.html").read_text(encoding="utf-8"))
    assert target
    assert "The first five minutes" in (site / target[1]).read_text(encoding="utf-8")


def test_the_site_loads_nothing_from_other_hosts(site: Path) -> None:
    html = [*FOREIGN.findall("".join(path.read_text(encoding="utf-8") for path in site.rglob("*.html")))]
    css = [*FETCHED.findall("".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css")))]
    assert not html + css


def test_files_that_pages_lead_to_are_in_the_site(site: Path) -> None:
    names = {path.name for path in (site / "_downloads").rglob("*") if path.is_file()}
    assert {"notebook.ipynb", "cluster.yaml", "LICENSE"} <= names


def test_broken_links_to_a_page_and_to_a_heading_stop_the_build_and_both_are_named(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for page in pages():
        copy = source / page.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(page, copy)
    for name in ("docs/_static", "docs/_site", "raylaunch"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "docs/conf.py", source / "docs")
    with (source / "docs/tracking.md").open("a", encoding="utf-8") as tracking:
        tracking.write("\n[gone](gone.md)\n\n[gone](jobs.md#no-such-heading)\n")
    done = build(source, tmp_path / "site")
    assert done.returncode != 0
    for target in ("gone.md", "no-such-heading"):
        assert re.search(rf"docs/tracking\.md.*{re.escape(target)}", done.stderr)
