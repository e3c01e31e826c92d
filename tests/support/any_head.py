"""A head that answers whatever a test wants, true or not: plain HTTP on loopback, with the controller's headers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from raylaunch.cluster.types import Endpoint
from raylaunch.version import API, __version__

Answers = Mapping[str, bytes]
"""Bodies by path, or by method and path as ``DELETE /v1/jobs/x``; the query does not count."""


@contextmanager
def any_head(answers: Answers, *, missing: str = "no") -> Iterator[Endpoint]:
    """Serve these answers; every other path is 404, with `missing` as its message."""
    error = {"code": "not_found", "message": missing, "hint": missing}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            found = answers.get(f"{self.command} {path}", answers.get(path))
            self.rfile.read(int(self.headers.get("Content-Length", "0")))
            body = found if found is not None else json.dumps({"error": error}).encode()
            self.send_response(200 if found is not None else 404)
            self.send_header("X-Raylaunch-Api", str(API))
            self.send_header("X-Raylaunch-Version", __version__)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_DELETE = do_GET  # noqa: N815 -- the base class's names

        def log_message(self, *_words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield Endpoint(url=f"http://127.0.0.1:{server.server_port}", token="any")  # noqa: S106 -- no secret
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
