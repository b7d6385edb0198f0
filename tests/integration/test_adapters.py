"""The adapters, with the real SDKs over HTTP: against the sandbox, and against odd servers."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from sluicegate.shared.admission.headroom import Headroom
from sluicegate.shared.errors import ErrorClass
from sluicegate.shared.jobs import build_spec
from sluicegate.shared.messages import ResponseFormat, Tool, ToolCallPart, Usage
from sluicegate.shared.secrets import Secret
from sluicegate.workers.local.sandbox_calls import DECLINES
from sluicegate.workers.local.sandbox_control import SandboxControl
from sluicegate.workers.providers.base import (
    Adapter,
    Adapters,
    Answer,
    Call,
    Deadlines,
    ProviderError,
    ProviderKind,
)
from tests.polling import eventually_async
from tests.sandbox_clients import ANTHROPIC_MODEL, OPENAI_MODEL, cleaned, serving

E = ErrorClass
PATIENT = Deadlines(connect_s=5, first_token_s=10, response_s=20, idle_s=10, total_s=20)
MODELS: dict[ProviderKind, str] = {"openai": OPENAI_MODEL, "anthropic": ANTHROPIC_MODEL}
KINDS: tuple[ProviderKind, ...] = ("openai", "anthropic")


@pytest.fixture(scope="module")
def server() -> Iterator[SandboxControl]:
    with serving() as control:
        yield control


@pytest.fixture
def sandbox(server: SandboxControl) -> SandboxControl:
    return cleaned(server)


@pytest.fixture
async def adapters() -> AsyncIterator[Adapters]:
    adapters = Adapters(max_connections=20)
    yield adapters
    await adapters.close()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> ProviderKind:
    return request.param  # type: ignore[no-any-return]  # one of KINDS


@pytest.fixture
def adapter(adapters: Adapters, sandbox: SandboxControl, kind: ProviderKind) -> Adapter:
    return adapters.get(kind, url_of(sandbox, kind), None)


@pytest.fixture(params=[False, True], ids=["whole", "stream"])
def stream(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def url_of(sandbox: SandboxControl, kind: ProviderKind) -> str:
    return sandbox.openai_base_url if kind == "openai" else sandbox.anthropic_base_url


def make_call(
    kind: ProviderKind,
    prompt: str = "TOKENS: 20",
    *,
    stream: bool = False,
    deadlines: Deadlines = PATIENT,
    max_tokens: int = 500,
    **fields: Any,
) -> Call:
    return Call(
        spec=build_spec("draft", prompt, **fields),
        model=MODELS[kind],
        max_tokens=max_tokens,
        stream=stream,
        deadlines=deadlines,
    )


class Sink:
    """Collects deltas."""

    def __init__(self) -> None:
        self.text = ""
        self.tool_calls: list[Any] = []
        self.first = asyncio.Event()

    def __call__(self, text: str, tool_calls: tuple[Any, ...]) -> None:
        self.text += text
        self.tool_calls += tool_calls
        self.first.set()


async def failure(adapter: Adapter, call: Call) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        await adapter.call(call)
    error = caught.value
    assert str(error) == error.message
    assert error.message.endswith(".")
    assert "\n" not in error.message
    assert adapter.in_flight == 0
    return error


async def given_up(sandbox: SandboxControl) -> None:
    """Wait until the sandbox, too, knows that nobody waits for an answer any more."""

    async def idle() -> bool:
        bill = await asyncio.to_thread(sandbox.bill)
        return bool(bill["in_flight"] == 0)

    await eventually_async(idle)


# Answers


async def test_an_answer(
    adapter: Adapter, sandbox: SandboxControl, kind: ProviderKind, stream: bool
) -> None:
    sink = Sink()
    answer = await adapter.call(make_call(kind, "Draft a mail.", stream=stream), sink)
    (logged,) = sandbox.calls()
    assert answer.text
    assert sink.text == (answer.text if stream else "")
    assert answer.finish_reason == "stop"
    assert answer.model == MODELS[kind]
    assert answer.request_id == logged["request_id"]
    assert answer.usage == Usage(input=4, output=-(-len(answer.text) // 4))
    assert answer.raw_usage is not None
    assert answer.service_tier in ("default", "standard")
    assert (answer.first_token_ms is not None) is stream
    assert 0 <= (answer.first_token_ms or 0) <= answer.duration_ms < 10_000
    assert logged["stream"] is stream
    assert logged["prompt_tail"] == "Draft a mail."


async def test_the_same_answer_either_way_on_either_wire(
    adapters: Adapters, sandbox: SandboxControl
) -> None:
    answers = [
        await adapters.get(kind, url_of(sandbox, kind), Secret("a-key")).call(
            make_call(kind, "Draft a mail.", stream=stream, system="Be brief.")
        )
        for kind in KINDS
        for stream in (False, True)
    ]
    assert len({(answer.text, answer.usage) for answer in answers}) == 1


async def test_usage_by_class(adapter: Adapter, kind: ProviderKind, stream: bool) -> None:
    prompt = "INPUT: 1000\nCACHED: 600\nCACHE_WRITE: 300\nTOKENS: 50\nREASONING: 20"
    answer = await adapter.call(make_call(kind, prompt, stream=stream))
    assert answer.usage == Usage(
        input=100, cache_read=600, cache_write_5m=300, output=50, reasoning=20
    )


async def test_a_cut_answer_says_so(adapter: Adapter, kind: ProviderKind, stream: bool) -> None:
    answer = await adapter.call(make_call(kind, "TOKENS: 50", stream=stream, max_tokens=10))
    assert answer.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.output == 10


async def test_a_tool_call(adapter: Adapter, kind: ProviderKind, stream: bool) -> None:
    city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    sink = Sink()
    answer = await adapter.call(
        make_call(
            kind,
            "Weather?",
            stream=stream,
            tools=(Tool(name="weather", parameters=city),),
            tool_choice="weather",
        ),
        sink,
    )
    (call,) = answer.tool_calls
    assert isinstance(call, ToolCallPart)
    assert answer.finish_reason == "tool_calls"
    assert call.name == "weather"
    assert isinstance(call.arguments["city"], str)
    if stream:
        assert sink.tool_calls[0]["name"] == "weather"
        assert sink.tool_calls[0]["id"] == call.id
        fragments = "".join(fragment.get("arguments", "") for fragment in sink.tool_calls)
        assert json.loads(fragments) == call.arguments


async def test_a_json_answer(adapter: Adapter, kind: ProviderKind, stream: bool) -> None:
    schema = {
        "type": "object",
        "properties": {"mood": {"type": "string"}},
        "required": ["mood"],
        "additionalProperties": False,
    }
    wanted = ResponseFormat(json_schema=schema)
    answer = await adapter.call(make_call(kind, "Mood?", stream=stream, response_format=wanted))
    assert isinstance(json.loads(answer.text)["mood"], str)


async def test_what_cannot_be_stored_is_replaced(
    adapter: Adapter, sandbox: SandboxControl, kind: ProviderKind, stream: bool
) -> None:
    sandbox.add_fault("answer_text", text="a\x00b\ud800c")
    sink = Sink()
    answer = await adapter.call(make_call(kind, stream=stream), sink)
    assert answer.text == "a\ufffdb\ufffdc"
    assert sink.text == (answer.text if stream else "")


async def test_usage_that_was_not_sent_is_not_zero(
    adapter: Adapter, sandbox: SandboxControl, kind: ProviderKind, stream: bool
) -> None:
    sandbox.add_fault("no_usage")
    answer = await adapter.call(make_call(kind, stream=stream))
    assert answer.text
    assert answer.usage is None


# Failures


@pytest.mark.parametrize(
    "case",
    [
        ("http_400", E.BAD_REQUEST, 400),
        ("http_401", E.AUTH, 401),
        ("http_402", E.QUOTA, 402),
        ("http_403", E.AUTH, 403),
        ("http_404", E.NOT_FOUND, 404),
        ("http_413", E.CONTEXT_TOO_LONG, 413),
        ("http_429", E.RATE_LIMITED, 429),
        ("quota_429", E.QUOTA, 429),
        ("context_too_long", E.CONTEXT_TOO_LONG, 400),
        ("content_policy", E.CONTENT_FILTER, 400),
        ("http_500", E.SERVER, 500),
        ("http_503", E.OVERLOADED, 503),
        ("http_529", E.OVERLOADED, 529),
    ],
)
async def test_a_refusal_is_asked_for_once(
    adapter: Adapter,
    sandbox: SandboxControl,
    kind: ProviderKind,
    stream: bool,
    case: tuple[str, ErrorClass, int],
) -> None:
    fault, error_class, status = case
    sandbox.add_fault(fault, retry_after_s=7)
    error = await failure(adapter, make_call(kind, stream=stream))
    (logged,) = sandbox.calls()
    assert (error.error_class, error.status) == (error_class, status)
    assert error.request_id == logged["request_id"]
    assert error.sent
    assert error.partial.usage is None
    assert error.headroom is not None
    if status == 429:
        assert error.retry_after_s == 7


@pytest.mark.parametrize(
    "case",
    [
        ("reset_before_headers", E.CONNECT, E.CONNECT),
        ("reset_after_headers", E.STREAM_BROKEN, E.STREAM_BROKEN),
        ("cut_stream", E.STREAM_BROKEN, E.STREAM_BROKEN),
        ("truncated_stream", E.TRUNCATED, E.GARBAGE),
        ("malformed_chunk", E.STREAM_BROKEN, E.GARBAGE),
        ("garbage_body", E.GARBAGE, E.GARBAGE),
        ("content_filter", E.CONTENT_FILTER, E.CONTENT_FILTER),
    ],
)
async def test_a_broken_answer_is_no_answer(
    adapter: Adapter,
    sandbox: SandboxControl,
    kind: ProviderKind,
    stream: bool,
    case: tuple[str, ErrorClass, ErrorClass],
) -> None:
    fault, streamed, whole = case
    sandbox.add_fault(fault)
    error = await failure(adapter, make_call(kind, "TOKENS: 40", stream=stream))
    assert error.error_class is (streamed if stream else whole)
    assert error.sent
    assert len(sandbox.calls()) == 1
    if stream and fault in ("cut_stream", "truncated_stream"):
        sandbox.clear_faults()
        answer = await adapter.call(make_call(kind, "TOKENS: 40"))
        assert error.partial.text
        assert answer.text.startswith(error.partial.text)
    if fault == "content_filter":
        assert error.partial.usage is not None  # it was paid
        assert error.partial.exact


async def test_an_error_event(adapters: Adapters, sandbox: SandboxControl) -> None:
    sandbox.add_fault("error_event")
    expected: dict[ProviderKind, ErrorClass] = {
        "openai": E.STREAM_BROKEN,
        "anthropic": E.OVERLOADED,
    }
    for kind, error_class in expected.items():
        adapter = adapters.get(kind, url_of(sandbox, kind), None)
        error = await failure(adapter, make_call(kind, stream=True))
        assert (error.error_class, error.status) == (error_class, 200)
        assert error.partial.text


@pytest.mark.parametrize("fault", ["content_filter", "refusal", "content_policy"])
async def test_a_filter_gives_the_providers_reason(
    adapter: Adapter, sandbox: SandboxControl, kind: ProviderKind, stream: bool, fault: str
) -> None:
    sandbox.add_fault(fault)
    error = await failure(adapter, make_call(kind, stream=stream))
    assert error.error_class is E.CONTENT_FILTER
    reasons = {
        ("content_policy", "openai"): "rejected as a result of our safety system",
        ("content_policy", "anthropic"): "Output blocked by content filtering policy",
        ("refusal", "openai"): DECLINES.rstrip("."),
        ("content_filter", "openai"): "filtered the answer",  # it gives none
    }
    assert reasons.get((fault, kind), "The answer was withheld") in error.message
    # What it had thought up is paid.
    assert (error.partial.usage is None) is (fault == "content_policy")
    assert error.partial.exact is (fault != "content_policy")


async def test_an_end_without_its_marker(
    adapters: Adapters, sandbox: SandboxControl, stream: bool
) -> None:
    sandbox.add_fault("missing_terminal")
    claude = adapters.get("anthropic", url_of(sandbox, "anthropic"), None)
    error = await failure(claude, make_call("anthropic", stream=stream))
    assert error.error_class is E.TRUNCATED
    gpt = adapters.get("openai", url_of(sandbox, "openai"), None)
    if stream:  # finish reason and usage have come, only [DONE] has not: nothing is missing
        assert (await gpt.call(make_call("openai", stream=True))).usage is not None
        return
    error = await failure(gpt, make_call("openai"))
    assert error.error_class is E.TRUNCATED


@pytest.mark.parametrize("then", ["end", "hold", "close"])
@pytest.mark.parametrize("usage", [True, False], ids=["usage", "no usage"])
async def test_a_stream_without_its_marker_ends_promptly(
    adapter: Adapter, sandbox: SandboxControl, kind: ProviderKind, then: str, usage: bool
) -> None:
    sandbox.add_fault("missing_terminal", then=then, usage=usage)
    # So long that a call which waited for one of them would be seen.
    limits = Deadlines(connect_s=5, first_token_s=60, response_s=60, idle_s=60, total_s=60)
    call = make_call(kind, stream=True, deadlines=limits)
    sink = Sink()
    started = time.monotonic()
    if kind == "openai" and usage:
        answer = await adapter.call(call, sink)
        assert (answer.finish_reason, answer.usage) == ("stop", Usage(input=3, output=20))
        assert sink.text == answer.text
    else:
        with pytest.raises(ProviderError, match="ended without its end marker") as caught:
            await adapter.call(call, sink)
        assert (caught.value.error_class, caught.value.sent) == (E.TRUNCATED, True)
        assert caught.value.partial.text == sink.text != ""
        assert (caught.value.partial.usage is not None) is usage
    assert time.monotonic() - started < 20
    assert adapter.in_flight == 0
    await given_up(sandbox)


async def test_the_end_is_not_waited_for_beyond_the_total_deadline(
    adapter: Adapter, sandbox: SandboxControl, kind: ProviderKind
) -> None:
    sandbox.add_fault("missing_terminal", then="hold", usage=False)
    limits = Deadlines(connect_s=1, first_token_s=1, response_s=1, idle_s=1, total_s=1)
    error = await failure(adapter, make_call(kind, stream=True, deadlines=limits))
    assert error.error_class is E.TRUNCATED


# Limits


async def test_what_is_left_of_the_limits(
    adapter: Adapter, sandbox: SandboxControl, kind: ProviderKind, stream: bool
) -> None:
    sandbox.clear_limits()
    sandbox.limit(requests_per_minute=2, tokens_per_minute=1_000)
    try:
        answer = await adapter.call(make_call(kind, "INPUT: 100\nTOKENS: 50", stream=stream))
        sandbox.add_fault("cut_stream", times=1)
        broken = await failure(adapter, make_call(kind, "INPUT: 100\nTOKENS: 50", stream=stream))
        limited = await failure(adapter, make_call(kind, stream=stream))
    finally:
        sandbox.clear_limits()
    abundant = {"input_tokens": 9_999_000, "output_tokens": 1_999_000}
    others = abundant if kind == "anthropic" else {}
    assert answer.headroom == Headroom(requests=1, tokens=850, **others)
    assert broken.error_class is E.STREAM_BROKEN
    assert broken.headroom is not None
    assert (broken.headroom.requests, broken.headroom.tokens) == (0, 700)
    assert limited.error_class is E.RATE_LIMITED
    assert limited.headroom is not None
    assert (limited.headroom.requests, limited.headroom.tokens) == (0, 700)
    assert 50 < (limited.headroom.reset_s or 0) <= 62
    assert 50 < (limited.retry_after_s or 0) <= 60


async def test_a_429_that_tells_no_wait_waits_for_the_reset(
    adapters: Adapters, kind: ProviderKind, stream: bool
) -> None:
    lines = {
        "openai": ("x-ratelimit-remaining-tokens: 0", "x-ratelimit-reset-tokens: 1m3.5s"),
        "anthropic": (
            "anthropic-ratelimit-input-tokens-remaining: 0",
            "anthropic-ratelimit-input-tokens-reset: 2026-11-22T12:01:03.5Z",
            "date: Sun, 22 Nov 2026 12:00:00 GMT",
        ),
    }

    async def handler(_head: bytes, _body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(reply(b"{}", "application/json", *lines[kind], status=429))

    async with odd_server(handler) as (url, _):
        error = await failure(adapters.get(kind, url, None), make_call(kind, stream=stream))
    assert (error.error_class, error.retry_after_s) == (E.RATE_LIMITED, 63.5)


async def test_a_server_that_tells_nothing_of_limits(
    adapters: Adapters, kind: ProviderKind, stream: bool
) -> None:
    async def handler(_head: bytes, _body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(chunked(*STREAM[kind]) if stream else reply(WHOLE[kind]))

    async with odd_server(handler) as (url, _):
        answer = await adapters.get(kind, url, None).call(make_call(kind, stream=stream))
    assert answer.headroom is None


# Deadlines


@pytest.mark.parametrize(
    "case",
    [
        ("hang", False, {"total_s": 0.3}, "did not finish within 0.3 s"),
        ("hang", True, {"first_token_s": 0.3}, "sent no token within 0.3 s"),
        ("hang", True, {"total_s": 0.3}, "did not finish within 0.3 s"),
        ("slow_first_token", False, {"total_s": 0.3}, "did not finish within 0.3 s"),
        ("slow_first_token", True, {"first_token_s": 0.3}, "sent no token within 0.3 s"),
        ("hang", False, {"response_s": 0.3}, "sent no whole answer within 0.3 s"),
        ("slow_first_token", False, {"response_s": 0.3}, "sent no whole answer within 0.3 s"),
        ("stall", False, {"response_s": 0.3}, "sent no whole answer within 0.3 s"),
        ("hang", False, {"response_s": 0.3, "total_s": 0.3}, "did not finish within 0.3 s"),
        ("stall", True, {"idle_s": 0.3}, "fell silent for 0.3 s"),
        ("slow_drip", True, {"total_s": 0.8}, "did not finish within 0.8 s"),
    ],
)
async def test_deadlines(
    adapter: Adapter,
    sandbox: SandboxControl,
    kind: ProviderKind,
    case: tuple[str, bool, dict[str, float], str],
) -> None:
    fault, stream, deadlines, sentence = case
    sandbox.add_fault(fault, tokens_per_s=10, first_token_ms=1000)
    limits = dict.fromkeys(("connect_s", "first_token_s", "response_s", "idle_s", "total_s"), 5.0)
    limits |= deadlines
    started = time.monotonic()
    error = await failure(adapter, make_call(kind, stream=stream, deadlines=Deadlines(**limits)))
    assert error.error_class is E.TIMEOUT
    assert sentence in error.message
    assert error.sent
    assert time.monotonic() - started < 4
    assert bool(error.partial.text) is (stream and fault in ("stall", "slow_drip"))
    await given_up(sandbox)


async def test_a_slow_stream_that_keeps_coming_is_not_idle(
    adapter: Adapter, sandbox: SandboxControl, kind: ProviderKind
) -> None:
    sandbox.add_fault("slow_drip", tokens_per_s=20)
    limits = Deadlines(connect_s=5, first_token_s=5, response_s=5, idle_s=0.4, total_s=20)
    answer = await adapter.call(make_call(kind, stream=True, deadlines=limits))
    assert answer.duration_ms > 600
    assert answer.finish_reason == "stop"


async def test_a_full_pool_is_ours(
    adapters: Adapters, sandbox: SandboxControl, kind: ProviderKind
) -> None:
    sandbox.add_fault("hang", times=1)
    narrow = Adapters(max_connections=1)
    adapter = narrow.get(kind, url_of(sandbox, kind), None)
    waiting = asyncio.create_task(adapter.call(make_call(kind)))
    await asyncio.to_thread(sandbox.wait_for_calls, 1, 10)
    limits = Deadlines(connect_s=0.2, first_token_s=5, response_s=5, idle_s=5, total_s=5)
    with pytest.raises(ProviderError) as caught:
        await adapter.call(make_call(kind, deadlines=limits))
    assert caught.value.error_class is E.POOL_TIMEOUT
    assert not caught.value.sent
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert (await adapter.call(make_call(kind))).text  # the only connection is free again
    await narrow.close()


@pytest.mark.parametrize("fault", ["hang", "stall"])
async def test_a_cancellation_passes_through_and_frees_the_connection(
    sandbox: SandboxControl, kind: ProviderKind, fault: str
) -> None:
    sandbox.add_fault(fault, times=1)
    narrow = Adapters(max_connections=1)
    adapter = narrow.get(kind, url_of(sandbox, kind), None)
    sink = Sink()
    task = asyncio.create_task(adapter.call(make_call(kind, stream=True), sink))
    await asyncio.to_thread(sandbox.wait_for_calls, 1, 10)
    if fault == "stall":
        await asyncio.wait_for(sink.first.wait(), 10)
    task.cancel("the user said so")
    with pytest.raises(asyncio.CancelledError, match="the user said so"):
        await task
    assert task.cancelled()
    assert adapter.in_flight == 0
    assert (await adapter.call(make_call(kind))).text
    await given_up(sandbox)
    await narrow.close()


# Connections


async def test_nobody_listens(adapters: Adapters, kind: ProviderKind, stream: bool) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and not listening: refused
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        error = await failure(adapters.get(kind, url, None), make_call(kind, stream=stream))
    assert error.error_class is E.CONNECT
    assert not error.sent
    assert error.message.startswith(f"No connection to the {kind} provider")


async def test_no_connection_within_its_deadline(adapters: Adapters, kind: ProviderKind) -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        crowd = [socket.socket() for _ in range(8)]  # more than the backlog takes
        for one in crowd:
            one.setblocking(False)
            one.connect_ex(address)
        limits = Deadlines(connect_s=0.3, first_token_s=9, response_s=9, idle_s=9, total_s=9)
        adapter = adapters.get(kind, f"http://127.0.0.1:{address[1]}", None)
        error = await failure(adapter, make_call(kind, deadlines=limits))
        for one in crowd:
            one.close()
    assert error.error_class is E.CONNECT
    assert not error.sent


Handler = Callable[[bytes, bytes, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def odd_server(handler: Handler) -> AsyncIterator[tuple[str, list[int]]]:
    """Serve HTTP badly; yields the address and a list with one entry a connection."""
    connections: list[int] = []
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(1)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                await handler(head, await reader.readexactly(length), writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.create_task(serve(reader, writer)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", connections
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks)


def reply(
    body: bytes, content_type: str = "application/json", *more: str, status: int = 200
) -> bytes:
    lines = [f"HTTP/1.1 {status} X", f"content-type: {content_type}", *more]
    return "\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode() + body


def chunked(*events: bytes, end: bool = True) -> bytes:
    head = (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    body = b"".join(b"%x\r\n%s\r\n" % (len(event), event) for event in events)
    return head + body + (b"0\r\n\r\n" if end else b"")


WHOLE: dict[ProviderKind, bytes] = {
    "openai": json.dumps(
        {
            "model": "m",
            "choices": [{"message": {"content": "Hi."}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 2, "completion_tokens": 1},
        }
    ).encode(),
    "anthropic": json.dumps(
        {
            "model": "m",
            "content": [{"type": "text", "text": "Hi."}],
            "stop_reason": "end_turn",
            "usage": {"input_tokens": 2, "output_tokens": 1},
        }
    ).encode(),
}
STREAM: dict[ProviderKind, tuple[bytes, ...]] = {
    "openai": (
        b'data: {"choices":[{"delta":{"content":"Hi."},"finish_reason":"stop"}]}\n\n',
        b'data: {"choices":[],"usage":{"prompt_tokens":2,"completion_tokens":1}}\n\n',
        b"data: [DONE]\n\n",
    ),
    "anthropic": (
        b'data: {"type":"message_start","message":{"usage":{"input_tokens":2}}}\n\n',
        b'data: {"type":"content_block_start","index":0,"content_block":{"type":"text"}}\n\n',
        b'data: {"type":"content_block_delta","index":0,\n',  # one event in two lines
        b'data: "delta":{"type":"text_delta","text":"Hi."}}\n\n',
        b'data: {"type":"message_delta","delta":{"stop_reason":"end_turn"},\n',
        b'data: "usage":{"output_tokens":1}}\n\n',
        b'data: {"type":"message_stop"}\n\n',
    ),
}


def good(answer: Answer) -> bool:
    return (answer.text, answer.finish_reason, answer.usage) == (
        "Hi.",
        "stop",
        Usage(input=2, output=1),
    )


async def test_what_leaves(adapters: Adapters, kind: ProviderKind, stream: bool) -> None:
    seen: list[tuple[bytes, bytes]] = []

    async def handler(head: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        seen.append((head, body))
        writer.write(chunked(*STREAM[kind]) if stream else reply(WHOLE[kind]))

    async with odd_server(handler) as (url, connections):
        adapter = adapters.get(kind, url, Secret(" the-key\n"))
        call = make_call(kind, "Hello", stream=stream, metadata={"account": "acct-4711"})
        for _ in range(5):
            assert good(await adapter.call(call, Sink()))
    assert len(seen) == 5
    assert len(connections) == 1  # read to its end, a connection serves the next call
    head, body = seen[0]
    path = b"/chat/completions" if kind == "openai" else b"/v1/messages"
    assert head.startswith(b"POST " + path)
    assert b"\r\nauthorization: bearer the-key\r\n" in head.lower()
    assert b"\r\ncontent-type: application/json\r\n" in head.lower()
    assert b"idempotency" not in head.lower()
    assert b"acct-4711" not in head + body
    assert json.loads(body).get("stream", False) is stream


async def test_a_server_that_goes_on_after_the_end_does_not_hold_the_answer(
    adapters: Adapters, kind: ProviderKind
) -> None:
    async def handler(_head: bytes, _body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(chunked(*STREAM[kind], b"data: {not json\n\n", end=False))

    async with odd_server(handler) as (url, connections):
        adapter = adapters.get(kind, url, None)
        for _ in range(2):
            answer = await adapter.call(make_call(kind, stream=True))
            assert good(answer)
            assert answer.duration_ms < 5_000
        assert len(connections) == 2  # what cannot be read to its end is not used again


@pytest.mark.parametrize("stream", [False, True])
async def test_compressed_answers(adapters: Adapters, kind: ProviderKind, stream: bool) -> None:
    async def handler(_head: bytes, _body: bytes, writer: asyncio.StreamWriter) -> None:
        body = gzip.compress(b"".join(STREAM[kind]) if stream else WHOLE[kind])
        content_type = "text/event-stream" if stream else "application/json"
        writer.write(reply(body, content_type, "content-encoding: gzip"))

    async with odd_server(handler) as (url, _):
        call = make_call(kind, stream=stream)
        assert good(await adapters.get(kind, url, None).call(call))


async def test_a_server_that_does_not_stream_when_asked_to(
    adapters: Adapters, kind: ProviderKind
) -> None:
    async def handler(_head: bytes, _body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(reply(WHOLE[kind]))

    async with odd_server(handler) as (url, _):
        sink = Sink()
        assert good(await adapters.get(kind, url, None).call(make_call(kind, stream=True), sink))
        assert sink.text == "Hi."


@pytest.mark.parametrize(
    "case",
    [
        (reply(b""), E.GARBAGE, E.GARBAGE),
        (reply(b"[]"), E.GARBAGE, E.GARBAGE),
        (reply(b'{"choices": []}'), E.GARBAGE, E.GARBAGE),
        (reply(b'{"choices": [{"message": {"content": ["x"]}}]}'), E.GARBAGE, E.GARBAGE),
        (reply(b'{"error": {"message": "Oops"}}'), E.GARBAGE, E.GARBAGE),
        (reply(b'{"error": {"code": "insufficient_quota"}}'), E.QUOTA, E.QUOTA),
        (reply(b"<html>", "text/html"), E.GARBAGE, E.GARBAGE),
        (reply(b"data: []\n\n", "text/event-stream"), E.STREAM_BROKEN, E.GARBAGE),
        (reply(b"data: 1", "text/event-stream"), E.TRUNCATED, E.GARBAGE),
        (reply(b"", "text/plain", "location: /elsewhere", status=302), E.NOT_FOUND, E.NOT_FOUND),
        (reply(b"\x1f\x8bxx", "text/x", "content-encoding: gzip"), E.GARBAGE, E.GARBAGE),
        (b"SSH-2.0-OpenSSH_9.2\r\n", E.GARBAGE, E.GARBAGE),
    ],
)
async def test_nonsense(
    adapters: Adapters,
    kind: ProviderKind,
    stream: bool,
    case: tuple[bytes, ErrorClass, ErrorClass],
) -> None:
    answer, streamed, whole = case

    async def handler(_head: bytes, _body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)

    async with odd_server(handler) as (url, connections):
        adapter = adapters.get(kind, url, None)
        error = await failure(adapter, make_call(kind, stream=stream))
    assert error.error_class is (streamed if stream else whole)
    assert error.sent
    assert len(connections) == 1


async def test_an_error_that_repeats_key_and_prompt_is_told_without_them(
    adapters: Adapters, kind: ProviderKind
) -> None:
    prompt = "Frau Keller wants to cancel contract 4711-B at once."

    async def handler(head: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        key = head.split(b"earer ")[1].split(b"\r\n")[0].decode()
        told = f"bad key {key}" if b"4711" not in body else f"bad prompt {prompt}"
        message = {"type": "error", "error": {"type": "invalid_request_error", "message": told}}
        writer.write(reply(json.dumps(message).encode(), status=400))

    async with odd_server(handler) as (url, _):
        adapter = adapters.get(kind, url, Secret("a-very-secret-key"))
        for said in (prompt, "Hello"):
            error = await failure(adapter, make_call(kind, said))
            assert error.error_class is E.BAD_REQUEST
            assert "Keller" not in error.message
            assert "secret" not in error.message


async def test_an_adapter_for_each_endpoint_and_key(
    sandbox: SandboxControl, kind: ProviderKind
) -> None:
    adapters = Adapters(max_connections=5, max_adapters=2)
    url = url_of(sandbox, kind)
    sandbox.add_fault("hang", times=1)
    first = adapters.get(kind, url, Secret("key-1"))
    running = asyncio.create_task(first.call(make_call(kind)))
    await asyncio.to_thread(sandbox.wait_for_calls, 1, 10)
    second = adapters.get(kind, url, Secret("key-2"))
    assert adapters.get(kind, url, Secret("key-1")) is first
    assert adapters.get(kind, url, Secret("key-2")) is second
    # One too many: the idle one goes, not the busy one.
    third = adapters.get(kind, url, Secret("key-3"))
    assert adapters.get(kind, url, Secret("key-1")) is first
    assert adapters.get(kind, url, Secret("key-3")) is third
    assert adapters.get(kind, url, Secret("key-2")) is not second
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await adapters.close()
