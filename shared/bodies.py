"""Bodies: requests and results as the database keeps them, in the clear or sealed.

With `SLUICE_ENCRYPT_BODIES` what is personal in them is sealed with the keyring when it is stored:
all of a request, and of a result its text, its tool calls and what its error says. The rest of a
result, such as its state and its cost, stays in the clear for SQL. Reading does not look at the
setting: whatever is sealed is opened, so both kinds may stand side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

import orjson
from pydantic import SecretStr

from sluicegate.shared.errors import SettingsError
from sluicegate.shared.secrets import Keyring, SecretUnreadable
from sluicegate.shared.settings import Settings

#: The field that holds a token. No request and no result has one of this name.
SEALED: Final = "sealed"
#: How a sealed request begins. Its metadata are sealed once more beside it, so that who needs them
#: alone need not open images.
_BEGINS: Final = b'{"sealed":'
_METADATA: Final = "metadata"
#: What is personal in a result, and in its error.
_PERSONAL: Final = ("text", "tool_calls")
_SAID: Final = "error_message"


class Bodies:
    """Seals and opens bodies.

    seals: whether what is stored from now on is sealed; raises SettingsError if there is no key.
    What opens raises SecretUnreadable if no key of the keyring fits.
    """

    def __init__(self, keyring: Keyring, *, seals: bool) -> None:
        if seals and not keyring.fingerprints:
            raise SettingsError(
                "SLUICE_ENCRYPT_BODIES is set and SLUICE_ENCRYPTION_KEYS is not; "
                "`sluice secrets new-key` prints a key"
            )
        self._keyring = keyring
        self._seals = seals

    @classmethod
    def of(cls, settings: Settings) -> Bodies:
        """Return those of these settings; raises SettingsError."""
        return _made(settings.encryption_keys, settings.encrypt_bodies)

    def seal_request(self, content: bytes, metadata: Mapping[str, str]) -> bytes:
        """Return a request, the JSON of a `JobSpec`, as it is stored."""
        if not self._seals:
            return content
        sealed = {SEALED: self._keyring.seal(content)}
        if metadata:
            sealed[_METADATA] = self._keyring.seal(orjson.dumps(metadata))
        return orjson.dumps(sealed)

    def open_request(self, stored: str | bytes) -> bytes:
        """Return the JSON of a `JobSpec` from the text that is stored."""
        content = stored.encode() if isinstance(stored, str) else stored
        if not content.startswith(_BEGINS):
            return content
        return self._keyring.open(orjson.loads(content)[SEALED])

    def open_metadata(self, stored: Mapping[str, str] | str | None) -> dict[str, str]:
        """Return the metadata from what `request->'metadata'` is."""
        if isinstance(stored, str):
            opened: dict[str, str] = orjson.loads(self._keyring.open(stored))
            return opened
        return dict(stored or {})

    def seal_result(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return a result's body as it is stored."""
        if not self._seals:
            return body
        personal = {name: body[name] for name in _PERSONAL if body.get(name)}
        sealed = {name: value for name, value in body.items() if name not in _PERSONAL}
        error = body.get("error")
        if error is not None:
            personal[_SAID] = error["message"]
            sealed["error"] = {**error, "message": ""}
        return sealed | {SEALED: self._keyring.seal(orjson.dumps(personal))} if personal else sealed

    def open_result(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """Return a result's body from what is stored."""
        body = dict(stored)
        token = body.pop(SEALED, None)
        if token is None:
            return body
        personal = orjson.loads(self._keyring.open(token))
        if _SAID in personal:
            body["error"] = {**body["error"], "message": personal.pop(_SAID)}
        body.update(personal)
        return body

    def open_error(self, said: str | None, token: str | None) -> str | None:
        """Return what the error of a result says, from its message and its token.

        What cannot be opened is named as such: a list need not end at it.
        """
        if token is None:
            return said
        try:
            opened: str | None = orjson.loads(self._keyring.open(token)).get(_SAID)
        except SecretUnreadable as unreadable:
            return f"({str(unreadable).rstrip('.')})"
        return opened


#: Opens what is in the clear, and nothing else.
IN_THE_CLEAR: Final = Bodies(Keyring(()), seals=False)


@lru_cache(maxsize=16)
def _made(keys: SecretStr | None, seals: bool) -> Bodies:
    return Bodies(Keyring.read(keys), seals=seals)
