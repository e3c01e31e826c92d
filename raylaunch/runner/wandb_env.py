"""W&B in an attempt: the variables for ``wandb.init()``, online or offline, and the address of the run in the log.

What was measured on wandb 0.31: ``WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL`` takes fractions of a second (0.1, 0.25, 0.5
gave writes 0.10, 0.25, 0.50 s apart). 0.28 to 0.30 ignore it and write when a block is full or the run ends;
when their training is killed, or ended by SIGTERM without a handler, what is not written yet is lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from raylaunch import contract
from raylaunch.runner.control import run_program
from raylaunch.tracking import wandb_runs

if TYPE_CHECKING:
    from raylaunch.contract import AttemptSpec, WandbSpec
    from raylaunch.runner.environments.build import BuildContext

FLUSH_S = "0.25"
"""Seconds between writes of the run's file: points are readable, and safe from SIGKILL, that fast."""
TRANSMIT_S = "1"
PROBE_S = 10.0
OLDEST = (0, 28)
FLUSHES_SINCE = (0, 31)
_SEARCHED_BYTES = 32 * 1024 * 1024
_BLOCK = 1024 * 1024
_OVERLAP = 4096
_PUBLIC_HOST = frozenset({"wandb.ai", "forge.coreweave.com"})
_HISTORY = 2
"""Number of the field `history` in wandb.proto's Record."""
_BROKEN_INIT = re.compile(
    rb"wandb\.errors\.\S*(?:CommError|UsageError|AuthenticationError|WandbInitError)"
    rb"|^(?:\w+\.)*(?:CommError|AuthenticationError|UsageError): ",
    re.MULTILINE,
)
_PUBLIC = "https://api.wandb.ai"
_PUBLIC_SINCE_31 = "https://api.forge.coreweave.com"
_PROBE = """
import ssl, sys, urllib.error, urllib.request
loose = ssl.create_default_context()
loose.check_hostname = False
loose.verify_mode = ssl.CERT_NONE
try:
    urllib.request.urlopen(urllib.request.Request(sys.argv[1], method="HEAD"), timeout=9, context=loose)
except urllib.error.HTTPError:
    pass
except Exception as error:
    print(getattr(error, "reason", error))
    sys.exit(1)
"""
"""Any HTTP answer counts; nothing secret is sent, so the certificate does not matter."""


def hosts_of(server: str, environ: Mapping[str, str] = os.environ) -> frozenset[str]:
    """Return where W&B shows the runs of a server: its own address, and the page that belongs to an API's."""
    host = urlsplit(server).netloc
    bare = re.sub(r"^api\.", "", host)  # Python 3.8
    pages = {*(_PUBLIC_HOST if bare in _PUBLIC_HOST else ()), urlsplit(environ.get("WANDB_APP_URL", "")).netloc}
    return frozenset({host, bare, f"app.{bare}", *pages}) - {"", "app."}


class RunAddress:
    """Searches a growing log for a run's address until it is found.

    A program may print any address: only one at W&B's own server counts.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self.hosts: frozenset[str] = frozenset()
        """Where a run may be shown: see `hosts_of`."""
        self._run_id = ""
        self._at = 0
        self.url = ""

    def poll(self, run_id: str) -> bool:
        """Read on in the log, from its beginning for another run; True when the address was found just now."""
        if run_id != self._run_id:
            self._run_id, self._at, self.url = run_id, 0, ""
        if self.url or self._at >= _SEARCHED_BYTES:
            return False
        try:
            with self._log.open("rb") as log:
                log.seek(max(0, self._at - _OVERLAP))
                block = log.read(_BLOCK + _OVERLAP)
                end = log.tell()
        except FileNotFoundError:
            return False
        hosts = b"|".join(re.escape(host.encode()) for host in sorted(self.hosts))
        part = rb"[\w.%~-]+"
        run = re.escape(run_id.encode())
        pattern = rb"https?://(?:%s)/(?:%s/)*%s/%s/runs/%s(?![\w-])" % (hosts, part, part, part, run)
        found = re.search(pattern, block) if hosts and end > self._at else None
        self._at = end
        if found is not None:
            self.url = found.group().decode("utf-8", "replace")
        return found is not None


def init_broke(folder: Path, log_tail: bytes) -> bool:
    """Return whether the log ends in W&B's own error, and no point of history has been written."""
    if not _BROKEN_INIT.search(log_tail):
        return False
    runs = (folder / contract.WANDB).glob("wandb/*run-*/run-*.wandb")
    return not any(has_history(path) for path in runs)


def has_history(path: Path) -> bool:
    """Return whether a .wandb file holds a row of history. One that cannot be read holds none."""
    # Only for a training that failed at wandb.init; each start would pay for these imports.
    from raylaunch.errors import TrackingError  # noqa: PLC0415
    from raylaunch.tracking.frames import Frames  # noqa: PLC0415
    from raylaunch.tracking.protobuf import WireError, fields  # noqa: PLC0415

    try:
        return any(number == _HISTORY for record in Frames(path).read() for number, _ in fields(record))
    except (TrackingError, WireError):
        return False


class Mode(NamedTuple):
    """How an attempt tracks, and why so in words; `base_url` is the server when it is online."""

    mode: str
    why: str
    base_url: str = ""


def find_mode(spec: WandbSpec, env: Mapping[str, str], context: BuildContext, *, version: str) -> Mode:
    """Decide between online and offline: online needs credentials, and a server that responds within 10 s.

    Args:
        spec: what the job requests.
        env: the variables of the training.
        context: of the attempt; a `wandb/settings` file in the working directory counts, as in wandb itself.
        version: of the environment's wandb, or empty when it has none.

    Raises:
        StopRequested: the attempt is to stop.
    """
    asked = env.get("WANDB_MODE") or spec["mode"]
    if asked in ("offline", "dryrun"):
        return Mode("offline", "set for this job")
    if asked == "disabled" or env.get("WANDB_DISABLED", "").lower() in ("true", "1"):
        return Mode("disabled", "set for this job")
    if not version:
        return Mode("offline", "the job's environment has no wandb")
    base_url, found = _credentials(env, version, context.code)
    if not found:
        where = urlsplit(base_url).netloc
        return Mode("offline", f"no W&B credentials: neither WANDB_API_KEY nor a netrc entry for {where}")
    silence = _probe_server(base_url, env, context)
    if silence:
        return Mode("offline", f"W&B at {base_url} did not answer within {PROBE_S:g} s: {silence}")
    return Mode("online", "W&B credentials were found, and the server answers", base_url)


def home_of(env: Mapping[str, str]) -> Path:
    """Return the person's home on this node."""
    return Path(env.get("HOME") or "~").expanduser()


def variables(spec: WandbSpec, mode: Mode, own: Mapping[str, str], *, folder: Path, home: Path) -> dict[str, str]:
    """Return the variables to add to the training's, made so that nothing lands in the person's home.

    Args:
        spec: ids and names of the run.
        mode: as `find_mode` found.
        own: what the person set for the job; it wins, except for the folder.
        folder: the attempt's.
        home: the person's home on this node, whose W&B settings stay in force if there are any.
    """
    tmp = folder / contract.TMP / "wandb"
    found = {
        "WANDB_PROJECT": spec["project"],
        "WANDB_ENTITY": spec["entity"],
        "WANDB_NAME": spec["name"],
        "WANDB_RUN_GROUP": spec["group"],
        "WANDB_JOB_TYPE": spec["job_type"],
        "WANDB_TAGS": ",".join(spec["tags"]),
        "WANDB_NOTES": spec["notes"],
        "WANDB_CACHE_DIR": str(tmp / "cache"),
        "WANDB_DATA_DIR": str(folder / contract.WANDB_DATA),
        "WANDB_ARTIFACT_DIR": str(tmp / "artifacts"),
        "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": FLUSH_S,
        "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": TRANSMIT_S,
        "WANDB_BASE_URL": mode.base_url,
    }
    if not (home / ".config" / "wandb" / "settings").exists():
        found["WANDB_CONFIG_DIR"] = str(tmp / "config")
    kept = {name: value for name, value in found.items() if value and name not in own}
    kept["WANDB_MODE"] = mode.mode
    kept["WANDB_DIR"] = str(folder / contract.WANDB)
    if mode.mode != "disabled":
        kept[contract.VAR_WANDB_RUN] = spec["run_id"]
        kept[contract.VAR_WANDB_RUNS] = str(folder / contract.WANDB_RUNS)
    return kept


def make_folders(folder: Path) -> None:
    """Make what wandb wants to find: a resume policy fails when its folder is not there."""
    for name in (f"{contract.WANDB}/wandb", contract.WANDB_DATA):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name in ("cache", "artifacts", "config"):
        (folder / contract.TMP / "wandb" / name).mkdir(parents=True, exist_ok=True)


def staged_bytes(folder: Path) -> int:
    """Return how much W&B has staged and not sent: files of artifacts and tables of offline runs."""
    sizes = 0
    for parent, _, names in os.walk(str(folder / contract.WANDB_DATA)):
        for name in names:
            with contextlib.suppress(OSError):
                sizes += (Path(parent) / name).lstat().st_size
    return sizes


def prepare_run_ids(spec: AttemptSpec, folder: Path) -> None:
    """Make the folder through which the attempt's programs get the ids of their runs; none has been given yet."""
    runs = folder / contract.WANDB_RUNS
    shutil.rmtree(str(runs), ignore_errors=True)
    runs.mkdir(mode=0o700, parents=True)
    wandb = spec["wandb"]
    own_name = spec["env"].get("WANDB_NAME", "")
    facts = {
        "n": spec["n"],
        "id": wandb["run_id"],
        "name": "" if own_name else wandb["name"],
        "earlier": wandb["earlier"],
    }
    (runs / wandb_runs.ATTEMPT).write_text(json.dumps(facts), encoding="utf-8")


def version_warnings(version: str) -> list[str]:
    """Return what this version of wandb does less well here."""
    if not version or _numbers(version) >= FLUSHES_SINCE:
        return []
    late = "metrics appear late, and a kill may lose the last seconds; 0.31 and newer write at once"
    if _numbers(version) < OLDEST:
        return [f"wandb {version} is older than {'.'.join(str(part) for part in OLDEST)} and was not tested: {late}"]
    return [f"wandb {version} writes its file in blocks: {late}"]


def _credentials(env: Mapping[str, str], version: str, code: Path) -> tuple[str, bool]:
    """Return the server's address and whether there are credentials for it."""
    given = env.get("WANDB_CONFIG_DIR")
    home = Path(given) if given else home_of(env) / ".config" / "wandb"
    settings = {**_settings(home), **_settings(code / "wandb")}
    explicit = env.get("WANDB_BASE_URL") or settings.get("base_url")
    default = _PUBLIC_SINCE_31 if _numbers(version) >= FLUSHES_SINCE else _PUBLIC
    if env.get("WANDB_API_KEY") or settings.get("api_key"):
        return (explicit or default).rstrip("/"), True
    for url in [explicit] if explicit else [default, _PUBLIC]:
        if urlsplit(url).netloc in _netrc_hosts(env):
            return url.rstrip("/"), True
    return (explicit or default).rstrip("/"), False


def _settings(folder: Path) -> dict[str, str]:
    file = folder / "settings"
    if not file.is_file():
        return {}
    import configparser  # noqa: PLC0415 -- few have such a file; each start would pay for it

    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(str(file), encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        return {}
    return dict(parser["default"]) if parser.has_section("default") else {}


def _netrc_hosts(env: Mapping[str, str]) -> frozenset[str]:
    home = home_of(env)
    places = [Path(env["NETRC"]).expanduser()] if env.get("NETRC") else [home / ".netrc", home / "_netrc"]
    place = next((place for place in places if place.is_file()), None)
    if place is None:
        return frozenset()
    import netrc  # noqa: PLC0415 -- as above

    try:
        return frozenset(netrc.netrc(str(place)).hosts)
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return frozenset()


def _probe_server(base_url: str, env: Mapping[str, str], context: BuildContext) -> str:
    """Return an empty text when the server answers, else why it does not."""
    argv = [sys.executable, "-I", "-c", _PROBE, base_url]
    with (context.tmp / "wandb-probe.out").open("w+b") as output:
        ran = run_program(argv, env=env, cwd=context.tmp, timeout_s=PROBE_S, heartbeat=context.heartbeat, output=output)
    if ran.status is None:
        return "no answer"
    return "" if ran.status == 0 else (ran.output.strip().splitlines() or ["no answer"])[-1][:200]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
