"""Logs as jobs really write them: not text, endless lines, progress bars, floods, gigabytes."""

from __future__ import annotations

import hashlib
import json
import os
from functools import partial
from pathlib import Path

import pytest
from support.background import MB, Command, memory_of, started
from support.cluster import Cluster
from support.waiting import wait_until

from raylaunch.models.states import JobState

pytestmark = [pytest.mark.ray, pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")]

LONG = 10_000_000
WILD = f"""\
import sys
out = sys.stdout.buffer
out.write(b'not utf-8: \\xff\\xfe \\xc3( end\\n')
out.write(b'x' * {LONG} + b'\\n')
for step in range(1000):
    out.write(b'\\repoch 1: %3d/999 [####]' % step)
out.write(b'\\n')
out.write(b'\\x1b[2J\\x1b[31mred\\x1b[0m \\x07bell \\x00zero\\n')
out.write('größer als 你好 \\U0001f680\\n'.encode())
out.write(b'no end of line, and half a character: \\xe4\\xbd')
"""
WILD_BYTES = b"".join(
    [
        b"not utf-8: \xff\xfe \xc3( end\n",
        b"x" * LONG + b"\n",
        *(b"\repoch 1: %3d/999 [####]" % step for step in range(1000)),
        b"\n",
        b"\x1b[2J\x1b[31mred\x1b[0m \x07bell \x00zero\n",
        "größer als 你好 \U0001f680\n".encode(),
        b"no end of line, and half a character: \xe4\xbd",
    ]
)
WILD_SHOWN = [
    "not utf-8: �� �( end",
    "x" * 4000 + "… (10,000,000 bytes)",
    "epoch 1: 999/999 [####]",
    "red \\x07bell \\x00zero",
    "größer als 你好 \U0001f680",
    "no end of line, and half a character: �",
]


@pytest.fixture(scope="module")
def wild(cluster: Cluster) -> str:
    """Run a job that writes everything that is hard to show, and return its id."""
    job = cluster.python(WILD, "--name", "wild")
    assert cluster.ended(job).state is JobState.SUCCEEDED
    return job


def test_binary_output_is_displayed_safely_while_following(cluster: Cluster) -> None:
    result = cluster.cli("run", "--working-dir", "", "--", "python", "-c", WILD)
    assert result.status == 0, result.err
    assert result.out.splitlines() == WILD_SHOWN


@pytest.mark.parametrize("options", [("--offset", "0"), ("--offset", "0", "-f"), ("--tail", "1000")])
def test_binary_output_is_displayed_safely_afterwards(cluster: Cluster, wild: str, options: tuple[str, ...]) -> None:
    shown = cluster.good("logs", wild, *options).splitlines()
    if "--tail" in options:  # it looks back 8 MiB at most, so it begins within the endless line
        assert shown[0].startswith("x" * 4000 + "… (8,3")
        assert shown[1:] == WILD_SHOWN[2:]
    else:
        assert shown == WILD_SHOWN


def test_every_byte_is_kept_and_downloaded_as_it_was_written(cluster: Cluster, wild: str) -> None:
    assert cluster.log(wild) == WILD_BYTES
    cluster.good("get", wild, "--all", "--to", "wild-files")
    assert (cluster.work / "wild-files" / "attempt-1" / "logs" / "rank-0.log").read_bytes() == WILD_BYTES


def test_a_search_finds_lines_among_bytes_that_are_no_text(cluster: Cluster, wild: str) -> None:
    found = json.loads(cluster.good("logs", wild, "--search", "BELL", "-i", "--json"))
    assert [match["offset"] for match in found["matches"]] == [WILD_BYTES.index(b"\x1b[2J")]
    lines = cluster.good("logs", wild, "--search", r"epoch 1: +\d+7/999", "--regex").splitlines()
    number = WILD_BYTES[: WILD_BYTES.index(bytes([13]))].count(b"\n") + 1
    assert lines == [f"{number}:epoch 1:  17/999 [####]"]


def test_a_log_is_read_on_from_an_offset(cluster: Cluster, wild: str) -> None:
    offset = WILD_BYTES.index("größer".encode())
    assert cluster.good("logs", wild, "--since", str(offset)).splitlines() == WILD_SHOWN[4:]
    assert cluster.good("logs", wild, "--tail", "2").splitlines() == WILD_SHOWN[4:]


def test_rays_own_tool_shows_such_a_log_too(cluster: Cluster, wild: str) -> None:
    logs = cluster.ray("job", "logs", f"{wild}-1")
    assert logs.status == 0, logs.err
    assert "not utf-8: �� �( end" in logs.out
    assert "9983616 more bytes of this line are in the job's log: raylaunch logs" in logs.out
    assert "no end of line, and half a character: �" in logs.out


def test_a_hundred_thousand_lines_a_second_all_arrive_in_order(cluster: Cluster) -> None:
    code = (
        "import sys, time\n"
        "begun = time.monotonic()\n"
        "for tenth in range(30):\n"
        "    lines = [f'step {n} loss 0.123\\n' for n in range(tenth * 10000, tenth * 10000 + 10000)]\n"
        "    sys.stdout.write(''.join(lines))\n"
        "    sys.stdout.flush()\n"
        "    time.sleep(max(0, begun + (tenth + 1) / 10 - time.monotonic()))\n"
    )
    result = cluster.cli("run", "--working-dir", "", "--", "python", "-c", code)
    assert result.status == 0, result.err
    expected = "".join(f"step {n} loss 0.123\n" for n in range(300_000))
    assert (len(result.out), result.out[-30:]) == (len(expected), expected[-30:])
    assert result.out == expected


LARGE_MB = int(os.environ.get("RAYLAUNCH_TEST_LOG_MB", "300"))
FLAT = 60 * MB
FLOOD = (
    "import sys\n"
    "for block in range(int(sys.argv[1])):\n"
    "    sys.stdout.write(''.join(f'{block:06} {n:05} {\"y\" * 86}\\n' for n in range(10000)))\n"
)


@pytest.mark.long
def test_following_a_huge_log_and_reading_its_end_leave_memory_flat(cluster: Cluster) -> None:
    with started(cluster, "logs", cluster.python("print(1)"), "-f") as small:
        small.wait()
    memory = memory_of(cluster)
    job = cluster.submit("--working-dir", "", "--name", "huge", "--", "python", "-c", FLOOD, str(LARGE_MB))

    def ended(command: Command) -> bool:
        memory.look()
        return command.ended()

    with started(cluster, "logs", job, "-f", "--offset", "0", "--raw") as follower:
        wait_until(partial(ended, follower), 240, "the log has been followed to its end")
        followed = follower.sha256()
    lines = [f"{LARGE_MB - 1:06} {n:05} {'y' * 86}\n" for n in range(9000, 10000)]
    with started(cluster, "logs", job, "--tail", "1000") as tail:
        wait_until(partial(ended, tail), 60, "the end of the log is shown")
        assert tail.out.decode() == "".join(lines)
    written = hashlib.sha256()
    for block in range(LARGE_MB):
        written.update("".join(f"{block:06} {n:05} {'y' * 86}\n" for n in range(10_000)).encode())
    assert followed == written.hexdigest()
    grown = {
        **memory.growth(),
        "following client": follower.peak_bytes - small.peak_bytes,
        "client of the tail": tail.peak_bytes - small.peak_bytes,
    }
    assert not {name: size for name, size in grown.items() if size > FLAT}, grown
