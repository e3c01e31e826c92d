"""The files of a cluster on this machine, and private files and folders."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import pwd
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from raylaunch.errors import ConflictError, StorageError
from raylaunch.files import write_atomic

_FULL = (errno.ENOSPC, errno.EDQUOT)
_PRIVATE_DIR = 0o700
_PRIVATE_FILE = 0o600
_OTHERS = 0o077


@dataclass(frozen=True)
class ClusterPaths:
    """The files of one cluster. `root` is ``$RAYLAUNCH_HOME/clusters/<name>``."""

    name: str
    home: Path
    root: Path

    @property
    def temp(self) -> Path:
        """Ray's temp folder. Its parent is private and its owner is checked; Unix sockets need a short path."""
        return _temp_parent(self.home) / hashlib.sha256(os.fsencode(self.root)).hexdigest()[:8]

    @property
    def record(self) -> Path:
        """The parts that were started: see `raylaunch.cluster.record`."""
        return self.root / "cluster.json"

    @property
    def lock(self) -> Path:
        """Held while the cluster is changed."""
        return self.root / "lock"

    @property
    def token(self) -> Path:
        """The client's token for the controller."""
        return self.root / "token"

    @property
    def ray_token(self) -> Path:
        """Ray's own token."""
        return self.root / "ray_token"

    @property
    def controller_config(self) -> Path:
        """The controller's settings."""
        return self.root / "controller.json"

    @property
    def controller_log(self) -> Path:
        """The controller's output."""
        return self.root / "controller.log"

    @property
    def ray_log(self) -> Path:
        """The output of ``ray start --block``."""
        return self.root / "ray.log"

    @property
    def node(self) -> Path:
        """Root of this machine's node agent: packages and attempts."""
        return self.root / "node"

    @property
    def tls(self) -> Path:
        """Certificates and keys of this machine's Ray; on the head also those of the authority."""
        return self.root / "tls"

    @property
    def gcs(self) -> Path:
        """Ray's persistent storage."""
        return self.root / "gcs"

    @property
    def imports(self) -> Path:
        """Folder that makes only raylaunch importable where it is not installed."""
        return self.root / "imports"

    @property
    def default_store(self) -> Path:
        """The store of a cluster whose spec names none."""
        return self.root / "store"


def raylaunch_home(environ: Mapping[str, str] = os.environ) -> Path:
    """Return ``$RAYLAUNCH_HOME``, by default ``~/.raylaunch``."""
    return Path(environ.get("RAYLAUNCH_HOME") or "~/.raylaunch").expanduser().absolute()


def cluster_paths(name: str, environ: Mapping[str, str] = os.environ) -> ClusterPaths:
    """Return the paths of the cluster `name`. Nothing is created."""
    home = raylaunch_home(environ)
    return ClusterPaths(name=name, home=home, root=home / "clusters" / name)


def _temp_parent(home: Path) -> Path:
    """Return the folder of all temp folders: ``/tmp/raylaunch-UID``, or its replacement."""
    try:
        return Path((home / "temp").read_text(encoding="utf-8").strip() or _usual_temp())
    except (OSError, UnicodeDecodeError):
        return Path(_usual_temp())


def _usual_temp() -> str:
    return f"/tmp/raylaunch-{os.getuid()}"  # noqa: S108 -- see `ClusterPaths.temp`


def _replace_foreign_temp(home: Path) -> None:
    """Use another folder if the usual one belongs to somebody else: in ``/tmp`` any account may create it first."""
    try:
        facts = _temp_parent(home).lstat()
    except OSError:
        return
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid():
        import tempfile  # noqa: PLC0415 -- rarely needed, and every command loads this module

        with storage_errors(home / "temp"):
            write_private(home / "temp", tempfile.mkdtemp(prefix="raylaunch-", dir="/tmp"))


def make_cluster_dirs(paths: ClusterPaths) -> None:
    """Create the folders of a cluster, 0700. Raises as `make_private_dir`."""
    paths.home.mkdir(parents=True, exist_ok=True, mode=_PRIVATE_DIR) if not paths.home.exists() else None
    _replace_foreign_temp(paths.home)
    for folder in (paths.home / "clusters", paths.root, paths.node, paths.gcs, paths.temp.parent, paths.temp):
        make_private_dir(folder)


def share_job_folders(paths: ClusterPaths, cluster: str) -> None:
    """Put jobs' folders of a worker where every host of the cluster has them: programs record their absolute paths.

    Raises as `make_private_dir`.
    """
    link, shared = paths.node / "jobs", paths.root.parent / cluster / "node" / "jobs"
    if paths.name == cluster:
        return
    with storage_errors(shared):
        for folder in (shared.parent.parent, shared.parent, shared):
            make_private_dir(folder)
        with contextlib.suppress(OSError):
            link.rmdir()  # an empty folder of an earlier version
        if not os.path.lexists(link):
            link.symlink_to(os.path.relpath(shared, link.parent))


def make_private_dir(folder: Path) -> None:
    """Create `folder` with mode 0700, or set that mode if it exists.

    Raises:
        ConflictError: it is a link or belongs to another user.
        StorageError: it cannot be created.
    """
    with storage_errors(folder):
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True, mode=_PRIVATE_DIR)
        facts = folder.lstat()
        if not stat.S_ISDIR(facts.st_mode):
            msg = f"{folder} is not a folder, and raylaunch needs one there"
            raise ConflictError(msg, hint=f"check what it is, then remove it: ls -ld {folder}")
        if facts.st_uid != os.getuid():
            msg = f"{folder} belongs to {user_name(facts.st_uid)}, not to you ({user_name(os.getuid())})"
            raise ConflictError(msg, hint="ask its owner to remove it; raylaunch keeps nothing where others can write")
        if facts.st_mode & _OTHERS:
            folder.chmod(_PRIVATE_DIR)


def make_store(folder: Path) -> None:
    """Create the store, 0700; an existing folder is used if it is private, empty, or a store already.

    Raises:
        ConflictError: it belongs to another user, or has other files and other users may read it.
        StorageError: it cannot be created.
    """
    with storage_errors(folder):
        shared = folder.is_dir() and folder.stat().st_mode & _OTHERS
        foreign = shared and any(folder.iterdir()) and not (folder / "tokens.json").exists()
    if foreign:
        msg = f"the store {folder} has other files and other users may read it"
        raise ConflictError(msg, hint=f"give the store its own folder, for example {folder / 'raylaunch'}")
    make_private_dir(folder)


def write_private(path: Path, text: str) -> None:
    """Write `text` to `path`, 0600, atomically.

    Raises:
        StorageError: the disk is full, or the file cannot be written.
    """
    with storage_errors(path):
        write_atomic(path, text)


def secret_file(path: Path) -> str:
    """Return the secret in `path`, created on first use: 43 random characters, 0600."""
    with storage_errors(path), contextlib.suppress(FileNotFoundError):
        if path.stat().st_mode & _OTHERS:
            path.chmod(_PRIVATE_FILE)
        if text := path.read_text(encoding="utf-8").strip():
            return text
    secret = secrets.token_urlsafe(32)
    write_private(path, secret)
    return secret


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Translate an `OSError` about `path` into a `StorageError` with a hint."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, path) from error


def storage_error(error: OSError, path: Path) -> StorageError:
    """Return the error about `path`, with the free bytes if the disk is full."""
    if error.errno in _FULL:
        msg = f"no space left to write {path}: {_free_bytes(path)} bytes free"
        return StorageError(msg, hint="free some space there, or set RAYLAUNCH_HOME to a folder on another disk")
    msg = f"cannot use {path}: {error.strerror or error}"
    return StorageError(msg, hint="check who owns it and its modes, or set RAYLAUNCH_HOME to another folder")


def _free_bytes(path: Path) -> int:
    existing = next((folder for folder in (path, *path.parents) if folder.exists()), Path("/"))
    return shutil.disk_usage(existing).free


def user_name(uid: int) -> str:
    """Return the name of a Unix user, or ``uid N`` if it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"
