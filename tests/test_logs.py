"""Logs that are huge, grow, and are not text: read in blocks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from raylaunch.agent import attempt_files
from raylaunch.controller.store import logs
from raylaunch.errors import NotFoundError, SpecError


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "rank-0.log"


def tail(log: Path, lines: int, **options: int) -> bytes:
    return attempt_files.read(log, offset=attempt_files.tail_offset(log, lines, **options)).data


def texts(log: Path, pattern: str, **options: bool | int) -> list[str]:
    return [match.text for match in logs.search(log, logs.LogSearch(pattern, **options)).matches]  # type: ignore[arg-type] # one helper


def every(log: Path, pattern: str, *, limit: int, max_bytes: int) -> Iterator[int]:
    offset, more = 0, True
    while more:
        found = logs.search(log, logs.LogSearch(pattern, offset=offset, limit=limit), max_bytes=max_bytes)
        yield from (match.offset for match in found.matches)
        assert found.next_offset > offset or not found.more
        offset, more = found.next_offset, found.more


# -- reading ---------------------------------------------------------------------------------------------------------


def test_a_log_that_does_not_exist_yet_is_an_empty_one(log: Path) -> None:
    assert attempt_files.read(log, offset=0) == attempt_files.Slice(0, b"", 0)
    assert attempt_files.tail_offset(log, 10) == 0
    assert texts(log, "x") == []


def test_reading_on_from_next_gives_every_byte_once(log: Path) -> None:
    content = bytes(range(256)) * 9000
    log.write_bytes(content)
    read, offset = b"", 0
    while piece := attempt_files.read(log, offset=offset, limit=100_000):
        if not piece.data:
            break
        read, offset = read + piece.data, piece.next
    assert read == content


def test_an_offset_beyond_the_end_is_the_end(log: Path) -> None:
    log.write_bytes(b"abc")
    assert attempt_files.read(log, offset=99) == attempt_files.Slice(3, b"", 3)


def test_one_read_is_never_more_than_its_limit(log: Path) -> None:
    log.write_bytes(b"x" * (3 * attempt_files.READ_BYTES))
    assert len(attempt_files.read(log, offset=0, limit=10 * attempt_files.READ_BYTES).data) == attempt_files.READ_BYTES


# -- the tail --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "lines", "expected"),
    [
        (b"a\nb\nc\n", 2, b"b\nc\n"),
        (b"a\nb\nc", 2, b"b\nc"),
        (b"a\nb\n", 5, b"a\nb\n"),
        (b"a\n\n\n", 2, b"\n\n"),
        (b"a\n", 0, b""),
        (b"\n", 1, b"\n"),
        (b"10%\r20%\r30%\ndone\n", 2, b"10%\r20%\r30%\ndone\n"),
        (b"\xff\xfe\n\x00\n", 1, b"\x00\n"),
    ],
)
def test_the_tail_begins_at_the_last_lines(log: Path, content: bytes, lines: int, expected: bytes) -> None:
    log.write_bytes(content)
    assert tail(log, lines) == expected


def test_the_tail_is_right_across_the_edges_of_blocks(log: Path) -> None:
    lines = [f"line {number:05} {'x' * (number % 97)}\n".encode() for number in range(20_000)]
    log.write_bytes(b"".join(lines))
    for wanted in (1, 999, 1000, 1001, 5000):
        offset = attempt_files.tail_offset(log, wanted)
        assert log.read_bytes()[offset:] == b"".join(lines[-wanted:])


def test_the_tail_of_a_line_of_ten_megabytes_begins_where_it_stops_looking(log: Path) -> None:
    log.write_bytes(b"first\n" + b"x" * 10_000_000 + b"\n")
    assert attempt_files.tail_offset(log, 1) == log.stat().st_size - attempt_files.TAIL_BYTES


def test_a_tail_that_stops_looking_does_not_begin_inside_a_character(log: Path) -> None:
    log.write_bytes("ä€".encode() * 100)
    assert tail(log, 1, max_back=4) == "€".encode()


def test_the_last_lines_of_a_gigabyte_leave_memory_flat(log: Path) -> None:
    with log.open("wb") as file:
        file.truncate(1 << 30)
        file.seek(0, 2)
        file.write(b"\n" + b"".join(b"line %d\n" % number for number in range(1000)))
    program = (
        "import resource, sys; from pathlib import Path; from raylaunch.agent import attempt_files\n"
        "from raylaunch.controller.store import logs\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; path = Path(sys.argv[1])\n"
        "offset = attempt_files.tail_offset(path, 1000)\n"
        "assert attempt_files.read(path, offset=offset).data[:7] == b'line 0\\n'\n"
        "offset, more = 0, True\n"
        "while more:\n"
        "    found = logs.search(path, logs.LogSearch('line 999', offset=offset))\n"
        "    offset, more = found.next_offset, found.more\n"
        "assert len(found.matches) == 1\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(log)], capture_output=True, text=True, check=True)
    kib = int(done.stdout) * (1 if sys.platform.startswith("linux") else 1 / 1024)
    assert kib < 24 * 1024


# -- the search ------------------------------------------------------------------------------------------------------


def test_a_search_returns_lines_with_their_offsets(log: Path) -> None:
    log.write_bytes(b"loss 1\nacc 2\nloss 3\n")
    found = logs.search(log, logs.LogSearch("loss"))
    assert [(match.offset, match.text) for match in found.matches] == [(0, "loss 1"), (13, "loss 3")]
    assert (found.next_offset, found.more) == (20, False)


def test_a_search_may_ignore_case_or_take_a_regular_expression(log: Path) -> None:
    log.write_bytes("Error: a.b\nerror: axb\nÄrger\n".encode())
    assert texts(log, "a.b") == ["Error: a.b"]
    assert texts(log, "error", ignore_case=True) == ["Error: a.b", "error: axb"]
    assert texts(log, r"^error: a\wb$", regex=True) == ["error: axb"]
    assert texts(log, "ärger", ignore_case=True) == ["Ärger"]


def test_a_search_continues_where_it_stopped_and_finds_each_line_once(log: Path) -> None:
    lines = [b"needle\n" if number % 1000 == 0 else b"hay %d\n" % number for number in range(400_000)]
    log.write_bytes(b"".join(lines))
    expected = [at for at, line in zip(_offsets(lines), lines, strict=True) if line == b"needle\n"]
    assert list(every(log, "needle", limit=37, max_bytes=logs.SEARCH_BYTES)) == expected
    assert list(every(log, "needle", limit=100_000, max_bytes=500_000)) == expected


def _offsets(lines: list[bytes]) -> Iterator[int]:
    offset = 0
    for line in lines:
        yield offset
        offset += len(line)


def test_of_a_progress_bar_only_the_rewriting_that_matches_is_shown(log: Path) -> None:
    log.write_bytes(b"10%|#   |\r50%|##  |\r100%|####|\nnext\n")
    assert texts(log, "50%") == ["50%|##  |"]


def test_bytes_that_are_not_text_and_very_long_lines_are_searched_and_shown_short(log: Path) -> None:
    log.write_bytes(b"\xff\xfe needle \x80\n" + b"x" * 10_000_000 + b" needle " + b"y" * 10_000_000 + b"\nneedle\n")
    first, long, last = texts(log, "needle")
    assert first == "�� needle �"
    assert len(long) < 2100
    assert last == "needle"


def test_an_empty_pattern_and_a_wrong_expression_are_refused(log: Path) -> None:
    with pytest.raises(SpecError, match="the pattern to search for is empty"):
        logs.search(log, logs.LogSearch(""))
    with pytest.raises(SpecError) as raised:
        logs.search(log, logs.LogSearch("(", regex=True))
    assert raised.value.message == "'(' is not a supported regular expression: missing ): ("


@pytest.mark.parametrize("pattern", ["(?=loss)x", "(?<!loss)x", r"(a)\1"])
def test_what_the_engine_of_expressions_lacks_is_refused_with_what_there_is(
    log: Path, pattern: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SpecError) as raised:
        logs.search(log, logs.LogSearch(pattern, regex=True))
    assert "no lookaround" in raised.value.hint
    assert "backreference" in raised.value.hint
    assert capfd.readouterr() == ("", "")


def test_a_pattern_of_many_characters_or_of_half_a_character_is_refused(log: Path) -> None:
    with pytest.raises(SpecError, match="1001 characters"):
        logs.search(log, logs.LogSearch("a" * 1001, regex=True))
    with pytest.raises(SpecError, match="surrogate"):
        logs.search(log, logs.LogSearch("\ud800"))
    with pytest.raises(SpecError, match="is not a supported regular expression"):
        logs.search(log, logs.LogSearch("((((a{100}){100}){100}){100}){100}", regex=True))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*b", "(.*)*x", "a?" * 30 + "a" * 30 + "$"])
def test_no_expression_takes_longer_than_its_text(log: Path, pattern: str) -> None:
    log.write_bytes((b"a" * 40 + b"!\n") * 2000)  # Python's own engine does not end in a lifetime
    assert texts(log, pattern, regex=True) == []


def test_a_rank_without_a_log_is_answered_with_those_that_have_one(tmp_path: Path) -> None:
    folder = tmp_path / "attempt-1" / "logs"
    folder.mkdir(parents=True)
    for rank in (0, 1, 10):
        (folder / f"rank-{rank}.log").touch()
    logs.check_rank("digits-a", tmp_path, attempt=1, rank=10)
    with pytest.raises(NotFoundError) as raised:
        logs.check_rank("digits-a", tmp_path, attempt=1, rank=7)
    assert str(raised.value) == ("attempt 1 of digits-a has no log of rank 7\n  → it has logs of these ranks: 0, 1, 10")
