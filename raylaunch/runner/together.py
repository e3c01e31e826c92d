"""``runner.pyz --together PLAN``: one of several programs that check the cluster's network between them.

`up` runs one on each host with GPUs. They meet at the addresses that were chosen, do PyTorch's all-reduce and check its
numbers, or exchange bytes pair by pair where one has no PyTorch, and print one line of JSON: how it went, or between
which of them it did not.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Sequence
from typing import Any

from raylaunch.runner import exchange, together_torch
from raylaunch.runner.meeting import Meeting, Member, UnmetError, listen, words_of

OPTION = "--together"
MARK = "raylaunch-together "
"""Before the line that says how it went."""

_HEAR_S = 15.0
_TORCH_S = 75.0


class Together:
    """One member.

    Args:
        plan: ``run`` (a word of this run's own), ``rank``, ``members`` (host, address, port of each), ``interface`` of
            this one, ``bytes``, ``meet_s``, ``quiet_s``, ``whole_s``.
    """

    def __init__(self, plan: dict[str, Any]) -> None:
        self._plan = plan
        self._members = [Member(*one) for one in plan["members"]]
        self._rank: int = plan["rank"]
        self._size = len(self._members)

    def run(self) -> dict[str, Any]:
        """Return how it went."""
        me = self._members[self._rank]
        together_torch.choose_interface(self._plan["interface"])
        try:
            listener = listen(me)
        except OSError as error:
            return {"kind": "listen", "why": words_of(error)}
        meeting = Meeting(self._plan["run"], self._rank, self._members, listener)
        try:
            return self._reduce(meeting)
        except UnmetError as error:
            return {"kind": "unmet", "unreached": error.unreached, "absent": error.absent}
        except exchange.HopError as error:
            hop = [self._members[error.sender].host, self._members[error.receiver].host]
            return {"kind": "hop", "hop": hop, "why": error.why, "step": error.step}
        finally:
            meeting.close()

    def _reduce(self, meeting: Meeting) -> dict[str, Any]:
        meeting.meet(self._plan["meet_s"])
        store, port = self._store()
        mine = {**together_torch.capabilities(), "port": port}
        said = self._agree(meeting, mine)
        backend = together_torch.backend_of(list(said.values()))
        if backend == "TCP":
            return self._over_tcp(meeting)
        return self._over_torch(backend, (self._members[0].address, said[0]["port"], store))

    def _store(self) -> tuple[socket.socket | None, int]:
        """Listen where PyTorch's store will, on the first member's chosen address alone."""
        if self._rank:
            return None, 0
        listener = listen(self._members[0]._replace(port=0))
        return listener, int(listener.getsockname()[1])

    def _agree(self, meeting: Meeting, mine: dict[str, Any]) -> dict[int, dict[str, Any]]:
        try:
            meeting.tell(mine)
        except OSError:
            raise UnmetError({}, []) from None
        return {**meeting.hear(self._plan["meet_s"] + _HEAR_S), self._rank: mine}

    def _over_tcp(self, meeting: Meeting) -> dict[str, Any]:
        limits = exchange.Limits(self._plan["quiet_s"], self._plan["whole_s"])
        nbytes = max(1, self._plan["bytes"] // (self._size - 1))
        rate = exchange.exchange(meeting, self._rank, self._size, nbytes, limits)
        return {"kind": "done", "over": "TCP", "bytes_per_s": rate}

    def _over_torch(self, backend: str, store: tuple[str, int, socket.socket | None]) -> dict[str, Any]:
        """Do it in a thread: what hangs in there cannot be interrupted, but left behind."""
        ended: list[dict[str, Any]] = []

        def work() -> None:
            try:
                seconds = together_torch.all_reduce(backend, self._rank, self._size, store, self._plan["bytes"])
                ended.append(self._done(backend, seconds))
            except ArithmeticError as error:
                ended.append({"kind": "number", "over": backend, "why": str(error)})
            except Exception as error:  # noqa: BLE001 -- whatever PyTorch raises is what there is to say
                why = " ".join(str(error).split())[:500]
                ended.append({"kind": "torch", "over": backend, "why": f"{type(error).__name__}: {why}"})

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(_TORCH_S)
        return ended[0] if ended else {"kind": "torch", "over": backend, "why": f"no end within {_TORCH_S:g} s"}

    def _done(self, over: str, seconds: float) -> dict[str, Any]:
        """Each member sends, and receives, 2 (n - 1) / n of the whole."""
        passed = 2 * (self._size - 1) / self._size * self._plan["bytes"]
        return {"kind": "done", "over": over, "seconds": seconds, "bytes_per_s": passed / max(seconds, 1e-9)}


def main(arguments: Sequence[str]) -> int:
    """Take part in what the plan, the word after `OPTION`, says; returns the exit status."""
    ended = Together(json.loads(arguments[1])).run()
    sys.stdout.write(f"\n{MARK}{json.dumps(ended)}\n")
    sys.stdout.flush()
    os._exit(0 if ended["kind"] == "done" else 1)  # a thread that hangs in PyTorch must not keep it
