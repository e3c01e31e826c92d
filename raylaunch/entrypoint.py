"""Parses entrypoints: whether one starts a Python program, or a launcher that starts ranks itself. Pure functions.

Used on both sides: a spec that torchrun cannot start is refused when it is created, and the runner starts the program
that was found. A pasted ``torchrun …`` is found after variables, ``uv run`` and the like, and never wrapped again.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import NamedTuple, overload

_TOKEN = re.compile(
    r"""
    (?P<space>(?:[ \t]|\\\n)+)
  | (?P<comment>\#[^\n]*)
  | (?P<redirect>&>>?|\d*(?:<<<|<>|>>|>\||>&|<&|<(?!<)|>))
  | (?P<operator>\|\||&&|;;|\|&|<<|[;&|()\n])
  | (?P<word>(?:'[^']*'|"(?:\\.|[^"\\])*"|\\.|\$\((?:[^()]|\([^()]*\))*\)|`[^`]*`|[^\s'"\\|&;()<>`])+)
  | (?P<other>.)
    """,
    re.VERBOSE | re.DOTALL,
)
_PIECE = re.compile(r"""'([^']*)'|"((?:\\.|[^"\\])*)"|\\(.)|([^'"\\]+)""", re.DOTALL)
_IN_DOUBLE_QUOTES = re.compile(r'\\([$`"\\])|\\\n')


class Word(NamedTuple):
    """One word without its quotes, from ``[start:end]`` of the text or list."""

    text: str
    start: int
    end: int


class Line(NamedTuple):
    """A command line: its simple commands, and the operators between them (``?`` for unknown ones)."""

    commands: list[list[Word]]
    operators: list[str]


def read(entrypoint: str | Sequence[str]) -> Line:
    """Return the simple commands of a shell command (text), or of a program with its arguments (a list)."""
    if not isinstance(entrypoint, str):
        return Line([[Word(word, at, at + 1) for at, word in enumerate(entrypoint)]], [])
    commands: list[list[Word]] = [[]]
    operators: list[str] = []
    to_file = False
    for match in _TOKEN.finditer(entrypoint):
        kind = match.lastgroup
        if kind == "word":
            if not to_file:
                commands[-1].append(Word(_unquoted(match.group()), match.start(), match.end()))
            to_file = False
        elif kind == "redirect":
            to_file = True
        elif kind in ("operator", "other"):
            operators.append(match.group() if kind == "operator" else "?")
            commands.append([])
            to_file = False
    return Line([command for command in commands if command], operators)


def _unquoted(raw: str) -> str:
    return "".join(
        single or _IN_DOUBLE_QUOTES.sub(r"\1", double) or escaped or bare
        for single, double, escaped, bare in _PIECE.findall(raw)
    )


@overload
def spliced(entrypoint: str, start: int, end: int, words: Sequence[str]) -> str: ...
@overload
def spliced(entrypoint: list[str], start: int, end: int, words: Sequence[str]) -> list[str]: ...
def spliced(entrypoint: str | list[str], start: int, end: int, words: Sequence[str]) -> str | list[str]:
    """Return the command with `words` at ``[start:end]``; the rest is unchanged."""
    if not isinstance(entrypoint, str):
        return [*entrypoint[:start], *words, *entrypoint[end:]]
    before, after = entrypoint[:start], entrypoint[end:]
    text = " ".join(shlex.quote(word) for word in words)
    left = " " if before and not before[-1].isspace() else ""
    right = " " if after and not after[0].isspace() else ""
    return f"{before}{left}{text}{right}{after}"


TORCHRUN = "torchrun"
ACCELERATE = "accelerate"
DEEPSPEED = "deepspeed"

COUNTS = {
    TORCHRUN: ("nproc-per-node", "nproc"),
    ACCELERATE: ("num-processes",),
    DEEPSPEED: ("num-gpus", "num-accelerators", "include", "exclude"),
}
"""Options with the number of ranks."""
PLACES = (
    *("rdzv-backend", "rdzv-endpoint", "rdzv-id", "rdzv-conf", "node-rank", "master-addr"),
    *("num-machines", "machine-rank", "main-process-ip", "num-nodes", "hostfile", "no-ssh", "launcher"),
)
"""Options for the rendezvous of ranks, or for several nodes: with them, no option is added."""

_PROGRAMS = {
    "torchrun": TORCHRUN,
    "accelerate-launch": ACCELERATE,
    "deepspeed": DEEPSPEED,
    "ds": DEEPSPEED,
}
_MODULES = {
    "torch.distributed.run": TORCHRUN,
    "torch.distributed.launch": TORCHRUN,
    "accelerate.commands.launch": ACCELERATE,
    "deepspeed.launcher.runner": DEEPSPEED,
}
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*\+?=")
_PYTHON = re.compile(r"python[\d.]*")
_LOCAL = ("127.0.0.1", "localhost", "::1")
_BEFORE = ("env", "exec", "time", "nohup", "command")
_RUN = ("uv", "poetry", "pdm", "pipenv", "pixi", "hatch", "rye", "conda", "mamba", "micromamba")
_WRAPPERS = ("nice", "ionice", "numactl", "taskset", "timeout", "stdbuf", "nsys", "ncu", "uvx", "srun")
WRAPPERS = frozenset((*_BEFORE, *_RUN, *_WRAPPERS, "sudo", "make", "tini", "dumb-init", "script", "xargs"))
"""Programs that run another program and end with it."""
_NAMES_ONE = ("-p", "--python", "--with", "--from", "-n", "--name", "--env")
"""Options of a wrapper whose value may look like a program."""
_BRING_ONE = (*_RUN, "uvx")
"""These provide their own interpreter."""
SHELLS = ("sh", "bash", "zsh", "dash", "ash", "ksh", "fish", "busybox")
_WITH_VALUE = ("-W", "-X", "--check-hash-based-pycs")
_MODULE = ("-m", "--module")
_ELSEWHERE = ("-C", "--chdir", "--directory", "--project", "--cwd")
"""Options with which a wrapper runs its program in another folder."""
_EXPANDED = "$`*?[{"
_IN_ORDER = ("&&", ";", "\n")
_ADVICE = (
    "write the program alone (python train.py), or with launcher: script a command that starts the ranks itself "
    "(torchrun --nproc-per-node=2 train.py)"
)


class Pasted(NamedTuple):
    """A launcher in the entrypoint that starts ranks itself."""

    launcher: str
    options: dict[str, str]
    """Its options, for example ``{"nproc-per-node": "2"}``; empty text for those without a value."""
    at: int
    """Index for further options; -1 if none can be added."""

    @property
    def ranks(self) -> str:
        """The number of ranks as written (``4``, ``gpu``); empty if it has none."""
        return next((self.options[name] for name in COUNTS[self.launcher] if name in self.options), "")

    @property
    def names_places(self) -> bool:
        """Whether it sets the rendezvous of its ranks itself, or several nodes."""
        nodes = self.options.get("nnodes", "1")
        named = {name: self.options[name] for name in PLACES if name in self.options}
        if named.get("master-addr") in _LOCAL:
            del named["master-addr"]
        if named.get("node-rank", named.get("machine-rank")) == "0":
            named = {name: value for name, value in named.items() if name not in ("node-rank", "machine-rank")}
        if named.get("num-machines", named.get("num-nodes")) == "1":
            named = {name: value for name, value in named.items() if name not in ("num-machines", "num-nodes")}
        return bool(named) or nodes not in ("1", "1:1")


def pasted(entrypoint: str | Sequence[str]) -> Pasted | None:
    """Return the launcher in the entrypoint, or None."""
    for command in read(entrypoint).commands:
        at = _program(command)
        found = _launcher(command, at) if at < len(command) else None
        if found is not None:
            return found
    return None


def problem_of(entrypoint: str | Sequence[str]) -> str:
    """Return why torchrun cannot start this as ranks, and what to write instead; empty if it can."""
    line = read(entrypoint)
    if pasted(entrypoint) is not None:
        return ""
    odd = next((operator for operator in line.operators if operator not in _IN_ORDER), "")
    if odd:
        shown = "invalid syntax" if odd == "?" else repr(odd)
        return f"torchrun starts a Python program, and this is a shell command with {shown}; {_ADVICE}"
    programs = [found for found in map(_python, line.commands) if found is not None]
    if not programs:
        return f"torchrun starts a Python program, and this names none; {_ADVICE}"
    if len(programs) > 1:
        return f"torchrun starts one Python program, and this names {len(programs)}; {_ADVICE}"
    return ""


def python_word(entrypoint: str | Sequence[str]) -> str:
    """Return the interpreter that the entrypoint names; empty for that of the job's environment."""
    found = next(found for found in map(_python, read(entrypoint).commands) if found is not None)
    return found[2]


def script_of(entrypoint: str | Sequence[str]) -> str:
    """Return the file that the first command runs, as written, relative to its folder.

    Empty if there is none or it is unknown: a path with variables, or a command that changes the folder first.
    """
    line = read(entrypoint)
    command = line.commands[0] if line.commands else []
    at = _program(command)
    if at >= len(command) or any(word.text.partition("=")[0] in _ELSEWHERE for word in command[:at]):
        return ""
    text = _script_word(command, at)
    unclear = text.startswith(("/", "~", "-")) or any(letter in _EXPANDED for letter in text)
    return "" if unclear else text


def started_itself(entrypoint: str | Sequence[str], script: str) -> bool:
    """Return whether the first command is this file itself, not a program that reads it."""
    line = read(entrypoint)
    command = line.commands[0] if line.commands else []
    at = _program(command)
    return at < len(command) and command[at].text == script and "/" in script


def _script_word(command: Sequence[Word], at: int) -> str:
    words = [word.text for word in command]
    name = words[at].rpartition("/")[2]
    if _PYTHON.fullmatch(name):
        script = _script(command, at)
        plain = script is not None and words[script - 1] not in ("-m", "-c")
        return words[script] if script is not None and plain else ""
    if name in SHELLS:
        options = [word for word in words[at + 1 :] if word.startswith("-")]
        commanded = any("c" in option for option in options if not option.startswith("--"))
        return "" if commanded else next((word for word in words[at + 1 :] if not word.startswith("-")), "")
    if _launcher(command, at) is not None:
        following = range(at + 1, len(words))
        return next((words[n] for n in following if words[n].endswith(".py") and words[n - 1] not in _MODULE), "")
    return words[at] if "/" in words[at] or name.endswith(".py") else ""


def wrapped(entrypoint: str | list[str], launcher: Sequence[str], python: str) -> str | list[str]:
    """Return the entrypoint with its Python program started by a launcher.

    Args:
        entrypoint: one for which `problem_of` and `pasted` return nothing.
        launcher: the words before the program.
        python: the interpreter, between the two.
    """
    start, end, _ = next(found for found in map(_python, read(entrypoint).commands) if found is not None)
    return spliced(entrypoint, start, end, [*launcher, python])


def with_options(entrypoint: str | list[str], found: Pasted, options: Sequence[str]) -> str | list[str]:
    """Return the entrypoint with further options for its launcher; unchanged if none can be added."""
    return spliced(entrypoint, found.at, found.at, options) if found.at >= 0 and options else entrypoint


def _program(command: Sequence[Word]) -> int:
    """Return the index of the command's program, after wrappers and variables."""
    at = 0
    while at < len(command):
        text = command[at].text
        name = text.rpartition("/")[2]
        if name in _RUN and at + 1 < len(command) and command[at + 1].text == "run":
            return _scan(command, at + 2)
        if name in _WRAPPERS:
            return _scan(command, at + 1)
        passed = name in _BEFORE or _ASSIGNMENT.match(text) or (at and text.startswith("-"))
        if not passed:
            return at
        at += 1
    return at


def _scan(command: Sequence[Word], start: int) -> int:
    """Return the index of the first word that looks like a program of interest, else `start`."""
    for at in range(start, len(command)):
        before, text = command[at - 1].text, command[at].text
        name = text.rpartition("/")[2]
        known = name in _PROGRAMS or name == ACCELERATE or name in SHELLS or _PYTHON.fullmatch(name)
        if before not in _NAMES_ONE and not text.startswith("-") and (known or name.endswith(".py")):
            return at
    return start


def _launcher(command: Sequence[Word], at: int) -> Pasted | None:
    name = command[at].text.rpartition("/")[2]
    following = [word.text for word in command[at + 1 :]]
    if name in SHELLS:
        return _in_shell(following)
    if name in _PROGRAMS:
        return _with_options_of(_PROGRAMS[name], command, at)
    if name == ACCELERATE and following[:1] == ["launch"]:
        return _with_options_of(ACCELERATE, command, at + 1)
    if _PYTHON.fullmatch(name):
        script = _script(command, at)
        if script is None:
            return None
        text, module = command[script].text, command[script - 1].text == "-m"
        kind = _MODULES.get(text) if module else _PROGRAMS.get(text.rpartition("/")[2])
        return _with_options_of(kind, command, script) if kind else None
    return None


def _in_shell(arguments: Sequence[str]) -> Pasted | None:
    for at, option in enumerate(arguments[:-1]):
        if option.startswith("-") and option.endswith("c"):
            inner = pasted(arguments[at + 1])
            return inner._replace(at=-1) if inner else None
    return None


def _with_options_of(launcher: str, command: Sequence[Word], at: int) -> Pasted:
    """Return a launcher with its options, which end at the program that it starts."""
    options: dict[str, str] = {}
    words = [word.text for word in command[at + 1 :]]
    for index, word in enumerate(words):
        if word.endswith(".py") or word in ("-m", "--module", "--"):
            break
        if word.startswith("-"):
            name, equals, value = word.lstrip("-").partition("=")
            after = words[index + 1] if index + 1 < len(words) and not words[index + 1].startswith("-") else ""
            options[name.replace("_", "-")] = value if equals else after
    return Pasted(launcher, options, command[at].end)


def _script(command: Sequence[Word], at: int) -> int | None:
    """Return the index of the script, module or code that an interpreter runs; None if there is none."""
    at += 1
    while at < len(command):
        text = command[at].text
        if text in ("-m", "-c"):
            return at + 1 if at + 1 < len(command) else None
        if not text.startswith("-") or text == "-":
            return at
        at += 2 if text in _WITH_VALUE else 1
    return None


def _python(command: Sequence[Word]) -> tuple[int, int, str] | None:
    """Return the part of the text that a launcher with an interpreter replaces, and that interpreter."""
    at = _program(command)
    if at >= len(command):
        return None
    word = command[at]
    name = word.text.rpartition("/")[2]
    brings_one = any(before.text.rpartition("/")[2] in _BRING_ONE for before in command[:at])
    if _PYTHON.fullmatch(name) and _script(command, at) is not None:
        plain = word.text in ("python", "python3") and not brings_one
        return word.start, word.end, "" if plain else word.text
    if name.endswith(".py"):
        return word.start, word.start, "python" if brings_one else ""
    return None
