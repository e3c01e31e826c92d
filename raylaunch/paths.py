"""Where a cluster keeps its files on this machine, and how files are made that nobody else can read."""

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
        """What was started: see `raylaunch.cluster.record`."""
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
        """What the controller is told at its start."""
        return self.root / "controller.json"

    @property
    def controller_log(self) -> Path:
        """What the controller prints."""
        return self.root / "controller.log"

    @property
    def ray_log(self) -> Path:
        """What ``ray start --block`` prints."""
        return self.root / "ray.log"

    @property
    def node(self) -> Path:
        """Root of this machine's steward: packages and attempts."""
        return self.root / "node"

    @property
    def tls(self) -> Path:
        """Certificates and keys of this machine's Ray; on the head also the authority's."""
        return self.root / "tls"

    @property
    def gcs(self) -> Path:
        """Ray's persistent storage."""
        return self.root / "gcs"

    @property
    def imports(self) -> Path:
        """Folder that makes raylaunch, and nothing else, importable where it is not installed."""
        return self.root / "imports"

    @property
    def default_store(self) -> Path:
        """The store of a cluster whose spec names none."""
        return self.root / "store"


def raylaunch_home(environ: Mapping[str, str] = os.environ) -> Path:
    """Return ``$RAYLAUNCH_HOME``, by default ``~/.raylaunch``."""
    return Path(environ.get("RAYLAUNCH_HOME") or "~/.raylaunch").expanduser().absolute()


def cluster_paths(name: str, environ: Mapping[str, str] = os.environ) -> ClusterPaths:
    """Return where the cluster `name` keeps its files. Nothing is made."""
    home = raylaunch_home(environ)
    return ClusterPaths(name=name, home=home, root=home / "clusters" / name)


def _temp_parent(home: Path) -> Path:
    """Return the folder of all temp folders: ``/tmp/raylaunch-UID``, or the one that took its place."""
    try:
        return Path((home / "temp").read_text(encoding="utf-8").strip() or _usual_temp())
    except (OSError, UnicodeDecodeError):
        return Path(_usual_temp())


def _usual_temp() -> str:
    return f"/tmp/raylaunch-{os.getuid()}"  # noqa: S108 -- see `ClusterPaths.temp`


def _replace_foreign_temp(home: Path) -> None:
    """Take another folder where somebody else holds the usual one: in ``/tmp`` any account may make it first."""
    try:
        facts = _temp_parent(home).lstat()
    except OSError:
        return
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid():
        import tempfile  # noqa: PLC0415 -- seldom, and every command loads this module

        with storage_errors(home / "temp"):
            write_private(home / "temp", tempfile.mkdtemp(prefix="raylaunch-", dir="/tmp"))


def make_cluster_dirs(paths: ClusterPaths) -> None:
    """Make the folders of a cluster, 0700, and check that nobody else owns them.

    Raises:
        ConflictError: a folder is a link or belongs to another user.
        StorageError: a folder cannot be made.
    """
    paths.home.mkdir(parents=True, exist_ok=True, mode=_PRIVATE_DIR) if not paths.home.exists() else None
    _replace_foreign_temp(paths.home)
    for folder in (paths.home / "clusters", paths.root, paths.node, paths.gcs, paths.temp.parent, paths.temp):
        make_private_dir(folder)


def share_job_folders(paths: ClusterPaths, cluster: str) -> None:
    """Let a worker keep jobs' folders where every host of the cluster does: programs record their absolute paths.

    Raises:
        ConflictError: a folder is a link or belongs to another user.
        StorageError: a folder cannot be made.
    """
    link, shared = paths.node / "jobs", paths.root.parent / cluster / "node" / "jobs"
    if paths.name == cluster:
        return
    with storage_errors(shared):
        for folder in (shared.parent.parent, shared.parent, shared):
            make_private_dir(folder)
        with contextlib.suppress(OSError):
            link.rmdir()  # of an earlier version, and empty
        if not os.path.lexists(link):
            link.symlink_to(os.path.relpath(shared, link.parent))


def make_private_dir(folder: Path) -> None:
    """Make `folder` 0700, or take away what others may do there if it is ours already.

    Raises:
        ConflictError: it is a link or belongs to another user.
        StorageError: it cannot be made.
    """
    with storage_errors(folder):
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True, mode=_PRIVATE_DIR)
        facts = folder.lstat()
        if not stat.S_ISDIR(facts.st_mode):
            msg = f"{folder} is not a folder, and raylaunch needs one there"
            raise ConflictError(msg, hint=f"look at what it is, then remove it: ls -ld {folder}")
        if facts.st_uid != os.getuid():
            msg = f"{folder} belongs to {user_name(facts.st_uid)}, not to you ({user_name(os.getuid())})"
            raise ConflictError(msg, hint="ask its owner to remove it; raylaunch keeps nothing where others can write")
        if facts.st_mode & _OTHERS:
            folder.chmod(_PRIVATE_DIR)


def make_store(folder: Path) -> None:
    """Make the store, 0700; take a folder that exists only if it is empty or a store already.

    Raises:
        ConflictError: it belongs to another user, or holds files that are not a store's and others may read it.
        StorageError: it cannot be made.
    """
    with storage_errors(folder):
        shared = folder.is_dir() and folder.stat().st_mode & _OTHERS
        foreign = shared and any(folder.iterdir()) and not (folder / "tokens.json").exists()
    if foreign:
        msg = f"the store {folder} holds other files and other users may read it"
        raise ConflictError(msg, hint=f"give the store a folder of its own, as {folder / 'raylaunch'}")
    make_private_dir(folder)


def write_private(path: Path, text: str) -> None:
    """Write `text` to `path`, 0600: as a whole, and on the disk.

    Raises:
        StorageError: the disk is full, or the file cannot be written.
    """
    with storage_errors(path):
        write_atomic(path, text)


def secret_file(path: Path) -> str:
    """Return the secret in `path`, made there on first use: 43 random characters, 0600."""
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
    """Turn the operating system's words about `path` into a `StorageError` that says what to do."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, path) from error


def storage_error(error: OSError, path: Path) -> StorageError:
    """Say what happened to `path`, with the free bytes if the disk is full."""
    if error.errno in _FULL:
        msg = f"no space left to write {path}: {_free_bytes(path)} bytes free"
        return StorageError(msg, hint="free some space there, or set RAYLAUNCH_HOME to a folder on another disk")
    msg = f"cannot use {path}: {error.strerror or error}"
    return StorageError(msg, hint="check who owns it and its modes, or set RAYLAUNCH_HOME to another folder")


def _free_bytes(path: Path) -> int:
    existing = next((folder for folder in (path, *path.parents) if folder.exists()), Path("/"))
    return shutil.disk_usage(existing).free


def user_name(uid: int) -> str:
    """Return the name of a Unix user, or ``uid N`` when it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"
