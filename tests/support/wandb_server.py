"""A stand-in for the W&B server on localhost: enough of it for runs, resumed runs, files, artifacts and ``wandb sync``.

The calls are those that wandb 0.31 makes (FACTS.md lists them); what they carry is kept and can be looked at. It can be
slow, answer errors and die. A thread with an event loop of its own serves it::

    with WandbServer() as server:
        subprocess.run([python, "train.py"], env={**os.environ, **server.environment()}, check=True)
        assert server.runs["k3f9"].history[-1]["loss"] < 0.1
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from aiohttp import web
from typing_extensions import Self

ENTITY = "team"
_OPERATION = re.compile(r"(?:query|mutation)\s+(\w+)")
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_Json = dict[str, Any]


@dataclass
class Run:
    """What the server knows of one run."""

    id: str
    project: str
    fields: _Json = field(default_factory=dict)
    """As `wandb.init` gave them: displayName, groupName, jobType, tags, notes, config, …"""
    history: list[_Json] = field(default_factory=list)
    summary: _Json = field(default_factory=dict)
    output: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    complete: bool = False
    exit_code: int | None = None


@dataclass
class Artifact:
    """What the server knows of one artifact."""

    id: str
    name: str
    kind: str
    files: dict[str, bytes] = field(default_factory=dict)
    committed: bool = False


class WandbServer:
    """The server; a context manager. Attributes may be changed while it runs."""

    def __init__(self, *, key: str = "k" * 40) -> None:
        self.key = key
        self.runs: dict[str, Run] = {}
        self.artifacts: dict[str, Artifact] = {}
        self.calls: list[str] = []
        """Names of the GraphQL operations, and ``file_stream``, in order."""
        self.delay_s = 0.0
        """How long each answer is held back."""
        self.status = 200
        """Anything else is what each request is answered with."""
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="wandb-server", daemon=True)
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        """The address for ``WANDB_BASE_URL``."""
        return f"http://127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        """Return the variables with which wandb uses this server, the key among them."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": self.key}

    def netrc(self, path: Path) -> dict[str, str]:
        """Write the key to a netrc file, and return the variables with which wandb uses it."""
        path.write_text(f"machine 127.0.0.1:{self.port}\n  login user\n  password {self.key}\n")
        path.chmod(0o600)
        return {"WANDB_BASE_URL": self.url, "NETRC": str(path)}

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._start())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.die()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def die(self) -> None:
        """Close the port and every connection at once."""
        self._call(self._stop())

    def _call(self, work: Awaitable[None]) -> None:
        async def done() -> None:
            await work

        future: Future[None] = asyncio.run_coroutine_threadsafe(done(), self._loop)
        future.result(timeout=20)

    async def _start(self) -> None:
        app = web.Application(client_max_size=1 << 30, middlewares=[self._gate])
        app.router.add_post("/graphql", self._graphql)
        app.router.add_post("/files/{entity}/{project}/{run}/file_stream", self._file_stream)
        app.router.add_put("/upload/{kind}/{id}/{name:.+}", self._upload)
        app.router.add_post("/sdk/{rest:.*}", self._telemetry)
        app.router.add_get("/healthz", self._telemetry)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = int(self._runner.addresses[0][1])

    async def _stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    @web.middleware
    async def _gate(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        if self.status != web.HTTPOk.status_code:
            return web.json_response({"error": "as the test wishes"}, status=self.status)
        open_to_all = request.path.startswith(("/sdk/", "/upload/", "/healthz"))
        if not open_to_all and request.headers.get("Authorization") != self._authorization():
            return web.json_response({"error": "user is not logged in"}, status=401)
        return await handler(request)

    def _authorization(self) -> str:
        return "Basic " + base64.b64encode(f"api:{self.key}".encode()).decode()

    async def _telemetry(self, _: web.Request) -> web.StreamResponse:
        return web.json_response({})

    async def _graphql(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        named = _OPERATION.search(body["query"])
        operation = named.group(1) if named else "?"
        self.calls.append(operation)
        answer = _ANSWERS.get(operation)
        if answer is None:
            return web.json_response({"errors": [{"message": f"the stand-in does not know {operation}"}]})
        return web.json_response({"data": answer(self, body.get("variables") or {})})

    async def _file_stream(self, request: web.Request) -> web.StreamResponse:
        self.calls.append("file_stream")
        run = self._run(request.match_info["run"], request.match_info["project"])
        body = await request.json()
        for name, part in (body.get("files") or {}).items():
            lines = part["content"]
            if name == "wandb-history.jsonl":
                run.history[part["offset"] :] = [json.loads(line) for line in lines]
            elif name == "wandb-summary.json":
                run.summary = json.loads(lines[-1])
            elif name == "output.log":
                run.output[part["offset"] :] = lines
        if body.get("complete"):
            run.complete, run.exit_code = True, body.get("exitcode")
        return web.json_response({})

    async def _upload(self, request: web.Request) -> web.StreamResponse:
        kind, name, data = request.match_info["kind"], request.match_info["name"], await request.read()
        where = self.runs if kind == "run" else self.artifacts
        where[request.match_info["id"]].files[name] = data
        return web.Response()

    def _run(self, name: str, project: str) -> Run:
        return self.runs.setdefault(name, Run(name, project))

    def _upsert_bucket(self, variables: Mapping[str, Any]) -> _Json:
        name = variables.get("name") or base64.b64decode(variables["id"]).decode()
        fresh = name not in self.runs
        run = self._run(name, variables.get("project") or "uncategorized")
        run.fields.update({key: value for key, value in variables.items() if value is not None})
        return {"upsertBucket": {"bucket": _bucket(run), "inserted": fresh}}

    def _resume_status(self, variables: Mapping[str, Any]) -> _Json:
        run = self.runs.get(variables["name"])
        project = variables.get("project") or ""
        bucket = None if run is None else {**_bucket(run), **_tails(run)}
        return {"model": {"id": "p", "name": project, "entity": {"id": "e", "name": ENTITY}, "bucket": bucket}}

    def _run_files(self, variables: Mapping[str, Any]) -> _Json:
        name = variables["run"]
        files = [{"name": file, "uploadUrl": f"{self.url}/upload/run/{name}/{file}"} for file in variables["files"]]
        return {"createRunFiles": {"runID": name, "uploadHeaders": [], "files": files}}

    def _create_artifact(self, variables: Mapping[str, Any]) -> _Json:
        wished = variables["input"]
        artifact = Artifact(f"a{len(self.artifacts)}", wished["artifactCollectionName"], wished["artifactTypeName"])
        self.artifacts[artifact.id] = artifact
        sequence = {"id": f"s-{artifact.name}", "latestArtifact": None, "state": "READY"}
        found = {"id": artifact.id, "state": "PENDING", "artifactSequence": sequence, "digest": wished.get("digest")}
        return {"createArtifact": {"artifact": found}}

    def _create_manifest(self, variables: Mapping[str, Any]) -> _Json:
        name = variables["name"]
        url = f"{self.url}/upload/artifact/{variables['artifactID']}/{name}"
        file = {"id": name, "uploadUrl": url, "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": f"m-{variables['artifactID']}", "file": file}}}

    def _create_artifact_files(self, variables: Mapping[str, Any]) -> _Json:
        edges = [
            {
                "node": {
                    "storagePath": file["name"],
                    "uploadUrl": f"{self.url}/upload/artifact/{file['artifactID']}/{file['name']}",
                    "uploadHeaders": [],
                    "uploadMultipartUrls": None,
                    "artifact": {"id": file["artifactID"]},
                }
            }
            for file in variables["input"]["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _commit_artifact(self, variables: Mapping[str, Any]) -> _Json:
        artifact = self.artifacts[variables["artifactID"]]
        artifact.committed = True
        return {"commitArtifact": {"artifact": {"id": artifact.id, "digest": "d"}}}

    def _viewer(self, _: Mapping[str, Any]) -> _Json:
        teams = {"edges": [{"node": {"name": ENTITY}}]}
        viewer = {"id": "u", "entity": ENTITY, "username": "user", "email": "", "flags": "{}", "teams": teams}
        return {"viewer": viewer}


def _bucket(run: Run) -> _Json:
    project = {"id": "p", "name": run.project, "entity": {"id": "e", "name": ENTITY}}
    return {
        "id": base64.b64encode(run.id.encode()).decode(),
        "name": run.id,
        "displayName": run.fields.get("displayName") or run.id,
        "description": "",
        "config": run.fields.get("config") or "{}",
        "sweepName": None,
        "project": project,
        "historyLineCount": len(run.history),
    }


def _tails(run: Run) -> _Json:
    return {
        "summaryMetrics": json.dumps(run.summary),
        "logLineCount": len(run.output),
        "eventsLineCount": 0,
        "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
        "eventsTail": "[]",
        "tags": run.fields.get("tags") or [],
        "notes": run.fields.get("notes") or "",
        "wandbConfig": json.dumps({"t": 1}),
    }


_Answer = Callable[[WandbServer, Mapping[str, Any]], _Json]
_ANSWERS: dict[str, _Answer] = {
    "Viewer": WandbServer._viewer,  # noqa: SLF001 -- the table is part of the class
    "UpsertBucket": WandbServer._upsert_bucket,  # noqa: SLF001 -- as above
    "RunResumeStatus": WandbServer._resume_status,  # noqa: SLF001 -- as above
    "CreateRunFiles": WandbServer._run_files,  # noqa: SLF001 -- as above
    "CreateArtifact": WandbServer._create_artifact,  # noqa: SLF001 -- as above
    "CreateArtifactManifest": WandbServer._create_manifest,  # noqa: SLF001 -- as above
    "CreateArtifactFiles": WandbServer._create_artifact_files,  # noqa: SLF001 -- as above
    "CommitArtifact": WandbServer._commit_artifact,  # noqa: SLF001 -- as above
    "ServerFeaturesQuery": lambda _, __: {"serverInfo": {"features": []}},
    "OrganizationCoreWeaveOrganizationID": lambda _, __: {"entity": {"organization": None}},
    "XXHashDigestsEnabled": lambda _, __: {"entity": {"xxhashDigestsEnabled": False}},
    "MarkRunFilesUploaded": lambda _, __: {"markRunFilesUploaded": {"success": True}},
    "ArtifactType": lambda _, __: {"project": {"artifact": None}},
}
