"""How a script travels to a host, and how its output is told apart from the login shell's.

The only module that quotes. A command is sent over SSH as the constant `COMMAND`, which every login shell understands;
everything else, the script too, follows on its stdin: no secret in it is ever in a list of processes. There a first,
small script (`courier`) runs the real one under ``bash -euo pipefail`` and ``timeout``, prints marks before and after
what it prints, and ends it when the connection goes away.
"""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

COMMAND = "exec bash --noprofile --norc -s"
"""The command for the login shell. Nothing in it depends on the shell: bash, zsh, fish and tcsh take it alike."""

KILL_AFTER_S = 5.0
"""How long a script that has reached its limit may take to clean up before SIGKILL."""

_TIMED_OUT = (124, 137)
_NOISE_KEPT = 4096

# Read as one compound command, so that bash, which reads its script from the same stdin, has read nothing beyond it
# when the script starts: the rest is the script's input. A job in the background would get /dev/null as stdin and
# therefore has it by number. Messages of this bash itself (that a job was killed, with its text) are dropped.
_COURIER = """{{
unset BASH_ENV ENV
umask 077
printf '\\n%s begin %s\\n' {nonce} "$$"
printf '\\n%s begin\\n' {nonce} >&2
{exports}
exec 8<&0 7>&2 2>/dev/null
SECONDS=0
timeout -k {kill_after} {limit} bash --noprofile --norc -euo pipefail /dev/fd/9 {args} \
<&8 8<&- 2>&7 7>&- 9< <(printf %s {script}) &
child=$!
exec 8<&- </dev/null
trap 'kill -TERM "$child"' TERM HUP
(
trap - TERM HUP
while sleep 1; do
read -r _ _ _ parent _ <"/proc/$$/stat" && [ "$parent" = "$PPID" ] || {{ kill -TERM "$child"; exit; }}
done
) >/dev/null 7>&- &
watch=$!
wait "$child"; status=$?
while kill -0 "$child"; do wait "$child"; status=$?; done
kill "$watch"
printf '%s end\\n' {nonce} >&7
printf '%s end %s %s\\n' {nonce} "$status" "$SECONDS"
exit "$status"
}}
"""


@dataclass(frozen=True)
class Script:
    """A bash script with its arguments (``$1``, …), run under ``-euo pipefail``. `name` describes it in errors."""

    text: str
    args: tuple[str, ...] = ()
    name: str = ""


def as_script(command: Sequence[str] | Script) -> Script:
    """Return `command` as a script. A list of words is run as it stands, without a shell's interpretation."""
    if isinstance(command, Script):
        return command
    return Script('exec "$@"', args=tuple(command), name=command[0].rpartition("/")[2])


def quote(*words: str) -> str:
    """Return words as a shell reads them back."""
    return shlex.join(words)


def assign(variables: Mapping[str, str]) -> str:
    """Return lines of shell that export `variables`."""
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items())


def courier(script: Script, *, nonce: str, limit_s: float, env: Mapping[str, str]) -> bytes:
    """Return what is written to the stdin of `COMMAND`. The script's own input follows right behind it."""
    text = _COURIER.format(
        nonce=nonce,
        exports=assign(env),
        kill_after=f"{KILL_AFTER_S:g}",
        limit=f"{limit_s:.3f}",
        args=quote(*script.args),
        script=shlex.quote(f"exec 9<&-; {script.text}\n"),
    )
    return text.encode()


def new_nonce() -> str:
    """Return a word that nothing else prints."""
    return f"rl-{secrets.token_hex(8)}"


@dataclass
class OutputFrame:
    """Cuts what a script printed out of all that came over one stream, as it comes.

    `noise` is the beginning of what the login shell printed before; `pid` the courier's, known once `started`.
    """

    nonce: str
    noise: bytes = b""
    pid: int = 0
    started: bool = False
    ended: bool = False
    status: int | None = None
    seconds: int = 0
    _held: bytes = field(default=b"", repr=False)

    def feed(self, data: bytes) -> bytes:
        """Take the next bytes of the stream; return those of them (and of the ones held back) that the script wrote."""
        if self.ended:
            return b""
        self._held += data
        if not self.started and not self._find_start():
            return b""
        mark = f"{self.nonce} end".encode()
        start = self._held.find(mark)
        if start >= 0:
            return self._take_end(start, start + len(mark))
        # Held back is only what may be the beginning of the mark: a line is passed on when it is complete.
        safe = self._held.find(mark[:1], max(0, len(self._held) - len(mark) + 1))
        while safe >= 0 and not mark.startswith(self._held[safe:]):
            safe = self._held.find(mark[:1], safe + 1)
        out, self._held = (self._held, b"") if safe < 0 else (self._held[:safe], self._held[safe:])
        return out

    def close(self) -> bytes:
        """Return what was held back when the stream ends without its mark; before any mark, all of it was noise."""
        held, self._held = self._held, b""
        if self.started:
            return held
        self.noise = (self.noise + held)[:_NOISE_KEPT]
        return b""

    def timed_out(self, limit_s: float) -> bool:
        """Return whether ``timeout`` ended the script, rather than the script itself with the same status."""
        return self.status in _TIMED_OUT and self.seconds >= int(limit_s)

    def _find_start(self) -> bool:
        start = self._held.find(f"\n{self.nonce} begin".encode())
        end = self._held.find(b"\n", start + 1) if start >= 0 else -1
        if end < 0:
            keep = len(self.nonce) + 32
            if start < 0 and len(self._held) > keep + _NOISE_KEPT:
                self.noise = (self.noise + self._held[:-keep])[:_NOISE_KEPT]
                self._held = self._held[-keep:]
            return False
        self.noise = (self.noise + self._held[:start])[:_NOISE_KEPT]
        words = self._held[start:end].split()
        self.pid = int(words[2]) if len(words) > 2 else 0  # noqa: PLR2004 -- nonce, "begin", pid
        self.started = True
        self._held = self._held[end + 1 :]
        return True

    def _take_end(self, start: int, after: int) -> bytes:
        end = self._held.find(b"\n", after)
        if end < 0:
            out, self._held = self._held[:start], self._held[start:]
            return out
        words = self._held[after:end].split()
        if words:
            self.status, self.seconds = int(words[0]), int(words[1])
        self.ended = True
        out, self._held = self._held[:start], b""
        return out
