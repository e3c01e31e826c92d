"""Which requirement lines this machine resolves, and what uv and pip get to see of its environment."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from pydantic import ValidationError

from raylaunch.client.job_wheels import requirements_of
from raylaunch.client.local_projects import check_line, check_named, joined
from raylaunch.cluster.install.resolve import tool_environment
from raylaunch.errors import SpecError
from raylaunch.models.fields import Environment
from raylaunch.models.job import BuildPlatform

WHEEL = "lib-1-py3-none-any.whl"
TAKEN = (
    "numpy",
    "torch==2.13.0; python_version >= '3.10'",
    "ray[default]>=2.60,<3",
    f"lib @ https://example.org/{WHEEL}",
)
REFUSED = (
    "lib @ https://example.org/${AWS_SECRET}/lib-1-py3-none-any.whl",
    f"lib @ https://${{TOKEN}}@example.org/{WHEEL}",
    f"lib @ http://example.org/{WHEEL}",
    "lib @ file:///etc/passwd",
    "lib @ ../../lib",
    "-r /etc/passwd",
    "--requirement=/etc/passwd",
    "--index-url https://evil.example.org/simple",
    "-e .",
    "./lib-1-py3-none-any.whl",
    "numpy\n-r /etc/passwd",
    "",
)
IN_A_FILE = (
    "# a comment",
    "",
    "numpy==1.26 --hash=sha256:00ff --hash=sha256:11ee",
    "-r more/base.txt",
    "--constraint limits.txt",
    "-e ./lib",
    "./wheels/lib-1-py3-none-any.whl ; python_version > '3'",
    "lib @ ./lib",
    "lib @ git+https://example.org/lib.git@v1",
    f"https://example.org/{WHEEL}",
    "--extra-index-url https://example.org/simple",
    "--index-url http://127.0.0.1:3141/simple",
    "--find-links wheels",
    "--only-binary :all:",
)
REFUSED_IN_A_FILE = (
    "-r ../other.txt",
    "-r /etc/passwd",
    "-c ~/.netrc",
    "-e ../lib",
    "../lib",
    "/opt/lib-1-py3-none-any.whl",
    "~/lib-1-py3-none-any.whl",
    "lib @ file:///etc/passwd",
    "--index-url https://${AWS_SECRET}@example.org/simple",
    "--index-url http://example.org/simple",
    "--find-links /etc",
    "--config-settings x=y",
    "--trusted-host example.org",
    "-r${HOME}/.netrc",
    "$HOME",
)


@pytest.mark.parametrize("text", TAKEN)
def test_a_spec_names_packages_and_https_addresses(text: str) -> None:
    check_named([text])


@pytest.mark.parametrize("text", REFUSED)
def test_a_spec_names_no_option_file_or_variable(text: str) -> None:
    with pytest.raises(SpecError) as caught:
        check_named([text])
    assert caught.value.field == "environment"


@pytest.mark.parametrize("line", [*TAKEN, *IN_A_FILE])
def test_a_requirements_file_may_refer_to_its_own_folder(tmp_path: Path, line: str) -> None:
    check_line(line, tmp_path)


@pytest.mark.parametrize("line", REFUSED_IN_A_FILE)
def test_a_requirements_file_does_not_lead_out_of_its_folder(tmp_path: Path, line: str) -> None:
    with pytest.raises(SpecError):
        check_line(line, tmp_path)


def test_a_link_does_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "base.txt").symlink_to(tmp_path / "outside.txt")
    with pytest.raises(SpecError, match="leads out"):
        check_line("-r base.txt", tmp_path / "code")


def test_a_continued_line_is_one_line(tmp_path: Path) -> None:
    ((_, line),) = joined("numpy==1 \\\n    --hash=sha256:00ff")
    check_line(line, tmp_path)
    assert list(joined("a\n-r \\\n/etc/passwd\nb \\")) == [(1, "a"), (2, "-r  /etc/passwd"), (4, "b  ")]


@pytest.mark.parametrize("line", ["machine h password hunter2", "hunter2 = 1", "--hunter2", "-r /hunter2", "$hunter2"])
def test_an_error_about_a_requirements_file_has_its_line_and_none_of_its_content(tmp_path: Path, line: str) -> None:
    (tmp_path / "requirements.txt").write_text("numpy\n-r .env\n")
    (tmp_path / ".env").write_text(f"# x\n{line}\n")
    with pytest.raises(SpecError) as caught:
        asyncio.run(requirements_of(Environment(kind="pip", value="requirements.txt"), tmp_path))
    assert ".env:2" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_an_error_about_a_lock_that_uv_cannot_read_has_none_of_its_content(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "uv.lock"):
        (tmp_path / name).write_text("-----BEGIN hunter2\n")
    with pytest.raises(SpecError, match="lock") as caught:
        asyncio.run(requirements_of(Environment(kind="uv"), tmp_path))
    assert "hunter2" not in str(caught.value)


def test_uv_and_pip_get_their_settings_and_no_secret() -> None:
    kept = {"PATH": "/bin", "HOME": "/h", "UV_INDEX_LAB_PASSWORD": "x", "PIP_INDEX_URL": "y", "https_proxy": "z"}
    secret = {"AWS_SECRET": "a", "WANDB_API_KEY": "b", "GITHUB_TOKEN": "c", "VIRTUAL_ENV": "/v", "PYTHONPATH": "/p"}
    assert tool_environment({**kept, **secret}) == kept


@pytest.mark.parametrize(
    "bad", [{"python": "3.11 --index-url=x"}, {"arch": "../x"}, {"glibc": "--help"}, {"python": "$HOME"}]
)
def test_a_platform_that_the_head_names_is_one(bad: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        BuildPlatform.model_validate({"arch": "x86_64", "glibc": "2.35", "python": "3.11.4", **bad})
