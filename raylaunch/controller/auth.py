"""Who is asking: tokens, each of a person and a role."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from pydantic import BaseModel, ValidationError

from raylaunch.errors import AccessError

_log = logging.getLogger(__name__)


class Role(str, Enum):
    """What a person may do; each role may also do what those before it may."""

    VIEWER = "viewer"
    """Read jobs, logs, metrics, files."""
    TRAINER = "trainer"
    """Submit, and stop or remove own jobs."""
    OPERATOR = "operator"
    """Stop or remove anybody's jobs, set secrets, use Ray's own tools."""
    ADMIN = "admin"
    """Everything."""

    def allows(self, needed: Role) -> bool:
        """Whether this role may do what `needed` may."""
        order = list(Role)
        return order.index(self) >= order.index(needed)


@dataclass(frozen=True)
class Caller:
    """The person behind a request."""

    person: str
    role: Role

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


class _Token(BaseModel):
    sha256: str
    person: str
    role: Role


class _Tokens(BaseModel):
    tokens: tuple[_Token, ...]


class TokenBook:
    """``tokens.json``: hashes of tokens, never tokens. Read again whenever the file changes."""

    def __init__(self, store: Path) -> None:
        self._path = store / "tokens.json"
        self._stamp: tuple[int, int, int] | None = None
        self._callers: dict[str, Caller] = {}

    def who(self, token: str) -> Caller | None:
        """Return whose token it is; None when nobody's."""
        self._refresh()
        # Looked up by hash: what the time of a look-up tells about a hash does not lead back to a token.
        return self._callers.get(hashlib.sha256(token.encode()).hexdigest())

    def _refresh(self) -> None:
        try:
            facts = self._path.stat()
            stamp = (facts.st_mtime_ns, facts.st_size, facts.st_ino)
            if stamp == self._stamp:
                return
            found = _Tokens.model_validate(json.loads(self._path.read_bytes()))
        except FileNotFoundError:
            self._stamp, self._callers = None, {}
            return
        except (OSError, ValueError, ValidationError) as error:
            _log.warning("%s cannot be read, the tokens known before stay: %s", self._path, type(error).__name__)
            return
        self._stamp = stamp
        self._callers = {token.sha256.lower(): Caller(token.person, token.role) for token in found.tokens}


def _article(role: str) -> str:
    return f"an {role}" if role[0] in "aeiou" else f"a {role}"
