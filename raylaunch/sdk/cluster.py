"""A cluster, blocking: each verb is that of `AsyncCluster`, run to its end, also inside a notebook's running loop.

A test keeps both equal, verb by verb: signatures and docstrings are the same.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from pathlib import Path

from typing_extensions import Self

from raylaunch.client.transport import Reachable
from raylaunch.cluster.types import DownReport, Plan, Step
from raylaunch.models.cluster import ClusterStatus, ControllerStatus
from raylaunch.models.fields import Environment
from raylaunch.models.job import DryRun
from raylaunch.models.job_spec import Launcher, Resources, Tracking, Where
from raylaunch.models.states import JobState
from raylaunch.sdk.arguments import Asked, Which
from raylaunch.sdk.async_cluster import AsyncCluster, Notice, say
from raylaunch.sdk.display import OnStep
from raylaunch.sdk.job import Job
from raylaunch.sdk.loop import LoopThread, shared_loop


class Cluster:
    """One cluster. A context manager; `raylaunch.connect` makes it.

    All verbs raise `ClusterDownError` when nothing answers, and `AccessError` when the token may not do it.

    ::

        with raylaunch.connect() as cluster:
            job = cluster.submit("python train.py", gpus=1)
            job.result()
    """

    def __init__(self, truth: AsyncCluster, loop: LoopThread) -> None:
        self._truth = truth
        self._loop = loop

    @classmethod
    def connect(
        cls,
        name: str = "",
        *,
        start: bool = True,
        cluster_file: Path | str | None = None,
        reach: Reachable | None = None,
        on_notice: Notice = say,
    ) -> Self:
        """Return the cluster, which has answered.

        Args:
            name: a cluster's name; by default the one that cluster.yaml here describes, else the embedded ``local``.
            start: whether a cluster that does not run is started. One that should run and does not is always healed.
            cluster_file: another cluster.yaml.
            reach: where a controller answers and with which token, where that is known already, as for a tunnel of
                your own. Nothing is started or healed then.
            on_notice: told in a sentence that something is started or was lost; by default it is logged as a warning.

        Raises:
            ClusterDownError: there is no cluster, and `start` is False; or nothing answers at `reach`.
            ClusterStartError: a step of starting it failed.
            SpecError: the file cannot be read, or says something that cannot be.
        """
        loop = shared_loop()
        work = AsyncCluster.connect(name, start=start, cluster_file=cluster_file, reach=reach, on_notice=on_notice)
        truth = loop.run(work)
        loop.keep(truth)
        return cls(truth, loop)

    @classmethod
    def plan(cls, which: Which = "") -> Plan:
        """Return what `up` would do now. Nothing is changed; the plan prints itself.

        Args:
            which: the cluster: a name, a cluster file's `Path`, or a `ClusterSpec`; by default the one that applies
                here.

        Raises:
            ClusterError: this machine, or what runs on it, does not fit. For hosts over SSH see the plan's problems.
            SpecError: the file cannot be read, or says something that cannot be.
        """
        return shared_loop().run(AsyncCluster.plan(which))

    @classmethod
    def up(
        cls,
        which: Which = "",
        *,
        upgrade: bool = False,
        stop: bool = False,
        on_step: OnStep | None = None,
        on_notice: Notice = say,
    ) -> Self:
        """Start the cluster, or what is missing of it; return it when it can take jobs.

        It may be repeated: what is well is left as it is. Nobody is asked: what needs a person (the key of a host that
        is not known yet, a passphrase) is an error that says what to type in a terminal.

        Args:
            which: the cluster, as for `plan`.
            upgrade: whether a Ray of another version is ended and this one started, once no job runs. Without it such
                a cluster is refused.
            stop: for `upgrade`, whether jobs are stopped, each with its own grace, and tried again; else they are
                waited for, as long as they run.
            on_step: told each step; by default a notebook shows them, and elsewhere they are logged.
            on_notice: told in a sentence what a person should know.

        Raises:
            ClusterStartError: something is missing at the end, host by host. What came up stays up.
            ClusterError: this machine, or what runs on it, does not fit.
            SpecError: the file cannot be read, or says something that cannot be.
        """
        loop = shared_loop()
        up = AsyncCluster.up(which, upgrade=upgrade, stop=stop, on_step=on_step, on_notice=on_notice)
        truth = loop.run(up)
        loop.keep(truth)
        return cls(truth, loop)

    @classmethod
    def up_steps(cls, which: Which = "", *, on_notice: Notice = say) -> Generator[Step, None, None]:
        """Yield each step of an `up` as it happens; the cluster can take jobs when there are no more.

        Whoever stops listening ends the bring-up; the next one goes on from there.

        Args:
            which: the cluster, as for `plan`.
            on_notice: told in a sentence what a person should know.

        Raises:
            ClusterStartError: something is missing at the end, host by host. What came up stays up.
        """
        yield from shared_loop().each(AsyncCluster.up_steps(which, on_notice=on_notice))

    @classmethod
    def look(cls, which: Which = "") -> ClusterStatus:
        """Return how a cluster is that may not run: ``running``, ``degraded`` or ``stopped``. Nothing is changed.

        Args:
            which: the cluster, as for `plan`.

        Raises:
            SpecError: the file cannot be read, or says something that cannot be.
        """
        return shared_loop().run(AsyncCluster.look(which))

    @classmethod
    def down(
        cls, which: Which, *, stop: bool = False, force: bool = False, on_step: OnStep | None = None
    ) -> DownReport:
        """End exactly what `up` started; return what that was, when nothing of it is left. The store stays.

        Args:
            which: the cluster, as for `plan`. It has to be named.
            stop: whether jobs are stopped first, each with its own grace; the next `up` tries them again.
            force: whether they are ended at once; the next `up` tries them again too.
            on_step: told what is waited for; by default as for `up`.

        Raises:
            ConflictError: jobs run, and neither `stop` nor `force` is True.
            ClusterError: something could not be ended; the message says what.
        """
        return shared_loop().run(AsyncCluster.down(which, stop=stop, force=force, on_step=on_step))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return repr(self._truth).replace("<AsyncCluster", "<Cluster", 1)

    def _repr_html_(self) -> str:
        return self._truth._repr_html_()

    @property
    def name(self) -> str:
        """The cluster's name."""
        return self._truth.name

    def close(self) -> None:
        """Close the connection. Cluster and jobs go on."""
        self._loop.close(self._truth)

    def status(self) -> ControllerStatus:
        """Return what the controller says of itself, Ray and the nodes."""
        return self._loop.run(self._truth.status())

    def submit(  # noqa: PLR0913 -- each is one field of a job
        self,
        job: Asked,
        *,
        name: str | None = None,
        gpus: int | None = None,
        launcher: Launcher | None = None,
        processes: int | None = None,
        working_dir: Path | str | None = None,
        resources: Resources | Mapping[str, object] | None = None,
        where: Where | Mapping[str, object] | None = None,
        env: Mapping[str, str] | None = None,
        secrets: Sequence[str] | None = None,
        environment: Environment | Mapping[str, object] | str | None = None,
        packages: Sequence[str] | str | None = None,
        timeout_s: float | str | None = None,
        grace_s: float | str | None = None,
        outputs: Sequence[str] | str | None = None,
        outputs_size: int | str | None = None,
        outputs_files: int | None = None,
        tags: Sequence[str] | str | None = None,
        tracking: Tracking | Mapping[str, object] | None = None,
        priority: int | None = None,
        retries: int | None = None,
        request_id: str = "",
        allow: Sequence[str] | str = (),
        max_upload: str | int | None = None,
    ) -> Job:
        """Pack the working directory, send what the cluster lacks of it, and submit.

        The keywords are the fields of a job file. One that is None leaves what `job` says, else the default; `env` and
        lists add to what `job` says.

        Args:
            job: a shell command (text), a program with its arguments (a list), a job file (a `Path`), or a `JobSpec`.
            name: letters, digits, ``.``, ``_``, ``-``; by default made from the command.
            gpus: GPUs on the node; short for ``resources={"gpus": …}``.
            launcher: ``torchrun`` starts one rank of the program a GPU, ``ray`` is for a Ray Train or Tune program.
            processes: ranks that torchrun starts; by default one a GPU, else 1.
            working_dir: the folder that is packed; by default the current one, "" for none.
            resources: GPUs, CPUs, memory, custom resources.
            where: which nodes it may run on.
            env: environment variables.
            secrets: names of secrets that become environment variables; the cluster holds their values.
            environment: the Python environment, for example ``conda:train``; by default the first that applies of
                cluster.yaml's, ``uv.lock`` in the working directory, this Python's own, and the cluster's.
            packages: added to that environment, for example ``["numpy", "pandas==2.3.3"]``.
            timeout_s: the longest run of one attempt: seconds, or text as ``2h``.
            grace_s: between SIGTERM and SIGKILL at a stop: seconds, or text.
            outputs: ``auto`` (what is new in the working directory), ``none``, or files and globs to keep.
            outputs_size: how much ``auto`` keeps, as ``5GiB``.
            outputs_files: how many files ``auto`` keeps.
            tags: words to find the job by.
            tracking: Weights & Biases. What it does not state is taken from this Python's ``WANDB_MODE``,
                ``WANDB_PROJECT`` and so on; the key of ``WANDB_API_KEY`` goes along, for this job alone.
            priority: from -100 to 100; higher goes first.
            retries: more attempts when the program fails.
            request_id: the same id with the same job returns the job that is there, also from another Python.
            allow: files to send although they look like secrets: names (``.env``) or paths in the working directory.
            max_upload: the largest upload, as ``5GB`` or in bytes; by default 1 GB.

        Returns:
            The job. It waits for its turn, and goes on without this Python.

        Raises:
            TransferError: the code did not arrive as it was sent.
            SpecError: a value that cannot be, a folder that cannot be packed, or what no node could ever run.
            WithheldError: files look like secrets, or the upload is too large; nothing was sent.
            ConflictError: `request_id` was used for something else.
        """
        return Job(
            self._loop.run(
                self._truth.submit(
                    job,
                    name=name,
                    gpus=gpus,
                    launcher=launcher,
                    processes=processes,
                    working_dir=working_dir,
                    resources=resources,
                    where=where,
                    env=env,
                    secrets=secrets,
                    environment=environment,
                    packages=packages,
                    timeout_s=timeout_s,
                    grace_s=grace_s,
                    outputs=outputs,
                    outputs_size=outputs_size,
                    outputs_files=outputs_files,
                    tags=tags,
                    tracking=tracking,
                    priority=priority,
                    retries=retries,
                    request_id=request_id,
                    allow=allow,
                    max_upload=max_upload,
                )
            ),
            self._loop,
        )

    def dry_run(
        self,
        job: Asked,
        *,
        gpus: int | None = None,
        allow: Sequence[str] | str = (),
        max_upload: str | int | None = None,
    ) -> DryRun:
        """Return what would be sent and where the job could run, without submitting it. Everything is checked.

        Args:
            job: as for `submit`.
            gpus: GPUs on the node.
            allow: as for `submit`.
            max_upload: as for `submit`.

        Raises:
            SpecError: as for `submit`.
            WithheldError: as for `submit`.
        """
        return self._loop.run(self._truth.dry_run(job, gpus=gpus, allow=allow, max_upload=max_upload))

    def job(self, ref: str = "last") -> Job:
        """Return a job.

        Args:
            ref: its id, its name (then your latest job of that name), or ``last``. Where you have none of that name,
                somebody else's is returned, which is said, and which can be read alone: its id is needed to stop or
                remove it, or to download its files.

        Raises:
            NotFoundError: there is none; the message names the nearest.
        """
        return Job(self._loop.run(self._truth.job(ref)), self._loop)

    def jobs(  # noqa: PLR0913 -- each is one filter
        self,
        *,
        states: Sequence[JobState | str] = (),
        name: str = "",
        owner: str = "",
        tag: str = "",
        since: float | None = None,
        limit: int = 50,
    ) -> tuple[Job, ...]:
        """Return jobs, newest first.

        Args:
            states: only jobs in these states, as ``["running", "queued"]``.
            name: only jobs of this name.
            owner: only jobs of this person.
            tag: only jobs with this tag.
            since: only jobs submitted since then, in seconds since the epoch.
            limit: jobs at most.

        Raises:
            SpecError: a word that is no state.
        """
        found = self._loop.run(
            self._truth.jobs(states=states, name=name, owner=owner, tag=tag, since=since, limit=limit)
        )
        return tuple(Job(job, self._loop) for job in found)
