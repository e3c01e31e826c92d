"""The training's variables and command, and what it means when its program is not found."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raylaunch import contract
from raylaunch.entrypoint import SHELLS

if TYPE_CHECKING:
    from raylaunch.contract import AttemptSpec

_MANY_FILES = 5000
_FEW_LINES = 5
_NOT_RUN = 126
"""A shell's exit status for a file that it cannot start."""
_FIRST_LINE = 256
_SCRIPT = 256 * 1024
_SHEBANG = re.compile(rb"#!\s*\S*/(?:env )?(?:ba|da|a|k|z)?sh\b")
_NOT_FOUND = 127
"""A shell's exit status for a command that is not there."""
_USAGE = 2
"""Python's exit status for a script that is not there, and a shell's for one that it cannot read."""
_RUNNER_ONLY = ("OMP_NUM_THREADS", "PYTHONPATH", contract.VAR_NODE_ROOT, contract.VAR_PATH)
"""Ray sets OMP_NUM_THREADS to 1 for a driver without CPUs, which would slow a training down without a word. Its
PYTHONPATH may lead to the cluster's own raylaunch, which is not for every Python, nor for every environment."""
_OF_A_SHELL = (
    *("WANDB_MODE", "WANDB_DISABLED", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_NAME", "WANDB_TAGS", "WANDB_NOTES"),
    *("WANDB_RUN_GROUP", "WANDB_JOB_TYPE", "WANDB_RUN_ID", "WANDB_RESUME"),
)
"""A submission brings these along from the shell in which it is made; here they are those of the shell in which Ray
was started, which is rarely intended."""
_SHELL_MISSING = re.compile(
    r"^\S*sh: (?:line )?\d+: (.+?): (?:command )?not found$|^\S*sh: line \d+: (.+?): No such file or directory$",
    re.MULTILINE,
)
_PYTHON_MISSING = re.compile(r"can't open file '([^']+)': \[Errno 2\]")
_MODULE_MISSING = re.compile(r"^\S*python\S*: No module named (\S+?)$", re.MULTILINE)
_COMES_WITH = {"torchrun": "PyTorch", "accelerate": "accelerate", "deepspeed": "deepspeed"}


class EntrypointProblem(Exception):  # noqa: N818 -- the word that the exit facts use
    """The program to run is not there; the text names what is near."""


def base_variables(environ: Mapping[str, str], spec: AttemptSpec, secrets: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that the environment is prepared with: the machine's, then the job's, then its secrets.

    Ray's own are left out: its token is an account's whole power over the cluster.
    """
    return {**without_ray(environ), **spec["env"], **secrets}


def without_ray(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the machine's variables without those of Ray, and without those meant for this runner."""
    kept = {
        name: value
        for name, value in environ.items()
        if not name.startswith(("RAY_", "__RAY")) and name not in (*contract.RAY_SECRETS, *_RUNNER_ONLY, *_OF_A_SHELL)
    }
    if path := environ.get(contract.VAR_PATH):
        kept["PATH"] = path
    return kept


def job_variables(spec: AttemptSpec, folder: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables with the job's ids, folders and GPUs."""
    kept = Path(spec["job_dir"] or folder)
    found = {
        contract.VAR_ATTEMPT: spec["tag"],
        contract.VAR_JOB: spec["job"],
        contract.VAR_JOB_NAME: spec["name"],
        contract.VAR_ATTEMPT_N: str(spec["n"]),
        contract.VAR_CLUSTER: spec["cluster"],
        contract.VAR_OUTPUT_DIR: str(kept / contract.OUTPUTS),
        contract.VAR_CHECKPOINT_DIR: str(kept / contract.CHECKPOINTS),
        contract.VAR_PROGRESS: str(folder / contract.PROGRESS),
        "PYTHONUNBUFFERED": spec["env"].get("PYTHONUNBUFFERED", "1"),
    }
    if spec["launcher"] != "ray" and "RAY_ADDRESS" not in spec["env"]:
        found["RAY_ADDRESS"] = "local"  # without it ray.init() finds the cluster's Ray, has no token, and hangs
    if not spec["gpus"]:
        found["CUDA_VISIBLE_DEVICES"] = ""
    elif "CUDA_VISIBLE_DEVICES" in environ:
        found["CUDA_VISIBLE_DEVICES"] = environ["CUDA_VISIBLE_DEVICES"]
    return found


def moved(spec: AttemptSpec) -> list[str]:
    """Return a warning where the checkpoints have another path than in the attempt before."""
    before = spec["moved_from"]
    if not before:
        return []
    why = "a checkpoint that records its own path (Lightning, Transformers) may not be found"
    return [f"the checkpoints are in {spec['job_dir']}, and were in {before}: {why}; give the hosts the same root"]


def gpu_ids(spec: AttemptSpec, env: Mapping[str, str]) -> list[str]:
    """Return the ids of the GPUs that the attempt has."""
    return [word for word in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if word] if spec["gpus"] else []


def command(entrypoint: str | list[str], env: Mapping[str, str], code: Path) -> list[str]:
    """Return the program and its arguments; text is a shell command, which fails as soon as a part of it does.

    Raises:
        EntrypointProblem: a program given as a list is not there.
    """
    path = env.get("PATH") or os.defpath
    if isinstance(entrypoint, str):
        bash = shutil.which("bash", path=path)
        return [bash, "-eo", "pipefail", "-c", entrypoint] if bash else ["/bin/sh", "-ec", entrypoint]
    program = entrypoint[0]
    if "/" in program:
        place = code / program
        if not place.is_file():
            msg = f"the program {program!r} is not there{nearest_file(program, code)}"
            raise EntrypointProblem(msg)
        if windows := line_ends_of(place, code):
            raise EntrypointProblem(windows)
        if not os.access(str(place), os.X_OK):
            msg = f"the program {program!r} is not executable; run it with its interpreter: python {program}"
            raise EntrypointProblem(msg)
        return [str(place), *entrypoint[1:]]
    found = shutil.which(program, path=path)
    if found is None:
        raise EntrypointProblem(_not_on_path(program, path, code))
    return [found, *entrypoint[1:]]


def _not_on_path(program: str, path: str, code: Path) -> str:
    if (code / program).is_file():
        hint = f"; the working directory has a file of that name: run it as python {program} or ./{program}"
        return f"the program {program!r} is not on the PATH of the job's environment{hint}"
    folders = [Path(folder) for folder in path.split(os.pathsep) if Path(folder).is_dir()]
    names = {file.name for folder in folders for file in folder.iterdir()}
    import difflib  # noqa: PLC0415 -- only for a mistake; each start would pay for it

    near = difflib.get_close_matches(program, sorted(names), n=1, cutoff=0.7)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"the program {program!r} is not on the PATH of the job's environment{hint}; its PATH is {path}"


def nearest_file(name: str, code: Path) -> str:
    """Return words that name the file of the working directory that is nearest to `name`, or what is there."""
    import difflib  # noqa: PLC0415 -- as above

    files = list(_list_files(code))
    wanted = os.path.relpath(name, str(code)) if Path(name).is_absolute() else os.path.normpath(name)
    same = [file for file in files if Path(file).name == Path(wanted).name]
    near = same or difflib.get_close_matches(wanted, files, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    if not files:
        return "; the working directory is empty"
    return f"; the working directory has: {', '.join(sorted(files, key=lambda file: (file.count('/'), file))[:5])}"


def _list_files(code: Path) -> Iterator[str]:
    count = 0
    for folder, _, names in os.walk(str(code)):
        for name in names:
            count += 1
            if count > _MANY_FILES:
                return
            yield os.path.relpath(Path(folder) / name, code)


def line_ends_of(script: Path, code: Path) -> str:
    """Return a sentence when a script has Windows line ends, with which its interpreter is not found; else nothing."""
    first = _first_line(script)
    if not first.startswith(b"#!") or not first.endswith(b"\r"):
        return ""
    return _windows_line_ends(script, code, "so its interpreter is not found")


def shell_line_ends(entrypoint: str | Sequence[str], code: Path) -> str:
    """Return a sentence when a shell script of the entrypoint has Windows line ends; else nothing."""
    words = entrypoint.split() if isinstance(entrypoint, str) else entrypoint
    for at, word in enumerate(words):
        script = code / word.strip("'\"")
        before = words[at - 1] if at else ""
        shell = before.rpartition("/")[2] in SHELLS or word.endswith(".sh") or _SHEBANG.match(_first_line(script))
        if shell and b"\r\n" in _head(script, _SCRIPT):
            return _windows_line_ends(script, code, "which its shell takes for a part of each line")
    return ""


def _first_line(script: Path) -> bytes:
    return _head(script, _FIRST_LINE).partition(b"\n")[0]


def _head(script: Path, size: int) -> bytes:
    try:
        if not script.is_file():  # a pipe would keep its reader waiting
            return b""
        with script.open("rb") as file:
            return file.read(size)
    except (OSError, ValueError):
        return b""


def _windows_line_ends(script: Path, code: Path, effect: str) -> str:
    name = os.path.relpath(str(script), str(code))
    return f"{name!r} has Windows line ends (CRLF), {effect}; fix it: sed -i 's/\\r$//' {name}"


def _explain_line_ends(entrypoint: str | Sequence[str], status: int, code: Path) -> str:
    if status not in {_NOT_FOUND, _NOT_RUN, _USAGE}:
        return ""
    words = entrypoint.split() if isinstance(entrypoint, str) else entrypoint
    started = (line_ends_of(code / word, code) for word in words) if status != _USAGE else iter(())
    return shell_line_ends(entrypoint, code) or next(filter(None, started), "")


def explain_missing(entrypoint: str | list[str], status: int, log_tail: str, code: Path) -> str:
    """Return a sentence when the program ended because a file to run was not found, else an empty text."""
    if windows := _explain_line_ends(entrypoint, status, code):
        return windows
    if status == _NOT_FOUND and isinstance(entrypoint, str):
        for match in _SHELL_MISSING.finditer(log_tail):
            program = match.group(1) or match.group(2)
            hint = nearest_file(program, code) if "/" in program or program.endswith((".py", ".sh")) else ""
            package = _COMES_WITH.get(program)
            hint = f"; it comes with {package}, which the job's environment does not have" if package else hint
            return f"the shell did not find {program!r}{hint}"
    if status == _USAGE:
        found = _PYTHON_MISSING.search(log_tail)
        if found:
            missing = found.group(1)
            relative = os.path.relpath(missing, str(code))
            return f"python did not find {relative!r} in the working directory{nearest_file(missing, code)}"
    if status == 1:
        found = _MODULE_MISSING.search(log_tail)
        if found and log_tail.count("\n") < _FEW_LINES:
            return f"python did not find the module {found.group(1)!r}"
    return ""
