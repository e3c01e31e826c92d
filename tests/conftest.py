"""What all tests share: a short home for clusters, what a skip means, and how many long tests were left out.

With ``RAYLAUNCH_TEST_ALL=1`` (continuous integration) a skipped test is a failed one, so that a level that silently
stopped running is noticed. Only what not every machine can have may be missing even then; such a skip's reason begins
with one of `MAY_BE_MISSING`.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = [f"support.{name}" for name in ("cluster", "ray_head", "api", "agent", "standing", "bare_host")]

settings.register_profile("raylaunch", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("raylaunch")  # by default an example of more than 200 ms fails, as on a busy machine any may

MAY_BE_MISSING = (
    "needs PyTorch",
    "needs a GPU",
    "needs a Python 3.",
    "needs Python 3.",
    "needs IPv6",
    "needs systemd-analyze",
    "needs systemd-nspawn",
)
_DURATIONS = Path(__file__).parent / "data" / "durations.json"
"""Seconds by test file, as ``make test ARGS=--record-durations`` measured them; that of an unknown file is none."""
_WORLDS = {
    "broken: Cluster": "the files that break a cluster",
    "plain_ray: RayHeadRunning": "the files that share a plain Ray",
    "cluster: Cluster": "the files that share a cluster",
}
"""By the fixture that files share: the name of their group, which one worker runs."""
_IN_ORDER = ("test_embedded_ray.py", "test_cluster_disasters.py", "test_cluster_changes.py")
"""Files of one group that depend on their order: the last one ends the cluster."""
_SECOND_TRIES = 2
"""How many tests may pass at their second try only, before the run has failed."""
ALL = os.environ.get("RAYLAUNCH_TEST_ALL", "") not in {"", "0"}

_Report = pytest.TestReport | pytest.CollectReport


def _failed_if_skipped(report: _Report) -> None:
    if not (ALL and report.skipped) or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    if not reason.startswith(MAY_BE_MISSING):
        report.outcome = "failed"
        report.longrepr = f"RAYLAUNCH_TEST_ALL=1 and this was skipped: {reason}"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that records how long each file takes."""
    parser.addoption("--record-durations", action="store_true", help="write how long each file takes, for its order")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the groups of files that take longest first; let a test of real processes fail twice before it counts.

    A group belongs to one worker, so a long one at the end would let the others wait. Each first failure is shown in
    the summary: tests of real processes wait with limits, and a machine that is busy may exceed any.
    """
    for item in items:
        if any(item.get_closest_marker(name) for name in ("ray", "wandb", "machines")):
            item.add_marker(pytest.mark.flaky(reruns=1))
    known: dict[str, float] = json.loads(_DURATIONS.read_text(encoding="utf-8")) if _DURATIONS.exists() else {}
    seconds: Counter[str] = Counter()
    for path in {item.path for item in items}:
        seconds[_group(path)] += int(1000 * known.get(path.name, 0))
    items.sort(key=lambda item: (-seconds[group := _group(item.path)], group, _rank(item.path.name)))


def _rank(name: str) -> int:
    return _IN_ORDER.index(name) if name in _IN_ORDER else -1


@functools.cache
def _group(path: Path) -> str:
    """Return the group of a file; decided by its text, as workers alone know the fixtures."""
    text = path.read_text(encoding="utf-8")
    return next((group for fixture, group in _WORLDS.items() if _shares(fixture, text)), path.name)


def _shares(fixture: str, text: str) -> bool:
    return fixture in text and f"def {fixture.partition(':')[0]}(" not in text and "mark.ray" in text


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:  # noqa: ANN401 -- xdist ships no types
    """Give a worker whole files, and one of them all files of a group: what they share is started once."""
    from xdist.scheduler import LoadFileScheduling  # type: ignore[import-untyped]  # noqa: PLC0415 -- only with xdist

    class ByGroup(LoadFileScheduling):  # type: ignore[misc]  # xdist ships no types
        def _split_scope(self, nodeid: str) -> str:
            return _group(config.rootpath / nodeid.partition("::")[0])

        def _reschedule(self, node: Any) -> None:  # noqa: ANN401 -- xdist ships no types
            # A worker that replaces one that crashed has collected nothing yet; xdist would end the whole run.
            if node in self.registered_collections:
                super()._reschedule(node)

    return ByGroup(config, log) if config.getoption("dist") == "loadfile" else None


_SPENT: Counter[str] = Counter()
"""Milliseconds by file."""


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up how long each file takes."""
    _SPENT[report.nodeid.partition("::")[0].rpartition("/")[2]] += round(1000 * report.duration)


def _record_durations() -> None:
    known = json.loads(_DURATIONS.read_text(encoding="utf-8")) if _DURATIONS.exists() else {}
    known |= {name: spent / 1000 for name, spent in _SPENT.items()}
    kept = {name: round(known[name], 1) for name in sorted(known) if (Path(__file__).parent / name).exists()}
    _DURATIONS.write_text(json.dumps(kept, indent=0) + "\n", encoding="utf-8")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a test's skip into a failure where everything must run."""
    report = yield
    _failed_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Turn a whole module's skip into a failure where everything must run."""
    report = yield
    _failed_if_skipped(report)
    return report


_LEFT_OUT = pytest.StashKey[set[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Begin the count of long tests that a run leaves out; let Ctrl-C be heard by what tests start.

    A shell lets what it runs in the background ignore it, and all that is started from there.
    """
    config.stash[_LEFT_OUT] = set()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    """Count the long tests that this run leaves out."""
    for item in items:
        if item.get_closest_marker("long"):
            item.config.stash[_LEFT_OUT].add(item.nodeid)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, None, None]:
    """Fail a run with many second tries; report to the process that started the workers what one has left out."""
    if session.exitstatus == pytest.ExitCode.OK and len(_tried_again(session.config)) > _SECOND_TRIES:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if session.config.getoption("record_durations") and not hasattr(session.config, "workeroutput"):
        _record_durations()
    yield
    if hasattr(session.config, "workeroutput"):
        left_out = session.config.stash[_LEFT_OUT]
        session.config.workeroutput["left_out"] = sorted(left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:  # noqa: ANN401 -- a class of xdist, which ships no types
    """Take over what a worker has left out; each has collected all tests."""
    node.config.stash[_LEFT_OUT].update(getattr(node, "workeroutput", {}).get("left_out", ()))


def _tried_again(config: pytest.Config) -> set[str]:
    """Return the tests that ran a second time; none in a worker, which has no terminal."""
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    return {report.nodeid for report in terminal.stats.get("rerun", ())} if terminal else set()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say why tests failed that passed when run again, and how many long tests were left out.

    What did not run is not what passed, and a test that passes at the second try has something to tell as well.
    """
    for report in terminalreporter.stats.get("rerun", ()):
        crash = getattr(report.longrepr, "reprcrash", None)
        where = f"{Path(crash.path).name}:{crash.lineno}: {crash.message}" if crash else str(report.longrepr)
        terminalreporter.write_line(f"run again: {report.nodeid} ({report.when}): {where}")
    if len(again := _tried_again(config)) > _SECOND_TRIES:
        terminalreporter.write_line(f"FAILED: {len(again)} tests needed a second try, more than {_SECOND_TRIES}")
    if left_out := config.stash[_LEFT_OUT]:
        terminalreporter.write_line(f"left out: {len(left_out)} tests marked long; `make test-machines` runs them")


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A raylaunch home of the test's own, short because Unix socket paths end at 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="rl-", dir="/tmp"))
    monkeypatch.setenv("RAYLAUNCH_HOME", str(folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
