"""One YAML file, read with the line of every key. The only module that knows PyYAML."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import yaml

from raylaunch.errors import SpecError

_OF_A_PARSER = re.compile(r"(?:[^'\"]|'<[a-z ]+>')*")
"""The part of a parser's message before it quotes the file, which may contain secrets."""

KeyPath = tuple[str | int, ...]
"""Path of a value: ``("resources", "gpus")``, ``("tags", 0)``."""


class YamlFile(NamedTuple):
    """The content of a file, and the line of each value."""

    path: Path
    data: dict[str, object]
    lines: dict[KeyPath, int]
    quoted: bool = True
    """Whether errors may quote it; not if the reader may be misled about which file it is."""

    def where(self, path: KeyPath) -> str:
        """Return ``file:line`` of a value, or of the nearest one around it; else only the file."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.lines:
                return f"{self.path}:{self.lines[path[:length]]}"
        return str(self.path)


def read_yaml(path: Path, *, quoted: bool = True) -> YamlFile:
    """Read one file that contains a mapping; an empty file is an empty mapping. `quoted` as for `parse_yaml`.

    Raises:
        SpecError: there is no such file, it cannot be read, is not YAML, or gives a key twice.
    """
    return parse_yaml(_text_of(path), path, quoted=quoted)


def parse_yaml(text: str, path: Path, *, quoted: bool = True) -> YamlFile:
    """Parse the text of a file that contains a mapping.

    Args:
        text: the whole file.
        path: its path, for messages.
        quoted: whether errors may quote it; else they have only its path and line.

    Raises:
        SpecError: it is not YAML, or gives a key twice.
    """
    try:
        return _parsed(text, path)._replace(quoted=quoted)
    except SpecError as error:
        if quoted:
            raise
        msg = "this is not a valid file: a YAML mapping is expected"
        raise SpecError(msg, where=error.where, hint="it must contain keys with values, each key once") from None


def _parsed(text: str, path: Path) -> YamlFile:
    try:
        loader = yaml.SafeLoader(text)
    except yaml.YAMLError as error:
        raise _not_yaml(path, error) from None
    try:
        node = loader.get_single_node()
        if node is None:
            return YamlFile(path, {}, {})
        if not isinstance(node, yaml.MappingNode):
            msg = f"the file contains {_kind(node)}, not keys with values"
            raise SpecError(msg, where=f"{path}:{_line(node)}", hint="write it as: key: value")
        lines: dict[KeyPath, int] = {}
        _walk(path, node, (), lines, set())
        data = loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # an impossible date; endless brackets
        raise _not_yaml(path, error) from None
    finally:
        loader.dispose()
    return YamlFile(path, data, lines)


def with_item(text: str, key: str, item: object) -> str:
    """Return the text of a file with one more item at the end of the list `key`; the rest is unchanged.

    Raises:
        SpecError: there is no such list in it.
    """
    node = _list_node(text, key)
    written = yaml.safe_dump(item, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
    if node.flow_style:
        end = node.end_mark.index - 1
        return f"{text[:end].rstrip()}{', ' if node.value else ''}{written}{text[end:]}"
    line = max(mark.line for mark in _ends(node)) + 1
    lines = text.splitlines(keepends=True)
    if not lines[line - 1].endswith("\n"):
        lines[line - 1] += "\n"
    return "".join([*lines[:line], f"{' ' * node.start_mark.column}- {written}\n", *lines[line:]])


def without_item(text: str, key: str, index: int) -> str:
    """Return the text of a file without one item of the list `key`; the rest is unchanged.

    Raises:
        SpecError: there is no such list in it.
    """
    node = _list_node(text, key)
    item = node.value[index]
    if node.flow_style:
        last = index == len(node.value) - 1
        begin = item.start_mark.index if not last or index == 0 else node.value[index - 1].end_mark.index
        end = item.end_mark.index if last else node.value[index + 1].start_mark.index
        return text[:begin] + text[end:]
    lines = text.splitlines(keepends=True)
    return "".join([*lines[: item.start_mark.line], *lines[max(mark.line for mark in _ends(item)) + 1 :]])


def _list_node(text: str, key: str) -> yaml.SequenceNode:
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    found = next((item for name, item in root.value if name.value == key), None) if root else None
    if not isinstance(found, yaml.SequenceNode):
        msg = f"there is no list {key!r} in the file"
        raise SpecError(msg, field=key)
    return found


def _ends(node: yaml.Node) -> list[yaml.Mark]:
    """Return where a node's text ends; for a block, where its parts end, because its own end is after comments."""
    if not isinstance(node, yaml.CollectionNode) or node.flow_style or not node.value:
        return [node.end_mark]
    parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
    return [mark for part in parts for mark in _ends(part)]


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        msg = f"{path}: there is no such file"
        raise SpecError(msg, hint=f"looked in {path.absolute().parent}") from None
    except IsADirectoryError:
        msg = f"{path}: this is a folder, not a file"
        raise SpecError(msg, hint="name the YAML file in it") from None
    except UnicodeDecodeError as error:
        msg = f"{path}: the file is not UTF-8 text (byte {error.start})"
        raise SpecError(msg, hint="save it as UTF-8") from None
    except OSError as error:
        msg = f"{path}: the file cannot be read: {error.strerror}"
        raise SpecError(msg) from None


def _not_yaml(path: Path, error: Exception) -> SpecError:
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    why = (error.problem if isinstance(error, yaml.MarkedYAMLError) else None) or f"{error}".partition("\n")[0]
    why = (_OF_A_PARSER.match(why) or [""])[0].strip().removesuffix(":")
    where = f"{path}:{mark.line + 1}" if mark else str(path)
    return SpecError(f"this is not YAML: {why}", where=where, hint="tabs, colons and quotes are the usual causes")


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _kind(node: yaml.Node) -> str:
    return "a list" if isinstance(node, yaml.SequenceNode) else "one value"


def _walk(file: Path, node: yaml.Node, at: KeyPath, lines: dict[KeyPath, int], seen: set[int]) -> None:
    if id(node) in seen:  # an alias: its lines are the anchor's
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            path: KeyPath = (*at, index)
            lines[path] = _line(item)
            _walk(file, item, path, lines, seen)
    elif isinstance(node, yaml.MappingNode):
        for key, item in node.value:
            path = (*at, str(key.value))
            if path in lines and key.value != "<<":
                dotted = ".".join(str(part) for part in path)
                msg = f"the key {dotted!r} is given twice (first on line {lines[path]})"
                raise SpecError(msg, where=f"{file}:{_line(key)}", field=dotted, hint="keep one of the two")
            lines[path] = _line(key)
            _walk(file, item, path, lines, seen)
