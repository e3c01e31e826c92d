"""``python -m tools.reference.mcp``: rewrites the tools' part of docs/mcp.md from the tools themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from mcp.types import Tool as Listed

from mcp_server.tools import TOOLS

PAGE = Path(__file__).parents[2] / "docs" / "mcp.md"
BEGIN = "<!-- TOOLS: begin (written by `python -m tools.reference.mcp`) -->\n"
END = "<!-- TOOLS: end -->\n"
_NAMES = {"integer": "number", "boolean": "true or false", "string": "text", "object": "mapping"}


def reference() -> str:
    """Return the tools as Markdown."""
    return "\n".join(line for tool in TOOLS for line in _section(tool.listed()))


def page(text: str) -> str:
    """Return the page with its part about the tools brought up to date."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{reference()}\n{END}{after}"


def _section(tool: Listed) -> Iterator[str]:
    yield f"### `{tool.name}`"
    yield ""
    yield f"{tool.description} {_effect(tool)}"
    yield ""
    properties = tool.input_schema["properties"]
    if properties:
        yield "| argument | is | means |"
        yield "|---|---|---|"
        required = tool.input_schema.get("required", [])
        for name, schema in properties.items():
            yield f"| `{name}` | {_kind(schema, required=name in required)} | {schema.get('description', '')} |"
        yield ""
    answers = ", ".join(f"`{name}`" for name in (tool.output_schema or {})["properties"])
    yield f"Answers with {answers}."
    yield ""


def _effect(tool: Listed) -> str:
    hints = tool.annotations
    assert hints  # noqa: S101 -- every tool has them; a test holds it
    if hints.read_only_hint:
        return "*Reads.*"
    return "*Writes, and ends something.*" if hints.destructive_hint else "*Writes.*"


def _kind(schema: Mapping[str, object], *, required: bool) -> str:
    words = _type(schema)
    if "default" in schema:
        words += f", by default `{schema['default']}`"
    bounds = [str(schema[key]) for key in ("minimum", "maximum") if key in schema]
    if len(bounds) == 2:  # noqa: PLR2004 -- from, to
        words += f", {bounds[0]} to {bounds[1]}"
    return f"{words}, required" if required else words


def _type(schema: Mapping[str, object]) -> str:
    match schema:
        case {"enum": list(words)}:
            return " \\| ".join(f"`{word}`" for word in words)
        case {"anyOf": list(options)}:
            return " or ".join(_type(option) for option in options)
        case {"type": "array", "items": dict(items)}:
            return f"list of {_type(items)}"
        case {"type": str(name)}:
            return {"integer": "number", "boolean": "true or false", "string": "text", "object": "mapping"}.get(
                name, name
            )
        case _:
            return "anything"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
