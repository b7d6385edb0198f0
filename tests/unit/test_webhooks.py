"""Where alerts may be posted to, and how they are signed."""

from __future__ import annotations

import hashlib
import hmac
import socket
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluicegate.shared.errors import SettingsError
from sluicegate.shared.secrets import Secret
from sluicegate.shared.webhooks import (
    check_secret,
    check_url,
    is_public,
    new_secret,
    signature,
)

#: The special-purpose registries of IANA, multicast, and addresses behind which clouds keep what
#: they tell their machines.
REFUSED = [
    # This network, private, shared, loopback, link-local.
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
    *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24"),
    *("192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24"),
    *("203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4", "255.255.255.255/32"),
    # Metadata: the usual one, Alibaba's, Oracle's, Azure's, Amazon's over IPv6.
    *("169.254.169.254/32", "100.100.100.200/32", "192.0.0.192/32", "168.63.129.16/32"),
    "fd00:ec2::254/128",
    *("::/128", "::1/128", "::/96", "64:ff9b:1::/48", "100::/64", "2001::/32", "2001:2::/48"),
    *("2001:10::/28", "2001:20::/28", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48"),
    *("3fff::/20", "5f00::/16", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8"),
]
PUBLIC = [
    *("1.1.1.1", "8.8.8.8", "93.184.216.34", "100.63.255.255", "100.128.0.0", "172.15.255.255"),
    *("172.32.0.0", "192.167.255.255", "192.169.0.0", "168.63.129.15", "168.63.129.17"),
    *("223.255.255.255", "2606:4700::1111", "2a00:1450:4001::1", "2001:4860:4860::8888"),
]


def _inside(network: str) -> st.SearchStrategy[IPv4Address | IPv6Address]:
    return st.ip_addresses(network=network)


@pytest.mark.parametrize("network", REFUSED)
def test_the_ends_of_special_ranges_are_refused(network: str) -> None:
    found = ip_network(network)
    assert not is_public(found[0])
    assert not is_public(found[-1])


@given(st.sampled_from(REFUSED).flatmap(_inside))
def test_every_address_of_a_special_range_is_refused(address: IPv4Address | IPv6Address) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_may_be_posted_to(address: str) -> None:
    assert is_public(ip_address(address))


@given(st.ip_addresses())
def test_what_python_knows_to_be_special_is_refused(address: IPv4Address | IPv6Address) -> None:
    special = (
        *(address.is_private, address.is_loopback, address.is_link_local, address.is_multicast),
        *(address.is_reserved, address.is_unspecified),
    )
    if any(special) and not _carries_4(address):
        assert not is_public(address)


def _carries_4(address: IPv4Address | IPv6Address) -> bool:
    return isinstance(address, IPv6Address) and (
        address.ipv4_mapped is not None or address in IPv6Network("64:ff9b::/96")
    )


@given(st.ip_addresses(v=4), st.sampled_from(["::ffff:0:0", "64:ff9b::"]))
def test_an_ipv4_address_in_ipv6s_clothes_is_what_it_is(address: IPv4Address, prefix: str) -> None:
    dressed = IPv6Address(int(IPv6Address(prefix)) | int(address))
    assert is_public(dressed) == is_public(address)


@given(st.ip_addresses(v=4))
def test_tunnels_to_anybodys_address_are_refused(address: IPv4Address) -> None:
    to_6to4 = IPv6Address(0x2002 << 112 | int(address) << 80 | 1)
    teredo = IPv6Address(0x2001_0000 << 96 | int(address) << 64 | 1)
    compatible = IPv6Address(int(address))
    assert not any(map(is_public, (to_6to4, teredo, compatible)))


def test_most_of_ipv4_is_public() -> None:
    """The rule is not `refuse everything`."""
    refused = {IPv4Network(network) for network in REFUSED if ":" not in network}
    addresses = sum(network.num_addresses for network in refused)
    assert addresses < 2**32 / 5


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.acme.com",
        "https://hooks.acme.com/alerts?team=7&key=a%20b",
        "https://hooks.acme.com:443/",
        "https://hooks.acme.com:8443/",
        "https://xn--bcher-kva.example/",
        "https://93.184.216.34/",
        "https://[2606:4700::1111]:4433/",
    ],
)
def test_urls_that_are_taken(url: str) -> None:
    assert check_url(url) == url


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("http://hooks.acme.com/", "must begin with https://"),
        ("ftp://hooks.acme.com/", "must begin with https://"),
        ("hooks.acme.com", "must begin with https://"),
        ("https:///alerts", "the name of a host"),
        ("https://", "the name of a host"),
        ("https://user@hooks.acme.com/", "user name"),
        ("https://user:password@hooks.acme.com/", "user name"),
        ("https://@hooks.acme.com/", "user name"),
        ("https://hooks.acme.com:22/", "must have port 443"),
        ("https://hooks.acme.com:80/", "must have port 443"),
        ("https://hooks.acme.com:0/", "must have port 443"),
        ("https://hooks.acme.com:65536/", "is not a URL"),
        ("https://hooks.acme.com:x/", "is not a URL"),
        ("https://[::1/", "is not a URL"),
        ("https://hooks.acme.com/#top", "neither #"),
        ("https://hooks.acme.com\\@10.0.0.1/", "user name"),
        ("https://hooks.acme.com/\\x", "neither #"),
        ("https://hooks.acme.com/a b", "printable"),
        ("https://hooks.acme.com/\r\nHost: other", "printable"),
        ("https://bücher.example/", "xn--"),
        ("https://hooks.acme.com/" + "x" * 2048, "at most 2048"),
        ("https://127.0.0.1/", "no public address"),
        ("https://10.1.2.3/", "no public address"),
        ("https://169.254.169.254/latest/meta-data", "no public address"),
        ("https://0.0.0.0/", "no public address"),
        ("https://[::1]/", "no public address"),
        ("https://[::ffff:10.0.0.1]/", "no public address"),
        ("https://[fe80::1%25eth0]/", "no public address"),
    ],
)
def test_urls_that_are_refused(url: str, problem: str) -> None:
    with pytest.raises(SettingsError, match=f"^the alert URL .*{problem}"):
        check_url(url)


def test_a_setting_allows_addresses_of_ones_own_network_and_nothing_else() -> None:
    assert check_url("https://10.1.2.3:8443/", private=True)
    for url in ("http://10.1.2.3/", "https://user@10.1.2.3/", "https://10.1.2.3:22/"):
        with pytest.raises(SettingsError):
            check_url(url, private=True)


@given(st.text(max_size=60))
def test_any_text_is_taken_or_refused_in_one_sentence(text: str) -> None:
    for url in (text, f"https://{text}"):
        with suppress(SettingsError):
            assert check_url(url).isprintable()


@pytest.mark.parametrize(
    "spelling", ["0x7f.1", "2130706433", "127.1", "0", "0177.0.0.1", "127.0.0.1.", "[::]", "[::1]"]
)
def test_other_spellings_of_this_machine_are_what_they_are_once_looked_up(spelling: str) -> None:
    """Such a host passes as a name; what is connected to is looked at afterwards."""
    host = spelling.strip("[]").rstrip(".")
    found = socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)
    assert not any(is_public(ip_address(str(address[0]))) for *_, address in found)


# Signatures


def test_a_signature_is_what_the_documentation_says() -> None:
    secret, body = Secret("a secret that nobody guesses"), b'{"id":1}'
    expected = hmac.new(b"a secret that nobody guesses", b"1764000000." + body, hashlib.sha256)
    assert signature(secret, "1764000000", body) == f"v1={expected.hexdigest()}"


def test_a_signature_stays_what_it_was() -> None:
    """A literal: receivers rely on it."""
    assert signature(Secret("0123456789abcdef"), "1764000000", b'{"id":17}') == (
        "v1=136adb5474081dd297f585782a5ea7a4608bdbac1a842a1fec4e0ad12711c588"
    )


@given(st.binary(max_size=50), st.binary(max_size=50))
def test_other_bodies_are_signed_otherwise(one: bytes, other: bytes) -> None:
    secret = Secret("0123456789abcdef")
    assert (signature(secret, "1", one) == signature(secret, "1", other)) == (one == other)
    assert signature(secret, "1", one) != signature(secret, "2", one)
    assert signature(secret, "1", one) != signature(Secret("0123456789abcdeF"), "1", one)


def test_secrets_are_made_long_and_never_twice() -> None:
    made = {new_secret().get_secret_value() for _ in range(100)}
    assert len(made) == 100
    assert all(check_secret(Secret(one)) for one in made)
    assert min(map(len, made)) >= 32


@pytest.mark.parametrize("given_", ["", "short", "x" * 15, "x" * 257, "x" * 20 + "\n", "é" * 20])
def test_secrets_that_are_refused(given_: str) -> None:
    with pytest.raises(SettingsError, match="must be one line of 16 to 256"):
        check_secret(Secret(given_))
