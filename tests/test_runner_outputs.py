"""Files of the working directory: which of them are kept as outputs, which stay on the node, and what is said of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.running import Attempt

from raylaunch import contract
from raylaunch.models.job_spec import JobSpec
from raylaunch.runner.outputs import KeptOutputs, OutputLimits, collect, snapshot

PLENTY = OutputLimits(1 << 30, 10_000)


class Place:
    """A working directory with a script in it, and the folder of its job."""

    def __init__(self, folder: Path) -> None:
        self.code, self.kept = folder / "code", folder / "job"
        self.code.mkdir()
        (self.kept / "checkpoints").mkdir(parents=True)
        self.write("train.py", "print()")
        self.before = snapshot(self.code)

    def write(self, path: str, text: str = "new") -> Path:
        where = self.code / path
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_text(text)
        return where

    def collect(self, *patterns: str, limits: OutputLimits = PLENTY) -> KeptOutputs:
        return collect(self.code, self.kept, patterns or ("auto",), limits, self.before)

    def outputs(self, folder: str = "outputs") -> list[str]:
        return sorted(str(path.relative_to(self.kept / folder)) for path in self._files(folder))

    def _files(self, folder: str) -> list[Path]:
        return [path for path in (self.kept / folder).rglob("*") if path.is_file() or path.is_symlink()]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_new_and_changed_files_are_kept_and_others_not(place: Place) -> None:
    place.write("out/model.pt")
    place.write("data.txt", "as sent")
    place.before = snapshot(place.code)
    place.write("data.txt", "changed by the program")
    place.write("out/metrics.csv")
    assert place.collect() == KeptOutputs([], {}, [])
    assert place.outputs() == ["data.txt", "out/metrics.csv"]


def test_caches_and_what_wandb_writes_are_no_outputs(place: Place) -> None:
    for path in (
        *(".hypothesis/x", ".nv/ComputeCache/x", ".eggs/x"),
        *("__pycache__/a.pyc", "lib.pyc", ".cache/x", "core.1234", "pkg.egg-info/PKG-INFO", ".git/index"),
        *("env/pyvenv.cfg", "env/lib/x.py", "hub/CACHEDIR.TAG", "hub/model", "logs/wandb/offline-run-1-a/run-a.wandb"),
    ):
        place.write(path)
    place.write("integrations/wandb/__init__.py")
    place.collect()
    assert place.outputs() == ["integrations/wandb/__init__.py"]


def test_what_looks_like_a_secret_is_named_and_stays_without_being_kept(place: Place) -> None:
    place.write(".env", "TOKEN=planted")
    place.write("key.txt", "-----BEGIN PRIVATE KEY-----\nplanted\n")
    place.write("big.bin", "x" * 50)
    found = place.collect(limits=OutputLimits(0, 0))
    assert "not kept, because they look like secrets: key.txt (36 B), .env (13 B)" in found.warnings[1]
    assert found.left == {"big.bin": 50, ".env": 13, "key.txt": 36}
    assert found.withheld == [".env", "key.txt"]
    assert (place.outputs(), place.outputs("left")) == ([], [".env", "big.bin", "key.txt"])


def test_what_cannot_be_kept_stays_too(place: Place) -> None:
    place.write("out/model.pt")
    (place.kept / "outputs").mkdir()
    (place.kept / "outputs/out").write_text("a file, where a folder is needed")
    found = place.collect()
    assert "out/model.pt could not be kept" in found.warnings[0]
    assert (found.left, place.outputs("left")) == ({"out/model.pt": 3}, ["out/model.pt"])


def test_what_is_over_the_limit_stays_and_is_said_with_its_size(place: Place) -> None:
    place.write("small.csv", "x" * 10)
    place.write("large.bin", "x" * 3000)
    place.write("a/larger.bin", "x" * 5000)
    found = place.collect(limits=OutputLimits(3500, 10))
    assert found.left == {"a/larger.bin": 5000}
    assert "1 new file of the working directory (4.9 KiB) not kept, over the limit of 3.4 KiB" in found.warnings[0]
    assert "a/larger.bin (4.9 KiB)" in found.warnings[0]
    assert place.outputs() == ["large.bin", "small.csv"]
    assert place.outputs("left") == ["a/larger.bin"]


def test_the_number_of_files_has_a_limit_too(place: Place) -> None:
    for number in range(8):
        place.write(f"{number}.txt", "x" * (number + 1))
    found = place.collect(limits=OutputLimits(1 << 30, 2))
    assert place.outputs() == ["0.txt", "1.txt"]
    assert "and 1 more" in found.warnings[0]


def test_checkpoints_are_not_kept_twice(place: Place) -> None:
    model = place.kept / "checkpoints/model.pt"
    model.write_text("weights")
    (place.code / "model.pt").hardlink_to(model)
    (place.code / "last.pt").symlink_to(model)
    place.collect()
    assert place.outputs() == []


def test_a_link_to_what_is_kept_is_kept(place: Place) -> None:
    place.write("run-1/model.pt")
    (place.code / "latest").symlink_to("run-1")
    (place.code / "out").symlink_to("/etc")
    place.collect()
    assert place.outputs() == ["latest", "run-1/model.pt"]
    assert (place.kept / "outputs/latest").readlink() == Path("run-1")


def test_none_keeps_nothing_and_globs_keep_what_they_match(place: Place) -> None:
    place.write("a/b/model.pt")
    place.write("no.txt")
    place.collect("none")
    assert place.outputs() == []
    found = place.collect("**/*.pt", "*.onnx", "../x")
    assert place.outputs() == ["a/b/model.pt"]
    assert found.warnings == [
        "outputs: nothing matches '*.onnx' in the working directory",
        "outputs: '../x' is outside the working directory and was not kept",
    ]


def test_globs_next_to_auto_are_kept_whatever_their_size(place: Place) -> None:
    place.write("model.pt", "x" * 5000)
    place.write("other.bin", "x" * 5000)
    assert place.collect("auto", "*.pt", limits=OutputLimits(100, 10)).left == {"other.bin": 5000}
    assert place.outputs() == ["model.pt"]


def test_the_next_attempt_replaces_what_was_collected_and_never_the_programs_own(place: Place) -> None:
    place.write("collected.csv", "one")
    place.write("own.csv", "from the working directory")
    place.write("same.csv", "same")
    (place.kept / "outputs").mkdir()
    (place.kept / "outputs/own.csv").write_text("own")
    (place.kept / "outputs/same.csv").write_text("same")
    found = place.collect()
    (place.code / "collected.csv").unlink()
    place.write("collected.csv", "second")
    place.collect()
    assert (place.kept / "outputs/collected.csv").read_text() == "second"
    assert (place.kept / "outputs/own.csv").read_text() == "own"
    assert (place.kept / "outputs/working-dir/own.csv").read_text() == "from the working directory"
    assert place.outputs() == ["collected.csv", "own.csv", "same.csv", "working-dir/own.csv"]
    assert ["working-dir/own.csv" in warning for warning in found.warnings] == [True]


def test_the_runner_keeps_what_its_program_wrote_and_says_what_is_left(tmp_path: Path) -> None:
    entrypoint = "mkdir out && echo weights > out/model.pt && head -c 2000 /dev/zero > big.bin"
    attempt = Attempt(tmp_path, entrypoint, outputs=["auto"], outputs_size=1000)
    attempt.file("train.py", "print()")
    attempt.run()
    kept = attempt.folder / contract.OUTPUTS
    assert [str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file()] == ["out/model.pt"]
    assert (attempt.folder / contract.LEFT / "big.bin").stat().st_size == 2000
    facts = attempt.facts()
    assert facts["left"] == {"big.bin": 2000}
    assert "big.bin (2.0 KiB)" in facts["warnings"][-1]


@pytest.mark.parametrize(
    ("given", "read"), [({}, ("auto",)), ({"outputs": "none"}, ("none",)), ({"outputs": ["*.pt"]}, ("*.pt",))]
)
def test_a_spec_says_auto_none_or_globs(given: dict[str, object], read: tuple[str, ...]) -> None:
    assert JobSpec.model_validate({"entrypoint": "true", **given}).outputs == read


def test_none_next_to_a_glob_is_refused() -> None:
    with pytest.raises(ValueError, match="none"):
        JobSpec.model_validate({"entrypoint": "true", "outputs": ["none", "*.pt"]})
