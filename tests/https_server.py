"""A server that takes posts over TLS, with a certificate of an authority of its own."""

from __future__ import annotations

import datetime as dt
import ssl
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

#: What the certificate is for, besides 127.0.0.1.
HOSTS = ("localhost", "hooks.test")


@dataclass(frozen=True)
class Certificate:
    """Files of a server's certificate and of the authority that vouches for it."""

    authority: Path
    chain: Path
    key: Path


def make_certificate(folder: Path) -> Certificate:
    """Make an authority and a certificate for `HOSTS`."""
    authority_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "an authority of tests")])
    authority = (
        _builder(issuer, issuer, authority_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    names: list[x509.GeneralName] = [x509.DNSName(host) for host in HOSTS]
    names.append(x509.IPAddress(IPv4Address("127.0.0.1")))
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOSTS[0])])
    certificate = (
        _builder(subject, issuer, key)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    made = Certificate(folder / "authority.pem", folder / "chain.pem", folder / "key.pem")
    made.authority.write_bytes(authority.public_bytes(pem))
    made.chain.write_bytes(certificate.public_bytes(pem))
    made.key.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return made


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=30))
    )


@dataclass(frozen=True)
class Post:
    """What came in."""

    path: str
    headers: dict[str, str]
    body: bytes


class Receiver:
    """Takes posts. `answers` are what the next ones get; after them all get 200."""

    def __init__(self, certificate: Certificate) -> None:
        self.posts: list[Post] = []
        #: By path first, then for any.
        self.answers: deque[Callable[[BaseHTTPRequestHandler], None]] = deque()
        self.by_path: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}
        #: Those who were let in so far, whether they said something or not.
        self.connections = 0
        #: Set when slow answers may end.
        self.released = threading.Event()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate.chain, certificate.key)
        self._server = _Server(self, context)

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def url(self, path: str = "/alerts", host: str = "localhost") -> str:
        return f"https://{host}:{self.port}{path}"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """Take a post."""
        length = int(handler.headers.get("Content-Length", 0))
        body = handler.rfile.read(length)
        self.posts.append(Post(handler.path, dict(handler.headers.items()), body))
        if handler.path in self.by_path:
            self.by_path[handler.path](handler)
        elif self.answers:
            self.answers.popleft()(handler)
        else:
            status(200)(handler)

    def hang(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer once `released`."""
        self.released.wait(30)
        status(200)(handler)

    def drip(self, handler: BaseHTTPRequestHandler) -> None:
        """Begin an answer and never come to its end."""
        handler.send_response(200)
        while not self.released.wait(0.02):
            handler.send_header("X-More", "to come")
            handler.flush_headers()

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield
        finally:
            self.released.set()
            self._server.shutdown()
            thread.join()
            self._server.server_close()


def status(
    code: int, body: bytes = b"", **headers: str
) -> Callable[[BaseHTTPRequestHandler], None]:
    """Return what answers with this."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def endless(handler: BaseHTTPRequestHandler) -> None:
    """Answer 200 with a body that does not end."""
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b"x" * 16_384)


class _Server(ThreadingHTTPServer):
    daemon_threads = False

    def __init__(self, receiver: Receiver, context: ssl.SSLContext) -> None:
        self._receiver = receiver
        self._context = context

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                receiver.answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    def get_request(self) -> tuple[Any, Any]:
        connection, address = super().get_request()
        self._receiver.connections += 1
        # The handshake happens in the connection's own thread.
        return self._context.wrap_socket(
            connection, server_side=True, do_handshake_on_connect=False
        ), address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: whoever hangs up is what some tests are about."""


@contextmanager
def receiving(certificate: Certificate) -> Iterator[Receiver]:
    """Run a receiver for the length of a `with`."""
    receiver = Receiver(certificate)
    with receiver.running():
        yield receiver
