"""Where a newer price list is read from: files and the network, as they are and as they fail."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from sluicegate.producers import price_sources
from sluicegate.producers.price_sources import read_source
from sluicegate.shared.errors import SettingsError, SluiceError
from sluicegate.shared.messages import Usage
from sluicegate.shared.price_lists import PriceList, bundled
from sluicegate.shared.pricing import listed_card
from tests.offered_prices import listed, with_prices, written


def gpt_4o_input(prices: PriceList) -> int:
    return listed_card(prices, "openai", "gpt-4o").cost_nano_usd(Usage(input=1000))


def test_a_file() -> None:
    file = Path(written(with_prices("openai", "gpt-4o", input_mtok=3)))
    prices = read_source(file=file, url=None, installed=False)
    assert (prices.version, gpt_4o_input(prices)) == ("prices.json", 3_000_000)


def test_the_installed_list() -> None:
    assert read_source(file=None, url=None, installed=True) is bundled()


def test_one_source_at_a_time() -> None:
    with pytest.raises(SettingsError, match="name one of"):
        read_source(file=Path("x"), url=None, installed=True)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read: No such file"),
        (b"", "holds no JSON"),
        (b"\xff\xfe", "holds no JSON"),
        (b"[" * 200_000, "holds no JSON"),
        (b"{}", "not a price list"),
        (b" " * 2000, "is longer than"),
    ],
)
def test_a_file_that_holds_no_list(
    content: bytes | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path("prices.json")
    if content is not None:
        file.write_bytes(content)
        if content.isspace():
            monkeypatch.setattr(price_sources, "_MAX_BYTES", 1999)
    with pytest.raises(SluiceError, match=words) as refused:
        read_source(file=file, url=None, installed=False)
    assert "\n" not in str(refused.value)


#: Path, status, headers, body.
Answers = dict[str, tuple[int, dict[str, str], bytes]]


def _certificate(folder: Path) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "prices")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    file = folder / "server.pem"
    file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return file


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answers], str]]:
    """Return a function that starts an HTTPS server which this process trusts; it gives its URL."""
    pem = _certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    running: list[tuple[HTTPServer, threading.Thread]] = []

    def start(answers: Answers) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, headers, body = answers[self.path]
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                del format, args

        server = HTTPServer(("127.0.0.1", 0), Handler)
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  # who hangs up may
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        running.append((server, thread))
        return f"https://127.0.0.1:{server.server_port}"

    yield start
    for server, thread in running:
        server.shutdown()
        thread.join()
        server.server_close()


def _fetch(url: str) -> PriceList:
    return read_source(file=None, url=url, installed=False)


def test_a_url(serve: Callable[[Answers], str]) -> None:
    body = json.dumps(with_prices("openai", "gpt-4o", input_mtok=3.25)).encode()
    url = serve({"/data.json": (200, {}, body)}) + "/data.json"
    prices = _fetch(url)
    assert (prices.version, gpt_4o_input(prices)) == (url, 3_250_000)


def test_without_a_source_it_is_where_genai_prices_keeps_its_own(
    serve: Callable[[Answers], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = serve({"/": (200, {}, json.dumps(listed()).encode())}) + "/"
    monkeypatch.setattr("genai_prices.update_prices.DEFAULT_UPDATE_URL", url)
    assert read_source(file=None, url=None, installed=False).version == url


def test_an_answer_without_a_list(
    serve: Callable[[Answers], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(price_sources, "_MAX_BYTES", 10_000)
    base = serve(
        {
            "/gone": (404, {}, b"gone"),
            "/elsewhere": (302, {"Location": "/list"}, b""),
            "/long": (200, {}, b" " * 200_000),
            "/page": (200, {}, b"<html>"),
            "/cut": (200, {"Content-Length": "100"}, b"[]"),
        }
    )
    for path, words in (
        ("/gone", "answered 404, which is no price list"),
        ("/elsewhere", "answered 302, which is no price list"),
        ("/long", "is longer than"),
        ("/page", "holds no JSON"),
        ("/cut", "did not answer|names no model"),
    ):
        with pytest.raises(SluiceError, match=words):
            _fetch(base + path)


def test_a_server_that_is_not_trusted_or_not_there(
    serve: Callable[[Answers], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = serve({})
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(SluiceError, match=r"did not answer \(.*certificate.*--file"):
        _fetch(url)
    with pytest.raises(SluiceError, match=r"did not answer \(.*refused.*--file"):
        _fetch("https://127.0.0.1:9")


@pytest.mark.parametrize("url", ["http://127.0.0.1/", "file:///etc/hostname", "prices.json", ""])
def test_only_https(url: str) -> None:
    with pytest.raises(SettingsError, match="must be https"):
        _fetch(url)


def test_a_url_that_is_none() -> None:
    with pytest.raises(SluiceError, match="did not answer"):
        _fetch("https://")


def test_a_server_that_drips_is_given_up(
    serve: Callable[[Answers], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(price_sources, "_TOTAL_DEADLINE_S", 0.0)
    url = serve({"/": (200, {}, b"[" * 1000)}) + "/"
    with pytest.raises(SluiceError, match="not all had come after"):
        _fetch(url)
