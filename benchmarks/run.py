"""Measure raylaunch and its peers, print the ratios, and keep them in results.json and docs/benchmarks.md.

``make bench``, or ``make bench ARGS='NAME …'``. Exit status 1 when a bar is not met, or a figure could not be taken.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import (
    bringing_up,
    command_line,
    downloading,
    first_line,
    logs,
    mcp,
    packing,
    probing,
    pushing,
    queueing,
    records,
    through_tunnel,
    tls,
    tracking,
)
from benchmarks.measure import Result, Skipped
from benchmarks.report import PAGE, RESULTS, entry, keep, line, met
from benchmarks.workshop import Workshop


class Benchmark(NamedTuple):
    """A function, and the names of the results that it yields."""

    names: tuple[str, ...]
    measure: Callable[[Workshop], Iterator[Result]]


BENCHMARKS = (
    Benchmark(("list",), command_line.list_jobs),
    Benchmark(("list_help",), command_line.list_help),
    Benchmark(("first_line", "first_line_shown"), first_line.run),
    Benchmark(("log_tail",), logs.tail),
    Benchmark(("followed_line",), logs.followed_line),
    Benchmark(("page_10000", "controller_memory"), records.run),
    Benchmark(("queue_end",), queueing.end),
    Benchmark(("queue_list", "queue_show"), queueing.answers),
    Benchmark(("wandb_overhead",), tracking.run),
    Benchmark(("mcp_start",), mcp.start),
    Benchmark(("mcp_call",), mcp.call),
    Benchmark(("mcp_tools_list",), mcp.tools_list),
    Benchmark(("pack_time", "pack_size"), packing.run),
    Benchmark(("tunnel_verb",), through_tunnel.run),
    Benchmark(("probe_and_plan",), probing.run),
    Benchmark(("up_healthy",), bringing_up.healthy),
    Benchmark(("up_fresh",), bringing_up.fresh),
    Benchmark(("download",), downloading.run),
    Benchmark(("tls_submission", "tls_log"), tls.run),
    Benchmark(("push_wheels", "push_wheels_to_four", "push_wheels_far"), pushing.run),
)
NAMES = tuple(name for benchmark in BENCHMARKS for name in benchmark.names)


def main() -> int:
    """Run the named benchmarks, or all."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to measure; by default all: {', '.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help="a few small rounds, to see that all run; keeps nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where figures are kept")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page whose table is written from them")
    given = parser.parse_args()
    wanted = given.names or NAMES
    if unknown := [name for name in wanted if name not in NAMES]:
        parser.error(f"there is no benchmark {unknown[0]!r}; there are: {', '.join(NAMES)}")
    results = measured(wanted, quick=given.quick)
    if not given.quick:
        keep(results, results_file=given.results, page=given.page)
    missing = set(wanted) - {result.name for result in results}
    return 0 if not missing and (given.quick or all(met(result) is not False for result in results)) else 1


def measured(wanted: Sequence[str], *, quick: bool) -> list[Result]:
    """Measure what is wanted, and print each result as it comes."""
    results: list[Result] = []
    with Workshop(quick=quick) as shop:
        for benchmark in BENCHMARKS:
            if set(benchmark.names).isdisjoint(wanted):
                continue
            try:
                for result in benchmark.measure(shop):
                    if result.name in wanted:
                        results.append(result)
                        print(line(entry(result)), flush=True)
            except Skipped as reason:
                print(f"{', '.join(benchmark.names)}: not measured: {reason}", file=sys.stderr, flush=True)
    return results


if __name__ == "__main__":
    sys.exit(main())
