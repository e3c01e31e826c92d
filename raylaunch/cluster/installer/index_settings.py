"""Which package index pip is configured to use, in uv's words, and the other way round. uv does not read pip's files.

What is configured for the one that is asked always counts more.
"""

from __future__ import annotations

import configparser
import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

_UV_INDEX = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_NO_INDEX", "UV_FIND_LINKS")
_PIP_INDEX = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL")
_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def index_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what uv's environment needs so that it asks the index, proxy and certificates that pip would."""
    pip = _pip_settings(environ)
    added: dict[str, str] = {}
    if "cert" in pip and "SSL_CERT_FILE" not in environ:
        added["SSL_CERT_FILE"] = pip["cert"]
    if "proxy" in pip and not any(name in environ for name in _PROXIES):
        added |= {"HTTPS_PROXY": pip["proxy"], "HTTP_PROXY": pip["proxy"]}
    if any(name in environ for name in _UV_INDEX) or _uv_names_an_index(environ):
        return added
    if "index-url" in pip:
        added["UV_DEFAULT_INDEX"] = pip["index-url"]
    if "extra-index-url" in pip:
        added |= {"UV_INDEX": " ".join(pip["extra-index-url"].split()), "UV_INDEX_STRATEGY": "unsafe-best-match"}
    if "find-links" in pip:
        added["UV_FIND_LINKS"] = ",".join(pip["find-links"].split())
    if "trusted-host" in pip:
        added["UV_INSECURE_HOST"] = " ".join(pip["trusted-host"].split())
    if pip.get("no-index", "").lower() in {"1", "true", "yes", "on"}:
        added["UV_NO_INDEX"] = "1"
    return added


def pip_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what pip's environment needs so that it downloads with the credentials that uv has; and as it is asked."""
    added = {"PIP_CONSTRAINT": os.devnull, "PIP_REQUIRE_VIRTUALENV": "0", "PIP_NO_COLOR": "1"}
    index = environ.get("UV_DEFAULT_INDEX") or environ.get("UV_INDEX_URL")
    if index and not any(name in environ for name in _PIP_INDEX) and "index-url" not in _pip_settings(environ):
        added["PIP_INDEX_URL"] = index
    if "SSL_CERT_FILE" in environ and "PIP_CERT" not in environ:
        added["PIP_CERT"] = environ["SSL_CERT_FILE"]
    return added


def _pip_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Return pip's settings by name, as it would read them: system, user, environment's own, variables."""
    found: dict[str, str] = {}
    for path in _pip_files(environ):
        parser = configparser.RawConfigParser()
        with contextlib.suppress(OSError, configparser.Error, UnicodeDecodeError):
            parser.read_string(path.read_text(encoding="utf-8"))
            for section in ("global", "download", "install"):
                found |= dict(parser[section]) if parser.has_section(section) else {}
    for name, value in environ.items():
        if name.startswith("PIP_") and value:
            found[name[4:].lower().replace("_", "-")] = value
    return found


def _pip_files(environ: Mapping[str, str]) -> Iterator[Path]:
    home = Path(environ.get("HOME") or "~").expanduser()
    yield from (Path("/etc/xdg/pip/pip.conf"), Path("/etc/pip.conf"))
    yield home / ".pip" / "pip.conf"
    yield home / "Library" / "Application Support" / "pip" / "pip.conf"
    yield Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "pip" / "pip.conf"
    yield Path(sys.prefix) / "pip.conf"
    if environ.get("PIP_CONFIG_FILE"):
        yield Path(environ["PIP_CONFIG_FILE"])


def _uv_names_an_index(environ: Mapping[str, str]) -> bool:
    home = Path(environ.get("HOME") or "~").expanduser()
    config = Path(environ.get("XDG_CONFIG_HOME") or home / ".config")
    for path in (Path(environ.get("UV_CONFIG_FILE") or config / "uv" / "uv.toml"), Path("/etc/uv/uv.toml")):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if "index" in path.read_text(encoding="utf-8"):
                return True
    return False
