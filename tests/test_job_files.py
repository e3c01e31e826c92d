"""What is known where a job is submitted is refused there; and what short commands mean."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from raylaunch.cli.run import spec_of
from raylaunch.client.packing import pack
from raylaunch.client.submission import check_here, check_sent
from raylaunch.config.load import Flag, job_spec_from_flags
from raylaunch.entrypoint import script_of
from raylaunch.errors import SpecError
from raylaunch.models.job_spec import JobSpec
from raylaunch.sdk import arguments


def tree(root: Path, files: Mapping[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def spec(root: Path | str, entrypoint: str | list[str] = "true", environment: str = "default") -> JobSpec:
    fields = {"entrypoint": entrypoint, "working_dir": str(root), "environment": environment}
    return JobSpec.model_validate(fields)


def checked(job: JobSpec) -> None:
    check_here(job)
    with pack(job.working_dir) as packed:
        check_sent(job, packed.contents)


def refusal(job: JobSpec) -> SpecError:
    with pytest.raises(SpecError) as caught:
        checked(job)
    return caught.value


@pytest.mark.parametrize(
    ("command", "script"),
    [
        ("python train.py --lr 0.1", "train.py"),
        ("A=1 python -u src/train.py | tee log", "src/train.py"),
        (["python3", "train.py"], "train.py"),
        ("uv run train.py", "train.py"),
        ("uv run python train.py", "train.py"),
        ("torchrun --nproc-per-node 2 train.py --x", "train.py"),
        ("accelerate launch --num_processes 2 train.py", "train.py"),
        ("bash -x run.sh", "run.sh"),
        ("./run.sh", "./run.sh"),
        ("train.py", "train.py"),
        ("python -m train", ""),
        ("python -c 'import x'", ""),
        ("torchrun -m train.py", ""),
        ("bash -c 'python x.py'", ""),
        ("cd src && python train.py", ""),
        ("env -C src python train.py", ""),
        ("uv run --directory src train.py", ""),
        ("python $SCRIPT", ""),
        ("python ~/train.py", ""),
        ("python /opt/train.py", ""),
        ("python - < x", ""),
        ("nvidia-smi", ""),
        ("", ""),
    ],
)
def test_the_script_of_a_command_is_found_where_it_is_certain(command: str | list[str], script: str) -> None:
    assert script_of(command) == script


def test_a_script_that_is_not_there_is_refused_with_the_nearest(tmp_path: Path) -> None:
    error = refusal(spec(tree(tmp_path, {"train.py": ""}), "python tarin.py"))
    assert error.message == f"the command needs tarin.py, which is not in {tmp_path}; did you mean 'train.py'?"
    assert error.field == "entrypoint"


def test_a_script_that_is_left_out_is_refused_with_the_rule(tmp_path: Path) -> None:
    tree(tmp_path, {"log_train.py": "", ".gitignore": "log*\n"})
    assert refusal(spec(tmp_path, "python log_train.py")).message.endswith("is not sent: .gitignore: log*")


def test_a_script_outside_the_working_directory_is_refused(tmp_path: Path) -> None:
    tree(tmp_path, {"train.py": "", "exp/x": ""})
    assert "outside the working directory" in refusal(spec(tmp_path / "exp", "python ../train.py")).message


def test_a_script_without_any_working_directory_is_refused() -> None:
    assert "no working directory" in refusal(spec("", "python train.py")).message


def test_a_script_behind_a_link_may_be_on_the_node_only(tmp_path: Path) -> None:
    (tmp_path / "shared").symlink_to("/nowhere/shared")
    checked(spec(tmp_path, "python shared/train.py"))


@pytest.mark.parametrize(
    ("files", "environment", "missing"),
    [
        ({"a": ""}, "uv", "pyproject.toml"),
        ({"pyproject.toml": ""}, "uv", "uv.lock"),
        ({"a": ""}, "pip:requirements.txt", "requirements.txt"),
    ],
)
def test_a_file_that_the_environment_is_made_of_is_needed(
    tmp_path: Path, files: dict[str, str], environment: str, missing: str
) -> None:
    error = refusal(spec(tree(tmp_path, files), environment=environment))
    assert missing in error.message
    assert error.field == "environment"


def test_a_lock_that_is_left_out_is_refused_with_the_rule(tmp_path: Path) -> None:
    tree(tmp_path, {"pyproject.toml": "", "uv.lock": "", ".gitignore": "*.lock\n"})
    assert refusal(spec(tmp_path, environment="uv")).message.endswith(".gitignore: *.lock")


def test_a_folder_with_nothing_to_send_is_refused(tmp_path: Path) -> None:
    assert "it is empty" in refusal(spec(tmp_path)).message
    tree(tmp_path, {".venv/x": ""})
    assert "built in: .venv/" in refusal(spec(tmp_path)).message


def test_a_job_without_files_needs_none() -> None:
    check_here(spec("", "nvidia-smi"))


@pytest.mark.parametrize("entrypoint", ["train.py --lr 1", ("train.py", "--lr", "1"), "sub/train.py"])
def test_a_script_alone_is_started_by_python(tmp_path: Path, entrypoint: str | tuple[str, ...]) -> None:
    tree(tmp_path, {"train.py": "", "sub/train.py": ""})
    found = job_spec_from_flags([Flag("", ("entrypoint",), entrypoint)], cwd=tmp_path).entrypoint
    assert found == (f"python {entrypoint}" if isinstance(entrypoint, str) else ("python", *entrypoint))


def test_a_script_that_can_be_started_is_not_changed(tmp_path: Path) -> None:
    tree(tmp_path, {"train.py": "#!/usr/bin/env python3\n"})
    (tmp_path / "train.py").chmod(0o755)
    for entrypoint in ("./train.py", "other.py"):
        assert job_spec_from_flags([Flag("", ("entrypoint",), entrypoint)], cwd=tmp_path).entrypoint == entrypoint


def test_run_takes_a_job_file_by_its_name_alone_and_job_yaml_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(tmp_path, {"job.yaml": "entrypoint: echo default\n", "other.yml": "entrypoint: echo other\n"})
    monkeypatch.chdir(tmp_path)
    assert spec_of({"command": ()}, {}).command == "echo default"
    assert spec_of({"command": (), "gpus": "2"}, {}).resources.gpus == 2
    assert spec_of({"command": ("other.yml",)}, {}).command == "echo other"
    assert spec_of({"command": ("echo", "x")}, {}).command == "echo x"
    assert arguments.spec_of("other.yml", {}).command == "echo other"
    with pytest.raises(SpecError, match="--gpus follows it"):
        spec_of({"command": ("job.yaml", "--gpus")}, {})


def test_a_job_file_is_no_command(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"missing\.yaml is a job file"):
        job_spec_from_flags([Flag("", ("entrypoint",), "missing.yaml")], cwd=tmp_path)


def test_nothing_to_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match="nothing to run"):
        spec_of({"command": ()}, {})


def test_a_script_whose_interpreter_cannot_be_found_for_its_line_ends_is_refused(tmp_path: Path) -> None:
    tree(tmp_path, {"run.sh": "#!/bin/bash\r\necho hi\r\n", "run.py": "#!/usr/bin/env python\r\nprint()\r\n"})
    for command in ("./run.sh --lr 1", ["./run.py"]):
        found = refusal(spec(tmp_path, command))
        assert "Windows line ends" in found.message
        assert found.field == "entrypoint"
    checked(spec(tmp_path, "bash run.sh"))
    checked(spec(tmp_path, "python run.py"))
