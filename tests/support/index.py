"""A package index on a loopback port, and wheels for it: tiny ones, and the packages that are installed here."""

from __future__ import annotations

import base64
import hashlib
import html
import http.server
import importlib.metadata
import io
import os
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from packaging.utils import canonicalize_name

_GENERATED = {"INSTALLER", "REQUESTED", "direct_url.json", "RECORD"}


def tiny_wheel(  # noqa: PLR0913 -- each is one line of metadata
    folder: Path,
    name: str,
    version: str,
    *,
    requires: Sequence[str] = (),
    extras: Sequence[str] = (),
    python: str = ">=3.10",
    tag: str = "py3-none-any",
    filler: int = 0,
    body: str = "",
) -> Path:
    """Make a wheel with one module that knows its version and runs `body`, and `filler` random bytes."""
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", f"Requires-Python: {python}"]
    lines += [f"Provides-Extra: {extra}" for extra in extras] + [f"Requires-Dist: {one}" for one in requires]
    files = {
        f"{name}/__init__.py": f"__version__ = {version!r}\n{body}\n".encode(),
        f"{name}/filler": os.urandom(filler),
        f"{name}-{version}.dist-info/METADATA": ("\n".join(lines) + "\n").encode(),
        f"{name}-{version}.dist-info/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n".encode(),
    }
    return _write(folder, f"{name}-{version}-{tag}.whl", files, f"{name}-{version}.dist-info")


def tiny_sdist(folder: Path, name: str, version: str) -> Path:
    """Make a file that looks like a source distribution from afar: no wheel of it exists."""
    path = folder / f"{name}-{version}.tar.gz"
    path.write_bytes(b"not to be opened")
    return path


def installed_wheel(folder: Path, name: str) -> Path:
    """Pack a package that is installed here into a wheel again, and return its path."""
    distribution = importlib.metadata.distribution(name)
    info = next(str(path.parent) for path in distribution.files or [] if path.name == "METADATA")
    scripts = {entry.name for entry in distribution.entry_points if entry.group == "console_scripts"}
    files: dict[str, bytes] = {}
    for path in distribution.files or []:
        if "__pycache__" in path.parts or path.name in _GENERATED:
            continue
        if ".." not in path.parts:
            files[str(path)] = path.read_binary()
        elif path.parts[-2] == "bin" and path.name not in scripts:
            files[f"{info.removesuffix('.dist-info')}.data/scripts/{path.name}"] = path.read_binary()
    tags = [
        line.removeprefix("Tag: ") for line in files[f"{info}/WHEEL"].decode().splitlines() if line.startswith("Tag")
    ]
    parts = (sorted({tag.split("-")[at] for tag in tags}) for at in range(3))
    tag = "-".join(".".join(part) for part in parts)
    return _write(folder, f"{info.removesuffix('.dist-info')}-{tag}.whl", files, info)


def _write(folder: Path, file: str, files: Mapping[str, bytes], info: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    record = "".join(f"{name},sha256={_digest(content)},{len(content)}\n" for name, content in files.items())
    with zipfile.ZipFile(folder / file, "w") as archive:
        for name, content in {**files, f"{info}/RECORD": (record + f"{info}/RECORD,,\n").encode()}.items():
            member = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            member.external_attr = 0o644 << 16
            archive.writestr(member, content)
    return folder / file


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


class Index:
    """The index: what it serves, what was asked of it, and what is wrong with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []
        self.damaged: set[str] = set()
        """Files of which other bytes arrive than the index states."""
        self.down = False
        self.url = ""

    @property
    def fetched(self) -> list[str]:
        """Return the names of the wheels that were downloaded, in order."""
        return [path.rpartition("/")[2] for path in self.asked if path.endswith(".whl")]

    def environ(self, home: Path) -> dict[str, str]:
        """Return an environment in which pip and uv know this index alone, and keep what they have below `home`."""
        return {
            "PATH": "/usr/bin:/bin",
            "HOME": str(home),
            "PIP_INDEX_URL": self.url,
            "UV_CACHE_DIR": str(home / "uv"),
            "PIP_CACHE_DIR": str(home / "pip"),
            "PIP_RETRIES": "0",
            "UV_HTTP_RETRIES": "0",
        }

    def answer(self, path: str) -> tuple[int, str, bytes]:
        """Return status, content type and body of what is asked for."""
        self.asked.append(path)
        if self.down:
            return 503, "text/plain", b"down"
        if path.startswith("/simple/"):
            return self._page(path.split("/")[2])
        file = self.folder / path.rpartition("/")[2].removesuffix(".metadata")
        if not file.is_file():
            return 404, "text/plain", b"not here"
        if path.endswith(".metadata"):
            return 200, "text/plain", _metadata(file)
        content = file.read_bytes()
        return 200, "application/octet-stream", content[:-1] + b"?" if file.name in self.damaged else content

    def _page(self, project: str) -> tuple[int, str, bytes]:
        links = [
            f'<a href="/files/{file.name}#sha256={hashlib.sha256(file.read_bytes()).hexdigest()}"{_more(file)}>'
            f"{file.name}</a>"
            for file in sorted(self.folder.iterdir())
            if canonicalize_name(file.name.split("-")[0]) == project
        ]
        body = f"<!DOCTYPE html><html><body>{''.join(links)}</body></html>".encode()
        return (200 if links else 404), "text/html", body


def _metadata(wheel: Path) -> bytes:
    with zipfile.ZipFile(io.BytesIO(wheel.read_bytes())) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA")))


def _more(file: Path) -> str:
    if file.suffix != ".whl":
        return ""
    text = _metadata(file)
    python = next(line for line in text.decode().splitlines() if line.startswith("Requires-Python:"))
    wanted = html.escape(python.split(":", 1)[1].strip())
    return f' data-requires-python="{wanted}" data-core-metadata="sha256={hashlib.sha256(text).hexdigest()}"'


@contextmanager
def index(folder: Path) -> Iterator[Index]:
    """Serve the wheels in a folder."""
    served = Index(folder)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, kind, body = served.answer(self.path)
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_args: object) -> None:  # its default writes to stderr
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_address[1]}/simple/"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
