"""The working directory as an archive: what goes in, what stays, and what cannot be packed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from raylaunch.client.git_facts import DIFF_LIMIT, git_facts, tracked_files
from raylaunch.client.ignore_rules import TrackedFiles, walk
from raylaunch.client.packing import pack
from raylaunch.client.sensitive import Allowances
from raylaunch.errors import ConflictError, SpecError, StorageError
from raylaunch.files import Directory
from raylaunch.models.job import PackReport


def tree(root: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def names(root: Path) -> list[str]:
    """Return the packed files and links."""
    with pack(root) as packed, tarfile.open(fileobj=packed.file) as archive:
        return sorted(member.name for member in archive if not member.isdir())


def report(root: Path) -> PackReport:
    with pack(root) as packed:
        return packed.report


def git(folder: Path, *words: str) -> None:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main")
    subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True, timeout=60)


def test_equal_folders_make_equal_archives_whatever_their_times(tmp_path: Path) -> None:
    first = tree(tmp_path / "a", {"train.py": "1", "lib/x.py": "2"})
    second = tree(tmp_path / "b", {"lib/x.py": "2", "train.py": "1"})
    os.utime(second / "train.py", (1, 1))
    with pack(first) as one, pack(second) as other:
        assert one.sha256 == other.sha256
        assert one.file.read() == other.file.read()


def test_another_content_makes_another_name(tmp_path: Path) -> None:
    with pack(tree(tmp_path, {"train.py": "1"})) as one, pack(tree(tmp_path, {"train.py": "2"})) as other:
        assert one.sha256 != other.sha256


def test_a_program_stays_executable(tmp_path: Path) -> None:
    tree(tmp_path, {"run.sh": "", "data.txt": ""})
    (tmp_path / "run.sh").chmod(0o700)
    with pack(tmp_path) as packed, tarfile.open(fileobj=packed.file) as archive:
        assert archive.getmember("run.sh").mode == 0o755
        assert archive.getmember("data.txt").mode == 0o644


def test_the_archive_goes_when_it_is_no_longer_needed(tmp_path: Path) -> None:
    with pack(tree(tmp_path, {"a": ""})) as packed:
        assert not packed.file.closed
    assert packed.file.closed


def test_a_process_that_is_killed_leaves_no_archive_behind(tmp_path: Path) -> None:
    (tmp_path / "temp").mkdir()
    tree(tmp_path / "code", {"a": "x" * 1000})
    script = (
        "import os, signal, sys; from raylaunch.client.packing import pack\n"
        "with pack(sys.argv[1]) as packed:\n    print(packed.bytes, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "code")],
        env={**os.environ, "TMPDIR": str(tmp_path / "temp")},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, int(done.stdout) > 0) == (-signal.SIGKILL, True)
    assert list((tmp_path / "temp").iterdir()) == []


def test_what_is_built_in_stays_at_home(tmp_path: Path) -> None:
    tree(
        tmp_path,
        {
            "train.py": "",
            ".git/HEAD": "",
            "lib/__pycache__/x.pyc": "",
            ".venv/bin/python": "",
            "myenv/pyvenv.cfg": "",
            "myenv/bin/python": "",
            "web/node_modules/x.js": "",
            "wandb/run-1/x.wandb": "",
            ".raylaunch/x": "",
            ".mypy_cache/x": "",
        },
    )
    assert names(tmp_path) == ["train.py"]


def test_a_folder_called_venv_that_is_none_is_packed(tmp_path: Path) -> None:
    assert names(tree(tmp_path, {"venv/notes.txt": ""})) == ["venv/notes.txt"]


def test_ignore_files_of_every_level_apply_below_themselves_only(tmp_path: Path) -> None:
    tree(
        tmp_path,
        {
            ".gitignore": "*.pt\n/data/\n",
            "a.pt": "",
            "data/x": "",
            "sub/data/x": "",
            "sub/.gitignore": "*.log\n!keep.pt\n",
            "sub/keep.pt": "",
            "sub/x.log": "",
            "x.log": "",
        },
    )
    assert names(tmp_path) == [".gitignore", "sub/.gitignore", "sub/data/x", "sub/keep.pt", "x.log"]


def test_raylaunchignore_has_the_last_word(tmp_path: Path) -> None:
    tree(tmp_path, {".gitignore": "weights.pt\n", ".raylaunchignore": "!weights.pt\n!wandb/\nnotes/\n"})
    tree(tmp_path, {"weights.pt": "", "wandb/x": "", "notes/x": ""})
    assert names(tmp_path) == [".gitignore", ".raylaunchignore", "wandb/x", "weights.pt"]


def test_rules_above_a_folder_apply_up_to_the_repository(tmp_path: Path) -> None:
    tree(tmp_path, {".gitignore": "*.py\n", "repo/.git/HEAD": "", "repo/.gitignore": "*.pt\n/exp/out/\n"})
    tree(tmp_path, {"repo/exp/train.py": "", "repo/exp/a.pt": "", "repo/exp/out/x": ""})
    assert names(tmp_path / "repo" / "exp") == ["train.py"]


def test_a_working_directory_that_git_ignores_is_packed_all_the_same(tmp_path: Path) -> None:
    tree(tmp_path, {".git/HEAD": "", ".gitignore": "scratch/\n", "scratch/train.py": ""})
    assert names(tmp_path / "scratch") == ["train.py"]


def test_the_report_says_what_went_in_what_stayed_and_the_largest_files(tmp_path: Path) -> None:
    tree(tmp_path, {f"f{n}": "x" * n for n in range(1, 8)})
    tree(tmp_path, {".gitignore": "*.pt", "a.pt": "12345", "wandb/x": ""})
    found = report(tmp_path)
    assert (found.files, found.bytes) == (8, 28 + 4)
    assert (found.ignored, found.ignored_bytes) == (2, 5)
    assert found.ignored_by == (".gitignore: *.pt", "built in: wandb/")
    assert [(one.path, one.bytes) for one in found.largest] == [
        ("f7", 7),
        ("f6", 6),
        ("f5", 5),
        (".gitignore", 4),
        ("f4", 4),
    ]


def test_a_link_inside_stays_a_link(tmp_path: Path) -> None:
    tree(tmp_path, {"data/x": "1"})
    (tmp_path / "data" / "link").symlink_to("../data/x")
    (tmp_path / "folder").symlink_to("data")
    assert names(tmp_path) == ["data/link", "data/x", "folder"]


@pytest.mark.parametrize("target", ["/etc/passwd", "../outside", "/nowhere/at/all"])
def test_a_link_that_leads_out_travels_as_a_link_and_is_reported_once(tmp_path: Path, target: str) -> None:
    root = tree(tmp_path / "code", {"a": ""})
    (root / "data").symlink_to(target)
    with pack(root) as packed, tarfile.open(fileobj=packed.file) as archive:
        assert archive.getmember("data").linkname == target
        assert [(one.path, one.target) for one in packed.report.links] == [("data", target)]
        assert packed.report.links_out == 1


def test_an_absolute_link_that_stays_inside_becomes_relative(tmp_path: Path) -> None:
    root = tree(tmp_path / "code", {"data/x": "", "lib/y": ""})
    (root / "lib" / "x").symlink_to(root / "data" / "x")
    with pack(root) as packed, tarfile.open(fileobj=packed.file) as archive:
        assert archive.getmember("lib/x").linkname == "../data/x"
        assert packed.report.links == ()


def test_of_many_links_that_lead_out_the_first_are_listed_and_all_are_counted(tmp_path: Path) -> None:
    for n in range(120):
        (tmp_path / f"link{n:03}").symlink_to("/data")
    found = report(tmp_path)
    assert (len(found.links), found.links_out) == (100, 120)


def test_what_git_tracks_is_sent_whatever_gits_rules_say(tmp_path: Path) -> None:
    tree(tmp_path, {".gitignore": "log*\n/data/\n", "utils/logging.py": "", "integrations/wandb/x.py": ""})
    tree(tmp_path, {"data/README": "", "data/raw/x": "", "data/y": "", "log.txt": "", "integrations/wandb/run": ""})
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-f", ".gitignore", "utils/logging.py", "integrations/wandb/x.py", "data/README")
    assert names(tmp_path) == [".gitignore", "data/README", "integrations/wandb/x.py", "utils/logging.py"]
    assert report(tmp_path).ignored_by == (
        ".gitignore: /data/",
        ".gitignore: log*",
        "built in: .git/",
        "built in: wandb/",
    )


def test_what_git_tracks_in_a_folder_of_its_repository_is_sent(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    tree(tmp_path, {".gitignore": "log*\n", "exp/logs.py": "", "exp/log": ""})
    git(tmp_path, "add", "-f", ".gitignore", "exp/logs.py")
    assert names(tmp_path / "exp") == ["logs.py"]


def test_what_submodules_track_is_sent_whatever_gits_rules_say(tmp_path: Path) -> None:
    folders = ["lib/inner/lib/deepest", "lib/inner", "."]
    for folder in (tmp_path / name for name in folders):  # `add` of a repository within makes it a submodule
        tree(folder, {".gitignore": "log*\n", "logging.py": "", "log.txt": ""})
        git(folder, "init", "-q")
        git(folder, "add", "-f", ".gitignore", "logging.py", *(["lib"] if (folder / "lib").exists() else []))
        git(folder, "commit", "-qm", "x")
    sent = {os.path.normpath(f"{folder}/{name}") for folder in folders for name in (".gitignore", "logging.py")}
    assert set(names(tmp_path)) == sent
    shutil.rmtree(tmp_path / "lib/inner/.git")  # as where it is not checked out
    assert tracked_files(tmp_path) == {".gitignore", "logging.py"}


def test_raylaunchignore_leaves_out_what_git_tracks_too(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    tree(tmp_path, {"train.py": "", "notes/a": "", "big.bin": "", ".raylaunchignore": "notes/\n*.bin\n"})
    git(tmp_path, "add", ".")
    assert names(tmp_path) == [".raylaunchignore", "train.py"]


def test_a_tracked_file_whose_name_is_not_ascii_is_sent(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    tree(tmp_path, {".gitignore": "*.txt\n", "größe\n.txt": ""})
    git(tmp_path, "add", "-f", ".")
    assert names(tmp_path) == [".gitignore", "größe\n.txt"]


def test_a_missing_working_directory_is_said() -> None:
    with pytest.raises(SpecError) as caught:
        pack("/nowhere/at/all")
    assert str(caught.value) == (
        "the working directory /nowhere/at/all does not exist\n"
        "  → give another with --working-dir, or working_dir: in job.yaml"
    )


def test_a_file_is_not_a_working_directory(tmp_path: Path) -> None:
    tree(tmp_path, {"train.py": ""})
    with pytest.raises(SpecError, match=r"train\.py is a file, not a folder"):
        pack(tmp_path / "train.py")


@contextlib.contextmanager
def not_root() -> Iterator[None]:
    """Root may read everything: be nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_file_that_cannot_be_read_is_named() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        root = tree(Path(folder), {"secret.bin": ""})
        root.chmod(0o755)
        (root / "secret.bin").chmod(0)
        with not_root(), pytest.raises(StorageError) as caught:
            pack(root)
    assert str(caught.value) == (
        "secret.bin in the working directory cannot be read: Permission denied\n"
        "  → make it readable, or leave it out with a line in .raylaunchignore: /secret.bin"
    )


def test_a_file_that_is_written_to_meanwhile_is_found_out(tmp_path: Path) -> None:
    tree(tmp_path, {"train.log": b"x" * 4_000_000})
    done = threading.Event()

    def write() -> None:
        with (tmp_path / "train.log").open("ab") as file:
            while not done.is_set():
                file.write(b"x")
                file.flush()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        with pytest.raises(ConflictError) as caught:
            pack(tmp_path)
    finally:
        done.set()
        writer.join(10)
    assert str(caught.value) == (
        "train.log in the working directory was changed while it was packed\n"
        "  → wait until it is complete, or leave it out with a line in .raylaunchignore: /train.log"
    )


def test_a_name_that_is_not_utf8_is_packed_and_reported_as_text(tmp_path: Path) -> None:
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt"))).write_text("x")
    assert report(tmp_path).largest[0].path == "\ufffd.txt"


def test_sockets_and_pipes_stay_at_home(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert report(tree(tmp_path, {"a": ""})).ignored_by == ("built in: sockets, pipes and devices",)


def test_git_says_commit_branch_and_what_differs(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    tree(tmp_path, {"train.py": "one\n"})
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "x")
    clean = git_facts(tmp_path)
    assert clean is not None
    assert (len(clean.commit), clean.branch, clean.dirty, clean.diff) == (40, "main", False, "")
    tree(tmp_path, {"train.py": "two\n"})
    dirty = git_facts(tmp_path)
    assert dirty is not None
    assert dirty.dirty
    assert "-one\n+two\n" in dirty.diff


def test_a_diff_is_cut_at_one_mebibyte(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    tree(tmp_path, {"data.txt": "\n"})
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "x")
    tree(tmp_path, {"data.txt": "0123456789abcde\n" * 100_000})
    facts = git_facts(tmp_path)
    assert facts is not None
    assert (len(facts.diff), facts.diff_truncated) == (DIFF_LIMIT, True)


def test_a_diff_has_nothing_of_files_that_are_not_sent(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    files = {"train.py": "one\n", "private/key.txt": "old secret\n", "gone.txt": "deleted secret\n", "notes.txt": "a\n"}
    tree(tmp_path, files)
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "x")
    (tmp_path / "gone.txt").unlink()
    tree(
        tmp_path, {"train.py": "two\n", "private/key.txt": "new secret\n", ".raylaunchignore": "private/\nnotes.txt\n"}
    )
    (tmp_path / "notes.txt").rename(tmp_path / "renamed.txt")
    with pack(tmp_path) as packed:
        facts = git_facts(tmp_path, sent=packed.contents.paths)
    assert facts is not None
    assert facts.dirty
    assert "-one\n+two\n" in facts.diff
    assert "secret" not in facts.diff
    assert "key.txt" not in facts.diff


@pytest.mark.parametrize("inside", ["", "deeper"])
def test_git_runs_no_program_that_a_repository_names(tmp_path: Path, inside: str) -> None:
    ran = tmp_path / "ran"
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\necho $0 $* >> {ran}\ncat\n")
    program.chmod(0o755)
    repository = tmp_path / "repository"
    repository.mkdir()
    git(repository, "init", "-q")
    tree(repository, {"a.py": "1\n", "deeper/b.py": "1\n", ".gitattributes": "*.py filter=evil diff=evil\n"})
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "x")
    hooks = repository / ".git" / "hooks"
    for name in ("post-index-change", "fsmonitor-watchman", "pre-commit"):
        (hooks / name).write_bytes(program.read_bytes())
        (hooks / name).chmod(0o755)
    for key in (
        *("core.fsmonitor", "core.pager", "core.editor", "core.sshCommand", "core.askPass", "diff.external"),
        *("filter.evil.clean", "filter.evil.smudge", "filter.evil.process", "diff.evil.textconv", "diff.evil.command"),
        *("credential.helper", "gpg.program", "pager.status", "pager.diff", "interactive.diffFilter"),
    ):
        git(repository, "config", key, str(program))
    git(repository, "config", "filter.evil.required", "true")
    tree(repository, {"a.py": "2\n", "deeper/b.py": "2\n"})
    with pack(repository / inside) as packed:
        facts = git_facts(repository / inside, sent=packed.contents.paths)
    assert facts is not None
    assert facts.dirty
    assert "+2" in facts.diff
    assert not ran.exists(), ran.read_text()


def test_a_folder_without_git_has_no_git_facts(tmp_path: Path) -> None:
    assert git_facts(tmp_path) is None


def test_a_repository_without_a_commit_has_no_commit(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    facts = git_facts(tree(tmp_path, {"a": ""}))
    assert facts is not None
    assert (facts.commit, facts.branch, facts.dirty, facts.diff) == ("", "main", True, "")


def test_what_no_node_would_unpack_is_refused_here_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("print()")
    with (tmp_path / "zeros.bin").open("wb") as file:
        file.truncate(400_000_000)
    with pytest.raises(SpecError, match="refuses to unpack") as refused:
        pack(tmp_path)
    assert "zeros.bin" in refused.value.hint


def test_the_home_of_raylaunch_is_never_sent_whatever_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "project" / "rl-home" / "clusters" / "lab"
    home.mkdir(parents=True)
    (home / "token").write_text("secret")
    (tmp_path / "project" / "train.py").write_text("print()")
    monkeypatch.setenv("RAYLAUNCH_HOME", str(tmp_path / "project" / "rl-home"))
    with pack(tmp_path / "project") as packed:
        assert set(packed.contents.paths) == {"train.py"}
        assert "RAYLAUNCH_HOME" in packed.report.ignored_by[0]


def test_a_folder_that_becomes_a_link_while_it_is_packed_is_not_followed(tmp_path: Path) -> None:
    secret = tree(tmp_path / "elsewhere", {"id": "secret"})
    project = tree(tmp_path / "project", {"a/b/c.txt": "c"})
    with Directory.open_resolved(project) as root:
        found = walk(root, TrackedFiles.of(frozenset()), on_left_out=lambda _path, _rule, _size: None)
        assert next(found).path == "a"
        (project / "a").rename(project / "before")
        (project / "a").symlink_to(secret)
        with pytest.raises(StorageError, match="link"):
            list(found)


def test_a_file_that_becomes_a_link_while_it_is_packed_is_not_followed(tmp_path: Path) -> None:
    secret = tree(tmp_path / "elsewhere", {"id": "secret"})
    project = tree(tmp_path / "project", {"c.txt": "c"})
    with Directory.open_resolved(project) as root:
        (found,) = (
            found._replace(folder=root)
            for found in walk(root, TrackedFiles.of(frozenset()), on_left_out=lambda _path, _rule, _size: None)
        )
        (project / "c.txt").unlink()
        (project / "c.txt").symlink_to(secret / "id")
        with pytest.raises(OSError, match="link"):
            found.folder.open_file(found.entry.name, os.O_RDONLY)


def test_a_working_directory_whose_path_was_checked_is_not_reached_through_a_link(tmp_path: Path) -> None:
    project = tree(tmp_path / "above" / "project", {"train.py": "1"})
    checked = Allowances(links=False)
    with pack(project, checked) as packed:
        assert packed.report.files == 1
    (tmp_path / "above").rename(tmp_path / "moved")
    (tmp_path / "above").symlink_to(tmp_path / "moved")
    with pytest.raises(SpecError, match="link"):
        pack(project, checked)
    with pack(project) as packed:  # a person may name it so
        assert packed.report.files == 1


def test_a_folder_above_that_may_only_be_passed_through_is_no_obstacle(tmp_path: Path) -> None:
    project = tree(tmp_path / "closed" / "project", {"train.py": "1"})
    (tmp_path / "closed").chmod(0o311)
    try:
        assert names(project) == ["train.py"]
    finally:
        (tmp_path / "closed").chmod(0o755)
