"""Tokens: whose signature counts, which claims are read, and that no trick with headers works."""

from __future__ import annotations

import base64
import hmac
import json
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from sluicegate.producers.http.callers import Role
from sluicegate.producers.http.jwks import KeySet, KeysUnavailable, read_keys
from sluicegate.producers.http.problems import Problem
from sluicegate.producers.http.tokens import Holder, Tokens, claim, read_claims
from sluicegate.shared.errors import SettingsError
from sluicegate.shared.secrets import Secret
from sluicegate.shared.settings import Settings, load_settings

SECRET: Final = "a secret that is long enough for HS256"
OTHER: Final = "another secret that is just as long as it"


@cache
def rsa_key(bits: int = 2048) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, bits)


@cache
def ec_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def public_jwk(key: Any, kid: str, **more: str) -> dict[str, Any]:
    algorithm = RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else ECAlgorithm
    return {**algorithm.to_jwk(key.public_key(), as_dict=True), "kid": kid, "use": "sig", **more}


def settings(**values: object) -> Settings:
    return Settings(_env_file=None, **values)  # type: ignore[arg-type]  # as in load_settings


def claims(**more: object) -> dict[str, Any]:
    now = datetime.now(UTC)
    given = {"sub": "ann", "account": "acme", "iat": now, "exp": now + timedelta(minutes=5)} | more
    return {name: value for name, value in given.items() if value is not ...}


def signed(key: Any = SECRET, algorithm: str = "HS256", kid: str | None = None, **more: Any) -> str:
    headers = None if kid is None else {"kid": kid}
    return jwt.encode(claims(**more), key, algorithm=algorithm, headers=headers)


def by_hand(header: dict[str, Any], payload: dict[str, Any], signature: bytes = b"") -> str:
    parts = (json.dumps(header).encode(), json.dumps(payload).encode(), signature)
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


@pytest.fixture
def jwks(tmp_path: Path) -> Callable[..., str]:
    def write(*keys: dict[str, Any]) -> str:
        place = tmp_path / "jwks.json"
        place.write_text(json.dumps({"keys": keys}))
        return str(place)

    return write


async def refusal(tokens: Tokens, token: str) -> tuple[int, str]:
    with pytest.raises(Problem) as caught:
        await tokens.read(token)
    return caught.value.status, caught.value.message


async def test_each_algorithm_with_its_own_key(jwks: Callable[..., str]) -> None:
    place = jwks(public_jwk(rsa_key(), "r"), public_jwk(ec_key(), "e"))
    tokens = Tokens(settings(jwt_secret=SECRET, jwt_jwks=place))
    expected = Holder(subject="ann", role=Role.OWNER, account="acme")
    for token in (
        signed(role="owner"),
        signed(rsa_key(), "RS256", "r", role="owner"),
        signed(ec_key(), "ES256", "e", role="owner"),
        signed(ec_key(), "ES256", None, role="owner"),
    ):
        assert await tokens.read(token) == expected


async def test_whoever_says_none_is_nobody(jwks: Callable[..., str]) -> None:
    tokens = Tokens(settings(jwt_secret=SECRET, jwt_jwks=jwks(public_jwk(rsa_key(), "r"))))
    payload = {"sub": "ann", "account": "acme", "role": "admin", "exp": 4_000_000_000}
    for algorithm in ("none", "None", "NONE", "", "HS512", "RS512", "PS256", "EdDSA", None, 7):
        token = by_hand({"alg": algorithm, "typ": "JWT"}, payload)
        assert (await refusal(tokens, token))[0] == 401, algorithm


async def test_a_public_key_is_no_secret(jwks: Callable[..., str]) -> None:
    # The oldest trick: a token of HS256 whose secret is the public key that everybody can read.
    known = public_jwk(rsa_key(), "r")
    place = jwks(known)
    public = rsa_key().public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    body = by_hand({"alg": "HS256", "kid": "r"}, {"sub": "x", "account": "a", "exp": 4e9})[:-1]
    for material in (public, json.dumps({"keys": [known]}).encode()):
        mac = hmac.new(material, body.encode(), sha256).digest()
        forged = f"{body}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"
        for tokens in (
            Tokens(settings(jwt_jwks=place)),
            Tokens(settings(jwt_jwks=place, jwt_secret=SECRET)),
        ):
            assert (await refusal(tokens, forged))[0] == 401


async def test_a_secret_in_a_key_set_counts_for_nothing(jwks: Callable[..., str]) -> None:
    secret = base64.urlsafe_b64encode(SECRET.encode()).rstrip(b"=").decode()
    symmetric = {"kty": "oct", "k": secret, "kid": "s", "alg": "HS256"}
    place = jwks(public_jwk(ec_key(), "e"), symmetric)
    tokens = Tokens(settings(jwt_jwks=place))
    assert (await refusal(tokens, signed(kid="s")))[0] == 401
    # Nor one that bears the name of another algorithm.
    tokens = Tokens(
        settings(jwt_jwks=jwks(public_jwk(ec_key(), "e"), symmetric | {"alg": "RS256"}))
    )
    assert (await refusal(tokens, signed(rsa_key(), "RS256", "s")))[0] == 401


async def test_keys_and_algorithms_are_not_mixed(jwks: Callable[..., str]) -> None:
    tokens = Tokens(settings(jwt_jwks=jwks(public_jwk(rsa_key(), "k"), public_jwk(ec_key(), "e"))))
    assert (await refusal(tokens, signed(ec_key(), "ES256", "k")))[0] == 401
    assert (await refusal(tokens, signed(rsa_key(), "RS256", "e")))[0] == 401
    assert (await refusal(tokens, signed(rsa_key(3072), "RS256", "k")))[0] == 401


def test_weak_and_foreign_keys_are_passed_over() -> None:
    good = public_jwk(ec_key(), "e")
    p384 = public_jwk(ec.generate_private_key(ec.SECP384R1()), "p")
    weak = public_jwk(rsa_key(1024), "w")
    encrypting = public_jwk(rsa_key(), "x") | {"use": "enc"}
    other = public_jwk(rsa_key(), "o", alg="RS512")
    broken = {"kty": "RSA", "n": "?", "e": "AQAB", "kid": "b"}
    listed = [p384, weak, encrypting, other, broken, 7, None, {}, good]
    assert [key.key_id for key in read_keys(json.dumps({"keys": listed}).encode())] == ["e"]
    for nothing in (b"", b"[]", b"{}", b'{"keys": 7}', b'{"keys": []}', b'{"keys": {"a": 1}}'):
        with pytest.raises(ValueError, match=r"RS256|JWKS"):
            read_keys(nothing)


@pytest.mark.parametrize(
    ("token", "words"),
    [
        (lambda: signed(OTHER), "signature"),
        (lambda: signed(exp=datetime.now(UTC) - timedelta(minutes=5)), "has expired"),
        (lambda: signed(nbf=datetime.now(UTC) + timedelta(minutes=5)), "not valid yet"),
        (lambda: signed(exp=...), "lacks the claim exp"),
        (lambda: signed(sub=...), "lacks the claim sub"),
        (lambda: signed(sub=""), "subject"),
        (lambda: signed(sub="a\nb"), "subject"),
        (lambda: signed(aud="elsewhere"), "audience"),
        (lambda: signed(aud=...), "lacks the claim aud"),
        (lambda: signed(iss="https://elsewhere"), "issuer"),
        (lambda: signed(iss=...), "lacks the claim iss"),
        (lambda: "x" * 9000, "longer than"),
        (lambda: "a.b", "neither an API key nor a token"),
        (lambda: "é.é.é", "neither an API key nor a token"),
    ],
)
async def test_what_is_wrong_is_said(token: Callable[[], str], words: str) -> None:
    tokens = Tokens(settings(jwt_secret=SECRET, jwt_audience="here", jwt_issuer="https://iss"))
    good = {"aud": "here", "iss": "https://iss"}
    made = token()
    if made.count(".") == 2 and made.isascii():
        head = jwt.decode(made, options={"verify_signature": False})
        key = OTHER if words == "signature" else SECRET
        missing = words.rpartition(" ")[2] if words.startswith("lacks") else ""
        made = jwt.encode({n: v for n, v in (good | head).items() if n != missing}, key)
    status, message = await refusal(tokens, made)
    assert status == 401
    assert words in message
    assert (await tokens.read(signed(**good))).subject == "ann"


async def test_clocks_may_differ_a_little() -> None:
    late = signed(exp=datetime.now(UTC) - timedelta(seconds=20))
    assert (await Tokens(settings(jwt_secret=SECRET)).read(late)).subject == "ann"
    strict = Tokens(settings(jwt_secret=SECRET, jwt_leeway_s=0))
    assert (await refusal(strict, late))[0] == 401


async def test_without_settings_no_token_is_taken() -> None:
    status, message = await refusal(Tokens(settings()), signed())
    assert (status, "send an API key" in message) == (401, True)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"jwt_secret": "short"}, "SLUICE_JWT_SECRET: must be 32 bytes"),
        ({"jwt_jwks": "http://idp.example/jwks.json"}, "SLUICE_JWT_JWKS: must be the path"),
        ({"jwt_jwks": "ftp://idp.example/jwks.json"}, "SLUICE_JWT_JWKS: must be the path"),
        ({"jwt_mfa_roles": "boss"}, "SLUICE_JWT_MFA_ROLES"),
        ({"jwt_role_claim": "a..b"}, "SLUICE_JWT_ROLE_CLAIM"),
        ({"jwt_leeway_s": 301}, "SLUICE_JWT_LEEWAY_S"),
    ],
)
def test_settings_that_would_be_unsafe_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        load_settings(**values)


# Claims


def test_claims_are_found_by_paths() -> None:
    given = {"app_metadata": {"role": "owner", "n": None}, "https://crm.example/role": "admin"}
    assert claim(given, "app_metadata.role") == "owner"
    # A name that has dots of its own, as those of Auth0.
    assert claim(given, "https://crm.example/role") == "admin"
    assert [claim(given, path) for path in ("app_metadata.n", "x.y", "app_metadata.role.z")] == [
        None
    ] * 3


@pytest.mark.parametrize(
    ("proved", "is_enough"),
    [
        ("aal2", True),
        (["pwd", "mfa"], True),
        ("aal1", False),
        (None, False),
        ([], False),
        ([["mfa"]], False),
        ({"mfa": True}, False),
    ],
)
def test_roles_that_need_two_factors(proved: object, *, is_enough: bool) -> None:
    strict = settings(jwt_mfa_roles="owner, admin", jwt_mfa_values="aal2,mfa")
    for role in Role:
        given = {"sub": "ann", "role": role.value, "aal": proved}
        if is_enough or role is Role.USER:
            assert read_claims(given, strict).role is role
        else:
            with pytest.raises(Problem) as caught:
                read_claims(given, strict)
            assert (caught.value.status, caught.value.code) == (403, "mfa_required")


_JSON: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(("sub", "role", "account", "aal"), _JSON)))
def test_claims_of_any_kind_are_read_or_refused(given_claims: dict[str, Any]) -> None:
    with suppress(Problem):
        holder = read_claims(given_claims, settings(jwt_mfa_roles="admin"))
        assert holder.subject == given_claims["sub"]
        assert holder.role.value == (given_claims.get("role") or "user")


# Key sets


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


async def test_a_new_key_is_found_and_unknown_ones_do_not_read_it_all_the_time(
    jwks: Callable[..., str],
) -> None:
    clock = Clock()
    place = jwks(public_jwk(ec_key(), "old"))
    keys = KeySet(place, ttl_s=600, clock=clock)
    assert len(await keys.find("ES256", "old")) == 1
    # Whoever makes up ids of keys has the set read every half minute at most.
    jwks(public_jwk(ec_key(), "old"), public_jwk(ec_key(), "new"))
    assert await keys.find("ES256", "new") == []
    clock.now_s += 31
    assert len(await keys.find("ES256", "new")) == 1
    # One that is gone is out after a while.
    jwks(public_jwk(ec_key(), "new"))
    assert len(await keys.find("ES256", "old")) == 1
    clock.now_s += 601
    assert await keys.find("ES256", "old") == []


async def test_what_was_read_stays_while_it_cannot_be_read(
    jwks: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    place = jwks(public_jwk(ec_key(), "e"))
    keys = KeySet(place, ttl_s=600, clock=clock)
    await keys.find("ES256", "e")
    jwks()
    clock.now_s += 601
    assert len(await keys.find("ES256", "e")) == 1
    assert "cannot be read: there is no key" in caplog.text


async def test_without_any_key_it_is_not_the_callers_fault(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = str(tmp_path / "not-there.json")
    with pytest.raises(KeysUnavailable):
        await KeySet(place, ttl_s=600).find("ES256", "e")
    tokens = Tokens(settings(jwt_jwks=place))
    status, message = await refusal(tokens, signed(ec_key(), "ES256", "e"))
    assert (status, "try again" in message) == (503, True)
    assert "No such file" in caplog.text
    assert place not in caplog.text


def test_a_secret_is_not_shown() -> None:
    assert SECRET not in repr(settings(jwt_secret=Secret(SECRET)))
