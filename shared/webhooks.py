"""Webhooks: the URLs that alerts are posted to, which of them are safe, and how posts are signed.

A URL comes from whoever may set up an account, and the sweep stands inside the network: it must not
become a way to talk to what only the inside can reach. So https alone, no redirects, and an address
is looked at after its name was looked up, by whoever connects to it: see `workers/webhook.py`.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Final
from urllib.parse import urlsplit
from uuid import UUID

from sqlalchemy import Connection, select, update

from sluicegate.shared.errors import SettingsError
from sluicegate.shared.secrets import Secret
from sluicegate.shared.tables import accounts

#: Headers of a post: the alert's id, the same at each try; the seconds since 1970 at which it was
#: signed; and `v1=` with the signature, in hexadecimal digits.
ID_HEADER: Final = "Sluice-Alert-Id"
TIMESTAMP_HEADER: Final = "Sluice-Timestamp"
SIGNATURE_HEADER: Final = "Sluice-Signature"

_HTTPS_PORT: Final = 443
_FIRST_FREE_PORT: Final = 1024
_MAX_URL_CHARS: Final = 2048
_MIN_SECRET_CHARS: Final = 16
MAX_SECRET_CHARS: Final = 256

# The registries of special addresses (RFC 6890 and its successors), multicast, and one public
# address behind which a cloud's own machine answers its guests. Newer Pythons know more of these
# by themselves than older ones.
_NOT_PUBLIC_4: Final = tuple(
    IPv4Network(network)
    for network in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
        *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24"),
        *("192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24", "198.18.0.0/15"),
        *("198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4", "168.63.129.16/32"),
    )
)
# What the public Internet has been given of IPv6, without what is special in it: documentation,
# tunnels (2002::/16 and Teredo carry an IPv4 address of anybody's choice) and registries' tests.
_PUBLIC_6: Final = IPv6Network("2000::/3")
_NOT_PUBLIC_6: Final = tuple(
    IPv6Network(network)
    for network in (*("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20"),)
)
# An IPv4 address in IPv6's clothes: as sockets write it, and as a NAT64 gateway wants it.
_CARRIES_4: Final = (IPv6Network("::ffff:0:0/96"), IPv6Network("64:ff9b::/96"))


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether an address belongs to the public Internet, and to nobody's inside."""
    if isinstance(address, IPv6Address):
        if any(address in network for network in _CARRIES_4):
            return is_public(IPv4Address(int(address) & 0xFFFF_FFFF))
        return address in _PUBLIC_6 and not any(address in network for network in _NOT_PUBLIC_6)
    return not any(address in network for network in _NOT_PUBLIC_4)


def check_url(url: str, *, private: bool = False) -> str:
    """Return the URL; raises SettingsError if alerts are never posted to it.

    private: addresses that are not public are allowed. A name is looked up when it is posted to.
    """
    for problem in _problems(url, private=private):
        raise SettingsError(f"the alert URL {problem}")
    return url


def _problems(url: str, *, private: bool) -> Iterator[str]:
    if len(url) > _MAX_URL_CHARS or not url.isascii() or not url.isprintable() or " " in url:
        yield (
            f"must be at most {_MAX_URL_CHARS} printable ASCII characters without a space; "
            "the name of a host in other letters is written as xn--..."
        )
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        yield "is not a URL"
        return
    if parts.scheme != "https" or not host:
        yield "must begin with https:// and the name of a host"
    if "@" in parts.netloc:
        yield "must not hold a user name or password: posts are signed instead"
    if "#" in url or "\\" in url:
        yield "must hold neither # nor \\"
    if port is not None and port != _HTTPS_PORT and port < _FIRST_FREE_PORT:
        yield f"must have port {_HTTPS_PORT}, or one from {_FIRST_FREE_PORT} on"
    with suppress(ValueError):
        if not private and not is_public(ip_address(host or "")):
            yield f"must not have {host}, which is no public address{ALLOWED_BY}"


#: What a refusal ends with.
ALLOWED_BY: Final = "; SLUICE_ALERT_PRIVATE_URLS=true allows such"


def new_secret() -> Secret:
    """Make a secret to sign posts with."""
    return Secret(secrets.token_urlsafe(32))


def check_secret(secret: Secret) -> Secret:
    """Return the secret; raises SettingsError if nothing should be signed with it."""
    plain = secret.get_secret_value()
    if not (_MIN_SECRET_CHARS <= len(plain) <= MAX_SECRET_CHARS) or not (
        plain.isascii() and plain.isprintable()
    ):
        raise SettingsError(
            f"an alert secret must be one line of {_MIN_SECRET_CHARS} to {MAX_SECRET_CHARS} "
            "printable ASCII characters"
        )
    return secret


def signature(secret: Secret, timestamp: str, body: bytes) -> str:
    """Return the value of the signature's header: `v1=` and HMAC-SHA256 of `<timestamp>.<body>`."""
    key = secret.get_secret_value().encode()
    signed = hmac.new(key, timestamp.encode() + b"." + body, hashlib.sha256)
    return f"v1={signed.hexdigest()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Webhook:
    """Where an account's alerts are posted to."""

    url: str
    #: Encrypted with the key ring.
    secret_encrypted: str


def webhook_of(connection: Connection, account_id: UUID) -> Webhook | None:
    """Return an account's webhook; None: it has none."""
    columns = accounts.c
    row = connection.execute(
        select(columns.alert_url, columns.alert_secret_encrypted).where(columns.id == account_id)
    ).one_or_none()
    if row is None or row.alert_url is None:
        return None
    return Webhook(url=row.alert_url, secret_encrypted=row.alert_secret_encrypted)


def set_webhook(connection: Connection, account_id: UUID, webhook: Webhook | None) -> None:
    """Set an account's webhook; None takes it away, and what waits for it is not posted."""
    connection.execute(
        update(accounts)
        .where(accounts.c.id == account_id)
        .values(
            alert_url=webhook and webhook.url,
            alert_secret_encrypted=webhook and webhook.secret_encrypted,
        )
    )
