"""The references below docs/reference, and the tools' part of docs/mcp.md, written from the code that they are about.

``python -m tools.reference`` writes them, ``--check`` reports whether they are up to date.
"""
