"""The compatible door through JavaScript's clients: `openai`, and the Vercel AI SDK."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.doors import PNG, open_doors
from tests.harness import Rig
from tests.http_servers import HttpServer
from tests.node_packages import run_script

NOTE = {"summary": "confirmed", "urgent": True}


@pytest.fixture(scope="module")
def server(module_rig: Rig) -> HttpServer:
    return open_doors(module_rig)


@pytest.fixture(scope="module")
def openai(server: HttpServer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return _told("openai.mjs", server, tmp_path_factory.mktemp("openai"))


@pytest.fixture(scope="module")
def vercel(server: HttpServer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return _told("vercel.mjs", server, tmp_path_factory.mktemp("vercel"))


def _told(script: str, server: HttpServer, folder: Path) -> Any:
    return run_script(script, [f"{server.url}/v1", server.api_key, PNG], folder)


def test_openai_chats(openai: Any) -> None:
    said = openai["chat"]
    assert (said["text"], said["finish"]) == ("Hello Ada", "stop")
    assert (said["ours"]["attempts"], said["ours"]["warnings"]) == (1, [])


def test_openai_streams(openai: Any) -> None:
    said = openai["stream"]
    assert len(said["text"]) == 240
    assert said["usage"]["completion_tokens"] == 60


def test_openai_makes_the_round_of_a_tool(openai: Any) -> None:
    assert openai["toolRound"] == {
        "name": "find_contact",
        "args": {"name": "confirmed"},
        "text": "Found her.",
    }


def test_openai_gets_json_of_a_schema(openai: Any) -> None:
    assert openai["schema"] == NOTE


def test_openai_shows_an_image(openai: Any) -> None:
    said = openai["image"]
    assert said["text"] == "seen"
    assert "vision" in said["warnings"][0]


def test_openai_lists_models(openai: Any) -> None:
    assert {"sluice/auto", "sluice/draft"} < set(openai["models"])


def test_openai_knows_errors(openai: Any) -> None:
    assert openai["unknownModel"] == {
        "kind": "NotFoundError",
        "status": 404,
        "code": "model_not_found",
        "param": "model",
    }
    assert openai["wrongField"] == {
        "kind": "BadRequestError",
        "status": 400,
        "code": "invalid_request",
        "param": "temperature",
    }


def test_vercel_chats(vercel: Any) -> None:
    said = vercel["chat"]
    assert (said["text"], said["finishReason"]) == ("Hello Ada", "stop")
    assert said["usage"]["inputTokens"] > 0


def test_vercel_streams(vercel: Any) -> None:
    said = vercel["stream"]
    assert len(said["text"]) == 240
    assert said["usage"]["outputTokens"] == 60


def test_vercel_makes_the_round_of_a_tool(vercel: Any) -> None:
    said = vercel["toolRound"]
    assert said == {"found": [{"name": "confirmed"}], "steps": 2, "text": "Found her."}


def test_vercel_gets_json_of_a_schema(vercel: Any) -> None:
    assert vercel["schema"] == NOTE


def test_vercel_shows_an_image(vercel: Any) -> None:
    assert vercel["image"] == {"text": "seen"}


def test_vercel_knows_errors(vercel: Any) -> None:
    said = vercel["unknownModel"]
    assert (said["kind"], said["statusCode"]) == ("AI_APICallError", 404)
    assert (said["code"], said["isRetryable"]) == ("model_not_found", False)
    assert said["message"].startswith("model: 'gpt-99' is not in use here")


def test_vercel_asks_once_for_a_job_that_has_no_answer(
    server: HttpServer, rig: Rig, tmp_path: Path
) -> None:
    """It has `maxRetries` of 2, and each of them would be another job."""
    rig.sandbox.add_fault("hang", prompt_contains="NEVER")
    before = len(rig.rows("SELECT 1 FROM jobs"))
    arguments = [f"{server.url}/v1", server.api_key, "NEVER ends"]
    late = run_script("vercel_once.mjs", arguments, tmp_path)
    assert len(rig.rows("SELECT 1 FROM jobs")) == before + 1
    assert (late["kind"], late["isRetryable"]) == ("AI_APICallError", False)
    assert (late["statusCode"], late["error"]["code"]) == (406, "still_running")
    rig.client.cancel(late["responseHeaders"]["x-sluice-job-id"])
