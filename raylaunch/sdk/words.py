"""A job's own words, for people's eyes: untrusted text that a terminal or a page must not obey."""

from __future__ import annotations

import re

_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def plain(text: str) -> str:
    """Return a job's own words without sequences that a terminal would obey."""
    return _CONTROL.sub("", text)
