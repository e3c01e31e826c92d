"""Measure raylaunch beside its peers, print the ratios, and keep them in benchmarks/results.json.

``make bench``, or ``python -m benchmarks.run [NAME …]``. Exit status 1 when a ratio exceeds its bar.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

from benchmarks import packing, start_up
from benchmarks.measure import Result, Skipped, machine

BENCHMARKS = {"packing": packing.run, "start_up": start_up.run}
RESULTS = Path(__file__).parent / "results.json"


def _measured(names: list[str]) -> list[Result]:
    results: list[Result] = []
    for name in names:
        with _skips_said(name):
            for result in BENCHMARKS[name]():
                results.append(result)
                print(_line(result), flush=True)
    return results


@contextlib.contextmanager
def _skips_said(name: str) -> Iterator[None]:
    try:
        yield
    except Skipped as reason:
        print(f"{name}: skipped: {reason}", file=sys.stderr)


def _line(result: Result) -> str:
    figures = f"{result.figure:.3f} {result.unit}, {result.peer}: {result.peer_figure:.3f} {result.unit}"
    verdict = "held" if result.held else "EXCEEDED"
    return f"{result.name}: {figures}, ratio {result.ratio:.2f} (bar {result.bar:.2f}, {verdict})"


def _keep(results: list[Result]) -> None:
    """Write the results, in place of earlier ones of the same name."""
    kept = {row["name"]: row for row in json.loads(RESULTS.read_text(encoding="utf-8"))} if RESULTS.exists() else {}
    today = datetime.now(tz=timezone.utc).date().isoformat()
    for result in results:
        kept[result.name] = {
            "name": result.name,
            "figure": round(result.figure, 4),
            "unit": result.unit,
            "peer": result.peer,
            "peer_figure": round(result.peer_figure, 4),
            "ratio": round(result.ratio, 3),
            "bar": result.bar,
            "machine": machine(),
            "date": today,
        }
    RESULTS.write_text(json.dumps(list(kept.values()), indent=2) + "\n", encoding="utf-8")


def main() -> int:
    """Run the named benchmarks, or all."""
    names = sys.argv[1:] or list(BENCHMARKS)
    if unknown := [name for name in names if name not in BENCHMARKS]:
        print(f"there is no benchmark {unknown[0]!r}; there are: {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    results = _measured(names)
    _keep(results)
    return 0 if all(result.held for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
