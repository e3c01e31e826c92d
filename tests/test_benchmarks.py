"""The benchmarks: that they can still run, and that page, figures and bars tell the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.bars import BARS, Bar
from benchmarks.measure import Result, compared, in_turns, machine, paired_ratio
from benchmarks.report import PAGE, RESULTS, Entry, entry, keep, load, met, with_table
from benchmarks.run import NAMES

ROOT = Path(__file__).resolve().parents[1]
PROMISED = {
    "list": ("ratio", 0.45),
    "first_line": ("ratio", 1.3),
    "log_tail": ("ratio", 0.01),
    "followed_line": ("figure", 0.3),
    "page_10000": ("figure", 50),
    "controller_memory": ("figure", 200),
    "queue_end": ("figure", 20),
    "queue_list": ("figure", 100),
    "queue_show": ("figure", 100),
    "wandb_overhead": ("ratio", 1.02),
    "mcp_start": ("ratio", 1.25),
    "mcp_call": ("excess", 10),
    "mcp_tools_list": ("figure", 9),
    "tunnel_verb": ("excess", 50),
    "probe_and_plan": ("ratio", 2.0),
    "up_healthy": ("figure", 5),
    "up_fresh": ("ratio", 1.0),
    "download": ("ratio", 1.0),
    "push_wheels": ("ratio", 1 / 0.9),
    "push_wheels_to_four": ("ratio", 1 / 0.9),
    "push_wheels_far": ("ratio", 1.0),
}
"""What the project has promised: seconds, milliseconds, megabytes and kilobytes, or ratios."""


def result(name: str = "list", figure: float = 0.5, peer: float | None = 2.0) -> Result:
    return Result(name, figure, "s", "How it was measured.", peer="its peer", peer_figure=peer)


def page(tmp_path: Path) -> Path:
    """A page with room for the table."""
    made = tmp_path / "page.md"
    text = PAGE.read_text(encoding="utf-8")
    made.write_text(with_table(text, []), encoding="utf-8")
    return made


def test_every_promised_bar_has_a_benchmark() -> None:
    assert {name: (bar.on, bar.most) for name, bar in BARS.items() if bar.promised} == PROMISED
    assert BARS.keys() <= set(NAMES)


def test_each_figure_that_is_kept_has_a_benchmark_and_each_bar_a_figure() -> None:
    kept = {found["name"] for found in load(RESULTS)}
    assert kept <= set(NAMES)
    assert BARS.keys() <= kept


def test_the_page_shows_the_stored_figures() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert with_table(text, load(RESULTS)) == text, "make bench writes both; after a merge: see benchmarks/report.py"


def test_stored_figures_are_judged_by_the_current_bars() -> None:
    for found in load(RESULTS):
        bar = BARS.get(found["name"])
        assert (found["bar"] is None) == (bar is None)
        if bar is not None and found["bar"] is not None:
            assert (found["bar"]["on"], found["bar"]["most"]) == (bar.on, bar.most)


def test_a_name_of_this_machine_is_kept_nowhere() -> None:
    assert set(machine()) == {"cpu", "cores", "memory_gib", "os", "python"}


def test_running_one_by_name_changes_only_its_entry(tmp_path: Path) -> None:
    file, shown = tmp_path / "results.json", page(tmp_path)
    keep([result("list"), result("mcp_start")], results_file=file, page=shown)
    before = {found["name"]: found for found in load(file)}
    keep([result("list", figure=1.0)], results_file=file, page=shown)
    after = {found["name"]: found for found in load(file)}
    assert after["mcp_start"] == before["mcp_start"]
    assert (before["list"]["ratio"], after["list"]["ratio"]) == (0.25, 0.5)
    assert (before["list"]["met"], after["list"]["met"]) == (True, False)
    assert "| list | 1 s | 2 s | 0.500 | ratio ≤ 0.45 (goal 0.25) | **not met** |" in shown.read_text()


@pytest.mark.parametrize(
    ("bar", "figure", "peer", "within"),
    [
        (Bar("ratio", 0.5), 1.0, 2.0, True),
        (Bar("ratio", 0.5), 1.1, 2.0, False),
        (Bar("figure", 0.3), 0.3, None, True),
        (Bar("figure", 0.3), 0.31, 0.1, False),
        (Bar("excess", 10), 14.0, 5.0, True),
        (Bar("excess", 10), 16.0, 5.0, False),
    ],
)
def test_a_bar_limits_the_ratio_the_figure_or_the_excess_over_the_peers(
    bar: Bar, figure: float, peer: float | None, *, within: bool
) -> None:
    assert bar.met(result(figure=figure, peer=peer)) is within


def test_a_bar_on_a_ratio_without_a_peer_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="no peer"):
        met(result(peer=None))


def test_pairs_alternate_and_each_side_starts_equally_often() -> None:
    calls: list[str] = []

    def side(name: str, figure: float) -> float:
        calls.append(name)
        return figure

    pairs = in_turns(lambda: side("ours", 1.0), lambda: side("theirs", 2.0), rounds=4, warm=1)
    assert pairs == [(1.0, 2.0)] * 4
    assert ["".join(word[0] for word in calls[n : n + 2]) for n in range(0, 10, 2)] == ["ot", "to", "ot", "to", "ot"]


def test_the_ratio_is_that_of_pairs_and_its_interval_holds_it() -> None:
    pairs = [(1.0, 10.0), (2.0, 10.0), (30.0, 100.0), (4.0, 10.0), (500.0, 1000.0)]
    middle, low, high = paired_ratio(pairs)
    assert middle == pytest.approx(0.3)
    assert 0.1 <= low < middle < high <= 0.5
    assert paired_ratio(pairs) == (middle, low, high)
    found = compared("x", pairs, unit="s", peer="p", how="h")
    assert (found.figure, found.peer_figure, found.ratio) == (4.0, 10.0, middle)


def test_an_entry_has_all_required_fields() -> None:
    found = entry(result())
    assert set(found) == set(Entry.__annotations__)
    assert {"name", "figure", "unit", "peer", "peer_figure", "ratio", "bar", "met", "machine", "date"} <= set(found)


@pytest.mark.slow
def test_a_benchmark_runs_and_its_page_shows_the_result(tmp_path: Path) -> None:
    file, shown = tmp_path / "results.json", page(tmp_path)
    command = [sys.executable, "-m", "benchmarks.run", "pack_size", "pack_time", "--results", str(file)]
    done = subprocess.run(
        [*command, "--page", str(shown), "--quick"], cwd=ROOT, capture_output=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.count(b"pack_") == 2
    assert not file.exists()


@pytest.mark.slow
def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.run", "lists"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 2
    assert "there is no benchmark 'lists'; there are: list, " in done.stderr


def test_figures_are_kept_as_json_that_others_can_read(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    keep([result()], results_file=file, page=page(tmp_path))
    (found,) = json.loads(file.read_text())
    assert (found["figure"], found["peer_figure"], found["bar"]["most"]) == (0.5, 2.0, 0.45)
