"""The paths that an agent's tools may use: inside the project's folder, not hidden, through no link."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from mcp_server.arguments import TrainJob
from mcp_server.context import ToolCall, ToolProgress
from mcp_server.jobs import _spec_of, train_job
from mcp_server.policy import ROOTS_VARIABLE, Roots, may_send, roots_of
from raylaunch.client.submission import packed_job
from raylaunch.errors import SpecError


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project in a home folder that has keys."""
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh" / "id_ed25519").write_text("-----BEGIN KEY-----\nc2VjcmV0\n")
    folder = home / "project"
    (folder / ".git" / "hooks").mkdir(parents=True)
    (folder / "keys").symlink_to(home / ".ssh")
    (folder / "hooks").symlink_to(folder / ".git" / "hooks")
    return folder


def roots_in(project: Path, cwd: Path | None = None, *, named: str = "") -> Roots:
    return roots_of({"HOME": str(project.parent), ROOTS_VARIABLE: named}, cwd or project)


@pytest.mark.parametrize("path", ["models", "models/digits", ".", "./a/../b", "a.b/c"])
def test_a_path_inside_the_project_is_taken(project: Path, path: str) -> None:
    assert roots_in(project).resolve(path, field="to").path == (project / path).resolve()


@pytest.mark.parametrize("path", ["..", "../other", "/", "/etc/shadow", "~", "~/.ssh", "keys", "keys/id_ed25519"])
def test_a_path_that_leads_out_of_it_is_refused(project: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(project.parent))
    with pytest.raises(SpecError, match="outside of the folders"):
        roots_in(project).resolve(path, field="to")


@pytest.mark.parametrize("path", [".git", ".git/hooks", "a/.env/b", "hooks", ".claude/settings.json"])
def test_a_hidden_path_is_refused_also_through_a_link(project: Path, path: str) -> None:
    with pytest.raises(SpecError, match="is hidden"):
        roots_in(project).resolve(path, field="to")


@pytest.mark.parametrize("wide", ["home", "above home", "/"])
def test_a_server_in_a_home_folder_or_above_needs_roots(project: Path, wide: str) -> None:
    cwd = {"home": project.parent, "above home": project.parent.parent, "/": Path("/")}[wide]
    with pytest.raises(SpecError, match="uses no local paths") as caught:
        roots_in(project, cwd).resolve("project", field="to")
    assert ROOTS_VARIABLE in caught.value.hint
    with_roots = roots_in(project, cwd, named=str(project))
    assert with_roots.resolve("models", field="to").path == project / "models"
    with pytest.raises(SpecError, match="outside of"):
        with_roots.resolve(str(project.parent / ".ssh"), field="to")
    with pytest.raises(SpecError, match="not packed as a whole"):
        _ = with_roots.working_dir


@pytest.mark.parametrize("named", ["/", "~", "relative", "/no/such/folder", "~no-such-user/x"])
def test_a_root_that_is_too_wide_or_is_none_is_refused(project: Path, named: str) -> None:
    with pytest.raises(SpecError, match=ROOTS_VARIABLE):
        roots_in(project, named=named)


def test_a_link_that_appears_after_the_check_is_not_followed(project: Path) -> None:
    to, file = (roots_in(project).resolve(path, field="to") for path in ("models", "models/job.yaml"))
    (project / "models").symlink_to(project.parent / ".ssh")
    with pytest.raises(OSError, match="it is a link"):
        to.directory(make=True)
    with pytest.raises(SpecError, match="it is a link"):
        file.read_text(field="job_file")


def test_what_is_no_file_is_not_waited_for(project: Path) -> None:
    os.mkfifo(project / "job.yaml")
    with pytest.raises(SpecError, match="it is not a file"):
        roots_in(project).resolve("job.yaml", field="job_file").read_text(field="job_file")


def refusal(project: Path, given: Mapping[str, object]) -> str:
    async def tell(_news: ToolProgress) -> None:
        pass

    call = ToolCall(restarts=False, tell=tell, roots=roots_in(project))
    with pytest.raises(SpecError) as caught:
        asyncio.run(train_job(TrainJob.model_validate(given), call))
    return str(caught.value)


FILES = {
    "shadow": "root:$6$hunter2$hunter2:19000:0:99999:7:::\ndaemon:*hunter2:1::\n",
    "netrc": "machine api.wandb.ai login user password hunter2\n",
    "key": "-----BEGIN KEY-----\nhunter2\n-----END KEY-----\n",
    "credentials": "[default]\naws_secret = hunter2\n",
    "tag": "!hunter2 {a: b}\n",
    "alias": "a: *hunter2\n",
    "twice": "hunter2: 1\nhunter2: 2\n",
    "keys": "hunter2: 1\n",
    "values": "entrypoint: hunter2\nretries: hunter2\nname: hunter2 hunter2\nenvironment: hunter2\n",
    "inside": "entrypoint: x\nenv: {RAYLAUNCH_hunter2: 1}\nresources: {hunter2: 1}\ntimeout_s: hunter2\n",
    "date": "a: 2026-99-99\nb: hunter2\n",
    "folder": "entrypoint: x\nworking_dir: /hunter2\n",
    "user": "entrypoint: x\nworking_dir: ~hunter2/x\n",
    "hidden": "entrypoint: x\nworking_dir: .hunter2\n",
    "requirements": "entrypoint: x\nenvironment: pip:../hunter2\n",
    "brackets": "[" * 3000,
}


@pytest.mark.parametrize("name", FILES)
def test_no_error_about_a_job_file_quotes_it(project: Path, name: str) -> None:
    (project / "it.yaml").write_text(FILES[name])
    message = refusal(project, {"job_file": "it.yaml"})
    assert "hunter2" not in message
    assert len(message) < 1200


def test_an_error_about_a_job_file_names_its_line_and_what_was_expected(project: Path) -> None:
    (project / "it.yaml").write_text("entrypoint: x\nresources:\n  gpus: none\n")
    assert "it.yaml:3: resources.gpus is not a whole number" in refusal(project, {"job_file": "it.yaml"})


CLUSTERS = {name: text for name, text in FILES.items() if name not in {"folder", "user", "hidden", "requirements"}} | {
    "kind": "kind: hunter2\n",
    "host": "kind: ssh\nhosts: [hunter2 hunter2]\n",
    "token": "kind: existing\naddress: hunter2\n",
    "ray": "cluster_name: a\nprovider: {type: hunter2}\n",
    "ray key": "cluster_name: a\nprovider: {type: local}\nhunter2: 1\n",
}


@pytest.mark.parametrize("name", CLUSTERS)
def test_no_error_about_a_cluster_file_quotes_it(project: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "elsewhere").write_text(CLUSTERS[name])
    (project / "cluster.yaml").symlink_to("elsewhere")
    monkeypatch.chdir(project)
    monkeypatch.delenv("RAYLAUNCH_CLUSTER_FILE", raising=False)

    async def tell(_news: ToolProgress) -> None:
        pass

    with pytest.raises(SpecError) as caught:
        ToolCall(restarts=False, tell=tell, roots=roots_in(project)).place()
    assert "hunter2" not in str(caught.value)


def test_a_working_directory_that_becomes_a_link_after_the_check_is_not_packed(project: Path) -> None:
    (project / "code").mkdir()
    (project / "code" / "train.py").write_text("")
    spec = _spec_of(TrainJob(entrypoint="python train.py", working_dir="code"), roots_in(project))
    (project / "code").rename(project / "before")
    (project / "code").symlink_to(project.parent / ".ssh")
    (project.parent / ".ssh" / "train.py").write_text("")
    with pytest.raises(SpecError, match="link"):
        asyncio.run(packed_job(spec, may_send({})))
