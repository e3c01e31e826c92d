"""Who is asking: tokens, each of a person and a role."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from raylaunch.errors import AccessError
from raylaunch.spec_parts import Moment

_log = logging.getLogger(__name__)

ID_DIGITS = 8


class Role(str, Enum):
    """What a person may do; each role may also do what those before it may."""

    VIEWER = "viewer"
    """Read jobs, logs, metrics, files."""
    TRAINER = "trainer"
    """Submit, and stop or remove own jobs."""
    OPERATOR = "operator"
    """Stop or remove anybody's jobs, set secrets, drain hosts, use Ray's own tools."""
    ADMIN = "admin"
    """Everything; and say who may come in."""

    def allows(self, needed: Role) -> bool:
        """Whether this role may do what `needed` may."""
        order = list(Role)
        return order.index(self) >= order.index(needed)


@dataclass(frozen=True)
class Caller:
    """The person behind a request. `token` is the hash of what was shown."""

    person: str
    role: Role
    token: str = ""

    def require(self, needed: Role, what: str) -> None:
        """Let through who has the role.

        Args:
            needed: the least role that may do it.
            what: what is asked for, as it follows "may not".

        Raises:
            AccessError: the caller's role is less.
        """
        if not self.role.allows(needed):
            msg = f"{self.person} is {_article(self.role.value)} and may not {what}"
            raise AccessError(
                msg, hint=f"it takes the role {needed.value}; ask whoever runs this cluster for such a token"
            )


class Token(BaseModel):
    """One token as ``tokens.json`` keeps it: its hash, never itself."""

    model_config = ConfigDict(frozen=True)

    sha256: str
    person: str
    role: Role
    created_at: Moment | None = None
    expires_at: Moment | None = None
    made_by: str = ""

    @property
    def id(self) -> str:
        """What people call it."""
        return self.sha256[:ID_DIGITS]


class Tokens(BaseModel):
    """``tokens.json``."""

    tokens: tuple[Token, ...] = ()


def digest(token: str) -> str:
    """Return the hash by which a token is known."""
    return hashlib.sha256(token.encode()).hexdigest()


class TokenBook:
    """``tokens.json``: hashes of tokens, never tokens. Read again whenever the file changes.

    Args:
        store: the store's folder.
        clock: the time now, seconds since the epoch.
    """

    def __init__(self, store: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._path = store / "tokens.json"
        self._clock = clock
        self._stamp: tuple[int, int, int] | None = None
        self._known: dict[str, Token] = {}

    def who(self, token: str) -> Caller | None:
        """Return whose token it is; None when nobody's, or when its time is over."""
        self._refresh()
        # Looked up by hash: what the time of a look-up tells about a hash does not lead back to a token.
        found = self._known.get(digest(token))
        if found is None or (found.expires_at is not None and found.expires_at <= self._clock()):
            return None
        return Caller(found.person, found.role, found.sha256)

    def all(self) -> tuple[Token, ...]:
        """Return all tokens, those that are over too."""
        self._refresh()
        return tuple(self._known.values())

    def _refresh(self) -> None:
        try:
            facts = self._path.stat()
            stamp = (facts.st_mtime_ns, facts.st_size, facts.st_ino)
            if stamp == self._stamp:
                return
            found = Tokens.model_validate(json.loads(self._path.read_bytes()))
        except FileNotFoundError:
            self._stamp, self._known = None, {}
            return
        except (OSError, ValueError, ValidationError) as error:
            _log.warning("%s cannot be read, the tokens known before stay: %s", self._path, type(error).__name__)
            return
        self._stamp = stamp
        tokens = (token.model_copy(update={"sha256": token.sha256.lower()}) for token in found.tokens)
        self._known = {token.sha256: token for token in tokens}


def _article(role: str) -> str:
    return f"an {role}" if role[0] in "aeiou" else f"a {role}"
