"""Figures as they are kept in results.json, and as the table of docs/benchmarks.md is written from it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TypedDict

from benchmarks.bars import BARS, Bar
from benchmarks.measure import Result, machine

RESULTS = Path(__file__).parent / "results.json"
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
_BEGIN, _END = "<!-- written by make bench: begin -->", "<!-- written by make bench: end -->"


class BarEntry(TypedDict):
    """A bar as it is kept."""

    on: str
    most: float
    goal: float | None
    promised: bool


class Entry(TypedDict):
    """One result as it is kept."""

    name: str
    how: str
    figure: float
    unit: str
    peer: str
    peer_figure: float | None
    ratio: float | None
    interval: list[float] | None
    """The 95 % confidence interval of the ratio, where it was taken in pairs."""
    bar: BarEntry | None
    met: bool | None
    machine: dict[str, str | int]
    date: str


def entry(result: Result) -> Entry:
    """Return a result as it is kept."""
    bar = BARS.get(result.name)
    ratio = result.ratio
    return Entry(
        name=result.name,
        how=result.how,
        figure=_rounded(result.figure),
        unit=result.unit,
        peer=result.peer,
        peer_figure=None if result.peer_figure is None else _rounded(result.peer_figure),
        ratio=None if ratio is None else round(ratio, 4),
        interval=[round(end, 4) for end in result.paired[1:]] if result.paired else None,
        bar=BarEntry(on=bar.on, most=bar.most, goal=bar.goal, promised=bar.promised) if bar else None,
        met=met(result),
        machine=machine(),
        date=datetime.now(tz=timezone.utc).date().isoformat(),
    )


def met(result: Result) -> bool | None:
    """Return whether a result is within its bar; None when it has none."""
    bar = BARS.get(result.name)
    return None if bar is None else bar.met(result)


def line(found: Entry) -> str:
    """Return a result as a line for the terminal."""
    peer = f"; {found['peer']}: {_amount(found['peer_figure'], found['unit'])}" if found["peer"] else ""
    ratio = f"; ratio {_ratio(found)}" if found["ratio"] is not None else ""
    bar = f"; bar {_bar(found['bar'], found['unit'])}: {_verdict(found)}" if found["bar"] else ""
    return f"{found['name']}: {_amount(found['figure'], found['unit'])}{peer}{ratio}{bar}"


def keep(results: Iterable[Result], *, results_file: Path, page: Path) -> None:
    """Write results, in place of earlier ones of the same name, and the page's table from all of them."""
    known = {found["name"]: found for found in load(results_file)}
    known.update((result.name, entry(result)) for result in results)
    ordered = sorted(known.values(), key=lambda found: _order(found["name"]))
    results_file.write_text(json.dumps(ordered, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    text = page.read_text(encoding="utf-8")
    page.write_text(with_table(text, ordered), encoding="utf-8")


def load(results_file: Path) -> list[Entry]:
    """Return what is kept."""
    if not results_file.exists():
        return []
    found: list[Entry] = json.loads(results_file.read_text(encoding="utf-8"))
    return found


def with_table(page: str, found: Sequence[Entry]) -> str:
    """Return a page with the table between its marks written again."""
    head, _, rest = page.partition(_BEGIN)
    _, _, tail = rest.partition(_END)
    return f"{head}{_BEGIN}\n{table(found)}{_END}{tail}"


def table(found: Sequence[Entry]) -> str:
    """Return the table, what each figure is, and where it was measured."""
    rows = ["| | raylaunch | peer | ratio | bar | |", "|---|---|---|---|---|---|"]
    rows += [_row(each) for each in found]
    hows = [f"- **{each['name']}**: {each['how']}{_peer_of(each)}" for each in found]
    return "\n".join(["", *rows, "", *hows, "", *_machines(found), ""])


def _row(found: Entry) -> str:
    unit, bar = found["unit"], found["bar"]
    cells = [
        found["name"],
        _amount(found["figure"], unit),
        _amount(found["peer_figure"], unit),
        _ratio(found),
        _bar(bar, unit),
        _verdict(found),
    ]
    return f"| {' | '.join(cells)} |"


def _peer_of(found: Entry) -> str:
    return f" Peer: {found['peer']}." if found["peer"] else ""


def _machines(found: Sequence[Entry]) -> list[str]:
    """Name the machines and days; mostly it is one."""
    groups: dict[str, list[str]] = {}
    for each in found:
        groups.setdefault(_place(each["machine"], each["date"]), []).append(each["name"])
    if len(groups) == 1:
        return [f"Measured on {next(iter(groups))}."]
    return [f"- {', '.join(names)}: {place}" for place, names in groups.items()]


def _place(kind: Mapping[str, str | int], date: str) -> str:
    cpu = f"{kind['cpu']}, {kind['cores']} cores, {kind['memory_gib']} GiB"
    return f"{cpu}, {kind['os']}, Python {kind['python']}, {date}"


def _order(name: str) -> tuple[bool, int, str]:
    """Order as the bars are, what has none behind."""
    names = list(BARS)
    return name not in names, names.index(name) if name in names else 0, name


def _rounded(number: float) -> float:
    """Return a number with four digits that count."""
    return float(f"{number:.4g}")


def _amount(number: float | None, unit: str) -> str:
    return "" if number is None else f"{number:.3g} {unit}"


def _ratio(found: Entry) -> str:
    if found["ratio"] is None:
        return ""
    interval = found["interval"]
    digits = 4 if found["ratio"] < 0.1 else 3  # noqa: PLR2004 -- a ratio of 0.008 needs more digits
    around = f" ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})" if interval else ""
    return f"{found['ratio']:.{digits}f}{around}"


def _bar(bar: BarEntry | None, unit: str) -> str:
    if bar is None:
        return ""
    what = {"ratio": f"ratio ≤ {bar['most']:g}", "figure": f"≤ {bar['most']:g} {unit}"}
    text = what.get(bar["on"], f"≤ {bar['most']:g} {unit} above the peer")
    return f"{text} (goal {bar['goal']:g})" if bar["goal"] is not None else text


def _verdict(found: Entry) -> str:
    return "" if found["met"] is None else ("met" if found["met"] else "**not met**")


__all__ = ["PAGE", "RESULTS", "Bar", "Entry", "entry", "keep", "line", "load", "met", "table", "with_table"]
