"""The tools: names, what the model reads of each, and what they may do. The list is the whole of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Generic

from mcp.types import Tool as Listed
from mcp.types import ToolAnnotations

from mcp_server import arguments
from mcp_server.arguments import Given
from mcp_server.cluster import cluster_status
from mcp_server.context import ToolCall
from mcp_server.jobs import list_jobs, monitor_job, stop_job, train_job
from mcp_server.render import Json
from mcp_server.results import download_model, job_logs


@dataclass(frozen=True)
class Tool(Generic[Given]):
    """One tool. `answers` are the keys of its result beside `next`."""

    takes: type[Given]
    run: Callable[[Given, ToolCall], Awaitable[Json]]
    title: str
    description: str
    answers: Mapping[str, str]
    writes: bool = False
    destroys: bool = False
    repeatable: bool = True
    open_world: bool = False

    @property
    def name(self) -> str:
        """The tool's name: its function's."""
        return self.run.__name__

    def writes_with(self, given: Mapping[str, object]) -> bool:
        """Return whether a call with these arguments changes anything."""
        return self.writes and given.get("dry_run") is not True

    async def __call__(self, given: Mapping[str, object], call: ToolCall) -> Json:
        """Read the arguments and run.

        Raises:
            RaylaunchError: what the model should read.
        """
        return await self.run(arguments.read(self.name, self.takes, given), call)

    def listed(self) -> Listed:
        """Return it as ``tools/list`` shows it."""
        answers = {name: {"type": kind} for name, kind in self.answers.items()}
        return Listed(
            name=self.name,
            title=self.title,
            description=self.description,
            input_schema=arguments.schema(self.takes),
            output_schema={
                "type": "object",
                "properties": {**answers, "next": {"type": "string"}},
                "required": ["next"],
            },
            annotations=ToolAnnotations(
                read_only_hint=not self.writes,
                destructive_hint=self.destroys,
                idempotent_hint=self.repeatable,
                open_world_hint=self.open_world,
            ),
        )


TOOLS = (
    Tool(
        takes=arguments.TrainJob,
        run=train_job,
        title="Train",
        description=(
            "Submit a training job to the user's GPU cluster; returns its id at once. The working directory is packed "
            "and sent; the program runs in a copy of it. wandb.init() and wandb.log() need no change. Pass a "
            "request_id, so that a repeated call does not train twice."
        ),
        answers={"job": "object", "created": "boolean", "packed": "object"},
        writes=True,
        repeatable=False,
        open_world=True,
    ),
    Tool(
        takes=arguments.MonitorJob,
        run=monitor_job,
        title="Watch a job",
        description=(
            "Show a job's state, reason, progress, last metrics, last log lines and next step. To follow it, call this "
            "repeatedly with wait_s=50 and the cursor of the last answer until it has ended. A wait ends at a new "
            "state, reason or attempt; progress and metrics are sent as notifications and in the answer."
        ),
        answers={"job": "object", "changed": "boolean", "cursor": "integer", "log": "object"},
    ),
    Tool(
        takes=arguments.ListJobs,
        run=list_jobs,
        title="List jobs",
        description="List jobs with state and reason, newest first.",
        answers={"jobs": "array", "total": "integer", "cursor": "string"},
    ),
    Tool(
        takes=arguments.JobLogs,
        run=job_logs,
        title="Read a job's log",
        description="Read the end of a job's log, continue from a cursor, or find lines that contain a text.",
        answers={"job": "string", "log": "object", "cursor": "string"},
    ),
    Tool(
        takes=arguments.StopJob,
        run=stop_job,
        title="Stop a job",
        description=(
            "Stop a job: SIGTERM, then SIGKILL. It cannot be resumed. A waiting job is cancelled at once; a running "
            "one has ended when its state is stopped."
        ),
        answers={"job": "object", "cursor": "integer"},
        writes=True,
        destroys=True,
    ),
    Tool(
        takes=arguments.DownloadModel,
        run=download_model,
        title="Download a model",
        description=(
            "Download a job's model, checkpoint or other files to a local folder, verified by checksum. Returns paths, "
            "never content; existing files are not replaced."
        ),
        answers={"folder": "string", "files": "object", "verified": "boolean"},
        writes=True,
    ),
    Tool(
        takes=arguments.ClusterStatusArguments,
        run=cluster_status,
        title="Show the cluster",
        description=(
            "Show whether the cluster is running; its nodes and free GPUs; queued and running jobs; problems; and the "
            "doctor's findings on its hosts, each with a fix."
        ),
        answers={
            "state": "string",
            "nodes": "array",
            "gpus_free": "number",
            "reported": "object",
            "findings": "object",
        },
    ),
)


def offered(*, may_write: bool) -> dict[str, Tool[arguments.Arguments]]:
    """Return the tools of a server, by name; without those that write where it may not."""
    return {tool.name: tool for tool in TOOLS if may_write or not tool.writes}  # type: ignore[misc]  # each reads its own arguments
