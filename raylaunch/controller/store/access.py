"""Access: roles, tokens (``tokens.json``) and invitations (``invitations.json``). Only hashes are stored.

An invitation's code works once. The invited person creates a token and sends only its hash. So the code may remain in a
shell's history, where it is worthless after use; and a lost response can be requested again with the same hash.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from raylaunch.controller.store.secrets import write_private
from raylaunch.errors import AccessError, ConflictError, NotFoundError, SpecError, StorageError
from raylaunch.models.cluster import TokenView
from raylaunch.models.fields import Moment

_log = logging.getLogger(__name__)

ID_DIGITS = 8
_LETTERS = "23456789abcdefghjkmnpqrstuvwxyz"
"""Without letters and digits that are easily confused."""
_GROUPS, _GROUP = 4, 5  # 31^20, 99 bits
_PERSON = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@+-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_KEPT_S = 24 * 3600.0
"""How long an expired invitation is kept, so that using its code gives a specific error."""


class Role(str, Enum):
    """What a person may do; each role may also do what those before it may."""

    VIEWER = "viewer"
    """Read jobs, logs, metrics, files."""
    TRAINER = "trainer"
    """Submit, and stop or remove own jobs."""
    OPERATOR = "operator"
    """Stop or remove anybody's jobs, set secrets, drain hosts, use Ray's own tools."""
    ADMIN = "admin"
    """Everything, including tokens and invitations."""

    def allows(self, needed: Role) -> bool:
        """Whether this role includes `needed`."""
        order = list(Role)
        return order.index(self) >= order.index(needed)


@dataclass(frozen=True)
class Caller:
    """The person behind a request. `token` is the hash of their token."""

    person: str
    role: Role
    token: str = ""

    def require(self, needed: Role, what: str) -> None:
        """Require a role.

        Args:
            needed: the lowest role that may do it.
            what: the requested action, as it follows "may not".

        Raises:
            AccessError: the caller's role is lower.
        """
        if not self.role.allows(needed):
            msg = f"{self.person} is {_article(self.role.value)} and may not {what}"
            raise AccessError(
                msg, hint=f"this requires the role {needed.value}; ask an admin of this cluster for such a token"
            )


class Token(BaseModel):
    """One token in ``tokens.json``: its hash, never the token itself."""

    model_config = ConfigDict(frozen=True)

    sha256: str
    person: str
    role: Role
    created_at: Moment | None = None
    expires_at: Moment | None = None
    made_by: str = ""

    @property
    def id(self) -> str:
        """Its short id."""
        return self.sha256[:ID_DIGITS]


class Tokens(BaseModel):
    """``tokens.json``."""

    tokens: tuple[Token, ...] = ()


def digest(token: str) -> str:
    """Return a token's hash."""
    return hashlib.sha256(token.encode()).hexdigest()


class TokenStore:
    """Reads ``tokens.json``, again whenever the file changes.

    Args:
        store: the store's folder.
        clock: the time now, seconds since the epoch.
    """

    def __init__(self, store: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._path = store / "tokens.json"
        self._clock = clock
        self._stamp: tuple[int, int, int] | None = None
        self._known: dict[str, Token] = {}

    def caller_of(self, token: str) -> Caller | None:
        """Return whose token it is; None if it is unknown or has expired."""
        self._refresh()
        # The timing of this lookup may reveal something about the hash, but nothing about the token.
        found = self._known.get(digest(token))
        if found is None or (found.expires_at is not None and found.expires_at <= self._clock()):
            return None
        return Caller(found.person, found.role, found.sha256)

    def all(self) -> tuple[Token, ...]:
        """Return all tokens, expired ones too."""
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
            _log.warning("%s cannot be read, keeping the known tokens: %s", self._path, type(error).__name__)
            return
        self._stamp = stamp
        tokens = (token.model_copy(update={"sha256": token.sha256.lower()}) for token in found.tokens)
        self._known = {token.sha256: token for token in tokens}


def _article(role: str) -> str:
    return f"an {role}" if role[0] in "aeiou" else f"a {role}"


class _Invitation(Token):
    """One invitation: its code's hash, and what the token that is created with it will be."""

    created_at: Moment
    expires_at: Moment
    token_expires_at: Moment | None = None
    token: str = ""
    """Hash of the token that was created with it; empty until it is accepted."""


class _File(BaseModel):
    invitations: tuple[_Invitation, ...] = ()


class Invitations:
    """``invitations.json``, and all changes of it and of ``tokens.json``. Used from one event loop.

    Args:
        store: the store's folder.
        tokens: reads the tokens.
        clock: the time now, seconds since the epoch.
    """

    def __init__(self, store: Path, tokens: TokenStore, *, clock: Callable[[], float] = time.time) -> None:
        self._tokens_path = store / "tokens.json"
        self._path = store / "invitations.json"
        self._token_store = tokens
        self._clock = clock

    def invite(
        self, person: str, role: Role, *, by: str, valid_s: float, token_expires_at: float | None
    ) -> tuple[str, float]:
        """Create an invitation; return its code, and when it expires (seconds since the epoch).

        Raises:
            SpecError: the name is invalid, or an expiry is in the past.
            StorageError: it cannot be written.
        """
        if not _PERSON.fullmatch(person):
            msg = f"{person!r} is not a valid name for a person; use letters, digits and any of . _ @ + -"
            raise SpecError(msg, field="person")
        now = self._clock()
        if valid_s <= 0 or (token_expires_at is not None and token_expires_at <= now):
            msg = "the expiry is in the past"
            raise SpecError(msg, hint="give a later time, for example --expires 90d")
        code = "-".join("".join(secrets.choice(_LETTERS) for _ in range(_GROUP)) for _ in range(_GROUPS))
        new = _Invitation(
            sha256=digest(code),
            person=person,
            role=role,
            made_by=by,
            created_at=now,
            expires_at=now + valid_s,
            token_expires_at=token_expires_at,
        )
        self._write([*self._read(), new])
        return code, new.expires_at

    def invited(self, code: str) -> Caller | None:
        """Return the person with an invitation's code; None if it is invalid. They may only accept the invitation."""
        try:
            found = self._of(code)
        except StorageError as error:
            _log.warning("%s", error.message)
            return None
        return Caller(found.person, Role.VIEWER, found.sha256) if found else None

    def accept(self, code: str, token: str) -> Token:
        """Accept an invitation with a new token, given as its SHA-256; return the stored token.

        Raises:
            AccessError: the code is invalid, was used, or has expired.
            SpecError: `token` is not a SHA-256.
            StorageError: it cannot be written; the code remains valid.
        """
        if not _SHA256.fullmatch(token):
            msg = "a token is given by its SHA-256, 64 hexadecimal digits"
            raise SpecError(msg, field="sha256")
        found = self._of(code)
        if found is None:
            msg = "the code is not an invitation to this cluster"
            raise AccessError(msg, hint="copy the whole line, or ask for a new one: raylaunch token create")
        if found.token and found.token != token:
            msg = f"the invitation for {found.person} was already used"
            hint = f"if that was not you, ask {found.made_by} to run: raylaunch token revoke {found.token[:ID_DIGITS]}"
            raise AccessError(msg, hint=hint)
        if not found.token and found.expires_at <= self._clock():
            msg = f"the invitation for {found.person} has expired"
            raise AccessError(msg, hint=f"ask {found.made_by} for a new one: raylaunch token create")
        made = Token(
            sha256=token,
            person=found.person,
            role=found.role,
            created_at=self._clock(),
            expires_at=found.token_expires_at,
            made_by=found.made_by,
        )
        if all(one.sha256 != token for one in self._token_store.all()):
            if found.token:
                msg = f"the token of {found.person} was revoked"
                raise AccessError(msg, hint=f"ask {found.made_by}")
            self._write_tokens([*self._token_store.all(), made])
        self._write([one.model_copy(update={"token": token}) if one == found else one for one in self._read()])
        return made

    def views(self, mine: str) -> tuple[TokenView, ...]:
        """Return all tokens, and the open invitations; `mine` is the hash of the caller's token."""
        tokens = [_view(one, mine=one.sha256 == mine) for one in self._token_store.all()]
        now = self._clock()
        return (*tokens, *(_view(one, invited=True) for one in self._read() if not one.token and one.expires_at > now))

    def revoke(self, who: str, *, mine: str) -> int:
        """Revoke the tokens and invitations of a person, or one by its id; return their number.

        Raises:
            NotFoundError: there is none.
            ConflictError: it is the caller's own.
            StorageError: it cannot be written.
        """
        known, invitations = self._token_store.all(), self._read()
        gone = [one for one in known if who in (one.person, one.id)]
        if any(one.sha256 == mine for one in gone):
            msg = "you cannot revoke the token you are using"
            raise ConflictError(msg, hint="give another one's id: raylaunch token list")
        unused = [one for one in invitations if not one.token and who in (one.person, one.id)]
        if not gone and not unused:
            msg = f"no token or invitation of {who!r}"
            raise NotFoundError(msg, hint="list them: raylaunch token list")
        if gone:
            self._write_tokens([one for one in known if one not in gone])
        if unused:
            self._write([one for one in invitations if one not in unused])
        return len(gone) + len(unused)

    def _of(self, code: str) -> _Invitation | None:
        wanted = digest(code.strip().lower())
        return next((one for one in self._read() if one.sha256 == wanted), None)

    def _read(self) -> list[_Invitation]:
        try:
            found = _File.model_validate_json(self._path.read_bytes()).invitations
        except FileNotFoundError:
            return []
        except (OSError, ValidationError) as error:
            msg = f"{self._path} cannot be read: {type(error).__name__}"
            raise StorageError(msg, hint="check it, or delete it: only open invitations are lost") from None
        return [one for one in found if one.expires_at > self._clock() - _KEPT_S]

    def _write(self, invitations: list[_Invitation]) -> None:
        write_private(self._path, _File(invitations=tuple(invitations)).model_dump_json(indent=2))

    def _write_tokens(self, tokens: list[Token]) -> None:
        text = json.dumps(Tokens(tokens=tuple(tokens)).model_dump(mode="json", exclude_none=True), indent=2)
        write_private(self._tokens_path, text)


def _view(one: Token, *, mine: bool = False, invited: bool = False) -> TokenView:
    return TokenView(
        id=one.id,
        person=one.person,
        role=one.role.value,
        created_at=one.created_at,
        expires_at=one.expires_at,
        made_by=one.made_by,
        mine=mine,
        invited=invited,
    )
