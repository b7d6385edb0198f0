"""Posting to somebody's URL: over TLS that is verified, to addresses that are checked, in time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest

from sluicegate.workers.webhook import Lookup, PostFailed, WebhookClient, look_up
from tests.https_server import (
    Certificate,
    Receiver,
    endless,
    receiving,
    status,
)

HEADERS = {"Content-Type": "application/json", "Sluice-Alert-Id": "17"}
BODY = b'{"id":17}'


Make = Callable[..., WebhookClient]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    """Return a function that makes a client, which may talk to this machine unless told."""
    made: list[WebhookClient] = []

    def client(
        *, deadline_s: float = 20.0, private_urls: bool = True, lookup: Lookup = look_up
    ) -> WebhookClient:
        made.append(
            WebhookClient(deadline_s=deadline_s, private_urls=private_urls, size=2, lookup=lookup)
        )
        return made[-1]

    yield client
    for one in made:
        one.close()


async def test_what_is_posted_arrives(receiver: Receiver, make: Make) -> None:
    for code in (200, 202, 204):
        receiver.answers.append(status(code))
        await make().post(receiver.url("/a/b?c=d"), HEADERS, BODY)
    (first, *_) = receiver.posts
    assert len(receiver.posts) == 3
    assert (first.path, first.body) == ("/a/b?c=d", BODY)
    assert first.headers["Host"] == f"localhost:{receiver.port}"
    assert first.headers["Sluice-Alert-Id"] == "17"
    assert first.headers["Content-Length"] == str(len(BODY))


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
async def test_redirects_are_not_followed(receiver: Receiver, make: Make, code: int) -> None:
    receiver.answers.append(status(code, Location=receiver.url("/elsewhere")))
    with pytest.raises(PostFailed, match=f"answered {code}, and redirects are not followed"):
        await make().post(receiver.url(), HEADERS, BODY)
    assert [post.path for post in receiver.posts] == ["/alerts"]


@pytest.mark.parametrize("code", [400, 404, 410, 429, 500, 503])
async def test_what_is_not_taken_says_so(receiver: Receiver, make: Make, code: int) -> None:
    receiver.answers.append(status(code, b"a long explanation"))
    with pytest.raises(PostFailed, match=rf"^answered {code}$"):
        await make().post(receiver.url(), HEADERS, BODY)


@pytest.mark.parametrize("slow", ["hang", "drip"])
async def test_a_slow_answer_has_a_deadline(receiver: Receiver, make: Make, slow: str) -> None:
    receiver.answers.append(getattr(receiver, slow))
    with pytest.raises(PostFailed, match=r"^no answer within 0.3 s$"):
        await make(deadline_s=0.3).post(receiver.url(), HEADERS, BODY)


async def test_a_body_without_an_end_is_not_read_to_its_end(receiver: Receiver, make: Make) -> None:
    receiver.answers.append(endless)
    await make().post(receiver.url(), HEADERS, BODY)


async def test_the_slow_look_up_of_a_name_has_the_same_deadline(
    receiver: Receiver, make: Make
) -> None:
    def stuck(host: str, port: int) -> Sequence[str]:
        receiver.released.wait(30)
        return ["127.0.0.1"]

    with pytest.raises(PostFailed, match=r"^no answer within 0.3 s$"):
        await make(deadline_s=0.3, lookup=stuck).post(receiver.url(), HEADERS, BODY)
    receiver.released.set()


async def test_a_certificate_of_nobody_is_refused(
    certificate: Certificate, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with (
        receiving(certificate) as receiver,
        pytest.raises(PostFailed, match="certificate verify failed"),
    ):
        await make().post(receiver.url(), HEADERS, BODY)
    assert receiver.posts == []


async def test_a_certificate_of_somebody_else_is_refused(receiver: Receiver, make: Make) -> None:
    client = make(lookup=lambda host, port: ["127.0.0.1"])
    with pytest.raises(PostFailed, match=r"not valid for 'other\.test'"):
        await client.post(receiver.url(host="other.test"), HEADERS, BODY)
    assert receiver.posts == []


async def test_nobody_listens(certificate: Certificate, make: Make) -> None:
    with receiving(certificate) as receiver:
        url = receiver.url()
    with pytest.raises(PostFailed, match=r"^no answer: "):
        await make().post(url, HEADERS, BODY)


# Who may be talked to


@pytest.mark.parametrize("host", ["localhost", "0x7f.1", "2130706433", "127.1", "0"])
async def test_this_machine_is_refused_whatever_it_is_called(
    receiver: Receiver, make: Make, host: str
) -> None:
    with pytest.raises(PostFailed, match="no public address; SLUICE_ALERT_PRIVATE_URLS"):
        await make(private_urls=False).post(receiver.url(host=host), HEADERS, BODY)
    assert receiver.connections == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "169.254.169.254"])
async def test_private_addresses_are_refused(receiver: Receiver, make: Make, host: str) -> None:
    with pytest.raises(PostFailed, match="no public address; SLUICE_ALERT_PRIVATE_URLS"):
        await make(private_urls=False).post(receiver.url(host=host), HEADERS, BODY)
    assert receiver.connections == 0


@pytest.mark.parametrize("private", ["127.0.0.1", "10.0.0.1", "fd00:ec2::254", "64:ff9b::7f00:1"])
async def test_one_private_address_among_several_is_one_too_many(
    receiver: Receiver, make: Make, private: str
) -> None:
    client = make(private_urls=False, lookup=lambda host, port: ["93.184.216.34", private])
    with pytest.raises(PostFailed, match=f"hooks.test is at {private}, which is no public address"):
        await client.post(receiver.url(host="hooks.test"), HEADERS, BODY)
    assert receiver.connections == 0


async def test_the_connection_goes_to_the_address_that_was_checked(
    receiver: Receiver, make: Make
) -> None:
    """The name means nothing outside this look-up, and is looked up once: it cannot be rebound."""
    asked: list[str] = []

    def look_up_once(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        return ["127.0.0.1"]

    client = make(lookup=look_up_once)
    await client.post(receiver.url(host="hooks.test"), HEADERS, BODY)
    assert asked == ["hooks.test"]
    assert receiver.posts[0].headers["Host"] == f"hooks.test:{receiver.port}"


async def test_a_name_that_changes_its_mind_is_checked_each_time(
    receiver: Receiver, make: Make
) -> None:
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])
    trusting, wary = (
        make(private_urls=private, lookup=lambda host, port: next(answers))
        for private in (True, False)
    )
    await trusting.post(receiver.url(host="hooks.test"), HEADERS, BODY)
    with pytest.raises(PostFailed, match=r"hooks.test is at 10\.0\.0\.1"):
        await wary.post(receiver.url(host="hooks.test"), HEADERS, BODY)


async def test_the_next_address_is_tried_if_one_is_dead(receiver: Receiver, make: Make) -> None:
    # Nobody listens on this one, which is this machine, too.
    client = make(lookup=lambda host, port: ["127.9.9.9", "127.0.0.1"])
    await client.post(receiver.url(host="hooks.test"), HEADERS, BODY)
    assert len(receiver.posts) == 1


@pytest.mark.parametrize("found", [[], ["127.9.9.9"] * 3])
async def test_a_host_without_a_living_address(
    receiver: Receiver, make: Make, found: list[str]
) -> None:
    client = make(lookup=lambda host, port: found)
    with pytest.raises(PostFailed, match=r"^no answer: "):
        await client.post(receiver.url(host="hooks.test"), HEADERS, BODY)


async def test_what_is_no_name_of_a_host(make: Make) -> None:
    for host in ("x" * 80 + ".test", "a..b"):
        with pytest.raises(PostFailed, match=r"^no answer: "):
            await make().post(f"https://{host}/", HEADERS, BODY)


async def test_a_url_that_was_stored_by_hand_is_checked_too(make: Make) -> None:
    for url in ("http://localhost/", "https://user@localhost/", "file:///etc/passwd"):
        with pytest.raises(PostFailed, match=r"^the alert URL must"):
            await make().post(url, HEADERS, BODY)


async def test_a_proxy_of_the_environment_is_not_asked(
    receiver: Receiver, make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    (tmp_path / ".netrc").write_text("machine localhost login somebody password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    await make().post(receiver.url(), HEADERS, BODY)
    assert "Authorization" not in receiver.posts[0].headers
