"""What a program did not find, and the rule by which it was left out."""

from __future__ import annotations

import pytest

from raylaunch.controller.scheduler.diagnose import rule_against

CODE = "/var/lib/raylaunch/node/attempts/train-abc-1/code"


@pytest.mark.parametrize(
    ("line", "rule", "path"),
    [
        ("ModuleNotFoundError: No module named 'utils.logging'", ".gitignore: log*", "utils/logging.py"),
        ("ModuleNotFoundError: No module named 'data'", ".gitignore: /data/", "data/"),
        ("ModuleNotFoundError: No module named 'wandb.sdk'", "built in: wandb/", "wandb/sdk.py"),
        ("/usr/bin/python: No module named pkg.logs", "pkg/.gitignore: logs.py", "pkg/logs.py"),
        ("FileNotFoundError: [Errno 2] No such file or directory: 'data/x.csv'", ".gitignore: data/", "data/x.csv"),
        (f"python: can't open file '{CODE}/train.py': [Errno 2]", ".raylaunchignore: *.py", "train.py"),
        ("python did not find 'conf.yaml' in the working directory", "../.gitignore: conf*", "conf.yaml"),
    ],
)
def test_a_missing_file_names_the_rule_that_excluded_it(line: str, rule: str, path: str) -> None:
    assert rule_against(f"Traceback\n{line}\n", (".gitignore: *.pt", rule)) == f"{path} is not sent: {rule}"


@pytest.mark.parametrize(
    "line",
    [
        "ModuleNotFoundError: No module named 'numpy'",
        "FileNotFoundError: [Errno 2] No such file or directory: '/raid/log.txt'",
        "FileNotFoundError: [Errno 2] No such file or directory: '../log.txt'",
        "log.txt is long",
        "",
    ],
)
def test_a_missing_file_that_no_rule_excluded_has_no_hint(line: str) -> None:
    assert rule_against(line, (".gitignore: log*", "sub/.gitignore: *", "../.gitignore: /exp/numpy/")) == ""
