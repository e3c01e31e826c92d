"""What is not sent unless a person allows it: secrets, home folders, very large packages; and what `get` wrote."""

from __future__ import annotations

import os
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from raylaunch.client.packing import pack
from raylaunch.client.sensitive import FetchedFiles, allowed
from raylaunch.errors import SpecError, WithheldError
from raylaunch.files import Directory

KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAABG5vbmU=\n-----END OPENSSH PRIVATE KEY-----\n"


def tree(root: Path, files: Mapping[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def names(root: Path, *, allow: tuple[str, ...] = ()) -> list[str]:
    with pack(root, allowed(allow)) as packed, tarfile.open(fileobj=packed.file) as archive:
        return sorted(member.name for member in archive if not member.isdir())


def withheld(root: Path) -> tuple[str, ...]:
    with pytest.raises(WithheldError) as caught:
        pack(root)
    return caught.value.paths


@pytest.mark.parametrize(
    "name",
    [
        ".env",
        "deploy/.env.production",
        "id_rsa",
        "id_ed25519",
        ".git-credentials",
        ".pypirc",
        "kubeconfig",
        "credentials.json",
        ".aws/credentials",
        ".ssh/config",
        ".netrc",
    ],
)
def test_a_file_whose_name_says_that_it_holds_secrets_stops_the_submission(tmp_path: Path, name: str) -> None:
    tree(tmp_path, {"train.py": "", ".raylaunchignore": "!.netrc\n", name: "x"})
    assert withheld(tmp_path) == (name,)


@pytest.mark.parametrize(
    "content",
    [
        KEY,
        "-----BEGIN CERTIFICATE-----\nMII=\n-----END CERTIFICATE-----\n" + KEY.replace("OPENSSH ", ""),
        KEY.replace("OPENSSH", "RSA"),
        '{"type": "service_account", "private_key": "-----BEGIN PRIVATE KEY-----\\nMII="}',
        "PuTTY-User-Key-File-3: ssh-ed25519\n",
    ],
)
def test_a_private_key_stops_the_submission_whatever_its_file_is_called(tmp_path: Path, content: str) -> None:
    assert withheld(tree(tmp_path, {"train.py": "", "certs/server.pem": content})) == ("certs/server.pem",)


def test_what_only_looks_like_it_is_sent(tmp_path: Path) -> None:
    tree(
        tmp_path,
        {
            ".env.example": "TOKEN=\n",
            "ca.pem": "-----BEGIN CERTIFICATE-----\nMII=\n-----END CERTIFICATE-----\n",
            "id_rsa.pub": "ssh-rsa AAAA",
            "check.py": 'HEADER = "-----BEGIN RSA PRIVATE KEY-----"\n',
            "env.py": "",
        },
    )
    assert len(names(tmp_path)) == 5


def test_the_refusal_names_the_files_and_two_ways_on(tmp_path: Path) -> None:
    tree(tmp_path, {".env": "A=1", "key.pem": KEY})
    with pytest.raises(WithheldError) as caught:
        pack(tmp_path)
    assert caught.value.message == "these files look like secrets: .env, key.pem"
    assert "raylaunch secret set" in caught.value.hint
    assert "--allow .env --allow key.pem" in caught.value.hint


def test_a_file_that_is_left_out_is_no_secret_that_would_be_sent(tmp_path: Path) -> None:
    assert names(tree(tmp_path, {".gitignore": ".env\n", ".env": "A=1"})) == [".gitignore"]


def test_a_secret_that_git_tracks_stops_the_submission_too(tmp_path: Path) -> None:
    tree(tmp_path, {".gitignore": ".env\n", ".env": "A=1"})
    subprocess.run(["git", "-C", str(tmp_path), "init", "-q"], check=True, timeout=60)
    subprocess.run(["git", "-C", str(tmp_path), "add", "-f", "."], check=True, timeout=60)
    assert withheld(tmp_path) == (".env",)


@pytest.mark.parametrize("allow", [".env", "conf/.env", "./conf/.env", "conf", "conf/"])
def test_a_person_allows_a_file_by_name_by_path_or_by_its_folder(tmp_path: Path, allow: str) -> None:
    assert names(tree(tmp_path, {"conf/.env": "A=1"}), allow=(allow,)) == ["conf/.env"]


@pytest.mark.parametrize("allow", ["env", "other/.env", "*"])
def test_what_was_not_named_is_not_allowed(tmp_path: Path, allow: str) -> None:
    tree(tmp_path, {"conf/.env": "A=1"})
    with pytest.raises(WithheldError):
        names(tmp_path, allow=(allow,))


@pytest.mark.parametrize("folder", ["", ".."])
def test_a_home_folder_and_what_is_above_it_are_not_packed(
    tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tree(tmp_path / "home" / "anna", {"project/train.py": ""})
    monkeypatch.setenv("HOME", str(home))
    with pytest.raises(SpecError) as caught:
        pack(home / folder)
    assert "--working-dir" in caught.value.hint
    assert names(home / "project") == ["train.py"]


def test_the_whole_machine_is_not_packed() -> None:
    with pytest.raises(SpecError, match="not sent as a working directory"):
        pack("/")


def test_more_than_is_allowed_to_upload_is_refused_with_the_largest_files(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(os.urandom(300_000))
    with pytest.raises(WithheldError) as caught:
        pack(tmp_path, allowed(max_upload="200KB"))
    assert "weights.bin" in caught.value.message
    assert caught.value.paths == ()
    with pack(tmp_path, allowed(max_upload="400KB")) as packed:
        assert packed.report.files == 1


@pytest.mark.parametrize("size", ["much", "0", -1])
def test_a_largest_upload_that_is_no_size_is_refused(size: str | int) -> None:
    with pytest.raises(SpecError):
        allowed(max_upload=size)


def test_files_that_get_wrote_are_left_out_and_not_the_folder_around_them(tmp_path: Path) -> None:
    tree(tmp_path, {"train.py": "", "models/best/model.pt": "x", "models/notes.md": "", "models/old.pt": "y"})
    with Directory.open(tmp_path / "models") as folder:
        noted = FetchedFiles(folder)
        for name in ("best/model.pt", "old.pt"):
            noted.add("digits-abc", name, (tmp_path / "models" / name).stat())
        noted.save()
    (tmp_path / "models/old.pt").write_text("changed by a person")
    assert names(tmp_path) == ["models/notes.md", "models/old.pt", "train.py"]
    with Directory.open(tmp_path / "models") as folder:
        assert FetchedFiles(folder).of_others("another") == ("digits-abc",)
    with pack(tmp_path) as packed:
        assert "built in: files that raylaunch get wrote" in packed.report.ignored_by


def test_a_damaged_note_of_what_was_fetched_is_as_none(tmp_path: Path) -> None:
    tree(tmp_path, {"train.py": "", ".raylaunch/fetched.json": '{"jobs": [1]}'})
    assert names(tmp_path) == ["train.py"]
