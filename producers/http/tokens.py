"""Tokens (JWT): who their holder is, in which role, for which account.

The algorithm never comes from the token alone: HS256 is verified with the secret and nothing else,
RS256 and ES256 with public keys of their own kind and nothing else, and there is no other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import jwt
from jwt import PyJWK
from jwt.exceptions import (
    ExpiredSignatureError,
    ImmatureSignatureError,
    InvalidAudienceError,
    InvalidIssuedAtError,
    InvalidIssuerError,
    InvalidKeyError,
    InvalidSignatureError,
    MissingRequiredClaimError,
    PyJWTError,
)

from sluicegate.producers.http.callers import Role
from sluicegate.producers.http.jwks import KeySet, KeysUnavailable
from sluicegate.producers.http.problems import Problem
from sluicegate.shared.settings import Settings

_SYMMETRIC: Final = "HS256"
_ASYMMETRIC: Final = ("RS256", "ES256")
_MAX_CHARS: Final = 8192
_MAX_SUBJECT_CHARS: Final = 200
_RETRY_AFTER_S: Final = 5

_WORDS: Final[tuple[tuple[type[PyJWTError], str], ...]] = (
    (ExpiredSignatureError, "has expired; get a new one"),
    (ImmatureSignatureError, "is not valid yet; compare the clocks"),
    (InvalidIssuedAtError, "was issued at no moment that can be; compare the clocks"),
    (InvalidAudienceError, "is for another audience (aud)"),
    (InvalidIssuerError, "is from another issuer (iss)"),
    (InvalidSignatureError, "has a signature that is not valid"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Whom a token speaks of."""

    subject: str
    role: Role
    #: Name or id; None: the token names none.
    account: str | None


class Tokens:
    """Reads tokens as the settings say."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._secret = settings.jwt_secret
        self._keys = (
            None
            if settings.jwt_jwks is None
            else KeySet(settings.jwt_jwks, ttl_s=settings.jwt_jwks_ttl_s)
        )
        self._algorithms = (
            *(() if self._secret is None else (_SYMMETRIC,)),
            *(() if self._keys is None else _ASYMMETRIC),
        )

    async def read(self, token: str) -> Holder:
        """Verify a token; raise `Problem` if it is no good, or does not do for its role."""
        if not self._algorithms:
            raise refused("tokens are not taken here; send an API key, such as sk-sluice-…")
        if len(token) > _MAX_CHARS:
            raise refused(f"the token is longer than {_MAX_CHARS:,} characters")
        algorithm, key_id = self._head(token)
        keys: Sequence[PyJWK | str]
        if algorithm == _SYMMETRIC and self._secret is not None:
            keys = [self._secret.get_secret_value()]
        else:
            keys = await self._public_keys(algorithm, key_id)
        return read_claims(self._verified(token, algorithm, keys), self._settings)

    def _head(self, token: str) -> tuple[str, str | None]:
        try:
            head = jwt.get_unverified_header(token)
        except (PyJWTError, ValueError):
            raise refused("this is neither an API key nor a token (JWT)") from None
        algorithm: str = head.get("alg", "")
        if algorithm not in self._algorithms:
            raise refused(
                f"the token is not signed as it must be: with {' or '.join(self._algorithms)}"
            )
        return algorithm, head.get("kid")

    async def _public_keys(self, algorithm: str, key_id: str | None) -> Sequence[PyJWK]:
        if self._keys is None:
            raise TypeError("this algorithm is not among ours")
        try:
            found = await self._keys.find(algorithm, key_id)
        except KeysUnavailable:
            raise Problem(
                *(503, "unavailable", "the keys of tokens cannot be read just now; try again"),
                retry_after_s=_RETRY_AFTER_S,
            ) from None
        if not found:
            raise refused("the token is signed with a key that is not known here")
        return found

    def _verified(
        self, token: str, algorithm: str, keys: Sequence[PyJWK | str]
    ) -> Mapping[str, Any]:
        settings = self._settings
        for last, key in enumerate(keys, 1):
            try:
                claims: dict[str, Any] = jwt.decode(
                    token,
                    key,
                    algorithms=[algorithm],
                    issuer=settings.jwt_issuer,
                    audience=settings.jwt_audience,
                    leeway=settings.jwt_leeway_s,
                    options={
                        "require": _required(settings),
                        "verify_aud": settings.jwt_audience is not None,
                        "enforce_minimum_key_length": True,
                    },
                )
            except (InvalidSignatureError, InvalidKeyError) as error:
                if last == len(keys):
                    raise refused(f"the token {_word(error)}") from None
            except PyJWTError as error:
                raise refused(f"the token {_word(error)}") from None
            else:
                return claims
        raise refused("the token is signed with a key that is not known here")


def read_claims(claims: Mapping[str, Any], settings: Settings) -> Holder:
    """Return whom these verified claims speak of; raise `Problem` if they do not do."""
    subject = claims.get("sub")
    if (
        not isinstance(subject, str)
        or not 1 <= len(subject) <= _MAX_SUBJECT_CHARS
        or not subject.isprintable()
    ):
        raise refused(
            f"the token's subject (sub) must be 1 to {_MAX_SUBJECT_CHARS} printable characters"
        )
    role = _role(claims, settings)
    account = claim(claims, settings.jwt_account_claim)
    if account is not None and not isinstance(account, str):
        raise _forbidden(
            f"the token's account (claim {settings.jwt_account_claim}) must be text: its name or id"
        )
    if role.value in _listed(settings.jwt_mfa_roles):
        proved = claim(claims, settings.jwt_mfa_claim)
        ways = proved if isinstance(proved, list) else [proved]
        accepted = _listed(settings.jwt_mfa_values)
        if not any(isinstance(way, str) and way in accepted for way in ways):
            raise Problem(
                *(403, "mfa_required"),
                f"the role {role} needs a second factor: sign in with one, and send the new token",
            )
    return Holder(subject=subject, role=role, account=account or None)


def claim(claims: Mapping[str, Any], path: str) -> Any:
    """Return a claim by its name, or by a path of names with dots; None: there is none."""
    if path in claims:
        return claims[path]
    found: Any = claims
    for name in path.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def refused(sentence: str) -> Problem:
    """Make the problem of credentials that are no good."""
    return Problem(
        401,
        "unauthorized",
        sentence,
        headers={"WWW-Authenticate": 'Bearer error="invalid_token"'},
    )


def _forbidden(sentence: str) -> Problem:
    return Problem(403, "forbidden", sentence)


def _role(claims: Mapping[str, Any], settings: Settings) -> Role:
    given = claim(claims, settings.jwt_role_claim)
    if given is None:
        return Role.USER
    try:
        return Role(given)
    except ValueError:
        raise _forbidden(
            f"the token's role (claim {settings.jwt_role_claim}) is none of {', '.join(Role)}; "
            "SLUICE_JWT_ROLE_CLAIM names the claim that is read"
        ) from None


def _required(settings: Settings) -> list[str]:
    named = {"iss": settings.jwt_issuer, "aud": settings.jwt_audience}
    return ["exp", "sub", *(name for name, wanted in named.items() if wanted is not None)]


def _listed(names: str) -> frozenset[str]:
    return frozenset(name.strip() for name in names.split(",") if name.strip())


def _word(error: PyJWTError) -> str:
    if isinstance(error, MissingRequiredClaimError):
        return f"lacks the claim {error.claim}"
    for kind, words in _WORDS:
        if isinstance(error, kind):
            return words
    return "is not valid"
