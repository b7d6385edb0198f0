"""Bodies: what is sealed, what stays in the clear, and who can read it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import orjson
import pytest

from sluicegate.shared.bodies import IN_THE_CLEAR, Bodies
from sluicegate.shared.errors import SettingsError
from sluicegate.shared.jobs import JobSpec, build_spec
from sluicegate.shared.secrets import Keyring, Secret, SecretUnreadable, new_key
from sluicegate.shared.settings import load_settings

OLD, NEW = new_key(), new_key()
SEALING = Bodies(Keyring([NEW]), seals=True)
READING = Bodies(Keyring([NEW]), seals=False)

SPEC = build_spec("draft", "Frau Canary ruft an", metadata={"lead": "Canary"})
RESULT: dict[str, Any] = {
    "version": 1,
    "state": "succeeded",
    "use_case": "draft",
    "cost_nano_usd": 17,
    "text": "Liebe Frau Canary",
    "tool_calls": [{"name": "call", "arguments": {"who": "Canary"}}],
}
FAILED: dict[str, Any] = {
    "version": 1,
    "state": "failed",
    "error": {"error_class": "server", "message": "Canary is not allowed", "status": 500},
}


def test_a_request_is_sealed_whole_and_its_metadata_once_more() -> None:
    content = SPEC.dump()
    stored = SEALING.seal_request(content, SPEC.metadata)
    assert b"Canary" not in stored
    found = orjson.loads(stored)
    assert found.keys() == {"sealed", "metadata"}
    for bodies in (SEALING, READING):
        assert bodies.open_request(stored) == bodies.open_request(stored.decode()) == content
        assert bodies.open_metadata(found["metadata"]) == {"lead": "Canary"}
    assert JobSpec.model_validate_json(READING.open_request(stored)) == SPEC
    assert orjson.loads(SEALING.seal_request(content, {})).keys() == {"sealed"}


@pytest.mark.parametrize("body", [RESULT, FAILED], ids=["answer", "error"])
def test_of_a_result_only_what_is_personal_is_sealed(body: dict[str, Any]) -> None:
    stored = SEALING.seal_result(body)
    assert b"Canary" not in orjson.dumps(stored)
    assert stored["state"] == body["state"]
    assert stored.get("cost_nano_usd") == body.get("cost_nano_usd")
    if body is FAILED:
        assert stored["error"] == {"error_class": "server", "message": "", "status": 500}
    assert READING.open_result(stored) == body


def test_a_result_without_a_word_is_not_sealed() -> None:
    silent = {"version": 1, "state": "succeeded", "text": "", "tool_calls": []}
    assert SEALING.seal_result(silent) == {"version": 1, "state": "succeeded"}


def test_without_the_setting_all_stays_as_it_is() -> None:
    content = SPEC.dump()
    for bodies in (READING, IN_THE_CLEAR):
        assert bodies.seal_request(content, SPEC.metadata) is content
        assert bodies.open_request(content.decode()) == content
        assert bodies.open_metadata({"lead": "Canary"}) == {"lead": "Canary"}
        assert bodies.open_metadata(None) == {}
        assert bodies.seal_result(RESULT) is RESULT
        assert bodies.open_result(RESULT) == RESULT


def test_what_is_in_the_clear_is_read_whatever_the_setting_says() -> None:
    assert SEALING.open_request(SPEC.dump()) == SPEC.dump()
    assert SEALING.open_result(FAILED) == FAILED


def test_a_key_that_is_not_here_is_one_sentence() -> None:
    stored = SEALING.seal_request(SPEC.dump(), SPEC.metadata)
    failed = SEALING.seal_result(FAILED)
    for bodies in (IN_THE_CLEAR, Bodies(Keyring([OLD]), seals=True)):
        reads: list[Callable[[], object]] = [
            partial(bodies.open_request, stored),
            partial(bodies.open_metadata, orjson.loads(stored)["metadata"]),
            partial(bodies.open_result, failed),
        ]
        for read in reads:
            with pytest.raises(SecretUnreadable, match=r"^SLUICE_ENCRYPTION_KEYS does not hold"):
                read()
        said = bodies.open_error("", failed["sealed"])
        assert said is not None
        assert said.startswith("(SLUICE_ENCRYPTION_KEYS does not hold")
    assert READING.open_error("", failed["sealed"]) == "Canary is not allowed"
    assert READING.open_error("in the clear", None) == "in the clear"


def test_an_older_key_still_opens() -> None:
    stored = Bodies(Keyring([OLD]), seals=True).seal_result(RESULT)
    assert Bodies(Keyring([NEW, OLD]), seals=True).open_result(stored) == RESULT


def test_sealing_without_a_key_is_refused_by_the_settings_names() -> None:
    with pytest.raises(SettingsError, match=r"^SLUICE_ENCRYPT_BODIES is set and SLUICE_ENCRYPTION"):
        Bodies.of(load_settings(encrypt_bodies=True))
    keys = Secret(f"{NEW.get_secret_value()},{OLD.get_secret_value()}")
    settings = load_settings(encrypt_bodies=True, encryption_keys=keys)
    assert Bodies.of(settings) is Bodies.of(settings)
    assert READING.open_result(Bodies.of(settings).seal_result(RESULT)) == RESULT
