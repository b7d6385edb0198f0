"""The receiver in the documentation takes what we sign, once, and nothing else."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from sluicegate.shared.secrets import new_key
from sluicegate.shared.webhooks import (
    ID_HEADER,
    SIGNATURE_HEADER,
    TIMESTAMP_HEADER,
    signature,
)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "money.md"
SECRET = new_key()
BODY = b'{"id": 17, "message": "acme has spent 80%"}'


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> TestClient:
    monkeypatch.setenv("ALERT_SECRET", SECRET.get_secret_value())
    found = re.search(r"<!-- receiver -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found is not None
    # A module's annotations are looked up in the module.
    module: dict[str, Any] = {"__name__": "receiver"}
    exec(compile(found[1], str(PAGE), "exec"), module)
    return TestClient(module["app"])


def post(receiver: TestClient, alert_id: int = 17, **changes: Any) -> int:
    body, timestamp = changes.get("body", BODY), changes.get("timestamp", str(int(time.time())))
    signed = signature(SECRET, timestamp, BODY)
    headers = {
        ID_HEADER: str(alert_id),
        TIMESTAMP_HEADER: timestamp,
        SIGNATURE_HEADER: changes.get("signature", signed),
    }
    return int(receiver.post("/sluice", content=body, headers=headers).status_code)


def test_what_we_sign_is_taken_once(
    receiver: TestClient, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [post(receiver), post(receiver), post(receiver, 18)] == [204] * 3
    assert capsys.readouterr().out == "tell somebody: acme has spent 80%\n" * 2


def test_what_somebody_changed_is_refused(
    receiver: TestClient, capsys: pytest.CaptureFixture[str]
) -> None:
    assert post(receiver, body=b'{"id": 17, "message": "all is well"}') == 401
    assert post(receiver, signature="v1=" + "0" * 64) == 401
    assert post(receiver, signature="") == 401
    assert receiver.post("/sluice", content=BODY).status_code == 401
    assert capsys.readouterr().out == ""


def test_an_old_post_is_refused(receiver: TestClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert post(receiver, timestamp=str(int(time.time()) - 301)) == 401
    assert capsys.readouterr().out == ""
