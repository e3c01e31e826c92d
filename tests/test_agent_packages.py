from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from raylaunch.agent.packages import COMPLETE, Packages
from raylaunch.contract import most_unpacked
from raylaunch.errors import NotFoundError, TransferError
from raylaunch.runner.unpack import unpack


def archive(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o755
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def archive_of(*members: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, int(kind == tarfile.REGTYPE)
    return info


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_package_in_pieces_is_unpacked_once_it_is_whole(tmp_path: Path) -> None:
    data = archive(train=b"print()")
    packages = Packages(tmp_path)
    assert packages.put(sha256(data), 0, len(data), data[:20]) == 20
    assert packages.have(sha256(data)) == 20
    with pytest.raises(NotFoundError):
        packages.path(sha256(data))
    assert packages.put(sha256(data), 20, len(data), data[20:]) == COMPLETE
    assert (packages.path(sha256(data)) / "train").read_bytes() == b"print()"
    assert (packages.path(sha256(data)) / "train").stat().st_mode & 0o100


def test_a_piece_that_does_not_fit_changes_nothing_and_reports_where_to_continue(tmp_path: Path) -> None:
    data = archive(train=b"print()")
    packages = Packages(tmp_path)
    packages.put(sha256(data), 0, len(data), data[:20])
    assert packages.put(sha256(data), 0, len(data), data[:30]) == 20
    assert packages.put(sha256(data), 50, len(data), data[50:]) == 20


def test_a_damaged_package_is_refused_and_can_be_sent_again(tmp_path: Path) -> None:
    data = archive(train=b"print()")
    packages = Packages(tmp_path)
    with pytest.raises(TransferError, match="arrived damaged"):
        packages.put(sha256(data), 0, len(data), bytes(len(data)))
    assert packages.put(sha256(data), 0, len(data), data) == COMPLETE


def test_an_archive_cannot_write_outside_its_folder(tmp_path: Path) -> None:
    data = archive(**{"../../escaped": b"x"})
    with pytest.raises(TransferError, match="cannot be unpacked"):
        Packages(tmp_path / "root").put(sha256(data), 0, len(data), data)
    assert not list(tmp_path.rglob("escaped"))


def test_links_are_unpacked_as_links_wherever_they_lead(tmp_path: Path) -> None:
    data = archive_of(
        member("data", tarfile.SYMTYPE, "/raid/data"), member("lib/x", tarfile.SYMTYPE, "../y"), member("y")
    )
    packages = Packages(tmp_path)
    packages.put(sha256(data), 0, len(data), data)
    found = packages.path(sha256(data))
    assert (found / "data").readlink() == Path("/raid/data")
    assert (found / "lib" / "x").read_bytes() == b"x"


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    link = member("a", tarfile.SYMTYPE, str(outside))
    for members in (
        (link, member("a/escaped")),
        (link, member("a/escaped", tarfile.SYMTYPE, "/etc/passwd")),
        (link, member("a/escaped", tarfile.DIRTYPE)),
        (link, member("a")),
        (member("a"), member("a")),
        (member("a"), member("a/b")),
        (member("b"), member("a", tarfile.LNKTYPE, "b")),
        (member("a", tarfile.FIFOTYPE),),
    ):
        data = archive_of(*members)
        with pytest.raises(TransferError, match="cannot be unpacked"):
            Packages(tmp_path / "root").put(sha256(data), 0, len(data), data)
        assert list(outside.iterdir()) == []


def test_a_name_that_is_no_checksum_reaches_no_path(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        Packages(tmp_path).have("../../etc")


def unpacked(tmp_path: Path, data: bytes, **limits: int) -> str:
    """Unpack an archive within limits; return why it was refused, or nothing."""
    (tmp_path / "package").write_bytes(data)
    (tmp_path / "folder").mkdir()
    try:
        unpack(tmp_path / "package", tmp_path / "folder", **limits)
    except tarfile.TarError as error:
        return str(error)
    return ""


def test_a_small_package_that_unpacks_to_very_much_is_refused_before_it_is_written(tmp_path: Path) -> None:
    data = archive(zeros=bytes(50_000_000))
    assert len(data) < 300_000
    assert unpacked(tmp_path, data, max_bytes=1_000_000) == "it unpacks to more than 1000000 bytes"
    assert sum(path.stat().st_size for path in (tmp_path / "folder").iterdir()) <= 1_000_000


def test_a_package_of_300_kb_does_not_unpack_to_300_mb() -> None:
    assert most_unpacked(300_000) < 300_000_000
    assert most_unpacked(50_000_000) > 5_000_000_000


def test_a_package_of_very_many_files_is_refused(tmp_path: Path) -> None:
    data = archive(**{f"f{n}": b"" for n in range(11)})
    assert unpacked(tmp_path, data, max_files=10) == "it has more than 10 files"


def test_a_header_that_is_too_large_for_memory_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("f")
        info.pax_headers = {"comment": "x" * 20_000_000}
        tar.addfile(info)
    assert "header" in unpacked(tmp_path, buffer.getvalue())


def test_a_file_of_holes_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("f")
        info.pax_headers = {
            "GNU.sparse.major": "0",
            "GNU.sparse.minor": "1",
            "GNU.sparse.size": str(1 << 50),
            "GNU.sparse.map": "0,0",
        }
        tar.addfile(info)
    assert "is neither file, folder nor symbolic link" in unpacked(tmp_path, buffer.getvalue())


def test_a_package_within_the_limits_is_unpacked(tmp_path: Path) -> None:
    assert unpacked(tmp_path, archive(f=b"x" * 100_000), max_bytes=200_000, max_files=1) == ""
    assert (tmp_path / "folder" / "f").stat().st_size == 100_000


def test_a_package_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    for data in (b"not gzip", gzip.compress(b"not tar"), archive(f=b"x" * 9000)[:60]):
        with pytest.raises(TransferError, match="cannot be unpacked"):
            Packages(tmp_path).put(sha256(data), 0, len(data), data)
        assert list((tmp_path / "packages").iterdir()) == []
