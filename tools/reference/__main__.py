"""``python -m tools.reference [--check]``: writes the references, or reports which are not up to date."""

from __future__ import annotations

import sys

from tools.reference.pages import ROOT, UPDATE, pages


def main(arguments: list[str]) -> int:
    """Write what is not up to date, or with ``--check`` only name it; return the exit status."""
    check = arguments == ["--check"]
    if arguments and not check:
        print("usage: python -m tools.reference [--check]", file=sys.stderr)
        return 2
    old = {path: text for path, text in pages().items() if not path.exists() or path.read_text("utf-8") != text}
    for path, text in old.items():
        print(f"{path.relative_to(ROOT)} {f'is not up to date; update it with: {UPDATE}' if check else 'written'}")
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return 1 if check and old else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
