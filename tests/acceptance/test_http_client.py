"""`Sluice("https://…")` through servers that die and answers that are lost."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from uuid import uuid4

import orjson
import pytest

from sluicegate import (
    AsyncSluice,
    InvalidJob,
    NotFound,
    QueueUnavailable,
    ResultTimeout,
    Sluice,
    SluiceError,
)
from sluicegate.shared.accounts import add_account
from sluicegate.shared.bodies import Bodies
from sluicegate.shared.connecting import transaction
from sluicegate.shared.secrets import Keyring, new_key
from tests.harness import Rig
from tests.http_servers import HttpServer, free_port, make_key, start_http
from tests.https_server import Certificate
from tests.polling import eventually

_CHUNK = 65_536


@pytest.fixture(scope="module")
def server(module_rig: Rig) -> HttpServer:
    worker = module_rig.begin_worker("anthropic", ["draft"])
    module_rig.start_sweep()
    server = start_http(module_rig)
    module_rig.await_worker(worker)
    return server


@contextmanager
def losing_answers(port: int, times: int) -> Iterator[tuple[int, list[bytes]]]:
    """Stand before a server, and cut clients off instead of giving them the first answers."""
    lost: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    client, _ = listening.accept()
                    onward = socket.create_connection(("127.0.0.1", port))
                    for work in (ask, answer):
                        threading.Thread(target=work, args=(client, onward), daemon=True).start()

        def ask(client: socket.socket, onward: socket.socket) -> None:
            with suppress(OSError):
                while piece := client.recv(_CHUNK):
                    onward.sendall(piece)

        def answer(client: socket.socket, onward: socket.socket) -> None:
            with client, onward, suppress(OSError):
                while piece := onward.recv(_CHUNK):
                    if len(lost) < times:
                        lost.append(piece)
                        client.shutdown(socket.SHUT_RDWR)
                        return
                    client.sendall(piece)

        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1], lost
        listening.shutdown(socket.SHUT_RDWR)


def test_a_lost_answer_makes_no_second_job(server: HttpServer, rig: Rig) -> None:
    port = int(server.url.rpartition(":")[2])
    with (
        losing_answers(port, times=2) as (front, lost),
        Sluice(f"http://127.0.0.1:{front}", api_key=server.api_key) as sluice,
    ):
        marker = uuid4().hex
        job = sluice.submit("draft", f"ECHO: once {marker}", request_id=marker)
        assert [answer.split()[1] for answer in lost] == [b"202", b"202"]
        assert job.result(30).text == f"once {marker}"
    rows = rig.rows("SELECT id FROM jobs WHERE request_id = %(marker)s", marker=marker)
    assert [row.id for row in rows] == [job.id]


def test_a_reader_goes_on_after_its_server_was_killed(rig: Rig, server: HttpServer) -> None:
    del server  # its workers
    rig.sandbox.settings(tokens_per_s=60)
    own = start_http(rig)
    port = int(own.url.rpartition(":")[2])
    with Sluice(own.url, api_key=own.api_key) as sluice:
        job = sluice.submit("draft", "Tell me a long story.\nTOKENS: 100", stream=True)
        events, text = job.events(timeout=60), ""
        for event in events:
            if event.type == "delta":
                text += event.payload.text  # type: ignore[union-attr]
                break
        own.service.kill()
        start_http(rig, port=port, api_key=own.api_key)
        for event in events:
            if event.type == "delta":
                text += event.payload.text  # type: ignore[union-attr]
        assert event.type == "completed"
        assert text == event.payload.result.text  # type: ignore[union-attr]
        assert job.result(30).text == text
    assert sum(call["prompt_tail"].startswith("Tell me") for call in rig.sandbox.calls()) == 1


async def test_many_wait_at_once_on_one_loop(server: HttpServer) -> None:
    async with AsyncSluice(server.url, api_key=server.api_key) as sluice:

        async def ask(n: int) -> str:
            job = await sluice.submit("draft", f"ECHO: {n}")
            return (await job.result(60)).text

        assert await asyncio.gather(*map(ask, range(50))) == [str(n) for n in range(50)]


def test_a_server_that_is_away_is_told_as_that() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with Sluice(url, api_key="sk-sluice-x", patience_s=0.5) as sluice:
        with pytest.raises(QueueUnavailable, match=f"{url} did not answer .*; try again"):
            sluice.submit("draft", "hi")
        with pytest.raises(ResultTimeout, match=r"did not answer within 0\.3 s, so nobody knows"):
            sluice.handle(uuid4()).result(0.3)
        with pytest.raises(QueueUnavailable, match="did not answer"):
            list(sluice.handle(uuid4()).events())


def test_a_key_opens_what_it_is_for_and_nothing_else(server: HttpServer, rig: Rig) -> None:
    with (
        Sluice(server.url, api_key=make_key(rig.settings, "user")) as one,
        Sluice(server.url, api_key=make_key(rig.settings, "user")) as other,
        Sluice(server.url, api_key="sk-sluice-nobodys") as stranger,
    ):
        key = "order 4711, größer"  # as `Sluice` without HTTP takes it
        job = one.submit("draft", "ECHO: mine", idempotency_key=key)
        assert job.result(30).text == "mine"
        assert other.submit("draft", "ECHO: yours", idempotency_key=key).id != job.id
        assert one.get(job.id).idempotency_key == key
        assert job.id not in {listed.id for listed in other.list_jobs()}
        assert [listed.id for listed in one.list_jobs()] == [job.id]
        for act in (other.get, other.cancel, other.retry):
            with pytest.raises(NotFound, match=f"there is no job {job.id}"):
                act(job.id)
        with pytest.raises(NotFound):
            other.handle(job.id).result(5)
        with pytest.raises(NotFound):
            list(other.handle(job.id).events())
        with pytest.raises(SluiceError, match="needs the role owner"):
            one.budgets()
        with pytest.raises(SluiceError, match="is not known"):
            stranger.submit("draft", "hi")


def test_a_service_key_acts_for_the_account_that_the_client_names(
    server: HttpServer, rig: Rig
) -> None:
    key = make_key(rig.settings, account=None)
    with transaction(rig.settings) as line:
        add_account(line, "acme")
    with Sluice(server.url, api_key=key, account="acme") as sluice:
        job = sluice.submit("draft", "ECHO: for acme")
        assert job.result(30).text == "for acme"
        assert sluice.get(job.id).account == "acme"
    with (
        Sluice(server.url, api_key=key) as nobodys,
        pytest.raises(InvalidJob, match=r"^account: name the account"),
    ):
        nobodys.submit("draft", "hi")


def test_events_that_cannot_be_read_end_with_an_error(server: HttpServer, rig: Rig) -> None:
    stored = Bodies(Keyring.read(new_key()), seals=True).seal_result(
        {"version": 1, "state": "succeeded", "use_case": "draft", "text": "in a key's care"}
    )
    with Sluice(server.url, api_key=server.api_key) as sluice:
        job = sluice.submit("draft", "ECHO: sealed")
        job.result(30)
        body = orjson.dumps(stored).decode()
        rig.rows(
            "UPDATE results SET body = %(body)s::json WHERE job_id = %(id)s RETURNING 1",
            id=job.id,
            body=body,
        )
        rig.redis.delete(*rig.redis.keys(f"{rig.settings.redis_prefix}reply:*"))
        for read in (lambda: list(job.events()), job.result):
            with pytest.raises(SluiceError, match="request id") as raised:
                read()
            assert type(raised.value) is SluiceError


def test_closing_ends_who_waits(server: HttpServer) -> None:
    sluice = Sluice(server.url, api_key=server.api_key)
    job = sluice.submit("complex", "Nobody works on it.")
    with (
        ending_soon(sluice, job.result, lambda: list(job.events())),
        pytest.raises(ResultTimeout),
    ):
        job.result(0.2)


def test_closing_ends_who_waits_for_a_server_that_is_away() -> None:
    sluice = Sluice(f"http://127.0.0.1:{free_port()}", api_key="sk-sluice-x", patience_s=600)
    job = sluice.handle(uuid4())
    with ending_soon(sluice, job.result, lambda: list(job.events()), job.cancel):
        pass


def test_closing_ends_who_waits_behind_tls(certificate: Certificate) -> None:
    with silent_server(certificate) as (port, asked):
        trusting = ssl.create_default_context(cafile=str(certificate.authority))
        sluice = Sluice(f"https://localhost:{port}", api_key="sk-sluice-x", verify=trusting)
        with ending_soon(sluice, sluice.handle(uuid4()).result):
            eventually(lambda: asked, 10)


async def test_closing_ends_who_waits_on_a_loop(server: HttpServer) -> None:
    sluice = AsyncSluice(server.url, api_key=server.api_key)
    job = await sluice.submit("complex", "Nobody works on it.")
    waiting = asyncio.create_task(job.result())
    with pytest.raises(ResultTimeout):
        await job.result(0.2)
    await sluice.close()
    with pytest.raises(SluiceError, match="this client is closed"):
        await asyncio.wait_for(waiting, 5)


@contextmanager
def ending_soon(sluice: Sluice, *works: Callable[[], object]) -> Iterator[None]:
    """Do these in threads, close the client afterwards, and check that this ends each of them."""
    failures: list[BaseException] = []

    def do(work: Callable[[], object]) -> None:
        try:
            work()
        except SluiceError as error:
            failures.append(error)

    threads = [threading.Thread(target=do, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        sluice.close()
    # Far below what a request for a result waits.
    eventually(lambda: not any(thread.is_alive() for thread in threads), 5)
    assert ["this client is closed" in str(failure) for failure in failures] == [True] * len(works)


@contextmanager
def silent_server(certificate: Certificate) -> Iterator[tuple[int, list[bytes]]]:
    """Have a server that reads what it is asked, and never answers."""
    asked: list[bytes] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.chain, certificate.key)
    with (
        socket.create_server(("127.0.0.1", 0)) as plain,
        context.wrap_socket(plain, server_side=True) as listening,
    ):

        def serve() -> None:
            with suppress(OSError):
                client, _ = listening.accept()
                with client:
                    while piece := client.recv(_CHUNK):
                        asked.append(piece)

        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1], asked
