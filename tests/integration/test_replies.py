"""Waiting for results and reading reply channels, with a stand-in for the worker."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID, uuid4

import pytest
import redis
from sqlalchemy import Engine

from sluicegate import (
    AsyncSluice,
    Event,
    InvalidJob,
    JobCancelled,
    JobEnded,
    JobExpired,
    JobFailed,
    NotFound,
    Result,
    ResultTimeout,
    Sluice,
    SluiceError,
)
from sluicegate.shared.events import terminal_id
from sluicegate.shared.settings import Settings
from sluicegate.workers.local.servers import EmbeddedValkey
from tests.polling import eventually, eventually_async
from tests.stand_in import StandIn, waiting

T = TypeVar("T")
Work = Callable[[UUID], StandIn]

#: Longer than any test: an end within it came from an event, not from a look at the row.
NEVER_S = 600.0
SOON_S = 20.0


class Reader:
    """A process that waits, with either client; each call connects anew."""

    def __init__(self, settings: Settings, *, threads: bool) -> None:
        self._settings = settings
        self._threads = threads
        self._executor = ThreadPoolExecutor(8)

    def result(self, job_id: UUID, timeout: float | None = SOON_S) -> Result:
        if self._threads:
            with Sluice(self._settings) as sluice:
                return sluice.handle(job_id).result(timeout)

        async def wait() -> Result:
            async with AsyncSluice(self._settings) as sluice:
                return await sluice.handle(job_id).result(timeout)

        return asyncio.run(wait())

    def events(
        self, job_id: UUID, last_id: str = "0", timeout: float | None = SOON_S, count: int = -1
    ) -> list[Event]:
        """Read to the end, or leave after `count` events."""
        found: list[Event] = []
        if self._threads:
            with Sluice(self._settings) as sluice:
                for event in sluice.handle(job_id).events(last_id, timeout):
                    found.append(event)
                    if len(found) == count:
                        break
            return found

        async def read() -> list[Event]:
            async with AsyncSluice(self._settings) as sluice:
                async for event in sluice.handle(job_id).events(last_id, timeout):
                    found.append(event)
                    if len(found) == count:
                        break
            return found

        return asyncio.run(read())

    def start(self, method: Callable[..., T], *args: Any, **options: Any) -> Future[T]:
        return self._executor.submit(method, *args, **options)

    def close(self) -> None:
        self._executor.shutdown()


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"reply_recheck_s": 0.3})


@pytest.fixture(params=["threads", "loop"])
def threads(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "threads")


@pytest.fixture
def reader(settings: Settings, threads: bool) -> Iterator[Reader]:
    reader = Reader(settings, threads=threads)
    yield reader
    reader.close()


@pytest.fixture
def submit(settings: Settings) -> Iterator[Callable[[], UUID]]:
    with Sluice(settings) as sluice:
        yield lambda: sluice.submit("draft", "hello", stream=True).id


@pytest.fixture
def work(engine: Engine, redis_client: redis.Redis, settings: Settings) -> Work:
    return lambda job_id: StandIn(
        engine=engine, client=redis_client, settings=settings, job_id=job_id
    )


def texts(events: list[Event]) -> list[str]:
    return [getattr(event.payload, "text", event.type) for event in events]


def test_a_late_reader_sees_what_a_live_one_saw(
    reader: Reader, submit: Callable[[], UUID], work: Work, redis_client: redis.Redis
) -> None:
    job_id = submit()
    live = reader.start(reader.events, job_id)
    eventually(lambda: waiting(redis_client))
    work(job_id).answer("Dear ", "Ada", ", …")
    seen = live.result()
    assert texts(seen) == ["started", "Dear ", "Ada", ", …", "completed"]
    assert reader.events(job_id) == seen
    assert reader.result(job_id).text == "Dear Ada, …"


def test_a_reader_that_comes_back_misses_nothing(
    reader: Reader, submit: Callable[[], UUID], work: Work
) -> None:
    job_id = submit()
    worker = work(job_id)
    worker.say("started", model="m")
    worker.say("delta", text="a")
    first = reader.events(job_id, count=2)
    worker.say("delta", text="b")
    worker.end(worker.settle(text="ab"))
    rest = reader.events(job_id, first[-1].id)
    assert texts(first + rest) == ["started", "a", "b", "completed"]
    assert reader.events(job_id, rest[-1].id) == []


def test_when_the_stream_has_expired_the_terminal_event_comes_from_postgres(
    reader: Reader, submit: Callable[[], UUID], work: Work
) -> None:
    job_id = submit()
    worker = work(job_id)
    worker.end(worker.settle(ago_s=60, text="answer", cost_nano_usd=7, attempts=1))
    (from_stream,) = reader.events(job_id)
    worker.expire()
    (from_postgres,) = reader.events(job_id)
    assert from_postgres == from_stream
    assert from_postgres.id == terminal_id(worker.fence)
    assert from_postgres.payload.model_dump_json() == from_stream.payload.model_dump_json()
    assert reader.events(job_id, from_stream.id) == []
    assert reader.result(job_id).cost_nano_usd == 7


@pytest.mark.parametrize("only_result", [True, False])
def test_a_lost_event_does_not_hang_a_reader(
    reader: Reader,
    submit: Callable[[], UUID],
    work: Work,
    redis_client: redis.Redis,
    only_result: bool,
) -> None:
    job_id = submit()
    worker = work(job_id)
    worker.say("started", model="m")
    waits: Future[Any] = reader.start(reader.result if only_result else reader.events, job_id)
    eventually(lambda: waiting(redis_client))
    worker.settle(text="answer")
    found = waits.result(SOON_S)
    if only_result:
        assert found.text == "answer"
    else:
        assert texts(found) == ["started", "completed"]


def test_events_on_their_way_are_waited_for_after_the_settlement(
    reader: Reader, submit: Callable[[], UUID], work: Work, redis_client: redis.Redis
) -> None:
    job_id = submit()
    worker = work(job_id)
    worker.say("started", model="m")
    reads = reader.start(reader.events, job_id)
    eventually(lambda: waiting(redis_client))
    result = worker.settle(text="late")
    # The row is looked at several times before the last events arrive.
    with pytest.raises(TimeoutError):
        reads.result(0.8)
    worker.say("delta", text="late")
    worker.end(result)
    assert texts(reads.result()) == ["started", "late", "completed"]


def test_a_new_attempt_resets_and_a_newer_fence_goes_on(
    reader: Reader, submit: Callable[[], UUID], work: Work
) -> None:
    job_id = submit()
    worker = work(job_id)
    worker.say("started", model="m")
    worker.say("delta", text="half an ans")
    worker.fence += 1
    worker.say("reset", model="n", attempt=2)
    worker.say("delta", text="answer")
    worker.fence -= 1
    result = worker.settle(text="answer")
    worker.fence += 1
    worker.end(result)
    kinds = [event.type for event in reader.events(job_id)]
    assert kinds == ["started", "delta", "reset", "delta", "completed"]


@pytest.mark.parametrize(
    ("state", "error"),
    [("failed", JobFailed), ("expired", JobExpired), ("cancelled", JobCancelled)],
)
def test_a_job_without_an_answer_raises(
    reader: Reader,
    submit: Callable[[], UUID],
    work: Work,
    state: str,
    error: type[JobEnded],
) -> None:
    job_id = submit()
    worker = work(job_id)
    reason = {"error_class": "content_filter", "message": "the model will not say"}
    worker.end(worker.settle(state, ago_s=60, error=reason))
    for stream in ("there", "expired"):
        with pytest.raises(error, match=f"^job {job_id} {state}: the model will not") as raised:
            reader.result(job_id)
        assert (raised.value.job_id, raised.value.state) == (str(job_id), state), stream
        assert [event.type for event in reader.events(job_id)] == ["failed"], stream
        worker.expire()


def test_a_timeout_cancels_nothing(reader: Reader, submit: Callable[[], UUID], work: Work) -> None:
    job_id = submit()
    for wait in (reader.result, reader.events):
        with pytest.raises(ResultTimeout, match="goes on"):
            wait(job_id, timeout=0.1)
    work(job_id).answer("done")
    assert reader.result(job_id).text == "done"


def without_servers(settings: Settings) -> Settings:
    away = {"database_url": "postgresql://x@127.0.0.1:1/x", "redis_url": "redis://127.0.0.1:1/0"}
    return Settings(**{**dict(settings), **away}, _env_file=None)


def test_a_timeout_without_any_server_says_so(settings: Settings, threads: bool) -> None:
    reader = Reader(without_servers(settings), threads=threads)
    for wait in (reader.result, reader.events):
        with pytest.raises(ResultTimeout, match="neither Postgres nor Redis answered within 2 s"):
            wait(uuid4(), timeout=2)
    reader.close()


def test_long_silence_is_said_once(
    settings: Settings,
    threads: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("sluicegate.shared.reply_reader._SAY_SO_S", 0.1)
    monkeypatch.setattr("sluicegate.shared.reply_reader._RETRY_S", 0.1)
    reader = Reader(without_servers(settings), threads=threads)
    with pytest.raises(ResultTimeout):
        reader.result(uuid4(), timeout=2)
    reader.close()
    said = [one.message for one in caplog.records if one.levelname == "WARNING"]
    assert [text for text in said if text.startswith("neither Postgres nor Redis")] == said
    assert len(said) == 1


def test_what_does_not_exist_is_not_found(reader: Reader) -> None:
    with pytest.raises(NotFound):
        reader.result(uuid4())
    with pytest.raises(NotFound):
        reader.events(uuid4())


@pytest.mark.parametrize("last_id", ["x", "1-x", "-1", "1-99999999999999999999", None])
def test_an_id_that_no_event_has_is_refused(reader: Reader, last_id: Any) -> None:
    with pytest.raises(InvalidJob, match="last_id"):
        reader.events(uuid4(), last_id)


@pytest.mark.parametrize("timeout", [-1, "soon", float("nan")])
def test_a_timeout_that_is_none_is_refused(reader: Reader, timeout: Any) -> None:
    with pytest.raises(InvalidJob, match="timeout"):
        reader.result(uuid4(), timeout)


def test_what_cannot_be_read_is_left_out(
    reader: Reader, submit: Callable[[], UUID], work: Work
) -> None:
    job_id = submit()
    worker = work(job_id)
    worker.say("started", model="m")
    worker.say("from a later version", what=1)
    worker.say("delta", text="x")
    worker.settle(ago_s=60, text="x")
    worker.append(terminal_id(worker.fence), ["not", "an", "event"])
    assert texts(reader.events(job_id)) == ["started", "x", "completed"]
    assert reader.result(job_id).text == "x"


def test_a_slow_reader_gets_everything(
    settings: Settings, submit: Callable[[], UUID], work: Work, redis_client: redis.Redis
) -> None:
    job_id = submit()
    worker = work(job_id)
    worker.say("started", model="m")
    pieces = [f"{n} " for n in range(5000)]
    with Sluice(settings) as sluice:
        events = sluice.handle(job_id).events(timeout=SOON_S)
        assert next(events).type == "started"
        for piece in pieces:
            worker.say("delta", text=piece)
        worker.end(worker.settle(text="".join(pieces)))
        # Other channels are read while this one's consumer takes its time.
        other = submit()
        work(other).answer("quick")
        assert sluice.handle(other).result(SOON_S).text == "quick"
        assert texts(list(events)) == [*pieces, "completed"]


async def test_thousands_of_streams_are_one_connection_and_end_alone(
    settings: Settings, work: Work, redis_client: redis.Redis
) -> None:
    # No look at the rows comes to the events' help.
    patient = settings.model_copy(update={"reply_recheck_s": NEVER_S})
    async with AsyncSluice(patient) as sluice:
        handles = await sluice.submit_many("draft", [f"{n}" for n in range(3000)])
        waits = [asyncio.create_task(handle.result(60)) for handle in handles]

        async def all_wait() -> bool:
            found: Any = await asyncio.to_thread(redis_client.client_list)
            return any(int(one["argv-mem"]) > 3000 * 40 for one in found if one["cmd"] == "xread")

        await eventually_async(all_wait)
        assert waiting(redis_client) == 1
        late = await sluice.submit("draft", "late")
        for handle, text in ((late, "a"), (handles[2999], "b"), (handles[0], "c")):
            await asyncio.to_thread(work(handle.id).answer, text)
            assert (await handle.result(10)).text == text
        assert sum(one.done() for one in waits) <= 2
        for one in waits:
            one.cancel()
        await asyncio.gather(*waits, return_exceptions=True)


def test_threads_wait_on_one_connection(
    settings: Settings, work: Work, redis_client: redis.Redis
) -> None:
    patient = settings.model_copy(update={"reply_recheck_s": NEVER_S})
    with Sluice(patient) as sluice, ThreadPoolExecutor(40) as executor:
        handles = sluice.submit_many("draft", [f"{n}" for n in range(40)])
        results = [executor.submit(handle.result, 30) for handle in handles]
        eventually(lambda: waiting(redis_client) == 1)
        for handle in handles:
            work(handle.id).answer(str(handle.id))
        assert [one.result(30).text for one in results] == [str(one.id) for one in handles]


def test_many_rows_are_looked_at_together_when_all_streams_are_gone(
    settings: Settings, engine: Engine
) -> None:
    async def wait() -> list[Result]:
        async with AsyncSluice(settings) as sluice:
            handles = await sluice.submit_many("draft", ["x"] * 2500)
            with engine.connect() as connection:
                connection.exec_driver_sql("""
                    WITH moved AS (
                        UPDATE jobs SET state = 'succeeded', fence = 1, finished_at = now()
                        RETURNING id
                    )
                    INSERT INTO results (job_id, fence, body)
                    SELECT id, 1, '{"use_case": "draft", "text": "y"}' FROM moved
                """)
            return await asyncio.gather(*(handle.result(60) for handle in handles))

    results = asyncio.run(wait())
    assert {result.text for result in results} == {"y"}
    assert all(result.latency_s is not None for result in results)


def test_several_readers_of_one_job_each_get_all_of_it(
    settings: Settings, submit: Callable[[], UUID], work: Work, redis_client: redis.Redis
) -> None:
    job_id = submit()
    with Sluice(settings) as sluice, ThreadPoolExecutor(8) as executor:
        handle = sluice.handle(job_id)
        reads = [executor.submit(lambda: list(handle.events(timeout=SOON_S))) for _ in range(6)]
        result = executor.submit(handle.result, SOON_S)
        eventually(lambda: waiting(redis_client))
        worker = work(job_id)
        worker.answer("a", "b")
        assert [texts(one.result()) for one in reads] == [["started", "a", "b", "completed"]] * 6
        assert result.result().text == "ab"


def test_closing_ends_every_wait(settings: Settings, submit: Callable[[], UUID]) -> None:
    job_id = submit()
    sluice = Sluice(settings)
    with ThreadPoolExecutor(2) as executor:
        waits: list[Future[Any]] = [
            executor.submit(sluice.handle(job_id).result),
            executor.submit(lambda: list(sluice.handle(job_id).events())),
        ]
        eventually(lambda: any(one.name == "sluice-replies" for one in threading.enumerate()))
        sluice.close()
        for one in waits:
            with pytest.raises(SluiceError, match="closed"):
                one.result(10)
    assert not [one for one in threading.enumerate() if one.name.startswith("sluice-re")]


def test_a_reader_survives_a_restart_and_a_flush_of_redis(
    settings: Settings, threads: bool, engine: Engine, tmp_path: Path
) -> None:
    with EmbeddedValkey(data_dir=tmp_path / "valkey") as server:
        own = Settings(
            **{**dict(settings), "redis_url": server.url, "reply_recheck_s": NEVER_S},
            _env_file=None,
        )
        reader = Reader(own, threads=threads)
        with Sluice(own) as sluice:
            job_id = sluice.submit("draft", "hello", stream=True).id
        with redis.Redis.from_url(server.url) as client:
            reads = reader.start(reader.events, job_id, timeout=60)
            eventually(lambda: waiting(client))
        server.stop()
        server.start()
        with redis.Redis.from_url(server.url) as client:
            worker = StandIn(engine=engine, client=client, settings=own, job_id=job_id)
            worker.say("started", model="m")
            eventually(lambda: waiting(client))
            client.flushall()
            worker.say("delta", text="after the flush")
            worker.end(worker.settle(text="after the flush"))
        assert texts(reads.result(60)) == ["started", "after the flush", "completed"]
        reader.close()


def test_without_redis_results_come_from_postgres(
    settings: Settings, threads: bool, submit: Callable[[], UUID], work: Work
) -> None:
    nobody = Settings(**{**dict(settings), "redis_url": "redis://127.0.0.1:1/0"}, _env_file=None)
    reader = Reader(nobody, threads=threads)
    job_id = submit()
    result = reader.start(reader.result, job_id)
    events = reader.start(reader.events, job_id)
    work(job_id).answer("written")
    assert result.result(SOON_S).text == "written"
    assert texts(events.result(SOON_S)) == ["completed"]
    reader.close()
