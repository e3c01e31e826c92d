"""All errors that raylaunch raises on purpose.

::

    RaylaunchError
    ├── SpecError                     a spec or an argument is invalid; `where` and `field` say where
    │   ├── UnsatisfiableError        it is valid, but no node of this cluster could ever run it
    │   ├── WheelsNeededError         nodes without a package index need the environment's wheels sent along
    │   └── WithheldError             files of the working directory are sent only if a person allows it
    ├── AccessError                   no token, an unknown token, or a role without this permission
    │   └── UntrustedError            a cluster file names hosts or addresses that no person has accepted here
    ├── NotFoundError                 no such job, file, secret or cluster
    ├── ConflictError                 the state of the thing forbids this
    │   └── NotYoursError             a name means somebody else's job; changing it requires its id
    ├── ClusterError                  the cluster as a whole
    │   ├── ClusterDownError          it is not running, or not responding
    │   ├── ClusterStartError         a step of ``up`` failed; `step` and `log_path` say which and where
    │   ├── VersionError              client and controller, or two versions of Ray, are incompatible
    │   │   └── RayVersionError       the cluster runs another version of Ray; restart Ray to fix it
    │   └── HostError                 one machine over SSH; `host` and `step` say which and where
    │       ├── HostUnreachableError  its name does not resolve, the port is closed, or nothing responds
    │       ├── HostKeyError          it shows an unknown host key, or another one than before
    │       ├── HostAuthError         it accepts none of the keys that were offered
    │       ├── HostLostError         the connection was lost; the outcome is unknown
    │       ├── HostTimeoutError      a step exceeded its time limit
    │       ├── HostStorageError      a disk is full or cannot be written
    │       └── HostStepError         a step exited with an error
    ├── StorageError                  a disk is full, or a file or database cannot be read or written
    ├── TransferError                 data did not arrive as it was sent
    ├── TrackingError                 Weights & Biases data cannot be read
    └── JobFailedError                a job's result was requested, and the job did not succeed

A `RaylaunchError` is exactly an error whose text a person (or a model) should act on. Anything else is a bug and shows
its traceback.
"""

from __future__ import annotations

from typing import ClassVar


class RaylaunchError(Exception):
    """What failed, on which thing and why; `hint` says what to do next.

    The controller sends errors to clients as JSON: `code` names the class there and `status` is the HTTP status.
    """

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500
    from_head: bool = False
    """Whether the text was written by a cluster's controller, which is not trusted."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  → {self.hint}" if self.hint else self.message


class SpecError(RaylaunchError):
    """A spec or an argument is invalid. `where` is ``file:line`` if it came from a file, `field` the dotted field."""

    code = "spec"
    status = 422

    def __init__(self, message: str, *, hint: str = "", where: str = "", field: str = "") -> None:
        super().__init__(f"{where}: {message}" if where else message, hint=hint)
        self.where = where
        self.field = field


class UnsatisfiableError(SpecError):
    """No node of this cluster could ever run this job."""

    code = "unsatisfiable"


class WheelsNeededError(SpecError):
    """Nodes without a package index could run the job if the wheels of its environment were sent along.

    `Client.submit` gathers them and submits again.
    """

    code = "wheels_needed"


class WithheldError(SpecError):
    """The working directory has files that are sent only if a person allows it. Nothing was sent.

    `paths` are the files that look like secrets; it is empty if the upload would be too large.
    """

    code = "withheld"

    def __init__(self, message: str, *, hint: str = "", paths: tuple[str, ...] = ()) -> None:
        super().__init__(message, hint=hint, field="working_dir")
        self.paths = paths


class AccessError(RaylaunchError):
    """The request had no token, an unknown token, or one whose role lacks this permission."""

    code = "access"
    status = 403


class UntrustedError(AccessError):
    """A cluster file names hosts or addresses that no person has accepted on this machine. Nothing was contacted.

    `fingerprint` identifies all of them; set the variable RAYLAUNCH_TRUST to it to accept them.
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
    """The thing exists, and its state forbids the request."""

    code = "conflict"
    status = 409


class NotYoursError(ConflictError):
    """A name matches none of the person's own jobs, only somebody else's, which must be named by its id."""

    code = "not_yours"

    @classmethod
    def of(cls, ref: str, *, job: str, owner: str) -> NotYoursError:
        """Return the error for a name (or ``last``) that was looked up."""
        none = "you have no jobs" if ref == "last" else f"you have no job named {ref!r}"
        msg = f"{none}; the latest is {job}, {whose(owner)}"
        return cls(msg, hint=f"to use that job, give its id: {job}")


def whose(owner: str) -> str:
    """Return the clause that says whose job it is; it follows the job's id."""
    return f"which is {owner}'s" if owner else "which was submitted with Ray's own tools"


class ClusterError(RaylaunchError):
    """The cluster as a whole."""

    code = "cluster"
    status = 503


class ClusterDownError(ClusterError):
    """The cluster is not running or not responding."""

    code = "cluster_down"


class ClusterStartError(ClusterError):
    """A step of starting the cluster failed. `step` is its name, `log_path` the log with its output."""

    code = "cluster_start"

    def __init__(self, message: str, *, hint: str = "", step: str = "", log_path: str = "") -> None:
        super().__init__(message, hint=hint)
        self.step = step
        self.log_path = log_path


class VersionError(ClusterError):
    """Two versions are incompatible: client and controller, or Ray here and Ray on the cluster."""

    code = "version"
    status = 409


class RayVersionError(VersionError):
    """The cluster runs another version of Ray than the one that is installed here; restart Ray to fix it."""

    code = "ray_version"


class HostError(ClusterError):
    """One machine over SSH. `host` is its name as the person wrote it, `step` what raylaunch was doing there."""

    code = "host"
    status = 502

    def __init__(self, message: str, *, hint: str = "", host: str = "", step: str = "") -> None:
        super().__init__(message, hint=hint)
        self.host = host
        self.step = step


class HostUnreachableError(HostError):
    """No connection could be made: the name does not resolve, the port is closed, or nothing responds."""

    code = "host_unreachable"


class HostKeyError(HostError):
    """The host showed a key that nobody has accepted. Nothing was sent to it.

    `fingerprint` is that of the key; `known` are those that were expected, empty for a host that is new.
    """

    code = "host_key"

    def __init__(  # noqa: PLR0913 -- each is a fact that a program may need
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
    """The host accepted none of the keys that were offered to it; `tried` names them."""

    code = "host_auth"

    def __init__(
        self, message: str, *, hint: str = "", host: str = "", step: str = "", tried: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message, hint=hint, host=host, step=step)
        self.tried = tried


class HostLostError(HostError):
    """The connection was lost before the command exited. Its outcome is unknown: check, or run it again."""

    code = "host_lost"


class HostTimeoutError(HostError):
    """A step exceeded its time limit and was stopped."""

    code = "host_timeout"
    status = 504


class HostStorageError(HostError):
    """A disk of the host is full, or a path there cannot be read or written."""

    code = "host_storage"
    status = 507


class HostStepError(HostError):
    """A step on the host exited with an error. `exit_status` is its exit status, `tail` its last lines of output."""

    code = "host_step"

    def __init__(  # noqa: PLR0913 -- each is a fact that a program may need
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
    """Data did not arrive as it was sent."""

    code = "transfer"
    status = 502


class TrackingError(RaylaunchError):
    """Weights & Biases data cannot be read."""

    code = "tracking"
    status = 500


class JobFailedError(RaylaunchError):
    """A job's result was requested, and the job did not succeed.

    `job` is its id, `state` how it ended (``failed``, ``stopped``, ``timed_out``, ``lost``), `exit_code` the program's
    exit code if there is one, `log_tail` the last lines of its log.
    """

    code = "job_failed"
    status = 409

    def __init__(  # noqa: PLR0913 -- each is a fact that a program may need
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
    """Return the error that the controller raised. An unknown code becomes a plain `RaylaunchError`."""
    kind = next((kind for kind in _tree(RaylaunchError) if kind.code == code), RaylaunchError)
    error = kind(message, hint=hint)
    error.from_head = True
    return error
