"""Everything that raylaunch raises on purpose.

::

    RaylaunchError
    ├── SpecError                what was asked for is wrong: file, line and field say where
    │   ├── UnsatisfiableError   it is well-formed, but no node of this cluster could ever run it
    │   └── WithheldError        the working directory holds what is sent only if a person allows it
    ├── AccessError              no token, an unknown one, or a role that may not do this
    │   └── UntrustedError       a cluster file names hosts or addresses that no person has accepted here
    ├── NotFoundError            no such job, file, secret, cluster
    ├── ConflictError            the thing is there, but in a state that forbids this
    │   └── NotYoursError        a name means somebody else's job: only its id does for what changes it
    ├── ClusterError             the cluster as a whole
    │   ├── ClusterDownError     it is not running, or not answering
    │   ├── ClusterStartError    a step of ``up`` failed; ``step`` and ``log_path`` say which and where
    │   ├── VersionError         client and cluster, or cluster and Ray, do not fit together
    │   │   └── RayVersionError       the cluster runs another Ray: only a restart of Ray mends it
    │   └── HostError            one machine over SSH; ``host`` and ``step`` say which and where
    │       ├── HostUnreachableError  its name does not resolve, nobody listens, or nothing answers
    │       ├── HostKeyError          it shows an unknown host key, or another one than before
    │       ├── HostAuthError         it takes none of the keys that were offered
    │       ├── HostLostError         the connection went away before the end: nothing is known of the outcome
    │       ├── HostTimeoutError      a step did not end within its limit
    │       ├── HostStorageError      its disk is full, or refuses to be written
    │       └── HostStepError         a step ran to its end and failed
    ├── StorageError             a disk is full, a file or a database cannot be read or written
    ├── TransferError            bytes did not arrive as they were sent
    ├── TrackingError            Weights & Biases data cannot be read
    └── JobFailedError           a job's result was asked for, and it did not succeed; its last lines are here

A `RaylaunchError` is exactly an error whose text a person (or a model) should act on. Anything else is a bug and shows
its traceback.
"""

from __future__ import annotations

from typing import ClassVar


class RaylaunchError(Exception):
    """What failed, on which thing, why; and in `hint` what to do next.

    The same object crosses the wire: `code` names the class there and `status` is its HTTP status.
    """

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500
    from_head: bool = False
    """Whether its text came from the controller of a cluster, which may be anybody's."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  → {self.hint}" if self.hint else self.message


class SpecError(RaylaunchError):
    """What was asked for is wrong. `where` is ``file:line`` when it came from a file, `field` the dotted field."""

    code = "spec"
    status = 422

    def __init__(self, message: str, *, hint: str = "", where: str = "", field: str = "") -> None:
        super().__init__(f"{where}: {message}" if where else message, hint=hint)
        self.where = where
        self.field = field


class UnsatisfiableError(SpecError):
    """No node of this cluster could ever run this job, however long it waits."""

    code = "unsatisfiable"


class WheelsNeededError(SpecError):
    """Nodes without a package index could run it, and nobody has looked for the wheels of its environment.

    `Client.submit` gathers them then, and submits again.
    """

    code = "wheels_needed"


class WithheldError(SpecError):
    """The working directory holds what is sent only if a person allows it; nothing was sent.

    `paths` are the files that look like secrets; none of them where the upload would be too large.
    """

    code = "withheld"

    def __init__(self, message: str, *, hint: str = "", paths: tuple[str, ...] = ()) -> None:
        super().__init__(message, hint=hint, field="working_dir")
        self.paths = paths


class AccessError(RaylaunchError):
    """The request carried no token, an unknown one, or one whose role may not do this."""

    code = "access"
    status = 403


class UntrustedError(AccessError):
    """A cluster file names hosts or addresses that no person has accepted on this machine. Nothing was contacted.

    `fingerprint` stands for them all, as the variable RAYLAUNCH_TRUST takes it.
    """

    code = "untrusted"

    def __init__(self, message: str, *, hint: str = "", fingerprint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.fingerprint = fingerprint


class NotFoundError(RaylaunchError):
    """The named thing does not exist here."""

    code = "not_found"
    status = 404


class ConflictError(RaylaunchError):
    """The thing is there, in a state that forbids what was asked."""

    code = "conflict"
    status = 409


class NotYoursError(ConflictError):
    """A name that means no job of the person who asks, but one of somebody else's, which only its id names."""

    code = "not_yours"

    @classmethod
    def of(cls, ref: str, *, job: str, owner: str) -> NotYoursError:
        """Return the error for a name (or ``last``) that was looked up."""
        none = "you have no jobs" if ref == "last" else f"you have no job named {ref!r}"
        msg = f"{none}; the latest is {job}, {whose(owner)}"
        return cls(msg, hint=f"if that one is meant, name it by its id: {job}")


def whose(owner: str) -> str:
    """Return in words whose job one is, as it follows its id."""
    return f"which is {owner}'s" if owner else "which was submitted with Ray's own tools"


class ClusterError(RaylaunchError):
    """The cluster as a whole."""

    code = "cluster"
    status = 503


class ClusterDownError(ClusterError):
    """The cluster is not running, or does not answer."""

    code = "cluster_down"


class ClusterStartError(ClusterError):
    """A step of starting the cluster failed. `step` is its name, `log_path` holds what it printed."""

    code = "cluster_start"

    def __init__(self, message: str, *, hint: str = "", step: str = "", log_path: str = "") -> None:
        super().__init__(message, hint=hint)
        self.step = step
        self.log_path = log_path


class VersionError(ClusterError):
    """Two parts that must fit together do not: client and controller, or Ray here and Ray there."""

    code = "version"
    status = 409


class RayVersionError(VersionError):
    """The cluster runs another Ray than the one that is installed here; only a restart of Ray mends that."""

    code = "ray_version"


class HostError(ClusterError):
    """One machine over SSH. `host` is its name as the person wrote it, `step` what was being done there."""

    code = "host"
    status = 502

    def __init__(self, message: str, *, hint: str = "", host: str = "", step: str = "") -> None:
        super().__init__(message, hint=hint)
        self.host = host
        self.step = step


class HostUnreachableError(HostError):
    """No connection could be made: the name does not resolve, nobody listens on the port, or nothing answers."""

    code = "host_unreachable"


class HostKeyError(HostError):
    """The host showed a key that nobody has accepted. Nothing was sent to it.

    `fingerprint` is what it showed, `known` what was expected: empty for a host that was never seen before.
    """

    code = "host_key"

    def __init__(  # noqa: PLR0913 -- each is a fact that a program may ask for
        self,
        message: str,
        *,
        hint: str = "",
        host: str = "",
        step: str = "",
        fingerprint: str = "",
        known: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message, hint=hint, host=host, step=step)
        self.fingerprint = fingerprint
        self.known = known


class HostAuthError(HostError):
    """The host takes none of the keys that were offered to it; `tried` names them."""

    code = "host_auth"

    def __init__(
        self, message: str, *, hint: str = "", host: str = "", step: str = "", tried: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message, hint=hint, host=host, step=step)
        self.tried = tried


class HostLostError(HostError):
    """The connection went away before the command had ended. What it did is not known: look, or do it again."""

    code = "host_lost"


class HostTimeoutError(HostError):
    """A step did not end within its limit, and was ended."""

    code = "host_timeout"
    status = 504


class HostStorageError(HostError):
    """A disk of the host is full, or a path there cannot be written or read."""

    code = "host_storage"
    status = 507


class HostStepError(HostError):
    """A step ran to its end on the host and failed. `exit_status` is its own, `tail` the last lines that it printed."""

    code = "host_step"

    def __init__(  # noqa: PLR0913 -- each is a fact that a program may ask for
        self,
        message: str,
        *,
        hint: str = "",
        host: str = "",
        step: str = "",
        exit_status: int | None = None,
        tail: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message, hint=hint, host=host, step=step)
        self.exit_status = exit_status
        self.tail = tail


class StorageError(RaylaunchError):
    """A disk is full, or a file or database cannot be read or written."""

    code = "storage"
    status = 507


class TransferError(RaylaunchError):
    """Bytes did not arrive as they were sent."""

    code = "transfer"
    status = 502


class TrackingError(RaylaunchError):
    """Weights & Biases data cannot be read."""

    code = "tracking"
    status = 500


class JobFailedError(RaylaunchError):
    """A job's result was asked for, and the job ended otherwise than succeeded.

    `job` is its id, `state` how it ended (``failed``, ``stopped``, ``timed_out``, ``lost``), `exit_code` the program's
    own where it had one, `log_tail` the last lines that it wrote.
    """

    code = "job_failed"
    status = 409

    def __init__(  # noqa: PLR0913 -- each is a fact that a program may ask for
        self,
        message: str,
        *,
        hint: str = "",
        job: str = "",
        state: str = "",
        exit_code: int | None = None,
        log_tail: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message, hint=hint)
        self.job = job
        self.state = state
        self.exit_code = exit_code
        self.log_tail = log_tail


def _tree(root: type[RaylaunchError]) -> list[type[RaylaunchError]]:
    return [root, *(found for child in root.__subclasses__() for found in _tree(child))]


def from_wire(code: str, message: str, hint: str) -> RaylaunchError:
    """Build the error that the other side raised. An unknown code becomes a plain `RaylaunchError`."""
    kind = next((kind for kind in _tree(RaylaunchError) if kind.code == code), RaylaunchError)
    error = kind(message, hint=hint)
    error.from_head = True
    return error
