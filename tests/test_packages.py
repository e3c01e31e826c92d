"""Packages arrive whole or not at all; secrets stay where they are."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest
from support.disks import fill, small_disk

from raylaunch.controller.store.packages import PackageBytes, PackageStore, WrongOffsetError
from raylaunch.controller.store.secrets import SecretStore
from raylaunch.errors import NotFoundError, SpecError, StorageError, TransferError

DATA = os.urandom(300_000)
SHA = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def packages(tmp_path: Path) -> PackageStore:
    return PackageStore(tmp_path / "packages")


def test_a_package_is_complete_once_all_its_bytes_are_here(packages: PackageStore) -> None:
    assert packages.have(SHA) == PackageBytes(0, complete=False)
    assert packages.put(SHA, offset=0, total=len(DATA), data=DATA[:100_000]) == PackageBytes(100_000, complete=False)
    assert not packages.complete(SHA)
    assert packages.put(SHA, offset=100_000, total=len(DATA), data=DATA[100_000:]) == PackageBytes(
        len(DATA), complete=True
    )
    assert packages.path(SHA).read_bytes() == DATA
    assert packages.names() == (SHA,)
    assert packages.bytes() == len(DATA)


def test_an_upload_continues_after_a_restart(tmp_path: Path, packages: PackageStore) -> None:
    packages.put(SHA, offset=0, total=len(DATA), data=DATA[:100_000])
    again = PackageStore(tmp_path / "packages")
    assert again.have(SHA) == PackageBytes(100_000, complete=False)
    assert again.put(SHA, offset=100_000, total=len(DATA), data=DATA[100_000:]).complete


def test_a_piece_at_the_wrong_place_is_refused_and_says_where_to_go_on(packages: PackageStore) -> None:
    packages.put(SHA, offset=0, total=len(DATA), data=DATA[:1000])
    with pytest.raises(WrongOffsetError) as raised:
        packages.put(SHA, offset=5000, total=len(DATA), data=DATA[5000:6000])
    assert raised.value.have == 1000
    assert str(raised.value) == f"package {SHA[:12]} continues at 1000, not at 5000\n  → send from 1000 on"
    assert packages.have(SHA).bytes == 1000


def test_bytes_that_are_not_what_the_name_says_are_refused_and_deleted(packages: PackageStore) -> None:
    wrong = b"x" + DATA[1:]
    with pytest.raises(TransferError) as raised:
        packages.put(SHA, offset=0, total=len(wrong), data=wrong)
    assert str(raised.value) == (
        f"package {SHA[:12]} arrived damaged: its bytes have the sha256 {hashlib.sha256(wrong).hexdigest()[:12]}\n"
        "  → it was deleted; submit again to send it again"
    )
    assert packages.have(SHA) == PackageBytes(0, complete=False)


def test_a_package_that_is_here_is_not_written_again(packages: PackageStore) -> None:
    packages.put(SHA, offset=0, total=len(DATA), data=DATA)
    assert packages.put(SHA, offset=0, total=len(DATA), data=DATA[:10]) == PackageBytes(len(DATA), complete=True)


def test_bytes_that_are_all_here_and_not_yet_verified_are_completed_by_an_empty_piece(packages: PackageStore) -> None:
    packages.put(SHA, offset=0, total=len(DATA) + 1, data=DATA)  # as a controller leaves them that died at this point
    assert packages.have(SHA) == PackageBytes(len(DATA), complete=False)
    assert packages.put(SHA, offset=len(DATA), total=len(DATA), data=b"") == PackageBytes(len(DATA), complete=True)


def test_several_who_send_the_same_package_at_once_make_it_whole(packages: PackageStore) -> None:
    piece = 10_000

    def send() -> None:
        have = packages.have(SHA)
        while not have.complete:
            try:
                data = DATA[have.bytes : have.bytes + piece]
                have = packages.put(SHA, offset=have.bytes, total=len(DATA), data=data)
            except WrongOffsetError as error:  # noqa: PERF203 -- losing a race is what this is about
                have = PackageBytes(error.have, complete=False) if error.have else packages.have(SHA)

    threads = [threading.Thread(target=send) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert packages.path(SHA).read_bytes() == DATA


@pytest.mark.parametrize("sha", ["../../x", "ABC", "a" * 63, ""])
def test_a_name_that_is_no_checksum_is_refused(packages: PackageStore, sha: str) -> None:
    with pytest.raises(SpecError, match="is not a sha256"):
        packages.have(sha)


def test_numbers_that_do_not_fit_together_are_refused(packages: PackageStore) -> None:
    with pytest.raises(SpecError, match="a piece of 10 bytes at 0 does not fit a package of 5 bytes"):
        packages.put(SHA, offset=0, total=5, data=b"x" * 10)


def test_a_missing_package_is_an_error(packages: PackageStore) -> None:
    with pytest.raises(NotFoundError, match=f"package {SHA[:12]} is not in the store"):
        packages.path(SHA)


def test_a_full_disk_loses_nothing_of_what_had_arrived(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kib=512) as disk:
        packages = PackageStore(disk / "packages")
        packages.put(SHA, offset=0, total=len(DATA), data=DATA[:100_000])
        ballast = fill(disk, but_kib=40)
        with pytest.raises(StorageError, match="No space left on device"):
            packages.put(SHA, offset=100_000, total=len(DATA), data=DATA[100_000:])
        assert packages.have(SHA) == PackageBytes(100_000, complete=False)
        ballast.unlink()
        assert packages.put(SHA, offset=100_000, total=len(DATA), data=DATA[100_000:]).complete


# -- secrets ---------------------------------------------------------------------------------------------------------


def test_secrets_are_kept_by_name_in_a_file_for_the_owner_alone(tmp_path: Path) -> None:
    secrets = SecretStore(tmp_path)
    secrets.put("WANDB_API_KEY", "one")
    secrets.put("HF_TOKEN", "two")
    assert SecretStore(tmp_path).names() == ("HF_TOKEN", "WANDB_API_KEY")
    assert (tmp_path / "secrets.json").stat().st_mode & 0o777 == 0o600
    secrets.remove("HF_TOKEN")
    assert secrets.names() == ("WANDB_API_KEY",)


def test_a_jobs_own_secrets_come_before_the_clusters_and_are_forgotten(tmp_path: Path) -> None:
    secrets = SecretStore(tmp_path)
    secrets.put("A", "cluster")
    secrets.put("B", "cluster")
    secrets.put_job("j", {"A": "own", "C": "own"})
    assert (tmp_path / "job_secrets" / "j.json").stat().st_mode & 0o777 == 0o600
    assert secrets.for_job("j", ["A", "B", "X"], "tom") == {"A": "own", "B": "cluster", "C": "own"}
    assert secrets.missing(["A", "C", "X"], given={"C": "own"}) == ("X",)
    secrets.forget_job("j")
    assert secrets.for_job("j", ["A"], "tom") == {"A": "cluster"}
    assert list((tmp_path / "job_secrets").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("A-B", "x", "'A-B' is not a valid name for a secret"),
        ("A", "", "the value of A is empty"),
        ("A", "x\0y", "the value of A contains a NUL byte"),
    ],
)
def test_a_secret_that_cannot_be_a_variable_is_refused_without_showing_it(
    tmp_path: Path, name: str, value: str, words: str
) -> None:
    with pytest.raises(SpecError) as raised:
        SecretStore(tmp_path).put(name, value)
    assert raised.value.message == words


def test_a_secret_that_is_not_there_cannot_be_removed(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as raised:
        SecretStore(tmp_path).remove("A")
    assert str(raised.value) == "no such secret: 'A'\n  → list them: raylaunch secret list"
