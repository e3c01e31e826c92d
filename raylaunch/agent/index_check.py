"""Checks whether this node reaches the package index that pip or uv would use."""

from __future__ import annotations

import configparser
import contextlib
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

LIMIT_S = 6.0
_NEEDLESS = ("PIP_NO_INDEX", "UV_NO_INDEX")
_PROXIES = ("http_proxy", "https_proxy")


def reaches_index(env: Mapping[str, str], *, kind: str) -> bool:
    """Return whether installing may work here. Blocks for at most `LIMIT_S` a check.

    Any response counts, a refusal too: pip then reports what is wrong. So does a setting that disables the index, since
    the node then has its own wheels.

    Args:
        env: the variables that a build would have; pip's and uv's settings among them.
        kind: of the environment, ``pip`` or ``uv``: each reads its own settings first.
    """
    settings = _settings(env)
    if any(env.get(name) for name in _NEEDLESS) or "no-index" in settings:
        return True
    of_uv = env.get("UV_DEFAULT_INDEX") or env.get("UV_INDEX_URL")
    of_pip = env.get("PIP_INDEX_URL") or settings.get("index-url")
    url = (of_uv or of_pip) if kind == "uv" else (of_pip or of_uv)
    url = url or _default_of_pip()
    return _answers(url, env) if url else _uv_reaches_index(env)


def _default_of_pip() -> str:
    """Return pip's default index; empty where there is no pip."""
    try:
        from pip._internal.models.index import PyPI  # noqa: PLC0415 -- it may not be there
    except ImportError:
        return ""
    return str(PyPI.simple_url)


def _uv_reaches_index(env: Mapping[str, str]) -> bool:
    """Let uv find a package where there is no pip. Without either, assume that it works: the build will show it."""
    uv = Path(sys.executable).with_name("uv")
    if not uv.is_file():
        return True
    argv = [str(uv), "pip", "compile", "--quiet", "--no-cache", "--no-header", "--no-annotate", "-"]
    try:
        done = subprocess.run(  # noqa: S603 -- fixed words
            argv, input="pip", env=dict(env), capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def _answers(url: str, env: Mapping[str, str]) -> bool:
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"}:
        return True  # a folder
    bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])).rstrip("/")
    proxies = {name[:-6].lower(): value for name, value in env.items() if name.lower() in _PROXIES and value}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies))
    request = urllib.request.Request(f"{bare}/pip/", headers={"User-Agent": "raylaunch"})  # noqa: S310 -- http, as above
    try:
        opener.open(request, timeout=LIMIT_S).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return not isinstance(error.reason, socket.gaierror | TimeoutError | ConnectionError) and not _no_route(error)
    except (OSError, ValueError):
        return False
    return True


def _no_route(error: urllib.error.URLError) -> bool:
    return type(error.reason) is OSError  # no route, no network; errors of TLS are of a kind of their own


def _settings(env: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in _files(env):
        parser = configparser.RawConfigParser()
        with contextlib.suppress(OSError, configparser.Error, UnicodeDecodeError):
            parser.read_string(path.read_text(encoding="utf-8"))
            found |= dict(parser["global"]) if parser.has_section("global") else {}
    return found


def _files(env: Mapping[str, str]) -> Iterator[Path]:
    home = Path(env.get("HOME") or "~").expanduser()
    yield from (Path("/etc/xdg/pip/pip.conf"), Path("/etc/pip.conf"))
    yield home / ".pip" / "pip.conf"
    yield Path(env.get("XDG_CONFIG_HOME") or home / ".config") / "pip" / "pip.conf"
    if env.get("PIP_CONFIG_FILE"):
        yield Path(env["PIP_CONFIG_FILE"])
