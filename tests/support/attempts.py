"""Attempts as a test needs them: what a controller would ask a node to run."""

from __future__ import annotations

from raylaunch.contract import AttemptSpec


def attempt_spec(attempt: str, *, epoch: str = "epoch-1", entrypoint: str = "true") -> AttemptSpec:
    """Return the spec of an attempt that needs nothing."""
    job, _, number = attempt.rpartition("-")
    return {
        "attempt": attempt,
        "tag": f"cluster/{attempt}",
        "job": job,
        "name": job,
        "n": int(number),
        "cluster": "test",
        "epoch": epoch,
        "entrypoint": entrypoint,
        "launcher": "script",
        "processes": None,
        "cpus": None,
        "env": {},
        "secrets": [],
        "environment": {"kind": "default", "value": "", "requirements": [], "packages": []},
        "envs_dir": "",
        "wheels": [],
        "links": [],
        "gpus": 0,
        "arch": "",
        "timeout_s": None,
        "grace_s": 1.0,
        "outputs": [],
        "outputs_size": 1 << 30,
        "outputs_files": 10_000,
        "wandb": {
            "mode": "disabled",
            "run_id": "",
            "project": "",
            "entity": "",
            "group": "",
            "job_type": "",
            "name": "",
            "tags": [],
            "notes": "",
            "earlier": [],
        },
        "job_dir": "",
        "moved_from": "",
    }
